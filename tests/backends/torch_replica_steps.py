"""The functions that ranks of torch.distributed carry out for tests of replicas."""

import contextlib
import copy
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad
import torch.distributed as dist

import mbn

C = 3
SHORT = 1.5
"""Seconds of a group whose collectives fail in a test."""
REFUSED = {
    "another number of channels": lambda x: x[:, :2],
    "an integer dtype": lambda x: x.to(torch.int32),
    "a dtype that would lose precision": lambda x: x.double(),
    "another device": lambda x: x.to("meta"),
    "host data of another shape": lambda _: [[1.0, 2.0]],
}
"""Inputs that a layer refuses."""


def _compiled_before() -> None:
    """Load the kernels before the ranks fork."""
    for mask in (None, torch.ones(4) > 0):
        y, pullback = mbn.BatchNorm1d(C, backend="torch").vjp(torch.ones(4, C), mask=mask)
        pullback(y)


_compiled_before()


def array(tensor: torch.Tensor | None) -> np.ndarray | None:
    """Return a tensor as an array, also of bfloat16."""
    if tensor is None:
        return None
    return (tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()).numpy().copy()


def layer(dtype: str = "float32", **arguments: Any) -> mbn.BatchNorm1d:
    """Return a layer with parameters and statistics of its own."""
    bn = mbn.BatchNorm1d(C, dtype=dtype, backend="torch", **arguments)
    bn.weight, bn.bias, bn.running_mean, bn.running_var = [1, 2, -3], [0, 1, 2], [5, 6, 7], [1, 2, 3]
    return bn


def state(bn: mbn.BatchNorm1d) -> dict[str, np.ndarray]:
    """Return the entries of a layer."""
    return {key: value.numpy() for key, value in bn.state_dict().items()}


def short_group(*ranks: int) -> Any:
    """Return a group of ranks, by default of all, whose collectives wait a short time."""
    return dist.new_group(ranks or None, timeout=timedelta(seconds=SHORT))


def train(
    x: torch.Tensor, dy: torch.Tensor, mask: torch.Tensor | None, how: str, dtype: str, group: Any = True
) -> dict[str, Any]:
    """Take one step of a layer; return output, gradients and entries."""
    bn = layer(dtype, group=group)
    if how == "vjp":
        y, pullback = bn.vjp(x, mask=mask)
        gradients = pullback(dy)
    else:
        x = x.clone().requires_grad_()
        y = bn(x, mask=mask)
        gradients = torch.autograd.grad(y, (x, bn.weight, bn.bias), dy)
    return {"y": array(y), **dict(zip(("dx", "dweight", "dbias"), map(array, gradients), strict=True)), **state(bn)}


def derivatives(x: torch.Tensor, dy: torch.Tensor, v: torch.Tensor, group: Any = True) -> list[np.ndarray]:
    """Return the gradients of a step, and those of a function of them."""
    bn = layer("float64", group=group)
    x, dy = x.clone().requires_grad_(), dy.clone().requires_grad_()
    first = torch.autograd.grad(bn(x), (x, bn.weight), dy, create_graph=True)
    scalar = (first[0] * v).sum() + (first[1] * bn.bias).sum()  # linear in the local gradient of the weight
    second = torch.autograd.grad(scalar, (x, dy), create_graph=True)
    third = torch.autograd.grad((second[0] * v).sum(), (x,))
    return [tensor.detach().numpy() for tensor in (*first, *second, *third)]


def transformed(x: torch.Tensor, v: torch.Tensor, group: Any = True) -> list[np.ndarray]:
    """Return derivatives by ``torch.func``, in reverse, forward and mixed mode."""
    bn = layer("float64", group=group)
    params, own = mbn.Params(*(value.detach() for value in bn.params)), bn.state

    def y(x: torch.Tensor) -> torch.Tensor:
        return bn.apply(params, own, x, training=True)[0]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (y(x) * v).pow(3).sum()

    def along(x: torch.Tensor) -> torch.Tensor:
        return (torch.func.jvp(y, (x,), (v,))[1] * v).sum()

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.unpack_dual(y(torch.autograd.forward_ad.make_dual(x, v)))
    found = (
        torch.func.grad(loss)(x),
        torch.func.jvp(torch.func.grad(loss), (x,), (v,))[1],
        torch.func.grad(lambda x: (torch.func.grad(loss)(x) * v).sum())(x),
        torch.func.grad(along)(x),
        dual.tangent,
    )
    return [tensor.detach().numpy() for tensor in found]


def in_subgroup(x: torch.Tensor) -> Any:
    """Train in a group of the ranks 0 and 2; return the entries, or the error of another rank."""
    group = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        return [_error(lambda: layer(group=group)), _error(lambda: setattr(layer(), "group", group))]
    bn = layer(group=group)
    bn(x)
    return state(bn)


