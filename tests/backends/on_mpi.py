"""Tests of replicas over MPI: each rank runs all of them; test_mpi_replicas.py starts the ranks by mpiexec.

A test that fails on one rank ends all ranks, which would wait for it in the next test. Each test has a communicator of
its own, so that none is left with the messages of another.
"""

import copy
import hashlib
import os
import pickle
import signal
import sys
import time
from functools import partial

import numpy as np
import pytest
from mpi4py import MPI

import mbn
from mbn.conformance import derivatives, oracle
from mbn.conformance.target import Target, assert_same, configured
from mbn.contract import layer_dtype

RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
LAST = SIZE - 1
C, EPS = 5, 1e-5
SHARDS = {2: [37, 964], 3: [37, 964, 0], 4: [37, 963, 0, 1]}[SIZE]
FAULTS = int(os.environ.get("MPI_FAULTS", "6"))
SHORT = "0.3"
"""A timeout in seconds, as the environment variable has it."""


@pytest.fixture
def world():
    return MPI.COMM_WORLD.Dup()


@pytest.fixture(params=["numpy", "numba"])
def target(request):
    return Target.parse(request.param)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setenv("MBN_GROUP_TIMEOUT", SHORT)


def own(values):
    """Return this rank's part of values for all ranks."""
    start = sum(SHARDS[:RANK])
    return values[start : start + SHARDS[RANK]]


def rows(n=8, channels=C, dtype=np.float32):
    return np.random.default_rng(RANK).normal(RANK, 1, (n, channels)).astype(dtype)


def assert_same_on_all_ranks(world, target, *layers):
    for layer in layers:
        first, *others = world.allgather(target.snapshot(layer))
        for other in others:
            assert_same(first, other)


def outcome(function):
    """Return the error that a function raises, or None."""
    try:
        function()
    except BaseException as error:  # noqa: BLE001 - an interrupt too
        return error
    return None


CASES = {
    "float32": ("float32", 0, 1, None),
    "float32, offset, mask": ("float32", 1e6, 1, "mask"),
    "float32, sample weights": ("float32", 0, 1, "sample_weight"),
    "float16, mask": ("float16", 3, 1, "mask"),
    "bfloat16": ("bfloat16", 0, 1, None),
    "float64, sample weights": ("float64", 0, 1, "sample_weight"),
    "float64, offset, mask": ("float64", 1e6, 1, "mask"),
    "float64, squares beyond its range": ("float64", 0, 1e300, None),
}


@pytest.mark.parametrize("length", [None, 3])
@pytest.mark.parametrize("case", CASES)
def test_training_on_shards_is_as_accurate_as_on_the_undivided_batch(world, target, case, length):
    dtype, offset, unit, masking = CASES[case]
    generator = np.random.default_rng(0)
    shape = (sum(SHARDS), C) if length is None else (sum(SHARDS), C, length)
    x, dy = ((offset + generator.standard_normal(shape)) * unit, generator.standard_normal(shape))
    x, dy = (mbn.get_backend("numpy").asarray(values, dtype) for values in (x, dy))
    cells = shape[:1] + shape[2:]
    weights = {
        None: None,
        "mask": generator.random(cells) < 0.7,
        "sample_weight": generator.uniform(0, 2, cells) * (generator.random(cells) < 0.7),
    }[masking]
    if masking == "sample_weight":
        weights = weights.astype(layer_dtype(dtype))
    bn = configured(target.layer(C, dtype=layer_dtype(dtype), eps=EPS, group=world), seed=1)
    before = target.snapshot(bn)
    y, pullback = bn.vjp(own(x), **({} if masking is None else {masking: own(weights)}))
    every = world.gather([y, *pullback(own(dy))])
    assert_same_on_all_ranks(world, target, bn)
    if RANK == 0:
        ys, dxs, *parameters = zip(*every, strict=True)
        weights = None if weights is None else weights.astype(np.float64)
        statistics, weight = (before["running_mean"], before["running_var"]), before["weight"]
        exact = oracle.train(x, *statistics, weight, before["bias"], momentum=0.1, eps=EPS, weights=weights)
        target.assert_output(np.concatenate(ys), exact.y, dtype)
        target.assert_statistic(bn.running_mean, exact.running_mean, bn.dtype)
        target.assert_statistic(bn.running_var, exact.running_var, bn.dtype)
        sums = (np.sum(parts, 0, np.float64).astype(bn.dtype) for parts in parameters)
        gradients = derivatives.gradients(x, dy, weight, eps=EPS, weights=weights)
        target.assert_gradients((np.concatenate(dxs), *sums), gradients, dtype)


