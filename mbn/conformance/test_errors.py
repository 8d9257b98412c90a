"""Errors: every misuse raises one typed error with a clear message, and changes nothing."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import mbn
from mbn.conformance import strategies
from mbn.conformance.target import Target, assert_same, configured

X = np.random.default_rng(10).standard_normal((5, 4, 3)).astype(np.float32)


class Nested(list[Any]):
    """A subclass of list."""


class Stranger:
    """An array of a framework that mbn does not know."""

    shape = (5, 4)
    dtype = np.dtype(np.float32)


class Frame(Stranger):
    """A data frame, as those of pandas."""

    def to_numpy(self) -> np.ndarray:
        """Return the values of the data frame."""
        return X


class Sparse(Stranger):
    """A sparse matrix, as those of SciPy."""

    def toarray(self) -> np.ndarray:
        """Return the matrix as a dense array."""
        return X


INPUTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "scalar": (lambda: 1.0, ValueError, r"shape \(\)"),
    "one axis": (lambda: X[0, :, 0], ValueError, r"shape \(4,\)"),
    "four axes": (lambda: X[None], ValueError, r"shape \(1, 5, 4, 3\)"),
    "wrong C": (lambda: X[:, :3], ValueError, "3 channels.*num_features is 4"),
    "wrong C and empty": (lambda: X[:0, :3], ValueError, "3 channels.*num_features is 4"),
    "channels last": (lambda: X.swapaxes(1, 2), ValueError, "axis=-1"),
    "one value per channel": (lambda: X[:1, :, 0], ValueError, "one value per channel"),
    "one value per channel of a sequence": (lambda: X[:1, :, :1], ValueError, "one value per channel"),
    "integers": (lambda: np.ones((5, 4), int), TypeError, "int64"),
    "booleans": (lambda: np.ones((5, 4), bool), TypeError, "bool"),
    "complex": (lambda: np.ones((5, 4), complex), TypeError, "complex128"),
    "objects": (lambda: np.full((5, 4), None), TypeError, "object"),
    "strings": (lambda: np.full((5, 4), "1"), TypeError, "x holds strings"),
    "nested strings": (lambda: [["1"] * 4] * 5, TypeError, "x holds strings"),
    "integers beyond all floats": (lambda: [[10**400] * 4] * 5, ValueError, r"x has .* 10\*\*400, beyond all floats"),
    "text": (lambda: "hello", TypeError, "a str is no array: give an array"),
    "float64": (lambda: X.astype(float), TypeError, "float64"),
    "nested booleans": (lambda: [[True] * 4] * 5, TypeError, "bool"),
    "ragged list": (
        lambda: [[1.0, 2.0, 3.0, 4.0], [1.0]],
        ValueError,
        "x is a list that NumPy makes no array of.*lengths=",
    ),
    "dictionary": (lambda: {"x": X}, TypeError, r"dict.*x\[key\]"),
    "data frame": (Frame, TypeError, r"Frame.*x\.to_numpy\(\)"),
    "sparse matrix": (Sparse, TypeError, r"Sparse.*x\.toarray\(\)"),
    "a kind of list": (lambda: Nested([1.0, 2.0]), ValueError, r"shape \(2,\)"),
    "masked array": (lambda: np.ma.masked_array(X), TypeError, "MaskedArray.*mask=.*opposite sense"),
    "unknown array": (Stranger, TypeError, "Stranger"),
    "None": (lambda: None, TypeError, "None is no array: give an array"),
}


def assert_refused(error: type[Exception], words: str, call: Callable[[], Any]) -> None:
    """Check that a call raises exactly this type of error, no subclass, with these words."""
    with pytest.raises(error, match=words) as caught:
        call()
    assert caught.type is error, f"{caught.type.__name__} passes for {error.__name__}"


@pytest.mark.parametrize("name", INPUTS)
def test_call_rejects_bad_input(target: Target, name: str) -> None:
    make, error, words = INPUTS[name]
    bn = configured(target.layer(4), seed=5)
    before = target.snapshot(bn)
    assert_refused(error, words, lambda: bn(make()))
    assert_refused(error, words, lambda: bn.apply(bn.params, bn.state, make(), training=True))
    assert_same(before, target.snapshot(bn))


@pytest.mark.parametrize("name", ["one axis", "wrong C", "one value per channel"])
def test_call_rejects_bad_array_of_the_backend(target: Target, name: str) -> None:
    make, error, words = INPUTS[name]
    bn = configured(target.layer(4), seed=5)
    before = target.snapshot(bn)
    assert_refused(error, words, lambda: bn(target.array(make())))
    assert_same(before, target.snapshot(bn))


def test_rejected_first_input_leaves_num_features_unknown(target: Target) -> None:
    bn = target.layer(None)
    for refused in (X[0, :, 0], X.astype(int), X[:1, :, 0]):
        with pytest.raises((TypeError, ValueError)):
            bn(refused)
        assert bn.num_features is None
    bn(target.array(X))
    assert int(bn.num_batches_tracked) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_features": 0}, ValueError, "at least 1, not 0"),
        ({"num_features": -3}, ValueError, "at least 1, not -3"),
        ({"num_features": 4.0}, TypeError, "int.*4.0"),
        ({"num_features": "4"}, TypeError, "int.*'4'"),
        ({"num_features": True}, TypeError, "int.*True"),
        ({"num_features": 2**63}, ValueError, "num_features is .* at most .*, not 9223372036854775808"),
        ({"num_features": -(10**5000)}, ValueError, r"at least 1, not -10\*\*5000"),
        ({"axis": 10**5000}, ValueError, r"axis is 1 .*, not 10\*\*5000"),
        ({"correction": 10**5000}, ValueError, r"correction is 1 .*, not 10\*\*5000"),
        ({"affine": 10**5000}, TypeError, r"affine is True or False, not 10\*\*5000"),
        ({"eps": [10**5000]}, TypeError, "eps is a real number, not list"),
        ({"dtype": 10**5000}, TypeError, "float32 or float64, not int"),
        ({"eps": -1e-5}, ValueError, "at least 0"),
        ({"eps": math.nan}, ValueError, "nan"),
        ({"eps": math.inf}, ValueError, "inf"),
        ({"eps": "small"}, TypeError, "real number.*'small'"),
        ({"eps": None}, TypeError, "real number.*None"),
        ({"momentum": "0.1"}, TypeError, "real number or None.*'0.1'"),
        ({"momentum": True}, TypeError, "real number or None.*True"),
        ({"momentum": math.nan}, ValueError, "nan"),
        ({"eps": 10**400}, ValueError, "eps.*inf"),
        ({"momentum": -(10**400)}, ValueError, "momentum.*inf"),
        ({"num_features": np.array([1, 2])}, TypeError, "num_features is an int"),
        ({"axis": np.array([1, 2])}, ValueError, "axis is 1"),
        ({"axis": True}, ValueError, "axis is 1"),
        ({"axis": "1"}, ValueError, "axis is 1"),
        ({"correction": np.array([0, 1])}, ValueError, "correction is 1"),
        ({"dtype": ["float32"]}, TypeError, "float32 or float64, not list"),
        ({"affine": "no"}, TypeError, "affine is True or False, not 'no'"),
        ({"track_running_stats": 0}, TypeError, "track_running_stats is True or False, not 0"),
        ({"bias": None}, TypeError, "bias is True or False, not None"),
        ({"axis": 0}, ValueError, "1 or -1|-1 .*not 0"),
        ({"correction": 2}, ValueError, "not 2"),
        ({"dtype": "float16"}, TypeError, "float32 or float64, not float16"),
        ({"dtype": "int32"}, TypeError, "float32 or float64, not int32"),
    ],
)
def test_constructor_rejects_bad_argument(
    target: Target, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    assert_refused(error, words, lambda: target.layer(**{"num_features": 4, **arguments}))


def test_constructor_names_num_features_when_memory_is_short(target: Target) -> None:
    with pytest.raises(MemoryError, match="num_features is 1000000000000000, the number of channels C"):
        target.layer(10**15)


@pytest.mark.parametrize("device", [2**31, -(10**30), 10**5000], ids=["2**31", "-10**30", "10**5000"])
def test_device_given_as_a_number_is_rejected(target: Target, device: int) -> None:
    bn = target.layer(4)
    for call in (
        lambda: mbn.BatchNorm1d(4, backend=target.backend, device=device),
        lambda: bn.to(device),
        lambda: mbn.asarray(X, backend=target.backend, device=device),
    ):
        assert_refused(ValueError, "a device is given by its name.*, not by", call)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("use_bias", "bias"), ("epsilon", "eps"), ("track_stats", "track_running_stats"), ("Momentum", "momentum")],
)
def test_setting_an_unknown_attribute_suggests_the_nearest_name(target: Target, name: str, meant: str) -> None:
    bn = target.layer(4)
    for layer in (bn, copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):  # noqa: S301 - our own
        assert_refused(AttributeError, f"{name!r} to set. Did you mean {meant!r}?", lambda: setattr(layer, name, 1.0))  # noqa: B023
        assert not hasattr(layer, name)


class Named(mbn.BatchNorm1d):
    """A layer with an attribute of its own."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.label = "first"
        super().__init__(*arguments, **options)


