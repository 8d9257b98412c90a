"""How autograd sees batch normalisation.

Differentiated once, it costs what the kernels cost and keeps x and a few vectors, but nothing else of x's size. From
the second time on it goes through the formulas, which are right at every order. What Torch traces, vectorises or
differentiates forwards never gets to the functions here: that takes the formulas from the start.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import compress, repeat
from types import ModuleType
from typing import Any

import torch
from torch.autograd import Function

from mbn.contract import Residuals
from mbn.state import Params, State
from mbn_torch import formulas, host, kernels, routes
from mbn_torch.tracing import is_recorded, is_traced, is_transformed
from mbn_torch.vectors import WIDE, variance


def pullback(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residuals: Residuals,
    eps: float,
    weights: torch.Tensor | None,
    needs: tuple[bool, ...] = (True, True, True),
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of x, weight and bias, as far as they are needed, differentiable if they have to be."""
    arguments = dy, x, weight, residuals, eps, weights, needs
    if is_transformed() or is_traced(dy):  # with is_grads_batched
        return _pullback_by_formulas(*arguments)
    if is_recorded(dy, x, weight):
        return Pullback.apply(*arguments)
    return _pullback_of_values(*arguments)


class BatchNorm(Function):
    """The forward pass, which is ``run``, on the kernels; it returns y, state and residuals."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        state: State,
        weights: torch.Tensor | None,
        settings: dict[str, Any],
        run: Callable[..., tuple[torch.Tensor, State, Residuals]],
    ) -> tuple[torch.Tensor, State, Residuals]:
        y, state, residuals = run(x, Params(weight, bias), state, **settings, weights=weights)
        ctx.save_for_backward(x, weight, weights)
        mean, var, count = residuals
        if count is None:  # running statistics, which may be written to before the backward pass
            mean, var = mean.clone(), var.clone()
        ctx.residuals, ctx.eps = Residuals(mean, var, count), settings["eps"]
        return y, state, residuals

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, *_: None) -> tuple[torch.Tensor | None, ...]:
        x, weight, weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        gradients = pullback(dy, x, weight, ctx.residuals, ctx.eps, weights, needs)
        dx, dweight, dbias = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
        return dx, dweight, dbias, None, None, None, None


class Pullback(Function):
    """The backward pass on the kernels, where it will be differentiated in its turn."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        residuals: Residuals,
        eps: float,
        weights: torch.Tensor | None,
        needs: tuple[bool, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.save_for_backward(dy, x, weight, weights)
        ctx.set_materialize_grads(False)
        ctx.rest = residuals, eps, needs
        return _pullback_of_values(dy, x, weight, residuals, eps, weights, needs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        *inputs, weights = ctx.saved_tensors
        residuals, eps, needs = ctx.rest
        with torch.enable_grad():
            # Of views, since dy is often a function of x, and that is not what the derivative is of.
            inputs = [tensor if tensor is None else tensor.view_as(tensor) for tensor in inputs]
            outputs = _pullback_by_formulas(*inputs, residuals, eps, weights, needs)
        is_needed = ctx.needs_input_grad[:3]
        found = _vjp(outputs, list(compress(inputs, is_needed)), gradients)
        return *(next(found) if needed else None for needed in is_needed), None, None, None, None


def _vjp(
    outputs: Sequence[torch.Tensor | None], inputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
) -> Iterator[torch.Tensor | None]:
    """Iterate over the gradients of inputs, given those of outputs; None is none."""
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


def _pullback_by_formulas(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residuals: Residuals,
    eps: float,
    weights: torch.Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients as functions of x, which mean and variance of its batch are, too."""
    # All at once, since a derivative is summed up in the dtype of what it is taken by.
    wide_dy, wide_x = dy.to(WIDE), x.to(WIDE)
    if residuals.count is not None:
        moments = formulas.moments(wide_x, weights)
        residuals = Residuals(moments.mean, variance(moments, 0), moments.count)
    dx, dweight, dbias = _pullback(formulas, wide_dy, wide_x, weight, residuals, eps, weights, needs)
    return None if dx is None else dx.to(x.dtype), dweight, dbias


def _pullback_of_values(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residuals: Residuals,
    eps: float,
    weights: torch.Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients where nothing follows how they are computed."""
    verbs = routes.chosen(dy, x, weight, weights)
    if verbs is kernels:
        residuals = host.tensors(residuals)
    elif all(needs):
        return verbs.pullback(dy, x, weight, residuals, eps, weights)
    return _pullback(verbs, dy, x, weight, residuals, eps, weights, needs)


def _pullback(
    verbs: ModuleType,
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residuals: Residuals,
    eps: float,
    weights: torch.Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    mean, var, count = residuals
    needs_x, *needs_params = needs
    dx, sums = None, (None, None)
    if any(needs_params) or (needs_x and count is not None):
        sums = verbs.grad_sums(dy, x, mean, var, eps, weights)
    if needs_x:
        dx = verbs.grad_input(dy, x, mean, var, weight, eps, None if count is None else sums, count, weights)
    sum_dy, sum_dy_xhat = sums
    return dx, sum_dy_xhat, sum_dy
