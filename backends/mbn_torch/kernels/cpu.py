"""The kernels of NumPy or Numba on Torch's tensors in host memory.

Arrays share the memory of the tensors. Only halves are copied, unless Numba's passes convert them chunk by chunk: Torch
converts them to float32 and back much faster than NumPy. The arrays are made by DLPack, since ``Tensor.numpy`` would
forbid for good to resize the tensor's storage. New tensors of x's size are allocated by Torch wherever a kernel can
write to them, so that they support all of Torch's operations. The statistics of a training step stay arrays until other
kernels read them.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch

from mbn.contract import Batch, Group, Kernels, Moments, Operation, Params, Settings, State, Stats, dtype_name
from mbn.threads import limited
from mbn_common.channel_stats import Pair, Scaled
from mbn_cpu import memory
from mbn_cpu.backend import HostBackend, few_for_numba
from mbn_cpu.channel_stats import counted
from mbn_cpu.installed import fastest
from mbn_torch.channel_stats import ConcreteKernels
from mbn_torch.private import to_dlpack

_HALVES = torch.float16, torch.bfloat16
_STATISTICS = Pair, Scaled
_KEPT = int, torch.Tensor


class _Shared:
    """A tensor for ``np.from_dlpack``. ``common_device`` has made the checks of ``Tensor.__dlpack__`` already."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None, **_: object) -> Any:
        return to_dlpack(self.tensor, is_versioned=max_version is not None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # the CPU


class ArrayBatch:
    """A batch of tensors, and when kernels ask for it the same values as arrays."""

    __slots__ = ("_arrays", "dtype", "sample_weight", "wide", "x")

    def __init__(self, batch: Batch) -> None:
        """Keep the tensors of a batch; halves are copied to float32, unless the kernels convert them."""
        self.x, self.sample_weight, self.dtype = batch
        self.wide = _wide(self.x)
        self._arrays: Batch | None = None

    @property
    def arrays(self) -> Batch:
        """The batch as arrays that share the memory of ``wide`` and of the weights."""
        if self._arrays is None:
            # Detach, so that autograd does not record the conversion.
            x = self.wide.detach() if self.wide.requires_grad else self.wide
            self._arrays = Batch(as_array(x), as_array(self.sample_weight), self.dtype)
        return self._arrays


class CpuKernels(ConcreteKernels):
    """Kernels of NumPy arrays."""

    def __init__(self, own: HostBackend, kernels: Kernels) -> None:
        """Wrap the kernels of a backend of NumPy arrays."""
        self._own, self._kernels = own, kernels
        self._is_at_once = kernels.train is not None  # fused steps use one thread

    @classmethod
    @cache
    def of(cls, own: HostBackend, kernels: Kernels) -> "CpuKernels":
        """Return the instance for a backend and its kernels, the same each time."""
        return cls(own, kernels)

    def moments(self, batch: ArrayBatch) -> Moments:
        with _limited():
            return Moments(*map(_tensor, self._kernels.moments(batch.arrays)))

    def normalize(
        self, batch: ArrayBatch, stats: Stats, params: Params, eps: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        y = _like(batch.x) if out is None else out
        wide_y = computed_output(y)
        with _limited():
            self._kernels.normalize(batch.arrays, as_array(stats), as_array(params), eps, _writable(wide_y))
        return _narrow(wide_y, y)

    def grad_sums(
        self, dy: torch.Tensor, batch: ArrayBatch, stats: Stats, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with _limited():
            sum_dy, sum_dy_xhat = self._kernels.grad_sums(as_array(_wide(dy)), batch.arrays, as_array(stats), eps)
        return _tensor(sum_dy), _tensor(sum_dy_xhat)

    def grad_input(
        self,
        dy: torch.Tensor,
        batch: ArrayBatch,
        stats: Stats,
        weight: torch.Tensor | None,
        eps: float,
        sums: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        sums = None if sums is None else tuple(map(as_array, sums))
        arguments = as_array(_wide(dy)), batch.arrays, as_array(stats), as_array(weight), eps, sums
        with _limited():
            return _arranged(self._kernels.grad_input(*arguments), batch.x)

    def train(
        self, batch: ArrayBatch, params: Params, state: State, settings: Settings, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, State, Stats]:
        """Return the output and new state of a training step as tensors, and its statistics as arrays."""
        y, after, stats = self._step(batch, params, state, settings, True, out)
        return y, State(*map(_tensor, after)), stats

    def evaluate(
        self, batch: ArrayBatch, params: Params, state: State, settings: Settings, out: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the output of evaluation."""
        return self._step(batch, params, state, settings, False, out)[0]

    def train_together(
        self,
        batch: ArrayBatch,
        params: Params,
        state: State,
        settings: Settings,
        out: torch.Tensor | None,
        replicas: Any,
    ) -> tuple[torch.Tensor, State, Stats]:
        """Return the results of ``train``, for a batch that other replicas have parts of."""
        y, after, stats = self._step(batch, params, state, settings, True, out, _OnArrays(replicas, self._own))
        return y, State(*map(_tensor, after)), stats

    def _step(
        self,
        batch: ArrayBatch,
        params: Params,
        state: State,
        settings: Settings,
        training: bool,
        out: torch.Tensor | None,
        replicas: Any = None,
    ) -> tuple[torch.Tensor, State, Stats]:
        y = _like(batch.x) if out is None else out
        wide_y = computed_output(y)
        vectors = Params(*map(as_array, params)), State(*map(as_array, state))
        with nullcontext() if self._is_at_once else _limited():
            _, state, stats = self._own.forward(
                self._kernels, batch.arrays, *vectors, settings, training, _writable(wide_y), replicas=replicas
            )
        return _narrow(wide_y, y), state, stats

    def pullback(
        self, dy: torch.Tensor, batch: ArrayBatch, weight: torch.Tensor | None, stats: Stats, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of x, weight and bias."""
        arguments = as_array(_wide(dy)), batch.arrays, as_array(weight), as_array(stats), eps
        with nullcontext() if self._is_at_once else _limited():
            dx, dweight, dbias = self._own.pullback(self._kernels, *arguments)
        return _arranged(dx, batch.x), _tensor(dweight), _tensor(dbias)

    def pull_back_together(
        self,
        dy: torch.Tensor,
        batch: Any,
        weight: torch.Tensor | None,
        stats: Stats,
        eps: float,
        needs: tuple[bool, bool, bool],
        replicas: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """Return the results of ``pullback`` as far as needed, for a batch that other replicas have parts of."""
        arguments = as_array(_wide(dy)), batch.arrays, as_array(weight), as_array(stats), eps, needs
        with nullcontext() if self._is_at_once else _limited():
            dx, *sums = self._own.pullback(self._kernels, *arguments, _OnArrays(replicas, self._own))
        return None if dx is None else _arranged(dx, batch.x), *map(_tensor, sums)


class AddressKernels(CpuKernels):
    """Kernels whose fused steps give Numba the addresses of tensors: to make arrays takes longer than a small step."""

    def __init__(self, own: HostBackend, kernels: Any) -> None:
        """Wrap the fused steps of Numba."""
        super().__init__(own, kernels)
        self._steps, self._loops = kernels.steps, kernels.steps.numba_loops

    def train(
        self, batch: ArrayBatch, params: Params, state: State, settings: Settings, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, State, Stats]:
        (mean, var, tracked), weights = state, batch.sample_weight
        sizes, y = self._sizes(batch), _like(batch.x) if out is None else out
        wide_y = computed_output(y)
        if tracked is not None:
            tracked = torch.from_numpy(np.array(counted(tracked.item()), np.int64))
        new, found = np.empty((2, sizes[1]), np.float32), np.empty((3, sizes[1]))
        count = self._loops.train_at(
            batch.wide.numel(),
            batch.wide.data_ptr(),
            _address(weights),
            wide_y.data_ptr(),
            *sizes,
            *map(_address, (*params, mean, var)),
            self._steps.share_of(settings.momentum, tracked),
            settings.eps,
            settings.correction,
            new,
            found,
        )
        if count < 0:
            return super().train(batch, params, state, settings, y)
        if mean is not None:
            mean, var = torch.from_numpy(new[0]), torch.from_numpy(new[1])
        return _narrow(wide_y, y), State(mean, var, tracked), self._steps.statistics_of(found, weights, count)

    def evaluate(
        self, batch: ArrayBatch, params: Params, state: State, settings: Settings, out: torch.Tensor | None
    ) -> torch.Tensor:
        (mean, var, _), (last, c, length, _) = state, self._sizes(batch)
        y = _like(batch.x) if out is None else out
        wide_y = computed_output(y)
        arrays = batch.wide.data_ptr(), _address(batch.sample_weight), wide_y.data_ptr()
        vectors = map(_address, (*params, mean, var))
        if self._loops.normalize_at(batch.wide.numel(), *arrays, last, c, length, *vectors, settings.eps):
            return super().evaluate(batch, params, state, settings, y)
        return _narrow(wide_y, y)

    def pullback(
        self, dy: torch.Tensor, batch: ArrayBatch, weight: torch.Tensor | None, stats: Stats, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dy, dx, sizes = _wide(dy), _like(batch.x), self._sizes(batch)
        wide_dx = computed_output(dx)
        sums = np.empty((2, sizes[1]), np.float64 if weight is None else np.float32)
        arrays = dy.data_ptr(), batch.wide.data_ptr(), _address(batch.sample_weight), wide_dx.data_ptr()
        (hi, lo), var, count = stats
        self._loops.pull_back_at(
            batch.wide.numel(), *arrays, *sizes, _address(weight), hi, lo, var, float(count), eps, sums
        )
        return _narrow(wide_dx, dx), torch.from_numpy(sums[1]), torch.from_numpy(sums[0])

    def _sizes(self, batch: ArrayBatch) -> tuple[bool, int, int, int]:
        sizes: tuple[bool, int, int, int] = self._steps.sizes_of(batch.wide.shape, batch.wide.is_contiguous())
        return sizes


def suit_addresses(operation: Operation, batch: Batch, other: torch.Tensor | None, vectors: tuple[Any, ...]) -> bool:
    """Tell whether fused steps can take tensors of the CPU by their addresses."""
    x, weights, dtype = batch
    if operation == "pullback":
        weight, stats = vectors
        suit = isinstance(stats.mean, Pair) and isinstance(stats.mean.hi, np.ndarray)
        read = [weights, weight]
    else:
        params, (mean, var, tracked) = vectors
        suit = tracked is None or tracked.dtype is torch.int64
        read = [weights, *params, mean, var]
    if not suit or x.numel() > few_for_numba(weights) or dtype != "float32" or x.dtype is torch.float64:
        return False
    if not (x.is_contiguous() or (x.ndim == 3 and x.mT.is_contiguous())):
        return False
    for vector in read:  # faster than a generator
        if vector is not None and not (vector.dtype is torch.float32 and vector.is_contiguous()):
            return False
    return other is None or (other.dtype is x.dtype and other.stride() == x.stride())


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _OnArrays:
    """Replicas that exchange statistics and sums in arrays."""

    def __init__(self, exchange: Any, own: HostBackend) -> None:
        if not isinstance(exchange.group, _ArrayGroup):
            exchange.through(_ArrayGroup(exchange.group), own)
        self.waits, self.moments, self.sums = exchange.waits, exchange.moments, exchange.sums


class _ArrayGroup(Group):
    """A group of tensors that takes arrays."""

    rank = size = 0

    def __init__(self, group: Group) -> None:
        self.rank, self.size, self._group = group.rank, group.size, group

    def gather(self, vector: np.ndarray) -> np.ndarray:
        rows: Any = self._group.gather(torch.from_numpy(vector))
        return rows.numpy() if isinstance(rows, torch.Tensor) else rows


def tensors(stats: Stats) -> Stats:
    """Return statistics, of arrays or tensors, as tensors."""
    return Stats(*map(_tensor, stats))


def _limited() -> AbstractContextManager[None]:
    return limited(torch.get_num_threads())


def as_array(value: Any) -> Any:
    """Return a tensor, or the tensors of a statistic or of parameters, as arrays; return any other value as it is."""
    if isinstance(value, torch.Tensor):
        if value.dtype is torch.bfloat16:  # DLPack has it, but NumPy has not
            return as_array(value.view(torch.int16)).view(fastest().halves["bfloat16"])
        return np.from_dlpack(_Shared(value))
    if isinstance(value, _STATISTICS):
        return type(value)(*map(as_array, value))
    if isinstance(value, Params | Stats):
        return type(value)(*map(as_array, value))
    return value


def _writable(tensor: torch.Tensor) -> np.ndarray:
    array = as_array(tensor)
    # Before Torch 2.9 and NumPy 2.1, DLPack did not tell whether an array is writable, and NumPy took it as read-only.
    return array if array.flags.writeable else tensor.numpy()


def _tensor(value: Any) -> Any:
    """Return an array, or the arrays of a statistic, as tensors; return a tensor, a count or None as it is."""
    if value is None or isinstance(value, _KEPT):
        return value
    if isinstance(value, _STATISTICS):
        return type(value)(*map(_tensor, value))
    array = np.asarray(value)
    if array.dtype.kind == "V":  # bfloat16
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _arranged(values: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """Return an array in the shape of x as a tensor with x's dtype, and the memory order of ``torch.empty_like(x)``."""
    tensor: torch.Tensor = _tensor(values)
    if tensor.dtype == x.dtype:
        if tensor.stride() == x.stride():
            return tensor
        like = torch.empty_like(x)
        return tensor if tensor.stride() == like.stride() else like.copy_(tensor)
    return _like(x).copy_(tensor)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Return x, or a copy in float32 if x is in a 16-bit dtype that the kernels do not convert."""
    return x if _is_computable(x) else _like(x, torch.float32).copy_(x)


def computed_output(y: torch.Tensor) -> torch.Tensor:
    """Return the tensor that kernels write to: y, or one like it in float32, as ``_wide``."""
    return y if _is_computable(y) else _like(y, torch.float32)


def _is_computable(x: torch.Tensor) -> bool:
    """Tell whether the kernels for a tensor of x's size take its dtype: fused steps do not take halves."""
    if x.dtype not in _HALVES:
        return True
    return x.numel() > few_for_numba(None) and dtype_name(x.dtype) in fastest().halves


def _narrow(wide: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return y, after copying to it the values of ``wide`` if that is another tensor."""
    return y if wide is y else y.copy_(wide)


def _like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a new tensor with x's shape and memory order and undefined values, in huge pages if it is large."""
    y = torch.empty_like(x, dtype=dtype)
    memory.advise(y.data_ptr(), y.nbytes)
    return y