def test_subclass_may_have_attributes_of_its_own(target: Target) -> None:
    bn = Named(4, backend=target.backend, device=target.device)
    bn.label += ", trained"
    bn(target.array(X))
    unpickled = pickle.loads(pickle.dumps(bn))  # noqa: S301 - our own
    assert copy.deepcopy(bn).label == unpickled.label == "first, trained"


@pytest.mark.parametrize(("name", "value"), [("eps", -1.0), ("eps", math.nan), ("momentum", math.inf)])
def test_setter_rejects_bad_eps_and_momentum(target: Target, name: str, value: float) -> None:
    bn = target.layer(4)
    before = getattr(bn, name)
    assert_refused(ValueError, name, lambda: setattr(bn, name, value))
    assert getattr(bn, name) == before


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("running_mean", np.zeros(3), ValueError, r"\(3,\).*\(4,\)"),
        ("running_var", np.zeros((4, 1)), ValueError, r"\(4, 1\).*\(4,\)"),
        ("weight", np.full(4, "1"), TypeError, "real numbers"),
        ("bias", np.zeros(4, complex), TypeError, "real numbers"),
        ("weight", None, TypeError, "weight is an array or a number, not None.*affine"),
        ("running_mean", [[1.0], 2.0], ValueError, "running_mean is a list that NumPy makes no array of"),
        ("running_var", np.array([1, np.nan, -1e-30, 1]), ValueError, r"running_var is -1\.0*\d*e-30 in channel 2"),
        ("running_var", -np.inf, ValueError, "running_var is -inf in channel 0"),
        ("num_batches_tracked", 2**63, ValueError, "at most"),
        ("num_batches_tracked", 2**64, ValueError, "18446744073709551616, beyond int64"),
        ("weight", 10**400, ValueError, r"weight has .* 10\*\*400, beyond all floats"),
        ("bias", [0, 0, 0, -(10**400)], ValueError, r"bias has .* -10\*\*400, beyond all floats"),
        ("running_mean", "abc", TypeError, "a str is no array: give an array"),
        ("running_mean", ["abc"] * 4, TypeError, "running_mean is made of real numbers, not strings"),
        ("num_batches_tracked", np.array(2**64 - 1, np.uint64), ValueError, "at most"),
        ("num_batches_tracked", 1.5, TypeError, "integers"),
        ("num_batches_tracked", -1, ValueError, "at least 0"),
        ("num_batches_tracked", np.zeros(4, int), ValueError, r"\(4,\).*\(\)"),
    ],
)
def test_assignment_rejects_bad_value(
    target: Target, name: str, value: Any, error: type[Exception], words: str
) -> None:
    bn = configured(target.layer(4), seed=6)
    before = target.snapshot(bn)
    assert_refused(error, words, lambda: setattr(bn, name, value))
    assert_same(before, target.snapshot(bn))


