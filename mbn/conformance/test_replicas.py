"""Replicas: layers that share a batch compute what one layer does on all of it, fail together, and else are local."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import mbn
from mbn.conformance import derivatives, oracle, strategies
from mbn.conformance.target import Target, assert_same, configured
from mbn.conformance.thread_group import ThreadGroup
from mbn.contract import layer_dtype

AXIS = "replicas"
"""The name of an axis whose replicas a framework traces."""
C = 3
SHARDS = {"two of different sizes": [3, 20], "one row": [1, 12, 10], "empty": [9, 0, 14], "empty first": [0, 0, 20, 3]}
"""The number of rows of each replica."""
N = 23
DTYPES = ["float16", "bfloat16", "float32", "float64"]
Vectors = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _requires_replicas(target: Target, request: pytest.FixtureRequest) -> None:
    target.require("replicas")
    is_traced = target.transforms.named_vmap is not None
    if is_traced != ("along_an_axis" in request.node.name):
        where = "along an axis of one program" if is_traced else "in processes"
        pytest.skip(f"{target.backend.name} declares replicas {where}")


def split(values: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    """Return the parts of values along the first axis."""
    return np.split(values, np.cumsum(sizes)[:-1])


def data(dtype: str, length: int | None = None, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return x and dy; the mean of x moves from row to row, so that each replica has another mean."""
    shape = (N, C) if length is None else (N, C, length)
    x, dy = np.random.default_rng(41).standard_normal((2, *shape))
    x += offset + np.linspace(-4, 4, N).reshape(-1, *[1] * (x.ndim - 1))
    return x.astype(dtype), dy.astype(dtype)


def replicas(target: Target, group: Any, size: int, **arguments: Any) -> list[mbn.BatchNorm1d]:
    """Return equal layers of a group, one for each replica."""
    return [configured(target.layer(C, group=group, **arguments), seed=1) for _ in range(size)]


def assert_shared(
    target: Target,
    layers: list[mbn.BatchNorm1d],
    step: Callable[[int], tuple[np.ndarray, ...]],
    x: np.ndarray,
    dy: np.ndarray,
    weights: np.ndarray | None = None,
) -> None:
    """Take a step of all layers, and check it against the exact results for the undivided batch.

    The step of a rank returns its output, and the gradients of x, weight and bias.
    """
    before, group, dtype = target.snapshot(layers[0]), layers[0].group, x.dtype.name
    y, dx, dweights, dbiases = zip(*group.run(step), strict=True)
    held: dict[str, Any] = {key: value for key, value in before.items() if key != "num_batches_tracked"}
    exact = oracle.train(x, **held, momentum=0.1, eps=1e-5, weights=weights)
    gradients = derivatives.gradients(x, dy, held["weight"], eps=1e-5, weights=weights)
    target.assert_output(target.array(np.concatenate(y)), exact.y, dtype)
    sums = [np.sum(of_replicas, axis=0, dtype=np.float64) for of_replicas in (dweights, dbiases)]
    own = layer_dtype(dtype)
    target.assert_gradients(
        [target.array(np.concatenate(dx)), *(target.array(total.astype(own)) for total in sums)], gradients, dtype
    )
    for layer in layers:
        target.assert_statistic(layer.running_mean, exact.running_mean, own)
        target.assert_statistic(layer.running_var, exact.running_var, own)
        assert_same(target.snapshot(layers[0]), target.snapshot(layer))
    assert int(layers[0].num_batches_tracked) == before["num_batches_tracked"] + 1


