"""Dask's arrays on its schedulers, in processes and on a cluster; conformance has the tests of every backend."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import mbn

dask = pytest.importorskip("dask")
array = pytest.importorskip("dask.array")

X = (1e4 + np.random.default_rng(0).standard_normal((1000, 7)) * 3).astype(np.float32)
MEANS, VARIANCES = X.mean(0, np.float64), X.var(0, np.float64, ddof=1)


def lazy(chunks: Any = (77, 3), x: np.ndarray = X) -> Any:
    return array.from_array(x, chunks=chunks)


def bits(bn: mbn.BatchNorm1d) -> dict[str, bytes]:
    return {key: mbn.to_numpy(value).tobytes() for key, value in bn.state_dict().items()}


def fitted(x: Any = None, **arguments: Any) -> mbn.BatchNorm1d:
    return mbn.BatchNorm1d(7, **arguments).fit(lazy() if x is None else x, progress=False)


@contextlib.contextmanager
def cluster(num_workers: int) -> Iterator[Any]:
    """Start worker processes on loopback, as the current scheduler; end them by the end of the block."""
    distributed = pytest.importorskip("distributed")
    options = {"host": "127.0.0.1", "dashboard_address": None, "threads_per_worker": 1, "silence_logs": 50}
    with (
        distributed.LocalCluster(n_workers=num_workers, processes=True, **options) as workers,
        distributed.Client(workers, timeout=120) as client,
    ):
        yield client


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:unclosed:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_results_have_the_same_bits_in_processes(backend: str) -> None:
    pytest.importorskip(backend)
    expected, evaluated = bits(fitted(backend=backend)), fitted(backend=backend).eval()
    with dask.config.set(scheduler="processes", num_workers=2):
        assert bits(fitted(backend=backend)) == expected
        np.testing.assert_array_equal(evaluated(lazy()).compute(), evaluated(X))


def slowly(block: np.ndarray, folder: str) -> np.ndarray:
    """End the first worker that comes here; the block is computed again on another."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(f"{folder}/lost", os.O_CREAT | os.O_EXCL))
        os.kill(os.getpid(), signal.SIGKILL)
    return block


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.filterwarnings("ignore")  # of distributed, about processes and sockets that it closes later
def test_results_have_the_same_bits_on_a_cluster_that_loses_a_worker(tmp_path: Any) -> None:
    expected, evaluated = bits(fitted()), fitted().eval()
    with cluster(2):
        assert bits(fitted()) == expected
        np.testing.assert_array_equal(evaluated(lazy()).compute(), evaluated(X))
        losing = lazy().map_blocks(slowly, str(tmp_path), dtype=X.dtype, meta=X[:0])
        assert bits(fitted(losing)) == expected
        assert (tmp_path / "lost").exists()


def test_statistics_are_those_of_all_values() -> None:
    bn = fitted()
    np.testing.assert_allclose(bn.running_mean, MEANS, 2.4e-7)
    np.testing.assert_allclose(bn.running_var, VARIANCES, 2.4e-7)


@pytest.mark.parametrize("backend", ["numpy", "numba", "torch"])
def test_blocks_may_have_another_byte_order(backend: str) -> None:
    pytest.importorskip(backend)
    x = X.astype(">f4")
    bn = fitted(lazy(x=x), backend=backend)
    assert bits(bn) == bits(fitted(backend=backend))
    y, whole = bn.eval()(lazy(x=x)), mbn.to_numpy(bn(x))
    assert y.dtype == whole.dtype
    np.testing.assert_array_equal(y.compute(), whole, strict=True)


def test_fit_takes_chunks_without_a_channel() -> None:
    for channels in ((3, 0, 4), (7, 0), (0, 7)):
        np.testing.assert_array_equal(fitted(lazy((77, channels))).running_mean, fitted(lazy((77, 7))).running_mean)


def test_population_and_fit_take_several_lazy_arrays() -> None:
    halves = lazy(x=X[:300]), lazy(x=X[300:])
    of_arrays = mbn.Population(backend="numpy").update(X[:300]).update(X[300:]).statistics()
    state = mbn.Population(backend="numpy").update(halves[0]).update(halves[1]).statistics()
    np.testing.assert_allclose(state.running_mean, of_arrays.running_mean, 1e-7)
    bn = mbn.BatchNorm1d(7, backend="numpy").fit(halves, progress=False)
    assert int(bn.num_batches_tracked) == 2
    np.testing.assert_array_equal(bn.running_var, state.running_var)


def test_lazy_arrays_are_computed_where_an_array_is_needed() -> None:
    assert type(mbn.asarray(lazy(), backend="numpy")) is np.ndarray
    np.testing.assert_array_equal(mbn.to_numpy(lazy()), X)
    bn = mbn.BatchNorm1d(7, backend="numpy")
    bn.weight = lazy(3, X[0])
    np.testing.assert_array_equal(bn.weight, X[0])
    np.testing.assert_array_equal(bn.eval()(X, mask=array.from_array(X[:, 0] > 1e4, 50)), bn(X, mask=X[:, 0] > 1e4))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (lazy(x=X.astype(np.int32)), TypeError, "x is int32; numpy takes"),
        (lazy(x=X.astype(np.float64)), TypeError, "x is float64 and the statistics are float32"),
        (lazy(x=X[:, :5]), ValueError, "so 5 channels on axis 1; num_features is 7"),
        (lazy(x=X[:, 0], chunks=9), ValueError, r"x has shape \(1000,\)"),
        (lazy(x=np.ma.masked_array(X)), TypeError, "no backend knows arrays of type numpy.ma"),
        (lazy()[:, lazy()[0] > 0], ValueError, "Let Dask compute the sizes of its chunks before"),
        (lazy()[:0], ValueError, "the batches hold 0 values per channel"),
        (lazy()[:1], ValueError, "the batches hold 1 values per channel"),
    ],
    ids=lambda value: None if isinstance(value, type | str) else "x",
)
def test_fit_rejects_bad_lazy_arrays(x: Any, error: type[Exception], message: str) -> None:
    bn = mbn.BatchNorm1d(7, backend="numpy")
    before = bits(bn)
    with pytest.raises(error, match=message):
        bn.fit(x, progress=False)
    assert bits(bn) == before
    if "batches" not in message:
        with pytest.raises(error, match=message):
            bn.eval()(x)


