"""CuPy's border, devices and memory, on a stand-in as strict as CuPy that needs no GPU; and CuPy without a GPU."""

import copy
import mmap
import pickle
import sys

import ml_dtypes  # noqa: F401 - teaches NumPy the name "bfloat16"
import numpy as np
import pytest
from steps import pullback, step

import mbn
from mbn import registry
from mbn.contract import Batch, Params, State

pytestmark = pytest.mark.slow


def _sample(*shape, dtype="float32"):
    return (3 + 2 * np.random.default_rng(0).standard_normal(shape)).astype(dtype)


def _forward(backend, x, params, state, weights, *, training=True):
    options = {"momentum": 0.1, "eps": 1e-5, "correction": 1}
    return step(backend, x, params, state, training=training, weights=weights, **options)


def _expected(x, dy, counts, weight):
    """Return the output and the gradients of x, weight and bias, computed in float64 by their definitions."""
    axes = (0, *range(2, x.ndim))
    x, dy = (np.where(counts > 0, values, 0).astype("float64") for values in (x, dy))
    weight = weight.reshape(-1, *[1] * (x.ndim - 2))
    n = counts.sum()

    def total(values):
        return values.sum(axes, keepdims=True)

    deviation = x - total(counts * x) / n
    invstd = 1 / np.sqrt(total(counts * deviation**2) / n + 1e-5)
    xhat = deviation * invstd
    dx = weight * invstd * (dy - counts * (total(dy) + xhat * total(dy * xhat)) / n)
    return (counts > 0) * weight * xhat, dx, total(dy * xhat).ravel(), total(dy).ravel()


def test_stand_in_refuses_numpy_arrays(cupy):
    x = cupy.asarray(np.ones(3))
    for operation in (
        lambda: x + np.ones(3),
        lambda: np.ones(3) + x,
        lambda: np.asarray(x),
        lambda: cupy.where(np.ones(3), x, x),
    ):
        with pytest.raises(TypeError):
            operation()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(64, 5), (64, 8), (16, 5, 7), (3, 5, 32), (7, 2, 300)])
def test_results_agree_with_numpy(cupy, shape, dtype):
    bn = mbn.BatchNorm1d(shape[1], dtype="float64", backend="cupy")
    reference = mbn.BatchNorm1d(shape[1], dtype="float64", backend="numpy")
    x = _sample(*shape, dtype=dtype)
    for mode in (True, False):
        y = bn.train(mode)(cupy.asarray(x))
        assert isinstance(y, cupy.ndarray)
        assert y.dtype == x.dtype
        rtol = {"float16": 1e-3, "bfloat16": 8e-3}.get(dtype, 1e-6)
        np.testing.assert_allclose(*(z.astype("float64") for z in (y.get(), reference.train(mode)(x))), rtol=rtol)
    for name, expected in reference.state_dict().items():
        np.testing.assert_allclose(bn.state_dict()[name].get(), expected, rtol=1e-14)


VIEWS = pytest.mark.parametrize(
    "view",
    [lambda x: x, lambda x: x.swapaxes(-1, -2), lambda x: x[::2, :, ::3], lambda x: x.swapaxes(-1, -2)[:, :4]],
    ids=["contiguous", "transposed", "sliced", "both"],
)


@VIEWS
def test_output_has_the_memory_order_of_x(cupy, view):
    x = view(cupy.asarray(_sample(6, 8, 9)))
    before = x.get()
    y = mbn.BatchNorm1d(x.shape[1], backend="cupy")(x)
    assert y.strides == cupy.empty_like(x).strides
    assert np.array_equal(x.get(), before)


