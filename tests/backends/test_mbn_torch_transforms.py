"""Torch's transformations: vmap, torch.func and torch.compile."""

import subprocess
import sys
from fractions import Fraction
from functools import partial

import pytest
from torch_samples import (
    KINDS,
    by_definition,
    compile_fully,
    count_graphs,
    draw_arguments,
    draw_weights,
    output_of,
    relative_error,
    sample,
)

import mbn

torch = pytest.importorskip("torch")
backend = mbn.get_backend("torch")

# The first use of forward mode loads parts of Torch that Torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_params_state_and_x_equals_a_loop(momentum, training, kind):
    bn = mbn.BatchNorm1d(3, momentum=momentum, dtype="float64", backend="torch")
    x = sample(4, 6, 3, 2, dtype=torch.float64)
    params = mbn.Params(sample(4, 3, dtype=x.dtype), sample(4, 3, dtype=x.dtype, seed=1))
    state = mbn.State(sample(4, 3, dtype=x.dtype), sample(4, 3, dtype=x.dtype, seed=2).abs(), torch.arange(4))
    weights = [] if kind is None else [torch.stack([draw_weights(kind, (6, 3, 2), x.dtype).roll(i) for i in range(4)])]

    def apply(params, state, x, sample_weight=None):
        def value(x):
            y, after = bn.apply(params, state, x, training=training, sample_weight=sample_weight)
            return (y**3).sum(), (y, *after)

        return torch.func.grad(value, has_aux=True)(x)

    batched = torch.vmap(apply)(params, state, x, *weights)
    for i in range(4):
        single = apply(*torch.utils._pytree.tree_map(lambda array, i=i: array[i], (params, state, x, *weights)))
        torch.testing.assert_close(torch.utils._pytree.tree_map(lambda array, i=i: array[i], batched), single)


def test_jacobians_agree_with_the_definition():
    x, weight, bias = draw_arguments((4, 3))
    function = partial(output_of, weight=weight, bias=bias)
    expected = torch.func.jacrev(partial(by_definition, weight=weight, bias=bias))(x)
    jacobian = partial(torch.autograd.functional.jacobian, function)
    for actual in (
        torch.func.jacrev(function)(x),
        torch.func.jacfwd(function)(x),
        jacobian(x),
        jacobian(x, vectorize=True),
        jacobian(x, vectorize=True, strategy="forward-mode"),
    ):
        torch.testing.assert_close(actual, expected)


def test_per_sample_gradients_agree_with_the_definition():
    x, weight, bias, *statistics = draw_arguments((8, 3), training=False)

    def loss(batch_norm, weight, x):
        return (batch_norm(x[None], weight, bias, *statistics) ** 3).sum()

    expected, actual = (
        torch.vmap(torch.func.grad(partial(loss, batch_norm)), (None, 0))(weight, x)
        for batch_norm in (by_definition, output_of)
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap, torch.func.jacfwd])
def test_transformed_layer_is_refused_in_training(transform):
    bn = mbn.BatchNorm1d(3, backend="torch")
    before = bn.state
    with pytest.raises(RuntimeError, match=r"bn\.apply"):
        transform(lambda x: bn(x).sum())(sample(3, 3, 3))
    assert bn.state is before
    transform(lambda x: bn.eval()(x).sum())(sample(3, 3, 3))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", ["plain", "mask", "lengths", "sample_weight"])
def test_compiled_layer_agrees_with_the_eager_one(momentum, kind):
    layers = [mbn.BatchNorm1d(3, momentum=momentum, backend="torch") for _ in range(2)]
    layers = [layers[0], compile_fully(layers[1])]
    for step, size in enumerate((8, 8, 8)):
        x, dy = (100 + sample(size, 3, 4, seed=2 * step + seed) for seed in range(2))
        masking = {
            "plain": {},
            "mask": {"mask": x[:, 0] > 102},
            "lengths": {"lengths": torch.arange(size) % 5},
            "sample_weight": {"sample_weight": x[:, 0] - 90},
        }[kind]
        results = []
        for bn in layers:
            leaf = x.clone().requires_grad_()
            y = bn(leaf, **masking)
            results.append((y.detach(), *torch.autograd.grad(y, leaf, dy)))
        for expected, actual in zip(*results, strict=True):
            assert relative_error(actual, expected.double()) < 1e-6
        assert count_graphs() == 1


