"""The backend of Torch: the border with NumPy, the choice of kernels, and the hooks for autograd, tracing and modules.

The border copies data that Torch cannot share (read-only, reversed or byte-swapped), without a warning or an error.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, cached_property
from typing import Any, ClassVar

import numpy as np
import torch

from mbn.contract import (
    Backend,
    Batch,
    Capabilities,
    Group,
    Held,
    Kernels,
    Operation,
    Params,
    State,
    Stats,
    dtype_name,
    numpy_dtype,
)
from mbn.threads import Exclusive
from mbn_cpu.installed import fastest
from mbn_torch import integration, memory_overlap, operators
from mbn_torch.group import Differentiable, distributed_group, number_of_replicas, operate_by
from mbn_torch.integration import NOT_REGISTERED
from mbn_torch.kernels.cpu import AddressKernels, ArrayBatch, CpuKernels, as_array, computed_output, suit_addresses
from mbn_torch.kernels.eager import EAGER
from mbn_torch.kernels.traceable import TRACEABLE, TraceableKernels
from mbn_torch.module import BatchNorm1d
from mbn_torch.private import (
    CPU,
    common_device,
    copy_all,
    is_backward,
    is_constant,
    is_fake,
    is_recorded,
    is_scripted,
    is_traced,
    is_transformed,
    tree_leaves,
)

_NO_VALUES = (
    "a tensor on the meta device, or of FakeTensorMode, has no values to copy. Give the layer values through its "
    "module, bn.as_module(): to_empty(device=...) and reset_parameters(), or load_state_dict(..., assign=True)."
)
_NOT_TRACEABLE = (
    "torch.fx cannot trace a layer or a function of mbn. Replace the layer by its module, bn.as_module(), which "
    "becomes one node of the graph; or trace Torch's own modules: mbn.replace_batchnorm(model, back=True)."
)


class TorchBackend(Backend):
    """The backend of Torch tensors. Autograd sees through outputs; running statistics are detached."""

    name: ClassVar[str] = "torch"
    version = str(torch.__version__)
    kernels = EAGER

    def __init__(self) -> None:
        for dtype in (*vars(torch).values(), *map(np.dtype, ("float32", "float64", "int64"))):
            if isinstance(dtype, torch.dtype | np.dtype):
                # Dynamo can read the cache of dtype names, but not fill it, and it recompiles when the cache grows.
                dtype_name(dtype)
        operate_by(self)
        operators.operate_by(self)
        _ = self.capabilities  # Dynamo cannot fill this cache either: a cached property takes a lock

    @cached_property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            dtypes=frozenset({"float16", "bfloat16", "float32", "float64"}),
            # Counting does not start CUDA, which would keep a process that only uses the CPU from forking.
            devices=("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))),
            mutable=True,
            strided=True,
            masks=True,
            any_size=True,
            autograd=True,
            vmap=True,
            compile=True,
            modules=True,
            replicas=True,
            out=True,
        )

    def owns(self, x: object) -> bool:
        if isinstance(x, torch.fx.Proxy):
            raise TypeError(_NOT_TRACEABLE)
        return isinstance(x, torch.Tensor)

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> torch.Tensor:
        if device is not None:
            device = _device(device, self.capabilities.devices)
        if isinstance(x, list | int | float) and dtype is not None:  # Dynamo traces this, but not NumPy's arrays
            x = torch.as_tensor(x, dtype=_dtype(dtype), device=device or torch.get_default_device())
        elif not isinstance(x, torch.Tensor):
            # Host data goes to the default device (torch.set_default_device), which Tensor.to below would ignore.
            x = torch.as_tensor(_from_numpy(np.asarray(x)), device=device or torch.get_default_device())
        if x.is_meta and device is not None and device.type != "meta":
            raise ValueError(_NO_VALUES)
        tensor: torch.Tensor = x.to(device=device, dtype=_dtype(dtype))
        return tensor

    def to_numpy(self, x: torch.Tensor) -> np.ndarray:
        if is_fake(x):
            raise ValueError(_NO_VALUES)
        if x.dtype == torch.bfloat16:
            return x.detach().view(torch.int16).numpy(force=True).view(numpy_dtype("bfloat16"))
        return x.numpy(force=True)

    def from_dlpack(self, x: Any) -> torch.Tensor:
        return torch.utils.dlpack.from_dlpack(x)

    @contextmanager
    def exported(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        with torch.cuda.device_of(x):  # Torch exports from the current device alone
            yield x.resolve_neg()  # Torch would export a negated view with the values of its base

    def device(self, x: torch.Tensor) -> torch.device:
        return x.device

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().clone()

    def flaw(self, name: str, x: torch.Tensor) -> str | None:
        if x.layout is torch.strided:
            return None
        return f"{name} is a tensor of layout {x.layout}, whose values are not all in memory. Give {name}.to_dense()."

    def concatenated(self, parts: Sequence[Any]) -> torch.Tensor:
        device = next((part.device for part in parts if isinstance(part, torch.Tensor)), None)
        if device is None or device.type in {"cpu", "meta"}:  # a refused x may be on meta
            return torch.from_numpy(
                super().concatenated([part for part in parts if not (isinstance(part, torch.Tensor) and part.is_meta)])
            )
        wide = [torch.as_tensor(part, dtype=torch.float64, device=device) for part in parts]
        return torch.cat([part.reshape(-1) for part in wide])

    def group(self, given: Any) -> Group:
        return given if isinstance(given, Group) else distributed_group(given)

    def traced_replicas(self, key: str) -> Differentiable | None:
        return Differentiable(key, number_of_replicas(key)) if torch.compiler.is_compiling() else None

    def conflict(self, out: torch.Tensor, x: torch.Tensor) -> str | None:
        return memory_overlap.conflict(out, x)

    def within(self, values: torch.Tensor, low: float, high: float) -> bool | None:
        if is_traced(values):
            return None
        if not values.is_floating_point():
            values = values.to(torch.int64)
        if values.numel() == 0:
            return True
        least, most = torch.stack(values.aminmax()).tolist()  # both are NaN if a value is
        return bool(low <= least and most < high)

    def constant(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    def finish(self, *values: Any) -> None:
        if any(is_fake(leaf) for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)):
            raise ValueError(_NO_VALUES)

    def kernels_for(
        self,
        operation: Operation,
        batch: Batch,
        other: torch.Tensor | None = None,
        vectors: tuple[Any, ...] = (),
        size: int | None = None,
    ) -> tuple[Kernels, Any]:
        """Return the kernels for a call, and the batch in the type that they read.

        | kernels | when and why |
        |---|---|
        | OPERATORS | ``torch.compile`` on the CPU, from 65,536 values on, where training is 6 times as fast as by \
        TRACEABLE and evaluation 2.6 times, for (65536, 256); an operator takes 0.1 ms longer for (32, 64) |
        | TRACEABLE | under all other transformations of Torch, to which the kernels below are opaque |
        | AddressKernels | Numba's fused steps by tensors' addresses: training on (32, 64) takes 23 µs, not 38 |
        | CpuKernels, fused steps | Numba: 4.8 times as fast as its passes for (32, 64), 1.8 times for (1024, 256) |
        | CpuKernels, passes | host memory, any size; NumPy's where Numba is missing |
        | Triton | one GPU: one launch per pass; its gain is not measured, for lack of a GPU |
        | EAGER | all other tensors; TRACEABLE would fail 21 tests of the suite there, by up to 11 ulp |
        """
        if torch.compiler.is_compiling():
            kernels: Kernels = _compiled(operation, batch, other, vectors)
        elif is_transformed() or _needs_traceable(operation, batch, other, vectors):
            kernels = TRACEABLE
        else:
            where = common_device(batch.x, batch.sample_weight, *_read(operation, other, vectors))
            if where == CPU:
                return _on_cpu(operation, batch, other, vectors, size)
            # A recorded graph must hold for every batch, and contain only operations that exporters know.
            elsewhere = TRACEABLE if is_scripted() else EAGER
            kernels = elsewhere if where is None else _on_gpu(where) or EAGER
        if kernels is EAGER or isinstance(kernels, TraceableKernels):
            self._check_layouts(operation, batch.x, vectors)
        return kernels, batch

    def bind(
        self, forward: Callable[..., Any], pullback: Callable[..., Any]
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return integration.bind(self.kernels_for, forward, pullback)

    def _check_layouts(self, operation: Operation, x: torch.Tensor, vectors: tuple[Any, ...]) -> None:
        read = {"x": x}
        if operation in {"train", "evaluate"}:
            (weight, bias), (mean, var, _) = vectors
            read |= {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
        for name, tensor in read.items():
            flaw = None if tensor is None else self.flaw(name, tensor)
            if flaw is not None:
                raise TypeError(flaw)

    def parameter(self, value: torch.Tensor, current: torch.Tensor | None) -> torch.Tensor:
        if torch.compiler.is_compiling():  # ``write`` copies into the existing parameter
            return value
        with torch.inference_mode(mode=False):  # autograd could never record a parameter made in inference mode
            return torch.nn.Parameter(value.detach().clone(), requires_grad=getattr(current, "requires_grad", True))

    def stores(self, before: State, after: State) -> bool:
        if torch.compiler.is_compiling():
            # Dynamo replays stores with real tensors. Without Dynamo, a fake tensor would stay in the layer.
            if not (torch.compiler.is_dynamo_compiling() or any(map(is_fake, before))) and any(map(is_fake, after)):
                raise RuntimeError(NOT_REGISTERED)
            return True
        if is_transformed() and any(map(is_traced, after)) and not any(map(is_traced, before)):
            raise RuntimeError(
                "a layer in training would store running statistics that end with this transformation of torch.func. "
                "Use bn.apply(params, state, x, training=True), which returns the new state, or eval() or freeze()."
            )
        if is_scripted() and any(map(is_constant, before)):
            raise RuntimeError(NOT_REGISTERED)
        return not is_backward()

    def write(self, before: Held, after: Held) -> Held:
        pairs: list[tuple[Any, Any]] = [(old, new) for old, new in zip(before, after, strict=True) if old is not new]
        if not all(isinstance(old, torch.Tensor) and _is_alike(new, old) for old, new in pairs):
            return after
        if torch.compiler.is_compiling():  # an exported program that contains no_grad can be saved, but not loaded
            for old, new in pairs:
                old.detach().copy_(new)
            return before
        with torch.no_grad():
            if is_transformed() or is_scripted():
                for old, new in pairs:
                    old.copy_(new)
            elif pairs:  # one call, so that an interrupt leaves all tensors old or all new
                olds, news = zip(*pairs, strict=True)
                with self.writing():
                    copy_all(news, olds)
        return before

    def writing(self) -> AbstractContextManager[Any]:
        return nullcontext() if torch.compiler.is_compiling() else Exclusive()

    def module(self, layer: Any, adopt: Callable[[Params, State], None]) -> BatchNorm1d:
        return BatchNorm1d(self, layer, adopt)


def _is_alike(value: torch.Tensor, current: torch.Tensor) -> bool:
    return (value.shape, value.dtype, value.device) == (current.shape, current.dtype, current.device)


def _from_numpy(x: np.ndarray) -> torch.Tensor:
    """Return a CPU tensor that shares memory with x where Torch can write and address that memory."""
    addressable = all(stride >= 0 and stride % x.itemsize == 0 for stride in x.strides)
    if not (addressable and x.flags.writeable and x.dtype.isnative):
        x = x.astype(x.dtype.newbyteorder("="))
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _dtype(name: str | None) -> torch.dtype | None:
    dtype = None if name is None else getattr(torch, name, name)
    if isinstance(dtype, str) or not isinstance(dtype, torch.dtype | None):
        raise TypeError(f"Torch has no dtype {name!r}.")
    return dtype


def _device(device: Any, usable: tuple[str, ...]) -> torch.device:
    names = {"cpu:0", "meta", *usable, *(name.partition(":")[0] for name in usable)}
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    # Torch keeps only the last digits of an index in a string, so str(found) may name another device.
    if found is None or str(found) not in names or (isinstance(device, str) and str(found) != device):
        raise ValueError(f"Torch's devices here are {', '.join(usable)}, not {device!r}.")
    return found


def _compiled(operation: Operation, batch: Batch, other: torch.Tensor | None, vectors: tuple[Any, ...]) -> Kernels:
    """Return the kernels that a compiler traces."""
    if operation == "moments" or (operation == "evaluate" and _needs_traceable(operation, batch, other, vectors)):
        return TRACEABLE
    read = _read(operation, other, vectors)
    return operators.OPERATORS if operators.suit(batch.x, batch.sample_weight, *read) else TRACEABLE


def _needs_traceable(operation: Operation, batch: Batch, other: torch.Tensor | None, vectors: tuple[Any, ...]) -> bool:
    """Tell whether a transformation or autograd must trace the kernels themselves.

    Autograd of a step does not count, since its ``autograd.Function`` differentiates all kernels.
    """
    if operation == "pullback":  # dy is batched by torch.autograd.grad(..., is_grads_batched=True)
        return is_traced(other)
    if operation == "evaluate":
        _, state = vectors
        return is_recorded(*state[:2])
    return operation == "moments" and is_recorded(batch.x)


def _read(operation: Operation, other: torch.Tensor | None, vectors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the tensors that a call reads beside those of its batch."""
    if operation == "pullback":
        return other, vectors[0]
    params, state = vectors or ((), ())
    return *params, *state


