"""The kernels in Triton without a GPU: interpreted on tensors in host memory, and compiled for some cards."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

import mbn

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mbn.contract import Batch, Settings
from mbn.step import compose
from mbn_torch import backend as module
from mbn_torch.kernels import gpu, triton_gradients, triton_moments, triton_normalize
from mbn_torch.kernels.eager import EAGER
from mbn_torch.private import CPU, common_device

HERE = Path(__file__).parent
MODULES = {
    "moments": triton_moments,
    "finish_rough_moments": triton_moments,
    "finish_moments": triton_moments,
    "normalize": triton_normalize,
    "grad_sums": triton_gradients,
    "finish_grad_sums": triton_gradients,
    "grad_input": triton_gradients,
}
"""The module of each kernel."""
AREAS = {
    "accuracy": "test_accuracy or test_population",
    "gradients": "test_gradients or test_masks or test_out",
    "rest": "not (test_accuracy or test_population or test_gradients or test_masks or test_out)",
}
SLOW = {
    False: [
        *("test_out_may_be_x", "20000", "40x600", "does_not_write_to_its", "fully_masked"),
        *("rows", "lengths", "whole", "nothing", "any_size and float16", "long_channels", "same_bits"),
        "thousands and (ordinary or away)",
    ],
    True: [
        *("large_mean and not shape2", "thousands", "ones", "100.0", "10000.0"),
        *("same_bits", "long_channels", "190000x3", "9000x3", "9000x5", "40x3x200", "40x5x200", "145x18", "40x600"),
    ],
}
"""The tests that are left out, by whether the area is accuracy: each takes seconds, and is like one that stays.

A few tests of masks are enough, since sample weights are made before a kernel reads them; halves are computed as
float32 is.
"""


def _interpret(nested, *arguments):
    """Run pytest in a process in which Triton interprets, and return its output and exit status."""
    path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    command = [sys.executable, "-m", "pytest", "-p", "interpreted", "-p", "no:cacheprovider", "-q", "--tb=short"]
    run = nested([*command, *arguments], PYTHONPATH=path)
    return run.stdout, run.returncode


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS)
def test_interpreted_kernels_conform(area, nested):
    suite = Path(mbn.__file__).parent / "conformance"
    files = [str(path) for path in sorted(suite.glob("test_*.py")) if _is_of(area, path.stem)]
    output, code = _interpret(
        nested,
        *files,
        *("-p", "mbn.conformance.plugin", "-c", os.devnull, "--rootdir", str(suite), "--backend", "torch"),
        *("--hypothesis-profile", "interpreted"),
        *("-k", f"not ({' or '.join(SLOW[area == 'accuracy'])})"),
    )
    assert code == 0, output
    assert " passed" in output


def _is_of(area, name):
    named = {other: words.split(" or ") for other, words in AREAS.items() if other != "rest"}
    return name in named[area] if area in named else not any(name in words for words in named.values())


@pytest.mark.slow
def test_interpreted_cases_pass(nested):
    output, code = _interpret(nested, str(HERE / "interpreted_cases.py"), "-c", str(HERE.parents[1] / "pyproject.toml"))
    assert code == 0, output


class _Recorder:
    """Replaces the modules of the kernels and keeps their launches."""

    def __init__(self):
        self.launches = []
        for name in MODULES:
            setattr(self, name, _Launcher(name=name, launches=self.launches))


class _Launcher(SimpleNamespace):
    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.name, grid, args, kwargs))


@pytest.fixture
def recorder(monkeypatch):
    kept = _Recorder()
    for name in ("triton_moments", "triton_normalize", "triton_gradients"):
        monkeypatch.setattr(gpu, name, kept)
    return kept


def _launches(recorder, *batch, **options):
    """Return the launches of training, pullback and evaluation in one list, and check that each kernel is in it."""
    launches = [launch for part in _launches_by_step(recorder, *batch, **options) for launch in part]
    is_wide = batch[1] == torch.float64
    assert {name for name, *_ in launches} == {name for name in MODULES if is_wide or "rough" not in name}
    return launches


def _launches_by_step(recorder, shape, dtype, order=None, *, weighted=False, expanded=False):
    """Return three lists: the launches of training, of its pullback and of evaluation."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    x = x if order is None else x.permute(order)
    narrow = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, mean, var = torch.empty((4, x.shape[1]), dtype=narrow, device="meta")
    weights = torch.empty((len(x), *x.shape[2:]), dtype=narrow, device="meta") if weighted else None
    dy = torch.empty((), dtype=dtype, device="meta").expand(x.shape) if expanded else torch.empty_like(x)
    state = mbn.State(mean, var, torch.empty((), dtype=torch.int64, device="meta"))
    settings = Settings(x.shape[1], "float64" if narrow == torch.float64 else "float32", 1e-5, 0.1, 1, 1)
    batch, params = Batch(x, weights, settings.dtype), mbn.Params(weight, bias)
    launches = []
    _, _, stats = compose.forward(gpu.TRITON, batch, params, state, settings, training=True)
    launches.append(recorder.launches[:])
    recorder.launches.clear()
    compose.pullback(gpu.TRITON, dy, batch, weight, stats, 1e-5)
    launches.append(recorder.launches[:])
    recorder.launches.clear()
    compose.forward(gpu.TRITON, batch, params, state, settings, training=False)
    launches.append(recorder.launches[:])
    recorder.launches.clear()
    return launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_have_few_launches(recorder, dtype):
    assert list(map(len, _launches_by_step(recorder, (512, 64), dtype))) == [3, 3, 1]