def test_reset_running_stats_works_in_compiled_code():
    bn = mbn.BatchNorm1d(3, backend="torch")

    @torch.compile(fullgraph=True, backend="eager")
    def step(x):
        y = bn(x)
        bn.reset_running_stats()
        return y

    x = torch.randn(5, 3)
    for _ in range(2):
        torch.testing.assert_close(step(x), mbn.BatchNorm1d(3, backend="torch")(x))
        torch.testing.assert_close(bn.running_mean, torch.zeros(3))
        torch.testing.assert_close(bn.running_var, torch.ones(3))
        assert bn.num_batches_tracked == 0
    bn(x)
    assert bn.num_batches_tracked == 1


def test_compiled_training_agrees_with_the_eager_one():
    states = []
    for compiled in (False, True):
        bn = mbn.BatchNorm1d(3, momentum=None, backend="torch")
        step = (
            compile_fully(lambda x, bn=bn: ((bn(x) - 1) ** 3).mean())
            if compiled
            else lambda x, bn=bn: ((bn(x) - 1) ** 3).mean()
        )
        optimizer = torch.optim.Adam(bn.parameters(), lr=0.1)
        for seed, size in enumerate((8, 8, 9, 10, 11, 12)):
            optimizer.zero_grad()
            step(sample(size, 3, seed=seed)).backward()
            optimizer.step()
        states.append(bn.state_dict())
    assert count_graphs() <= 2  # one more for sizes that vary
    assert states[1]["num_batches_tracked"] == 6
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_apply_agrees_with_the_eager_one(training):
    bn = mbn.BatchNorm1d(3, momentum=None, backend="torch")
    apply = compile_fully(lambda params, state, x: bn.apply(params, state, x, training=training))
    state = other = bn.state
    for seed in range(3):
        x = sample(8, 3, seed=seed)
        y, state = apply(bn.params, state, x)
        expected, other = bn.apply(bn.params, other, x, training=training)
        torch.testing.assert_close((y, *state), (expected, *other))
    assert count_graphs() == 1
    assert bn.num_batches_tracked == 0


def test_inductor_agrees_with_eager_code():
    bn = mbn.BatchNorm1d(3, backend="torch")
    function = partial(output_of, weight=bn.weight, bias=bn.bias)
    leaves = [sample(64, 3).requires_grad_() for _ in range(2)]
    outputs = [
        call(leaf) for call, leaf in zip((function, torch.compile(function, fullgraph=True)), leaves, strict=True)
    ]
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad((y**3).sum(), leaf)[0] for y, leaf in zip(outputs, leaves, strict=True)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [{"sample_weight": -torch.ones(4)}, {"lengths": torch.tensor([1, 2, 3, 9])}])
@pytest.mark.parametrize("training", [True, False])
def test_invalid_traced_weights_give_nan(weights, training):
    bn = mbn.BatchNorm1d(3, backend="torch").train(training)
    (name,), (values,) = weights.keys(), weights.values()
    call = compile_fully(lambda x, values: bn(x, **{name: values}))
    assert call(sample(4, 3, 5), values).isnan()[-1].all()
    assert bn.running_mean.isnan().all() == training


OPEN = {
    "no backend": lambda: mbn.BatchNorm1d(3),
    "no channels": lambda: mbn.BatchNorm1d(None, backend="torch"),
    "neither": lambda: mbn.BatchNorm1d(None),
}


