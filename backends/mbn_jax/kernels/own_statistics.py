"""Normalisation by the batch's own statistics, with its derivatives, and the sums of gradients for any statistics.

The derivatives of the normalisation follow the closed formulas of batch normalisation, in which mean and variance are
functions of x, with sums in float64: so a large mean of x or dy costs no digits. JAX does not differentiate mean,
variance and normalisation one by one. The derivatives are differentiated by such formulas again.

Notation: xhat = (x - mean) * s with s = 1 / sqrt(var + eps), and M(v) = sum(w * v) / n with w the weights and n their
sum. The derivatives in the direction v are

    of xhat: P(v) = s * (v - M(v) - xhat * M(xhat * v)),  of s: -s**2 * M(xhat * v).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mbn.contract import summed
from mbn_jax import channel_stats
from mbn_jax.group import AxisGroup
from mbn_jax.kernels import compiled_loops, passes
from mbn_jax.kernels.channel_sums import column, once
from mbn_jax.kernels.layouts import CPU, GPU, Layout, Order
from mbn_jax.kernels.linear_primitives import LinearPrimitive, Shape, are_transposes, channel_sum, spread
from mbn_jax.kernels.pairs import Mean, Pair, Scaled, Square, Variance, as_pair, as_scaled, wide
from mbn_jax.kernels.primitives import Arrays, WidePrimitive


class Batch(NamedTuple):
    """Values with their statistics, which derivatives take as functions of x; without a count, as constants."""

    x: jax.Array
    weights: jax.Array | None
    mean: Scaled
    invstd: Scaled
    count: Any
    """A ``Pair`` or None; typed as Any, since tuples have a method of this name."""
    group: AxisGroup | None = None
    """The replicas that share the statistics, if there are several."""
    order: Order | None = None
    """The order of x in memory, if it is known."""


def batch(
    x: jax.Array,
    mean: Scaled,
    var: Square,
    count: Pair,
    eps: Square,
    weights: jax.Array | None,
    group: AxisGroup | None,
    order: Order | None = None,
) -> Batch:
    """Return values with their own statistics, or with those of all replicas."""
    mean, var, count = lax.stop_gradient((mean, var, count))
    dtype = mean.unit.dtype
    divisor = channel_stats.divisor(as_pair(count, dtype))
    return Batch(x, weights, mean, channel_stats.invstd(var, eps, dtype), divisor, group, order)


@jax.custom_jvp
def normalize(batch: Batch, weight: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    """Return xhat * weight + bias in x's dtype."""
    x, weights, mean, invstd, *_ = batch
    return passes.affine(x, mean, invstd, weight, bias, weights, batch.order).astype(x.dtype)


@normalize.defjvp
def _normalize_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    batch, weight, _ = primals
    dbatch, dweight, dbias = tangents
    arrays = [dbatch.x.astype(batch.mean.unit.dtype), _vector(batch, dweight, 0), _vector(batch, dbias, 0)]
    (dy,) = _pushforward(arrays, (batch, _vector(batch, weight, 1)))
    return normalize(*primals), dy.astype(batch.x.dtype)