@pytest.mark.parametrize("value", [1e300, np.full(4, -1e300), [2**1000] * 4])
def test_values_beyond_the_dtype_become_infinite(target: Target, value: Any) -> None:
    bn = target.layer(4)
    with warnings.catch_warnings(action="error"):
        bn.running_mean = value
        bn.load_state_dict({**bn.state_dict(), "weight": np.broadcast_to(np.asarray(value, float), 4)})
    for array in (bn.running_mean, bn.weight):
        np.testing.assert_array_equal(target.numpy(array), np.full(4, np.sign(np.asarray(value, float)) * np.inf))


def test_sample_weight_beyond_the_dtype_is_rejected(target: Target) -> None:
    target.require("masks")
    with warnings.catch_warnings(action="error"):
        call = partial(target.layer(4), target.array(X), sample_weight=[1e300] * 5)
        assert_refused(ValueError, r"sample_weight.* 1e\+300.*finite in float32", call)


def test_attributes_cannot_be_deleted(target: Target) -> None:
    bn = target.layer(4)
    for name in ("weight", "running_var", "num_features"):
        assert_refused(AttributeError, f"{name} of a layer can't be deleted", partial(delattr, bn, name))


def test_assignment_to_an_absent_entry_is_rejected(target: Target) -> None:
    bn = target.layer(4, affine=False, track_running_stats=False)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert_refused(ValueError, f"no {name}", partial(setattr, bn, name, 1))
    assert_refused(ValueError, "no running statistics", bn.freeze)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda entries: entries.pop("running_var"), ValueError, "missing running_var"),
        (lambda entries: entries.update(gamma=np.ones(4)), ValueError, "unexpected gamma"),
        (lambda entries: entries.update(weight=np.ones(5)), ValueError, r"weight.*\(5,\).*\(4,\)"),
        (lambda entries: entries.update(weight=np.float32(1)), ValueError, r"weight.*\(\).*\(4,\)"),
        (lambda entries: entries.update(bias=np.full(4, "x")), TypeError, "bias.*real numbers"),
        (lambda entries: entries["running_var"].put(3, -2), ValueError, r"running_var is -2\.0 in channel 3"),
        (
            lambda entries: entries.update({f"a.{k}": X for k in range(300)}),
            ValueError,
            r"a\.4 and 295 more\..*prefix=",
        ),
        (lambda entries: entries.update(num_batches_tracked=np.array(0.5)), TypeError, "integers"),
    ],
)
def test_load_state_dict_rejects_bad_entries(
    target: Target, change: Callable[[dict[str, Any]], object], error: type[Exception], words: str
) -> None:
    bn = configured(target.layer(4), seed=7)
    before = target.snapshot(bn)
    entries: dict[str, Any] = target.snapshot(configured(target.layer(4), seed=8))
    change(entries)
    assert_refused(error, words, lambda: bn.load_state_dict(entries))
    assert_same(before, target.snapshot(bn))