@pytest.mark.parametrize("make", OPEN.values(), ids=OPEN)
def test_unbound_layer_needs_a_graph_break(make):
    bn, twin = make(), mbn.BatchNorm1d(3, backend="torch")
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"make it with both, mbn.BatchNorm1d\(C, backend='torch'\)"
    ):
        compile_fully(lambda x: bn(x) * 2)(sample(8, 3))
    assert bn.backend is None or bn.num_features is None
    torch._dynamo.reset()
    call = torch.compile(lambda x: bn(x) * 2, backend="aot_eager")
    for seed in range(3):
        torch.testing.assert_close(call(sample(8, 3, seed=seed)), twin(sample(8, 3, seed=seed)) * 2)
    torch.testing.assert_close(dict(bn.state_dict()), dict(twin.state_dict()))
    assert count_graphs() == 1


def _vjp(function, x, direction):
    y, pullback = torch.func.vjp(function, x)
    return y, pullback(direction)[0]


def _compiled(function, x, direction):
    leaf = x.requires_grad_()
    y = compile_fully(function)(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, direction)[0]


def _twice(function, x, direction):
    leaf = x.requires_grad_()
    y = function(leaf)
    (gradient,) = torch.autograd.grad(y, leaf, direction, create_graph=True)
    return y.detach(), torch.autograd.grad(gradient, leaf, direction)[0]


def _vectorised(function, x, direction):
    return (values[0] for values in torch.vmap(partial(_vjp, function))(x[None], direction[None]))


TRANSFORMS = {
    "torch.func.vjp": (_vjp, 1),
    "torch.func.jvp": (lambda function, x, direction: torch.func.jvp(function, (x,), (direction,)), 1),
    "torch.compile": (_compiled, 1),
    "torch.vmap": (_vectorised, 1),
    "twice": (_twice, 2),
}
"""Functions that return an output and a derivative, and the order of the derivative."""


@pytest.mark.parametrize("kind", [None, "mask"])
@pytest.mark.parametrize("power", [-900, -520, 520, 900])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_take_values_of_any_size(transform, power, kind):
    call, order = TRANSFORMS[transform]
    ones = torch.randint(-8, 9, (40, 3), generator=torch.Generator().manual_seed(5)).double()
    ones[:, 2] = ones[0, 2]
    weights = draw_weights(kind, ones.shape, ones.dtype)

    def results(power):
        weight = torch.tensor([1.0, -2.0, 1.0], dtype=ones.dtype) * 2.0**power
        function = partial(output_of, weight=weight, bias=0 * weight, weights=weights, eps=0)
        y, derivative = call(function, ones * 2.0**power, sample(40, 3, dtype=ones.dtype))
        return y * 2.0**-power, derivative * 2.0 ** (power * (order - 1))

    for actual, expected in zip(results(power), results(0), strict=True):
        assert expected.any()
        assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("kind", [None, "mask"])
def test_statistics_under_vmap_are_accurate_where_one_value_dwarfs_the_others(kind):
    x = torch.ones((145, 4, 18), dtype=torch.float64)
    x[0, :, 0] = 3.22e6
    weights = None if kind is None else torch.ones((145, 18), dtype=torch.float64)
    bn = mbn.BatchNorm1d(4, dtype="float64", momentum=1.0, backend="torch")
    apply = torch.vmap(lambda x: bn.apply(bn.params, bn.state, x, training=True, sample_weight=weights)[1][:2])
    n = 145 * 18
    mean, var = 1 + (Fraction(3.22e6) - 1) / n, (Fraction(3.22e6) - 1) ** 2 / n
    for actual, expected in zip(apply(x[None]), (mean, var), strict=True):
        assert relative_error(actual[0], torch.full((4,), float(expected), dtype=torch.float64)) < 2e-15


_FIRST = """
import torch, mbn
{before}
x = torch.arange(12.0).reshape(4, 3)
def function(x):
    return mbn.functional.batch_norm(x, training=True{argument}).output
y = torch.compile(function, backend="eager", fullgraph={fullgraph})(x)
torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True))
"""


