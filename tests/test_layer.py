"""The layer apart from the arithmetic of backends: binding, moving, loading, attributes, threads."""

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import second_framework

import mbn
from mbn.conformance.target import configured
from mbn.convert import received

X = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)


def test_first_input_binds_the_layer() -> None:
    bn = mbn.BatchNorm1d(4)
    assert isinstance(bn.running_mean, np.ndarray)
    y = bn(second_framework.asarray(X))
    assert bn.backend == second_framework.NAME
    assert isinstance(y, second_framework.Array)
    assert isinstance(bn.running_mean, second_framework.Array)
    assert int(bn.num_batches_tracked) == 1


def test_state_set_before_the_first_input_is_kept() -> None:
    bn = configured(mbn.BatchNorm1d(4), seed=1).eval()
    expected = {key: value.copy() for key, value in bn.state_dict().items()}
    bn(second_framework.asarray(X))
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(mbn.to_numpy(value), expected[key])


@pytest.mark.parametrize("first", [X[0], X.astype(int), X[:1], X[:, :3]])
def test_refused_first_input_does_not_bind(first: np.ndarray) -> None:
    bn = mbn.BatchNorm1d(4)
    with pytest.raises((TypeError, ValueError)):
        bn(second_framework.asarray(first))
    assert bn.backend is None
    assert isinstance(bn.running_mean, np.ndarray)


def test_lists_bind_to_numpy() -> None:
    bn = mbn.BatchNorm1d(2)
    y = bn([[1, 2], [3, 6]])
    assert bn.backend == "numpy"
    assert y.dtype == np.float32


def test_bound_layer_refuses_arrays_of_another_framework() -> None:
    bn = configured(mbn.BatchNorm1d(4, backend="numpy"), seed=2)
    before = copy.deepcopy(bn.state_dict())
    x = second_framework.asarray(X)
    name = second_framework.NAME
    words = rf"x is an array of {name} and the backend is numpy.*bn\.to\(backend='{name}'\).*mbn\.asarray"
    with pytest.raises(TypeError, match=words):
        bn(x)
    with pytest.raises(TypeError, match=f"running_mean is an array of numpy|x is an array of {second_framework.NAME}"):
        mbn.functional.batch_norm(x, bn.running_mean, bn.running_var, backend="numpy")
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, before[key])
    np.testing.assert_array_equal(bn(mbn.asarray(x, backend="numpy")), copy.copy(bn)(X))


def test_bound_layer_takes_host_data() -> None:
    y = mbn.BatchNorm1d(4, backend=second_framework.NAME)(X)
    assert isinstance(y, second_framework.Array)
    np.testing.assert_allclose(mbn.to_numpy(y), mbn.BatchNorm1d(4)(X), atol=1e-6)


def test_move_to_another_backend_keeps_the_state() -> None:
    bn = configured(mbn.BatchNorm1d(4), seed=3)
    expected = {key: value.copy() for key, value in bn.state_dict().items()}
    assert bn.to(backend=second_framework.NAME) is bn
    assert all(isinstance(value, second_framework.Array) for value in bn.state_dict().values())
    bn.to(backend="numpy", dtype="float64")
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, expected[key])
    assert bn.running_mean.dtype == np.float64


def test_unbound_layer_can_change_its_dtype() -> None:
    bn = mbn.BatchNorm1d(4).to(dtype=second_framework.float64)
    assert bn.backend is None
    assert bn.running_mean.dtype == np.float64
    assert bn(second_framework.asarray(X.astype(float))).dtype == second_framework.float64


@pytest.mark.parametrize(
    "move",
    [
        {"backend": "nowhere"},
        {"device": "nowhere"},
        {"dtype": "int8"},
        {"backend": second_framework.NAME, "device": "nowhere"},
    ],
)
def test_refused_move_changes_nothing(move: dict[str, str]) -> None:
    bn = configured(mbn.BatchNorm1d(4, backend="numpy"), seed=4)
    before = copy.deepcopy(bn)._storage.entries
    with pytest.raises((TypeError, ValueError)):
        bn.to(**move)
    assert bn.backend == "numpy"
    for key, value in before.items():
        np.testing.assert_array_equal(value, bn.state_dict()[key])


def test_device_of_an_unbound_layer_is_checked_by_its_first_input() -> None:
    bn = mbn.BatchNorm1d(4, device=second_framework.CPU)
    assert bn(second_framework.asarray(X)).device == second_framework.CPU
    open_layer = mbn.BatchNorm1d(4, device="cuda:99")
    with pytest.raises(ValueError, match="cuda:99"):
        open_layer(X)
    assert open_layer.backend is None


