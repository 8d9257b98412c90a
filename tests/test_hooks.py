"""The hooks of a backend that a layer calls, and when: observed with a backend that records its calls."""

import copy
import pickle

import numpy as np
import pytest

import mbn
from mbn_numpy.backend import NumpyBackend

X = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)


class NoteTaker(NumpyBackend):
    """NumPy's backend, with a record of the calls of its hooks."""

    name = "notes"

    def __init__(self):
        self.registered = []
        self.parameters = []
        self.storing = True

    def register(self, layer_type, flatten, unflatten):
        self.registered.append((layer_type, flatten, unflatten))

    def parameter(self, value, current):
        self.parameters.append(current)
        return value

    def stores(self, before, after):
        if isinstance(self.storing, Exception):
            raise self.storing
        assert int(after.num_batches_tracked) == int(before.num_batches_tracked) + 1
        return self.storing


@pytest.fixture
def notes():
    mbn.register_backend("notes", NoteTaker())
    return mbn.get_backend("notes")


@pytest.fixture
def layer_type(monkeypatch):
    """Return a class of layers that is registered with no backend."""
    monkeypatch.setattr("mbn.layer._introduced", set())
    return type("Layer", (mbn.BatchNorm1d,), {})


def test_layer_class_is_registered_once(notes, layer_type):
    first = layer_type(4, backend=notes)
    layer_type(4, backend=notes)
    copy.deepcopy(first)
    assert [kind for kind, _, _ in notes.registered] == [layer_type]
    mbn.BatchNorm1d(4, backend=notes)
    assert [kind for kind, _, _ in notes.registered] == [layer_type, mbn.BatchNorm1d]


def test_first_input_registers_the_class(notes, layer_type):
    bn = layer_type(None)
    assert notes.registered == []
    bn.to(backend=notes)(X)
    assert [kind for kind, _, _ in notes.registered] == [layer_type]


def test_unpickling_registers_the_class(notes, monkeypatch):
    monkeypatch.setattr("mbn.layer._introduced", set())
    pickled = pickle.dumps(mbn.BatchNorm1d(4, backend=notes))
    monkeypatch.setattr("mbn.layer._introduced", set())
    notes.registered.clear()
    pickle.loads(pickled)
    assert [kind for kind, _, _ in notes.registered] == [mbn.BatchNorm1d]


def test_flatten_gives_the_arrays_and_a_hashable_rest(notes, layer_type):
    bn = layer_type(4, axis=-1, momentum=None, backend=notes).freeze().eval()
    ((_, flatten, unflatten),) = notes.registered
    arrays, rest = flatten(bn)
    assert arrays == (bn.params, bn.state)
    assert hash(rest) == hash(flatten(copy.deepcopy(bn))[1])
    assert rest != flatten(copy.deepcopy(bn).train())[1]
    again = unflatten(rest, arrays)
    assert type(again) is layer_type
    assert repr(again) == repr(bn)
    assert (again.training, again.momentum, again.axis) == (False, None, -1)
    np.testing.assert_array_equal(again(X), bn(X))
    assert unflatten(rest, (None, "whatever stands for arrays"))._storage.params is None


def test_parameters_are_created_by_the_backend(notes):
    bn = mbn.BatchNorm1d(4, backend=notes)
    assert notes.parameters == [None, None]
    weight, bias = bn.params
    bn.weight = 2
    bn.load_state_dict(bn.state_dict())
    assert notes.parameters[2] is weight
    assert notes.parameters[-1] is bias


def test_step_that_the_backend_does_not_store_keeps_the_state(notes):
    bn = mbn.BatchNorm1d(4, backend=notes)
    before = bn.state
    notes.storing = False
    np.testing.assert_array_equal(bn(X), mbn.BatchNorm1d(4)(X))
    assert bn.state is before
    bn.eval()(X)
    notes.storing = True
    bn.train().vjp(X)
    assert int(bn.num_batches_tracked) == 1


def test_step_that_cannot_be_stored_changes_nothing(notes):
    bn, lazy = mbn.BatchNorm1d(4, backend=notes), mbn.BatchNorm1d(None, backend=notes)
    before = bn.state
    notes.storing = RuntimeError("this state ends with its trace")
    for call in (bn, bn.vjp, lazy):
        with pytest.raises(RuntimeError, match="ends with its trace"):
            call(X)
    assert bn.state is before
    assert lazy.num_features is None
    bn.apply(bn.params, bn.state, X, training=True)


def test_masks_are_refused_by_a_backend_that_does_not_declare_them(notes, monkeypatch):
    monkeypatch.setattr(NoteTaker, "capabilities", NumpyBackend.capabilities._replace(masks=False))
    bn = mbn.BatchNorm1d(4, backend=notes)
    before = bn.state
    for masking in ({"mask": np.ones(5, bool)}, {"lengths": [1]}, {"sample_weight": np.ones(5)}):
        with pytest.raises(TypeError, match=r"notes declares no masks.*bn\.to"):
            bn(X, **masking)
    assert bn.state is before


def test_out_is_refused_by_a_backend_that_does_not_declare_it(notes, monkeypatch):
    monkeypatch.setattr(NoteTaker, "capabilities", NumpyBackend.capabilities._replace(out=False))
    out = np.zeros_like(X)
    with pytest.raises(TypeError, match="notes declares no out: "):
        mbn.functional.batch_norm(X, np.zeros(4), np.ones(4), out=out, backend=notes)
    assert not out.any()


def test_interrupted_write_of_a_load_changes_nothing(notes, monkeypatch):
    bn = mbn.BatchNorm1d(4, backend=notes)
    before = {name: np.array(values) for name, values in bn.state_dict().items()}
    write, calls = NoteTaker.write, []

    def interrupted(self, before, after):
        calls.append(after)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return write(self, before, after)

    monkeypatch.setattr(NoteTaker, "write", interrupted)
    other = mbn.BatchNorm1d(4, backend="numpy")
    other(X)
    with pytest.raises(KeyboardInterrupt):
        bn.load_state_dict(other.state_dict())
    monkeypatch.undo()
    for name, values in bn.state_dict().items():
        np.testing.assert_array_equal(values, before[name])
