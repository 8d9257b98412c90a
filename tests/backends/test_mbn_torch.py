"""What is Torch's own: autograd, transforms, compilation, memory formats, its border with NumPy, torch.nn next door."""

import copy
import io
import os
import pickle
import subprocess
import sys
from functools import partial
from itertools import product

import numpy as np
import pytest

import mbn

torch = pytest.importorskip("torch")
forward_ad = torch.autograd.forward_ad
backend = mbn.get_backend("torch")

# The first use of forward mode loads parts of Torch that it has itself deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

_BITS = """
import hashlib, torch, mbn
torch.set_num_threads({threads})
digest = hashlib.sha256()
for shape in [(20_001, 37), (700, 12, 33)]:
    for dtype in ("float32", "float64"):
        x, dy = torch.rand((2, *shape), generator=torch.Generator().manual_seed(1), dtype=getattr(torch, dtype)) + 1000
        x = x.clone().requires_grad_()
        for mask in (None, x.detach()[:, 0] > 1000.3):
            bn = mbn.BatchNorm1d(shape[1], dtype=dtype, backend="torch")
            y = bn(x, mask=mask)
            gradients = torch.autograd.grad(y, (x, *bn.parameters()), dy)
            for result in (y, bn.running_mean, bn.running_var, *gradients):
                digest.update(mbn.to_numpy(result).tobytes())
print(digest.hexdigest())
"""
_KINDS = [None, "mask", "real"]


def _sample(*shape, dtype=torch.float32, seed=0):
    return 3 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _weights(kind, shape, dtype):
    """Return weights for an x of a shape: none, a mask or real numbers."""
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(9)
    places = shape[0], *shape[2:]
    mask = torch.rand(places, generator=generator) > 0.3
    return mask.to(dtype) * (torch.rand(places, generator=generator).to(dtype) if kind == "real" else 1)


def _batch_norm(x, weight, bias, *statistics, weights=None, eps=1e-5):
    """Normalise by the backend, without statistics given by those of x."""
    y, _ = backend.batch_norm(
        x,
        mbn.Params(weight, bias),
        mbn.State(*(statistics or (None, None)), None),
        training=not statistics,
        momentum=0.1,
        eps=eps,
        correction=1,
        weights=weights,
    )
    return y


def _plain(x, weight, bias, *statistics, weights=None, eps=1e-5):
    """Normalise by the definition, in float64."""
    values = x.to(torch.float64)
    if values.ndim == 2:
        values = values[:, :, None]
    w = torch.ones_like(values[:, :1]) if weights is None else weights.to(torch.float64).reshape(len(x), 1, -1)
    zero = torch.zeros((), dtype=torch.float64)
    values = torch.where(w > 0, values, zero)
    mean, var = (vector[:, None] for vector in statistics) if statistics else (None, None)
    if mean is None:
        mean = (w * values).sum((0, 2), keepdim=True) / w.sum()
        var = (w * (values - mean) ** 2).sum((0, 2), keepdim=True) / w.sum()
    y = (values - mean) / (var + eps).sqrt() * weight[:, None] + bias[:, None]
    return torch.where(w > 0, y, zero).reshape(x.shape)


def _arguments(shape, dtype=torch.float64, *, training=True):
    """Return x, weight and bias, and in evaluation running statistics."""
    vectors = [_sample(3, dtype=dtype, seed=seed) for seed in (1, 2)]
    statistics = [] if training else [_sample(3, dtype=dtype, seed=3), _sample(3, dtype=dtype, seed=4).abs()]
    return [_sample(*shape, dtype=dtype), *vectors, *statistics]


def _leaves(arrays, dtype=None):
    return [array.detach().clone().to(dtype or array.dtype).requires_grad_() for array in arrays]


