"""Torch's derivatives: of every order, in every mode, with masks, and what autograd saves."""

from functools import partial
from itertools import product

import pytest
from torch_samples import (
    KINDS,
    by_definition,
    draw_arguments,
    draw_weights,
    leaves_of,
    output_of,
    relative_error,
    sample,
)

import mbn

torch = pytest.importorskip("torch")
forward_ad = torch.autograd.forward_ad

# The first use of forward mode loads parts of Torch that Torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_derivatives_agree_with_finite_differences(shape, training, kind):
    arguments = leaves_of(draw_arguments(shape, training=training))
    function = partial(output_of, weights=draw_weights(kind, shape, torch.float64))
    statistics = [array.detach() for array in arguments[3:]]
    if statistics:  # without gradients, as in a layer; below, with gradients
        assert torch.autograd.gradcheck(lambda *given: function(*given, *statistics), arguments[:3])
    for check in (
        partial(torch.autograd.gradcheck, check_forward_ad=True, check_batched_forward_grad=True),
        partial(torch.autograd.gradgradcheck, check_fwd_over_rev=True),
    ):
        assert check(function, arguments, check_batched_grad=True)


@pytest.mark.parametrize("kind", KINDS)
def test_third_derivatives_agree_with_finite_differences(kind):
    def gradients(*arguments):
        y = output_of(*arguments, weights=draw_weights(kind, (5, 3), torch.float64))
        return torch.autograd.grad((y**3).sum(), arguments, create_graph=True)

    assert torch.autograd.gradgradcheck(gradients, leaves_of(draw_arguments((5, 3))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 1e4])
@pytest.mark.parametrize("slope", [0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["backward", "create_graph", "torch.func"])
def test_gradients_are_accurate(dtype, offset, slope, kind, way):
    shape = 60, 3, 7
    x, *vectors = draw_arguments(shape, dtype)
    x, dy = x + offset, sample(*shape, dtype=dtype, seed=5) + slope
    function, plain = (partial(f, weights=draw_weights(kind, shape, dtype)) for f in (output_of, by_definition))
    if way == "torch.func":
        actual = torch.func.vjp(function, x, *vectors)[1](dy)
    else:
        leaves = leaves_of([x, *vectors])
        actual = torch.autograd.grad(function(*leaves), leaves, dy, create_graph=way == "create_graph")
    leaves = leaves_of([x, *vectors], torch.float64)
    with torch.no_grad():
        leaves[0] -= x[0, 0, 0]  # the results are the same, but more precise
    expected = torch.autograd.grad(plain(*leaves), leaves, dy.double())
    bound = 3e-7 if dtype == torch.float32 else 1e-12 if slope == 0 else 1e-9
    assert max(map(relative_error, actual, expected)) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("modes", list(product("rf", repeat=3)), ids="".join)
@pytest.mark.parametrize("kind", [None, "real"])
def test_third_derivatives_are_accurate_in_every_order_of_modes(dtype, modes, kind):
    x, weight, bias = draw_arguments((5, 3, 2), dtype)
    direction = sample(*x.shape, dtype=dtype, seed=6)
    weights = draw_weights(kind, x.shape, dtype)

    def derivative(function, x, mode):
        if mode == "f":
            return torch.func.jvp(function, (x,), (direction.to(x.dtype),))[1]
        return (torch.func.grad(function)(x) * direction).sum()

    def third(batch_norm, x):
        def function(x):
            return (batch_norm(x, weight.to(x.dtype), bias.to(x.dtype), weights=weights) ** 3).sum()

        for mode in modes:
            function = partial(derivative, function, mode=mode)
        return function(x)

    assert relative_error(third(output_of, x), third(by_definition, x.double())) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_repeated_backward_passes_are_accurate(dtype, kind, training):
    arguments = draw_arguments((6, 3, 4), dtype, training=training)
    weights = draw_weights(kind, (6, 3, 4), dtype)

    def derivatives(batch_norm, dtype):
        leaves = leaves_of(arguments[:3], dtype)
        statistics = [array.to(dtype) for array in arguments[3:]]
        value = (batch_norm(*leaves, *statistics, weights=weights) ** 3).sum()
        for _ in range(3):
            gradients = torch.autograd.grad(value, leaves, create_graph=True)
            yield from gradients
            value = sum((gradient**2).sum() for gradient in gradients) / 100

    for actual, expected in zip(derivatives(output_of, dtype), derivatives(by_definition, torch.float64), strict=True):
        assert relative_error(actual, expected) < 1e-6


def test_forward_over_backward_mode_is_accurate():
    x, weight, bias = draw_arguments((5, 3))
    tangent = sample(5, 3, dtype=torch.float64, seed=6)

    def value(batch_norm, x):
        return (batch_norm(x, weight, bias) ** 3).sum()

    expected = torch.func.jvp(torch.func.grad(partial(value, by_definition)), (x,), (tangent,))[1]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.requires_grad_(), tangent)
        (gradient,) = torch.autograd.grad(value(output_of, dual), dual)
        assert relative_error(forward_ad.unpack_dual(gradient).tangent, expected) < 1e-12
        bn = mbn.BatchNorm1d(3, dtype="float64", backend="torch")
        bn(dual)
        assert forward_ad.unpack_dual(bn.running_var).tangent is None