def test_backend_pickles_and_copies_as_itself() -> None:
    backend = mbn.get_backend("numpy")
    assert pickle.loads(pickle.dumps(backend)) is backend
    assert copy.deepcopy(backend) is backend


def test_unbound_layer_can_be_copied_and_pickled() -> None:
    for twin in (copy.deepcopy(mbn.BatchNorm1d(None)), pickle.loads(pickle.dumps(mbn.BatchNorm1d(None)))):
        assert twin.backend is None
        assert twin(X).shape == X.shape


def test_mode_methods_and_moves_can_be_chained() -> None:
    bn = mbn.BatchNorm1d(4).eval().freeze().train().unfreeze().to(backend="numpy")
    assert bn.training
    assert [parameter.shape for parameter in bn.parameters()] == [(4,), (4,)]


def test_momentum_and_eps_can_be_set() -> None:
    bn = mbn.BatchNorm1d(4)
    bn.momentum = None
    bn.eps = 1
    assert (bn.momentum, bn.eps) == (None, 1.0)
    assert (bn.axis, bn.correction) == (1, 1)


@pytest.mark.parametrize("name", ["numpy", "numba", "torch"])
def test_apply_computes_in_the_dtype_of_the_given_arrays(name: str) -> None:
    if name == "numba":
        pytest.importorskip(name, reason="this is about its backend")
    narrow, wide = (
        configured(mbn.BatchNorm1d(4, dtype=dtype, backend=name), seed=1) for dtype in ("float32", "float64")
    )
    for bn, other in ((narrow, wide), (wide, narrow)):
        x = mbn.asarray(X, backend=name)
        y, state = bn.apply(other.params, other.state, x, training=True)
        expected, after = other.apply(other.params, other.state, x, training=True)
        assert str(state.running_mean.dtype) == str(other.running_mean.dtype)
        for ours, theirs in zip((y, *state), (expected, *after), strict=True):
            np.testing.assert_array_equal(mbn.to_numpy(ours), mbn.to_numpy(theirs), strict=True)
    mixed = wide.params._replace(bias=narrow.bias)
    with pytest.raises(TypeError, match="bias is float32 and the other parameters and statistics are float64"):
        narrow.apply(mixed, wide.state, X, training=True)


def test_apply_refuses_parameters_of_another_framework() -> None:
    bn = mbn.BatchNorm1d(4, backend="numpy")
    with pytest.raises(TypeError, match=f"weight is an array of {second_framework.NAME}"):
        bn.apply(
            bn.params._replace(weight=second_framework.asarray(np.ones(4, np.float32))), bn.state, X, training=True
        )


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("affine", False, r"BatchNorm1d\(..., affine=...\)"),
        ("track_running_stats", False, r"freeze\(\)"),
        ("num_features", 5, r"BatchNorm1d\(num_features\)"),
        ("axis", -1, r"BatchNorm1d\(..., axis=...\)"),
        ("correction", 0, r"BatchNorm1d\(..., correction=...\)"),
        ("dtype", "float64", r"to\(dtype=...\)"),
        ("device", "cpu", r"to\(device=...\)"),
        ("backend", "numpy", r"to\(backend=...\)"),
    ],
)
@pytest.mark.parametrize("backend", [None, "numpy", second_framework.NAME])
def test_constructor_arguments_cannot_be_set(name: str, value: object, instead: str, backend: str | None) -> None:
    bn = configured(mbn.BatchNorm1d(4, backend=backend), seed=6)
    before, text = getattr(bn, name), repr(bn)
    with pytest.raises(AttributeError, match=f"{name} of a layer can't be set.*{instead}"):
        setattr(bn, name, value)
    assert getattr(bn, name) is before or getattr(bn, name) == before
    assert repr(bn) == text


def test_layer_has_its_dtype_and_device() -> None:
    bn = mbn.BatchNorm1d(4, backend=second_framework.NAME, dtype="float64")
    assert (bn.dtype, bn.device) == ("float64", second_framework.CPU)
    assert mbn.BatchNorm1d(4, device="cpu").device == "cpu"


@pytest.mark.parametrize("name", ["affine", "track_running_stats", "bias"])
@pytest.mark.parametrize("value", ["no", 1, None, np.zeros(2, bool)])
def test_flags_other_than_true_or_false_are_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} is True or False"):
        mbn.BatchNorm1d(4, **{name: value})
    assert mbn.BatchNorm1d(4, **{name: np.True_}).affine is True


