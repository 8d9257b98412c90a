"""MLX's backend beyond the suite: lazy results, threads, traces, pickles, and a device without float64."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import mbn
from mbn import array_api

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
nn = pytest.importorskip("mlx.nn", reason="mlx is not installed")

X = np.random.default_rng(0).normal(3, 2, (16, 4)).astype(np.float32)


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from mbn_mlx import backend

    monkeypatch.setattr(array_api, "has_float64", lambda _xp, _device: False)
    monkeypatch.setattr(backend, "_capabilities", backend._capabilities.__wrapped__)


def elsewhere(function: Callable[[], Any]) -> Any:
    """Return the result of a function in another thread, which cannot evaluate a graph of this one."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(np.array(function()))
        except Exception as error:  # noqa: BLE001 - the thread that waits raises it
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def test_graph_of_another_thread_cannot_be_evaluated() -> None:
    lazy = mx.array(X) + 1
    with pytest.raises(RuntimeError, match="Stream"):
        elsewhere(lambda: lazy)


@pytest.mark.parametrize("differentiated", [False, True])
def test_statistics_are_evaluated_after_each_step(*, differentiated: bool) -> None:
    bn, x = mbn.BatchNorm1d(4, backend="mlx"), mx.array(X)
    if differentiated:
        mx.eval(mx.grad(lambda x: bn(x).sum())(x))
    else:
        bn(x)
    for entry in bn.state:
        elsewhere(lambda entry=entry: entry)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mbn.BatchNorm1d(4, backend="mlx"),
        lambda: mbn.BatchNorm1d(4, backend="mlx").to(dtype="float64"),
        lambda: copy.deepcopy(mbn.BatchNorm1d(4, backend="mlx")),
        lambda: mbn.BatchNorm1d(4, backend="mlx").fit(mx.array(X) * 2, progress=False),
    ],
    ids=["new", "moved", "copied", "fitted"],
)
def test_layer_of_one_thread_computes_in_another(make: Any) -> None:
    bn = make()
    bn.weight, bn.running_mean = 2.0, mx.array(X[0]) + 1
    assert elsewhere(lambda: bn(mx.array(X, bn.weight.dtype))).shape == X.shape


def test_traced_layer_is_refused_and_unchanged() -> None:
    bn = mbn.BatchNorm1d(4, backend="mlx")
    for transform in (mx.compile, mx.vmap):
        x = mx.array(X if transform is mx.compile else X[None])
        with pytest.raises(RuntimeError, match=r"bn\.apply\(bn\.params, bn\.state, x, training=True\)"):
            transform(bn)(x)
    assert int(bn.num_batches_tracked) == 0
    np.testing.assert_array_equal(np.array(mx.compile(bn.eval())(mx.array(X))), np.array(bn(mx.array(X))))


def test_other_errors_of_evaluation_reach_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    from mbn_mlx import integration

    def fail(*_: Any) -> None:
        message = "out of memory"
        raise ValueError(message)

    monkeypatch.setattr(integration.mx, "eval", fail)
    with pytest.raises(ValueError, match="out of memory"):
        integration.is_traced(mx.array(X))


def test_layer_and_population_of_float64_keep_their_bits_when_pickled() -> None:
    bn = mbn.BatchNorm1d(4, backend="mlx", dtype="float64")
    bn(mx.array(X.astype(np.float64) / 3, mx.float64))
    population = mbn.Population(backend="mlx").update(mx.array(X / 3))
    for made in (pickle.loads(pickle.dumps(bn)).state, copy.deepcopy(bn).state):
        assert made.running_mean.dtype == mx.float64
        np.testing.assert_array_equal(np.array(made.running_mean), np.array(bn.running_mean))
    received = pickle.loads(pickle.dumps(population)).statistics()
    for after, before in zip(received, population.statistics(), strict=True):
        np.testing.assert_array_equal(np.array(after), np.array(before))
    assert pickle.loads(pickle.dumps(mx.ones(2, mx.bfloat16))).dtype == mx.bfloat16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int64", "bool"])
def test_array_goes_to_numpy_and_back(dtype: str) -> None:
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    x = mbn.asarray(np.ones((2, 3)), dtype, backend="mlx")
    host = mbn.to_numpy(x)
    assert host.dtype.name == dtype
    back = mbn.asarray(host, backend="mlx")
    assert back.dtype == x.dtype
    assert mx.array_equal(back, x)


def test_device_other_than_the_default_one_is_refused() -> None:
    assert mbn.BatchNorm1d(4, backend="mlx", device=mx.default_device())(mx.array(X)).shape == X.shape
    with pytest.raises(ValueError, match="arrays of MLX are on no device.*which is cpu, not 'gpu'"):
        mbn.BatchNorm1d(4, backend="mlx", device="gpu")


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match="MLX has no dtype complex128 on its default device, cpu"):
        mbn.asarray(np.ones(2), "complex128", backend="mlx")


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_device_without_float64_computes_in_pairs_and_refuses_float64() -> None:
    bn, twin = mbn.BatchNorm1d(4, backend="mlx"), mbn.BatchNorm1d(4, backend="numpy")
    x = X + np.float32(1e4)
    y = bn(mx.array(x))
    assert "float64" not in mbn.get_backend("mlx").capabilities.dtypes
    np.testing.assert_allclose(np.array(y), twin(x), 1e-6, 1e-6)
    np.testing.assert_allclose(np.array(bn.running_var), twin.running_var, 3e-7)
    bn.fit([mx.array(x)], progress=False)
    with pytest.raises(TypeError, match="MLX has no dtype float64 on its default device"):
        mbn.BatchNorm1d(4, backend="mlx", dtype="float64")


@pytest.mark.parametrize("shape", [(16, 4), (16, 4, 5)])
def test_output_agrees_with_the_layer_of_mlx(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    theirs = nn.BatchNorm(4)
    expected = theirs(mx.array(np.moveaxis(x, 1, -1)))
    bn = mbn.BatchNorm1d(4, backend="mlx")
    np.testing.assert_allclose(np.moveaxis(np.array(bn(mx.array(x))), 1, -1), np.array(expected), 1e-4, 1e-5)


def test_layers_of_torch_compile_after_a_use_of_mlx():
    torch = pytest.importorskip("torch")
    mbn.BatchNorm1d(3, backend="mlx")(np.eye(3, dtype=np.float32))
    bn = mbn.BatchNorm1d(3, backend="torch")
    x = torch.eye(3)
    y = torch.compile(lambda x: 2 * bn(x), fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(y, 2 * mbn.BatchNorm1d(3, backend="torch")(x))


def test_devices_are_looked_up_once():
    bn = mbn.BatchNorm1d(4, backend="mlx")
    bn(X)
    before = len(array_api._HAVE_FLOAT64)
    for _ in range(20):
        bn(X)
    assert len(array_api._HAVE_FLOAT64) == before
