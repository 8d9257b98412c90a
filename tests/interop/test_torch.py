"""Layers from and to torch.nn."""

import copy

import numpy as np
import pytest
from interop_samples import (
    ARGUMENTS,
    CHANNELS,
    SHAPES,
    assert_evaluates_as,
    assert_learns_as,
    assert_same_layer,
    layer,
    sample,
    vectors,
    warns,
)

import mbn
from mbn.conformance.thread_group import ThreadGroup

torch = pytest.importorskip("torch")

BACKENDS = ["numpy", "torch"]

TRAINABLE = [arguments for arguments in ARGUMENTS if arguments.get("eps") != 0]
"""Torch does not train with eps=0."""


def module(kind=torch.nn.BatchNorm1d, dtype="float32", **arguments):
    result = kind(CHANNELS, dtype=getattr(torch, dtype), **arguments)
    for name, value in zip(("weight", "bias", "running_mean", "running_var"), vectors(), strict=True):
        if getattr(result, name) is not None:
            getattr(result, name).data.copy_(torch.from_numpy(value))
    return result


def _module_of_ours():
    return mbn.BatchNorm1d(CHANNELS, backend="torch").as_module()


def output(module, x):
    return module(torch.from_numpy(x)).detach().numpy()


def step(module):
    def train(x):
        module.train()(torch.from_numpy(x))
        return module.running_mean.numpy(), module.running_var.numpy()

    return train


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[1])
@pytest.mark.parametrize("arguments", [*ARGUMENTS, {"bias": False}, {"momentum": None}])
def test_from_torch_gives_the_same_output(arguments, shape, backend):
    theirs = module(**arguments)
    bn = mbn.from_torch(theirs.eval(), backend=backend)
    assert not bn.training
    assert_evaluates_as(bn, output(theirs, sample(shape)), sample(shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[1])
@pytest.mark.parametrize("arguments", [*TRAINABLE, {"bias": False}, {"momentum": None}])
def test_to_torch_gives_the_same_output(arguments, shape, backend):
    bn = layer(**arguments, backend=backend)
    theirs = mbn.to_torch(bn)
    assert type(theirs) is torch.nn.BatchNorm1d
    assert not theirs.training
    assert_evaluates_as(bn, output(theirs, sample(shape)), sample(shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[1])
@pytest.mark.parametrize("arguments", [*TRAINABLE, {"momentum": None}])
def test_from_and_to_torch_keep_training_the_same(arguments, shape, backend):
    theirs = module(**arguments)
    bn = mbn.from_torch(theirs, backend=backend)
    back = mbn.to_torch(copy.deepcopy(bn))
    assert bn.training
    assert_learns_as(copy.deepcopy(bn), step(theirs), sample(shape))
    assert_learns_as(bn, step(back), sample(shape))
    assert back.num_batches_tracked == bn.num_batches_tracked == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "arguments", [*TRAINABLE, {"momentum": None}, {"track_running_stats": False}, {"dtype": "float64"}, {"bias": False}]
)
def test_round_trips_are_exact(arguments, training, backend):
    bn = layer(**arguments, backend=backend).train(training)
    if bn.track_running_stats:
        bn.num_batches_tracked = 7
    theirs = mbn.to_torch(bn)
    assert_same_layer(mbn.from_torch(theirs, backend=backend), bn)
    assert repr(mbn.to_torch(mbn.from_torch(theirs))) == repr(theirs)
    assert theirs.training is training


def test_from_and_to_torch_copy_the_arrays():
    theirs = module()
    bn = mbn.from_torch(theirs, backend="torch")
    back = mbn.to_torch(bn)
    before = copy.deepcopy(bn)
    for tensor in (*theirs.state_dict().values(), *back.state_dict().values()):
        tensor.data.fill_(7)
    assert_same_layer(bn, before)


def test_from_torch_leaves_the_backend_open():
    assert mbn.from_torch(module()).backend is None


def test_from_torch_keeps_float64():
    theirs, x = module(dtype="float64").eval(), sample(dtype="float64")
    assert_evaluates_as(mbn.from_torch(theirs), output(theirs, x), x, bound=4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_from_torch_widens_halves_to_float32(dtype):
    theirs = module(dtype=dtype)
    with warns(f"weight .{dtype}., bias", "running_var", "float32"):
        bn = mbn.from_torch(theirs)
    assert bn.weight.dtype == np.float32
    np.testing.assert_array_equal(bn.running_var, theirs.running_var.float().numpy())


def test_from_torch_widens_mixed_dtypes_to_the_widest():
    theirs = module()
    theirs.weight.data = theirs.weight.data.double()
    with warns("bias .float32., running_mean .float32., running_var .float32.: ", "float64"):
        assert mbn.from_torch(theirs).weight.dtype == np.float64


def test_from_torch_adds_a_weight_of_ones_to_a_bias_alone():
    theirs = module().eval()
    theirs.weight = None
    with warns("weight", "ones"):
        bn = mbn.from_torch(theirs)
    assert_evaluates_as(bn, output(theirs, sample()), sample())


def test_from_torch_keeps_statistics_that_are_not_tracked_any_more():
    theirs = module()
    theirs.track_running_stats = False
    with warns("track_running_stats", "momentum=0"):
        bn = mbn.from_torch(theirs)
    bn(sample())
    theirs(torch.from_numpy(sample()))
    assert_evaluates_as(bn, output(theirs.eval(), sample()), sample())


@pytest.mark.parametrize("backend", [None, "torch"])
def test_from_torch_gives_the_layer_of_a_sync_batchnorm_a_group(backend):
    theirs = module(torch.nn.SyncBatchNorm).eval()
    bn = mbn.from_torch(theirs, backend=backend)
    assert bn.group is True
    assert_evaluates_as(bn, output(theirs, sample()), sample())


def test_from_torch_warns_that_a_sync_batchnorm_on_another_backend_becomes_local():
    theirs = module(torch.nn.SyncBatchNorm).eval()
    with warns("group=True", "on numpy", "statistics of its own batch"):
        bn = mbn.from_torch(theirs, backend="numpy")
    assert bn.group is None
    assert_evaluates_as(bn, output(theirs, sample()), sample())


def test_to_torch_gives_a_sync_batchnorm_for_a_group():
    bn = layer(group=True, backend="torch")
    theirs = mbn.to_torch(bn)
    assert type(theirs) is torch.nn.SyncBatchNorm
    assert theirs.process_group is None
    assert_same_layer(mbn.from_torch(theirs, backend="torch"), bn)


def test_conversions_keep_a_process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group = torch.distributed.new_group([0])
        theirs = torch.nn.SyncBatchNorm(CHANNELS, process_group=group)
        bn = mbn.from_torch(theirs, backend="torch")
        assert bn.group is group
        assert mbn.to_torch(bn).process_group is group
        bn(torch.ones(4, CHANNELS))  # a group of one process is no group
        model = torch.nn.Sequential(bn.as_module())
        mbn.replace_batchnorm(model, back=True)
        assert type(model[0]) is torch.nn.SyncBatchNorm
        assert model[0].process_group is group
    finally:
        torch.distributed.destroy_process_group()


def test_to_torch_warns_of_a_group_that_is_none_of_torch():
    with warns("group=", r"groups of torch\.distributed alone"):
        theirs = mbn.to_torch(layer(group=ThreadGroup(2), backend="torch"))
    assert type(theirs) is torch.nn.BatchNorm1d


@pytest.mark.parametrize("wrapped", [False, True])
def test_torch_does_not_convert_modules_of_mbn_to_sync_batchnorm(wrapped):
    bn = layer(axis=-1, backend="torch").as_module()
    model = torch.nn.Sequential(torch.nn.Linear(2, CHANNELS), torch.nn.Sequential(bn)) if wrapped else bn
    with pytest.raises(TypeError, match=r"axis, correction.*mbn\.synchronize\(model, process_group\)"):
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert bn in list(model.modules())
    assert bn.num_features == CHANNELS


def test_lazy_module_converts_to_a_lazy_layer():
    theirs, x = torch.nn.LazyBatchNorm1d(eps=1e-3, affine=False, dtype=torch.float64), sample(dtype="float64")
    bn = mbn.from_torch(theirs)
    assert bn.num_features is None
    bn(x)
    theirs(torch.from_numpy(x))
    assert repr(mbn.to_torch(bn)) == repr(theirs)
    assert_evaluates_as(bn, output(theirs.eval(), x), x, bound=4)


def test_lazy_module_without_arrays_converts_to_a_lazy_layer():
    bn = mbn.from_torch(torch.nn.LazyBatchNorm1d(affine=False, track_running_stats=False))
    assert bn.num_features is None
    bn(sample())
    assert bn.num_features == CHANNELS


def test_lazy_module_with_a_loaded_state_keeps_it():
    theirs = torch.nn.LazyBatchNorm1d()
    theirs.load_state_dict(module().state_dict())
    assert_same_layer(mbn.from_torch(theirs, backend="numpy"), mbn.from_torch(module(), backend="numpy"))


def test_from_torch_takes_a_module_without_statistics():
    x = sample()
    theirs = module(track_running_stats=False, affine=False).eval()
    bn = mbn.from_torch(theirs)
    np.testing.assert_allclose(bn(x), output(theirs, x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"correction": 0}, ("running_var", "correction=0", "unbiased")),
        ({"axis": -1}, ("axis=-1", "transposed")),
        ({"eps": 0}, ("eps=0", "train")),
    ],
)
def test_to_torch_warns_of_settings_that_torch_lacks(arguments, words):
    bn = layer(**arguments)
    with warns(*words):
        theirs = mbn.to_torch(bn)
    assert_evaluates_as(bn, output(theirs, sample()), sample())


