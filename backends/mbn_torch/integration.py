"""Batch normalisation as functions of autograd.

The first derivative uses the fast kernels; autograd keeps x and a few (C,) vectors for it, and nothing else of x's
size. Higher derivatives use the traceable kernels, which are right at every order. Calls that Torch traces, vectorises
or differentiates in forward mode use the traceable kernels from the start, without these functions.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import compress, repeat
from typing import Any, TypeAlias

import torch
from torch.autograd import Function

from mbn.contract import Batch, Kernels, Needs, Params, Replicas, Settings, State, Stats, merged
from mbn_torch.channel_stats import WIDE, variance
from mbn_torch.group import Differentiable
from mbn_torch.kernels.cpu import CpuKernels, tensors
from mbn_torch.kernels.traceable import TRACEABLE, TraceableKernels
from mbn_torch.private import is_constant, is_recorded, is_scripted, is_transformed

Needed: TypeAlias = tuple[bool, bool, bool]
Gradients: TypeAlias = tuple[torch.Tensor | None, ...]

_ALL = (True, True, True)
_ANCHOR = torch.empty(0, device="cpu", requires_grad=True)
"""An input of the steps of replicas, with which autograd visits a step even if no other input needs a gradient."""
NOT_REGISTERED = (
    "torch.export, torch.jit.trace and torch.onnx.export find only tensors that are registered in a module, and this "
    "layer registers none: the graph would not contain its parameters. Replace the layer by its module: bn.as_module()."
)


def bind(
    kernels_for: Callable[..., tuple[Kernels, Batch]], forward: Callable[..., Any], pullback: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return forward and pullback bound to autograd: a step that is one ``autograd.Function``, and its gradient."""

    def step(
        kernels: Kernels,
        batch: Batch,
        params: Params,
        state: State,
        settings: Settings,
        training: bool,
        out: torch.Tensor | None = None,
        keep: bool = True,
        replicas: Replicas | None = None,
    ) -> tuple[torch.Tensor, State, Stats]:
        if isinstance(kernels, TraceableKernels):
            return _traced(forward, kernels, batch, params, state, settings, training, out, replicas)
        x = batch.x
        is_shared, run, anchor = False, forward, None
        if replicas is not None:  # others may need a gradient even if this one does not
            is_shared, run, anchor = _takes_part(replicas, x), partial(_together, forward), _ANCHOR
        if not is_shared and not is_recorded(x, *params):
            return run(kernels, batch, params, state, settings, training, out, replicas=replicas)
        if out is not None:
            raise RuntimeError("autograd cannot record writes to out: call it under torch.no_grad().")
        # Each argument takes time.
        rest = kernels, batch, state, settings, training, replicas, run, gradients
        return BatchNorm.apply(x, *params, rest, anchor)

    def gradients(dy: torch.Tensor, batch: Batch, weight: Any, stats: Stats, *rest: Any) -> Gradients:
        kernels, batch = kernels_for("pullback", batch, dy, (weight, stats))
        return differentiate(kernels, dy, batch, weight, stats, *rest)

    def differentiate(
        kernels: Kernels,
        dy: torch.Tensor,
        batch: Batch,
        weight: torch.Tensor | None,
        stats: Stats,
        eps: float,
        needs: Needed = _ALL,
        replicas: Replicas | None = None,
    ) -> Gradients:
        if isinstance(kernels, TraceableKernels):
            is_operator = kernels.pullback is not None and replicas is None
            run = partial(pullback, kernels) if is_operator else partial(_by_formulas, pullback)
            return run(dy, batch, weight, stats, eps, needs, replicas)
        if is_recorded(dy, batch.x, weight):
            return Pullback.apply(dy, batch.x, weight, kernels, batch, stats, eps, needs, replicas, pullback)
        return _of_values(pullback, kernels, dy, batch, weight, stats, eps, needs, replicas)

    return step, differentiate


def _traced(
    forward: Callable[..., Any],
    kernels: Kernels,
    batch: Batch,
    params: Params,
    state: State,
    settings: Settings,
    training: bool,
    out: torch.Tensor | None,
    replicas: Replicas | None,
) -> tuple[torch.Tensor, State, Stats]:
    """Return a step by formulas that autograd differentiates, or by operators, which have derivatives themselves."""
    if kernels.train is not None and replicas is None:
        return forward(kernels, batch, params, state, settings, training, out)
    _check_registered(params)
    # Widen x once for all of its uses: autograd adds up the gradients of the uses in the dtype of their input.
    x = batch.x
    wide = batch._replace(x=x.to(WIDE))
    shared = _sharing(replicas, x, params)
    y, state, stats = forward(kernels, wide, params, state, settings, training, replicas=shared)
    y = y.to(x.dtype)
    return y if out is None else out.copy_(y), state, stats


def _check_registered(params: Params) -> None:
    if is_scripted() and any(value is not None and value.requires_grad and is_constant(value) for value in params):
        raise RuntimeError(NOT_REGISTERED)


def _together(
    forward: Callable[..., Any],
    kernels: Kernels,
    batch: Any,
    params: Params,
    state: State,
    settings: Settings,
    training: bool,
    out: torch.Tensor | None = None,
    *,
    replicas: Replicas,
) -> tuple[torch.Tensor, State, Stats]:
    """Return a step with other replicas by the fast kernels, which autograd does not see."""
    if isinstance(kernels, CpuKernels):
        return kernels.train_together(batch, params, state, settings, out, replicas)
    result: tuple[torch.Tensor, State, Stats]
    result = forward(kernels, batch, params, state, settings, training, out, replicas=replicas)
    return result


