"""From values to vectors of one number per channel, and back: sums, and what they are spread to.

Sums are made in float64, so their caller has to be traced with 64-bit numbers, as a ``WidePrimitive`` is. The order of
the additions is written down here and not left to XLA: the bits must not depend on the run, on the number of threads,
or on where the channels lie in memory.
"""

from collections.abc import Sequence
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mbn_jax.kernels.pairs import two_sum

CHUNK = 16
"""Values that are added one after the other: few enough for XLA to unroll, and so to vectorise over the channels."""


def column(vector: jax.Array, ndim: int) -> jax.Array:
    """Return a (C,) vector in the shape that broadcasts against an x of ndim axes."""
    return vector if ndim == 2 else vector[:, None]


def rows(x: jax.Array | None) -> jax.Array | None:
    """Return (N, C) or (N, C, L) with all values of a channel along the first axis, and the channels along the last."""
    return None if x is None else jnp.moveaxis(x, 1, -1).reshape(-1, x.shape[1])


def once(vector: jax.Array) -> jax.Array:
    """Return a (C,) vector, computed once, and not again for each value that it meets.

    XLA repeats what is cheap in every loop that reads it, to which arithmetic in pairs is no exception. Divisions are
    none of that; nor does it see what is behind a barrier, until it has decided.
    """
    return vector / lax.optimization_barrier(jnp.ones_like(vector))


def channel_sums(*terms: jax.Array, chunk: int = CHUNK, careful: bool = False) -> list[jax.Array]:
    """Return the sums of terms, float64 and (n, C) each, over the first axis: a tree of chunks of so many values.

    A ``careful`` tree carries the rounding errors of its additions along: a term that dwarfs the rest costs no digits.
    """
    if not is_known(terms[0].shape[0]):
        return careful_sums(terms, (0,))
    add, parts = (_add_pairs, in_pairs(terms)) if careful else (_add, list(terms))
    rests = []
    while (n := parts[0].shape[0]) > 2 * CHUNK:
        whole = n - n % chunk
        if whole < n:
            rests.append(sums([part[whole:] for part in parts], 0, careful=careful))
        parts = sums([part[:whole].reshape(n // chunk, chunk, -1) for part in parts], 1, careful=careful)
    parts = reduce(add, rests, sums(parts, 0, careful=careful))
    return of_pairs(parts) if careful else parts


def is_known(size: int) -> bool:
    """Tell whether a size is a number. In what is exported for any size of some axes it is a symbol."""
    return isinstance(size, int)


def careful_sums(terms: Sequence[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """Return the sums of float64 arrays of one shape over axes of any size: carried in pairs, for want of a tree."""
    return of_pairs(sums(in_pairs(terms), *axes, careful=True))


def sums(terms: Sequence[jax.Array], *axes: int, careful: bool = False) -> list[jax.Array]:
    """Return the sums of float64 arrays of one shape over axes, in one pass; ``careful`` ones of what is in pairs."""
    return lax.reduce(list(terms), [np.zeros((), term.dtype) for term in terms], _add_pairs if careful else _add, axes)


def in_pairs(terms: Sequence[jax.Array]) -> list[jax.Array]:
    """Return terms, and after them as many rests of them, which are 0."""
    return [*terms, *map(jnp.zeros_like, terms)]


def of_pairs(parts: Sequence[jax.Array]) -> list[jax.Array]:
    """Return the sums that terms and rests of them are."""
    count = len(parts) // 2
    # Where a sum is no number, the rest is none either.
    return [jnp.where(jnp.isfinite(hi), hi + rest, hi) for hi, rest in zip(parts[:count], parts[count:], strict=True)]


def _add(totals: Sequence[jax.Array], values: Sequence[jax.Array]) -> list[jax.Array]:
    return [total + value for total, value in zip(totals, values, strict=True)]


def _add_pairs(totals: Sequence[jax.Array], values: Sequence[jax.Array]) -> list[jax.Array]:
    count = len(totals) // 2
    pairs = [two_sum(*both) for both in zip(totals[:count], values[:count], strict=True)]
    rests = [pair.lo + (rest + other) for pair, rest, other in zip(pairs, totals[count:], values[count:], strict=True)]
    return [*(pair.hi for pair in pairs), *rests]