@pytest.mark.parametrize(
    ("before", "argument", "fullgraph"),
    [
        ("", "", True),
        ("", "", False),
        ("", ", backend='torch'", False),
        ("mbn.get_backend('torch')", "", True),
        ("mbn.get_backend('torch')", ", backend='torch'", True),
        ("mbn.set_default_backend('torch')", "", True),
    ],
)
def test_first_call_of_a_function_may_be_compiled(before, argument, fullgraph):
    program = _FIRST.format(before=before, argument=argument, fullgraph=fullgraph)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_compiled_function_refuses_to_load_a_backend():
    program = _FIRST.format(before="", argument=", backend='torch'", fullgraph=True)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "call mbn.get_backend('torch') once before" in run.stderr


def _functions(x):
    y, mean, var = mbn.functional.batch_norm(x, torch.zeros(3), torch.ones(3), training=True)
    (z, *_), pullback = mbn.functional.batch_norm_vjp(x, mean, var, torch.ones(3))
    return y, mean, var, z, *pullback(x)[:2]


def test_compiled_functions_agree_with_eager_ones():
    x = sample(6, 3)
    torch.testing.assert_close(torch.compile(_functions, backend="eager", fullgraph=True)(x), _functions(x))


def test_compiled_function_refuses_a_use_backend_context():
    x = sample(6, 3)
    compiled = torch.compile(_functions, backend="eager", fullgraph=True)
    with mbn.use_backend("torch"), pytest.raises(Exception, match="does not see the choice of mbn.use_backend"):
        compiled(x)
    with mbn.use_backend("numpy"), pytest.raises(TypeError, match="the backend is numpy"):
        torch.compile(_functions, backend="eager")(x)
    torch.testing.assert_close(compiled(x), _functions(x))


def test_compiled_reset_parameters_keeps_the_parameter_objects():
    bn = mbn.BatchNorm1d(3, backend="torch")
    weight, bias = bn.weight, bn.bias
    bn(sample(6, 3))
    bn.weight = bn.bias = 3.0
    torch.compile(bn.reset_parameters, backend="eager", fullgraph=True)()
    assert (bn.weight is weight, bn.bias is bias) == (True, True)
    initial = mbn.BatchNorm1d(3, backend="torch").state_dict()
    torch.testing.assert_close(dict(bn.state_dict()), dict(initial), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("setting weight", lambda bn: setattr(bn, "weight", 2.0)),
        ("setting running_var", lambda bn: setattr(bn, "running_var", torch.full((3,), 2.0))),
        ("setting num_batches_tracked", lambda bn: setattr(bn, "num_batches_tracked", 2)),
        ("loading a layer", lambda bn: bn.load_state_dict({**bn.state_dict(), "bias": torch.full((3,), 2.0)})),
        ("moving a layer", lambda bn: bn.to(dtype="float64")),
        ("making or moving a layer", lambda bn: setattr(bn, "weight", mbn.BatchNorm1d(3, backend="torch").weight)),
        ("folding a layer", lambda bn: bn.fold()),
        ("folding a layer", lambda bn: mbn.fold_linear(torch.ones(3, 2), None, bn)),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # a warning of Torch itself, where it compiles half of a function
def test_changes_that_cannot_be_compiled_are_refused(words, change):
    bn, other = (mbn.BatchNorm1d(3, backend="torch") for _ in range(2))
    with pytest.raises(Exception, match=f"torch.compile cannot follow {words}: do it before"):
        torch.compile(change, backend="eager", fullgraph=True)(bn)
    torch.testing.assert_close(dict(bn.state_dict()), dict(other.state_dict()), rtol=0, atol=0)
    torch.compile(change, backend="eager")(bn)
    change(other)
    torch.testing.assert_close(dict(bn.state_dict()), dict(other.state_dict()), rtol=0, atol=0)
