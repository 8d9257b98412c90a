"""The attributes of a layer on every backend: named arrays, params and state at once, the names of torch's modules."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import mbn
from mbn.conformance.target import configured
from mbn.contract import Params, State
from mbn.state.attributes import INSTEAD

OWN_OF_TORCH = {"T_destination", "call_super_init", "dump_patches"}
"""Attributes of torch's classes of modules that no code outside of torch reads."""


@pytest.fixture(params=["numpy", "numba", "torch", "jax"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param != "numpy":
        pytest.importorskip(request.param, reason="this is about its backend")
    name: str = request.param
    return name


def host(bn: mbn.BatchNorm1d) -> dict[str, list[float]]:
    return {key: mbn.to_numpy(value).tolist() for key, value in bn.state_dict().items()}


def test_named_arrays_are_those_of_the_layer(backend: str) -> None:
    bn = mbn.BatchNorm1d(3, backend=backend)
    assert [name for name, _ in bn.named_parameters()] == ["weight", "bias"]
    assert [name for name, _ in bn.named_buffers()] == ["running_mean", "running_var", "num_batches_tracked"]
    for name, value in (*bn.named_parameters(), *bn.named_buffers()):
        assert value is getattr(bn, name)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [({"affine": False}, []), ({"bias": False}, ["weight"]), ({"track_running_stats": False}, ["weight", "bias"])],
)
def test_named_arrays_leave_out_none(arguments: dict[str, bool], names: list[str], backend: str) -> None:
    bn = mbn.BatchNorm1d(3, backend=backend, **arguments)
    assert [name for name, _ in bn.named_parameters()] == names
    assert len(list(bn.named_buffers())) == 3 * arguments.get("track_running_stats", True)
    before = host(bn)
    bn.params, bn.state = bn.params, bn.state
    assert host(bn) == before


def test_named_arrays_are_named_as_in_torch() -> None:
    torch = pytest.importorskip("torch", reason="this compares with torch's module")
    for arguments in ({}, {"affine": False}, {"track_running_stats": False}):
        ours, theirs = mbn.BatchNorm1d(3, **arguments), torch.nn.BatchNorm1d(3, **arguments)
        for iterate in ("named_parameters", "named_buffers"):
            names = [name for name, _ in getattr(theirs, iterate)()]
            assert [name for name, _ in getattr(ours, iterate)()] == names


def test_params_and_state_take_plain_tuples_and_single_numbers(backend: str) -> None:
    bn = mbn.BatchNorm1d(2, backend=backend)
    bn.params = ([3, 4], 5)
    bn.state = [1.5, np.array([2.0, 3.0]), 7]
    expected = [[3, 4], [5, 5], [1.5, 1.5], [2, 3], 7]
    assert list(host(bn).values()) == expected
    assert {mbn.to_numpy(value).dtype.name for value in (*bn.params, *bn.state[:2])} == {"float32"}


@pytest.mark.parametrize("of", ["numpy", "torch", "jax"])
def test_params_and_state_come_from_another_framework(of: str, backend: str) -> None:
    if of != "numpy":
        pytest.importorskip(of, reason="this is about its arrays")
    source, bn = configured(mbn.BatchNorm1d(3, backend=of), seed=1), mbn.BatchNorm1d(3, backend=backend)
    bn.params, bn.state = source.params, source.state
    assert host(bn) == host(source)


@pytest.mark.parametrize(
    ("name", "values", "error", "words"),
    [
        ("params", ([7, 7, 7], None), TypeError, "bias is an array or a number, not None"),
        ("params", ([7, 7, 7], [1, 2]), ValueError, r"bias has shape \(2,\); this layer needs \(3,\)"),
        ("params", (7,), TypeError, "params is a tuple of weight, bias, .* not tuple of 1"),
        ("params", 7, TypeError, "params is a tuple of weight, bias, .* not int"),
        ("params", (7, "seven"), TypeError, "a str is no array"),
        ("state", (7, 7), TypeError, "state is a tuple of running_mean, running_var, num_batches_tracked"),
        ("state", (7, -1, 0), ValueError, "running_var is -1.0 in channel 0"),
        ("state", (7, 7, 0.5), TypeError, "num_batches_tracked is made of integers"),
        ("state", (None, None, None), TypeError, "running_mean is an array or a number, not None"),
    ],
)
def test_refused_params_and_state_change_nothing(
    name: str, values: Any, error: type[Exception], words: str, backend: str
) -> None:
    bn = configured(mbn.BatchNorm1d(3, backend=backend), seed=2)
    before = host(bn)
    with pytest.raises(error, match=words):
        setattr(bn, name, values)
    assert host(bn) == before


def test_params_and_state_of_a_layer_without_them_are_refused(backend: str) -> None:
    bn = mbn.BatchNorm1d(3, affine=False, track_running_stats=False, backend=backend)
    with pytest.raises(ValueError, match="this layer has no weight to set"):
        bn.params = (1, 1)
    with pytest.raises(ValueError, match="this layer has no running_mean to set"):
        bn.state = (0, 1, 0)
    with pytest.raises(AttributeError, match="num_features is not known yet"):
        mbn.BatchNorm1d(None, backend=backend).params = (1, 1)


def test_params_of_torch_stay_the_tensors_that_its_optimizer_holds() -> None:
    torch = pytest.importorskip("torch", reason="this is about its parameters")
    bn = mbn.BatchNorm1d(2, backend="torch")
    before = bn.params
    bn.params = Params(torch.ones(2) * 3, torch.ones(2) * 4)
    assert bn.weight is before.weight
    assert bn.bias is before.bias
    assert (bn.weight.tolist(), bn.bias.tolist()) == ([3, 3], [4, 4])
    assert bn.weight.requires_grad


def test_params_and_state_are_set_under_jit() -> None:
    jax = pytest.importorskip("jax", reason="this is about its transformations")

    @jax.jit
    def step(bn: mbn.BatchNorm1d, factor: Any) -> mbn.BatchNorm1d:
        bn.params = Params(bn.weight * factor, bn.bias + factor)
        bn.state = State(bn.running_mean - factor, bn.running_var * factor, bn.num_batches_tracked + 1)
        return bn

    bn = step(mbn.BatchNorm1d(2, backend="jax"), 3.0)
    assert list(host(bn).values()) == [[3, 3], [3, 3], [-3, -3], [3, 3], 1]


@pytest.mark.parametrize("name", ["params", "state"])
def test_params_and_state_stay(name: str) -> None:
    with pytest.raises(AttributeError, match=f"{name} of a layer can't be deleted"):
        delattr(mbn.BatchNorm1d(3), name)


def test_another_layer_moves_to_the_device_and_dtype_of_a_layer(backend: str) -> None:
    bn = mbn.BatchNorm1d(3, backend=backend)
    other = mbn.BatchNorm1d(3, backend=backend, device="cpu").to(device=bn.device, dtype=bn.dtype)
    assert (other.dtype, str(mbn.to_numpy(other.weight).dtype)) == (bn.dtype, "float32")


@pytest.mark.parametrize("name", INSTEAD)
def test_names_of_torch_say_how_a_layer_does_the_same(name: str, backend: str) -> None:
    bn = mbn.BatchNorm1d(3, backend=backend)
    words = rf"^'BatchNorm1d' object has no attribute '{name}'\. \w.*\.$"
    with pytest.raises(AttributeError, match=words) as caught:
        getattr(bn, name)
    assert INSTEAD[name] in str(caught.value)
    assert not hasattr(bn, name)
    assert name not in dir(bn)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("forward", r"bn\(x\).*bn\.apply\("),
        ("half", "parameters and statistics stay float32"),
        ("double", r"bn\.to\(dtype='float64'\)"),
        ("cuda", r"bn\.to\(device='cuda'\)"),
        ("requires_grad_", r"bn\.weight\.requires_grad_\(False\)"),
        ("register_forward_hook", r"bn\.as_module\(\)"),
    ],
)
def test_messages_name_the_way(name: str, words: str) -> None:
    with pytest.raises(AttributeError, match=words):
        getattr(mbn.BatchNorm1d(3), name)