def test_mode_other_than_true_or_false_is_refused() -> None:
    bn = mbn.BatchNorm1d(4)
    with pytest.raises(TypeError, match="training is True or False, not 'no'"):
        bn.training = "no"  # type: ignore[assignment]
    assert bn.training is True
    bn.training = False
    assert bn.training is False


def test_attributes_of_a_subclass_survive_the_first_call() -> None:
    class Layer(mbn.BatchNorm1d):
        def reset_parameters(self) -> None:
            super().reset_parameters()
            self.gain = 1

    bn = Layer(None)
    bn(X)
    assert bn.gain == 1


def test_load_during_a_call_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    bn, other = mbn.BatchNorm1d(4, backend="numpy"), configured(mbn.BatchNorm1d(4), seed=3)

    def load_first(*arguments: Any) -> Any:
        bn.load_state_dict(other.state_dict())  # as another thread might
        return received(*arguments)

    monkeypatch.setattr("mbn.layer.received", load_first)
    bn(X)
    for key, value in other.state_dict().items():
        np.testing.assert_array_equal(bn.state_dict()[key], value)


class Bare(mbn.BatchNorm1d):
    """A layer that is copied by its attributes alone, without ``__getstate__`` of its base."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    @property
    def params(self) -> mbn.Params:
        return mbn.Params(self.weight * 2, self.bias)


@pytest.mark.parametrize("change", ["call", "eps", "reset", "attribute"])
def test_shallow_copies_do_not_affect_each_other(change: str) -> None:
    bn = Bare(4, backend="numpy")
    other = copy.copy(bn)
    bn(X)
    before = bn.state_dict(), bn.eps
    changes: dict[str, Callable[[], Any]] = {
        "call": lambda: other(X),
        "eps": lambda: setattr(other, "eps", 0.5),
        "reset": other.reset_running_stats,
        "attribute": lambda: setattr(other, "running_mean", 3.0),
    }
    changes[change]()
    assert bn.eps == before[1]
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, before[0][key])


def test_subclass_may_override_params() -> None:
    bn = Bare(4, backend="numpy")
    assert bn.weight.tolist() == [1] * 4
    assert bn.params.weight.tolist() == [2] * 4
    assert bn.state.running_var.tolist() == [1] * 4


def test_state_of_an_earlier_version_is_restored() -> None:
    bn = mbn.BatchNorm1d(4, backend="numpy")
    held = {f"_{name}": value for name, value in bn._storage._asdict().items()}
    old = {**held, "_training": False, "_frozen": False, "__qualname__": "", "nparams": 3, "xstate": 2}
    again = mbn.BatchNorm1d.__new__(mbn.BatchNorm1d)
    again.__setstate__(old)
    assert (vars(again)["nparams"], vars(again)["xstate"], again.training) == (3, 2, False)
    assert repr(again) == repr(bn)


@pytest.mark.parametrize("change", ["running_mean", "eps", pytest.param("as_module", marks=pytest.mark.torch)])
def test_change_by_another_thread_during_a_change_is_not_lost(change: str) -> None:
    """While a thread changes the storage, another thread may change it too."""
    bn = mbn.BatchNorm1d(4, backend="torch" if change == "as_module" else second_framework.NAME)
    make, calls = bn._change, []

    def interrupted(function: Callable[[Any], Any]) -> None:
        def later(storage: Any) -> Any:
            new = function(storage)
            if not calls:
                calls.append(change)
                bn.momentum = 0.5  # as another thread might
                bn(mbn.asarray(X, backend=bn.backend))
            return new

        make(later)

    vars(bn)["_change"] = interrupted
    if change == "as_module":
        bn.as_module()
    else:
        setattr(bn, change, 7.0)
        assert float(np.mean(mbn.to_numpy(getattr(bn, change)))) == 7
    assert calls
    assert bn.momentum == 0.5
    assert int(bn.num_batches_tracked) == 1 - (change == "as_module")


def test_settings_and_steps_in_several_threads_are_not_lost() -> None:
    bn, steps = mbn.BatchNorm1d(4, backend="numpy"), 300

    def set_eps() -> None:
        for k in range(steps):
            bn.eps = k

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=set_eps)
        thread.start()
        for _ in range(steps):
            bn(X)
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert int(bn.num_batches_tracked) == steps
    assert bn.eps == steps - 1


def test_layer_has_the_name_of_its_class_as_a_function_would() -> None:
    class Own(mbn.BatchNorm1d): ...

    assert mbn.BatchNorm1d(4).__name__ == mbn.BatchNorm1d.__name__ == "BatchNorm1d"
    assert Own(4).__name__.endswith("Own")