def _on_cpu(
    operation: Operation, batch: Batch, other: torch.Tensor | None, vectors: tuple[Any, ...], size: int | None
) -> tuple[Kernels, ArrayBatch]:
    own, prepared = fastest(), ArrayBatch(batch)
    if own.takes_addresses and operation != "moments" and suit_addresses(operation, batch, other, vectors):
        return AddressKernels.of(own, own.step_kernels), prepared
    if operation == "pullback":
        vectors = tuple(map(as_array, vectors))
    array = None if other is None else as_array(computed_output(other))
    kernels, _ = own.kernels_for(operation, prepared.arrays, array, vectors, size)
    return CpuKernels.of(own, kernels), prepared


@cache
def _on_gpu(index: int) -> Kernels | None:
    """Return the kernels in Triton, or None if Triton does not work with this GPU.

    Triton is missing from some builds of Torch; it needs a C compiler and a recent enough GPU.
    """
    try:
        from mbn_torch.kernels import gpu

        one = torch.ones((1, 1), device=torch.device("cuda", index))
        gpu.TRITON.normalize(Batch(one), Stats(one[0], one[0], None), Params(None, None), 0.0)
    except ModuleNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001 - the eager kernels work whatever the error is
        message = f"Triton does not work with this GPU, which makes mbn slower: {type(error).__name__}: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None
    return gpu.TRITON
