"""``replace_batchnorm`` and back: the model keeps its module objects, tensors and outputs."""

import copy
import sys
import warnings

import numpy as np
import pytest

import mbn
from mbn.conformance import ulp

torch = pytest.importorskip("torch")


def _model():
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(4, eps=1e-3, momentum=0.3)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 4), norm, torch.nn.Sequential(torch.nn.ReLU(), torch.nn.BatchNorm1d(4))
    )
    model(_sample())
    return model


def _sample(seed=1):
    return 3 + 2 * torch.randn(16, 5, generator=torch.Generator().manual_seed(seed))


def _norms(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]


def _is_ours(module):
    return hasattr(module, "layer")


def _error(module, wide, x):
    """Return the error of a module's outputs against those of the same module in float64, in ulp of their largest term.

    Torch's error in float32 is 2 ulp, but 29 where the mean is 15 standard deviations.
    """
    y, exact = module(x).detach().movedim(1, -1).numpy(), wide(x.double()).detach().movedim(1, -1).numpy()
    parameters = zip((wide.weight, wide.bias), (1, 0), strict=True)
    weight, bias = (default if p is None else p.detach().numpy() for p, default in parameters)
    return ulp.distance(
        y, exact, np.maximum(np.abs((exact - bias) / weight), 1) * np.abs(weight) + np.abs(bias), "float32"
    )


def test_replaced_model_computes_and_trains_the_same():
    models = ours, theirs = _model(), _model()
    assert mbn.replace_batchnorm(ours) is ours
    assert all(map(_is_ours, _norms(ours)))
    for _ in range(2):  # there and back
        for training in (True, False):
            for model in models:
                model.train(training)
            torch.testing.assert_close(ours(_sample(2)), theirs(_sample(2)))
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
        for seed in range(3):
            for model, optimizer in zip(models, optimizers, strict=True):
                model.train()
                optimizer.zero_grad()
                (model(_sample(seed)) - 1).square().mean().backward()
                optimizer.step()
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        mbn.replace_batchnorm(ours, back=True)
        assert not any(map(_is_ours, _norms(ours)))
    for module, expected in zip(_norms(ours), _norms(theirs), strict=True):
        assert type(module) is torch.nn.BatchNorm1d
        assert vars(module).keys() == vars(expected).keys()
        assert repr(module) == repr(expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(64, 4), (32, 4, 7)])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}, {"momentum": None, "eps": 1e-2}],
    ids=str,
)
def test_replaced_module_gives_the_same_outputs_and_statistics(arguments, shape, training):
    generator = torch.Generator().manual_seed(0)
    theirs = torch.nn.BatchNorm1d(4, **arguments)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = 3 + 2 * torch.randn(shape, generator=generator)
    theirs(x + 1)
    theirs.train(training)
    ours = mbn.replace_batchnorm(copy.deepcopy(theirs))
    assert _error(ours, copy.deepcopy(theirs).double(), x) <= 2.5
    theirs(x)
    for key, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(key), buffer, rtol=5e-7, atol=0)


def test_replacement_keeps_modules_tensors_hooks_and_modes():
    model = _model()
    model.append(model[1])  # used twice
    model[1].bias.requires_grad_(requires_grad=False)
    model[1].name = "first"
    model[2].eval()
    seen = []
    handle = model[1].register_forward_hook(lambda module, *_: seen.append(module))
    before = [*model.modules(), *model.parameters(), *model.buffers()]
    modes = [module.training for module in model.modules()]
    for back in (False, True):
        mbn.replace_batchnorm(model, back=back)
        after = [*model.modules(), *model.parameters(), *model.buffers()]
        assert all(new is old for new, old in zip(after, before, strict=True))
        assert [module.training for module in model.modules()] == modes
        assert [parameter.requires_grad for parameter in model[1].parameters()] == [True, False]
        assert model[1].name == "first"
        if not back:
            for key, tensor in (*model[1].named_parameters(), *model[1].named_buffers()):
                assert getattr(model[1].layer, key) is tensor
        seen.clear()
        model(_sample())
        assert seen == [model[1], model[1]]
    handle.remove()
    model(_sample())
    assert len(seen) == 2