def test_load_state_dict_rejects_version_2_without_num_batches_tracked(target: Target) -> None:
    bn = configured(target.layer(4), seed=7)
    before = target.snapshot(bn)
    entries = configured(target.layer(4), seed=8).state_dict()
    del entries["num_batches_tracked"]
    assert_refused(ValueError, "missing num_batches_tracked", lambda: bn.load_state_dict(entries))
    assert_same(before, target.snapshot(bn))


def test_running_var_accepts_every_value_that_is_not_negative(target: Target) -> None:
    bn = target.layer(4)
    given = np.array([-0.0, np.nan, np.inf, 1e-45], np.float32)
    bn.running_var = given
    np.testing.assert_array_equal(target.numpy(bn.running_var), given)
    bn.load_state_dict(bn.state_dict())


@pytest.mark.parametrize("value", ["no", None, 1])
def test_boolean_arguments_reject_other_types(target: Target, value: Any) -> None:
    bn, x = configured(target.layer(4), seed=7), target.array(X)
    before = target.snapshot(bn)
    vectors = bn.running_mean, bn.running_var
    for function in (mbn.functional.batch_norm, mbn.functional.batch_norm_vjp):
        call = partial(_functional, function, vectors, x, training=value, backend=target.backend)
        assert_refused(TypeError, "training is True or False", call)
    assert_refused(TypeError, "training is True or False", lambda: bn.apply(bn.params, bn.state, x, training=value))
    assert_refused(TypeError, "training is True or False", lambda: setattr(bn, "training", value))
    assert_refused(TypeError, "strict is True or False", lambda: bn.load_state_dict({}, strict=value))
    assert_refused(TypeError, "progress is True or False", lambda: bn.fit([x], progress=value))
    assert_same(before, target.snapshot(bn))
    bn.apply(bn.params, bn.state, x, training=np.True_)  # type: ignore[arg-type]