def test_functions_take_a_communicator(world, target):
    x, mean, var = rows(), np.zeros(C, np.float32), np.ones(C, np.float32)
    bn = target.layer(C, group=world)
    expected, _ = bn.vjp(x)
    result, _ = mbn.functional.batch_norm_vjp(x, mean, var, training=True, group=world, backend=target.backend)
    np.testing.assert_array_equal(result.output, expected)
    np.testing.assert_array_equal(result.running_var, bn.running_var)


def test_thousand_random_steps_leave_the_same_bits_on_all_ranks(world, target):
    bn, digest = target.layer(C, momentum=None, group=world), hashlib.sha256()
    for step in range(1000):
        generator = np.random.default_rng((step, RANK))
        # Some batches take other kernels than those of the other ranks.
        n = 0 if step % 7 == RANK else int(generator.integers(2, 40_000 if step % 50 == 0 else 60))
        x = generator.normal(100 * generator.standard_normal(), 1, (n, C)).astype(np.float32)
        mask = {"mask": generator.random(n) < 0.8} if step % 5 == 0 else {}
        bn(x, **mask)
        digest.update(b"".join(value.tobytes() for value in target.snapshot(bn).values()))
    assert int(bn.num_batches_tracked) == 1000
    assert len(set(world.allgather(digest.hexdigest()))) == 1


def test_cupy_exchanges_by_way_of_the_host_with_the_results_of_numpy(world, cupy):
    bn, reference = (mbn.BatchNorm1d(C, backend=name, group=world) for name in ("cupy", "numpy"))
    for layer in (bn, reference):
        x = rows() if layer is reference else cupy.asarray(rows())
        y, pullback = layer.vjp(x)
        pullback(y)
    np.testing.assert_allclose(bn.running_mean.get(), reference.running_mean, 1e-6)
    np.testing.assert_allclose(bn.running_var.get(), reference.running_var, 1e-6)
    assert len({state.tobytes() for state in world.allgather(bn.running_var.get())}) == 1


# Communicators.


def test_ranks_of_a_part_of_the_world_share_among_themselves(world, target):
    half = world.Split(RANK % 2)
    bn, alone = target.layer(C, group=half), target.layer(C)
    x = rows()
    bn(x)
    alone(np.concatenate(half.allgather(x)))
    np.testing.assert_allclose(bn.running_mean, alone.running_mean, 1e-6)
    np.testing.assert_allclose(bn.running_var, alone.running_var, 1e-6)
    assert_same_on_all_ranks(half, target, bn)
    means = world.allgather(bn.running_mean.tolist())
    assert means[0] != means[1]


def test_process_outside_of_the_group_is_refused(world, target):
    first = world.Split(0 if RANK == 0 else MPI.UNDEFINED)
    bn = target.layer(C)
    if RANK == 0:
        bn.group = first
        bn(rows())  # one replica alone
    else:
        with pytest.raises(ValueError, match="not part of the group"):
            bn.group = first
        assert bn.group is None


def test_group_that_is_no_communicator_of_processes_is_refused(world, target):
    bn, halves = target.layer(C, group=world), world.Split(RANK == 0)
    across = halves.Create_intercomm(0, world, int(RANK == 0))
    for wrong in (across, world.Get_group(), "data", [world], 3):
        with pytest.raises(TypeError, match="group"):
            bn.group = wrong
    assert bn.group is world


