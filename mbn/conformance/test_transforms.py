"""Transforms: a framework's transformations (autograd, jit, vmap, compile) work on layers and pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import mbn
from mbn.conformance import derivatives, oracle, strategies, ulp
from mbn.conformance.target import Target, configured
from mbn.contract import Array, Params, State

EPS = 1e-3
X, V, DY = np.random.default_rng(19).normal([[[[1]]], [[[0]]], [[[0]]]], 1, (3, 6, 3, 4))
XS = np.random.default_rng(20).normal(1, 2, (2, 6, 3, 4)).astype(np.float32)
KINDS = [strategies.maskings((6, 4), seed)["all three"] for seed in range(2)]
MASKS = {name: np.stack([masking.arguments[name] for masking in KINDS]) for name in KINDS[0].arguments}
"""The mask, lengths and sample_weight for each of XS, stacked, to be traced together with XS."""


class Case(NamedTuple):
    """A layer and a batch on the backend, with the data for the exact results."""

    bn: mbn.BatchNorm1d
    held: dict[str, np.ndarray]
    x: Array
    arguments: dict[str, Array]
    weights: np.ndarray | None
    dtype: str

    @classmethod
    def make(cls, target: Target, dtype: str = "float32", *, masked: bool = False, **settings: Any) -> "Case":
        """Make a case, or skip the test if the backend does not declare the dtype or masks."""
        target.require_dtype(dtype)
        if masked:
            target.require("masks")
        bn = configured(target.layer(3, eps=EPS, dtype=dtype, **settings), seed=1)
        x = X.astype(dtype)
        masking = KINDS[0] if masked else None
        return cls(
            bn=bn,
            held=target.snapshot(bn),
            x=target.array(x if masking is None else masking.poisoned(x)),
            arguments={} if masking is None else target.arrays(masking.arguments),
            weights=None if masking is None else masking.weights,
            dtype=dtype,
        )

    def output(self, x: Array, params: Params | None = None, *, training: bool = True) -> Array:
        """Return the output of the layer's ``apply``."""
        return self.bn.apply(params or self.bn.params, self.bn.state, x, training=training, **self.arguments)[0]

    def truth(self, dy: np.ndarray, *, training: bool = True, **more: Any) -> list[derivatives.Derivatives]:
        """Return the exact derivatives along V."""
        return derivatives.along(
            X.astype(self.dtype),
            V.astype(self.dtype),
            dy,
            self.held["weight"],
            self.held["bias"],
            eps=EPS,
            weights=self.weights,
            statistics=None if training else (self.held["running_mean"], self.held["running_var"]),
            **more,
        )


def assert_training_step(
    target: Target, result: tuple[Array, ...], held: dict[str, np.ndarray], x: np.ndarray, step: dict[str, Any]
) -> None:
    """Check the output and the running statistics of a training step."""
    vectors: dict[str, Any] = {key: value for key, value in held.items() if key != "num_batches_tracked"}
    exact = oracle.train(x, **vectors, eps=EPS, **step)
    target.assert_output(result[0], exact.y, "float32")
    target.assert_statistic(result[1], exact.running_mean, "float32")
    target.assert_statistic(result[2], exact.running_var, "float32")


# Autograd.