def pullback(dy: jax.Array, batch: Batch, weight: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of x, in its dtype, of weight and of bias."""
    dx, dweight, dbias = _pullback([dy.astype(batch.mean.unit.dtype)], (batch, _vector(batch, weight, 1)))
    return dx.astype(batch.x.dtype), dweight, dbias


@jax.jit
def grad_sums(
    dy: jax.Array,
    x: jax.Array,
    mean: Mean,
    var: Variance,
    eps: Square,
    weights: jax.Array | None,
    order: Order | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the sums of dy and dy * xhat for each channel, with xhat by any given statistics."""
    compute = passes.compute_dtype(x, mean)
    given = Batch(x, weights, as_scaled(mean, compute), channel_stats.invstd(var, eps, compute), None, None, order)
    return _grad_sums(dy.astype(compute), given)


@jax.custom_jvp
def _grad_sums(dy: jax.Array, given: Batch) -> tuple[jax.Array, jax.Array]:
    total, product = _GRAD_SUMS(dy, given)
    return total, product


def _sums_in_float64(layout: Layout, dy: jax.Array, given: Batch) -> list[jax.Array]:
    _, own, _ = _sums(layout, dy, given, None)
    return [total.astype(dy.dtype) for total in own]


_GRAD_SUMS = WidePrimitive("grad_sums", partial(_sums_in_float64, CPU), partial(_sums_in_float64, GPU))


@_grad_sums.defjvp
def _grad_sums_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    def by_definition(dy: jax.Array, given: Batch) -> tuple[jax.Array, jax.Array]:
        x, weights, mean, invstd, *_ = given
        dy = passes.unmasked(dy, weights)
        return channel_sum(dy), channel_sum(dy * passes.affine(x, mean, invstd, None, None, weights))

    return _grad_sums(*primals), jax.jvp(by_definition, primals, tangents)[1]


@jax.custom_jvp
def _standardize(batch: Batch) -> jax.Array:
    """Return xhat, with 0 where the weight is 0."""
    return passes.affine(batch.x, batch.mean, batch.invstd, None, None, batch.weights)


@_standardize.defjvp
def _standardize_jvp(primals: tuple[Batch], tangents: tuple[Batch]) -> tuple[jax.Array, jax.Array]:
    return _standardize(*primals), _project(tangents[0].x, *primals)


@jax.custom_jvp
def _scale(batch: Batch) -> jax.Array:
    """Return s."""
    return channel_stats.plain(batch.invstd)


@_scale.defjvp
def _scale_jvp(primals: tuple[Batch], tangents: tuple[Batch]) -> tuple[jax.Array, jax.Array]:
    (batch,) = primals
    scale = _scale(batch)
    return scale, -(scale**2) * _mean(_standardize(batch) * _direction(tangents[0].x, batch), batch)


def _project(v: jax.Array, batch: Batch) -> jax.Array:
    """Return P(v)."""
    zeros = _vector(batch, None, 0)
    return _pushforward([v.astype(zeros.dtype), zeros, zeros], (batch, _vector(batch, None, 1)))[0]


def _mean(v: jax.Array, batch: Batch) -> jax.Array:
    """Return M(v)."""
    return _total(_weigh(v, batch), batch) / batch.count.hi


def _total(v: jax.Array, batch: Batch) -> jax.Array:
    """Return the sum of each channel over all replicas."""
    (total,) = summed((channel_sum(v),), batch.group)
    return total


def _weigh(v: jax.Array, batch: Batch) -> jax.Array:
    return v if batch.weights is None else v * batch.weights.astype(v.dtype)


def _direction(v: jax.Array, batch: Batch) -> jax.Array:
    """Return a direction in the dtype of the arithmetic, with 0 where the weight is 0."""
    return passes.unmasked(v.astype(batch.mean.unit.dtype), batch.weights)


def _vector(batch: Batch, value: jax.Array | None, default: float) -> jax.Array:
    dtype = batch.mean.unit.dtype
    return jnp.full(batch.x.shape[1], default, dtype) if value is None else value.astype(dtype)


# Forward mode: weight * P(v) + dweight * xhat + dbias.


def _push(layout: Layout, arrays: Arrays, residuals: tuple[Batch, jax.Array], shape: Shape) -> list[jax.Array]:
    (v, *parameters), (batch, weight) = arrays, residuals
    rest, _, sums = _sums(layout, v, batch, batch.weights)
    dweight, dbias = map(wide, parameters)
    constant, slope = (_share(total, batch) for total in sums)
    unexplained = wide(v) - _line(constant, slope, rest, batch)
    change = _steepened(unexplained, batch, weight) + _line(dbias, dweight, rest, batch)
    return [passes.unmasked(change, batch.weights).astype(v.dtype)]


def _push_derivative(
    arrays: Arrays, residuals: tuple[Batch, jax.Array], tangents: tuple[Batch, jax.Array]
) -> list[jax.Array]:
    (v, p, _), (batch, weight), (dbatch, dweight) = arrays, residuals, tangents
    u, v = _direction(dbatch.x, batch), _direction(v, batch)
    # Subtract the mean of v: P ignores constants, and the products below lose no digits to a large mean.
    v -= spread(lax.stop_gradient(_mean(v, batch)), v.shape)
    xhat, change, moved = _standardize(batch), _project(u, batch), _project(v, batch)
    # The derivative of P(v) in the direction u is -s * (M(xhat * u) * P(v) + M(xhat * v) * P(u) + M(P(u) * v) * xhat).
    terms = ((_mean(xhat * u, batch), moved), (_mean(xhat * v, batch), change), (_mean(change * v, batch), xhat))
    scale = -weight * _scale(batch)
    bent = sum(spread(scale * factor, v.shape) * term for factor, term in terms)
    return [bent + spread(p, v.shape) * change + spread(dweight, v.shape) * moved]


# Reverse mode: the gradients of x, weight and bias. The gradient of x, with g = weight * dy, is the transpose of P:
# s * (g - w * sum(g) / n - w * xhat * sum(xhat * g) / n).


def _pull(layout: Layout, arrays: Arrays, residuals: tuple[Batch, jax.Array], shape: Shape) -> list[jax.Array]:
    (dy,), (batch, weight) = arrays, residuals
    rest, (dbias, dweight), sums = _sums(layout, dy, batch, None)
    constant, slope = (_share(total, batch) for total in sums)
    gradients = [dweight.astype(dy.dtype), dbias.astype(dy.dtype)]
    loops = _loops(compiled_loops.GRAD_INPUT, layout, dy, batch)
    if loops is not None:
        slope *= _units(batch)[1]
        first, second = (wide(factor) for factor in channel_stats.factors(batch.invstd, weight))
        vectors = _center(batch), slope, constant - rest * slope, first * second
        dx = loops.grad_input(loops.in_order(dy), loops.in_order(batch.x), *vectors, batch.weights)
        return [loops.in_order(dx), *gradients]
    explained = _line(constant, slope, rest, batch)
    if batch.weights is not None:
        explained *= wide(batch.weights)
    dx = _steepened(wide(dy) - explained, batch, weight)
    return [passes.unmasked(dx, batch.weights).astype(dy.dtype), *gradients]


def _pull_derivative(
    arrays: Arrays, residuals: tuple[Batch, jax.Array], tangents: tuple[Batch, jax.Array]
) -> list[jax.Array]:
    (dy,), (batch, weight), (dbatch, dweight) = arrays, residuals, tangents
    u, dy = _direction(dbatch.x, batch), _direction(dy, batch)
    xhat, change = _standardize(batch), _project(u, batch)
    moved, product, _ = _pullback([dy], (batch, _vector(batch, None, 1)))
    if batch.group is None:
        # M(change) is 0, so subtracting w times a constant from dy changes the sum in its last bits only.
        constant = spread(lax.stop_gradient(channel_sum(dy) / batch.count.hi), dy.shape)
        bend = channel_sum(change * (dy - _weigh(constant, batch)))
    else:  # M(change) is 0 over all replicas together, not over one
        bend = channel_sum(change * dy)
    # Two exchanges: in one vector, JAX would take the product for a function of u too, and could not transpose.
    (every_product,), (every_bend,) = summed((product,), batch.group), summed((bend,), batch.group)
    terms = (
        (_mean(xhat * u, batch), moved),
        (every_product / batch.count.hi, _weigh(change, batch)),
        (every_bend / batch.count.hi, _weigh(xhat, batch)),
    )
    scale = -weight * _scale(batch)
    bent = sum(spread(scale * factor, dy.shape) * term for factor, term in terms)
    return [bent + spread(dweight, dy.shape) * moved, bend, jnp.zeros_like(bend)]


def _sums(
    layout: Layout, v: jax.Array, batch: Batch, factor: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Return the mean minus its center, and the sums of v and of xhat * v for each channel, in float64.

    The sums are those of this replica, and those of all replicas. With a ``factor``, v is multiplied by it. The first
    result is as exact as a sum in float64: where v is nearly constant, small errors of the mean change the sum of
    xhat * v much.
    """
    view, weights = layout.view, layout.view(batch.weights)
    unit, invstd = _units(batch)
    loops = _loops(compiled_loops.GRAD_SUMS, layout, v, batch) if factor is None else None
    if loops is not None:
        drift, *own = loops.grad_sums(loops.in_order(v), loops.in_order(batch.x), _center(batch), batch.weights)
        return _corrected(drift, own, invstd, batch)
    x, center = wide(view(batch.x)), layout.broadcast(once(_center(batch)), v.ndim)
    deviation = x - center if unit is None else passes.difference(x, center, layout.broadcast(once(unit), v.ndim))
    deviation = passes.unmasked(deviation, weights)
    v = passes.unmasked(wide(view(v)), weights)
    if factor is not None:
        v *= view(factor)
    if batch.count is None:
        return _corrected(None, layout.sums(v, v * deviation), invstd, batch)
    drift, *own = layout.sums(deviation if weights is None else deviation * weights, v, v * deviation)
    return _corrected(drift, own, invstd, batch)


def _corrected(
    drift: jax.Array | None, own: Sequence[jax.Array], invstd: jax.Array, batch: Batch
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Return the results of ``_sums``, given the sums of x - center, of v and of v * (x - center) of this replica.

    The first of them is not needed if the statistics are constants.
    """
    unit, _ = _units(batch)
    if batch.count is None:
        every = own
        rest = wide(batch.mean.pair.lo) * wide(batch.mean.unit) * (1 if unit is None else unit)
    else:
        drift, *every = summed((drift, *own), batch.group)
        rest = _share(drift, batch)
    of_own, of_every = ((total, (product - rest * total) * invstd) for total, product in (own, every))
    return rest, of_own, of_every


def _loops(number: int, layout: Layout, v: jax.Array, batch: Batch) -> compiled_loops.Loops | None:
    """Return the compiled loops of a pass over values in the shape of x, or None."""
    if layout is not CPU or v.dtype != np.float32 or batch.mean.unit.dtype != np.float32:
        return None
    return compiled_loops.of(number, batch.x, batch.weights, batch.order)


def _center(batch: Batch) -> jax.Array:
    """Return the center, the high part of the mean, in float64."""
    return wide(batch.mean.pair.hi) * wide(batch.mean.unit)


def _units(batch: Batch) -> tuple[jax.Array | None, jax.Array]:
    """Return two factors from deviations to xhat: the first (or None) applies before any product, the second last.

    Products of float64 numbers may leave float64's range, products of float32 numbers in float64 cannot.
    """
    invstd, unit = wide(batch.invstd.pair), wide(batch.invstd.unit)
    return (unit, invstd) if batch.mean.unit.dtype == np.float64 else (None, invstd * unit)


def _share(total: jax.Array, batch: Batch) -> jax.Array:
    """Return a sum divided by the count."""
    return total / wide(batch.count)


def _line(constant: jax.Array, slope: jax.Array, rest: jax.Array, batch: Batch) -> jax.Array:
    """Return constant + slope * xhat in float64: v minus it has digits left even where v is nearly equal to it."""
    unit, invstd = _units(batch)
    x, center = wide(batch.x), _broadcast(_center(batch), batch)
    deviation = x - center if unit is None else passes.difference(x, center, _broadcast(unit, batch))
    slope *= invstd
    return deviation * _broadcast(slope, batch) + _broadcast(constant - rest * slope, batch)


def _steepened(change: jax.Array, batch: Batch, weight: jax.Array) -> jax.Array:
    """Return a float64 array times s * weight."""
    first, second = (wide(factor) for factor in channel_stats.factors(batch.invstd, weight))
    if batch.mean.unit.dtype == np.float64:
        return change * _broadcast(first, batch) * _broadcast(second, batch)
    return change * _broadcast(first * second, batch)


def _broadcast(vector: jax.Array, batch: Batch) -> jax.Array:
    """Return a (C,) vector in the shape that broadcasts against x."""
    return column(once(vector), batch.x.ndim)


_pushforward = LinearPrimitive(
    "batch_norm_pushforward",
    partial(_push, CPU),
    lambda arrays, shape: arrays[:1],
    _push_derivative,
    partial(_push, GPU),
)
_pullback = LinearPrimitive(
    "batch_norm_pullback",
    partial(_pull, CPU),
    lambda arrays, shape: [arrays[0], arrays[0][1:2], arrays[0][1:2]],
    _pull_derivative,
    partial(_pull, GPU),
)
are_transposes(_pushforward, _pullback)
