"""One rank of a benchmark of replicas: it times the step with shared statistics, the one alone, and a bare gather."""

import json
import sys

import numpy as np

from mbn.commands.bench.calls import Call
from mbn.commands.bench.clocks import elapsed
from mbn.commands.bench.engines import ENGINES
from mbn.commands.bench.subjects import Layer, subject
from mbn.commands.bench.workloads import Workload

ALONE, SHARED, GATHER = "alone", "shared", "gather"
_HEADER = 8
"""The numbers of a vector beside mean and m2; see ``mbn.replicas``."""
_TURN = 0.02
"""The least seconds of a turn."""


def main(question: str) -> None:
    """Time as the question says, and on rank 0 print the seconds of a call by round: of each mode, and of a gather."""
    asked = json.loads(question)
    workload = Workload(**{**asked["workload"], "shape": tuple(asked["workload"]["shape"])})
    backend, rounds, modes = asked["backend"], asked["rounds"], asked["modes"]
    world = ENGINES[backend].join(asked["rank"], asked["size"], asked["file"])
    alone, shared = (_layer(backend, workload) for _ in range(2))
    shared.layer.group = world.group
    gather = world.bare(np.zeros(3 * workload.num_features + _HEADER))

    def agreed(number: float) -> float:
        """Return the largest number of all ranks, which wait for each other here."""
        return float(np.asarray(world.bare(np.array([float(number)]))()).max())

    def turn(call: Call, number: int | None = None) -> float:
        agreed(0)
        return elapsed(call, number or 1)

    # Torch's calls have to be made again for each turn: they switch gradients on and off.
    def calls(mode: str) -> dict[str, Call]:
        return {SHARED: shared.step(mode), ALONE: alone.step(mode)}

    numbers: dict[str, int] = {}
    for mode in modes:
        for _ in range(2):  # the first one compiles
            once = min(agreed(turn(call)) for call in calls(mode).values())
        numbers[mode] = max(1, round(_TURN / once))
    turn(gather)
    numbers[GATHER] = max(1, round(_TURN / agreed(turn(gather))))
    seconds: dict[str, dict[str, list[float]]] = {mode: {SHARED: [], ALONE: []} for mode in modes}
    gathers: list[float] = []
    for _ in range(rounds):
        for mode in modes:
            for kind in (SHARED, ALONE):
                seconds[mode][kind].append(turn(calls(mode)[kind], numbers[mode]))
        gathers.append(turn(gather, numbers[GATHER]))
    agreed(0)
    world.leave()
    if world.rank == 0:
        print(json.dumps({"version": shared.version, "seconds": seconds, GATHER: gathers}))  # noqa: T201


def _layer(backend: str, workload: Workload) -> Layer:
    made = subject(backend, workload)
    if not isinstance(made, Layer):
        raise TypeError(f"{backend} is no backend")
    return made


if __name__ == "__main__":
    main(sys.argv[1])