def test_copies_share_the_communicator_and_pickles_do_not(world, target):
    bn = target.layer(C, group=world)
    bn(rows())
    twin = copy.deepcopy(bn)
    assert twin.group == world
    twin(rows())
    assert_same_on_all_ranks(world, target, twin)
    loaded = pickle.loads(pickle.dumps(bn))
    loaded.eval()(rows())
    with pytest.raises(RuntimeError, match=r"set bn\.group"):
        loaded.train()(rows())
    loaded.group = world
    loaded(rows())
    for before, after in zip(twin.state, loaded.state, strict=True):
        np.testing.assert_array_equal(after, before)


def test_true_is_the_world_and_survives_pickling(target):
    bn = pickle.loads(pickle.dumps(target.layer(C, group=True)))
    assert bn.group is True
    bn(rows())
    assert_same_on_all_ranks(MPI.COMM_WORLD, target, bn)


# Faults.

BAD = {
    "channels": lambda: {"x": rows(channels=C + 1)},
    "dtype": lambda: {"x": rows(dtype=np.int32)},
    "precision": lambda: {"x": rows(dtype=np.float64)},
    "mask": lambda: {"x": rows(), "mask": np.ones(3, bool)},
    "weights": lambda: {"x": rows(), "sample_weight": -np.ones(8, np.float32)},
}
"""Inputs that a layer refuses."""


@pytest.mark.parametrize("steps", [0, 2], ids=["at first", "later"])
@pytest.mark.parametrize("bad", BAD)
def test_input_that_one_rank_refuses_raises_on_all_and_changes_no_state(world, target, bad, steps):
    bn = target.layer(C, group=world)
    for _ in range(steps):
        bn(rows())
    before, given = target.snapshot(bn), BAD[bad]() if RANK == LAST else {"x": rows()}
    with pytest.raises((TypeError, ValueError, mbn.ReplicaError)) as error:
        bn(given.pop("x"), **given)
    errors = world.allgather(f"{error.type.__name__}: {error.value}")
    assert error.type is mbn.ReplicaError or RANK == LAST
    assert all(f"rank {LAST}: {errors[LAST]}"[:200] in message for message in errors[:LAST])
    assert_same(before, target.snapshot(bn))
    bn(rows())
    assert_same_on_all_ranks(world, target, bn)


def test_gradient_that_one_rank_refuses_raises_on_all(world, target):
    bn = target.layer(C, group=world)
    y, pullback = bn.vjp(rows())
    dy = np.ones_like(y)
    with pytest.raises(ValueError if RANK == LAST else mbn.ReplicaError, match="dy" if RANK == LAST else "ValueError"):
        pullback(dy[:-1] if RANK == LAST else dy)
    pullback(dy)
    bn(rows())
    assert_same_on_all_ranks(world, target, bn)


def test_gradients_that_one_rank_does_not_compute_raise_on_the_others(world, target):
    bn = target.layer(C, group=world)
    if RANK == LAST:
        bn(rows())
    else:
        y, pullback = bn.vjp(rows())
        with pytest.raises(mbn.ReplicaError, match=f"rank {LAST} computed the step without gradients"):
            pullback(np.ones_like(y))
    bn(rows())
    assert_same_on_all_ranks(world, target, bn)


@pytest.mark.parametrize(
    ("other", "found"),
    [({"num_features": C + 1}, f"{C + 1} channels in float32"), ({"dtype": "float64"}, f"{C} channels in float64")],
    ids=["channels", "dtype"],
)
def test_layers_that_differ_between_ranks_raise_on_all(world, target, other, found):
    arguments = {"num_features": C, "dtype": "float32"} | (other if RANK == LAST else {})
    bn = target.layer(group=world, **arguments)
    before = target.snapshot(bn)
    with pytest.raises(mbn.ReplicaError, match=rf"rank 0 is at .*{C} channels in float32.*rank {LAST} is at .*{found}"):
        bn(rows(channels=arguments["num_features"]))
    assert_same(before, target.snapshot(bn))


def test_layers_in_another_order_raise_on_all(world, target):
    first, second = target.layer(C, group=world), target.layer(C, group=world)
    for bn in (first, second):
        bn(rows())
    with pytest.raises(mbn.ReplicaError, match="the same layers in the same order"):
        (second if RANK == LAST else first)(rows())
    assert_same_on_all_ranks(world, target, first, second)
    first(rows())
    assert_same_on_all_ranks(world, target, first)