def _takes_part(replicas: Replicas, x: torch.Tensor) -> bool:
    """Tell the other replicas what this one needs of the backward pass; return whether it takes part in it."""
    if not torch.is_grad_enabled():
        return False
    replicas.expect(Needs.GRADIENT if is_recorded(x) else Needs.SUMS)
    return True


def _sharing(replicas: Any, x: torch.Tensor, params: Params) -> Differentiable | None:
    """Return replicas whose exchange autograd or a compiler records."""
    shared = Differentiable.of(replicas)
    if shared is not None and torch.is_grad_enabled():
        anchor = next((value for value in params if is_recorded(value)), None)
        if is_recorded(x) or (is_transformed() and not torch.compiler.is_compiling()):  # torch.func hides an outer one
            shared.expect(Needs.GRADIENT)
        elif anchor is not None:  # without a gradient of x nothing else leads autograd back to the exchange
            shared.expect(Needs.SUMS, anchor)
    return shared


class BatchNorm(Function):
    """A step by the fast kernels; it returns y, the new state and the statistics, and y is differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        rest: tuple[Any, ...],
        anchor: torch.Tensor | None,
    ) -> tuple[torch.Tensor, State, Stats]:
        kernels, batch, state, settings, training, replicas, forward, gradients = rest
        y, state, stats = forward(kernels, batch, Params(weight, bias), state, settings, training, replicas=replicas)
        ctx.save_for_backward(x, weight, batch.sample_weight)
        mean, var, count = stats
        if count is None:  # running statistics: a later step may write to them before the backward pass
            mean, var = mean.clone(), var.clone()
        ctx.rest = Stats(mean, var, count), batch.dtype, settings.eps, replicas, gradients
        if replicas is not None and not any(ctx.needs_input_grad[:3]) and not replicas.waits:
            ctx.mark_non_differentiable(y)
        return y, state, stats

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, *_: None) -> Gradients:
        x, weight, sample_weight = ctx.saved_tensors
        stats, dtype, eps, replicas, gradients = ctx.rest
        needs = ctx.needs_input_grad[:3]
        found = gradients(dy, Batch(x, sample_weight, dtype), weight, stats, eps, needs, replicas)
        found = (gradient if needed else None for gradient, needed in zip(found, needs, strict=True))
        return *found, None, None


class Pullback(Function):
    """The pullback by the fast kernels, recorded so that it can be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        kernels: Kernels,
        batch: Batch,
        stats: Stats,
        eps: float,
        needs: Needed,
        replicas: Replicas | None,
        pullback: Callable[..., Gradients],
    ) -> Gradients:
        ctx.save_for_backward(dy, x, weight, batch.sample_weight)
        ctx.set_materialize_grads(False)
        ctx.rest = batch.dtype, stats, eps, needs, replicas, pullback
        return _of_values(pullback, kernels, dy, batch, weight, stats, eps, needs, replicas)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Gradients:
        *inputs, sample_weight = ctx.saved_tensors
        dtype, stats, eps, needs, replicas, pullback = ctx.rest
        with torch.enable_grad():
            # Differentiate by views: dy is often a function of x, and only direct uses of x count here.
            views: list[Any] = [tensor if tensor is None else tensor.view_as(tensor) for tensor in inputs]
            dy, x, weight = views
            outputs = _by_formulas(pullback, dy, Batch(x, sample_weight, dtype), weight, stats, eps, needs, replicas)
        is_needed = ctx.needs_input_grad[:3]
        found = vjp(outputs, list(compress(views, is_needed)), gradients)
        return *(next(found) if needed else None for needed in is_needed), None, None, None, None, None, None, None


def vjp(
    outputs: Sequence[Any], inputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
) -> Iterator[torch.Tensor | None]:
    """Iterate over the gradients of the inputs, given those of the outputs; None stands for a gradient of 0."""
    pairs = [
        (output, gradient)
        for output, gradient in zip(outputs, gradients, strict=True)
        if gradient is not None and output.requires_grad
    ]
    if not pairs:
        return repeat(None)
    outputs, gradients = zip(*pairs, strict=True)
    create_graph = torch.is_grad_enabled()
    return iter(torch.autograd.grad(outputs, inputs, gradients, create_graph=create_graph, allow_unused=True))


def _by_formulas(
    pullback: Callable[..., Gradients],
    dy: torch.Tensor,
    batch: Batch,
    weight: torch.Tensor | None,
    stats: Stats,
    eps: float,
    needs: Needed,
    replicas: Replicas | None,
) -> Gradients:
    """Return gradients that autograd differentiates; mean and variance of the batch count as functions of x."""
    # Widen x once for all of its uses: autograd adds up the gradients of the uses in the dtype of their input.
    x = batch.x
    wide = batch._replace(x=x.to(WIDE))
    if stats.count is not None:
        replicas = Differentiable.of(replicas)
        moments = merged(TRACEABLE, TRACEABLE.moments(wide), wide.dtype, replicas)
        stats = Stats(moments.mean, variance(moments, 0), moments.count)
    dx, dweight, dbias = pullback(TRACEABLE, dy.to(WIDE), wide, weight, stats, eps, needs, replicas)
    return None if dx is None else dx.to(x.dtype), dweight, dbias


def _of_values(
    pullback: Callable[..., Gradients],
    kernels: Kernels,
    dy: torch.Tensor,
    batch: Batch,
    weight: torch.Tensor | None,
    stats: Stats,
    eps: float,
    needs: Needed,
    replicas: Replicas | None,
) -> Gradients:
    """Return the gradients, computed by the fast kernels and not recorded."""
    if not isinstance(kernels, CpuKernels):
        stats = tensors(stats)
    elif replicas is not None:
        return kernels.pull_back_together(dy, batch, weight, stats, eps, needs, replicas)
    return pullback(kernels, dy, batch, weight, stats, eps, needs, replicas)