def jitted(target: Target, function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Return the function compiled if ``jit`` is declared, which takes less time for higher derivatives."""
    return target.transforms.jit(function) if target.capabilities.jit else function


@pytest.mark.parametrize(("training", "masked"), [(True, False), (True, True), (False, True)])
def test_grad_and_pullback_are_accurate(target: Target, *, training: bool, masked: bool) -> None:
    target.require("autograd")
    case = Case.make(target, masked=masked)
    dy = target.array(DY.astype(np.float32))
    weight, bias = case.bn.params
    gradients = [
        target.transforms.grad(function)(argument)
        for function, argument in [
            (lambda x: (case.output(x, training=training) * dy).sum(), case.x),
            (lambda w: (case.output(case.x, Params(w, bias), training=training) * dy).sum(), weight),
            (lambda b: (case.output(case.x, Params(weight, b), training=training) * dy).sum(), bias),
        ]
    ]
    statistics = None if training else (case.held["running_mean"], case.held["running_var"])
    exact = derivatives.gradients(
        X.astype(np.float32),
        DY.astype(np.float32),
        case.held["weight"],
        eps=EPS,
        weights=case.weights,
        statistics=statistics,
    )
    target.assert_gradients(gradients, exact, "float32")
    _, pullback = case.bn.train(training).vjp(case.x, **case.arguments)
    target.assert_gradients(pullback(dy), exact, "float32")


@pytest.mark.parametrize(("dtype", "masked"), [("float32", False), ("float32", True), ("float64", True)])
def test_third_derivatives_in_reverse_mode_are_accurate(target: Target, dtype: str, *, masked: bool) -> None:
    target.require("autograd")
    case = Case.make(target, dtype, masked=masked)
    grad, v, dy = target.transforms.grad, target.array(V.astype(dtype)), target.array(DY.astype(dtype))

    def loss(x: Array) -> Array:
        y = case.output(x)
        return (dy * y * y).sum() / 2

    def second(x: Array) -> Array:
        return (grad(loss)(x) * v).sum()

    def third(x: Array) -> Array:
        return (grad(second)(x) * v).sum()

    exact = case.truth(DY.astype(dtype), order=2, power=2)[2]
    derivative = jitted(target, grad(third))(case.x)
    target.assert_derivative(derivative, exact.dx, dtype, ulp.THIRD_DERIVATIVE_BOUNDS[dtype])


@pytest.mark.parametrize(("dtype", "masked"), [("float32", False), ("float32", True), ("float64", True)])
def test_third_derivatives_in_forward_mode_are_accurate(target: Target, dtype: str, *, masked: bool) -> None:
    target.require("autograd")
    case = Case.make(target, dtype, masked=masked)
    jvp, v = target.transforms.jvp, target.array(V.astype(dtype))

    def first(x: Array) -> Array:
        return jvp(case.output, x, v)

    def second(x: Array) -> Array:
        return jvp(first, x, v)

    exact = case.truth(DY.astype(dtype))[3]
    derivative = jitted(target, lambda x: jvp(second, x, v))(case.x)
    target.assert_derivative(derivative, exact.y, dtype, ulp.THIRD_DERIVATIVE_BOUNDS[dtype])


@pytest.mark.parametrize(("training", "masked"), [(True, False), (True, True), (False, True)])
def test_mixed_mode_derivatives_are_accurate(target: Target, *, masked: bool, training: bool) -> None:
    target.require("autograd")
    case = Case.make(target, masked=masked)
    transforms, v, dy = target.transforms, target.array(V.astype(np.float32)), target.array(DY.astype(np.float32))
    weight, bias = case.bn.params

    def output(x: Array) -> Array:
        return case.output(x, training=training)

    def of_weight(x: Array) -> Array:
        return transforms.grad(lambda w: (case.output(x, Params(w, bias), training=training) * dy).sum())(weight)

    def forward_over_reverse(x: Array) -> Array:
        return transforms.jvp(transforms.grad(lambda x: (output(x) * dy).sum()), x, v)

    def reverse_over_forward(x: Array) -> Array:
        return transforms.grad(lambda x: (transforms.jvp(output, x, v) * dy).sum())(x)

    def by_weight_and_x(x: Array) -> Array:
        return transforms.jvp(of_weight, x, v)

    exact = case.truth(DY.astype(np.float32), training=training, order=1)[1]
    for function, truth in [
        (forward_over_reverse, exact.dx),
        (reverse_over_forward, exact.dx),
        (by_weight_and_x, exact.dweight),
    ]:
        derivative = jitted(target, function)(case.x)
        bound = ulp.THIRD_DERIVATIVE_BOUNDS["float32"]
        target.assert_derivative(derivative, truth, "float32", bound, function.__name__)


@pytest.mark.parametrize("masked", [False, True])
def test_derivative_of_the_pullback_is_accurate(target: Target, *, masked: bool) -> None:
    target.require("autograd")
    case = Case.make(target, masked=masked)
    v, dy = target.array(V.astype(np.float32)), target.array(DY.astype(np.float32))

    def slope(x: Array) -> Array:
        vectors = case.bn.running_mean, case.bn.running_var, *case.bn.params
        vjp = mbn.functional.batch_norm_vjp(
            x, *vectors, training=True, eps=EPS, **case.arguments, backend=target.backend
        )
        return (vjp[1](dy)[0] * v).sum()

    exact = case.truth(DY.astype(np.float32), order=1)[1]
    derivative = jitted(target, target.transforms.grad(slope))(case.x)
    target.assert_derivative(derivative, exact.dx, "float32", ulp.THIRD_DERIVATIVE_BOUNDS["float32"])


@pytest.mark.parametrize("settings", [{"momentum": None}, {"correction": 0}, {"affine": False}, {"axis": -1}, {}])
def test_running_statistics_have_no_derivative(target: Target, settings: dict[str, Any]) -> None:
    target.require("autograd")
    case = Case.make(target, **settings)
    dy = target.array(DY.astype(np.float32))
    channels_last = settings.get("axis") == -1

    def loss(x: Array) -> Array:
        y, state = case.bn.apply(case.bn.params, case.bn.state, x.mT if channels_last else x, training=True)
        y = y.mT if channels_last else y
        return (y * dy).sum() + state.running_mean.sum() + state.running_var.sum()

    exact = derivatives.gradients(X.astype(np.float32), DY.astype(np.float32), case.held.get("weight"), eps=EPS)
    target.assert_gradients([target.transforms.grad(loss)(case.x)], exact, "float32")


def test_frozen_layer_is_differentiated_as_in_evaluation(target: Target) -> None:
    target.require("autograd")
    case = Case.make(target)
    case.bn.freeze()
    dy = target.array(DY.astype(np.float32))
    gradient = target.transforms.grad(lambda x: (case.output(x) * dy).sum())(case.x)
    exact = case.truth(DY.astype(np.float32), training=False, order=1)[0]
    target.assert_derivative(gradient, exact.dx, "float32", ulp.GRADIENT_BOUNDS["float32"])


def test_constant_channels_have_finite_derivatives(target: Target) -> None:
    target.require("autograd")
    x, dy, v = (target.array(values.astype(np.float32)) for values in (0 * X + 0.1, DY, V))
    bn = target.layer(3, eps=0.0)
    gradient = target.transforms.grad(lambda x: (bn.apply(bn.params, bn.state, x, training=True)[0] * dy).sum())
    np.testing.assert_array_equal(target.numpy(gradient(x)), 0 * X)
    second = target.transforms.grad(lambda x: (gradient(x) * v).sum())
    assert np.isfinite(target.numpy(second(x))).all()


@pytest.mark.parametrize("left", [0, 1])
def test_derivatives_are_zero_for_at_most_one_unmasked_value(target: Target, left: int) -> None:
    target.require("autograd")
    target.require("masks")
    mask = np.arange(24).reshape(6, 4) < left
    poisoned = strategies.Masking({}, mask.astype(float)).poisoned(X.astype(np.float32))
    x, dy, v, mask = (target.array(values) for values in (poisoned, DY.astype(np.float32), V.astype(np.float32), mask))
    bn = target.layer(3)

    def gradient(x: Array) -> Array:
        return target.transforms.grad(
            lambda x: (bn.apply(bn.params, bn.state, x, training=True, mask=mask)[0] * dy).sum()
        )(x)

    np.testing.assert_array_equal(target.numpy(gradient(x)), 0 * X)
    second = target.transforms.grad(lambda x: (gradient(x) * v).sum())(x)
    np.testing.assert_array_equal(target.numpy(second), 0 * X)


# jit, vmap and compile. Masks, if declared, are traced arguments too.


def step_of(bn: mbn.BatchNorm1d, names: tuple[str, ...]) -> Callable[..., tuple[Array, ...]]:
    """Return a training step as a function of arrays: running statistics, count, x and the named mask arguments."""

    def step(mean: Array, var: Array, count: Array, x: Array, *masks: Array) -> tuple[Array, ...]:
        arguments = dict(zip(names, masks, strict=True))
        y, state = bn.apply(bn.params, State(mean, var, count), x, training=True, **arguments)
        return y, *state

    return step


def assert_steps(
    target: Target, step: Callable[..., tuple[Array, ...]], case: Case, names: tuple[str, ...], momentum: float | None
) -> None:
    """Check a transformed training step on one batch after another."""
    state: tuple[Array, ...] = case.bn.state
    for i, x in enumerate(XS):
        before = case.held | dict(zip(State._fields, map(target.numpy, state), strict=True))
        weights = KINDS[i].weights if names else None
        masks = [target.array(MASKS[name][i]) for name in names]
        result = step(*state, target.array(KINDS[i].poisoned(x) if names else x), *masks)
        weight = 1 / (int(before["num_batches_tracked"]) + 1) if momentum is None else momentum
        settings = {"momentum": weight, "correction": case.bn.correction, "weights": weights}
        assert_training_step(target, result, before, x, settings)
        state = result[1:]
        assert int(target.numpy(state[2])) == int(before["num_batches_tracked"]) + 1


@pytest.mark.parametrize("masked", [False, True])
def test_jit_of_a_training_step_is_accurate(target: Target, *, masked: bool) -> None:
    target.require("jit")
    case = Case.make(target, masked=masked)
    names = tuple(MASKS) if masked else ()
    assert_steps(target, target.transforms.jit(step_of(case.bn, names)), case, names, momentum=0.1)


def test_jit_without_momentum_averages_all_batches(target: Target) -> None:
    target.require("jit")
    case = Case.make(target, momentum=None, correction=0)
    assert_steps(target, target.transforms.jit(step_of(case.bn, ())), case, (), momentum=None)


@pytest.mark.parametrize("masked", [False, True])
def test_jit_of_the_pullback_is_accurate(target: Target, *, masked: bool) -> None:
    target.require("jit")
    case = Case.make(target, masked=masked)
    names = tuple(case.arguments)

    def gradients(x: Array, dy: Array, *masks: Array) -> tuple[Array, ...]:
        vectors = case.bn.running_mean, case.bn.running_var, *case.bn.params
        arguments = dict(zip(names, masks, strict=True))
        vjp = mbn.functional.batch_norm_vjp(x, *vectors, training=True, eps=EPS, **arguments, backend=target.backend)
        return vjp[1](dy)

    dy = DY.astype(np.float32)
    result = target.transforms.jit(gradients)(case.x, target.array(dy), *case.arguments.values())
    exact = derivatives.gradients(X.astype(np.float32), dy, case.held["weight"], eps=EPS, weights=case.weights)
    target.assert_gradients(result, exact, "float32")


@pytest.mark.parametrize("name", ["lengths", "sample_weight"])
@pytest.mark.parametrize("training", [True, False])
def test_invalid_traced_mask_arguments_give_nan(target: Target, name: str, *, training: bool) -> None:
    target.require("jit")
    target.require("masks")
    bn = target.layer(3)

    def step(x: Array, values: Array) -> tuple[Array, ...]:
        y, state = bn.apply(bn.params, bn.state, x, training=training, **{name: values})
        return y, state.running_mean, state.running_var

    valid = KINDS[0].arguments[name]
    for wrong in (-1, 5 if name == "lengths" else np.inf):
        values = np.array(valid)
        values[2] = wrong
        try:
            y, mean, var = map(target.numpy, target.transforms.jit(step)(target.array(XS[0]), target.array(values)))
        except ValueError:
            continue  # an eager ``jit`` sees the values, and may reject them
        assert np.isnan(y[2]).any()
        if training:
            assert np.isnan(mean).all()
            assert np.isnan(var).all()


def test_jit_of_derivatives_with_traced_masks_is_accurate(target: Target) -> None:
    target.require("jit")
    target.require("autograd")
    case = Case.make(target, masked=True)
    v, dy = target.array(V.astype(np.float32)), target.array(DY.astype(np.float32))
    grad, names = target.transforms.grad, tuple(case.arguments)

    def second(x: Array, *masks: Array) -> Array:
        arguments = dict(zip(names, masks, strict=True))

        def loss(x: Array) -> Array:
            return (case.bn.apply(case.bn.params, case.bn.state, x, training=True, **arguments)[0] * dy).sum()

        return grad(lambda x: (grad(loss)(x) * v).sum())(x)

    exact = case.truth(DY.astype(np.float32), order=1)[1]
    result = target.transforms.jit(second)(case.x, *case.arguments.values())
    target.assert_derivative(result, exact.dx, "float32", ulp.THIRD_DERIVATIVE_BOUNDS["float32"])


@pytest.mark.parametrize("masked", [False, True])
def test_vmap_of_a_training_step_is_accurate(target: Target, *, masked: bool) -> None:
    target.require("vmap")
    case = Case.make(target, masked=masked)
    names = tuple(MASKS) if masked else ()
    generator = np.random.default_rng(21)
    means, variances = generator.normal(size=(2, 3)), generator.uniform(0.5, 2, (2, 3))
    state = [means.astype(np.float32), variances.astype(np.float32), np.array([3, 8])]
    xs = np.stack([KINDS[i].poisoned(x) if masked else x for i, x in enumerate(XS)])
    arrays = [target.array(values) for values in (*state, xs, *(MASKS[name] for name in names))]
    results = target.transforms.vmap(step_of(case.bn, names))(*arrays)
    for i, x in enumerate(XS):
        held = case.held | {"running_mean": state[0][i], "running_var": state[1][i]}
        settings = {"momentum": 0.1, "weights": KINDS[i].weights if masked else None}
        assert_training_step(target, tuple(array[i] for array in results), held, x, settings)
    assert target.numpy(results[3]).tolist() == [4, 9]


def test_vmap_without_momentum_averages_all_batches(target: Target) -> None:
    target.require("vmap")
    case = Case.make(target, momentum=None, correction=0, axis=-1)
    step = step_of(case.bn, ())
    counts = np.array([0, 7])
    results = target.transforms.vmap(lambda count, x: step(case.bn.running_mean, case.bn.running_var, count, x.mT))(
        target.array(counts), target.array(XS)
    )
    for i, x in enumerate(XS):
        result = (results[0][i].mT, *(array[i] for array in results[1:]))
        assert_training_step(target, result, case.held, x, {"momentum": 1 / (counts[i] + 1), "correction": 0})


@pytest.mark.parametrize("masked", [False, True])
def test_vmap_of_the_pullback_is_accurate(target: Target, *, masked: bool) -> None:
    target.require("vmap")
    case = Case.make(target, masked=masked)
    names = tuple(MASKS) if masked else ()

    def gradients(x: Array, dy: Array, *masks: Array) -> tuple[Array, ...]:
        vectors = case.bn.running_mean, case.bn.running_var, *case.bn.params
        arguments = dict(zip(names, masks, strict=True))
        vjp = mbn.functional.batch_norm_vjp(x, *vectors, training=True, eps=EPS, **arguments, backend=target.backend)
        return vjp[1](dy)

    dys = np.stack([DY, V]).astype(np.float32)
    arrays = [target.array(values) for values in (XS, dys, *(MASKS[name] for name in names))]
    results = target.transforms.vmap(gradients)(*arrays)
    for i, x in enumerate(XS):
        weights = KINDS[i].weights if masked else None
        exact = derivatives.gradients(x, dys[i], case.held["weight"], eps=EPS, weights=weights)
        target.assert_gradients([array[i] for array in results], exact, "float32")


def test_vmap_of_gradients_is_accurate(target: Target) -> None:
    target.require("vmap")
    target.require("autograd")
    case = Case.make(target, masked=True)
    names, dy = tuple(MASKS), target.array(DY.astype(np.float32))

    def loss(x: Array, *masks: Array) -> Array:
        arguments = dict(zip(names, masks, strict=True))
        return (case.bn.apply(case.bn.params, case.bn.state, x, training=True, **arguments)[0] * dy).sum()

    xs = np.stack([masking.poisoned(x) for masking, x in zip(KINDS, XS, strict=True)])
    arrays = [target.array(values) for values in (xs, *MASKS.values())]
    result = target.transforms.vmap(target.transforms.grad(loss))(*arrays)
    for i, x in enumerate(XS):
        exact = derivatives.gradients(x, DY.astype(np.float32), case.held["weight"], eps=EPS, weights=KINDS[i].weights)
        target.assert_gradients([result[i]], exact, "float32")


@pytest.mark.parametrize("transform", ["jit", "vmap"])
def test_transformed_evaluation_is_accurate(target: Target, transform: str) -> None:
    target.require(transform)
    case = Case.make(target, masked=target.capabilities.masks)
    names = tuple(case.arguments)

    def evaluate(mean: Array, var: Array, x: Array, *masks: Array) -> tuple[Array]:
        arguments = dict(zip(names, masks, strict=True))
        return case.bn.apply(case.bn.params, State(mean, var, None), x, training=False, **arguments)[:1]

    arrays = [*case.bn.state[:2], case.x, *case.arguments.values()]
    if transform == "vmap":
        (y,) = target.transforms.vmap(evaluate)(*(array[None] for array in arrays))
        y = y[0]
    else:
        (y,) = target.transforms.jit(evaluate)(*arrays)
    vectors: dict[str, Any] = {key: value for key, value in case.held.items() if key != "num_batches_tracked"}
    exact = oracle.evaluate(X.astype(np.float32), **vectors, eps=EPS, weights=case.weights)
    target.assert_output(y, exact, "float32")


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_layer_learns(target: Target, *, masked: bool) -> None:
    target.require("compile")
    case = Case.make(target, masked=masked, momentum=None)
    names = tuple(MASKS) if masked else ()

    @target.transforms.compile
    def call(x: Array, *masks: Array) -> Array:
        return case.bn(x, **dict(zip(names, masks, strict=True)))

    def step(mean: Array, var: Array, count: Array, x: Array, *masks: Array) -> tuple[Array, ...]:
        return call(x, *masks), *case.bn.state

    assert_steps(target, step, case, names, momentum=None)
    assert int(case.bn.num_batches_tracked) == 5


def test_compiled_apply_is_accurate(target: Target) -> None:
    target.require("compile")
    case = Case.make(target, correction=0)
    assert_steps(target, target.transforms.compile(step_of(case.bn, ())), case, (), momentum=0.1)


def test_compiled_gradient_is_accurate(target: Target) -> None:
    target.require("compile")
    target.require("autograd")
    case = Case.make(target, masked=True)
    dy = target.array(DY.astype(np.float32))
    gradient = target.transforms.compile(target.transforms.grad(lambda x: (case.output(x) * dy).sum()))
    exact = case.truth(DY.astype(np.float32), order=1)[0]
    target.assert_derivative(gradient(case.x), exact.dx, "float32", ulp.GRADIENT_BOUNDS["float32"])


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_steps_of_large_batches_are_accurate(target: Target, *, masked: bool) -> None:
    """For large batches a compiler may call kernels of which it traces nothing."""
    target.require("compile")
    case = Case.make(target, masked=masked)
    shape = 4096, 3, 6
    kind = strategies.maskings((4096, 6), seed=7)["all three"]
    weights, names = (kind.weights, tuple(kind.arguments)) if masked else (None, ())

    @target.transforms.compile
    def step(mean: Array, var: Array, x: Array, dy: Array, *masks: Array) -> tuple[Array, ...]:
        arguments = dict(zip(names, masks, strict=True))
        vectors = mean, var, *case.bn.params
        (y, *state), pullback = mbn.functional.batch_norm_vjp(
            x, *vectors, training=True, eps=EPS, **arguments, backend=target.backend
        )
        return y, *state, *pullback(dy)

    state: tuple[Array, ...] = case.bn.state[:2]
    masks = [target.array(kind.arguments[name]) for name in names]
    for seed in range(2):
        before = case.held | {"running_mean": target.numpy(state[0]), "running_var": target.numpy(state[1])}
        x, dy = np.random.default_rng(seed).normal(1, 2, (2, *shape)).astype(np.float32)
        result = step(*state, target.array(kind.poisoned(x) if masked else x), target.array(dy), *masks)
        assert_training_step(target, result, before, x, {"momentum": 0.1, "correction": 1, "weights": weights})
        exact = derivatives.gradients(x, dy, before["weight"], eps=EPS, weights=weights)
        target.assert_gradients(result[3:], exact, "float32")
        state = result[1:3]