def test_warnings_point_to_the_line_of_the_caller():
    with warns("correction=0") as caught:
        mbn.to_torch(layer(correction=0))
    with warns("group") as caught_too:
        mbn.from_torch(module(torch.nn.SyncBatchNorm), backend="numpy")
    assert caught[0].filename == caught_too[0].filename == __file__


def test_to_torch_makes_an_evaluation_module_of_a_frozen_layer():
    bn = layer().train().freeze()
    with warns("freeze", "evaluation"):
        theirs = mbn.to_torch(bn)
    assert not theirs.training


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: torch.nn.Linear(2, 3), "torch.nn.BatchNorm1d, not Linear.$"),
        (lambda: torch.nn.BatchNorm2d(3), r"not BatchNorm2d\. .* \(N, C, L\).*state_dict"),
        (torch.nn.LazyBatchNorm3d, "not LazyBatchNorm3d.*state_dict"),
        (lambda: torch.nn.InstanceNorm1d(3), "not InstanceNorm1d.$"),
        (lambda: module().state_dict(), "not OrderedDict"),
        (lambda: _Other(3), "_Other has a forward of its own.*state_dict"),
        (lambda: module().to(torch.float8_e4m3fn), "weight is float8_e4m3fn.*float16, bfloat16, float32, float64"),
    ],
)
def test_from_torch_refuses_other_modules(made, words):
    with pytest.raises(TypeError, match=words):
        mbn.from_torch(made())


