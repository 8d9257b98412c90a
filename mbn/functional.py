"""Batch normalisation as a pure function: it takes the state and returns the new one.

All arguments are checked before a backend sees them; none is written to, except ``out``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mbn import checks, registry
from mbn.contract import Array, Backend, Params, Pullback, Settings, State, dtype_name, layer_dtype
from mbn.convert import device_of, received, received_vectors
from mbn.layer import BatchNorm1d
from mbn.replicas import Membership
from mbn.step import folding
from mbn.step.forward import forward, forward_vjp
from mbn.step.masks import Masking


class BatchNormResult(NamedTuple):
    """The results of :func:`batch_norm`; the statistics are None where none were given."""

    output: Any
    running_mean: Any
    running_var: Any


def batch_norm(
    x: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    correction: int = 1,
    mask: Any = None,
    lengths: Any = None,
    sample_weight: Any = None,
    group: Any = None,
    out: Any = None,
    backend: str | Backend | None = None,
) -> BatchNormResult:
    """Normalise each channel of ``x``: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    The arguments are those of ``torch.nn.functional.batch_norm``, in its order, but the new statistics are returned
    instead of written into the old ones.

    Args:
        x: (N, C) or (N, C, L); with ``axis=-1`` (N, C) or (N, L, C). float16, bfloat16 or float32, and float64 where
            the statistics and parameters are float64. In evaluation also an array of Dask, see
            :meth:`mbn.BatchNorm1d.__call__`.
        running_mean, running_var: (C,), both or neither; float32 or float64, as are ``weight`` and ``bias``.
        weight, bias: (C,) or None.
        training: normalise by the mean and biased variance of ``x``, and return running statistics moved towards the
            mean and the variance of ``x``; otherwise normalise by the running statistics.
        momentum: the weight of the new value in the running statistics.
        eps: added to the variance; 0 is allowed. Where variance + eps is 0 the output is the bias.
        axis: the axis of the channels, 1 or -1.
        correction: 1 for the unbiased variance in ``running_var``, 0 for the biased one.
        mask, lengths, sample_weight: which samples and positions count, and how often, as in
            :meth:`mbn.BatchNorm1d.__call__`.
        group: the processes or devices that share the statistics of their batches in training, as
            :attr:`mbn.BatchNorm1d.group`. Each call exchanges one vector more than a layer, to compare the shapes.
        out: an array of the backend in the shape and dtype of ``x`` that the output is written to, in any memory order:
            ``x`` itself, or one that shares no memory with it; and no two of its values share memory. Not on JAX,
            whose arrays never change.
        backend: a name or a Backend; by default the one chosen by context, default or environment, else the backend
            of ``x``.

    Returns:
        The output, with the shape, dtype, device and memory order of ``x``, or ``out``; the new running statistics.

    Raises:
        TypeError: a dtype that would lose precision or is not floating, another framework's array, or an ``out`` that
            the backend does not take. Nothing is written.
        ValueError: a wrong shape; one value per channel in training; no statistics to normalise by; eps < 0; an ``out``
            that cannot be written to. Nothing is written.
        ReplicaError, TimeoutError, RuntimeError: with a group, as :attr:`mbn.BatchNorm1d.group` says.

    Source: Ioffe and Szegedy, Batch Normalization, 2015 (arXiv:1502.03167), algorithms 1 and 2.
    """
    params, state = Params(weight, bias), State(running_mean, running_var, None)
    masking = Masking.of(mask, lengths, sample_weight)
    run = forward if out is None else partial(forward, out=out)
    y, state = _run(run, x, params, state, training, momentum, eps, axis, correction, masking, group, backend)
    return BatchNormResult(y, state.running_mean, state.running_var)


def batch_norm_vjp(
    x: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    correction: int = 1,
    mask: Any = None,
    lengths: Any = None,
    sample_weight: Any = None,
    group: Any = None,
    backend: str | Backend | None = None,
) -> tuple[BatchNormResult, Pullback]:
    """Normalise as :func:`batch_norm`, and return the function from a gradient of the output to those of the input.

    Args: as :func:`batch_norm`.

    Returns:
        The result of :func:`batch_norm`, and ``pullback(dy) -> (dx, dweight, dbias)``; see
        :class:`mbn.contract.Pullback`.

    Raises:
        TypeError, ValueError: as :func:`batch_norm`.
    """
    params, state = Params(weight, bias), State(running_mean, running_var, None)
    masking = Masking.of(mask, lengths, sample_weight)
    (y, pullback), state = _run(
        forward_vjp, x, params, state, training, momentum, eps, axis, correction, masking, group, backend
    )
    return BatchNormResult(y, state.running_mean, state.running_var), pullback


def fold_linear(weight: Any, bias: Any, bn: BatchNorm1d) -> tuple[Array, Array]:
    """Return the weight and bias of one dense layer that computes a dense layer followed by ``bn`` in evaluation mode.

    Args:
        weight: the dense layer's, (C, in), as in ``torch.nn.Linear``; transpose an (in, C) kernel of flax or Keras.
        bias: the dense layer's, (C,), or None if it has none.
        bn: the layer; it is not changed.

    Returns:
        Arrays of the layer's backend, (C, in) and (C,), in the dtypes of ``weight`` and ``bias``; without a bias both
        in the dtype of ``weight``. Each is as exact as an output of the layer.

    Raises:
        TypeError: another framework's array, or a dtype that the layer does not take.
        ValueError: a wrong shape or device, or a layer without running statistics.

    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
    2018 (arXiv:1712.05877), section 3.2.
    """
    checks.layer("fold_linear", bn, BatchNorm1d)
    registry.check_uncompiled("folding a layer")
    checks.tracked(bn.track_running_stats, "fold_linear")
    params, state = bn.params, bn.state
    dtype = dtype_name(state.running_mean.dtype)
    backend, device = (registry.owner_of(weight), None) if bn.backend is None else (bn._storage.backend, bn.device)
    weight = received(backend, "weight", weight, dtype, device)
    if bias is None:
        bias = backend.asarray(np.zeros(state.running_mean.shape), dtype_name(weight.dtype), device_of(backend, weight))
    bias = received(backend, "bias", bias, dtype, device)
    checks.linear(backend, weight, bias, bn.num_features, dtype)
    return folding.fold_linear(bn._evaluated, params, state, weight, bias)


def _run(
    run: Callable[..., tuple[Any, State]],
    x: Any,
    params: Params,
    state: State,
    training: bool,
    momentum: float,
    eps: float,
    axis: int,
    correction: int,
    masking: Masking | None,
    group: Any,
    backend: str | Backend | None,
) -> tuple[Any, State]:
    """Check the arguments of a function of this module, and call ``run``, ``forward`` or ``forward_vjp``, with them."""
    chosen = registry.get_backend(backend) if backend is not None else registry.chosen_backend()
    training = checks.flag("training", training)
    arguments = params, state, training, momentum, eps, axis, correction, masking
    if group is not None and training:
        registry.check_uncompiled("a function with a group, instead of a layer,")
    member = Membership.of(group if training else None, None, "functional.batch_norm")
    if member is None:
        return _run_alone(run, x, *arguments, chosen or registry.owner_of(x))
    sender = chosen or member.backend_for(x)
    device = sender.device(x) if sender.owns(x) else None
    with member.exchange(sender, None, device) as replicas:
        return _run_alone(partial(run, replicas=replicas), x, *arguments, chosen or registry.owner_of(x))


def _run_alone(
    run: Callable[..., tuple[Any, State]],
    x: Any,
    params: Params,
    state: State,
    training: bool,
    momentum: float,
    eps: float,
    axis: int,
    correction: int,
    masking: Masking | None,
    chosen: Backend,
) -> tuple[Any, State]:
    if momentum is None:
        raise TypeError(
            "momentum=None is the cumulative average, which needs the count of batches that BatchNorm1d keeps."
        )
    axis = checks.axis(axis)
    dtype = _statistics_dtype(state.running_mean, state.running_var, *params, x)
    x = received(chosen, "x", x, dtype, None)
    checks.rank(x.shape, axis)
    params, state = received_vectors(chosen, params, state, x.shape[axis], dtype, device_of(chosen, x))
    checks.running_statistics(state, needed=not training)
    settings = Settings(
        num_features=x.shape[axis],
        dtype=dtype,
        eps=checks.eps(eps),
        momentum=checks.momentum(momentum),
        axis=axis,
        correction=checks.correction(correction),
    )
    return run(chosen, x, params, state, settings, training=training, masking=masking)


def _statistics_dtype(*arrays: Any) -> str:
    """Return the dtype that parameters and statistics must share, by the first array given; x comes last."""
    given = (dtype_name(array.dtype) for array in arrays if hasattr(array, "dtype"))
    return layer_dtype(next(given, "float32"))