def test_block_with_other_channels_than_x_is_refused() -> None:
    x = lazy((77, 7)).map_blocks(lambda block: block[:, :5], dtype=X.dtype, meta=np.empty((0, 0), X.dtype))
    bn = mbn.BatchNorm1d(7, backend="numpy")
    before, wrong = bits(bn), r"x has shape \(\d+, 5\), so 5 channels on axis 1; num_features is 7"
    with pytest.raises(ValueError, match=wrong):
        bn.fit(x, progress=False)
    assert bits(bn) == before
    with pytest.raises(ValueError, match=wrong):
        bn.eval()(x).compute()


@pytest.mark.processes
def test_arrays_of_query_planning_are_refused() -> None:
    program = """
import dask
dask.config.set({"array.query-planning": True})
import dask.array, mbn
try:
    mbn.BatchNorm1d(3).fit(dask.array.ones((9, 3), chunks=4, dtype="float32"), progress=False)
except TypeError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.startswith("x is a Dask array made under query planning"), result


def test_fit_of_unknown_channels_is_an_error() -> None:
    with pytest.raises(ValueError, match="x has an unknown number of channels"):
        mbn.BatchNorm1d(None).fit(lazy()[:, lazy()[0] > 0], progress=False)


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"mask": np.ones(999, bool)}, ValueError, r"mask has shape \(999,\)"),
        ({"mask": [1] * 1000}, TypeError, "mask is int64; it has to be bool"),
        ({"mask": lazy(77, X[:, 0])}, TypeError, "mask is float32; it has to be bool"),
        ({"lengths": np.ones(1000, int)}, ValueError, "lengths are those of sequences"),
        ({"sample_weight": lazy(x=X)}, ValueError, r"sample_weight has shape \(1000, 7\)"),
    ],
    ids=["shape", "list", "dtype", "lengths", "rank"],
)
def test_evaluation_rejects_bad_masks(masks: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mbn.BatchNorm1d(7, backend="numpy").eval()(lazy(), **masks)


def test_masks_have_to_fit_blocks_of_unknown_sizes() -> None:
    chosen = lazy(77, X[:, 0]) > 1e4
    x, bn = lazy()[chosen], fitted().eval()
    expected = bn(X[chosen.compute()], mask=X[chosen.compute()][:, 1] > 1e4)
    np.testing.assert_array_equal(bn(x, mask=lazy(77, X[:, 1] > 1e4)[chosen]).compute(), expected)
    for mask in (expected[:, 0] > 0, lazy(100, X[:, 1] > 1e4)[lazy(100, X[:, 0]) > 1e4], X[:, 0] > 0):
        with pytest.raises(ValueError, match=r"Compute the sizes before: x.compute_chunk_sizes\(\)"):
            bn(x, mask=mask)


def test_lengths_need_a_known_number_of_positions() -> None:
    x = lazy((30, 7, 4), X[:60, :, None] + np.zeros(8, np.float32))
    bn = fitted().eval()
    with pytest.raises(ValueError, match="Compute the sizes before"):
        bn(x[..., array.arange(8, chunks=4) > 2], lengths=np.ones(60, int))


def test_wrong_sample_weight_is_an_error_of_its_block() -> None:
    y = fitted().eval()(lazy(), sample_weight=lazy(50, -X[:, 0]))
    with pytest.raises(ValueError, match="sample_weight has a value of -"):
        y.compute()


def test_other_outputs_are_refused() -> None:
    bn = fitted()
    statistics = bn.running_mean, bn.running_var
    with pytest.raises(TypeError, match="has no out here"):
        mbn.functional.batch_norm(lazy(), *statistics, out=np.empty_like(X))
    with pytest.raises(TypeError, match="has no pullback here"):
        mbn.functional.batch_norm_vjp(lazy(), *statistics)


def test_fit_shows_the_progress_bar_of_dask(capfd: pytest.CaptureFixture[str]) -> None:
    mbn.BatchNorm1d(7, backend="numpy").fit(lazy())
    out, err = capfd.readouterr()
    assert out == ""
    assert "100% Completed" in err
    fitted()
    assert capfd.readouterr() == ("", "")


def test_interrupted_fit_leaves_the_layer_unchanged() -> None:
    def interrupt(block: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    bn = fitted()
    before = bits(bn)
    with dask.config.set(scheduler="synchronous"), pytest.raises(KeyboardInterrupt):
        bn.fit(lazy().map_blocks(interrupt, dtype=X.dtype, meta=X[:0]), progress=False)
    assert bits(bn) == before


def test_lazy_output_has_the_name_of_the_operation() -> None:
    y, again = (fitted().eval()(lazy()) for _ in range(2))
    assert y.name == again.name
    assert y.name.startswith("batch_norm-")
    assert y.name != mbn.BatchNorm1d(7, backend="numpy").eval()(lazy()).name
