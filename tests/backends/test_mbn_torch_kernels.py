"""The eager kernels, in Torch's operations: here they get all tensors, so the tests need no GPU."""

from fractions import Fraction

import pytest
from torch_samples import (
    KINDS,
    POWERS,
    assert_size_changes_nothing,
    by_definition,
    draw_weights,
    relative_error,
    sample,
)

import mbn

torch = pytest.importorskip("torch")

from mbn.contract import Batch
from mbn_torch import backend as module
from mbn_torch.kernels import eager

BOUNDS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 3e-7, torch.float64: 1e-12}
SHAPES = [(50, 3), (50, 3, 2), (9, 3), (1, 3, 7)]


@pytest.fixture(autouse=True)
def only_eager(monkeypatch):
    """Let the backend choose the eager kernels alone, and return their numbers of blocks."""
    monkeypatch.setattr(module, "common_device", lambda *_: None)
    assert mbn.get_backend("torch").kernels_for("moments", Batch(torch.ones(2, 2)))[0] is eager.EAGER
    numbers, split = [], eager._split

    def counted(*arguments):
        blocks = list(split(*arguments))
        numbers.append(len(blocks))
        return iter(blocks)

    monkeypatch.setattr(eager, "_split", counted)
    yield numbers
    assert numbers


def _gradients(bn, x, dy, weights=None):
    """Return the output of a call, its gradients and the new statistics."""
    leaf = x.clone().requires_grad_()
    y = bn(leaf) if weights is None else bn(leaf, sample_weight=weights)
    return [y.detach(), *torch.autograd.grad(y, (leaf, *bn.parameters()), dy), *list(bn.state_dict().values())[2:]]


def _layer(dtype="float32", *, training=True):
    bn = mbn.BatchNorm1d(3, dtype=dtype, backend="torch").train(training)
    bn.weight, bn.bias, bn.running_mean, bn.running_var = [1.5, -2, 0.5], [1, 2, 3], [3, 2, 1], [4, 5, 6]
    return bn


def _few_rows(monkeypatch):
    """Set the sizes to blocks of two rows of 3 channels and 2 positions, and chunks of three blocks."""
    monkeypatch.setattr(eager, "CPU_BLOCK", 12)
    monkeypatch.setattr(eager, "CHUNK", 3)


@pytest.mark.parametrize("blocks", ["one", "many"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_agree_with_the_definition(monkeypatch, only_eager, training, dtype, shape, kind, blocks):
    if blocks == "many":
        _few_rows(monkeypatch)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bn = _layer("float64" if dtype == torch.float64 else "float32", training=training)
    statistics = [] if training else [value.double() for value in bn.state[:2]]
    weights = draw_weights(kind, shape, wide)
    x, dy = sample(*shape, dtype=dtype), sample(*shape, dtype=dtype, seed=1)
    leaves = [value.detach().double().requires_grad_() for value in (x, *bn.parameters())]
    expected_y = by_definition(*leaves, *statistics, weights=weights)
    expected = [expected_y, *torch.autograd.grad(expected_y, leaves, dy.double())]
    if weights is not None:  # masked values must affect no result
        keep = (weights > 0).reshape(len(x), 1, *weights.shape[1:])
        x, dy = (torch.where(keep, values, torch.nan) for values in (x, dy))
        assert weights.eq(0).any()
    actual = _gradients(bn, x, dy, weights)
    for ours, theirs in zip(actual, expected, strict=False):
        assert relative_error(ours, theirs) < BOUNDS[dtype]
    assert max(only_eager) == (1 if blocks == "one" or shape[0] == 1 else len(x.split(2 if len(shape) == 3 else 4)))


@pytest.mark.parametrize("kind", KINDS)
def test_many_blocks_give_the_results_of_one(monkeypatch, only_eager, kind):
    x, dy = sample(50, 3, 2), sample(50, 3, 2, seed=1)
    weights = draw_weights(kind, x.shape, x.dtype)
    one = _gradients(_layer(), x, dy, weights)
    assert max(only_eager) == 1
    _few_rows(monkeypatch)
    many = _gradients(_layer(), x, dy, weights)
    assert max(only_eager) == 25
    for actual, expected in zip(many, one, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_gradients_of_many_blocks_agree_with_torch_nn(monkeypatch, only_eager):
    _few_rows(monkeypatch)
    x, dy = sample(50, 3, 2), sample(50, 3, 2, seed=1)
    ours, theirs = (_gradients(bn, x, dy) for bn in (mbn.BatchNorm1d(3, backend="torch"), torch.nn.BatchNorm1d(3)))
    assert max(only_eager) == 25
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_out_gets_the_output_in_another_memory_order(training, kind):
    x = sample(50, 3, 2)
    arguments = (x, torch.zeros(3), torch.ones(3), torch.ones(3), torch.ones(3), training)
    weights = draw_weights(kind, x.shape, x.dtype)
    expected = mbn.functional.batch_norm(*arguments, sample_weight=weights)
    out = torch.full((50, 2, 3), torch.nan).mT
    assert mbn.functional.batch_norm(*arguments, sample_weight=weights, out=out).output is out
    assert torch.equal(out, expected.output)


@pytest.mark.parametrize(("dtype", "power"), POWERS)
def test_eager_kernels_take_values_of_any_size(dtype, power):
    assert_size_changes_nothing(dtype, power)


def test_statistics_are_accurate_where_one_value_dwarfs_the_others():
    x = torch.ones((145, 69, 18), dtype=torch.float64)
    x[0, :, 0] = 3.22e6
    bn = mbn.BatchNorm1d(69, dtype="float64", momentum=1.0, backend="torch")
    bn(x)
    n = 145 * 18
    mean = 1 + (Fraction(3.22e6) - 1) / n
    var = (Fraction(3.22e6) - 1) ** 2 / n
    assert relative_error(bn.running_mean, torch.full((69,), float(mean), dtype=torch.float64)) < 4e-16
    assert relative_error(bn.running_var, torch.full((69,), float(var), dtype=torch.float64)) < 4e-16