@pytest.mark.parametrize("kind", [None, "mask"])
def test_derivatives_of_a_constant_channel_without_eps_are_zero(kind):
    x, weight, bias = draw_arguments((6, 3))
    x = torch.ones_like(x)
    tangent = sample(6, 3, dtype=torch.float64)
    normalized = partial(output_of, weight=weight, bias=bias, weights=draw_weights(kind, (6, 3), x.dtype), eps=0)
    leaf = x.clone().requires_grad_()
    value, derivatives = (normalized(leaf) ** 3).sum(), []
    for _ in range(3):
        (derivative,) = torch.autograd.grad(value, leaf, create_graph=True)
        derivatives.append(derivative)
        value = (derivative * tangent).sum()
    once = partial(torch.func.jvp, normalized, tangents=(tangent,))
    derivatives += [once((x,))[1], torch.func.jvp(lambda x: once((x,))[1], (x,), (tangent,))[1]]
    for derivative in derivatives:
        assert torch.equal(derivative, torch.zeros_like(x))


@pytest.mark.parametrize("training", [True, False])
def test_masked_values_affect_no_output_and_no_derivative(training):
    x, weight, bias, *statistics = draw_arguments((6, 3), training=training)
    mask = torch.tensor([True, True, False, True, True, False])
    dy, tangent = (sample(6, 3, dtype=x.dtype, seed=seed) for seed in (5, 6))
    poison = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=x.dtype)
    results = []
    for filler in (torch.zeros_like(poison), poison):
        given_x, given_dy, given_tangent = (torch.where(mask[:, None], array, filler) for array in (x, dy, tangent))

        def normalized(x, *vectors):
            return output_of(x, *vectors, *statistics, weights=mask.to(x.dtype))

        def value(x):
            return (normalized(x, weight, bias) ** 3).sum()

        leaves = leaves_of([given_x, weight, bias])
        y = normalized(*leaves)
        first = torch.autograd.grad(y, leaves, given_dy, create_graph=True)
        second = torch.autograd.grad((first[0] ** 3).sum() + (first[1] ** 2).sum(), leaves[:2], create_graph=True)
        third = torch.autograd.grad((second[0] ** 3).sum(), leaves[:1])
        forwards = torch.func.jvp(torch.func.grad(value), (given_x,), (given_tangent,))[1]
        assert not y[~mask].any()
        assert not first[0][~mask].any()
        results.append((y, *first, *second, *third, forwards, torch.func.hessian(value)(given_x)))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


