"""Layers as modules of Torch: in models, sharing tensors with the layer, moved, copied, compiled and exported."""

import copy
import io
import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
from torch_samples import COPIES, compile_fully, count_graphs, sample

import mbn

torch = pytest.importorskip("torch")
backend = mbn.get_backend("torch")

# Torch uses functions that it has deprecated itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]

_REPLICA = """
import datetime, os, sys, torch, mbn
from torch.nn.parallel import DistributedDataParallel

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
)
results = {}
for name in ("ours", "theirs"):
    torch.manual_seed(0)
    norm = mbn.BatchNorm1d(3, backend="torch").as_module() if name == "ours" else torch.nn.BatchNorm1d(3)
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(5, 3), norm, torch.nn.Linear(3, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(10 * step + rank)) + 2 * rank
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()(x)  # each forward pass begins with the buffers of the first process
    results[name] = model.module.state_dict()
    if name == "ours":
        results["layer"] = dict(norm.layer.state_dict())
torch.save(results, f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def _layer_and_module(**arguments):
    bn = mbn.BatchNorm1d(3, backend="torch", **arguments)
    return bn, bn.as_module()


def _model(norm):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 3, bias=False), norm, torch.nn.ReLU(), torch.nn.Linear(3, 2))


def _tensors(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _assert_shared(layer, module):
    """Check that layer and module hold the same tensor objects, and compute the same."""
    for key, tensor in _tensors(module).items():
        assert getattr(layer, key) is tensor
        assert getattr(module.layer, key) is tensor
    layer.train(module.training)
    x = sample(6, 3, dtype=module.running_mean.dtype).to(module.running_mean.device)
    expected, before = copy.deepcopy(layer)(x), int(module.num_batches_tracked)
    torch.testing.assert_close(module(x), expected)
    layer(x)
    assert layer.num_batches_tracked == module.num_batches_tracked == before + 2 * module.training


def test_module_is_a_batchnorm1d_of_torch():
    bn, module = _layer_and_module(eps=1e-3, momentum=None)
    theirs = torch.nn.BatchNorm1d(3, eps=1e-3, momentum=None)
    assert isinstance(module, torch.nn.BatchNorm1d)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
        assert getattr(module, name) == getattr(theirs, name)
    assert list(_tensors(module)) == list(_tensors(theirs))
    assert module.layer is not bn
    assert repr(module) == repr(bn)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_module_trains_in_a_model_as_torch_nn(momentum):
    models = [_model(_layer_and_module(momentum=momentum)[1]), _model(torch.nn.BatchNorm1d(3, momentum=momentum))]
    for foreach in (False, True):
        for model in models:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, foreach=foreach)
            for seed in range(3):
                optimizer.zero_grad()
                (model(sample(16, 5, seed=seed)) - 1).square().mean().backward()
                optimizer.step()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-4, atol=1e-5)
    x = sample(4, 5, seed=9)
    torch.testing.assert_close(models[0].eval()(x), models[1].eval()(x), rtol=1e-4, atol=1e-4)
    _assert_shared(models[0][1].layer, models[0][1])


def test_layer_and_module_share_tensors_through_changes_and_loads():
    bn, module = _layer_and_module()
    _assert_shared(bn, module)
    bn.running_mean = 3
    bn.weight = [1, 2, 3]
    assert module.running_mean.tolist() == [3, 3, 3]
    assert module.weight.tolist() == [1, 2, 3]
    bn.fit([sample(9, 3)], progress=False)
    _assert_shared(bn, module)
    bn.reset_running_stats()
    assert module.num_batches_tracked == 0
    bn.load_state_dict(torch.nn.BatchNorm1d(3).state_dict())
    _assert_shared(bn, module)
    module.load_state_dict({**bn.state_dict(), "bias": torch.ones(3)})
    assert bn.bias.tolist() == [1, 1, 1]
    module.reset_parameters()
    assert bn.bias.tolist() == [0, 0, 0]
    bn.to(dtype="float32", device="cpu")  # dtype and device that it has
    _assert_shared(bn, module)


@pytest.mark.parametrize("where", [{"backend": "numpy"}, {"dtype": "float64"}])
def test_moving_the_layer_leaves_the_module_unchanged(where):
    bn, module = _layer_and_module()
    bn.to(**where)
    module(sample(6, 3))
    module.double()
    assert module(sample(6, 3, dtype=torch.float64)).dtype == torch.float64
    assert bn.num_batches_tracked == 0
    assert module.num_batches_tracked == 2
    assert bn.backend == where.get("backend", "torch")
    assert bn.running_mean is not module.running_mean


def test_layer_and_module_have_their_own_arguments_and_modes():
    bn, module = _layer_and_module()
    module.momentum, module.eps = 0.5, 1e-3
    module.eval()
    assert (bn.momentum, bn.eps, bn.training) == (0.1, 1e-5, True)
    assert (module.layer.momentum, module.layer.eps) == (0.5, 1e-3)
    module.train()
    module.layer.freeze()
    module(sample(6, 3))
    assert bn.num_batches_tracked == 0
    with pytest.raises(ValueError, match="eps is added to a variance"):
        module.eps = -1.0


@pytest.mark.parametrize("training", [True, False])
def test_module_takes_masks_lengths_and_sample_weights(training):
    bn = mbn.BatchNorm1d(3, axis=-1, correction=0, backend="torch").train(training)
    twin, module = copy.deepcopy(bn), bn.as_module()
    x = sample(4, 5, 3)
    for masking in (
        {"mask": torch.rand(4, 5) > 0.3},
        {"lengths": torch.tensor([5, 0, 2, 3])},
        {"sample_weight": torch.rand(4)},
    ):
        assert torch.equal(module(x, **masking), twin(x, **masking))
    assert module(x[:0]).shape == (0, 5, 3)
    twin(x[:0])
    torch.testing.assert_close(dict(module.state_dict()), dict(twin.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("arguments", [{"affine": False}, {"bias": False}, {"track_running_stats": False}])
def test_module_lacks_the_entries_that_its_layer_lacks(arguments):
    bn, module = _layer_and_module(**arguments)
    theirs = torch.nn.BatchNorm1d(3, **arguments)
    module.load_state_dict(theirs.state_dict())
    x = sample(8, 3)
    for training in (True, False):
        torch.testing.assert_close(module.train(training)(x), theirs.train(training)(x))
    theirs.load_state_dict(module.state_dict())
    torch.testing.assert_close(dict(theirs.state_dict()), dict(bn.state_dict(backend="torch")))


def test_as_module_refuses_unbound_layers_and_other_backends():
    with pytest.raises(TypeError, match="no backend yet.*backend='torch'"):
        mbn.BatchNorm1d(3).as_module()
    with pytest.raises(TypeError, match="numpy has no modules"):
        mbn.BatchNorm1d(3, backend="numpy").as_module()
    with pytest.raises(AttributeError, match="num_features is not known yet"):
        mbn.BatchNorm1d(None, backend="torch").as_module()


def test_state_dicts_of_every_version_load_from_and_into_torch_nn():
    _, module = _layer_and_module()
    theirs = torch.nn.BatchNorm1d(3)
    for seed in range(2):
        module(sample(6, 3, seed=seed))
    assert str(theirs.load_state_dict(module.state_dict())) == "<All keys matched successfully>"
    assert module.state_dict()._metadata[""]["version"] == 2
    theirs(sample(6, 3, seed=3))
    assert str(module.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    old = dict(theirs.state_dict())
    del old["num_batches_tracked"]
    module.load_state_dict(old)
    assert module.num_batches_tracked == 3
    with pytest.raises(RuntimeError, match="Unexpected key"):
        module.load_state_dict({**old, "more": torch.ones(3)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_load_state_dict_with_assign_replaces_the_tensors(dtype):
    bn, module = _layer_and_module()
    theirs = torch.nn.BatchNorm1d(3)
    theirs(sample(6, 3))
    module.load_state_dict(theirs.to(dtype).state_dict(), assign=True)
    assert module.running_var.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(module.running_var.to(dtype), theirs.running_var)
    _assert_shared(bn, module)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_module_keeps_float32_when_the_model_becomes_half(half):
    bn, module = _layer_and_module()
    bn.weight = sample(3)
    module(sample(6, 3)).square().sum().backward()
    before = copy.deepcopy(module.state_dict())
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), module).to(half)
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)
    assert model(sample(6, 5).to(half)).dtype == half
    assert module.weight.grad.dtype == torch.float32
    assert module.type(half).num_batches_tracked.dtype == torch.int64
    _assert_shared(bn, module)


def test_moving_the_module_moves_the_layer():
    bn, module = _layer_and_module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module.double()
    _assert_shared(bn, module)
    module(sample(6, 3, dtype=torch.float64)).pow(3).sum().backward()
    optimizer.step()
    assert bn.bias.ne(0).all()
    for device in reversed(backend.capabilities.devices):
        module.to(device, torch.float32)
        _assert_shared(bn, module)
    module.to("meta")
    assert bn.weight.is_meta
    assert module(torch.empty(6, 3, device="meta")).is_meta
    copy.deepcopy(module).to_empty(device="cpu")
    module.to_empty(device="cpu").reset_parameters()
    _assert_shared(bn, module)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_of_a_module_have_a_layer_of_their_own(copied):
    bn, module = _layer_and_module()
    module(sample(6, 3))
    other = copied(module)
    other(sample(6, 3)).sum().backward()
    assert bn.num_batches_tracked == 1
    assert bn.weight.grad is None
    other.double()
    _assert_shared(other.layer, other)
    _assert_shared(bn, module)


def test_module_loaded_with_map_location_works_on_that_device():
    file = io.BytesIO()
    torch.save(_layer_and_module()[1], file)
    file.seek(0)
    module = torch.load(file, map_location="meta", weights_only=False)
    assert module(torch.empty(6, 3, device="meta")).is_meta


def test_functional_call_leaves_the_module_unchanged():
    bn, module = _layer_and_module()
    tensors = {key: tensor.detach().clone() for key, tensor in _tensors(module).items()}
    tensors["weight"] *= 2
    x = sample(6, 3)
    y = torch.func.functional_call(module, tensors, (x,))
    assert tensors["num_batches_tracked"] == 1
    assert bn.num_batches_tracked == 0
    torch.testing.assert_close(y, 2 * copy.deepcopy(bn)(x))
    _assert_shared(bn, module)


def test_vmap_trains_an_ensemble_as_its_members():
    modules = [_layer_and_module(dtype="float64")[1] for _ in range(3)]
    params, buffers = torch.func.stack_module_state(modules)
    x = sample(3, 8, 3, dtype=torch.float64)

    def call(params, buffers, x):
        return torch.func.functional_call(modules[0], (params, buffers), (x,))

    y = torch.vmap(call)(params, buffers, x)
    for i, module in enumerate(modules):
        torch.testing.assert_close(y[i], module(x[i]))
        for key, buffer in module.named_buffers():
            torch.testing.assert_close(buffers[key][i], buffer)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_counts_a_batch_once(use_reentrant):
    bn, module = _layer_and_module()
    twin = copy.deepcopy(module)
    gradients = []
    for call in (module, lambda x: torch.utils.checkpoint.checkpoint(twin, x, use_reentrant=use_reentrant)):
        x = sample(8, 3).requires_grad_()
        call(x).pow(3).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    assert bn.num_batches_tracked == 1
    torch.testing.assert_close(dict(twin.state_dict()), dict(module.state_dict()), rtol=0, atol=0)


def test_update_bn_gives_the_statistics_of_torch_nn():
    bn, module = _layer_and_module(momentum=0.3)
    theirs = torch.nn.BatchNorm1d(3, momentum=0.3)
    batches = [sample(8, 3, seed=seed) for seed in range(4)]
    module(sample(8, 3, seed=9))
    for model in (torch.nn.Sequential(module), torch.nn.Sequential(theirs)):
        torch.optim.swa_utils.update_bn(batches, model)
    torch.testing.assert_close(dict(bn.state_dict()), dict(theirs.state_dict()))
    assert module.momentum == module.layer.momentum == 0.3


def test_averaged_model_averages_statistics():
    _, module = _layer_and_module()
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Sequential(module), use_buffers=True)
    means = []
    for seed in range(2):
        module(sample(8, 3, seed=seed))
        averaged.update_parameters(torch.nn.Sequential(module))
        means.append(module.running_mean.clone())
    torch.testing.assert_close(averaged.module[0].running_mean, (means[0] + means[1]) / 2)
    _assert_shared(averaged.module[0].layer, averaged.module[0])


def test_autocast_keeps_statistics_in_float32():
    _, module = _layer_and_module()
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), module)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(sample(8, 5))
    y.float().pow(3).sum().backward()
    assert y.dtype == torch.bfloat16
    assert module.running_var.dtype == module.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_module_compiles_without_a_graph_break(training):
    bn, module = _layer_and_module(momentum=None)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), module).train(training)
    twin = copy.deepcopy(model)
    call = compile_fully(model)
    for seed in range(3):
        y, expected = call(sample(8, 5, seed=seed)), twin(sample(8, 5, seed=seed))
        torch.testing.assert_close(y, expected)
    y.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, twin[0].weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(module.state_dict()), dict(twin[1].state_dict()))
    assert count_graphs() == 1
    assert bn.num_batches_tracked == (3 if training else 0)
    _assert_shared(bn, module)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_module_exports_for_any_batch_size(training, strict):
    bn, module = _layer_and_module()
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), module).train(training)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (sample(8, 5),), dynamic_shapes=({0: batch},), strict=strict)
    assert bn.num_batches_tracked == 0
    exported = program.module()
    for n in (8, 3, 64):
        x = sample(n, 5, seed=n)
        torch.testing.assert_close(exported(x), model(x))
    expected = dict(model.named_buffers())
    for key, buffer in exported.named_buffers():
        torch.testing.assert_close(buffer, expected[key])
    _assert_shared(bn, module)


def test_backward_works_after_a_later_training_step():
    _, module = _layer_and_module(dtype="float64")
    x = sample(8, 3, dtype=torch.float64).requires_grad_()
    expected = torch.autograd.grad(copy.deepcopy(module).eval()(x).pow(3).sum(), x)
    y = module.eval()(x)
    module.train()(x.detach() + 5)
    torch.testing.assert_close(torch.autograd.grad(y.pow(3).sum(), x), expected)
    assert torch.autograd.gradgradcheck(module, (x,))


def test_layer_trained_in_inference_mode_becomes_a_module():
    bn = mbn.BatchNorm1d(3, backend="torch")
    with torch.inference_mode():
        bn(sample(6, 3))
    module = bn.as_module()
    _assert_shared(bn, module)
    with torch.inference_mode():
        module(sample(6, 3))
    assert module.num_batches_tracked == 4


def test_vmap_over_a_training_module_is_refused():
    bn, module = _layer_and_module()
    with pytest.raises(RuntimeError, match="running statistics that end with this transformation"):
        torch.vmap(module)(sample(2, 6, 3))
    assert bn.num_batches_tracked == 0


@pytest.mark.parametrize("x", [torch.zeros(4, 7), torch.zeros(1, 3), torch.zeros(4, 3, dtype=torch.int64)])
def test_refused_input_leaves_the_statistics_unchanged(x):
    bn, module = _layer_and_module()
    with pytest.raises((TypeError, ValueError)):
        module(x)
    assert bn.num_batches_tracked == 0
    assert bn.running_mean.tolist() == [0, 0, 0]


def _state(value, dtype=torch.float32, size=3):
    return mbn.State(*(torch.full((size,), value, dtype=dtype) for _ in range(2)), torch.tensor(int(value)))


def test_write_copies_all_statistics_or_none():
    before = _state(1.0)
    assert backend.write(before, _state(2.0)) is before
    assert [tensor.sum() for tensor in before] == [6, 6, 2]
    for after in (_state(3.0, torch.float64), _state(3.0, size=4)):
        assert backend.write(before, after) is after
        assert [tensor.sum() for tensor in before] == [6, 6, 2]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")
def test_interrupted_write_leaves_a_consistent_state():
    before, states = _state(0.0, size=10**6), [_state(value, size=10**6) for value in (1.0, 2.0)]
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for i in range(30):
            with suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.0001 * i)
                while True:
                    for state in states:
                        backend.write(before, state)
            assert {float(value) for tensor in before for value in tensor.unique()} in ({1.0}, {2.0})
    finally:
        signal.signal(signal.SIGALRM, previous)
        torch.set_grad_enabled(True)  # an interrupt at the start of no_grad can leave it on


def test_distributed_data_parallel_agrees_with_torch_nn(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", "-c", _REPLICA]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["layer"]["num_batches_tracked"] == 3
    torch.testing.assert_close(dict(first["ours"]), dict(second["ours"]), rtol=0, atol=0)
    torch.testing.assert_close(dict(first["ours"]), dict(first["theirs"]))
    for replica in (first, second):
        for key, tensor in replica["layer"].items():
            assert torch.equal(tensor, replica["ours"][f"1.{key}"])


@pytest.mark.parametrize(
    "put",
    [
        torch.nn.Sequential,
        lambda bn: torch.nn.ModuleList([bn]),
        lambda bn: torch.nn.ModuleDict({"norm": bn}),
        lambda bn: torch.nn.Module().register_module("norm", bn),
        lambda bn: torch.nn.Sequential(torch.nn.ReLU()).__setitem__(0, bn),
    ],
)
def test_containers_refuse_a_layer_and_name_as_module(put):
    bn = mbn.BatchNorm1d(3, backend="torch")
    for layer in (bn, copy.deepcopy(bn), mbn.BatchNorm1d(None)):
        with pytest.raises(TypeError, match=r"mbn.layer.BatchNorm1d \(put its as_module\(\) into the model\)"):
            put(layer)
    torch.nn.Sequential(bn.as_module())