@pytest.mark.parametrize("length", [None, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", SHARDS)
def test_replicas_agree_with_the_undivided_batch(target: Target, shards: str, dtype: str, length: int | None) -> None:
    target.require_dtype(dtype)
    sizes, (x, dy) = SHARDS[shards], data(dtype, length)
    layers = replicas(target, ThreadGroup(len(sizes)), len(sizes), dtype=layer_dtype(dtype))
    parts, gradients = split(x, sizes), split(dy, sizes)

    def step(rank: int) -> tuple[np.ndarray, ...]:
        y, pullback = layers[rank].vjp(target.array(parts[rank]))
        return tuple(map(target.numpy, (y, *pullback(target.array(gradients[rank])))))

    assert_shared(target, layers, step, x, dy)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_replicas_agree_with_the_undivided_batch_at_a_large_mean(target: Target, dtype: str) -> None:
    target.require_dtype(dtype)
    x, dy = data(dtype, offset=1e6)
    layers = replicas(target, ThreadGroup(3), 3, dtype=dtype)
    parts, gradients = split(x, [1, 12, 10]), split(dy, [1, 12, 10])

    def step(rank: int) -> tuple[np.ndarray, ...]:
        y, pullback = layers[rank].vjp(target.array(parts[rank]))
        return tuple(map(target.numpy, (y, *pullback(target.array(gradients[rank])))))

    assert_shared(target, layers, step, x, dy)


@pytest.mark.parametrize("kind", strategies.maskings((N, 4)))
@pytest.mark.parametrize("shards", SHARDS)
def test_masked_replicas_agree_with_the_undivided_batch(target: Target, shards: str, kind: str) -> None:
    target.require("masks")
    sizes, (x, dy), masking = SHARDS[shards], data("float32", 4), strategies.maskings((N, 4))[kind]
    layers = replicas(target, ThreadGroup(len(sizes)), len(sizes))
    parts, gradients = split(masking.poisoned(x), sizes), split(dy, sizes)
    masks = {name: split(values, sizes) for name, values in masking.arguments.items()}

    def step(rank: int) -> tuple[np.ndarray, ...]:
        own = {name: target.array(values[rank]) for name, values in masks.items()}
        y, pullback = layers[rank].vjp(target.array(parts[rank]), **own)
        return tuple(map(target.numpy, (y, *pullback(target.array(gradients[rank])))))

    assert_shared(target, layers, step, x, dy, masking.weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [None, "offset", *strategies.maskings((24, 4))])
def test_replicas_along_an_axis_agree_with_the_undivided_batch(target: Target, kind: str | None, dtype: str) -> None:
    target.require_dtype(dtype)
    if kind == "offset" and dtype not in ("float32", "float64"):
        kind = None
    generator = np.random.default_rng(43)
    x, dy = generator.standard_normal((2, 24, C, 4))
    x += np.linspace(-4, 4, 24)[:, None, None] + (1e6 if kind == "offset" else 0)
    x, dy, masking = x.astype(dtype), dy.astype(dtype), strategies.maskings((24, 4)).get(kind or "")
    weights = None if masking is None else masking.weights
    vectors = [np.linspace(low, low + 1, C).astype(layer_dtype(dtype)) for low in (0.5, 1.5, 0.5, -0.5)]
    given = dict(zip(("running_mean", "running_var", "weight", "bias"), map(target.array, vectors), strict=True))

    def step(x: Any, dy: Any, masks: Any) -> Any:
        result, pullback = mbn.functional.batch_norm_vjp(x, **given, training=True, group=AXIS, **masks)
        return *result, *pullback(dy)

    def shards(values: np.ndarray) -> Any:
        return target.array(values.reshape(3, 8, *values.shape[1:]))

    masks = {} if masking is None else {name: shards(values) for name, values in masking.arguments.items()}
    poisoned = x if masking is None else masking.poisoned(x)
    named_vmap = target.transforms.named_vmap
    assert named_vmap is not None
    y, mean, var, dx, dweight, dbias = map(target.numpy, named_vmap(step, AXIS)(shards(poisoned), shards(dy), masks))
    exact = oracle.train(x, *vectors, momentum=0.1, eps=1e-5, weights=weights)
    target.assert_output(target.array(y.reshape(x.shape)), exact.y, dtype)
    own = layer_dtype(dtype)
    for statistics, truth in ((mean, exact.running_mean), (var, exact.running_var)):
        for statistic in statistics:
            np.testing.assert_array_equal(statistic, statistics[0])
            target.assert_statistic(target.array(statistic), truth, own)
    sums = [target.array(total.sum(0, dtype=np.float64).astype(own)) for total in (dweight, dbias)]
    gradients = derivatives.gradients(x, dy, vectors[2], eps=1e-5, weights=weights)
    target.assert_gradients([target.array(dx.reshape(x.shape)), *sums], gradients, dtype)


def test_a_mask_on_one_replica_counts_beside_whole_batches(target: Target) -> None:
    target.require("masks")
    x, dy = data("float32")
    weights = np.arange(N) >= 2  # the first replica's two first rows are masked
    layers = replicas(target, ThreadGroup(2), 2)
    parts, gradients = split(x, [3, 20]), split(dy, [3, 20])

    def step(rank: int) -> tuple[np.ndarray, ...]:
        mask = {} if rank else {"mask": target.array(weights[:3])}
        y, pullback = layers[rank].vjp(target.array(parts[rank]), **mask)
        return tuple(map(target.numpy, (y, *pullback(target.array(gradients[rank])))))

    assert_shared(target, layers, step, x, dy, weights.astype(float))


def test_weights_beyond_the_integers_of_float32_count_exactly(target: Target) -> None:
    target.require("masks")
    target.require_dtype("float64")
    x, weights = np.array([[0.0], [1], [3], [7]]), np.array([2.0**24, 1, 2, 2.0**25 + 1])
    group = ThreadGroup(2)
    layers = [target.layer(1, dtype="float64", momentum=1.0, group=group) for _ in range(2)]

    def step(rank: int) -> None:
        rows = slice(2 * rank, 2 * rank + 2)
        layers[rank](target.array(x[rows]), sample_weight=target.array(weights[rows]))

    group.run(step)
    exact = oracle.train(x, np.zeros(1), np.ones(1), momentum=1.0, eps=1e-5, weights=weights)
    for layer in layers:
        target.assert_statistic(layer.running_mean, exact.running_mean, "float64")
        target.assert_statistic(layer.running_var, exact.running_var, "float64")


@pytest.mark.parametrize("size", [1e300, 1e-300])
def test_weights_that_replicas_cannot_compare_are_rejected(target: Target, size: float) -> None:
    target.require("masks")
    target.require_dtype("float64")
    group = ThreadGroup(2)
    layers = replicas(target, group, 2, dtype="float64")
    before, x = target.snapshot(layers[0]), target.array(data("float64")[0])
    weights = [np.full(N, value) for value in (1.0, size)]
    errors = group.outcomes(lambda rank: layers[rank](x, sample_weight=target.array(weights[rank])))
    assert [type(error) for error in errors] == [mbn.ReplicaError, ValueError]
    assert "multiply all of them by one factor" in str(errors[1])
    assert_same(before, target.snapshot(layers[1]))


def test_bessel_correction_counts_the_values_of_all_replicas(target: Target) -> None:
    group = ThreadGroup(2)
    layers = [target.layer(1, momentum=1.0, group=group) for _ in range(2)]
    group.run(lambda rank: layers[rank](target.array(np.array([[[0], [2]], [[4]]][rank], np.float32))))
    for layer in layers:
        assert target.numpy(layer.running_mean).tolist() == [2]
        assert target.numpy(layer.running_var).tolist() == [4]  # (4 + 0 + 4) / (3 - 1)


def test_one_row_for_each_replica_has_a_variance(target: Target) -> None:
    group = ThreadGroup(2)
    layers = [target.layer(1, momentum=1.0, group=group) for _ in range(2)]
    group.run(lambda rank: layers[rank](target.array(np.full((1, 1), 2 * rank, np.float32))))
    assert [target.numpy(layer.running_var).tolist() for layer in layers] == [[2], [2]]


def test_one_value_per_channel_over_all_replicas_is_rejected(target: Target) -> None:
    group = ThreadGroup(3)
    layers = replicas(target, group, 3)
    before = target.snapshot(layers[0])
    x = target.array(np.ones((1, C), np.float32))
    for error in group.outcomes(lambda rank: layers[rank](x if rank == 1 else x[:0, ...])):
        assert type(error) is ValueError, error
        assert "one value per channel" in str(error)
    assert_same(before, target.snapshot(layers[1]))


def test_empty_batches_of_all_replicas_keep_the_statistics(target: Target) -> None:
    group = ThreadGroup(2)
    layers = replicas(target, group, 2)
    before = target.snapshot(layers[0])
    for y in group.run(lambda rank: layers[rank](target.array(np.ones((0, C, 4), np.float32)))):
        assert tuple(y.shape) == (0, C, 4)
    after = target.snapshot(layers[1])
    assert int(after.pop("num_batches_tracked")) == before.pop("num_batches_tracked") + 1
    assert_same(before, after)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_replicas_hold_the_same_bits_over_many_steps(target: Target, dtype: str) -> None:
    target.require_dtype(dtype)
    generator = np.random.default_rng(42)
    group = ThreadGroup(3)
    layers = replicas(target, group, 3, momentum=None, dtype=dtype)
    sizes = generator.integers(0, 9, (20, 2))
    sizes = np.concatenate([np.full((20, 1), 2), generator.integers(0, 9, (20, 2))], axis=1)
    steps = [[(10 * generator.standard_normal((n, C))).astype(dtype) for n in row] for row in sizes]
    group.run(lambda rank: [layers[rank](target.array(step[rank])) for step in steps])
    for layer in layers:
        assert_same(target.snapshot(layers[0]), target.snapshot(layer))


def test_one_replica_computes_the_bits_of_a_layer_without_a_group(target: Target) -> None:
    x, dy = map(target.array, data("float32"))
    group, local = ThreadGroup(1), configured(target.layer(C), seed=1)
    (alone,) = replicas(target, group, 1)

    def step(layer: mbn.BatchNorm1d) -> list[np.ndarray]:
        y, pullback = layer.vjp(x)
        return [target.numpy(array) for array in (y, *pullback(dy), *layer.state)]

    for own, expected in zip(group.run(lambda _: step(alone))[0], step(local), strict=True):
        np.testing.assert_array_equal(own, expected)


class Silent(mbn.Group):
    """A group that must not be asked for anything."""

    rank, size = 0, 2

    def gather(self, vector: Any) -> Any:
        """Fail: there is no other replica."""
        raise AssertionError("the layer communicates")


def test_evaluation_and_frozen_layers_are_local(target: Target) -> None:
    x = target.array(data("float32")[0])
    layer, local = (configured(target.layer(C, group=group), seed=1).eval() for group in (Silent(), None))
    expected = target.numpy(local(x))
    np.testing.assert_array_equal(target.numpy(layer(x)), expected)
    np.testing.assert_array_equal(target.numpy(layer.freeze().train()(x)), expected)
    y, state = layer.apply(layer.params, layer.state, x, training=True)
    np.testing.assert_array_equal(target.numpy(y), expected)
    untracked = target.layer(C, group=Silent(), track_running_stats=False).eval()
    assert np.isfinite(target.numpy(untracked(x))).all()
    del state


def test_a_step_takes_one_gather_forward_and_one_backward(target: Target) -> None:
    group = ThreadGroup(2)
    layers = replicas(target, group, 2)
    x, dy = map(target.array, data("float32"))

    def steps(rank: int) -> None:
        for _ in range(2):
            _, pullback = layers[rank].vjp(x)
            pullback(dy)

    group.run(steps)
    first, *lengths = group.lengths
    assert first <= 8  # the first step begins with a comparison
    assert lengths == [3 * C + 8, 2 * C] * 2


REFUSED: dict[str, tuple[Callable[[Target], Any], type[Exception]]] = {
    "channels": (lambda target: target.array(np.ones((4, C + 1), np.float32)), ValueError),
    "dtype": (lambda target: target.array(np.ones((4, C), np.int32)), TypeError),
    "axes": (lambda target: target.array(np.ones((4,), np.float32)), ValueError),
    "host data": (lambda _: [["a"]], TypeError),
    "nothing": (lambda _: None, TypeError),
}
"""By name: an input, and the error of the layer that gets it."""


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_input_of_one_replica_raises_on_all(target: Target, name: str, *, is_first: bool) -> None:
    make, expected = REFUSED[name]
    group = ThreadGroup(3)
    layers = replicas(target, group, 3)
    x = target.array(data("float32")[0])
    if not is_first:
        group.run(lambda rank: layers[rank](x))
    before = target.snapshot(layers[0])
    errors = group.outcomes(lambda rank: layers[rank](make(target) if rank == 1 else x))
    assert [type(error) for error in errors] == [mbn.ReplicaError, expected, mbn.ReplicaError]
    for rank in (0, 2):
        assert f"rank 1: {expected.__name__}: {errors[1]}"[:200] in str(errors[rank])
    for layer in layers:
        assert_same(before, target.snapshot(layer))
    group.run(lambda rank: layers[rank](x))
    assert_same(target.snapshot(layers[0]), target.snapshot(layers[1]))


def test_error_without_a_text_reaches_all_replicas(target: Target) -> None:
    class SilentError(RuntimeError):
        def __str__(self) -> str:
            raise ValueError("no text")

    def batches(error: Exception) -> Iterator[Any]:
        yield target.array(data("float32")[0])
        raise error

    for error, text in ((SilentError(), "SilentError"), (OSError("file \udcff"), "OSError: file ?")):
        group = ThreadGroup(2)
        layers = [target.layer(C) for _ in range(2)]
        given = [batches(error), [target.array(data("float32")[0])]]
        first, second = group.outcomes(lambda rank: layers[rank].fit(given[rank], group=group, progress=False))  # noqa: B023
        assert first is error
        assert type(second) is mbn.ReplicaError
        assert f"rank 0: {text}" in str(second)


@pytest.mark.parametrize("name", ["dtype", "axes"])
def test_refused_first_input_of_one_replica_raises_on_all(target: Target, name: str) -> None:
    make, expected = REFUSED[name]
    group = ThreadGroup(2)
    layers = [mbn.BatchNorm1d(None, group=group), mbn.BatchNorm1d(None, backend=target.backend, group=group)]
    x = target.array(data("float32")[0])
    errors = group.outcomes(lambda rank: layers[rank](make(target) if rank == 0 else x))
    assert [type(error) for error in errors] == [expected, mbn.ReplicaError]
    assert layers[0].num_features is None
    group.run(lambda rank: layers[rank](x))
    assert_same(target.snapshot(layers[0]), target.snapshot(layers[1]))


def test_refused_mask_of_one_replica_raises_on_all(target: Target) -> None:
    target.require("masks")
    group = ThreadGroup(2)
    layers = replicas(target, group, 2)
    before, x = target.snapshot(layers[0]), target.array(data("float32")[0])
    weights = [np.full(N, value, np.float32) for value in (1, -1)]
    errors = group.outcomes(lambda rank: layers[rank](x, sample_weight=target.array(weights[rank])))
    assert [type(error) for error in errors] == [mbn.ReplicaError, ValueError]
    for layer in layers:
        assert_same(before, target.snapshot(layer))


def test_refused_gradient_of_one_replica_raises_on_all(target: Target) -> None:
    group = ThreadGroup(2)
    layers = replicas(target, group, 2)
    x, dy = map(target.array, data("float32"))

    def step(rank: int) -> Any:
        _, pullback = layers[rank].vjp(x)
        with pytest.raises(ValueError if rank else mbn.ReplicaError, match="dy"):
            pullback(dy[:2, ...] if rank else dy)
        return target.numpy(pullback(dy)[0])

    np.testing.assert_array_equal(*group.run(step))


@pytest.mark.parametrize("arguments", [({"num_features": C + 1}, {}), ({}, {"dtype": "float64"})], ids=["C", "dtype"])
def test_replicas_of_different_layers_raise_on_all(target: Target, arguments: tuple[dict[str, Any], ...]) -> None:
    target.require_dtype("float64")
    group = ThreadGroup(2)
    layers = [target.layer(**{"num_features": C, **own}, group=group) for own in arguments]
    before = list(map(target.snapshot, layers))
    inputs = [target.array(np.ones((4, own.get("num_features", C)), np.float32)) for own in arguments]
    errors = group.outcomes(lambda rank: layers[rank](inputs[rank]))
    for error, layer, old in zip(errors, layers, before, strict=True):
        assert type(error) is mbn.ReplicaError
        assert "rank 0 is at" in str(error)
        assert "rank 1 is at" in str(error)
        assert_same(old, target.snapshot(layer))


@pytest.mark.parametrize("name", ["eps", "momentum", "correction"])
def test_replicas_with_different_settings_raise_on_all(target: Target, name: str) -> None:
    group = ThreadGroup(2)
    layers = [target.layer(C, group=group, **{name: value}) for value in (0, 1)]
    before, x = target.snapshot(layers[0]), target.array(data("float32")[0])
    for error in group.outcomes(lambda rank: layers[rank](x)):
        assert type(error) is mbn.ReplicaError
        assert all(f"{name}={getattr(layer, name)}" in str(error) for layer in layers)
    for layer in layers:
        assert_same(before, target.snapshot(layer))


class Returns(mbn.Group):
    """A group whose gather returns what a function makes of the vector."""

    rank, size = 0, 2

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def gather(self, vector: Any) -> Any:
        """Return the function's result."""
        return self._function(vector)


@pytest.mark.parametrize("name", ["None", "a list", "one row"])
def test_group_that_returns_no_rows_is_rejected(target: Target, name: str) -> None:
    functions = {"None": lambda _: None, "a list": lambda vector: [vector] * 2, "one row": lambda vector: vector}
    layer = target.layer(C, group=Returns(functions[name]))
    before = target.snapshot(layer)
    with pytest.raises(TypeError, match="gather has to return an array of shape"):
        layer(target.array(data("float32")[0]))
    assert_same(before, target.snapshot(layer))


def test_layers_called_in_different_orders_raise_on_all(target: Target) -> None:
    group = ThreadGroup(2)
    first, second = replicas(target, group, 2), replicas(target, group, 2)
    x = target.array(data("float32")[0])
    group.run(lambda rank: (first[rank](x), second[rank](x)))
    for error in group.outcomes(lambda rank: (first, second)[rank][rank](x)):
        assert type(error) is mbn.ReplicaError
        assert "same order" in str(error)


def test_a_missing_replica_is_a_timeout_that_names_layer_and_rank(target: Target) -> None:
    group = ThreadGroup(2, patience=0.5)
    layers = replicas(target, group, 2)
    mbn.synchronize({"encoder": layers[0]}, group)
    before, x = target.snapshot(layers[0]), target.array(data("float32")[0])
    error, _ = group.outcomes(lambda rank: layers[rank](x) if rank == 0 else None)
    assert type(error) is TimeoutError
    assert "'encoder'" in str(error)
    assert "[1]" in str(error)
    assert_same(before, target.snapshot(layers[0]))


def test_pullback_beside_a_plain_call_is_an_error_instead_of_a_wait(target: Target) -> None:
    if target.capabilities.autograd:
        pytest.skip(f"{target.backend.name} declares autograd, so a plain call can take part in a backward pass")
    group = ThreadGroup(2)
    layers = replicas(target, group, 2)
    x, dy = map(target.array, data("float32"))

    def step(rank: int) -> None:
        if rank:
            layers[rank](x)
        else:
            _, pullback = layers[rank].vjp(x)
            with pytest.raises(mbn.ReplicaError, match="rank 1"):
                pullback(dy)

    group.run(step)


def test_functions_share_statistics_in_a_group(target: Target) -> None:
    x, dy = data("float32")
    vectors = [np.linspace(low, low + 1, C).astype(np.float32) for low in (0.5, 1.5, 0.5, -0.5)]
    parts, gradients, group = split(x, [3, 20]), split(dy, [3, 20]), ThreadGroup(2)

    def run(x: np.ndarray, dy: np.ndarray, group: Any = None) -> list[np.ndarray]:
        names = ("running_mean", "running_var", "weight", "bias")
        given = dict(zip(names, map(target.array, vectors), strict=True))
        own = target.array(x)
        result = mbn.functional.batch_norm(own, **given, training=True, group=group)
        again, pullback = mbn.functional.batch_norm_vjp(own, **given, training=True, group=group)
        for first, second in zip(result, again, strict=True):
            np.testing.assert_array_equal(target.numpy(first), target.numpy(second))
        return [target.numpy(array) for array in (*result, pullback(target.array(dy))[0])]

    exact = oracle.train(x, *vectors, momentum=0.1, eps=1e-5)
    y, mean, var, dx = zip(*group.run(lambda rank: run(parts[rank], gradients[rank], group)), strict=True)
    target.assert_output(target.array(np.concatenate(y)), exact.y, "float32")
    for statistics, truth in ((mean, exact.running_mean), (var, exact.running_var)):
        np.testing.assert_array_equal(*statistics)
        target.assert_statistic(target.array(statistics[0]), truth, "float32")
    exact_dx = derivatives.gradients(x, dy, vectors[2], eps=1e-5)
    target.assert_gradients([target.array(np.concatenate(dx))], exact_dx, "float32")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fit_in_a_group_takes_the_batches_of_all_replicas(target: Target, dtype: str) -> None:
    target.require_dtype(dtype)
    x, group = data(dtype, offset=1e3)[0], ThreadGroup(3)
    layers = [target.layer(C, dtype=dtype) for _ in range(3)]
    batches = [split(x[:15], [4, 0, 11]), [], [x[15:]]]
    group.run(lambda rank: layers[rank].fit(map(target.array, batches[rank]), group=group, progress=False))
    exact = oracle.train(x, np.zeros(C), np.ones(C), momentum=1.0, eps=1.0)
    for layer in layers:
        target.assert_statistic(layer.running_mean, exact.running_mean, dtype)
        target.assert_statistic(layer.running_var, exact.running_var, dtype)
        assert int(layer.num_batches_tracked) == 4
        assert_same(target.snapshot(layers[0]), target.snapshot(layer))


def test_a_batch_that_fit_refuses_raises_on_all_replicas(target: Target) -> None:
    x, group = data("float32")[0], ThreadGroup(2)
    layers = replicas(target, None, 2)
    before = target.snapshot(layers[0])
    batches = [[x, x[:, :2]], [x]]
    errors = group.outcomes(
        lambda rank: layers[rank].fit(map(target.array, batches[rank]), group=group, progress=False)
    )
    assert [type(error) for error in errors] == [ValueError, mbn.ReplicaError]
    for layer in layers:
        assert_same(before, target.snapshot(layer))


def test_populations_of_processes_merge_to_that_of_all_batches(target: Target) -> None:
    x = data("float32", offset=1e4)[0]
    parts = split(x, [1, 0, 15, 7])
    populations = [mbn.Population(backend=target.backend).update(target.array(part)) for part in parts]
    received = [pickle.loads(pickle.dumps(population)) for population in populations]  # noqa: S301 - our own
    total = mbn.Population(backend=target.backend)
    for population in received:
        assert total.merge(population) is total
    exact = oracle.train(x, np.zeros(C), np.ones(C), momentum=1.0, eps=1.0)
    bn = target.layer(C)
    bn.state = total.statistics()
    target.assert_statistic(bn.running_mean, exact.running_mean, "float32")
    target.assert_statistic(bn.running_var, exact.running_var, "float32")
    assert int(bn.num_batches_tracked) == 4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_populations_merged_one_after_another_are_accurate(target: Target, dtype: str) -> None:
    target.require_dtype(dtype)
    x = (1e6 + np.random.default_rng(44).standard_normal((1500, C))).astype(dtype)
    total = mbn.Population(backend=target.backend, dtype=dtype)
    for part in np.split(x, 500):
        total.merge(mbn.Population(backend=target.backend, dtype=dtype).update(target.array(part)))
    exact = oracle.train(x, np.zeros(C), np.ones(C), momentum=1.0, eps=1.0)
    mean, var, _ = total.statistics()
    target.assert_statistic(mean, exact.running_mean, dtype)
    target.assert_statistic(var, exact.running_var, dtype)


def test_refused_batch_and_a_copy_leave_a_population_as_it_is(target: Target) -> None:
    x = target.array(data("float32")[0])
    total = mbn.Population(backend=target.backend).update(x)
    expected = list(map(target.numpy, total.statistics()))
    copy.copy(total).update(x)
    with pytest.raises(ValueError, match="channels"):
        total.update(target.array(np.ones((4, C + 1), np.float32)))
    for array, value in zip(total.statistics(), expected, strict=True):
        np.testing.assert_array_equal(target.numpy(array), value)


def test_copies_share_the_group_and_pickles_leave_it(target: Target) -> None:
    group, x = ThreadGroup(2), target.array(data("float32")[0])
    layer = target.layer(C, group=group)
    assert copy.copy(layer).group is group
    assert copy.deepcopy(layer).group is group
    loaded = pickle.loads(pickle.dumps(layer))  # noqa: S301 - our own
    before = target.snapshot(loaded)
    with pytest.raises(RuntimeError, match=r"bn\.group"):
        loaded(x)
    assert_same(before, target.snapshot(loaded))
    loaded.eval()(x)
    loaded.train().group = None
    loaded(x)
    assert not any("group" in key for key in layer.state_dict())


@pytest.mark.parametrize("name", ["1", "False", "2.5", "text", "object", "list", "tuple"])
def test_layer_rejects_anything_else_as_its_group(target: Target, name: str) -> None:
    values = {"1": 1, "False": False, "2.5": 2.5, "text": "", "object": object(), "list": [], "tuple": ("a", 1)}
    layer, given = target.layer(C), values[name]
    with pytest.raises(TypeError, match="group"):
        layer.group = given
    assert layer.group is None
    with pytest.raises(TypeError, match="group"):
        target.layer(C, group=given)
