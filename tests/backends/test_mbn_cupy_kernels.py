"""CuPy's kernels: CUDA's compiler compiles them as intended, and the suite finds every bug that is planted in them."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cuda_compilers
import pytest
from gpus import STANDINS

import mbn_cupy

pytestmark = pytest.mark.slow

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
PASSES = {"moments": 0, "normalize": 1, "grad_sums": 0, "grad_input": 1}
"""The kernels that read values, and the number of arrays that each writes."""
FEW = 16
"""Allowed bytes of stack per thread: a few spilled numbers, but no array."""
FOLDER = Path(mbn_cupy.__path__[0])


@pytest.fixture
def compilation(cupy):
    del cupy
    return importlib.import_module("mbn_cupy.compilation")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("item", ["one value", "channels", "positions"])
@pytest.mark.parametrize("value", BYTES)
def test_kernels_compile_for_each_gpu(compilation, value, item, weighted):
    compiler = cuda_compilers.find()
    if compiler is None:
        pytest.skip("there is neither nvcc nor nvidia-cuda-nvrtc")
    widest = 16 // BYTES[value]
    channels, positions = {"one value": (1, 1), "channels": (min(4, widest), 1), "positions": (1, widest)}[item]
    statistic = "float64" if value == "float64" else "float32"
    options = compilation.Variant(value, statistic, channels, positions, weighted).options

    # Cards differ little: all of them compile the variants that take the most registers.
    cards = ARCHITECTURES if weighted and item == "positions" else ("sm_90",)
    with ThreadPoolExecutor(2) as pool:
        for compiled in pool.map(lambda name: compiler(compilation.source(), options, name), cards):
            assert "warning" not in compiled.log
            assert "error" not in compiled.log
            frames = re.findall(r"(\d+) bytes stack frame", compiled.log)
            assert len(frames) >= 7
            assert max(map(int, frames)) <= FEW
            _assert_vectors(compiled.ptx, BYTES[value] * channels * positions, channels * positions)


def _assert_vectors(ptx, size, values):
    """Assert that an item of this size in bytes is read and written by one instruction."""
    kernels = re.split(r"\.entry (\w+)\(", ptx)
    code = dict(zip(kernels[1::2], kernels[2::2], strict=True))
    assert set(PASSES) < set(code)
    for name, writes in PASSES.items():
        for access in ("ld", "st")[: 1 + writes] if values > 1 else ():
            vectors = re.findall(rf"{access}\.global[.\w]*?\.v(\d)\.[a-z](\d+)", code[name])
            assert size in {int(count) * int(bits) // 8 for count, bits in vectors} | (
                {4} if re.search(rf"{access}\.global[.\w]*\.[a-z]32\b", code[name]) else set()
            ), name


def test_kernels_compile_with_nvrtc(compilation):
    if not cuda_compilers.has_nvrtc():
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    options = compilation.Variant("float32", "float64", 4, 1, weighted=True).options
    compiled = cuda_compilers.nvrtc(compilation.source(), options, "sm_90")
    assert "warning" not in compiled.log
    _assert_vectors(compiled.ptx, 16, 4)


class Bug(NamedTuple):
    file: str
    right: str
    wrong: str
    named_by: str
    """An expression of pytest that selects tests of the suite; one of them has to fail."""


_LOOP = "for (int i = 0; i < N; ++i) mine[i].merge(others"
BUGS = {
    "no barrier before partial results are read": Bug(
        "cuda/merging.cuh", "__syncthreads();\n        if (at.index < half)", "if (at.index < half)", "test_gradients"
    ),
    "no barrier before partial results are overwritten": Bug(
        "cuda/merging.cuh", "__syncthreads();\n    }\n}", "}\n}", "test_gradients"
    ),
    "no barrier before channels are read to normalise": Bug(
        "cuda/normalization.cu", "__syncthreads();", "", "with_a_large_mean"
    ),
    "a sum of dy divided by that of all weights": Bug(
        "cuda/gradients.cu",
        "weighted_count ? power(-exponent_of(n)) : 1",
        "1.0",
        "test_pullback_is_accurate_for_sample_weights_of_any_size",
    ),
    "no barrier before channels are read to differentiate": Bug(
        "cuda/gradients.cu", "__syncthreads();", "", "test_gradients"
    ),
    "a barrier for some threads": Bug(
        "cuda/normalization.cu", "__syncthreads();", "if (at.index == 0) __syncthreads();", "with_a_large_mean"
    ),
    "the last items dropped": Bug(
        "cuda/threads.cuh", "(end - first + at.threads - 1)", "(end - first)", "with_a_large_mean"
    ),
    "one item too many": Bug(
        "cuda/threads.cuh", "(end - first + at.threads - 1)", "(end - first + at.threads)", "with_a_large_mean"
    ),
    "a block reads the first item of the next": Bug(
        "cuda/threads.cuh", "others = (blockIdx.y + 1) * share", "others = (blockIdx.y + 1) * share + 1", "test_long"
    ),
    "a row that does not end": Bug(
        "cuda/threads.cuh", "wrap(step + row - walk.positions * position)", "wrap(step + row)", "with_a_large_mean"
    ),
    "a stride of the wrong axis": Bug(
        "cuda/threads.cuh", "step(walk.row_step * row + ", "step(walk.row_step * channel + ", "with_a_large_mean"
    ),
    "the channels of a neighbour": Bug(
        "cuda/normalization.cu", "lines[at.column * CHANNELS + i]", "lines[at.column + i]", "with_a_large_mean"
    ),
    "half of the threads left out": Bug(
        "cuda/merging.cuh", "at.threads / 2; half > 0", "at.threads / 4; half > 0", "with_a_large_mean"
    ),
    "a partial result counted twice": Bug(
        "cuda/merging.cuh",
        f"{_LOOP}",
        f"{_LOOP}[(at.index * at.columns + at.column) * N + i]), mine[i].merge(others",
        "test_gradients",
    ),
    "results of channels that are not there": Bug(
        "cuda/merging.cuh", "at.index > 0 || at.channel >= channels", "at.index > 0", "test_accuracy"
    ),
    "all blocks write to the first one's results": Bug(
        "cuda/merging.cuh", "results[blockIdx.y * channels + ", "results[", "test_long"
    ),
    "the rest of the mean dropped": Bug("cuda/moments.cu", "return (hi - total()) + lo;", "return 0;", "test_accuracy"),
    "the rest of the mean not subtracted": Bug(
        "cuda/normalization.cu", "(center - hi - lo)", "(center - hi)", "test_accuracy"
    ),
    "the mean of means": Bug("cuda/moments.cu", "hi(more / (count + more))", "hi(0.5)", "with_a_large_mean"),
    "the rest of sums dropped": Bug(
        "cuda/moments.cu",
        "lo += (hi - (sum - part))",
        "lo *= (hi - (sum - part))",
        "test_statistics_are_accurate_where_one_value_dwarfs_the_others",
    ),
    "units of values that are not far from 1": Bug(
        "cuda/moments.cu", "!is_far(largest)", "largest >= 0", "test_training_is_accurate_on_values_of_any_size"
    ),
    "statistics merged in units of their own": Bug(
        "cuda/moments.cu", "exponent != other.exponent", "false", "test_training_is_accurate_on_values_of_any_size"
    ),
    "variances in units of means": Bug(
        "cuda/moments.cu",
        "2 * all.exponent, step",
        "all.exponent, step",
        "test_training_is_accurate_on_values_of_any_size",
    ),
    "scales out of range": Bug(
        "cuda/channels.cuh",
        "clamped(size < most ? size : most, ",
        "clamped(0 * most * size, ",
        "test_output_is_accurate_for_any_eps_and_weight",
    ),
    "gradients out of range": Bug(
        "cuda/gradients.cu",
        "value *= origins[channel].before",
        "value *= 1",
        "test_pullback_is_accurate_for_values_of_any_size and float64",
    ),
    "products of gradients out of range": Bug(
        "cuda/channels.cuh", "!IS_WIDE && unit", "unit", "test_pullback_is_accurate_for_dy_of_any_size"
    ),
    "the variance of constants beside eps out of range": Bug(
        "cuda/channels.cuh", "own == 0 || ", "", "test_pullback_is_accurate_for_constant_channels_of_any_size"
    ),
    "the rest of means dropped": Bug(
        "cuda/moments.cu", "lo += (hi - (sum - part))", "lo *= (hi - (sum - part))", "test_constant_dy"
    ),
    "means of all there is in a value": Bug(
        "cuda/moments.cu",
        "origin.hi = at(channel, i)",
        "origin.hi = 0",
        "test_sample_weights_are_accurate_beside_a_large_mean",
    ),
    "scales of gradients out of range": Bug(
        "cuda/gradients.cu",
        "gradient *= projection.after",
        "gradient *= 1",
        "test_dx_is_accurate_where_dy_is_as_large_as_x",
    ),
    "weights out of range": Bug(
        "channel_stats.py",
        "FORMULAS = Formulas(cupy, cupy.ndarray)",
        "FORMULAS = Formulas(cupy, cupy.ndarray)\nFORMULAS.summable = lambda weights: weights",
        "test_training_is_accurate_with_sample_weights_of_any_size_in_float64",
    ),
    "values without weight counted": Bug(
        "cuda/threads.cuh", "values[position] > 0", "values[position] >= 0", "test_masks"
    ),
    "a step without weights": Bug("cuda/moments.cu", "all.count <= correction", "all.count < 0", "test_masks"),
    "infinite where nothing varies": Bug("cuda/channels.cuh", "spread == 0 ? 0 :", "spread < 0 ? 0 :", "eps_0"),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_found(name, tmp_path):
    bug = BUGS[name]
    package = shutil.copytree(FOLDER, tmp_path / "mbn_cupy")
    source = (package / bug.file).read_text(encoding="utf-8")
    assert source.count(bug.right) == 1, bug
    (package / bug.file).write_text(source.replace(bug.right, bug.wrong), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "--pyargs", "mbn.conformance", "-p", "mbn.conformance.plugin"]
    options = ["--backend", "cupy", "-k", bug.named_by, "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    path = os.pathsep.join([str(tmp_path), str(STANDINS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    run = subprocess.run([*command, *options], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout + run.stderr
    assert "g++ refuses" not in run.stdout
