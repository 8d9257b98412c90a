"""Sums over the values of each channel in the layout for CPUs, and helpers of both layouts.

The values are rows by channels, (n, C): ``rows`` moves all cells of x to one axis. A tree adds up the rows, at each
level CHUNK of them one after another::

    rows, n = 70     r0 ... r15 | r16 ... r31 | r32 ... r47 | r48 ... r63 | r64 ... r69   whole = 64, then a rest of 6
                         |             |             |             |            |
    a level             s0            s1            s2            s3         rests[0]     n <= 2 * CHUNK: no more levels
                         |             |             |             |            |
                         +---- one after another ----+-------------+            |
                                       v                                        v
    the end                           sum      +      rests[0], and those of further levels

A row and a sum are C numbers each, one per channel.

Sums are computed in float64, so the caller must be traced with 64-bit numbers, as a ``WidePrimitive`` is. This file
fixes the order of the additions, since with XLA's own order the bits could depend on the number of threads or on the
memory order of x.

A *careful* sum is a pair: the sum, and its rest, the sum of the rounding errors. A list of pairs has all sums first,
and then as many rests.
"""

from collections.abc import Sequence
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mbn_jax.kernels.pairs import two_sum

CHUNK = 16
"""Rows that are added one after another: few enough that XLA unrolls the loop, and vectorises over the channels."""


def column(vector: jax.Array, ndim: int) -> jax.Array:
    """Return a (C,) vector in the shape that broadcasts against an x of ``ndim`` axes."""
    return vector if ndim == 2 else vector[:, None]


def rows(x: jax.Array | None) -> jax.Array | None:
    """Return (N, C) or (N, C, L) as (N, C) or (N * L, C); None stays None."""
    return None if x is None else jnp.moveaxis(x, 1, -1).reshape(-1, x.shape[1])


def once(vector: jax.Array) -> jax.Array:
    """Return a (C,) vector unchanged, so that XLA computes it once and not again for each value that it meets.

    XLA fuses cheap arithmetic, arithmetic in pairs included, into every loop that reads its result, and thus repeats
    it. XLA does not duplicate divisions; the barrier hides the constant 1, so that the division is not simplified away
    before fusion.
    """
    return vector / lax.optimization_barrier(jnp.ones_like(vector))


def channel_sums(*terms: jax.Array, chunk: int = CHUNK, careful: bool = False) -> list[jax.Array]:
    """Return the sums of terms, (n, C) in float64 each, over the first axis, by a tree of chunks of ``chunk`` rows.

    A ``careful`` tree also sums the rounding errors of its additions, so that a term that dwarfs the others costs them
    no digits.
    """
    if not is_known(terms[0].shape[0]):
        return careful_sums(terms, (0,))
    add, parts = (_add_pairs, in_pairs(terms)) if careful else (_add, list(terms))
    # Each level reduces each full chunk to a row; the rows beyond the last full chunk are summed and added at the end.
    rests = []
    while (n := parts[0].shape[0]) > 2 * CHUNK:
        whole = n - n % chunk
        if whole < n:
            rests.append(sums([part[whole:] for part in parts], 0, careful=careful))
        parts = sums([part[:whole].reshape(n // chunk, chunk, -1) for part in parts], 1, careful=careful)
    parts = reduce(add, rests, sums(parts, 0, careful=careful))
    return of_pairs(parts) if careful else parts


def is_known(size: int) -> bool:
    """Tell whether a size is a number, not a symbol: functions can be exported for any size of an axis."""
    return isinstance(size, int)


def careful_sums(terms: Sequence[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """Return the sums of float64 arrays of one shape over axes of any size, known or not, in XLA's order.

    They are computed in pairs: with the rounding errors included, the order of the additions hardly matters.
    """
    return of_pairs(sums(in_pairs(terms), *axes, careful=True))


def sums(terms: Sequence[jax.Array], *axes: int, careful: bool = False) -> list[jax.Array]:
    """Return the sums of float64 arrays of one shape over axes, in one pass; if ``careful``, of a list of pairs."""
    return lax.reduce(list(terms), [np.zeros((), term.dtype) for term in terms], _add_pairs if careful else _add, axes)


def in_pairs(terms: Sequence[jax.Array]) -> list[jax.Array]:
    """Return terms as a list of pairs: the terms, and after them as many rests of 0."""
    return [*terms, *map(jnp.zeros_like, terms)]


def of_pairs(parts: Sequence[jax.Array]) -> list[jax.Array]:
    """Return terms plus their rests, from a list of pairs."""
    count = len(parts) // 2
    # The rest of an infinite sum is NaN, which would turn the sum into NaN too.
    return [jnp.where(jnp.isfinite(hi), hi + rest, hi) for hi, rest in zip(parts[:count], parts[count:], strict=True)]


def _add(totals: Sequence[jax.Array], values: Sequence[jax.Array]) -> list[jax.Array]:
    """Return the sums of two lists, element by element."""
    return [total + value for total, value in zip(totals, values, strict=True)]


def _add_pairs(totals: Sequence[jax.Array], values: Sequence[jax.Array]) -> list[jax.Array]:
    """Return the sums of two lists of pairs; the new rest is the sum of both rests and of the new rounding error."""
    count = len(totals) // 2
    pairs = [two_sum(*both) for both in zip(totals[:count], values[:count], strict=True)]
    rests = [pair.lo + (rest + other) for pair, rest, other in zip(pairs, totals[count:], values[count:], strict=True)]
    return [*(pair.hi for pair in pairs), *rests]
