"""Replicas that share a batch get the results of the undivided batch, each for its part."""

import importlib
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest

import mbn
from mbn.conformance.thread_group import ThreadGroup
from mbn.contract import Backend, Params, Settings, State
from mbn.replicas import Membership
from mbn.step.forward import forward, forward_vjp
from mbn.step.masks import Masking

C = 3
SHARDS = {"two": [20, 17], "three, one with one row": [1, 24, 12], "four, one of them empty": [9, 0, 20, 8]}


@pytest.fixture(params=["numpy", "numba", "torch", "strict", "cupy"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "cupy":
        request.getfixturevalue("cupy")
    return mbn.get_backend(request.param)


def sharing(group: Any, backend: Backend, settings: Settings) -> AbstractContextManager[Any]:
    """Return a context whose value is the replicas of one step in a group, if there is one."""
    return nullcontext() if group is None else Membership(group).exchange(backend, settings, None)


def split(values: Any, sizes: list[int]) -> list[Any]:
    """Return the parts of values along the first axis."""
    starts = np.cumsum([0, *sizes])
    return [values[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def data(dtype: str, length: int | None) -> tuple[np.ndarray, np.ndarray]:
    shape = (37, C) if length is None else (37, C, length)
    x, dy = np.random.default_rng(5).standard_normal((2, *shape))
    x += 100 * np.arange(37).reshape(-1, *[1] * (x.ndim - 1)) / 37  # so that every shard has a mean of its own
    return x.astype(dtype), dy.astype(dtype)


def a_mask(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(6).random(shape) < 0.7


def vectors(backend: Backend, dtype: str) -> tuple[Params, State]:
    weight, bias, mean = (backend.asarray(np.array(values), dtype) for values in ([1, 2, -3], [0, 1, 2], [5, 6, 7]))
    var = backend.asarray(np.array([1, 2, 3]), dtype)
    return Params(weight, bias), State(mean, var, backend.asarray(np.array(4), "int64"))


def assert_near(part: Any, expected: Any, dtype: str) -> None:
    tolerance = 3e-6 if dtype == "float32" else 1e-11
    expected = np.asarray(expected, float)
    np.testing.assert_allclose(np.asarray(part, float), expected, tolerance, tolerance * max(abs(expected).max(), 1))


@pytest.mark.parametrize("sizes", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [None, 5])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_replicas_agree_with_the_undivided_batch(
    backend: Backend, sizes: list[int], length: int | None, dtype: str, *, masked: bool
) -> None:
    x, dy = data(dtype, length)
    mask = a_mask((37,) if length is None else (37, length)) if masked else None
    settings = Settings(C, dtype, 1e-5, 0.1, 1, 1)
    params, state = vectors(backend, dtype)

    def step(x: np.ndarray, dy: np.ndarray, mask: Any, group: Any = None) -> list[np.ndarray]:
        x, dy = (backend.asarray(values, dtype) for values in (x, dy))
        masking = None if mask is None else Masking(backend.asarray(mask), None, None)
        run = partial(forward_vjp, backend, x, params, state, settings, training=True, masking=masking)
        with sharing(group, backend, settings) as replicas:
            (y, pullback), after = run(replicas=replicas)
        with sharing(group, backend, settings) as replicas:
            again, _ = forward(backend, x, params, state, settings, training=True, masking=masking, replicas=replicas)
        np.testing.assert_array_equal(backend.to_numpy(again), backend.to_numpy(y))
        return [backend.to_numpy(array) for array in (y, *pullback(dy), *after)]

    y, dx, dweight, dbias, *statistics = step(x, dy, mask)
    group = ThreadGroup(len(sizes))
    parts = list(zip(split(x, sizes), split(dy, sizes), split(mask, sizes) if masked else [None] * 4, strict=False))
    results = group.run(lambda rank: step(*parts[rank], group))
    outputs, gradients, dweights, dbiases, *others = zip(*results, strict=True)
    assert_near(np.concatenate(outputs), y, dtype)
    assert_near(np.concatenate(gradients), dx, dtype)
    assert_near(sum(dweights), dweight, dtype)
    assert_near(sum(dbiases), dbias, dtype)
    for statistic, of_replicas in zip(statistics, others, strict=True):
        assert_near(of_replicas[0], statistic, dtype)
        for other in of_replicas[1:]:
            np.testing.assert_array_equal(other, of_replicas[0])


def test_one_value_per_channel_over_all_replicas_is_refused(backend: Backend) -> None:
    settings = Settings(C, "float32", 1e-5, 0.1, 1, 1)
    params, state = vectors(backend, "float32")

    def step(group: ThreadGroup) -> Any:
        x = backend.asarray(np.full((1, C), group.rank), "float32")
        with sharing(group, backend, settings) as replicas:
            return forward(backend, x, params, state, settings, training=True, replicas=replicas)

    two, one = ThreadGroup(2), ThreadGroup(1)
    two.run(lambda _: step(two))  # two values have a variance
    with pytest.raises(ValueError, match="one value per channel"):
        one.run(lambda _: step(one))


def test_nan_on_one_replica_stays_in_its_channel(backend: Backend) -> None:
    x, dy = data("float32", None)
    x[3, 1] = np.nan
    settings, group = Settings(C, "float32", 1e-5, 0.1, 1, 1), ThreadGroup(2)
    params, state = vectors(backend, "float32")
    parts = list(zip(split(x, [20, 17]), split(dy, [20, 17]), strict=True))

    def step(rank: int) -> list[np.ndarray]:
        own, gradient = (backend.asarray(values, "float32") for values in parts[rank])
        with sharing(group, backend, settings) as replicas:
            (y, pullback), _ = forward_vjp(backend, own, params, state, settings, training=True, replicas=replicas)
        return [backend.to_numpy(values) for values in (y, pullback(gradient)[0])]

    for results in zip(*group.run(step), strict=True):
        assert np.isnan(np.concatenate(results)).all(0).tolist() == [False, True, False]


def test_evaluation_does_not_communicate(backend: Backend) -> None:
    settings = Settings(C, "float32", 1e-5, 0.1, 1, 1)
    params, state = vectors(backend, "float32")
    x = backend.asarray(data("float32", None)[0], "float32")
    expected, _ = forward(backend, x, params, state, settings, training=False)
    y, after = forward(backend, x, params, state, settings, training=False, replicas=object())
    assert after is state
    np.testing.assert_array_equal(backend.to_numpy(y), backend.to_numpy(expected))


class Twice(mbn.Group):
    """A group of two replicas with the same batch, of which this process is one."""

    rank, size = 0, 2

    def gather(self, vector: Any) -> Any:
        return vector.repeat(2, 1)


class TestTorch:
    """Replicas under autograd, differentiated up to three times."""

    @pytest.mark.parametrize("length", [None, 3])
    def test_compiled_step_takes_an_empty_batch(self, length: int | None) -> None:
        torch = pytest.importorskip("torch")
        module = mbn.BatchNorm1d(C, backend="torch", group=Twice()).as_module()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for steps, n in enumerate((3, 0, 4)):
            x = torch.ones(n, C, *[] if length is None else [length]).cumsum(0).requires_grad_()
            compiled(x).sum().backward()
            assert x.grad.shape == x.shape
            assert module.num_batches_tracked == steps + 1

    def test_replica_without_a_gradient_of_x_takes_part_in_the_backward_pass(self) -> None:
        torch = pytest.importorskip("torch")
        backend, sizes = mbn.get_backend("torch"), [0, 20, 17]
        settings, group = Settings(C, "float32", 1e-5, 0.1, 1, 1), ThreadGroup(3)
        (weight, bias), state = vectors(backend, "float32")
        x, dy = data("float32", None)

        def step(x: np.ndarray, dy: np.ndarray, group: Any = None, *, needs_x: bool = True) -> Any:
            x, dy = torch.from_numpy(x).requires_grad_(needs_x), torch.from_numpy(dy)
            params = Params(weight.clone().requires_grad_(), bias)
            with sharing(group, backend, settings) as replicas:
                y, _ = forward(backend, x, params, state, settings, training=True, replicas=replicas)
            (y * dy).sum().backward()
            return params.weight.grad, x.grad

        dweight, dx = step(x, dy)
        parts = list(zip(split(x, sizes), split(dy, sizes), strict=True))
        own = group.run(lambda rank: step(*parts[rank], group, needs_x=rank != 1))
        assert_near(sum(gradient for gradient, _ in own), dweight, "float32")
        assert own[1][1] is None
        assert_near(own[2][1], dx[20:], "float32")

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_derivatives_agree_with_the_undivided_batch(self, dtype: str, *, masked: bool) -> None:
        torch = pytest.importorskip("torch")
        backend = mbn.get_backend("torch")
        x, dy = data(dtype, 4)
        v, mask = np.sin(x), a_mask((37, 4))
        settings = Settings(C, dtype, 1e-5, 0.1, 1, 1)
        (weight, bias), state = vectors(backend, dtype)
        u = torch.tensor([1.0, -2.0, 0.5], dtype=weight.dtype)

        def step(x: np.ndarray, dy: np.ndarray, v: np.ndarray, mask: np.ndarray, group: Any = None) -> list[Any]:
            x, dy, v = (torch.from_numpy(values).requires_grad_() for values in (x, dy, v))
            params = Params(weight.clone().requires_grad_(), bias.clone().requires_grad_())
            masking = Masking(torch.from_numpy(mask), None, None) if masked else None
            with sharing(group, backend, settings) as replicas:
                y, _ = forward(backend, x, params, state, settings, training=True, masking=masking, replicas=replicas)
            first = torch.autograd.grad(y, (x, *params), dy, create_graph=True)
            scalar = (first[0] * v).sum() + (first[1] * u).sum()
            second = torch.autograd.grad(scalar, (x, dy, params.weight), create_graph=True)
            third = torch.autograd.grad((second[0] * v).sum(), (x, params.weight))
            return [tensor.detach().numpy() for tensor in (y, *first, *second, *third)]

        expected = step(x, dy, v, mask)
        sizes = [20, 16, 1]
        group = ThreadGroup(3)
        parts = list(zip(*(split(values, sizes) for values in (x, dy, v, mask)), strict=True))
        results = zip(*group.run(lambda rank: step(*parts[rank], group)), strict=True)
        for of_replicas, truth in zip(results, expected, strict=True):
            is_vector = truth.ndim == 1
            assert_near(sum(of_replicas) if is_vector else np.concatenate(of_replicas), truth, dtype)


class TestJax:
    """Replicas along a named axis, differentiated twice."""

    @pytest.mark.parametrize(("size", "masked"), [(2, True), (4, False)])
    def test_derivatives_agree_with_the_undivided_batch(self, size: int, *, masked: bool) -> None:
        jax = pytest.importorskip("jax")
        from mbn_jax.group import AxisGroup

        backend = mbn.get_backend("jax")
        x, dy = (values[:36] for values in data("float32", 4))
        v, mask = np.sin(x), a_mask((36, 4))
        params, state = vectors(backend, "float32")
        settings = Settings(C, "float32", 1e-5, 0.1, 1, 1)

        def losses(group: Any, x: Any, params: Params, dy: Any, mask: Any) -> tuple[Any, Any]:
            masking = Masking(mask, None, None) if masked else None
            y, after = forward(backend, x, params, state, settings, training=True, masking=masking, replicas=group)
            return (y * dy).sum(), (y, after)

        def derivatives(group: Any, x: Any, dy: Any, v: Any, mask: Any) -> tuple[Any, ...]:
            def gradients(x: Any, params: Params) -> tuple[Any, Any]:
                return jax.grad(partial(losses, group), (0, 1), has_aux=True)(x, params, dy, mask)[0]

            def scalar(x: Any, params: Params) -> Any:
                dx, dparams = gradients(x, params)
                return (dx * v).sum() + (dparams.weight * params.bias).sum()

            _, (y, after) = losses(group, x, params, dy, mask)
            dx, dparams = gradients(x, params)
            forwards = jax.jvp(lambda x: gradients(x, params), (x,), (v,))[1]
            (_, pullback), _ = forward_vjp(
                backend,
                x,
                params,
                state,
                settings,
                training=True,
                replicas=group,
                masking=Masking(mask, None, None) if masked else None,
            )
            return (
                (y, dx, forwards[0], jax.grad(scalar)(x, params), pullback(dy)[0]),
                (*dparams, forwards[1].weight, jax.grad(scalar, 1)(x, params).weight),
                after,
            )

        x, dy, v, mask = map(jax.numpy.asarray, (x, dy, v, mask))
        arrays, sums, after = jax.jit(partial(derivatives, None))(x, dy, v, mask)
        shards = [values.reshape(size, -1, *values.shape[1:]) for values in (x, dy, v, mask)]
        run = jax.jit(jax.vmap(partial(derivatives, AxisGroup("replicas")), axis_name="replicas"))
        own_arrays, own_sums, own_after = run(*shards)
        for own, expected in zip(own_arrays, arrays, strict=True):
            assert_near(own.reshape(expected.shape), expected, "float32")
        for own, expected in zip(own_sums, sums, strict=True):
            assert_near(own.sum(0), expected, "float32")
        for own, expected in zip(own_after, after, strict=True):
            for replica in own:
                assert_near(replica, expected, "float32")


SEAMS = {
    ("mbn.step.compose", "merged"): lambda: test_replicas_agree_with_the_undivided_batch(
        mbn.get_backend("numpy"), [20, 17], None, "float32", masked=False
    ),
    ("mbn.step.compose", "summed"): lambda: test_replicas_agree_with_the_undivided_batch(
        mbn.get_backend("numpy"), [20, 17], None, "float32", masked=False
    ),
    ("mbn_torch.integration", "merged"): lambda: TestTorch().test_derivatives_agree_with_the_undivided_batch(
        "float64", masked=False
    ),
    ("mbn_jax.kernels.own_statistics", "summed"): lambda: TestJax().test_derivatives_agree_with_the_undivided_batch(
        2, masked=False
    ),
}


@pytest.mark.parametrize("seam", SEAMS, ids=".".join)
def test_replicas_disagree_without_merged_or_summed(seam: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = seam
    own = {"merged": 1, "summed": 0}[name]
    monkeypatch.setattr(importlib.import_module(module), name, lambda *arguments: arguments[own])  # no communication
    with pytest.raises(AssertionError):
        SEAMS[seam]()