@pytest.mark.usefixtures("short")
def test_missing_rank_ends_in_a_timeout_that_names_it_and_a_late_one_changes_nothing(world, target):
    bn = target.layer(C, group=world)
    bn(rows())
    before, start = target.snapshot(bn), time.monotonic()
    if RANK == LAST:
        time.sleep(float(SHORT) + 3)
        with pytest.raises(TimeoutError, match="has waited in vain for this process"):
            bn(rows())
    else:
        with pytest.raises(TimeoutError, match=rf"layer.*\({C} channels, step 1\), rank {RANK}: rank {LAST} did not"):
            bn(rows())
        assert time.monotonic() - start < float(SHORT) + 10  # busy cores
        with pytest.raises(TimeoutError, match="an earlier gather did not complete"):
            bn(rows())
    assert_same(before, target.snapshot(bn))
    bn.group = MPI.COMM_WORLD.Dup()
    bn(rows())
    assert_same_on_all_ranks(world, target, bn)


def interrupted(seconds, function):
    """Call a function, in which an interrupt comes after some seconds."""
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return function()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_interrupted_rank_does_not_wait_and_the_next_step_raises_on_all(world, target):
    bn = target.layer(C, group=world)
    bn(rows())
    before = target.snapshot(bn)
    if RANK == LAST:
        with pytest.raises(KeyboardInterrupt):
            interrupted(0.3, lambda: bn(rows()))
        assert_same(before, target.snapshot(bn))
    else:
        time.sleep(1)
        bn(rows())  # the vector of the interrupted rank has been sent
    with pytest.raises(mbn.ReplicaError, match=f"rank {LAST} is at step 1"):
        bn(rows())


def _late(bn):
    time.sleep(float(SHORT) + 3)
    bn(rows())


def _wrong_gradient(bn):
    y, pullback = bn.vjp(rows())
    pullback(y[:-1])


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def _interrupted(bn):
    bn(rows(), mask=type("Mask", (), {"shape": property(_interrupt), "__array__": _interrupt})())


def _moved(bn):
    copy.deepcopy(bn).to(dtype="float64")(rows())


FAULTY = {
    **{bad: lambda bn, given=given: bn(**{"x": None} | given()) for bad, given in BAD.items()},
    "other channels": lambda bn: mbn.BatchNorm1d(C + 1, backend=bn.backend, group=bn.group)(rows(channels=C + 1)),
    "other dtype": _moved,
    "other layer": lambda bn: mbn.BatchNorm1d(C, backend=bn.backend, group=bn.group)(rows()),
    "gradient": _wrong_gradient,
    "absent": lambda bn: None,
    "late": _late,
    "interrupted": _interrupted,
}


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("number", range(FAULTS))
def test_random_fault_neither_hangs_nor_leaves_different_states(world, target, number):
    generator = np.random.default_rng(number)
    fault, faulty = str(generator.choice(list(FAULTY))), int(generator.integers(SIZE))
    bn = target.layer(C, group=world)
    for _ in range(int(generator.integers(fault == "other layer", 3))):  # at first all layers are alike
        bn(rows())
    before, start = target.snapshot(bn), time.monotonic()

    def step():
        y, pullback = bn.vjp(rows())
        if fault == "gradient":
            pullback(y)

    error = outcome(partial(FAULTY[fault], bn) if faulty == RANK else step)
    assert time.monotonic() - start < float(SHORT) + 3 + 10  # busy cores
    assert isinstance(error, mbn.ReplicaError | TimeoutError) or faulty == RANK, error
    assert error is not None or fault == "absent"
    if fault != "gradient":  # the forward pass was complete
        assert_same(before, target.snapshot(bn))
    assert_same_on_all_ranks(world, target, bn)


class Plugin:
    """Ends all ranks where a test fails on one."""

    def pytest_runtest_logreport(self, report):
        if report.failed:
            print(f"rank {RANK} of {SIZE}: {report.nodeid}\n{report.longreprtext}", file=sys.stderr, flush=True)  # noqa: T201
            MPI.COMM_WORLD.Abort(1)


if __name__ == "__main__":
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:], __file__], plugins=[Plugin()]))
