"""Training in Torch: parameters, optimizers, checkpointing, autocast, and copies of layers in training."""

from functools import partial

import pytest
from torch_samples import COPIES, output_of, sample

import mbn

torch = pytest.importorskip("torch")

# The first use of forward mode loads parts of Torch that Torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_detached(momentum):
    bn = mbn.BatchNorm1d(3, momentum=momentum, backend="torch")
    y = bn(sample(5, 3).requires_grad_())
    assert y.requires_grad
    assert not any(array.requires_grad for array in bn.state)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_of_a_layer_have_parameters_of_their_own(copied):
    bn = mbn.BatchNorm1d(3, backend="torch")
    bn(sample(5, 3).requires_grad_())
    other = copied(bn)
    for parameter, original in zip(other.parameters(), bn.parameters(), strict=True):
        assert parameter is not original
        assert parameter.is_leaf
        assert parameter.requires_grad
        assert torch.equal(parameter, original)
    other(sample(5, 3)).sum().backward()
    assert other.num_batches_tracked == 2
    assert bn.weight.grad is None


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_optimizer_trains_a_layer_as_torch_nn(optimizer):
    layers = torch.nn.BatchNorm1d(3), mbn.BatchNorm1d(3, backend="torch")
    for bn in layers:
        steps = optimizer(bn.parameters(), lr=0.1)
        for seed in range(3):
            steps.zero_grad()
            ((bn(sample(9, 3, seed=seed)) - 1) ** 3).mean().backward()
            steps.step()
    for name, expected in layers[0].state_dict().items():
        torch.testing.assert_close(layers[1].state_dict()[name], expected)


def test_parameters_stay_the_same_objects_when_they_are_set_or_loaded():
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


def test_weight_of_a_layer_is_a_parameter_for_torch():
    module = torch.nn.Module()
    module.weight = mbn.BatchNorm1d(3, backend="torch").weight
    assert list(module.state_dict()) == ["weight"]


def test_layer_made_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        bn = mbn.BatchNorm1d(3, backend="torch")
        bn(sample(5, 3))
    for training in (False, True):
        x = sample(5, 3).requires_grad_()
        bn.train(training)(x).sum().backward()
        assert x.grad is not None
    assert bn.num_batches_tracked == 2


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_counts_a_batch_once(use_reentrant):
    results = []
    for checkpoint in (partial(torch.utils.checkpoint.checkpoint, use_reentrant=use_reentrant), lambda f, x: f(x)):
        bn, x = mbn.BatchNorm1d(3, backend="torch"), sample(5, 3).requires_grad_()
        checkpoint(lambda x, bn=bn: bn(x.sin()).sin(), x).sum().backward()
        results.append([x.grad, bn.weight.grad, *bn.state])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_result(dtype):
    results = []
    for enabled in (False, True):
        bn, x = mbn.BatchNorm1d(3, backend="torch"), (100 + sample(50, 3)).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = bn(x)
            (y.float() ** 3).sum().backward()
            traced = torch.func.grad(lambda x, bn=bn: output_of(x, *bn.params).float().pow(3).sum())(x.detach())
        results.append((y, x.grad, bn.weight.grad, bn.running_var, traced))
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