def _error(actual, expected):
    """Return the largest error relative to the largest value."""
    actual, expected = actual.detach().double(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def _compiled(function):
    for array in (torch.ones(1), torch.nn.Parameter(torch.ones(1))):
        mbn.to_numpy(array)  # whose array it is is looked up eagerly
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def _graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", _KINDS)
def test_derivatives_are_those_of_finite_differences(shape, training, kind):
    arguments = _leaves(_arguments(shape, training=training))
    function = partial(_batch_norm, weights=_weights(kind, shape, torch.float64))
    statistics = [array.detach() for array in arguments[3:]]
    if statistics:  # as a layer has them, and as functions of something
        assert torch.autograd.gradcheck(lambda *given: function(*given, *statistics), arguments[:3])
    for check in (
        partial(torch.autograd.gradcheck, check_forward_ad=True, check_batched_forward_grad=True),
        partial(torch.autograd.gradgradcheck, check_fwd_over_rev=True),
    ):
        assert check(function, arguments, check_batched_grad=True)


@pytest.mark.parametrize("kind", _KINDS)
def test_third_derivatives_are_those_of_finite_differences(kind):
    def gradients(*arguments):
        y = _batch_norm(*arguments, weights=_weights(kind, (5, 3), torch.float64))
        return torch.autograd.grad((y**3).sum(), arguments, create_graph=True)

    assert torch.autograd.gradgradcheck(gradients, _leaves(_arguments((5, 3))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 1e4])
@pytest.mark.parametrize("slope", [0, 1e4])
@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("way", ["backward", "create_graph", "torch.func"])
def test_gradients_are_exact(dtype, offset, slope, kind, way):
    shape = 60, 3, 7
    x, *vectors = _arguments(shape, dtype)
    x, dy = x + offset, _sample(*shape, dtype=dtype, seed=5) + slope
    function, plain = (partial(f, weights=_weights(kind, shape, dtype)) for f in (_batch_norm, _plain))
    if way == "torch.func":
        actual = torch.func.vjp(function, x, *vectors)[1](dy)
    else:
        leaves = _leaves([x, *vectors])
        actual = torch.autograd.grad(function(*leaves), leaves, dy, create_graph=way == "create_graph")
    leaves = _leaves([x, *vectors], torch.float64)
    with torch.no_grad():
        leaves[0] -= x[0, 0, 0]  # changes nothing but the precision of what follows
    expected = torch.autograd.grad(plain(*leaves), leaves, dy.double())
    bound = 3e-7 if dtype == torch.float32 else 1e-12 if slope == 0 else 1e-9
    assert max(map(_error, actual, expected)) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("modes", list(product("rf", repeat=3)), ids="".join)
@pytest.mark.parametrize("kind", [None, "real"])
def test_third_derivatives_in_every_order_of_modes(dtype, modes, kind):
    x, weight, bias = _arguments((5, 3, 2), dtype)
    direction = _sample(*x.shape, dtype=dtype, seed=6)
    weights = _weights(kind, x.shape, dtype)

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

    assert _error(third(_batch_norm, x), third(_plain, x.double())) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_derivatives_of_a_backward_pass(dtype, kind, training):
    arguments = _arguments((6, 3, 4), dtype, training=training)
    weights = _weights(kind, (6, 3, 4), dtype)

    def derivatives(batch_norm, dtype):
        leaves = _leaves(arguments[:3], dtype)
        statistics = [array.to(dtype) for array in arguments[3:]]
        value = (batch_norm(*leaves, *statistics, weights=weights) ** 3).sum()
        for _ in range(3):
            gradients = torch.autograd.grad(value, leaves, create_graph=True)
            yield from gradients
            value = sum((gradient**2).sum() for gradient in gradients) / 100

    for actual, expected in zip(derivatives(_batch_norm, dtype), derivatives(_plain, torch.float64), strict=True):
        assert _error(actual, expected) < 1e-6


def test_forward_mode_over_backward_mode():
    x, weight, bias = _arguments((5, 3))
    tangent = _sample(5, 3, dtype=torch.float64, seed=6)

    def value(batch_norm, x):
        return (batch_norm(x, weight, bias) ** 3).sum()

    expected = torch.func.jvp(torch.func.grad(partial(value, _plain)), (x,), (tangent,))[1]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.requires_grad_(), tangent)
        (gradient,) = torch.autograd.grad(value(_batch_norm, dual), dual)
        assert _error(forward_ad.unpack_dual(gradient).tangent, expected) < 1e-12
        bn = mbn.BatchNorm1d(3, dtype="float64", backend="torch")
        bn(dual)
        assert forward_ad.unpack_dual(bn.running_var).tangent is None