def test_error_on_one_value_per_channel_suggests_eval_only_with_running_statistics(target: Target) -> None:
    bn = target.layer(4, track_running_stats=False).eval()
    x = target.array(X[:1, :, 0])
    assert_refused(ValueError, "one value per channel.*none here", lambda: bn(x))
    assert_refused(ValueError, "none here", lambda: mbn.functional.batch_norm(x, training=True, backend=target.backend))
    assert_refused(ValueError, r"one value per channel.*eval\(\)", lambda: target.layer(4)(x))


def test_load_state_dict_rejects_anything_but_a_mapping(target: Target) -> None:
    assert_refused(TypeError, "mapping", lambda: target.layer(4).load_state_dict([("weight", np.ones(4))]))  # type: ignore[arg-type]


def test_apply_without_momentum_rejects_state_without_num_batches_tracked(target: Target) -> None:
    bn = target.layer(4, momentum=None)
    uncounted = bn.state._replace(num_batches_tracked=None)
    assert_refused(ValueError, "needs num_batches_tracked", lambda: bn.apply(bn.params, uncounted, X, training=True))


def test_unknown_num_features_is_named_in_the_error(target: Target) -> None:
    bn = target.layer(None)
    without: list[dict[str, Any]] = [{}, {"weight": 1.0}, {"bias": np.zeros(4)}]
    for entries in without:
        assert_refused(ValueError, "num_features is to come from", partial(bn.load_state_dict, entries))
    assert_refused(AttributeError, "num_features is not known", lambda: bn.weight)
    assert_refused(AttributeError, "num_features is not known", bn.state_dict)


def test_train_rejects_anything_but_a_bool(target: Target) -> None:
    bn = target.layer(4)
    assert_refused(ValueError, "True or False", lambda: bn.train("yes"))  # type: ignore[arg-type]
    assert bn.training is True


FUNCTIONAL: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no statistics": ({}, ValueError, "no running statistics"),
    "one statistic": ({"running_mean": np.zeros(4, np.float32)}, ValueError, "both or neither"),
    "misshapen": (
        {"running_mean": np.zeros(4, np.float32), "running_var": np.ones(3, np.float32)},
        ValueError,
        r"running_var has shape \(3,\)",
    ),
    "mixed dtypes": (
        {"training": True, "weight": np.ones(4, np.float32), "bias": np.ones(4, np.float16)},
        TypeError,
        "bias is float16",
    ),
    "momentum": ({"training": True, "momentum": None}, TypeError, "cumulative"),
    "eps": ({"training": True, "eps": -1.0}, ValueError, "at least 0"),
    "axis": ({"training": True, "axis": 2}, ValueError, "axis"),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_batch_norm_rejects_bad_arguments(target: Target, name: str) -> None:
    arguments, error, words = FUNCTIONAL[name]
    assert_refused(
        error, words, lambda: mbn.functional.batch_norm(target.array(X), **arguments, backend=target.backend)
    )


def test_apply_rejects_bad_params_and_state(target: Target) -> None:
    bn = target.layer(4)
    x = target.array(X)
    short = bn.state._replace(running_mean=target.array(np.zeros(3, np.float32)))
    assert_refused(ValueError, r"running_mean has shape \(3,\)", lambda: bn.apply(bn.params, short, x, training=True))
    uncounted = bn.state._replace(num_batches_tracked=1.5)
    assert_refused(TypeError, "integer scalar, not float", lambda: bn.apply(bn.params, uncounted, x, training=True))
    half = bn.params._replace(weight=np.ones(4, np.float16))
    assert_refused(TypeError, "weight is float16", lambda: bn.apply(half, bn.state, x, training=True))
    for count in (2**63, -(10**5000)):
        beyond = bn.state._replace(num_batches_tracked=count)
        assert_refused(ValueError, "beyond int64; it is at most", lambda: bn.apply(bn.params, beyond, x, training=True))  # noqa: B023
    for params, given in ((None, "NoneType"), ({"weight": 1}, "dict"), (bn.state, "State of 3"), ((), "tuple of 0")):
        words = f"params is a tuple of weight, bias, .*not {given}"
        assert_refused(TypeError, words, lambda: bn.apply(params, bn.state, x, training=True))  # type: ignore[arg-type] # noqa: B023
    words = "state is a tuple of running_mean, running_var, num_batches_tracked, .*not NoneType"
    assert_refused(TypeError, words, lambda: bn.apply(bn.params, None, x, training=True))  # type: ignore[arg-type]


