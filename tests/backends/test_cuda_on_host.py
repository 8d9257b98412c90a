"""Kernels on the CPU, behind the stand-in for CuPy: correct kernels work, and every kind of mistake is found."""

import os
import subprocess
import sys

import numpy as np
import pytest
from gpus import STANDINS

pytestmark = pytest.mark.slow

SUM = """
extern "C" __global__ void __launch_bounds__(256, 2) sum(const double* __restrict__ x, double* total, long long n) {
    __shared__ double parts[256];
    parts[threadIdx.x] = 0;
    for (long long i = threadIdx.x; i < n; i += blockDim.x) parts[threadIdx.x] += x[i];
    for (unsigned half = blockDim.x / 2; half; half /= 2) {
        BARRIER;
        if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    }
    if (threadIdx.x == 0) total[blockIdx.x] = parts[0];
}
"""
COPY = """
extern "C" __global__ void copy(const VALUE* x, VALUE* y, long long n) {
    const long long i = threadIdx.x + static_cast<long long>(blockIdx.x) * blockDim.x;
    if (i < n) y[i] = x[i];
}
"""


@pytest.fixture
def make(cupy):
    """Return a function that compiles a source and returns its kernel, by default the first in the source."""

    def compiled(source, *options, name=None):
        name = name or source.partition("(const ")[0].rpartition(" ")[2]
        return cupy.RawModule(code=source, options=("--std=c++17", *options)).get_function(name)

    return compiled


@pytest.fixture
def fails(cupy):
    del cupy
    from cuda_on_host import LaunchError

    return lambda words: pytest.raises(LaunchError, match=words)


def _body(statements):
    return f'extern "C" __global__ void kernel(float* x) {{ {statements} }}'


def test_correct_kernel_is_correct_in_every_order_of_threads(cupy, make):
    kernel = make(SUM, "-DBARRIER=__syncthreads()")
    for _ in range(50):
        total = cupy.empty(3)
        kernel((3,), (256,), (cupy.arange(1000).astype("float64"), total, 1000))
        assert (total.get() == 499500).all()


def test_missing_barrier_gives_wrong_results(cupy, make):
    kernel = make(SUM, "-DBARRIER=(void)0")
    x, total = cupy.arange(1000).astype("float64"), cupy.empty(3)
    for _ in range(10):
        kernel((3,), (256,), (x, total, 1000))
        assert (total.get() != 499500).all()


def test_every_launch_has_another_order_of_threads(cupy, make):
    kernel = make(
        'extern "C" __global__ void order(const float*, long long* y) { y[0] = (y[0] * 17 + threadIdx.x) % 999983; }'
    )
    orders = set()
    for _ in range(5):
        y = cupy.zeros((), "int64")
        kernel((1,), (16,), (cupy.zeros(1, "float32"), y))
        orders.add(int(y))
    assert len(orders) == 5


def test_kernel_reads_its_block_and_thread_indices(cupy, make):
    kernel = make(
        """extern "C" __global__ void indices(const float*, long long* y) {
            const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
            const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
            y[block * 24 + thread] = block * 1000 + thread;
        }"""
    )
    y = cupy.empty((60, 24), "int64")
    kernel((3, 4, 5), (2, 3, 4), (cupy.zeros(1, "float32"), y))
    assert np.array_equal(y.get(), np.arange(60)[:, None] * 1000 + np.arange(24))


def test_uninitialised_shared_memory_is_nan(cupy, make):
    kernel = make(_body("__shared__ float own; if (gridDim.x == 1) own = 3; else x[blockIdx.x] = own;"), name="kernel")
    x = cupy.zeros(2, "float32")
    kernel((1,), (1,), (x,))
    kernel((2,), (1,), (x,))
    assert np.isnan(x.get()).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_uninitialised_array_is_nan(cupy, dtype):
    dtype = cupy.asarray(np.zeros(1), _numpy_dtype(dtype)).dtype
    x = cupy.ones(6, dtype)
    for array in (cupy.empty((3, 2), dtype), cupy.empty_like(x), x):
        assert array.data.ptr % 512 == 0
    assert np.isnan(cupy.empty((3, 2), dtype).get().astype("float64")).all()
    assert x[2:].data.ptr == x.data.ptr + 2 * dtype.itemsize