def test_every_attribute_of_torch_is_there_or_has_a_message() -> None:
    torch = pytest.importorskip("torch", reason="this compares with torch's module")
    public = {name for name in dir(torch.nn.BatchNorm1d(3)) if name[0] != "_"}
    assert public - set(dir(mbn.BatchNorm1d(3))) - OWN_OF_TORCH <= INSTEAD.keys()
    assert INSTEAD.keys() <= public - OWN_OF_TORCH


def test_the_ways_of_the_messages_work() -> None:
    torch = pytest.importorskip("torch", reason="these ways are torch's")
    bn = mbn.BatchNorm1d(3, backend="torch")
    bn.weight.requires_grad_(False)
    assert [parameter.requires_grad for parameter in bn.parameters()] == [False, True]
    torch.optim.SGD(bn.parameters(), lr=0.1).zero_grad()
    y = torch.compile(bn, backend="eager", fullgraph=True)(torch.ones(4, 3))
    assert y.shape == (4, 3)
    assert int(bn.num_batches_tracked) == 1
    assert isinstance(bn.as_module(), torch.nn.Module)


def test_other_missing_names_have_the_error_of_python() -> None:
    for owner in (mbn.BatchNorm1d(3), mbn.BatchNorm1d.__new__(mbn.BatchNorm1d)):
        with pytest.raises(AttributeError, match="^'BatchNorm1d' object has no attribute 'weigth'$"):
            _ = owner.weigth  # type: ignore[attr-defined]