def test_apply_accepts_plain_tuples(target: Target) -> None:
    bn, x = configured(target.layer(4), seed=6), target.array(X)
    y, state = bn.apply(bn.params, bn.state, x, training=True)
    same, after = bn.apply(tuple(bn.params), list(bn.state), x, training=True)  # type: ignore[arg-type]
    assert type(after) is type(state)
    for one, other in zip((y, *state), (same, *after), strict=True):
        np.testing.assert_array_equal(target.numpy(one), target.numpy(other))


BOOLEANS, ONES = np.ones((5, 3), bool), np.ones((5, 3), np.float32)
MASKS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "mask of numbers": ({"mask": ONES}, TypeError, "mask is float32.*mask != 0"),
    "mask of integers": ({"mask": ONES.astype(int)}, TypeError, "mask is int64.*mask != 0"),
    "mask of x's shape": ({"mask": np.ones((5, 4, 3), bool)}, ValueError, r"mask has shape \(5, 4, 3\).*\(5, 3\)"),
    "mask transposed": ({"mask": BOOLEANS.T}, ValueError, r"mask has shape \(3, 5\).*\(5, 3\)"),
    "mask of too many rows": ({"mask": np.ones(6, bool)}, ValueError, r"mask has shape \(6,\).*\(5,\)"),
    "mask of columns": ({"mask": np.ones(3, bool)}, ValueError, r"mask has shape \(3,\).*\(5,\)"),
    "mask that is one": ({"mask": True}, ValueError, r"mask has shape \(\)"),
    "mask of strings": ({"mask": np.full(5, "yes")}, TypeError, r"mask holds strings.*np\.asarray\(mask\) == 'yes'"),
    "mask of None": ({"mask": [None, True, True, True, True]}, TypeError, "mask holds Python objects.*be bool"),
    "mask of an unknown kind": ({"mask": Stranger()}, TypeError, "Stranger"),
    "fractional lengths": ({"lengths": np.ones(5)}, TypeError, "lengths is float64.*integers"),
    "boolean lengths": ({"lengths": np.ones(5, bool)}, TypeError, "lengths is bool.*integers"),
    "lengths beyond x": ({"lengths": np.array([3, 3, 4, 0, 1])}, ValueError, "lengths.* 4.*0 to 3"),
    "lengths far beyond x": (
        {"lengths": np.array([3, 3, 2**32 + 1, 0, 1])},
        ValueError,
        "lengths.* 4294967297.*0 to 3",
    ),
    "lengths beyond int64": (
        {"lengths": np.array([3, 3, 2**64 - 1, 0, 1], np.uint64)},
        ValueError,
        "lengths.* 18446744073709551615.*0 to 3",
    ),
    "mask as text": ({"mask": "yes"}, TypeError, "mask holds strings; it has to be bool.*compare"),
    "lengths of a list beyond int64": ({"lengths": [3, 2**64, 2, 1, 0]}, ValueError, "lengths.* 184.*int64.*0 to 3"),
    "lengths NumPy makes floats of": ({"lengths": [3, 2**63, 2, 1, 0]}, ValueError, "lengths.* 922.*int64.*0 to 3"),
    "lengths beyond all floats": ({"lengths": [3, 10**9999, 2, 1, 0]}, ValueError, r"10\*\*9999, beyond int64"),
    "mask of a list of integers": ({"mask": [1, 1, 0, 1, 1]}, TypeError, r"mask is int64.*np\.asarray\(mask\) != 0"),
    "ragged mask": ({"mask": [[True], [True, False]]}, ValueError, "mask is a list that NumPy makes no array of"),
    "lengths below 0": ({"lengths": np.array([3, -1, 2, 0, 1])}, ValueError, "lengths.* -1.*0 to 3"),
    "too few lengths": ({"lengths": np.array([3, 3])}, ValueError, r"lengths has shape \(2,\).*\(5,\)"),
    "lengths of places": ({"lengths": np.ones((5, 3), int)}, ValueError, r"lengths has shape \(5, 3\).*\(5,\)"),
    "lengths of None": ({"lengths": [3, None, 2, 1, 0]}, TypeError, "lengths holds Python objects"),
    "negative weight": ({"sample_weight": -ONES}, ValueError, r"sample_weight.* -1\.0.*at least 0"),
    "weight of NaN": ({"sample_weight": ONES * np.nan}, ValueError, "sample_weight.* nan.*finite"),
    "infinite weight": ({"sample_weight": ONES * np.inf}, ValueError, "sample_weight.* inf.*finite"),
    "negative whole weight": ({"sample_weight": np.array([1, 2, -3, 0, 0])}, ValueError, "sample_weight.* -3"),
    "boolean weights": ({"sample_weight": BOOLEANS}, TypeError, "sample_weight is bool.*real numbers"),
    "complex weights": ({"sample_weight": ONES * 1j}, TypeError, "sample_weight is complex.*real numbers"),
    "weights as text": ({"sample_weight": ["1"] * 5}, TypeError, "sample_weight holds strings.*real numbers"),
    "weights beyond all floats": ({"sample_weight": [10**400] * 5}, ValueError, "sample_weight.*beyond all floats"),
    "weights of channels": ({"sample_weight": np.ones(4)}, ValueError, r"sample_weight has shape \(4,\).*\(5,\)"),
    "one weight": ({"sample_weight": 1.0}, ValueError, r"sample_weight has shape \(\)"),
    "the second of two": ({"mask": BOOLEANS, "lengths": np.full(5, 9)}, ValueError, "lengths.* 9.*0 to 3"),
}