_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def _compile(name, args, kwargs, capability):
    """Compile a kernel for a launch, as Triton does at the first launch on a card."""
    kernel = getattr(MODULES[name], name)
    options = {key: kwargs[key] for key in ("num_warps", "enable_fp_fusion")}
    bound = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[i,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[i,] = _TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    source = ASTSource(kernel, signature, constants, attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton's own warnings
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _resources(compiled, tmp_path):
    """Return the registers per thread, and the bytes of stack and of local memory."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "-res-usage", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")]


BATCHES = {
    "rows": ((1 << 20, 256), torch.float32),
    "rows of halves": ((1 << 20, 256), torch.bfloat16),
    "positions": ((4096, 256, 1024), torch.float32),
    "positions of halves": ((4096, 256, 1024), torch.float16),
    "channels last": ((4096, 1024, 256), torch.float32, (0, 2, 1)),
}
"""Batches whose values have to be loaded 16 bytes at a time."""


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("batch", BATCHES)
def test_compiled_kernels_do_not_spill_and_load_vectors(recorder, tmp_path, batch, capability):
    if capability != 90 and batch not in {"rows", "positions of halves"}:
        pytest.skip("compiled for one card")
    for name, _, args, kwargs in _launches(recorder, *BATCHES[batch]):
        compiled = _compile(name, args, kwargs, capability)
        registers, *memory = _resources(compiled, tmp_path)
        assert memory == [0, 0], f"{name} spills"
        assert registers * 32 * kwargs["num_warps"] <= (1 << 16) / 2, (
            f"{name} fills a multiprocessor: {registers} registers"
        )
        if not name.startswith("finish"):
            wide = len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", compiled.asm["ptx"]))
            streams = {"moments": 1, "normalize": 1, "grad_sums": 2, "grad_input": 2}[name]
            assert wide >= streams * (4 if BATCHES[batch][1] == torch.float32 else 2), name
            if name in {"normalize", "grad_input"}:
                assert re.search(r"st\.global[.\w:]*\.v4\.b32", compiled.asm["ptx"]), name
        assert ".ftz" not in compiled.asm["ptx"]


@pytest.mark.parametrize(
    "batch",
    [((33, 7), torch.float64), ((33, 7, 5), torch.bfloat16), ((1 << 16, 1 << 16), torch.float16)],
    ids=["float64", "positions", "beyond 32 bits"],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_kernels_compile_for_every_kind_of_batch(recorder, batch, weighted):
    for name, _, args, kwargs in _launches(recorder, *batch, weighted=weighted, expanded=True):
        assert "cubin" in _compile(name, args, kwargs, 90).asm


def test_backend_has_no_gpu_kernels_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "mbn_torch.kernels.gpu", None)
    monkeypatch.delattr("mbn_torch.kernels.gpu")
    module._on_gpu.cache_clear()
    assert module._on_gpu(0) is None
    module._on_gpu.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_backend_warns_where_triton_does_not_work():
    module._on_gpu.cache_clear()
    with pytest.warns(RuntimeWarning, match="Triton does not work"):
        assert module._on_gpu(0) is None
    module._on_gpu.cache_clear()


def test_kernels_are_chosen_by_the_common_device(monkeypatch):
    x = torch.ones(2)
    assert common_device(x, None, x) == CPU
    assert common_device(x, torch.empty(2, device="meta")) is None
    monkeypatch.setattr(module, "common_device", lambda *_: 3)
    monkeypatch.setattr(module, "_on_gpu", {3: gpu.TRITON}.get)
    assert mbn.get_backend("torch").kernels_for("moments", Batch(x))[0] is gpu.TRITON
    monkeypatch.setattr(module, "_on_gpu", {3: None}.get)
    assert mbn.get_backend("torch").kernels_for("moments", Batch(x))[0] is EAGER
