"""The rules of the architecture: which parts may import which, and how much `import mbn` loads."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import house
import numpy as np
import pytest

import mbn
from mbn.contract import Batch

FILES = house.modules()
IMPORTS = house.imports(FILES)
FRONTEND = {
    "threads": set(),
    "contract": {"threads"},
    "array_api": {"contract"},
    "checks": {"contract"},
    "registry": {"array_api", "contract", "threads"},
    "convert": {"checks", "contract", "registry"},
    "chunked": {"checks", "contract", "convert", "registry"},
    "step": {"checks", "chunked", "contract", "convert", "registry", "threads"},
    "replicas": {"checks", "chunked", "contract", "convert", "registry", "step"},
    "state": {"checks", "contract", "convert", "registry", "replicas"},
    "layer": {"checks", "chunked", "contract", "convert", "registry", "replicas", "state", "step"},
    "functional": {"checks", "contract", "convert", "layer", "registry", "replicas", "step"},
    "interop": {"checks", "contract", "layer", "mbn_torch.module", "registry", "state"},
    "conformance": {"contract", "mbn", "state"},
    "commands": {"chunked", "conformance", "contract", "mbn", "registry", "state", "step"},
    "__main__": {"commands"},
}
"""The parts of mbn, and the parts that each may import; ``mbn`` itself may import any of the first twelve."""
BACKENDS = {"mbn_common", "mbn_cpu", "mbn_cupy", "mbn_jax", "mbn_mlx", "mbn_numba", "mbn_numpy", "mbn_torch"}
SHARED = {"mbn_common", "mbn_cpu"}
"""Packages of shared kernels, which are no backends."""
FOR_BACKENDS = {"mbn.array_api", "mbn.contract", "mbn.threads"}
"""The parts of mbn that a backend may import."""
TOO_MUCH = (
    *("torch", "jax", "cupy", "numba", "mlx", "flax", "keras", "onnx", "rich", "safetensors"),
    *("mbn.interop", "mbn.commands", "mbn.conformance"),
)
"""Packages that `import mbn` must not load; backends are forbidden too."""
MILLISECONDS = 20
"""The time that `import mbn` may take beyond NumPy."""


def part(module: str) -> str:
    """Return the part that a module belongs to: a folder or file of mbn, or the package of a backend."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] or package if package == "mbn" else package


def test_files_have_no_import_cycles() -> None:
    assert house.cycles(IMPORTS) == []


def test_parts_have_no_import_cycles() -> None:
    parts: dict[str, set[str]] = {part(name): set() for name in FILES}
    for name, others in IMPORTS.items():
        parts[part(name)] |= {part(other) for other in others} - {part(name), "mbn"}
    assert house.cycles(parts) == []


@pytest.mark.parametrize("name", FRONTEND)
def test_part_imports_only_the_parts_it_may(name: str) -> None:
    found = {
        other if part(other) in BACKENDS else part(other)
        for module, others in IMPORTS.items()
        if part(module) == name and module.startswith("mbn.")
        for other in others
    }
    assert found - {name} <= FRONTEND[name]


def test_every_part_has_a_rule() -> None:
    assert {part(name) for name in FILES} - {"mbn"} == FRONTEND.keys() | BACKENDS


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_backend_imports_only_the_contract_and_shared_kernels(name: str) -> None:
    found = {other for module, others in IMPORTS.items() if part(module) == name for other in others}
    for other in found:
        of_mbn = ".".join(other.split(".")[:2])
        assert of_mbn in FOR_BACKENDS if other.startswith("mbn.") else part(other) in {name, *SHARED}, other


def test_mbn_has_at_most_ten_files_beside_its_folders() -> None:
    folder = Path(mbn.__file__).parent
    assert sum(path.is_file() for path in folder.iterdir()) <= 10


def test_backends_have_the_same_files() -> None:
    for name in BACKENDS - SHARED:
        files = {module.removeprefix(f"{name}.").partition(".")[0] for module in FILES if part(module) == name}
        assert "backend" in files - {name}
        own = {"channel_stats", "group", "integration", "kernels", "module"}
        assert files - {name, "backend", *own} <= {
            "compilation",
            "launches",
            "memory_overlap",
            "operators",
            "private",
        }, name


def _in_a_new_process(code: str) -> Any:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_import_of_mbn_loads_no_framework_and_no_backend() -> None:
    modules = _in_a_new_process("import json, sys, mbn; print(json.dumps(list(sys.modules)))")
    assert [name for name in modules if _is_one_of(name, TOO_MUCH)] == []
    assert [name for name in modules if _is_one_of(name, BACKENDS)] == []


def _is_one_of(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_import_of_mbn_takes_little_time_beyond_numpy() -> None:
    code = "import time, numpy; start = time.process_time(); import mbn; print(time.process_time() - start)"
    assert 1e3 * min(_in_a_new_process(code) for _ in range(7)) <= MILLISECONDS * (1 + sys.dont_write_bytecode * 4)


def test_import_of_numba_kernels_registers_no_listener() -> None:
    pytest.importorskip("numba")
    code = """
import json
from numba.core import event
from mbn_cpu.kernels import numba_compilation, numba_passes, numba_steps
print(json.dumps(sum(map(len, event._registered.values()))))
"""
    assert _in_a_new_process(code) == 0


def test_import_of_numpy_backend_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if part(name) in {"mbn_cpu", "mbn_numpy"}]:
        monkeypatch.delitem(sys.modules, name)
    allocated = []
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda shape, *rest: allocated.append(shape) or empty(shape, *rest))
    importlib.import_module("mbn_numpy.backend")
    assert all(np.prod(shape) <= 1 for shape in allocated)


@pytest.mark.parametrize("shape", [(32, 64), (4096, 64, 16)], ids=["steps at once", "passes"])
@pytest.mark.parametrize("training", [True, False])
def test_x_passes_through_at_most_seven_files_to_the_kernels(shape: tuple[int, ...], *, training: bool) -> None:
    bn, x = mbn.BatchNorm1d(shape[1], backend="numpy").train(training), np.ones(shape, np.float32)
    bn(x)
    files: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount]
        values = [frame.f_locals.get(name) for name in names]
        is_there = any(value is x or (isinstance(value, Batch) and value.x is x) for value in values)
        is_ours = frame.f_code.co_filename in map(str, FILES.values())
        if event == "call" and is_there and is_ours and frame.f_code.co_filename not in files[-1:]:
            files.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        bn(x)
    finally:
        sys.setprofile(None)
    is_kernel = [Path(file).parent.name == "kernels" for file in files]
    down = files[: is_kernel.index(True) + 1]
    assert len(down) <= 7, down
    assert len(set(down)) == len(down), down