def _error(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:  # noqa: BLE001 - it is returned
        return f"{type(error).__name__}: {error}"
    return "no error"


def evaluate_alone() -> Any:
    """Evaluate, and train frozen, on rank 0 alone, which would wait for others if it communicated."""
    if dist.get_rank():
        return None
    bn = layer(group=short_group(0) if dist.get_world_size() == 1 else True)
    x = torch.ones(4, C, requires_grad=True)
    before = state(bn)
    bn.eval()(x).sum().backward()
    bn.train().freeze()(x).sum().backward()
    bn.unfreeze().apply(bn.params, bn.state, x, training=False)
    mbn.functional.batch_norm(x, bn.running_mean, bn.running_var, group=True)
    return [before, state(bn)]


def refuse(kind: str, how: str) -> list[Any]:
    """Take a step, one that rank 1 refuses, and another one; return the errors and what changed."""
    bn = layer(group=True)
    x = torch.arange(12.0).reshape(4, C)
    bn(x)
    before = state(bn)
    own = REFUSED[kind](x) if dist.get_rank() == 1 and kind in REFUSED else x
    mask = {"mask": torch.ones(3) > 0} if kind == "mask" and dist.get_rank() == 1 else {}
    steps = {
        "call": lambda: bn(own, **mask),
        "vjp": lambda: bn.vjp(own, **mask),
        "apply": lambda: bn.apply(bn.params, bn.state, own, training=True, **mask),
        "module": lambda: bn.as_module()(own, **mask),
        "function": lambda: mbn.functional.batch_norm(
            own, *bn.state[:2], *bn.params, training=True, group=True, **mask
        ),
    }
    start = time.monotonic()
    error = _error(steps[how])
    is_kept = all(np.array_equal(state(bn)[key], value) for key, value in before.items())
    took = time.monotonic() - start
    bn(x)
    return [error, is_kept, took, state(bn)]


def refuse_backward() -> str:
    """Return the error of a pullback that rank 0 refuses."""
    _, pullback = layer(group=True).vjp(torch.arange(12.0).reshape(4, C))
    return _error(lambda: pullback(torch.ones(4 + (dist.get_rank() == 0), C)))


def differ(kind: str) -> list[Any]:
    """Return the errors of a layer that differs in rank 1, of the first step and of the next."""
    own = dist.get_rank() == 1
    features, dtype = 4 if own and kind == "channels" else 3, "float64" if own and kind == "dtype" else "float32"
    bn = mbn.BatchNorm1d(features, dtype=dtype, group=True, backend="torch")
    x = torch.ones(4, features)
    errors = [_error(lambda: bn(x)) for _ in range(2)]
    return [*errors, int(bn.num_batches_tracked)]


def change_order() -> list[str]:
    """Call two layers in another order in rank 1, after one step of each."""
    layers = [layer(group=True) for _ in range(2)]
    x = torch.arange(12.0).reshape(4, C)
    for bn in layers:
        bn(x)
    return [_error(partial(bn, x)) for bn in (layers if dist.get_rank() else layers[::-1])]


def miss(kind: str) -> Any:
    """Train in a group from which rank 1 stays away, or whose process it ends; return the error and the time."""
    group = short_group()
    model = torch.nn.Sequential(torch.nn.Linear(C, C), layer().as_module())
    mbn.synchronize(model, group)
    x = torch.randn(4, C)
    model(x)
    if dist.get_rank() == 1:
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(2 * SHORT)
        return None
    before = state(model[1].layer)
    start = time.monotonic()
    error = _error(lambda: model(x))
    took = time.monotonic() - start
    return [error, took, all(np.array_equal(state(model[1].layer)[key], value) for key, value in before.items())]


def train_without_gradients(how: str) -> list[Any]:
    """Train where rank 1 records no gradient: of x, of anything, or at all."""
    bn = layer(group=True)
    own = dist.get_rank() == 1
    x = torch.randn(4, C, generator=torch.Generator().manual_seed(dist.get_rank()))
    x.requires_grad_(not own)
    if own and how == "no tensor":
        for parameter in bn.parameters():
            parameter.requires_grad_(False)
    dy = torch.randn(4, C, generator=torch.Generator().manual_seed(7 + dist.get_rank()))
    if own and how == "no_grad":
        with torch.no_grad():
            bn(x)
        return [None, "no error"]
    y = bn(x)
    return [None if own else x, _error(lambda: (y * dy).sum().backward()), x.grad, x.detach(), dy]


def copies() -> dict[str, Any]:
    """Return what copies, pickles and state_dicts of layers do with a group."""
    x = torch.arange(12.0).reshape(4, C) + dist.get_rank()
    of_world, of_group = layer(group=True), layer(group=dist.new_group())
    copied, pickled = copy.deepcopy(of_group), pickle.loads(pickle.dumps(of_world))
    module = copy.deepcopy(of_group.as_module())
    for bn in (of_world, copied, pickled):
        bn(x)
    module(x)
    detached = pickle.loads(pickle.dumps(of_group))
    evaluated = array(detached.eval()(x))
    error = _error(lambda: detached.train()(x))
    detached.group = None
    detached(x)
    return {
        "keys": list(of_group.state_dict()) + list(module.state_dict()),
        "states": [state(bn) for bn in (of_world, copied, pickled, module.layer)],
        "is shared": copied.group is of_group.group and module.group is of_group.group and pickled.group is True,
        "evaluated": np.array_equal(evaluated, array(of_group.eval()(x))),
        "error": error,
        "local": state(detached),
    }


# The module and Torch's tools.


def a_model(**arguments: Any) -> torch.nn.Sequential:
    """Return a model, the same on all ranks."""
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(4, C), layer(**arguments).as_module(), torch.nn.Tanh(), torch.nn.Linear(C, 2)
    )


