"""Which kernels serve a call of Torch's backend."""

import warnings
from functools import cache
from itertools import chain
from typing import Any

import torch

from mbn.contract import Batch, Kernels, Operation, Params, Stats
from mbn_cpu.backend import takes
from mbn_cpu.kernels.installed import host
from mbn_torch.kernels.cpu import HostBatch, OnHost, as_array, room
from mbn_torch.kernels.eager import TENSORS
from mbn_torch.kernels.traceable import FORMULAS
from mbn_torch.private import HOST, is_recorded, is_scripted, is_traced, is_transformed, place


def kernels_for(
    operation: Operation, batch: Batch, other: torch.Tensor | None = None, vectors: tuple[Any, ...] = ()
) -> tuple[Kernels, Batch | HostBatch]:
    """Return the kernels for a call, and its batch as they read it.

    | kernels | why they are there |
    |---|---|
    | FORMULAS | every transformation of Torch sees through them; the others are opaque to it |
    | OnHost, fused steps | Numba's: 4.8 times as fast as its passes for (32, 64), 1.8 times for (1024, 256) |
    | OnHost, passes | for all sizes; without Numba they are NumPy's |
    | Triton | one launch for each pass; no GPU has been there to measure it |
    | TENSORS | tensors that nothing else takes, to the bounds: FORMULAS fail 21 tests of the suite, up to 11 ulp |
    """
    if is_transformed() or _is_followed(operation, batch, other, vectors):
        return FORMULAS, batch
    x, sample_weight, _ = batch
    where = place(x, sample_weight, *_read(operation, other, vectors))
    if where == HOST:
        return _on_host(operation, batch, other, vectors)
    if where is None:  # a graph is to be that of any batch, and made of operations that exporters know
        return FORMULAS if is_scripted() else TENSORS, batch
    return _on_gpu(where) or TENSORS, batch


def _is_followed(operation: Operation, batch: Batch, other: torch.Tensor | None, vectors: tuple[Any, ...]) -> bool:
    """Tell whether something has to see how a result is computed, other than autograd the function of a step."""
    if operation == "pullback":  # with is_grads_batched
        return is_traced(other)
    if operation == "evaluate":
        _, state = vectors
        return is_recorded(*state[:2])
    return operation == "moments" and is_recorded(batch.x)


def _read(operation: Operation, other: torch.Tensor | None, vectors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the tensors that a call reads beside those of its batch."""
    if operation == "pullback":
        return other, vectors[0]
    return tuple(chain.from_iterable(vectors))


def _on_host(
    operation: Operation, batch: Batch, other: torch.Tensor | None, vectors: tuple[Any, ...]
) -> tuple[Kernels, HostBatch]:
    own, prepared = host(), HostBatch.of(batch)
    if operation == "pullback":
        vectors = tuple(map(as_array, vectors))
    is_fast = takes(own.fast, operation, prepared.arrays, None if other is None else as_array(room(other)), vectors)
    return OnHost.of(own, own.fused if is_fast else own.kernels), prepared


@cache
def _on_gpu(index: int) -> Kernels | None:
    """Return the kernels in Triton if it works with this GPU.

    Not all builds of Torch bring it; it needs a C compiler, and a card that is not too old for it.
    """
    try:
        from mbn_torch.kernels import gpu  # noqa: PLC0415 - a quarter of a second, for those alone who have a GPU

        one = torch.ones((1, 1), device=torch.device("cuda", index))
        gpu.TRITON.normalize(Batch(one), Stats(one[0], one[0], None), Params(None, None), 0.0)
    except ModuleNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001 - whatever it is, there are kernels that work
        message = f"Triton does not work with this GPU, which makes mbn slower: {type(error).__name__}: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None
    return gpu.TRITON