def test_gradients_of_many_blocks_are_those_of_torch_nn(monkeypatch):
    monkeypatch.setattr("mbn_torch.kernels.CPU_BLOCK", 12)
    monkeypatch.setattr("mbn_torch.kernels.RUN", 3)
    x, dy = _sample(50, 3, 2), _sample(50, 3, 2, seed=1)
    gradients = []
    for bn in (torch.nn.BatchNorm1d(3), mbn.BatchNorm1d(3, backend="torch")):
        leaf = x.clone().requires_grad_()
        bn(leaf).backward(dy)
        gradients.append((leaf.grad, bn.weight.grad, bn.bias.grad))
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", _KINDS)
def test_many_blocks_give_what_one_gives(monkeypatch, kind):
    x, dy = _sample(50, 3, 2), _sample(50, 3, 2, seed=1)
    bn, results = mbn.BatchNorm1d(3, backend="torch"), []
    for block in (1 << 17, 12):
        monkeypatch.setattr("mbn_torch.kernels.CPU_BLOCK", block)
        monkeypatch.setattr("mbn_torch.kernels.RUN", 3)
        leaf = x.clone().requires_grad_()
        y = bn(leaf, sample_weight=_weights(kind, x.shape, x.dtype))
        results.append((y, *torch.autograd.grad(y, (leaf, *bn.parameters()), dy)))
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [None, "mask"])
def test_derivatives_of_a_constant_channel_without_eps_are_zero(kind):
    x, weight, bias = _arguments((6, 3))
    x = torch.ones_like(x)
    tangent = _sample(6, 3, dtype=torch.float64)
    normalized = partial(_batch_norm, weight=weight, bias=bias, weights=_weights(kind, (6, 3), x.dtype), eps=0)
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
def test_nothing_leaks_from_under_a_mask(training):
    x, weight, bias, *statistics = _arguments((6, 3), training=training)
    mask = torch.tensor([True, True, False, True, True, False])
    dy, tangent = (_sample(6, 3, dtype=x.dtype, seed=seed) for seed in (5, 6))
    poison = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=x.dtype)
    results = []
    for filler in (torch.zeros_like(poison), poison):
        given_x, given_dy, given_tangent = (torch.where(mask[:, None], array, filler) for array in (x, dy, tangent))

        def normalized(x, *vectors):
            return _batch_norm(x, *vectors, *statistics, weights=mask.to(x.dtype))

        def value(x):
            return (normalized(x, weight, bias) ** 3).sum()

        leaves = _leaves([given_x, weight, bias])
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


def test_nothing_is_left_under_a_mask():
    x = torch.full((6, 3), torch.nan, requires_grad=True)
    bn = mbn.BatchNorm1d(3, eps=0, backend="torch")
    y = bn(x, mask=torch.zeros(6, dtype=torch.bool))
    y.sum().backward()
    for array in (y, x.grad, bn.weight.grad, bn.bias.grad):
        assert not array.any()
    assert bn.running_mean.tolist() == [0, 0, 0]
    assert bn.running_var.tolist() == [1, 1, 1]
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize("kind", _KINDS)
def test_output_is_the_same_with_and_without_autograd(kind):
    x = _sample(3000, 70)
    bn, weights = mbn.BatchNorm1d(70, backend="torch"), _weights(kind, x.shape, x.dtype)
    outputs = [bn(x, sample_weight=weights), bn(x.clone().requires_grad_(), sample_weight=weights)]
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            outputs.append(bn(x, sample_weight=weights))
    outputs.append(bn.vjp(x, sample_weight=weights)[0])
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert [output.requires_grad for output in outputs[:4]] == [True, True, False, False]