def test_read_past_the_end_gives_nan(cupy, make):
    y = cupy.zeros(1025, "float32")
    make(COPY, "-DVALUE=float")((5,), (256,), (cupy.ones(1024, "float32"), y, 1025))
    assert y.get()[:-1].all()
    assert np.isnan(y.get()[-1])


@pytest.mark.parametrize(
    ("value", "dtype"), [("unsigned short", "float16"), ("float", "float32"), ("double", "float64")]
)
@pytest.mark.parametrize("size", [0, 7, 1024])
def test_write_past_the_end_is_an_error(cupy, make, fails, value, dtype, size):
    kernel = make(COPY, f"-DVALUE={value}")
    x, y = cupy.ones(size, dtype), cupy.zeros(size, dtype)
    kernel((5,), (256,), (x, y, size))
    with fails("outside of the memory of argument 1"):
        kernel((5,), (256,), (x, y, size + 1))  # even though the value read past the end is NaN as well


def test_kernel_writes_through_views(cupy, make):
    x, y = cupy.asarray(np.arange(6.0).reshape(2, 3)), cupy.zeros((2, 3))
    make(COPY, "-DVALUE=double")((1,), (32,), (x[1], y[0, 1:], 2))
    assert y.get().tolist() == [[0, 3, 4], [0, 0, 0]]


@pytest.mark.parametrize(
    ("statements", "words"),
    [
        ("if (threadIdx.x < 40) __syncthreads(); x[0] = 1;", "divergent barrier: 40 of 64 threads"),
        ("if (threadIdx.x < 40) __syncthreads(); else { x[0] = 1;\n__syncthreads(); }", "divergent barrier"),
        ("for (unsigned i = 0; i < threadIdx.x % 3 + 1; ++i) __syncthreads();  x[0] = 1;", "divergent barrier"),
        ("if (threadIdx.x % 32 < 9) __syncwarp(); x[0] = 1;", "divergent barrier: 9 of 32 threads"),
        ("if (threadIdx.x) return; x[0] = 1; __syncthreads();", "divergent barrier: 1 of 64 threads"),
        ("__shared__ float own[64]; own[threadIdx.x + 1] = 1; x[0] = own[1];", "index out of bounds at kernels.cu:1"),
        ("float own[2] = {}; own[threadIdx.x % 3] += x[0]; x[0] = own[0];", "index out of bounds"),
        ("x[0] = reinterpret_cast<const float4&>(x[1]).y;", "misaligned address 0x[0-9a-f]+4, not a multiple of 16"),
        ("reinterpret_cast<float4&>(x[1]) = float4{1, 2, 3, 4};", "misaligned address"),
        ("const float4 whole = *reinterpret_cast<float4*>(x + 2); x[0] = whole.x;", "misaligned address"),
        ("x[0] = 1 << blockDim.x;", "shift by too many bits"),
        ("int i = 1 << 30; i *= blockDim.x == 64 ? 4 : 0; x[0] = i;", "integer overflow"),
        ("x[0] = 1 / static_cast<int>(threadIdx.x);", "integer division by zero"),
        ("*static_cast<float*>(nullptr) = x[0];", "null pointer at kernels.cu:1"),
        ("x[1LL << 50] = 1;", "no memory at address"),
        ("x[threadIdx.x] = __shfl_xor_sync(1, x[0], 2);", "a shuffle of a part of a warp"),
    ],
)
def test_undefined_behaviour_is_an_error(cupy, make, fails, statements, words):
    float4 = "struct alignas(16) float4 { float x, y, z, w; };\n#line 1\n"
    kernel = make(float4 + _body(statements), name="kernel")
    right = make(_body("__syncthreads(); x[threadIdx.x] = 2;"), name="kernel")
    x = cupy.zeros(64, "float32")
    for _ in range(2):
        with fails(words):
            kernel((2,), (64,), (x,))
        right((2,), (64,), (x,))  # an error leaves nothing behind
        assert (x.get() == 2).all()


