"""Record the results of this commit: ``python tests/golden/record.py [BACKEND ...]``.

Record them where bits are meant to change; the commit that changes them says why. Layers are not recorded again, since
the layers that users have saved do not change either.
"""

import json
import pickle
import sys
from pathlib import Path

import golden_cases
import numpy as np

HERE = Path(__file__).parent


def record(backend: str) -> None:
    """Write digests or values of the results of a backend."""
    found = {str(case): golden_cases.results(case, backend) for case in golden_cases.of_backend(backend)}
    if backend in golden_cases.EXACT:
        digests = {
            case: {name: golden_cases.digest(value) for name, value in results.items()}
            for case, results in found.items()
        }
        lines = [f"{json.dumps(case)}: {json.dumps(of_case)}" for case, of_case in digests.items()]
        (HERE / f"{backend}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    else:
        kept = {
            f"{case}: {name}": golden_cases.excerpt(value)
            for case, results in found.items()
            for name, value in results.items()
        }
        np.savez_compressed(HERE / f"{backend}.npz", **kept)


def record_layers(backend: str) -> None:
    """Write a layer after a call as a file and a pickle; pickle a layer that waits for its first input too."""
    bn = golden_cases.called(backend)
    bn.save(HERE / f"{backend}.safetensors")
    held = [bn, golden_cases.waiting(backend)]
    if backend == "torch":
        held.append(golden_cases.called(backend).as_module())
    (HERE / f"{backend}.pickle").write_bytes(pickle.dumps(held, protocol=4))


if __name__ == "__main__":
    for name in sys.argv[1:] or golden_cases.BACKENDS:
        record(name)
        if not (HERE / f"{name}.pickle").exists():
            record_layers(name)