def test_autograd_keeps_x_and_vectors():
    saved = []
    x = _sample(100, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = mbn.BatchNorm1d(8, backend="torch")(x)
    assert [tensor.data_ptr() for tensor in saved if tensor.numel() > 8] == [x.data_ptr()]
    assert y.grad_fn.next_functions[0][0].variable is x


def test_nothing_is_recorded_where_nothing_requires_a_gradient():
    bn = mbn.BatchNorm1d(3, backend="torch")
    for parameter in bn.parameters():
        parameter.requires_grad_(requires_grad=False)
    assert not bn(_sample(5, 3)).requires_grad


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", [{"affine": False}, {"bias": False}, {"track_running_stats": False}, {}])
def test_backward_passes_of_layers_of_every_make(settings, training):
    x, dy = _sample(6, 3), _sample(6, 3, seed=1)
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
def test_gradients_of_parameters_alone(training):
    bn = mbn.BatchNorm1d(3, backend="torch").train(training)
    bn.bias.requires_grad_(requires_grad=False)
    x, dy = _sample(5, 3), _sample(5, 3, seed=1)
    bn(x).backward(dy)
    assert bn.bias.grad is None
    expected = (bn.eval()(x) if not training else _plain(x, *bn.params)) * dy
    torch.testing.assert_close(bn.weight.grad, expected.sum(0).float().detach())


@pytest.mark.parametrize("name", ["x", "weight"])
def test_what_is_changed_before_the_backward_pass_is_detected(name):
    bn, x = mbn.BatchNorm1d(3, backend="torch"), _sample(5, 3)
    y = bn(x)
    with torch.no_grad():
        {"x": x, "weight": bn.weight}[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_running_statistics_may_change_before_the_backward_pass():
    gradients = []
    for change in (0, 1):
        bn, x = mbn.BatchNorm1d(3, backend="torch").eval(), _sample(5, 3).requires_grad_()
        y = bn(x)
        bn.running_var.add_(change)
        gradients.append(torch.autograd.grad(y, (x, bn.weight), _sample(5, 3, seed=1)))
    for expected, actual in zip(*gradients, strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_state_is_detached(momentum):
    bn = mbn.BatchNorm1d(3, momentum=momentum, backend="torch")
    y = bn(_sample(5, 3).requires_grad_())
    assert y.requires_grad
    assert not any(array.requires_grad for array in bn.state)


def _saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), _saved],  # noqa: S301 - its own
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_have_leaves_of_their_own(copied):
    bn = mbn.BatchNorm1d(3, backend="torch")
    bn(_sample(5, 3).requires_grad_())
    other = copied(bn)
    for parameter, original in zip(other.parameters(), bn.parameters(), strict=True):
        assert parameter is not original
        assert parameter.is_leaf
        assert parameter.requires_grad
        assert torch.equal(parameter, original)
    other(_sample(5, 3)).sum().backward()
    assert other.num_batches_tracked == 2
    assert bn.weight.grad is None


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_optimizers_train_as_they_train_torch_nn(optimizer):
    layers = torch.nn.BatchNorm1d(3), mbn.BatchNorm1d(3, backend="torch")
    for bn in layers:
        steps = optimizer(bn.parameters(), lr=0.1)
        for seed in range(3):
            steps.zero_grad()
            ((bn(_sample(9, 3, seed=seed)) - 1) ** 3).mean().backward()
            steps.step()
    for name, expected in layers[0].state_dict().items():
        torch.testing.assert_close(layers[1].state_dict()[name], expected)


def test_optimizers_keep_their_hold():
    bn = mbn.BatchNorm1d(3, backend="torch")
    before, held = bn.state_dict(), list(bn.parameters())
    bn.weight.requires_grad_(requires_grad=False)
    with torch.no_grad():
        bn.bias.add_(1)
    bn.load_state_dict(before)
    bn.weight = 2
    assert all(parameter is was for parameter, was in zip(bn.parameters(), held, strict=True))
    assert held[0].tolist() == [2, 2, 2]
    assert held[1].tolist() == before["bias"].tolist() == [0, 0, 0]
    bn.to(dtype="float64")
    assert [parameter.requires_grad for parameter in bn.parameters()] == [False, True]
    assert [parameter.dtype for parameter in bn.parameters()] == [torch.float64] * 2
    assert before["bias"].dtype == torch.float32


def test_parameters_are_found_by_a_module():
    module = torch.nn.Module()
    module.weight = mbn.BatchNorm1d(3, backend="torch").weight
    assert list(module.state_dict()) == ["weight"]


def test_layer_of_inference_mode_trains():
    with torch.inference_mode():
        bn = mbn.BatchNorm1d(3, backend="torch")
        bn(_sample(5, 3))
    for training in (False, True):
        x = _sample(5, 3).requires_grad_()
        bn.train(training)(x).sum().backward()
        assert x.grad is not None
    assert bn.num_batches_tracked == 2


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_counts_a_batch_once(use_reentrant):
    results = []
    for checkpoint in (partial(torch.utils.checkpoint.checkpoint, use_reentrant=use_reentrant), lambda f, x: f(x)):
        bn, x = mbn.BatchNorm1d(3, backend="torch"), _sample(5, 3).requires_grad_()
        checkpoint(lambda x, bn=bn: bn(x.sin()).sin(), x).sum().backward()
        results.append([x.grad, bn.weight.grad, *bn.state])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    results = []
    for enabled in (False, True):
        bn, x = mbn.BatchNorm1d(3, backend="torch"), (100 + _sample(50, 3)).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = bn(x)
            (y.float() ** 3).sum().backward()
            traced = torch.func.grad(lambda x, bn=bn: _batch_norm(x, *bn.params).float().pow(3).sum())(x.detach())
        results.append((y, x.grad, bn.weight.grad, bn.running_var, traced))
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", _KINDS)
def test_vmap_over_everything(momentum, training, kind):
    bn = mbn.BatchNorm1d(3, momentum=momentum, dtype="float64", backend="torch")
    x = _sample(4, 6, 3, 2, dtype=torch.float64)
    params = mbn.Params(_sample(4, 3, dtype=x.dtype), _sample(4, 3, dtype=x.dtype, seed=1))
    state = mbn.State(_sample(4, 3, dtype=x.dtype), _sample(4, 3, dtype=x.dtype, seed=2).abs(), torch.arange(4))
    weights = [] if kind is None else [torch.stack([_weights(kind, (6, 3, 2), x.dtype).roll(i) for i in range(4)])]

    def apply(params, state, x, sample_weight=None):
        def value(x):
            y, after = bn.apply(params, state, x, training=training, sample_weight=sample_weight)
            return (y**3).sum(), (y, *after)

        return torch.func.grad(value, has_aux=True)(x)

    batched = torch.vmap(apply)(params, state, x, *weights)
    for i in range(4):
        single = apply(*torch.utils._pytree.tree_map(lambda array, i=i: array[i], (params, state, x, *weights)))
        torch.testing.assert_close(torch.utils._pytree.tree_map(lambda array, i=i: array[i], batched), single)


def test_jacobians_agree():
    x, weight, bias = _arguments((4, 3))
    function = partial(_batch_norm, weight=weight, bias=bias)
    expected = torch.func.jacrev(partial(_plain, weight=weight, bias=bias))(x)
    jacobian = partial(torch.autograd.functional.jacobian, function)
    for actual in (
        torch.func.jacrev(function)(x),
        torch.func.jacfwd(function)(x),
        jacobian(x),
        jacobian(x, vectorize=True),
        jacobian(x, vectorize=True, strategy="forward-mode"),
    ):
        torch.testing.assert_close(actual, expected)


def test_gradients_per_sample():
    x, weight, bias, *statistics = _arguments((8, 3), training=False)

    def loss(batch_norm, weight, x):
        return (batch_norm(x[None], weight, bias, *statistics) ** 3).sum()

    expected, actual = (
        torch.vmap(torch.func.grad(partial(loss, batch_norm)), (None, 0))(weight, x)
        for batch_norm in (_plain, _batch_norm)
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap, torch.func.jacfwd])
def test_layer_keeps_no_statistics_of_a_transformation(transform):
    bn = mbn.BatchNorm1d(3, backend="torch")
    before = bn.state
    with pytest.raises(RuntimeError, match=r"bn\.apply"):
        transform(lambda x: bn(x).sum())(_sample(3, 3, 3))
    assert bn.state is before
    transform(lambda x: bn.eval()(x).sum())(_sample(3, 3, 3))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("form", ["plain", "mask", "lengths", "sample_weight"])