def test_aligned_vectors_are_read_and_written(cupy, make):
    float4 = "struct alignas(16) float4 { float x, y, z, w; };\n"
    statements = "reinterpret_cast<float4*>(x)[threadIdx.x + 1] = reinterpret_cast<const float4&>(x[4 * threadIdx.x]);"
    kernel = make(float4 + _body(statements), name="kernel")
    x = cupy.asarray(np.arange(8, dtype="float32"))
    kernel((1,), (1,), (x,))
    assert x.get().tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_shuffles_exchange_values_of_a_warp(cupy, make):
    lane = "unsigned lane = threadIdx.x % 32;"
    for statements, expected in (
        ("__shfl_xor_sync(~0u, x[threadIdx.x], 5)", np.arange(64) ^ 5),
        (
            "__shfl_down_sync(~0u, x[threadIdx.x], 30)",
            np.where(np.arange(64) % 32 < 2, np.arange(64) + 30, np.arange(64)),
        ),
        ("__shfl_sync(~0u, x[threadIdx.x], 31 - lane)", 31 - np.arange(64) % 32 + np.arange(64) // 32 * 32),
    ):
        kernel = make(_body(f"{lane} float other = {statements}; (void)lane; x[threadIdx.x] = other;"), name="kernel")
        x = cupy.asarray(np.arange(64, dtype="float32"))
        kernel((1,), (64,), (x,))
        assert x.get().tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("grid", "block", "words"),
    [
        ((1,), (1025,), "block is"),
        ((1,), (1, 1, 65), "block is"),
        ((1,), (32, 33), "1024 threads at most, not 1056"),
        ((1, 65536), (1,), "grid is"),
        ((1, 1, 65536), (1,), "grid is"),
        ((0,), (1,), "nowhere 0"),
    ],
)
def test_launch_with_a_bad_grid_or_block_is_an_error(cupy, make, fails, grid, block, words):
    kernel = make(COPY, "-DVALUE=float")
    with fails(words):
        kernel(grid, block, (cupy.zeros(1, "float32"), cupy.zeros(1, "float32"), 1))


def test_launch_bounds_limit_the_block(cupy, make, fails):
    with fails("256 threads at most, not 257"):
        make(SUM, "-DBARRIER=__syncthreads()")((1,), (257,), (cupy.zeros(1), cupy.zeros(1), 1))


def test_arguments_must_have_the_types_of_the_kernel(cupy, make):
    kernel = make('extern "C" __global__ void f(const float* x, float* y, int n, double a) { if (y) y[n] = x[0] * a; }')
    x, y = cupy.ones(3, "float32"), cupy.zeros(3, "float32")
    kernel((1,), (1,), (x, y[1:], np.int32(1), 4.0))
    kernel((1,), (1,), (x, 0, np.int32(1), np.float64(5)))
    assert y.get().tolist() == [0, 0, 4]
    n, a = np.int32(1), 4.0
    for arguments in (
        *((x, y, n), (x, y, n, a, a), [x, y, n, a]),
        *((x, y, 1, a), (x, y, np.float32(1), a), (x, y, n, 4), (x, y, n, np.float32(4)), (x, y, True, a)),
        *((None, y, n, a), (x.get(), y, n, a), (1, y, n, a), (x, y.data.ptr, n, a), (0.0, y, n, a), (x, y, n, x)),
    ):
        with pytest.raises(TypeError):
            kernel((1,), (1,), arguments)
    with cupy.cuda.Device(1), pytest.raises(ValueError, match="on device 0"):
        kernel((1,), (1,), (x, y, n, a))


def test_unknown_kernel_names_and_options_are_refused(cupy, make):
    for name in ("missing", "SUM"):
        with pytest.raises(AttributeError, match=name):
            make(COPY, "-DVALUE=float", name=name)
    with pytest.raises(ValueError, match="--use_fast_math"):
        cupy.RawModule(code=COPY, options=("--use_fast_math",))
    with pytest.raises(TypeError):
        cupy.RawModule(code=COPY, options=["-DVALUE=float"])


def test_compiler_errors_refer_to_lines_of_the_source(make):
    with pytest.raises(RuntimeError, match=r".NOTHING. does not name a type\nkernels.cu:2:"):
        make(COPY, "-DVALUE=NOTHING")


def test_missing_compiler_is_named(make, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="needs g\\+\\+, and there is none on PATH"):
        make(COPY, "-DVALUE=float")


def test_processes_share_compiled_kernels(tmp_path):
    code = f"import cupy; cupy.RawModule(code={COPY!r}, options=('-DVALUE=int',)).get_function('copy')"
    environment = os.environ | {"PYTHONPATH": str(STANDINS), "TMPDIR": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert [path.suffix for path in tmp_path.glob("*/*")] == [".so"]


def _numpy_dtype(name):
    return pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name
