"""Agreement: results do not depend on the backend, the memory layout, or a move; fused steps agree with the passes."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mbn
from mbn.conformance import derivatives, oracle, strategies, ulp
from mbn.conformance.target import Target, assert_same, configured
from mbn.contract import Array, Backend, Batch, Kernels, Operation, Settings, transposed

X = np.random.default_rng(13).normal(100, 3, (12, 5, 8)).astype(np.float32)
DY = np.random.default_rng(22).normal(1, 3, (12, 5, 8)).astype(np.float32)
_MASKING = strategies.maskings((12, 8))["mask and weights"]


@given(data=st.data())
def test_results_agree_with_numpy(target: Target, data: st.DataObject) -> None:
    batch = data.draw(strategies.batches(target.capabilities.dtypes))
    c = batch.x.shape[1]
    bn = configured(target.layer(c, dtype=batch.layer_dtype), seed=c)
    host = configured(mbn.BatchNorm1d(c, dtype=batch.layer_dtype, backend="numpy"), seed=c)
    exact = oracle.train(batch.x, host.running_mean, host.running_var, *host.params, momentum=0.1, eps=1e-5)
    y, expected = target.numpy(bn(batch.x)), host(batch.x)
    # Each may differ from the exact result by its bound, in opposite directions.
    assert ulp.distance(y, expected, exact.y.magnitude, batch.dtype) <= 2 * ulp.OUTPUT_BOUNDS[batch.dtype]
    for name in ("running_mean", "running_var"):
        given_statistic, magnitude = target.numpy(getattr(bn, name)), getattr(exact, name).magnitude
        distance = ulp.distance(given_statistic, getattr(host, name), magnitude, batch.layer_dtype)
        assert distance <= 2 * ulp.STATISTICS_BOUNDS[batch.layer_dtype], name


def test_move_to_numpy_and_back_keeps_the_layer(target: Target) -> None:
    bn = configured(target.layer(5), seed=1)
    before = target.snapshot(bn)
    bn.to(backend="numpy")
    assert bn.backend == "numpy"
    assert all(isinstance(value, np.ndarray | np.generic) for value in bn.state_dict().values())
    bn.to(backend=target.backend, device=target.device)
    assert_same(before, target.snapshot(bn))
    bn(target.array(X))


def test_move_to_float64_and_back_keeps_the_layer(target: Target) -> None:
    target.require_dtype("float64")
    bn = configured(target.layer(5), seed=2)
    before = target.snapshot(bn)
    bn.to(dtype="float64")
    assert target.numpy(bn.running_mean).dtype == np.float64
    bn(target.array(X.astype(np.float64)))
    bn.load_state_dict(before)
    assert_same(before, target.snapshot(bn.to(dtype="float32")))


def test_asarray_and_to_numpy_keep_values_and_dtype(target: Target) -> None:
    for dtype in sorted(target.capabilities.dtypes):
        host = X.astype(dtype)
        array = mbn.asarray(host, backend=target.backend, device=target.device)
        np.testing.assert_array_equal(mbn.to_numpy(array) if target.backend.owns(array) else array, host, strict=True)


def test_dlpack_exchange_keeps_values_and_device(target: Target) -> None:
    taken = []
    for dtype in sorted(target.capabilities.dtypes):
        host = X.astype(dtype)
        in_order, strided = target.array(host), transposed(target.array(np.ascontiguousarray(host.mT)))
        # If a strided array raises any error, mbn.convert tries a copy in C order; the copy may raise a BufferError.
        for array, refusal in ((in_order, BufferError), (strided, Exception)):
            with target.backend.exported(array) as exported:
                try:
                    handed = target.backend.from_dlpack(exported)
                except refusal:
                    continue
                taken.append(dtype)
                np.testing.assert_array_equal(target.numpy(handed), host, strict=True)
                assert target.backend.device(array) in {None, target.backend.device(handed)}
    assert taken or type(target.backend).from_dlpack is Backend.from_dlpack, "from_dlpack takes nothing at all"


@pytest.mark.parametrize("layout", strategies.LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_memory_layout_of_host_data_changes_no_bit(target: Target, layout: str, *, training: bool) -> None:
    x = strategies.laid_out(X.copy(), layout)
    bn, contiguous = target.layer(5).train(training), target.layer(5).train(training)
    expected = target.numpy(contiguous(target.array(np.ascontiguousarray(x))))
    np.testing.assert_array_equal(target.numpy(bn(x)), expected, strict=True)
    assert_same(target.snapshot(contiguous), target.snapshot(bn))


@pytest.mark.parametrize("training", [True, False])
def test_memory_layout_of_backend_arrays_changes_no_bit(target: Target, *, training: bool) -> None:
    contiguous = target.layer(5).train(training)
    expected = target.numpy(contiguous(target.array(X)))
    padded = target.array(np.repeat(X, 2, axis=0))
    swapped = target.array(np.ascontiguousarray(X.swapaxes(1, 2)))
    for x in (padded[::2, ...], transposed(swapped)):
        bn = target.layer(5).train(training)
        np.testing.assert_array_equal(target.numpy(bn(x)), expected, strict=True)
        assert_same(target.snapshot(contiguous), target.snapshot(bn))


def _kernels(target: Target, operation: Operation, batch: Batch, *given: Any) -> Iterator[tuple[Kernels, Batch]]:
    """Iterate over the kernels that the backend chooses for a call, with their fused entries and without."""
    kernels, batch = target.backend.kernels_for(operation, batch, *given)
    yield kernels, batch
    passes = copy.copy(kernels)
    passes.train = passes.evaluate = passes.pullback = None
    yield passes, batch


@pytest.mark.parametrize(("momentum", "weighted"), [(0.1, False), (None, False), (0.1, True)])
def test_fused_step_and_separate_passes_are_accurate(target: Target, momentum: float | None, *, weighted: bool) -> None:
    bn = configured(target.layer(5), seed=3)
    held = target.snapshot(bn)
    count = int(held["num_batches_tracked"]) + 1
    statistics, parameters = (held["running_mean"], held["running_var"]), (held["weight"], held["bias"])
    step = 1 / count if momentum is None else momentum
    weights, host_weights = _weights(target) if weighted else (None, None)
    exact = oracle.train(X, *statistics, *parameters, momentum=step, eps=1e-5, weights=host_weights)
    batch, settings = Batch(target.array(X), weights), Settings(5, "float32", 1e-5, momentum, 1, 1)
    for kernels, prepared in _kernels(target, "train", batch, None, (bn.params, bn.state)):
        y, state, _ = target.backend.forward(kernels, prepared, bn.params, bn.state, settings, True)
        target.assert_output(y, exact.y, "float32")
        target.assert_statistic(state.running_mean, exact.running_mean, "float32")
        target.assert_statistic(state.running_var, exact.running_var, "float32")
        assert int(state.num_batches_tracked) == count


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_fused_pullback_and_separate_passes_are_accurate(target: Target, *, training: bool, weighted: bool) -> None:
    bn = configured(target.layer(5), seed=4)
    held = target.snapshot(bn)
    weights, host_weights = _weights(target) if weighted else (None, None)
    constants = None if training else (held["running_mean"], held["running_var"])
    exact = derivatives.gradients(X, DY, held["weight"], eps=1e-5, weights=host_weights, statistics=constants)
    batch, settings = Batch(target.array(X), weights), Settings(5, "float32", 1e-5, 0.1, 1, 1)
    operation: Operation = "train" if training else "evaluate"
    dy, weight = target.array(DY), bn.weight
    for forward, prepared in _kernels(target, operation, batch, None, (bn.params, bn.state)):
        _, _, stats = target.backend.forward(forward, prepared, bn.params, bn.state, settings, training)
        for kernels, seen in _kernels(target, "pullback", batch, dy, (weight, stats)):
            dx, *sums = target.backend.pullback(kernels, dy, seen, weight, stats, 1e-5)
            # The sums may have a wider dtype than the parameters.
            gradients = [dx, *(target.backend.asarray(total, "float32") for total in sums)]
            target.assert_gradients(gradients, exact, "float32")


def _weights(target: Target) -> tuple[Array, np.ndarray]:
    """Return sample weights for X, made by the backend's kernels, and the same on the host."""
    target.require("masks")
    (mask, sample_weight), weights = _MASKING.arguments.values(), _MASKING.weights
    given_arrays = target.array(mask), None, target.array(sample_weight)
    return target.backend.kernels.sample_weights((12, 8), "float32", *given_arrays), weights