def test_compiled_layer(momentum, form):
    layers = [mbn.BatchNorm1d(3, momentum=momentum, backend="torch") for _ in range(2)]
    layers = [layers[0], _compiled(layers[1])]
    for step, size in enumerate((8, 8, 8)):
        x, dy = (100 + _sample(size, 3, 4, seed=2 * step + seed) for seed in range(2))
        masking = {
            "plain": {},
            "mask": {"mask": x[:, 0] > 102},
            "lengths": {"lengths": torch.arange(size) % 5},
            "sample_weight": {"sample_weight": x[:, 0] - 90},
        }[form]
        results = []
        for bn in layers:
            leaf = x.clone().requires_grad_()
            y = bn(leaf, **masking)
            results.append((y.detach(), *torch.autograd.grad(y, leaf, dy)))
        for expected, actual in zip(*results, strict=True):
            assert _error(actual, expected.double()) < 1e-6
        assert _graphs() == 1


def test_compiled_training_ends_where_the_eager_one_does():
    states = []
    for compiled in (False, True):
        bn = mbn.BatchNorm1d(3, momentum=None, backend="torch")
        step = (
            _compiled(lambda x, bn=bn: ((bn(x) - 1) ** 3).mean())
            if compiled
            else lambda x, bn=bn: ((bn(x) - 1) ** 3).mean()
        )
        optimizer = torch.optim.Adam(bn.parameters(), lr=0.1)
        for seed, size in enumerate((8, 8, 9, 10, 11, 12)):
            optimizer.zero_grad()
            step(_sample(size, 3, seed=seed)).backward()
            optimizer.step()
        states.append(bn.state_dict())
    assert _graphs() <= 2  # one more for sizes that vary
    assert states[1]["num_batches_tracked"] == 6
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_apply(training):
    bn = mbn.BatchNorm1d(3, momentum=None, backend="torch")
    apply = _compiled(lambda params, state, x: bn.apply(params, state, x, training=training))
    state = other = bn.state
    for seed in range(3):
        x = _sample(8, 3, seed=seed)
        y, state = apply(bn.params, state, x)
        expected, other = bn.apply(bn.params, other, x, training=training)
        torch.testing.assert_close((y, *state), (expected, *other))
    assert _graphs() == 1
    assert bn.num_batches_tracked == 0


