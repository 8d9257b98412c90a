"""The group of a layer: which it takes, how it is compared, and the messages where other replicas cannot be reached."""

import pickle
from typing import Any

import numpy as np
import pytest

import mbn
from mbn.conformance.thread_group import ThreadGroup
from mbn.replicas import Membership
from mbn_numpy.backend import NumpyBackend

X = np.arange(12, dtype=np.float32).reshape(4, 3)


class Pair(mbn.Group):
    """A group of two replicas, of which the other has the same batch."""

    rank, size = 0, 2

    def gather(self, vector: np.ndarray) -> np.ndarray:
        return np.stack([vector, vector])


class Without(NumpyBackend):
    name = "without"
    capabilities = NumpyBackend.capabilities._replace(replicas=False)


def test_backend_without_replicas_rejects_a_group() -> None:
    with pytest.raises(TypeError, match="without has no replicas"):
        mbn.BatchNorm1d(3, backend=Without(), group=Pair())


def test_membership_is_compared_by_its_group_even_without_a_hash() -> None:
    class Equal(Pair):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Equal)

        __hash__ = None  # type: ignore[assignment]

    first, second = Membership(Equal()), Membership(Equal(), "name")
    assert first == second
    assert hash(first) == hash(second)
    assert first != Membership(Pair())
    assert repr(Membership(True)) == "True"


def test_pickled_group_is_shown_as_detached() -> None:
    bn = pickle.loads(pickle.dumps(mbn.BatchNorm1d(3, backend="numpy", group=Pair())))
    assert "group=<detached" in repr(bn)
    assert pickle.loads(pickle.dumps(bn)).group is bn.group


def test_replicas_hear_of_an_input_that_no_backend_takes() -> None:
    group = ThreadGroup(2)
    layers = [mbn.BatchNorm1d(None, group=group), mbn.BatchNorm1d(3, backend="numpy", group=group)]
    errors = group.outcomes(lambda rank: layers[rank](X if rank else None))
    assert [type(error) for error in errors] == [TypeError, mbn.ReplicaError]
    group.run(lambda rank: layers[rank](X))


def test_open_layer_takes_the_backend_of_a_group_of_torch(tmp_path: Any) -> None:
    dist = pytest.importorskip("torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        bn = mbn.BatchNorm1d(None, group=dist.group.WORLD)
        with pytest.raises(TypeError, match="mpi4py"):
            bn(X)
        assert bn.backend is None
    finally:
        dist.destroy_process_group()


def test_rank_beyond_the_group_is_rejected() -> None:
    class Beyond(Pair):
        rank = 2

    with pytest.raises(ValueError, match="rank 2 of 2 processes"):
        mbn.BatchNorm1d(3, backend="numpy", group=Beyond())(X)


def test_error_says_that_the_other_replicas_could_not_be_told() -> None:
    class Broken(Pair):
        def gather(self, vector: np.ndarray) -> np.ndarray:
            raise OSError("the wire is cut")

    bn = mbn.BatchNorm1d(3, backend="numpy", group=Broken())
    with pytest.raises(ValueError, match="5 channels") as caught:
        bn(np.ones((2, 5), np.float32))
    assert caught.value.__notes__ == ["The other replicas could not be told: OSError: the wire is cut"]
    with pytest.raises(OSError, match="the wire is cut"):
        bn(X)


def test_fit_in_a_group_needs_a_backend_and_channels() -> None:
    for bn in (mbn.BatchNorm1d(3), mbn.BatchNorm1d(None, backend="numpy")):
        with pytest.raises(ValueError, match="make the layer with both"):
            bn.fit([X], group=Pair(), progress=False)


def test_fit_rejects_the_name_of_an_axis() -> None:
    pytest.importorskip("jax")
    with pytest.raises(TypeError, match="an axis within a program"):
        mbn.BatchNorm1d(3, backend="jax").fit([X], group="batch", progress=False)