def test_errors_of_properties_reach_the_caller() -> None:
    class Layer(mbn.BatchNorm1d):
        @property
        def half(self) -> float:
            raise AttributeError("this half has its own reason")

    with pytest.raises(AttributeError, match="this half has its own reason"):
        _ = Layer(3).half
    with pytest.raises(AttributeError, match="num_features is not known yet"):
        _ = mbn.BatchNorm1d(None).params


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))])
def test_copies_have_the_messages_too(duplicate: Callable[[mbn.BatchNorm1d], mbn.BatchNorm1d]) -> None:
    twin = duplicate(mbn.BatchNorm1d(3))
    with pytest.raises(AttributeError, match=r"bn\.to\(device='cuda'\)"):
        _ = twin.cuda  # type: ignore[attr-defined]
    bare = mbn.BatchNorm1d.__new__(mbn.BatchNorm1d)
    with pytest.raises(AttributeError, match="_storage"):
        _ = bare.weight


def test_a_subclass_may_have_these_names() -> None:
    class Layer(mbn.BatchNorm1d):
        def forward(self, x: Any) -> Any:
            return self(x)

    layer = Layer(3)
    layer.half = 2  # type: ignore[attr-defined]
    assert layer.forward(np.ones((4, 3), np.float32)).shape == (4, 3)
    assert layer.half == 2  # type: ignore[attr-defined]


class PlainParams(mbn.BatchNorm1d):
    """A subclass whose params are a plain tuple, as ``apply`` takes them."""

    @property
    def params(self) -> Any:
        return tuple(super().params)


def test_parameters_of_a_subclass_with_plain_params_are_named() -> None:
    bn = PlainParams(3)
    assert [name for name, _ in bn.named_parameters()] == ["weight", "bias"]
    assert len(list(bn.parameters())) == 2


def test_missing_attribute_can_be_looked_for_in_a_compiled_function() -> None:
    torch = pytest.importorskip("torch", reason="Dynamo traces the look-up")
    bn = mbn.BatchNorm1d(3, backend="torch").eval()

    def look(x: Any) -> Any:
        return bn(x) if getattr(bn, "activation", None) is None and not hasattr(bn, "half") else x

    x = torch.ones(4, 3)
    torch.testing.assert_close(torch.compile(look, backend="eager", fullgraph=True)(x), bn(x))