def test_compiled_by_inductor():
    bn = mbn.BatchNorm1d(3, backend="torch")
    function = partial(_batch_norm, weight=bn.weight, bias=bn.bias)
    leaves = [_sample(64, 3).requires_grad_() for _ in range(2)]
    outputs = [call(leaf) for call, leaf in zip((function, backend.compile(function)), leaves, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad((y**3).sum(), leaf)[0] for y, leaf in zip(outputs, leaves, strict=True)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [{"sample_weight": -torch.ones(4)}, {"lengths": torch.tensor([1, 2, 3, 9])}])
@pytest.mark.parametrize("training", [True, False])
def test_weights_that_are_none_are_seen_under_a_trace(weights, training):
    bn = mbn.BatchNorm1d(3, backend="torch").train(training)
    (name,), (values,) = weights.keys(), weights.values()
    call = _compiled(lambda x, values: bn(x, **{name: values}))
    assert call(_sample(4, 3, 5), values).isnan()[-1].all()
    assert bn.running_mean.isnan().all() == training


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: x.mT.contiguous().mT,
        lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        lambda x: x[::2, :, 1::3],
        lambda x: x[:, :, :1].expand(-1, -1, 9),
        lambda x: x[:, :, 0].T.contiguous().T,
        lambda x: x[:1, :, 0].expand(5, -1),
    ],
    ids=["contiguous", "channels last", "rows last", "sliced", "expanded", "transposed", "expanded rows"],
)
def test_results_have_the_memory_format_of_x(form, dtype, masked, needs_grad):
    x = form(_sample(8, 4, 9, dtype=dtype))
    mask = torch.arange(len(x)) % 3 > 0 if masked else None
    before = x.clone()
    bn = mbn.BatchNorm1d(4, backend="torch")
    leaf = x.detach().requires_grad_(needs_grad)
    y = bn(leaf, mask=mask)
    results = [y]
    if needs_grad:
        results += torch.autograd.grad(y, leaf, form(_sample(8, 4, 9, dtype=dtype, seed=1)))
    for result in results:
        assert (result.dtype, result.device, result.stride()) == (x.dtype, x.device, torch.empty_like(x).stride())
    assert torch.equal(x, before)
    expected = mbn.BatchNorm1d(4, backend="torch")(x.contiguous(), mask=mask)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6, check_stride=False)


