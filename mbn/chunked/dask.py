"""Dask's arrays: lazy, and made of blocks. Each block is an array of its own, and may be computed in another process.

Every function here adds tasks to the array's graph, one or a few for each block; ``compute`` executes them on the
scheduler that the caller has chosen. A task knows its block alone, so the results do not depend on the scheduler.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from typing import Any

import numpy as np

from mbn import checks, registry
from mbn.contract import Array
from mbn.convert import from_python, is_own, native


def reduced(x: Any, axis: int, of_block: Callable[[Array], Any], merge: Callable[[Any, Any], Any]) -> list[Any]:
    """Compute ``of_block`` for each block of ``x``, and merge the results in pairs, and pairs of pairs.

    Returns:
        One result for the blocks of each range of channels, which are on ``axis``::

            blocks of rows   0   1   2   3   4
                             └─┬─┘   └─┬─┘   │
                               └───┬───┘     │
                                   └────┬────┘
                                     result
    """
    from dask import array
    from dask.base import compute

    others = {other: 2 for other in range(x.ndim) if other != axis % x.ndim}
    merged = partial(_merged, merge)
    result = array.reduction(
        x,
        partial(_of_block, of_block),
        merged,
        axis=tuple(others),
        combine=merged,
        split_every=others,
        concatenate=False,
        dtype=x.dtype,
        meta=np.empty(0, np.float32),  # without it, Dask would call the functions on an empty array
    )
    if not hasattr(result, "to_delayed"):
        raise TypeError(
            "x is a Dask array made under query planning, an experiment of Dask's, which has no single blocks. Set "
            "dask.config.set({'array.query-planning': False}) before the first import of dask.array."
        )
    return list(compute(*result.to_delayed().ravel()))


def map_blocks(
    function: Callable[..., Array],
    x: Any,
    axis: int,
    vectors: list[np.ndarray | None],
    masks: tuple[Any, Any, Any],
    native_order: bool,
) -> Any:
    """Return the lazy array of ``function(block, *vectors, mask, sample_weight)`` for each block of ``x``.

    Args:
        function: a function from a block to an array of the same shape and dtype.
        x: (N, C), (N, C, L) or (N, L, C), with the channels on ``axis``.
        vectors: (C,) each or None; the function is given the channels of the block.
        masks: mask, lengths and sample weights, see :class:`mbn.step.masks.Masking`: arrays, lazy or not, or None. The
            function is given the part of the block, and no lengths, of which a mask is made.
        native_order: whether the results are in this machine's byte order, even if x is not.

    Raises:
        TypeError, ValueError: masks are of a wrong dtype or shape, or their blocks cannot be known to fit those of x.
    """
    from dask import array

    axes = range(x.ndim)
    channels = axes[axis]
    operands: list[Any] = [x, tuple(axes)]
    for vector in vectors:
        operands += [None, None] if vector is None else [array.from_array(vector, x.chunks[channels]), (channels,)]
    for mask in _aligned(x, tuple(other for other in axes if other != channels), *masks):
        operands += [None, None] if mask is None else [mask, (0, axes[-1 if axis == 1 else 1])[: mask.ndim]]
    meta = native(x._meta) if native_order else x._meta  # noqa: SLF001 - an empty block
    options = {"token": "batch_norm", "dtype": meta.dtype, "meta": meta, "align_arrays": False}
    return array.blockwise(function, tuple(axes), *operands, **options)


def progress(*, shown: bool) -> AbstractContextManager[Any]:
    """Return a context with Dask's own progress bar on standard error; a cluster has its dashboard instead."""
    if not shown:
        return nullcontext()
    from dask.diagnostics.progress import ProgressBar

    return ProgressBar(out=sys.stderr)


def _of_block(of_block: Callable[[Array], Any], block: Array, axis: Any, keepdims: bool) -> Any:
    return of_block(block)


def _merged(merge: Callable[[Any, Any], Any], parts: Any, axis: Any, keepdims: bool) -> Any:
    """Merge the results of neighbouring blocks: a list, with a list for each index of a second axis."""
    return reduce(merge, [_merged(merge, part, axis, keepdims) for part in parts]) if isinstance(parts, list) else parts


def _aligned(x: Any, axes: tuple[int, ...], mask: Any, lengths: Any, sample_weight: Any) -> tuple[Any, Any]:
    """Return mask and sample weights in the blocks of ``x`` along ``axes``, those of samples and positions."""
    shape = tuple(x.shape[axis] for axis in axes)
    chunks = tuple(x.chunks[axis] for axis in axes)
    mask = _in_blocks("mask", mask, shape, chunks)
    lengths = _in_blocks("lengths", lengths, shape, chunks)
    if lengths is not None:
        from dask import array

        if np.isnan(shape[1]):
            raise ValueError(_unknown("lengths", shape))
        lengths = lengths.map_blocks(_within, shape[1] + 1, dtype=lengths.dtype, meta=lengths._meta)  # noqa: SLF001 - an empty block
        before = array.arange(shape[1], chunks=(chunks[1],)) < lengths[:, None]
        mask = before if mask is None else before & (mask if mask.ndim == 2 else mask[:, None])
    return mask, _in_blocks("sample_weight", sample_weight, shape, chunks)


def _in_blocks(name: str, values: Any, shape: tuple[Any, ...], chunks: tuple[tuple[Any, ...], ...]) -> Any:
    """Return a mask, lengths or sample weights as a lazy array in the given chunks, as far as it has their axes."""
    from dask import array

    if values is None:
        return None
    if isinstance(values, registry.PYTHON_DATA):
        values = from_python(name, values)
    is_own(registry.owner_of(values), name, values, None)
    given, wanted = tuple(values.shape), chunks[: values.ndim]
    if not np.isnan([*shape, *given]).any():
        checks.mask_values(name, values, shape)
        return values.rechunk(wanted) if registry.is_lazy(values) else array.from_array(values, wanted)
    checks.mask_values(name, values, given if name != "lengths" else (*given, 0)[: len(shape)])
    if not registry.is_lazy(values) or len(given) > len(shape) or values.numblocks != tuple(map(len, wanted)):
        raise ValueError(_unknown(name, given))
    return values


def _unknown(name: str, shape: tuple[Any, ...]) -> str:
    return (
        f"{name} has shape {shape}, and x has chunks of unknown sizes: its blocks are not known to fit those of x. "
        f"Compute the sizes before: x.compute_chunk_sizes(), and the same of {name} if it is a Dask array."
    )


def _within(lengths: Array, limit: int) -> Array:
    """Return lengths as they are if each is at least 0 and below ``limit``."""
    owner = registry.owner_of(lengths)
    if owner.within(lengths, 0, limit) is False:
        host = owner.to_numpy(lengths)
        checks.out_of_range("lengths", host, host, limit)
    return lengths
