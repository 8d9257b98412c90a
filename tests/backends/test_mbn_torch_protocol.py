"""Modules of mbn where Torch replaces their tensors, removes some, or gives them values later."""

import copy

import pytest
from torch_samples import compile_fully, sample

import mbn

torch = pytest.importorskip("torch")

from torch._subclasses import FakeTensorMode
from torch.func import functional_call, replace_all_batch_norm_modules_, stack_module_state

# Torch uses functions that it has deprecated itself.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


def _pair(*, training=True, **arguments):
    """Return a module of mbn and one of torch.nn with the same values."""
    ours = mbn.BatchNorm1d(3, backend="torch", **arguments).as_module()
    theirs = torch.nn.BatchNorm1d(3, **arguments)
    for module in (ours, theirs):
        module(sample(8, 3, seed=5))
        module.train(training)
    return ours, theirs


def _assert_same(ours, theirs, x=None):
    """Check that both modules give the same outputs in both modes, and the same statistics."""
    x = sample(8, 3) if x is None else x
    for training in (True, False, True):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert (ours.track_running_stats, ours.affine) == (theirs.track_running_stats, theirs.affine)
    assert f"track_running_stats={theirs.track_running_stats}" in repr(ours)


def _remove(module, *names):
    for name in names:
        setattr(module, name, None)


def _restore(module):
    module.track_running_stats = True
    module.running_mean, module.running_var = torch.ones(3), torch.full((3,), 2.0)
    module.num_batches_tracked = torch.tensor(7)


CHANGES = {
    "by its attribute": lambda module: setattr(module, "track_running_stats", False),
    "mean and variance": lambda module: _remove(module, "running_mean", "running_var"),
    "all": lambda module: _remove(module, "running_mean", "running_var", "num_batches_tracked"),
    "count": lambda module: _remove(module, "num_batches_tracked"),
    "parameters": lambda module: _remove(module, "weight", "bias"),
    "by torch.func": replace_all_batch_norm_modules_,
}


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_removed_and_restored_statistics_behave_as_in_torch_nn(change, moved):
    pair = ours, theirs = _pair()
    for module in pair:
        change(module)
        if moved:
            module.double().float()
    _assert_same(ours, theirs)
    for module in pair:
        _restore(module)
    _assert_same(ours, theirs)
    assert ours.num_batches_tracked == 9


def test_test_time_adaptation_uses_statistics_of_the_batch():
    models = []
    for replace in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)).eval()
        model = mbn.replace_batchnorm(model) if replace else model
        model.train().requires_grad_(requires_grad=False)
        for norm in model:
            if isinstance(norm, torch.nn.BatchNorm1d):
                norm.requires_grad_(requires_grad=True)
                norm.track_running_stats = False
                norm.running_mean = norm.running_var = None
        optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
        for seed in range(3):
            logits = model(sample(8, 5, seed=seed))
            optimizer.zero_grad()
            (logits.softmax(1) * logits.log_softmax(1)).sum().neg().backward()
            optimizer.step()
        models.append((model.eval()(sample(8, 5, seed=9)), model.state_dict()))
    torch.testing.assert_close(models[0][0], models[1][0])
    torch.testing.assert_close(dict(models[0][1]), dict(models[1][1]))


def test_module_without_statistics_works_under_vmap():
    model = torch.nn.Sequential(mbn.BatchNorm1d(3, backend="torch").as_module())
    replace_all_batch_norm_modules_(model)
    x = sample(4, 8, 3)
    y = torch.vmap(model)(x)
    for row, one in zip(y, x, strict=True):
        torch.testing.assert_close(row, model(one))


def test_running_var_without_running_mean_is_refused():
    module, _ = _pair()
    module.running_mean = None
    for training in (True, False):
        with pytest.raises(ValueError, match="running_mean and running_var go together"):
            module.train(training)(sample(8, 3))


def test_frozen_module_uses_its_running_statistics():
    module, theirs = _pair(training=False)
    module.layer.freeze()
    module.train().track_running_stats = False
    torch.testing.assert_close(module(sample(8, 3)), theirs(sample(8, 3)))


def test_layer_follows_the_removed_tensors_of_its_module():
    bn = mbn.BatchNorm1d(3, backend="torch")
    module = bn.as_module()
    _remove(module, "running_mean", "running_var", "bias")
    module.double()
    for layer in (bn, module.layer):
        assert list(layer.state_dict()) == ["weight"]
        assert (layer.track_running_stats, layer.affine, layer.running_mean) == (False, True, None)
        assert "bias=False, track_running_stats=False" in repr(layer)
        copy.deepcopy(layer).load_state_dict(layer.state_dict())
    back = mbn.replace_batchnorm(copy.deepcopy(module), back=True)
    torch.testing.assert_close(back(sample(8, 3, dtype=torch.float64)), bn(sample(8, 3, dtype=torch.float64)))
    module.running_mean, module.running_var = torch.ones(3), torch.ones(3)
    module.float()
    assert bn.track_running_stats
    bn.reset_running_stats()
    assert module.running_mean.tolist() == [0, 0, 0]