def _functional(function: Callable[..., Any], vectors: tuple[Any, Any], x: Any, **arguments: Any) -> Any:
    return function(x, *vectors, **arguments)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_calls_reject_bad_mask_arguments(target: Target, name: str, *, training: bool) -> None:
    target.require("masks")
    arguments, error, words = MASKS[name]
    bn = configured(target.layer(4), seed=9).train(training)
    before = target.snapshot(bn)
    x = target.array(X)
    vectors = bn.running_mean, bn.running_var
    functions = mbn.functional.batch_norm, mbn.functional.batch_norm_vjp
    calls: list[Callable[..., Any]] = [
        bn,
        bn.vjp,
        partial(bn.apply, bn.params, bn.state, training=training),
        *(partial(_functional, each, vectors, training=training, backend=target.backend) for each in functions),
    ]
    for call in calls:
        assert_refused(error, words, partial(call, x, **arguments))
    lazy = target.layer(None)
    assert_refused(error, words, lambda: lazy(x, **arguments))
    assert lazy.num_features is None
    assert_same(before, target.snapshot(bn))


@pytest.mark.parametrize(
    "name",
    [
        "mask of integers",
        "mask transposed",
        "lengths beyond x",
        "lengths below 0",
        "negative weight",
        "weight of NaN",
        "boolean weights",
    ],
)
def test_call_rejects_bad_mask_arguments_of_the_backend(target: Target, name: str) -> None:
    target.require("masks")
    arguments, error, words = MASKS[name]
    bn = configured(target.layer(4), seed=9)
    before = target.snapshot(bn)
    words = words.replace("int64", "int(32|64)")
    assert_refused(error, words, lambda: bn(target.array(X), **target.arrays(arguments)))
    assert_same(before, target.snapshot(bn))


def test_call_rejects_lengths_for_rows(target: Target) -> None:
    target.require("masks")
    bn = target.layer(4)
    assert_refused(ValueError, r"lengths.*\(N, C\).*mask", lambda: bn(X[:, :, 0], lengths=np.ones(5, int)))