@VIEWS
@pytest.mark.parametrize("training", [True, False])
def test_gradient_has_the_memory_order_of_x(cupy, view, training):
    backend = mbn.get_backend("cupy")
    x = view(cupy.asarray(_sample(6, 8, 9)))
    n, c, length = x.shape
    dy = cupy.asarray(_sample(n, length, c)).swapaxes(-1, -2)  # another memory order
    weight, bias, mean, var = (cupy.asarray(_sample(c)) for _ in range(4))
    weights = backend.kernels.sample_weights((n, length), "float32", None, None, cupy.asarray(_sample(n) ** 2))
    given = (x, dy, weight, bias, mean, var, weights)
    before = [array.get() for array in given]
    y, _, residuals = _forward(backend, x, Params(weight, bias), State(mean, var, None), weights, training=training)
    dx, _, _ = pullback(backend, dy, x, weight, residuals, 1e-5, weights)
    assert y.strides == dx.strides == cupy.empty_like(x).strides
    assert all(np.array_equal(array.get(), values) for array, values in zip(given, before, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(64, 5), (16, 5, 7), (7, 5, 300), (7, 5, 301)])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_gradient_agrees_with_its_definition(cupy, shape, dtype, is_weighted):
    backend = mbn.get_backend("cupy")
    generator = np.random.default_rng(1)
    cells = shape[:1] + shape[2:]
    w = generator.integers(0, 4, cells) * generator.uniform(0.5, 1, cells) if is_weighted else np.ones(cells)
    w = w.astype("float32").astype("float64")
    counts = np.expand_dims(w, 1)
    # A dy that is nearly proportional to y and the weights, as that of a weighted squared error: most of dx cancels.
    dy = (counts * (generator.standard_normal(shape) / 100 + _sample(*shape) - 3)).astype(dtype)
    x, weight = _sample(*shape, dtype=dtype), _sample(5)
    weights = cupy.asarray(w.astype("float32")) if is_weighted else None
    hidden = np.broadcast_to(counts == 0, shape)
    given = (cupy.asarray(np.where(hidden, np.nan, values).astype(dtype)) for values in (x, dy))
    device_x, device_dy = given
    params, state = Params(cupy.asarray(weight), None), State(None, None, None)
    y, _, residuals = _forward(backend, device_x, params, state, weights)
    dx, dweight, dbias = pullback(backend, device_dy, device_x, params.weight, residuals, 1e-5, weights)
    expected = _expected(x, dy, counts, weight)
    for array, truth in zip((y, dx, dweight, dbias), expected, strict=True):
        tolerance = {"float16": 1e-3, "float32": 3e-6, "float64": 1e-12}[array.dtype.name]
        np.testing.assert_allclose(array.get(), truth, rtol=0, atol=tolerance * np.abs(truth).max())
    assert dx.dtype == dtype
    assert not dx.get()[hidden].any()