@pytest.mark.parametrize("training", [True, False])
def test_vmap_over_a_meta_module_works(training):
    modules = [torch.nn.Sequential(torch.nn.Linear(5, 3), _pair(training=training)[0]) for _ in range(3)]
    params, buffers = stack_module_state(modules)
    base, x = copy.deepcopy(modules[0]).to("meta"), sample(8, 5)
    y = torch.vmap(lambda params, buffers: functional_call(base, (params, buffers), (x,)))(params, buffers)
    for i, module in enumerate(modules):
        torch.testing.assert_close(y[i], module(x))
        for key, buffer in module.named_buffers():
            torch.testing.assert_close(buffers[key][i], buffer)
    assert base[1].running_mean.is_meta


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("base", ["float32", "float64", "meta"])
def test_functional_call_computes_in_the_dtype_of_the_given_tensors(base, training, compiled):
    module, expected = _pair(training=training)
    module = module.to(base) if base == "meta" else module.to(getattr(torch, base))
    for dtype in (torch.float32, torch.float64):
        twin = copy.deepcopy(expected).to(dtype)
        given = {key: value.clone() for key, value in twin.state_dict().items()}
        x = sample(8, 3, dtype=dtype)

        def call(given, x):
            return functional_call(module, given, (x,))

        y = (compile_fully(call) if compiled else call)(given, x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, twin(x))
        torch.testing.assert_close(given, dict(twin.state_dict()))
    assert module.layer.state_dict()["running_mean"].dtype == (torch.float64 if base == "float64" else torch.float32)


def test_functional_call_refuses_tensors_of_two_dtypes():
    module, _ = _pair()
    params = {key: value.double() for key, value in module.named_parameters()}
    with pytest.raises(TypeError, match="running_mean is float32 and the other parameters and statistics are float64"):
        functional_call(module, params, (sample(8, 3, dtype=torch.float64),))


@pytest.mark.parametrize("given", ["context", "argument"])
@pytest.mark.parametrize("filled", ["to_empty", "assign"])
def test_meta_layer_gets_values_later(given, filled):
    if given == "context":
        with torch.device("meta"):
            bn = mbn.BatchNorm1d(3, backend="torch")
            module = bn.as_module()
            assert module(torch.ones(8, 3)).is_meta
            bn.weight, bn.num_batches_tracked = 2, 3
            bn.load_state_dict(bn.state_dict())
    else:
        bn = mbn.BatchNorm1d(3, backend="torch", device="meta")
        module = bn.as_module()
    assert bn.running_mean.is_meta
    for move in (lambda: bn.to(device="cpu"), lambda: bn.to(backend="numpy"), lambda: mbn.to_numpy(bn.weight)):
        with pytest.raises(ValueError, match=r"to_empty\(device=...\)"):
            move()
    if filled == "to_empty":
        module.to_empty(device="cpu").reset_parameters()
    else:
        module.load_state_dict(torch.nn.BatchNorm1d(3).state_dict(), assign=True)
    _assert_same(module, torch.nn.BatchNorm1d(3))
    assert bn.running_mean is module.running_mean
    bn(sample(8, 3))


def test_layers_work_in_fake_tensor_mode():
    with FakeTensorMode():
        for bn in (mbn.BatchNorm1d(3, backend="torch"), mbn.BatchNorm1d(None)):
            x = torch.ones(8, 3)
            assert bn(x, mask=torch.ones(8, dtype=torch.bool)).shape == (8, 3)
            bn.weight, bn.num_batches_tracked, bn.running_var = 2, torch.tensor(3), torch.ones(3)
            bn.load_state_dict(bn.state_dict())
            y, pullback = bn.vjp(x)
            assert pullback(y)[0].shape == (8, 3)
            bn.as_module()(x).sum().backward()
            assert bn.weight.grad.shape == (3,)
            with pytest.raises(ValueError, match="no values"):
                bn.fit([x], progress=False)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    "count",
    [torch.tensor(5.5), torch.tensor(0.0, dtype=torch.float64), torch.tensor(3, dtype=torch.int32), torch.tensor([2])],
)
def test_count_of_another_dtype_or_shape_behaves_as_in_torch_nn(momentum, count):
    pair = _pair(momentum=momentum)
    for module in pair:
        module.num_batches_tracked = count.clone()
    for x in (sample(8, 3), sample(6, 3), sample(0, 3)):
        _assert_same(*pair, x)
    _assert_same(*map(copy.deepcopy, pair))
    assert pair[0].num_batches_tracked.dtype == count.dtype
    pair[0].layer.freeze()
    before = pair[0].num_batches_tracked.clone()
    pair[0](sample(8, 3))
    assert pair[0].num_batches_tracked == before
