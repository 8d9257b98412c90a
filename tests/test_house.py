"""The rules of the house: who may import whom, and what `import mbn` costs."""

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
    "step": {"checks", "contract", "convert", "registry"},
    "state": {"checks", "contract", "convert", "registry"},
    "layer": {"checks", "contract", "convert", "registry", "state", "step"},
    "functional": {"checks", "contract", "convert", "layer", "registry", "step"},
    "interop": {"checks", "contract", "layer", "mbn_torch.module", "registry", "state"},
    "conformance": {"contract", "mbn", "state"},
    "commands": {"conformance", "contract", "mbn", "registry", "state"},
    "__main__": {"commands"},
}
"""The rooms of mbn, and whom each may import; ``mbn`` itself, the public names, may import any of the first ten."""
BACKENDS = {"mbn_common", "mbn_cpu", "mbn_cupy", "mbn_jax", "mbn_numba", "mbn_numpy", "mbn_torch"}
SHARED = {"mbn_common", "mbn_cpu"}
"""Kernels that are no backend."""
FOR_BACKENDS = {"mbn.array_api", "mbn.contract", "mbn.threads"}
"""The parts of mbn that a backend may import."""
TOO_MUCH = (
    *("torch", "jax", "cupy", "numba", "flax", "keras", "onnx", "rich", "safetensors"),
    *("mbn.interop", "mbn.commands", "mbn.conformance"),
)
"""What `import mbn` may not import, nor any backend."""
MILLISECONDS = 20
"""What `import mbn` may take beyond NumPy."""


def room(module: str) -> str:
    """Return the room of mbn that a module is in; of a backend's, the package."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] or package if package == "mbn" else package


def test_no_files_import_each_other() -> None:
    assert house.circles(IMPORTS) == []


def test_no_rooms_import_each_other() -> None:
    rooms: dict[str, set[str]] = {room(name): set() for name in FILES}
    for name, others in IMPORTS.items():
        rooms[room(name)] |= {room(other) for other in others} - {room(name), "mbn"}
    assert house.circles(rooms) == []


@pytest.mark.parametrize("name", FRONTEND)
def test_rooms_import_what_they_may(name: str) -> None:
    found = {
        other if room(other) in BACKENDS else room(other)
        for module, others in IMPORTS.items()
        if room(module) == name and module.startswith("mbn.")
        for other in others
    }
    assert found - {name} <= FRONTEND[name]


def test_every_room_has_a_rule() -> None:
    assert {room(name) for name in FILES} - {"mbn"} == FRONTEND.keys() | BACKENDS


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_backends_import_the_contract_and_what_they_share(name: str) -> None:
    found = {other for module, others in IMPORTS.items() if room(module) == name for other in others}
    for other in found:
        of_mbn = ".".join(other.split(".")[:2])
        assert of_mbn in FOR_BACKENDS if other.startswith("mbn.") else room(other) in {name, *SHARED}, other


def test_ten_files_lie_beside_the_rooms() -> None:
    folder = Path(mbn.__file__).parent
    assert sum(path.is_file() for path in folder.iterdir()) <= 10


def test_backends_have_the_same_files() -> None:
    for name in BACKENDS - SHARED:
        files = {module.removeprefix(f"{name}.").partition(".")[0] for module in FILES if room(module) == name}
        assert "backend" in files - {name}
        own = {"channel_stats", "group", "integration", "kernels", "module"}
        assert files - {name, "backend", *own} <= {"compilation", "launches", "memory_overlap", "private"}, name


def _in_a_new_process(code: str) -> Any:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_import_brings_nothing_but_numpy() -> None:
    modules = _in_a_new_process("import json, sys, mbn; print(json.dumps(list(sys.modules)))")
    assert [name for name in modules if _is_one_of(name, TOO_MUCH)] == []
    assert [name for name in modules if _is_one_of(name, BACKENDS)] == []


def _is_one_of(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_import_takes_little_beyond_numpy() -> None:
    code = "import time, numpy; start = time.process_time(); import mbn; print(time.process_time() - start)"
    assert 1e3 * min(_in_a_new_process(code) for _ in range(7)) <= MILLISECONDS * (1 + sys.dont_write_bytecode * 4)


def test_backends_register_nothing_when_they_are_imported() -> None:
    pytest.importorskip("numba")
    code = """
import json
from numba.core import event
from mbn_cpu.kernels import numba_compilation, numba_passes, numba_steps
print(json.dumps(sum(map(len, event._registered.values()))))
"""
    assert _in_a_new_process(code) == 0


def test_backends_allocate_nothing_when_they_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if room(name) in {"mbn_cpu", "mbn_numpy"}]:
        monkeypatch.delitem(sys.modules, name)
    allocated = []
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda shape, *rest: allocated.append(shape) or empty(shape, *rest))
    importlib.import_module("mbn_numpy.backend")
    assert all(np.prod(shape) <= 1 for shape in allocated)


@pytest.mark.parametrize("shape", [(32, 64), (4096, 64, 16)], ids=["steps at once", "passes"])
@pytest.mark.parametrize("training", [True, False])
def test_x_goes_straight_down_to_the_kernels(shape: tuple[int, ...], *, training: bool) -> None:
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