class _Other(torch.nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) + 1


def test_from_torch_refuses_a_module_on_the_meta_device():
    with pytest.raises(ValueError, match="meta device.*to_empty"):
        mbn.from_torch(torch.nn.BatchNorm1d(3, device="meta"))


@pytest.mark.parametrize("convert", [mbn.from_torch, mbn.replace_batchnorm])
@pytest.mark.parametrize("count", [np.nan, np.inf, -1.0, 1e30, [0, 1, 2]])
def test_conversion_refuses_an_invalid_count_of_batches(convert, count):
    theirs = module()
    theirs.num_batches_tracked = torch.tensor(count)
    with pytest.raises(ValueError, match=r"num_batches_tracked is .*at least 0 and below 2\*\*63.*module\."):
        convert(theirs)
    assert type(theirs) is torch.nn.BatchNorm1d


@pytest.mark.parametrize("count", [2.0, [2]])
def test_from_torch_takes_a_floating_or_one_element_count(count):
    theirs = module()
    theirs.num_batches_tracked = torch.tensor(count)
    assert mbn.from_torch(theirs).num_batches_tracked == 2


def test_from_torch_warns_of_a_fractional_count():
    theirs = module()
    theirs.num_batches_tracked = torch.tensor(2.5)
    with warns("num_batches_tracked=2.5: a layer has an integer, 2"):
        assert mbn.from_torch(theirs).num_batches_tracked == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [(module(), "not a BatchNorm1d of torch.*mbn.from_torch"), (_module_of_ours(), r"as_module\(\).*module.layer")],
    ids=["torch's", "ours"],
)
def test_to_torch_refuses_a_module(given, words):
    with pytest.raises(TypeError, match=words):
        mbn.to_torch(given)


def test_to_torch_refuses_a_layer_without_num_features():
    with pytest.raises(AttributeError, match="num_features is not known yet"):
        mbn.to_torch(mbn.BatchNorm1d(None))
