"""CuPy's border and devices, through a stand-in that has CuPy's strictness and no GPU; and CuPy without a GPU."""

import copy
import importlib
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

import mbn
from mbn import registry

STANDINS = Path(__file__).parents[1] / "standins"


@pytest.fixture
def cupy(monkeypatch):
    """Put the stand-in in CuPy's place, and everything back after the test."""

    def ours():
        return [name for name in sys.modules if name.partition(".")[0] in ("cupy", "mbn_cupy")]

    for name in ours():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(STANDINS)
    registry._forget("cupy")
    yield importlib.import_module("cupy")
    registry._forget("cupy")
    for name in ours():
        del sys.modules[name]


def _sample(*shape, dtype="float32"):
    return (3 + 2 * np.random.default_rng(0).standard_normal(shape)).astype(dtype)


def test_stand_in_refuses_numpy_arrays(cupy):
    x = cupy.asarray(np.ones(3))
    for operation in (
        lambda: x + np.ones(3),
        lambda: np.ones(3) + x,
        lambda: np.asarray(x),
        lambda: cupy.sqrt(np.ones(3)),
    ):
        with pytest.raises(TypeError):
            operation()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(64, 5), (16, 5, 7)])
def test_agrees_with_numpy(cupy, shape, dtype, monkeypatch):
    bn = mbn.BatchNorm1d(5, dtype="float64", backend="cupy")
    monkeypatch.setattr("mbn_cupy.kernels.BLOCK", 100)
    reference = mbn.BatchNorm1d(5, dtype="float64", backend="numpy")
    x = _sample(*shape, dtype=dtype)
    for mode in (True, False):
        y = bn.train(mode)(cupy.asarray(x))
        assert isinstance(y, cupy.ndarray)
        assert y.dtype == x.dtype
        np.testing.assert_allclose(y.get(), reference.train(mode)(x), rtol=1e-3 if dtype == "float16" else 1e-6)
    for name, expected in reference.state_dict().items():
        np.testing.assert_allclose(bn.state_dict()[name].get(), expected, rtol=1e-14)


@pytest.mark.parametrize(
    "form",
    [lambda x: x, lambda x: x.mT, lambda x: x[::2, :, ::3], lambda x: x.mT[:, :4]],
    ids=["contiguous", "transposed", "sliced", "both"],
)
def test_output_has_the_memory_order_of_x(cupy, form):
    x = form(cupy.asarray(_sample(6, 8, 9)))
    before = x.get()
    y = mbn.BatchNorm1d(x.shape[1], backend="cupy")(x)
    assert y.strides == cupy.empty_like(x).strides
    assert np.array_equal(x.get(), before)


def test_life_cycle(cupy):
    bn = mbn.BatchNorm1d(3, momentum=None, backend="cupy")
    y = bn(_sample(8, 3))
    assert isinstance(y, cupy.ndarray)
    bn.weight = 2
    bn.bias = np.arange(3)
    bn.load_state_dict(bn.state_dict())
    assert bn.num_batches_tracked.dtype == np.int64
    assert isinstance(bn.num_batches_tracked, cupy.ndarray)
    x = _sample(8, 3)
    expected = mbn.to_numpy(bn.eval()(x))
    pickled = pickle.loads(pickle.dumps(bn))  # noqa: S301 - its own
    for twin in (copy.deepcopy(bn), pickled, copy.deepcopy(bn).to(backend="numpy")):
        np.testing.assert_allclose(mbn.to_numpy(twin(x)), expected, rtol=1e-6)
    assert isinstance(mbn.asarray(bn.weight, "float64", backend="numpy"), np.ndarray)


@pytest.mark.parametrize("name", [1, "cuda:1", "Device"])
def test_each_array_is_computed_on_its_own_device(cupy, name):
    device = cupy.cuda.Device(1) if name == "Device" else name
    bn = mbn.BatchNorm1d(3, momentum=None, backend="cupy", device=device)
    x = mbn.asarray(_sample(8, 3), backend="cupy", device=device)
    assert {array.device.id for array in (bn(x), bn(_sample(8, 3)), *bn.params, *bn.state)} == {1}
    backend = mbn.get_backend("cupy")
    moments = backend.moments(x)
    assert backend.normalize(x, moments.mean, bn.running_var, None, None, 0.0).device.id == 1
    assert backend.lerp(bn.running_mean, moments.mean, backend.reciprocal(bn.num_batches_tracked)).device.id == 1
    with pytest.raises(ValueError, match="x is on cuda:0, the layer on cuda:1"):
        bn(mbn.asarray(x, backend="cupy", device="cuda"))


@pytest.mark.parametrize("device", ["cpu", "cuda:2", 2, -1, 0.5])
def test_unusable_device_names_the_usable_ones(cupy, device):
    del cupy
    with pytest.raises(ValueError, match="CuPy's devices here are cuda:0, cuda:1, not"):
        mbn.BatchNorm1d(3, backend="cupy", device=device)


@pytest.mark.parametrize("name", ["bfloat16", "longdouble", "nonsense"])
def test_unknown_dtype(cupy, name):
    del cupy
    with pytest.raises(TypeError):
        mbn.asarray([1.0], name, backend="cupy")


def test_no_device(cupy, monkeypatch):
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 0)
    with pytest.raises(mbn.BackendUnavailableError, match="CUDA finds no device"):
        mbn.get_backend("cupy")


def test_without_a_gpu_the_error_says_what_cuda_said():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        cause = str(error)
    else:
        pytest.skip("there is a GPU")
    with pytest.raises(mbn.BackendUnavailableError) as caught:
        mbn.BatchNorm1d(4, backend="cupy")
    assert cause in str(caught.value)