@pytest.mark.parametrize(
    ("dtype", "power"),
    [
        *(("float32", power) for power in (-148, -110, 60, 100, 124)),
        *(("bfloat16", power) for power in (-110, 60, 100, 120)),
        *(("float64", power) for power in (-1070, -600, -300, 300, 600, 1020)),
    ],
)
def test_values_of_any_size_are_normalised(cupy, dtype, power):
    ones = np.random.default_rng(5).integers(-8, 9, (40, 6)).astype("float64")
    ones[:, 2] = ones[0, 2]
    dy = _sample(40, 6, dtype=dtype).astype("float64")
    bound = {"bfloat16": 8e-3, "float32": 3e-7, "float64": 1e-14}[dtype]
    expected, statistics, gradients = _of_size(cupy, ones, dy, dtype, 0, 0)
    for weight_power in (0, power // 2, power):
        y, actual, (dx, dweight, _) = _of_size(cupy, ones, dy, dtype, power, weight_power)
        for own, other, times in zip(actual, statistics, (power, 2 * power), strict=True):
            with np.errstate(over="ignore"):
                rounded = np.ldexp(other.astype("float64"), times).astype(own.dtype)
            least = 2 * float(np.finfo(own.dtype).smallest_subnormal)
            assert own.tolist() == pytest.approx(rounded.tolist(), rel=min(bound, 3e-7), abs=least)
        if weight_power == 0:
            np.testing.assert_allclose(y, expected, rtol=bound, atol=bound)
        if weight_power == power:
            largest = abs(gradients[0]).max(0)
            assert (abs(dx - gradients[0]).max(0) <= max(bound, 1e-12) * largest).all()
        np.testing.assert_allclose(dweight, gradients[1], rtol=3e-7 if dtype != "float64" else 1e-12, atol=1e-12)


def _of_size(cupy, ones, dy, dtype, power, weight_power):
    """Return output, new statistics and gradients of a batch that is multiplied by a power of two."""
    layer_dtype = "float64" if dtype == "float64" else "float32"
    bn = mbn.BatchNorm1d(6, eps=0, momentum=1.0, dtype=layer_dtype, backend="cupy")
    bn.weight = np.ldexp(np.array([1.0, -2, 1, 1, 3, -1]), weight_power)
    y, pullback = bn.vjp(cupy.asarray(np.ldexp(ones, power).astype(dtype)))
    gradients = pullback(cupy.asarray(dy.astype(dtype)))
    statistics = bn.running_mean, bn.running_var
    return y.get().astype("float64"), [s.get() for s in statistics], [g.get().astype("float64") for g in gradients]


def test_float64_statistics_of_float32_values_are_accurate(cupy):
    x = _sample(200, 4)
    x[0] = 1e6
    bn, wide = (mbn.BatchNorm1d(4, dtype="float64", momentum=1.0, backend="cupy") for _ in range(2))
    bn(cupy.asarray(x))
    wide(cupy.asarray(x.astype("float64")))
    np.testing.assert_allclose(bn.running_mean.get(), wide.running_mean.get(), rtol=4e-16)
    np.testing.assert_allclose(bn.running_var.get(), wide.running_var.get(), rtol=8e-16)


def test_fit_merges_statistics_of_any_size(cupy):
    for power in (-1060, -600, 600, 1015):
        x = np.ldexp(np.random.default_rng(5).integers(-8, 9, (60, 3)).astype("float64"), power)
        ordinary = np.ldexp(x, -power)
        bn = mbn.BatchNorm1d(3, dtype="float64", backend="cupy")
        bn.fit([cupy.asarray(x[:20]), cupy.asarray(x[20:30]), cupy.asarray(x[30:])], progress=False)
        mean = np.ldexp(ordinary.mean(0), power)
        np.testing.assert_allclose(bn.running_mean.get(), mean, rtol=1e-14, atol=1e-323)
        with np.errstate(over="ignore"):
            var = np.ldexp(ordinary.var(0, ddof=1), 2 * power)
        np.testing.assert_allclose(bn.running_var.get(), var, rtol=1e-14)


def test_layer_can_be_set_loaded_pickled_copied_and_moved(cupy):
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
    pickled = pickle.loads(pickle.dumps(bn))
    for twin in (copy.deepcopy(bn), pickled, copy.deepcopy(bn).to(backend="numpy")):
        np.testing.assert_allclose(mbn.to_numpy(twin(x)), expected, rtol=1e-6)
    assert isinstance(mbn.asarray(bn.weight, "float64", backend="numpy"), np.ndarray)


@pytest.mark.parametrize("name", [1, "cuda:1", "Device"])
def test_layer_computes_on_its_device(cupy, name):
    device = cupy.cuda.Device(1) if name == "Device" else name
    bn = mbn.BatchNorm1d(3, momentum=None, backend="cupy", device=device)
    x = mbn.asarray(_sample(8, 3), backend="cupy", device=device)
    assert {array.device.id for array in (bn(x), bn(_sample(8, 3)), *bn.params, *bn.state)} == {1}
    with pytest.raises(ValueError, match="x is on cuda:0, the layer on cuda:1"):
        bn(mbn.asarray(x, backend="cupy", device="cuda"))


@pytest.mark.parametrize("is_weighted", [False, True])
def test_every_kernel_computes_on_the_device_of_its_array(cupy, is_weighted):
    backend = mbn.get_backend("cupy")
    with cupy.cuda.Device(1):
        x, dy = cupy.asarray(_sample(6, 3, 4)), cupy.asarray(_sample(6, 3, 4))
        vector, batches, lengths = cupy.asarray(_sample(3)), cupy.asarray(3), cupy.asarray([4, 0, 2, 1, 3, 4])
        mask, sample_weight = cupy.asarray(np.arange(6) != 4), cupy.asarray(_sample(6, 4) ** 2)
    assert backend.within(lengths, 0, 5)
    assert not backend.within(lengths, 0, 4)
    weights = backend.kernels.sample_weights((6, 4), "float32", mask, lengths, sample_weight) if is_weighted else None
    kernels, batch = backend.kernels, Batch(x, weights)
    moments = kernels.moments(batch)
    var = kernels.variance(moments, 1)
    made = [
        backend.copy(x),
        *(() if weights is None else (weights, moments.count, kernels.step(0.1, None, moments.count, 1))),
        *moments.mean,
        moments.m2,
        var,
        kernels.step(None, batches, moments.count, 1),
        kernels.lerp(vector, moments.mean, kernels.step(None, batches, moments.count, 1)),
    ]
    params, state = Params(vector, vector), State(vector, vector, batches)
    y, state, residuals = _forward(backend, x, params, state, weights)
    made += [y, *state, *pullback(backend, dy, x, vector, residuals, 1e-5, weights)]
    assert {array.device.id for array in made} == {1}


def test_step_and_pullback_do_not_wait_for_the_device(cupy, monkeypatch):
    backend = mbn.get_backend("cupy")
    x, vector, batches = cupy.asarray(_sample(6, 3, 4)), cupy.asarray(_sample(3)), cupy.asarray(3)
    mask, lengths = cupy.asarray(np.arange(6) != 4), cupy.asarray([4, 0, 2, 1, 3, 4])

    def wait(*_):
        raise AssertionError("this waits for the device")

    for conversion in ("get", "__int__", "__bool__"):
        monkeypatch.setattr(cupy.ndarray, conversion, wait)
    for weights in (None, backend.kernels.sample_weights((6, 4), "float32", mask, lengths, None)):
        for momentum in (0.1, None):
            _, state, residuals = step(
                backend,
                x,
                Params(vector, vector),
                State(vector, vector, batches),
                training=True,
                momentum=momentum,
                eps=1e-5,
                correction=1,
                weights=weights,
            )
            pullback(backend, x, x, vector, residuals, 1e-5, weights)
            assert isinstance(state.running_mean, cupy.ndarray)
    with pytest.raises(AssertionError, match="waits"):
        backend.within(lengths, 0, 5)


@pytest.mark.parametrize("device", ["cpu", "cuda:2", 2, -1, 0.5])
def test_error_for_an_unusable_device_names_the_usable_ones(cupy, device):
    del cupy
    with pytest.raises(ValueError, match="CuPy's devices here are cuda:0, cuda:1, not"):
        mbn.BatchNorm1d(3, backend="cupy", device=device)


@pytest.mark.parametrize("name", ["longdouble", "nonsense"])
def test_unknown_dtype_is_refused(cupy, name):
    del cupy
    with pytest.raises(TypeError):
        mbn.asarray([1.0], name, backend="cupy")


def test_bfloat16_needs_cupy_14(cupy, monkeypatch):
    assert mbn.asarray([1.0], "bfloat16", backend="cupy").dtype.name == "bfloat16"
    monkeypatch.setattr(cupy, "__version__", "13.6.0")
    for name in [name for name in sys.modules if name.partition(".")[0] == "mbn_cupy"]:
        del sys.modules[name]
    registry._forget("cupy")
    assert mbn.get_backend("cupy").capabilities.dtypes == {"float16", "float32", "float64"}
    with pytest.raises(TypeError):
        mbn.asarray([1.0], "bfloat16", backend="cupy")


def test_layout_chooses_the_widest_item_for_shape_order_and_alignment(cupy):
    from mbn_cupy.launches import layout

    def item(x, *others):
        found = layout((x, *others), None)
        return found.channels, found.positions

    x = cupy.asarray(_sample(8, 12))
    assert item(x) == (4, 1)
    assert item(x[:, 4:]) == (4, 1)
    assert item(x[:, 2:]) == item(x[:, :6]) == (2, 1)  # a row begins between two items; 6 channels are no multiple of 4
    assert item(x[:, 1:]) == item(x[:, ::2]) == (1, 1)
    assert item(x.T) == (1, 4)
    assert item(x, cupy.empty((12, 8)).T) == (1, 1)
    x = cupy.asarray(_sample(4, 3, 8))
    assert item(x) == item(x[:, :, 4:]) == (1, 4)
    assert item(cupy.asarray(_sample(4, 3, 16, dtype="float16"))) == (1, 8)
    assert item(cupy.asarray(_sample(4, 8, 16, dtype="float16")).swapaxes(1, 2)) == (4, 1)
    assert item(cupy.asarray(_sample(8, 6, dtype="float64"))) == (2, 1)
    assert item(cupy.asarray(_sample(4, 3, 7))) == (1, 1)


@pytest.mark.parametrize("shape", [(40, 8), (6, 5, 16)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_unaligned_arrays_give_the_same_results(cupy, shape, dtype):
    def unaligned(values):
        base = cupy.asarray(np.concatenate([values.ravel()[:1], values.ravel()]))
        return cupy.ndarray(base._host[1:].reshape(shape), base._memory, base._device_id)

    bn = mbn.BatchNorm1d(shape[1], dtype="float64", backend="cupy")
    x, dy = _sample(*shape, dtype=dtype), _sample(*shape[::-1], dtype=dtype).reshape(shape)
    y, pullback = bn.vjp(cupy.asarray(x))
    expected = [y.get(), *(gradient.get() for gradient in pullback(cupy.asarray(dy)))]
    for first, second in ((x, unaligned(dy)), (unaligned(x), dy), (unaligned(x), unaligned(dy))):
        y, pullback = bn.vjp(cupy.asarray(first))
        for array, truth in zip((y, *pullback(cupy.asarray(second))), expected, strict=True):
            np.testing.assert_allclose(array.get(), truth, rtol=1e-3 if dtype == "float16" else 1e-6, atol=1e-6)
    out = unaligned(x)
    mbn.functional.batch_norm(cupy.asarray(x), training=True, out=out)
    np.testing.assert_allclose(out.get(), expected[0], rtol=1e-3 if dtype == "float16" else 1e-6, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_count_of_batches_stays_at_its_limit(cupy, momentum):
    bn = mbn.BatchNorm1d(3, momentum=momentum, backend="cupy")
    limit = np.iinfo(np.int64).max
    bn.num_batches_tracked = limit - 1
    for _ in range(2):
        bn(cupy.asarray(_sample(4, 3)))
        assert int(bn.num_batches_tracked) == limit
    assert np.isfinite(bn.running_mean.get()).all()


def test_out_that_overlaps_itself_is_refused(cupy):
    x = _sample(4, 3)
    for steps in ((0, 4), (4, 4), (8, 12)):
        host = np.lib.stride_tricks.as_strided(np.zeros(24, np.float32), (4, 3), steps)
        out = cupy.ndarray(host, cupy._memory.Borrowed(), 0)
        with pytest.raises(ValueError, match="out overlaps itself"):
            mbn.functional.batch_norm(cupy.asarray(x), training=True, out=out)
        assert not host.any()


def test_indices_have_64_bits(cupy):
    row = 1 << 31  # values from one row to the next
    backing = np.frombuffer(mmap.mmap(-1, 2 * row + 64, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.float16)
    host = np.lib.stride_tricks.as_strided(backing, (2, 4), (2 * row, 2))
    host[:] = _sample(2, 4, dtype="float16")
    x = cupy.ndarray(host, cupy._memory.Borrowed(), 0)
    y = cupy.empty((2, 4), "float16")
    mbn.functional.batch_norm(x, training=True, out=y)
    expected = mbn.functional.batch_norm(host.copy(), training=True).output
    np.testing.assert_allclose(y.get(), expected, rtol=1e-3)


@pytest.mark.parametrize("shape", [(65536, 16), (4096, 256), (64, 16, 1024)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_step_and_pullback_allocate_nothing_large_but_their_result(cupy, shape, dtype, monkeypatch):
    x, bn = cupy.asarray(_sample(*shape, dtype=dtype)), mbn.BatchNorm1d(shape[1], backend="cupy")
    sizes = []
    empty, empty_like = cupy.empty, cupy.empty_like

    def recorded(function):
        def make(*args):
            array = function(*args)
            sizes.append(array.nbytes)
            return array

        return make

    monkeypatch.setattr(cupy, "empty", recorded(empty))
    monkeypatch.setattr(cupy, "empty_like", recorded(empty_like))
    y, pullback = bn.vjp(x)
    assert x.nbytes <= sum(sizes) < 1.08 * x.nbytes
    sizes.clear()
    pullback(y)
    assert x.nbytes <= sum(sizes) < 1.08 * x.nbytes


def test_backend_is_unavailable_without_a_device(cupy, monkeypatch):
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 0)
    with pytest.raises(mbn.BackendUnavailableError, match="CUDA finds no device"):
        mbn.get_backend("cupy")


def test_error_without_a_gpu_has_the_message_of_cuda():
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


def test_dlpack_exchange_keeps_device_and_memory(cupy):
    backend = mbn.get_backend("cupy")
    x = backend.asarray(_sample(3, 4), device="cuda:1")
    with backend.exported(x) as exported:
        assert cupy.cuda.Device().id == 1
        taken = backend.from_dlpack(exported)
    assert backend.device(taken) == "cuda:1"
    assert np.shares_memory(taken._host, x._host)
    with pytest.raises(TypeError, match="Unsupported array type"):
        backend.from_dlpack(np.zeros(3))