def gradients_of(model: Any, x: torch.Tensor, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Return the gradients of all parameters for a loss that is a mean over the samples, times ``scale``."""
    model.zero_grad()
    (model(x).square().sum(1).mean() * scale).backward()
    return {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}


def parallel(x: torch.Tensor, total: int) -> Any:
    """Return gradients under DistributedDataParallel, and the entries after it."""
    model = torch.nn.parallel.DistributedDataParallel(a_model(group=True))
    found = gradients_of(model, x, dist.get_world_size() * len(x) / total)
    return {name.removeprefix("module."): value for name, value in found.items()}, state(model.module[1].layer)


def sharded(x: torch.Tensor, total: int, kind: str) -> Any:
    """Return gradients under FSDP, in either of its forms, and the entries after it."""
    scale = dist.get_world_size() * len(x) / total
    model: Any = a_model(group=True)
    module = model[1]
    if kind == "fully_shard":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (model[0], model[1], model[3]):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        (model(x).square().sum(1).mean() * scale).backward()
        gradients = {name: value.grad.full_tensor().numpy() for name, value in model.named_parameters()}
    else:
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        (model(x).square().sum(1).mean() * scale).backward()
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            gradients = {name: value.grad.clone().numpy() for name, value in model.module.named_parameters()}
    return gradients, {name: value.detach().clone().numpy() for name, value in module.named_buffers()}


def checkpointed(x: torch.Tensor, total: int, use_reentrant: bool) -> Any:
    """Return gradients with activation checkpointing, and the entries after it."""
    from torch.utils.checkpoint import checkpoint

    model = a_model(group=True)
    model.zero_grad()
    y = checkpoint(model[:3], x.clone().requires_grad_(), use_reentrant=use_reentrant)
    (model[3](y).square().sum() / total).backward()
    return {name: value.grad.numpy() for name, value in model.named_parameters()}, state(model[1].layer)


def functional_call(x: torch.Tensor, total: int) -> Any:
    """Return gradients by ``torch.func.functional_call``, and the buffers that it leaves alone."""
    model = a_model(group=True)
    parameters = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    y = torch.func.functional_call(model, (parameters, buffers), (x,))
    found = torch.autograd.grad(y.square().sum() / total, list(parameters.values()))
    after = {name.removeprefix("1."): value.numpy() for name, value in buffers.items()}
    return dict(zip(parameters, (value.numpy() for value in found), strict=True)), after


def compiled(xs: list[torch.Tensor], totals: list[int], backend: str) -> Any:
    """Return gradients of compiled steps, the entries after them, and the number of compilations after each step."""
    import torch._dynamo.testing

    torch._dynamo.reset()
    model = a_model(group=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    run = torch.compile(model, fullgraph=True, backend=counter)
    found = []
    frames = []
    for x, total in zip(xs, totals, strict=True):
        model.zero_grad()
        (run(x).square().sum() / total).backward()
        found.append({name: value.grad.numpy().copy() for name, value in model.named_parameters()})
        frames.append(counter.frame_count)
    return found, state(model[1].layer), frames


def compiled_without_gradients(x: torch.Tensor, dy: torch.Tensor, needed: list[bool], backend: str) -> Any:
    """Return the gradients of a compiled step where x needs one on some ranks, and the error of the backward pass."""
    torch._dynamo.reset()
    bn = layer(group=True)
    run = torch.compile(bn.as_module(), fullgraph=True, backend=backend)
    x = x.clone().requires_grad_(needed[dist.get_rank()])
    y = run(x)
    error = _error(lambda: y.backward(dy))
    return error, array(bn.weight.grad), array(x.grad)


def compiled_faults() -> list[str]:
    """Return the errors of compiled steps: where rank 1 refuses, where it is not compiled, and where it stays away."""
    torch._dynamo.reset()
    group = dist.new_group()
    bn = layer(group=group)
    module = bn.as_module()
    run = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, C)
    run(x)
    own = dist.get_rank() == 1
    errors = [_error(lambda: module(x[:, :2]) if own else run(x)), _error(lambda: module(x) if own else run(x))]
    run(x)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=SHORT), group)  # compilers take longer
    before = state(bn)
    if own:
        time.sleep(2 * SHORT)
        return errors
    errors.append(_error(lambda: run(x)))
    assert all(np.array_equal(state(bn)[key], value) for key, value in before.items())
    return errors


# Random steps and faults.


def random_steps(seed: int, number: int) -> list[bytes]:
    """Return the bits of the entries after each of some random steps with shards of random sizes."""
    common, own = np.random.default_rng(seed), np.random.default_rng([seed, dist.get_rank()])
    features = int(common.integers(1, 9))
    dtype = str(common.choice(["float32", "float64"]))
    bn = mbn.BatchNorm1d(features, dtype=dtype, group=True, backend="torch", momentum=[0.1, None][common.integers(2)])
    found = []
    for _ in range(number):
        length = int(common.integers(3))
        kinds = ["float16", "float32", *["float64"] * (dtype == "float64")]
        rows = int(own.choice([0, 1, 2, 17, 200]))
        values = own.standard_normal((rows, features, *[length] * (length > 0))) * 10.0 ** own.integers(-3, 3)
        x = torch.from_numpy(values + common.choice([0, 1e3])).to(getattr(torch, str(common.choice(kinds))))
        mask = {"mask": torch.from_numpy(own.random(rows) < 0.7)} if own.random() < 0.3 else {}
        try:
            if common.random() < 0.5:
                x.requires_grad_()
                bn(x, **mask).sum().backward()
            else:
                y, pullback = bn.vjp(x, **mask)
                pullback(y)
        except ValueError as error:
            assert "one value per channel" in str(error)  # noqa: PT017 - all ranks raise it
        found.append(b"".join(value.numpy().tobytes() for value in bn.state))
    return found


FAULTS = ("refuse", "channels", "dtype", "late", "too late", "killed", "interrupted")


@contextlib.contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def fault(kind: str, culprit: int, seed: int, is_first: bool) -> Any:
    """Take a step, if it is not the ``first``, and one with a fault in a rank.

    Returns:
        The error or None, the seconds that the step took, the entries before, after, and of a local step of the
        undivided batch.
    """
    rng = np.random.default_rng(seed)
    size, rank = dist.get_world_size(), dist.get_rank()
    sizes = rng.integers(0, 30, size) + (np.arange(size) == 0) * 2
    whole = torch.from_numpy(rng.standard_normal((int(sizes.sum()), C)).astype(np.float32))
    x = whole.split(sizes.tolist())[rank].clone()
    features, dtype = C, "float32"
    if rank == culprit and kind in {"channels", "dtype"} and is_first:
        features, dtype = (C + 1, dtype) if kind == "channels" else (C, "float64")
    group = short_group()
    bn = mbn.BatchNorm1d(features, dtype=dtype, group=group, backend="torch")
    local = mbn.BatchNorm1d(C, backend="torch")
    if not is_first:
        bn(x)
        local(whole)
    before = state(bn)
    local(whole)
    own = x if features == C else torch.ones(4, features)
    if rank == culprit and kind == "refuse":
        own = list(REFUSED.values())[seed % len(REFUSED)](torch.ones(4, C))
    if rank == culprit and kind in {"channels", "dtype"} and not is_first:
        bn.to(torch.float64) if kind == "dtype" else None
        own = torch.ones(4, C + 1) if kind == "channels" else x
    if rank == culprit and kind in {"late", "too late"}:
        time.sleep(SHORT / 3 if kind == "late" else 2 * SHORT)
    if rank == culprit and kind == "killed":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process
        signal.setitimer(signal.ITIMER_REAL, 10.0 ** rng.uniform(-5, -2.5))
    interrupted = kind == "interrupted" and rank == culprit
    start = time.monotonic()
    error = None
    try:
        with _interrupted_after(10.0 ** rng.uniform(-4.5, -2.5)) if interrupted else contextlib.nullcontext():
            own = own.requires_grad_() if isinstance(own, torch.Tensor) and own.dtype.is_floating_point else own
            bn(own).sum().backward()
    except BaseException as caught:  # noqa: BLE001 - it is returned
        error = f"{type(caught).__name__}: {caught}"
    return error, time.monotonic() - start, before, state(bn), state(local)