def test_masks_and_gradients_on_another_device_are_rejected(target: Target) -> None:
    target.require("masks")
    here, *others = (Target(target.backend, device) for device in target.capabilities.devices)
    if not others:
        pytest.skip(f"{target.backend.name} declares one device")
    bn = here.layer(4)
    _, pullback = bn.vjp(here.array(X))
    before = target.snapshot(bn)
    for name in ("mask of rows", "lengths", "weights of rows"):
        arguments = others[0].arrays(strategies.maskings((5, 3))[name].arguments)
        assert_refused(ValueError, "(mask|lengths|sample_weight) is on", partial(bn, here.array(X), **arguments))
    assert_refused(ValueError, "dy is on", lambda: pullback(others[0].array(X)))
    assert_same(before, target.snapshot(bn))


def test_call_with_a_mask_rejects_bad_input(target: Target) -> None:
    target.require("masks")
    bn = configured(target.layer(4), seed=9)
    before = target.snapshot(bn)
    for x, error in ((X[:, :3], ValueError), (X.astype(int), TypeError), (X[0], ValueError)):
        with pytest.raises(error):
            bn(x, mask=BOOLEANS)
    assert_same(before, target.snapshot(bn))


@pytest.mark.parametrize(
    "arguments",
    [{"mask": np.ones(5, bool)}, {"lengths": np.full(5, 3)}, {"sample_weight": np.ones(5, np.float32)}],
    ids=["mask", "lengths", "sample_weight"],
)
def test_masks_are_rejected_unless_declared(target: Target, arguments: dict[str, np.ndarray]) -> None:
    if target.capabilities.masks:
        pytest.skip(f"{target.backend.name} declares masks")
    bn = configured(target.layer(4), seed=9)
    before = target.snapshot(bn)
    words = f"{target.backend.name} declares no masks"
    for call in (bn, bn.vjp, partial(bn.apply, bn.params, bn.state, training=True)):
        assert_refused(TypeError, words, partial(call, target.array(X), **arguments))
    assert_same(before, target.snapshot(bn))


GRADIENTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "one row": (lambda: X[:1], ValueError, r"dy has shape \(1, 4, 3\).*\(5, 4, 3\)"),
    "channels last": (lambda: X.swapaxes(1, 2), ValueError, r"dy has shape \(5, 3, 4\).*\(5, 4, 3\)"),
    "a number": (lambda: 1.0, ValueError, r"dy has shape \(\)"),
    "another dtype": (lambda: X.astype(np.float16), TypeError, "dy is float16.*float32"),
    "a wider dtype": (lambda: X.astype(float), TypeError, "dy is float64.*float32"),
    "integers": (lambda: X.astype(int), TypeError, "dy is int64.*float32"),
    "booleans": (lambda: X > 0, TypeError, "dy is bool"),
    "strings": (lambda: X.astype(str), TypeError, "dy is str"),
    "None": (lambda: None, TypeError, "None is no array"),
    "unknown array": (Stranger, TypeError, "Stranger"),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_pullback_rejects_bad_dy(target: Target, name: str) -> None:
    make, error, words = GRADIENTS[name]
    bn = configured(target.layer(4), seed=10)
    _, pullback = bn.vjp(target.array(X))
    before = target.snapshot(bn)
    expected = [target.numpy(gradient) for gradient in pullback(target.array(X))]
    assert_refused(error, words, lambda: pullback(make()))
    assert_same(before, target.snapshot(bn))
    for gradient, value in zip(pullback(target.array(X)), expected, strict=True):
        np.testing.assert_array_equal(target.numpy(gradient), value)


def test_pullback_of_an_empty_batch_rejects_other_shapes(target: Target) -> None:
    _, pullback = target.layer(4).vjp(target.array(X[:0]))
    assert_refused(ValueError, r"dy has shape \(5, 4, 3\).*\(0, 4, 3\)", lambda: pullback(X))


@pytest.mark.parametrize("name", INPUTS)
def test_vjp_rejects_bad_input(target: Target, name: str) -> None:
    make, error, words = INPUTS[name]
    bn = configured(target.layer(4), seed=11)
    before = target.snapshot(bn)
    assert_refused(error, words, lambda: bn.vjp(make()))
    assert_same(before, target.snapshot(bn))


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_batch_norm_vjp_rejects_bad_arguments(target: Target, name: str) -> None:
    arguments, error, words = FUNCTIONAL[name]
    assert_refused(
        error, words, lambda: mbn.functional.batch_norm_vjp(target.array(X), **arguments, backend=target.backend)
    )