def test_state_dicts_load_into_the_original_and_the_replaced_model():
    ours, theirs = mbn.replace_batchnorm(_model()), _model()
    for model, other in ((ours, theirs), (theirs, ours)):
        model(_sample(3))
        assert str(other.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
        torch.testing.assert_close(other.eval()(_sample()), model.eval()(_sample()))


def test_second_replacement_changes_nothing():
    model = mbn.replace_batchnorm(_model())
    layers = [module.layer for module in _norms(model)]
    mbn.replace_batchnorm(model)
    assert [module.layer for module in _norms(model)] == layers
    mbn.replace_batchnorm(mbn.replace_batchnorm(model.eval(), back=True), back=True)
    assert not any(_is_ours(module) or module.training for module in _norms(model))


class _Frozen(torch.nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(mode=False)


def test_subclass_is_not_replaced_and_is_warned_of():
    model = _model().append(_Frozen(4))
    with pytest.warns(mbn.ConversionWarning, match="3 stays as it is, since _Frozen") as caught:
        mbn.replace_batchnorm(model)
    assert [warning.filename for warning in caught] == [__file__]
    assert [_is_ours(module) for module in _norms(model)] == [True, True, False]


@pytest.mark.parametrize("back", [False, True])
def test_module_with_its_own_forward_is_not_replaced(back):
    model = _model()
    if back:
        mbn.replace_batchnorm(model)
    model[1].forward = lambda x: x
    with pytest.warns(mbn.ConversionWarning, match="1 stays as it is"):
        mbn.replace_batchnorm(model, back=back)
    assert [_is_ours(module) for module in _norms(model)] == [back, not back]


def test_other_batch_norms_are_not_replaced():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.SyncBatchNorm(4), torch.nn.LazyBatchNorm2d())
    before = [type(module) for module in model]
    mbn.replace_batchnorm(model)
    assert [type(module) for module in model] == before


def test_lazy_module_is_replaced_once_it_knows_its_channels():
    model = _model().append(torch.nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="3 takes its number of channels from its first input"):
        mbn.replace_batchnorm(model)
    assert not any(map(_is_ours, _norms(model)))
    model(_sample())
    mbn.replace_batchnorm(model)
    assert all(map(_is_ours, _norms(model)))


def test_model_on_the_meta_device_is_replaced_and_loads_values_later():
    expected, x = _model(), _sample()
    with torch.device("meta"):
        model = mbn.replace_batchnorm(_model())
    assert all(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(expected.state_dict(), assign=True)
    torch.testing.assert_close(model(x), expected(x))
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()))
    model = mbn.replace_batchnorm(model.to("meta"), back=True)
    assert not any(map(_is_ours, _norms(model)))
    assert model(x.to("meta")).is_meta


def test_refused_replacement_changes_nothing():
    model = mbn.replace_batchnorm(_model()).append(mbn.BatchNorm1d(4, axis=-1, backend="torch").as_module())
    with pytest.raises(ValueError, match="3 has axis=-1"):
        mbn.replace_batchnorm(model, back=True)
    assert all(map(_is_ours, _norms(model)))


@pytest.mark.parametrize("model", [mbn.BatchNorm1d(3), None, [torch.nn.BatchNorm1d(3)]])
@pytest.mark.parametrize("back", [False, True])
def test_replacement_refuses_an_argument_that_is_no_module(model, back):
    with pytest.raises(TypeError, match=r"not mbn\.BatchNorm1d: as_module\(\)"):
        mbn.replace_batchnorm(mbn.BatchNorm1d(4, backend="torch"))
    with pytest.raises(TypeError, match="replace_batchnorm takes a torch.nn.Module, not "):
        mbn.replace_batchnorm(model, back=back)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_replacement_widens_halves_to_float32(half):
    model = _model().to(half)
    before, parameters = model.state_dict(), list(model.parameters())
    with pytest.warns(mbn.ConversionWarning, match=f"{str(half)[6:]}.*float32") as caught:
        mbn.replace_batchnorm(model)
    assert len(caught) == 2
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    assert model[1].running_var.dtype == model[1].weight.dtype == torch.float32
    for key, tensor in before.items():
        assert torch.equal(model.state_dict()[key].to(tensor.dtype), tensor)
    assert model(_sample().to(half)).dtype == half


def test_float64_stays_float64():
    ours = mbn.replace_batchnorm(_model().double())
    torch.testing.assert_close(ours(_sample().double()), _model().double()(_sample().double()))
    assert ours[1].running_mean.dtype == torch.float64


def test_replacement_back_warns_of_settings_that_torch_lacks():
    model = torch.nn.Sequential(
        mbn.BatchNorm1d(5, correction=0, backend="torch").as_module(),
        mbn.BatchNorm1d(5, backend="torch").freeze().as_module(),
    )
    model(_sample())
    model.eval()
    expected = model(_sample())
    model.train()
    with pytest.warns(mbn.ConversionWarning) as caught:
        mbn.replace_batchnorm(model, back=True)
    assert [str(warning.message)[:2] for warning in caught] == ["0:", "1:"]
    assert "correction=0" in str(caught[0].message)
    assert "freeze()" in str(caught[1].message)
    assert [module.training for module in model] == [True, False]
    torch.testing.assert_close(model.eval()(_sample()), expected)


def test_statistics_that_are_used_but_not_updated_stay_so():
    theirs = torch.nn.BatchNorm1d(5)
    theirs(_sample())
    theirs.track_running_stats = False
    ours = copy.deepcopy(theirs)
    with pytest.warns(mbn.ConversionWarning, match="track_running_stats=False"):
        mbn.replace_batchnorm(ours)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(_sample(2)), theirs.train(training)(_sample(2)))
    assert torch.equal(ours.running_mean, theirs.running_mean)
    for norm in (ours, theirs):
        norm.track_running_stats = True
        norm(_sample(2))
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


def test_module_without_running_statistics_is_replaced():
    theirs = torch.nn.BatchNorm1d(5)
    theirs.running_mean = theirs.running_var = None
    ours = mbn.replace_batchnorm(copy.deepcopy(theirs))
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(_sample()), theirs.train(training)(_sample()))


def test_replaced_models_compile_and_copy():
    model = mbn.replace_batchnorm(_model())
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Torch's own warnings
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(_sample()), twin(_sample()))
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert model[1].layer.num_batches_tracked == twin[1].num_batches_tracked == 2


def test_replacement_without_torch_says_how_to_install_it(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("mbn.interop.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        mbn.replace_batchnorm(None)