def test_fully_masked_batch_gives_zeros_and_keeps_the_statistics():
    x = torch.full((6, 3), torch.nan, requires_grad=True)
    bn = mbn.BatchNorm1d(3, eps=0, backend="torch")
    y = bn(x, mask=torch.zeros(6, dtype=torch.bool))
    y.sum().backward()
    for array in (y, x.grad, bn.weight.grad, bn.bias.grad):
        assert not array.any()
    assert bn.running_mean.tolist() == [0, 0, 0]
    assert bn.running_var.tolist() == [1, 1, 1]
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize("kind", KINDS)
def test_output_is_the_same_with_and_without_autograd(kind):
    x = sample(3000, 70)
    bn, weights = mbn.BatchNorm1d(70, backend="torch"), draw_weights(kind, x.shape, x.dtype)
    outputs = [bn(x, sample_weight=weights), bn(x.clone().requires_grad_(), sample_weight=weights)]
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            outputs.append(bn(x, sample_weight=weights))
    outputs.append(bn.vjp(x, sample_weight=weights)[0])
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert [output.requires_grad for output in outputs[:4]] == [True, True, False, False]


def test_autograd_saves_only_x_and_vectors():
    saved = []
    x = sample(100, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = mbn.BatchNorm1d(8, backend="torch")(x)
    assert [tensor.data_ptr() for tensor in saved if tensor.numel() > 8] == [x.data_ptr()]
    assert y.grad_fn.next_functions[0][0].variable is x


def test_output_requires_no_gradient_if_no_input_does():
    bn = mbn.BatchNorm1d(3, backend="torch")
    for parameter in bn.parameters():
        parameter.requires_grad_(requires_grad=False)
    assert not bn(sample(5, 3)).requires_grad


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", [{"affine": False}, {"bias": False}, {"track_running_stats": False}, {}])
def test_backward_agrees_with_torch_nn_for_every_kind_of_layer(settings, training):
    x, dy = sample(6, 3), sample(6, 3, seed=1)
    ours = mbn.BatchNorm1d(3, **settings, backend="torch").train(training)
    theirs = torch.nn.BatchNorm1d(3, **{name: value for name, value in settings.items() if name != "bias"})
    gradients = []
    for bn in (ours, theirs.train(training)):
        leaf = x.clone().requires_grad_()
        bn(leaf).backward(dy)
        gradients.append([leaf.grad, *(parameter.grad for parameter in bn.parameters())])
    for actual, expected in zip(*gradients, strict="bias" not in settings):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    functional = mbn.functional.batch_norm(
        leaf, *ours.state[:2], *ours.params, training=ours.running_mean is None or training
    )
    torch.testing.assert_close(torch.autograd.grad(functional.output, leaf, dy)[0], gradients[0][0])


@pytest.mark.parametrize("training", [True, False])
def test_backward_computes_gradients_of_parameters_alone(training):
    bn = mbn.BatchNorm1d(3, backend="torch").train(training)
    bn.bias.requires_grad_(requires_grad=False)
    x, dy = sample(5, 3), sample(5, 3, seed=1)
    bn(x).backward(dy)
    assert bn.bias.grad is None
    expected = (bn.eval()(x) if not training else by_definition(x, *bn.params)) * dy
    torch.testing.assert_close(bn.weight.grad, expected.sum(0).float().detach())


@pytest.mark.parametrize("name", ["x", "weight"])
def test_backward_detects_a_changed_input_or_weight(name):
    bn, x = mbn.BatchNorm1d(3, backend="torch"), sample(5, 3)
    y = bn(x)
    with torch.no_grad():
        {"x": x, "weight": bn.weight}[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_ignores_changed_running_statistics():
    gradients = []
    for change in (0, 1):
        bn, x = mbn.BatchNorm1d(3, backend="torch").eval(), sample(5, 3).requires_grad_()
        y = bn(x)
        bn.running_var.add_(change)
        gradients.append(torch.autograd.grad(y, (x, bn.weight), sample(5, 3, seed=1)))
    for expected, actual in zip(*gradients, strict=True):
        assert torch.equal(expected, actual)
