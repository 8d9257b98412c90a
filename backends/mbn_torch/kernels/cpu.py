"""The kernels of NumPy or Numba on Torch's tensors in host memory.

Arrays share the memory of the tensors. Only halves are copied: Torch converts them to float32 and back much faster than
NumPy. The arrays are made by DLPack, since ``Tensor.numpy`` would forbid for good to resize the tensor's storage. New
tensors of x's size are allocated by Torch wherever a kernel can write to them, so that they support all of Torch's
operations. The statistics of a training step stay arrays until other kernels read them.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from mbn.contract import Batch, Group, Kernels, Moments, Params, Settings, State, Stats
from mbn.threads import limited
from mbn_common.channel_stats import Pair, Scaled
from mbn_cpu import memory
from mbn_cpu.backend import HostBackend
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


class ArrayBatch(NamedTuple):
    """A batch of tensors, with the same values as arrays."""

    x: torch.Tensor
    sample_weight: torch.Tensor | None
    dtype: str
    arrays: Batch
    """The batch as arrays that share its memory; halves are copied to float32."""

    @classmethod
    def of(cls, batch: Batch) -> "ArrayBatch":
        """Return a batch of tensors with its arrays."""
        x, sample_weight, dtype = batch
        # Detach, so that autograd does not record the conversion.
        values = as_array(_wide(x.detach() if x.requires_grad else x))
        return cls(x, sample_weight, dtype, Batch(values, as_array(sample_weight), dtype))


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
    return torch.from_numpy(np.asarray(value))


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
    """Return x, or a copy in float32 if x is in a 16-bit dtype."""
    return _like(x, torch.float32).copy_(x) if x.dtype in _HALVES else x


def computed_output(y: torch.Tensor) -> torch.Tensor:
    """Return the tensor that kernels write to: y, or one like it in float32 if y is in a 16-bit dtype."""
    return _like(y, torch.float32) if y.dtype in _HALVES else y


def _narrow(wide: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return y, after copying to it the values of ``wide`` if that is another tensor."""
    return y if wide is y else y.copy_(wide)


def _like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a new tensor with x's shape and memory order and undefined values, in huge pages if it is large."""
    y = torch.empty_like(x, dtype=dtype)
    memory.advise(y.data_ptr(), y.nbytes)
    return y
