"""CuPy's engines on the stand-in: communicators of NCCL among threads on two devices; on_mpi.py has those of MPI."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import mbn

C = 3


def in_two_threads(function):
    """Return the results of a function of a rank and its communicator, each rank in a thread and on a device."""
    import cupy
    from cupyx.distributed import init_process_group

    def replica(rank):
        with cupy.cuda.Device(rank):
            return function(rank, init_process_group(2, rank, port=id(function)))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(replica, range(2)))


def rows(rank):
    return np.random.default_rng(rank).normal(10 * rank, 1, (7 + 5 * rank, C)).astype(np.float32)


@pytest.mark.usefixtures("cupy")
def test_replicas_over_nccl_agree_with_the_undivided_batch():
    def step(rank, communicator):
        bn = mbn.BatchNorm1d(C, backend="cupy", device=f"cuda:{rank}", group=communicator)
        assert bn.group is communicator
        y, pullback = bn.vjp(rows(rank))
        dx, *_ = pullback(y * y)
        return y.get(), dx.get(), bn.running_mean.get(), bn.running_var.get()

    alone = mbn.BatchNorm1d(C, backend="numpy")
    y, pullback = alone.vjp(np.concatenate([rows(0), rows(1)]))
    dx, *_ = pullback(y * y)
    ys, dxs, means, variances = zip(*in_two_threads(step), strict=True)
    np.testing.assert_allclose(np.concatenate(ys), y, 1e-5, 1e-6)
    np.testing.assert_allclose(np.concatenate(dxs), dx, 1e-5, 1e-6)
    for (mine, other), expected in ((means, alone.running_mean), (variances, alone.running_var)):
        np.testing.assert_array_equal(mine, other)
        np.testing.assert_allclose(mine, expected, 1e-6)


@pytest.mark.usefixtures("cupy")
def test_input_that_one_replica_over_nccl_refuses_raises_on_both():
    def step(rank, communicator):
        bn = mbn.BatchNorm1d(C, backend="cupy", device=f"cuda:{rank}", group=communicator)
        with pytest.raises(ValueError if rank else mbn.ReplicaError) as error:
            bn(rows(rank)[:, rank:])
        return str(error.value), int(bn.num_batches_tracked)

    (of_others, _), (own, _) = results = in_two_threads(step)
    assert f"rank 1: ValueError: {own}"[:200] in of_others
    assert [count for _, count in results] == [0, 0]


@pytest.mark.usefixtures("cupy")
def test_missing_replica_over_nccl_ends_in_a_timeout(monkeypatch):
    monkeypatch.setenv("MBN_GROUP_TIMEOUT", "0.2")

    def step(rank, communicator):
        if rank == 0:
            bn = mbn.BatchNorm1d(C, backend="cupy", device="cuda:0", group=communicator)
            with pytest.raises(TimeoutError, match=r"rank 0: another process did not come after 0\.2 s"):
                bn(rows(rank))

    in_two_threads(step)


@pytest.mark.parametrize("wrong", [True, "data"])
def test_group_that_is_no_communicator_for_cupy_is_refused(cupy, wrong):
    bn, x = mbn.BatchNorm1d(C, group=wrong), cupy.asarray(rows(0))
    with pytest.raises(TypeError, match=r"a communicator of cupyx\.distributed\.init_process_group or of mpi4py"):
        bn(x)