def _read_only(x):
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(
    "form",
    [
        _read_only,
        lambda x: x[::-1, ::-1],
        lambda x: x.astype(">f4"),
        lambda x: np.rec.fromarrays([x, x.astype("i1")], names="x,rest").x,
        np.asfortranarray,
    ],
    ids=["read-only", "reversed", "big-endian", "packed record", "Fortran order"],
)
def test_numpy_input_of_any_form(form):
    x = form(np.arange(12, dtype="f4").reshape(4, 3))
    brought = backend.asarray(x)
    assert brought.dtype == torch.float32
    assert np.array_equal(backend.to_numpy(brought), x)


def test_bfloat16_crosses_the_border_both_ways():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.arange(12).reshape(4, 3).astype(ml_dtypes.bfloat16).T
    brought = mbn.asarray(x, backend="torch")
    assert brought.dtype == torch.bfloat16
    assert brought.tolist() == x.tolist()
    back = mbn.to_numpy(brought.requires_grad_())
    assert back.dtype == x.dtype
    assert np.array_equal(back, x)


def test_bfloat16_without_ml_dtypes_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match="pip install ml_dtypes"):
        mbn.to_numpy(torch.zeros(2, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["float128", "nonsense", "nn"])
def test_unknown_dtype(name):
    with pytest.raises(TypeError, match=name):
        backend.asarray([1.0], dtype=name)


@pytest.mark.parametrize("device", ["nonsense", "meta", f"cuda:{torch.cuda.device_count()}", 3.5])
def test_unusable_device_names_the_usable_ones(device):
    with pytest.raises(ValueError, match="Torch's devices here are cpu"):
        mbn.BatchNorm1d(3, backend="torch", device=device)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu"), *backend.capabilities.devices])
def test_usable_devices(device):
    bn = mbn.BatchNorm1d(3, backend="torch", device=device)
    assert bn.running_mean.device.type == torch.device(device).type


def test_bits_do_not_depend_on_the_number_of_threads():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    digests = {
        subprocess.run(  # noqa: S603 - this Python and the program above
            [sys.executable, "-c", _BITS.format(threads=threads)],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for threads in (1, 2)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("shape", [(64, 5), (16, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_agrees_with_torch_nn(shape, dtype, momentum):
    reference = torch.nn.BatchNorm1d(5, momentum=momentum, dtype=dtype)
    bn = mbn.BatchNorm1d(5, momentum=momentum, dtype=dtype, backend="torch")
    for seed in range(3):
        x = _sample(*shape, dtype=dtype, seed=seed)
        torch.testing.assert_close(bn(x), reference(x).detach())
    for name, expected in reference.state_dict().items():
        torch.testing.assert_close(bn.state_dict()[name], expected)
    torch.testing.assert_close(bn.eval()(x), reference.eval()(x).detach())


def test_state_dict_goes_to_torch_nn_and_back():
    ours, theirs = mbn.BatchNorm1d(5, backend="torch"), torch.nn.BatchNorm1d(5)
    ours(_sample(64, 5))
    theirs.load_state_dict(ours.state_dict())
    x = _sample(8, 5, seed=1)
    torch.testing.assert_close(theirs.eval()(x).detach(), ours.eval()(x))
    theirs.train()(x)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, expected in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], expected)
        assert ours.state_dict()[name].dtype == expected.dtype
