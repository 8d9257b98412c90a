"""Steps of batch normalisation as operators of Torch, by which a compiled model calls the kernels of the CPU.

A compiler calls an operator without a look into it: it knows the shapes of the results and the derivative::

    mbn::train       y, statistics, new state            derivative: mbn::pullback
    mbn::evaluate    y                                   derivative: mbn::pullback
    mbn::pullback    gradients of x, weight and bias     derivatives: those of the traceable formulas, to every order

An operator runs the eager step, which chooses its kernels, so the bits are those of the eager call. Under
``torch.func`` and in forward mode, in compiled code too, an operator stands for the traceable formulas. Exported
programs contain the formulas and no operator, so that they run where there is no mbn or no Python.
"""

import math
from collections.abc import Callable
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch.autograd import Function

from mbn.contract import Backend, Batch, Operation, Params, Settings, State, Stats
from mbn_common.channel_stats import Pair, Scaled
from mbn_torch.channel_stats import WIDE, in_units, separate
from mbn_torch.integration import vjp
from mbn_torch.kernels.cpu import as_array
from mbn_torch.kernels.traceable import TRACEABLE, TraceableKernels
from mbn_torch.private import below_autograd, is_exporting, is_interpreted, is_plain, is_recorded, is_surely_below

FEW = 1 << 16
"""The number of values of x below which the formulas are faster: a call of an operator takes 0.1 ms."""

_library = torch.library.Library("mbn", "FRAGMENT")
_backends: list[Backend] = []


def operate_by(backend: Backend) -> None:
    """Let the operators use this backend."""
    _backends[:] = [backend]


class OperatorKernels(TraceableKernels):
    """Kernels for a compiler, whose steps are operators. A step with other replicas is traced: it is no operator."""

    def train(
        self, batch: Batch, params: Params, state: State, settings: Settings, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, State, Stats]:
        """Return output, new state and statistics of a training step."""
        x, sample_weight, dtype = batch
        momentum = settings.momentum
        # A tensor, because a compiler takes a number for a constant, and compiles anew for another one.
        share = None if momentum is None else torch.zeros((), dtype=WIDE, device="cpu") + momentum
        y, packed, *new = torch.ops.mbn.train.default(
            x, sample_weight, *params, *state, share, settings.eps, settings.correction, dtype
        )
        after = State(*(None if old is None else value for old, value in zip(state, new, strict=True)))
        return y if out is None else out.copy_(y), after, _unpacked(packed, batch)

    def evaluate(
        self, batch: Batch, params: Params, state: State, settings: Settings, out: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the output of evaluation."""
        x, sample_weight, dtype = batch
        y: torch.Tensor = torch.ops.mbn.evaluate.default(x, sample_weight, *params, *state[:2], settings.eps, dtype)
        return y if out is None else out.copy_(y)

    def pullback(
        self, dy: torch.Tensor, batch: Batch, weight: torch.Tensor | None, stats: Stats, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of x, weight and bias."""
        x, sample_weight, dtype = batch
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        gradients = torch.ops.mbn.pullback.default(
            dy, x, sample_weight, weight, _packed(stats), eps, [True, True, True], dtype
        )
        return gradients


OPERATORS = OperatorKernels()


def suit(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Tell a compiler whether operators suit a step: for ordinary tensors on the CPU, not known to be small.

    Sizes that vary count as large, since a condition on them would make the compiler compile anew.
    """
    if is_exporting() or is_surely_below(x.numel(), FEW):
        return False
    return all(value is None or (is_plain(value) and value.device.type == "cpu") for value in (x, *others))


# Packed statistics: mean and variance of a step, or of the running statistics, in one tensor. A batch has five rows in
# float64: high and low part of the mean, variance, exponents of their units, count. Constants have two.


def _packed(stats: Stats) -> torch.Tensor:
    mean, var, count = stats
    if count is None:
        return torch.stack((mean, var))
    hi, lo, var, exponent = separate(mean, var)
    zero = torch.zeros_like(hi)
    rows: tuple[Any, ...] = hi, lo, var, zero if exponent is None else exponent.to(WIDE), zero + count
    return torch.stack(rows)


def _unpacked(packed: torch.Tensor, batch: Batch) -> Stats:
    hi, lo, var, exponent, count = packed.unbind()
    return Stats(*in_units(hi, lo, var, exponent), _count(count, batch))


def _packed_values(stats: Stats) -> torch.Tensor:
    """Return packed statistics that the kernels have found."""
    mean, var, count = as_array(stats)
    hi, lo, var, exponent = separate(mean, var)
    packed = np.zeros((5, len(hi)))
    packed[0], packed[1], packed[2], packed[4] = hi, lo, var, count
    if exponent is not None:
        packed[3] = exponent
    return torch.from_numpy(packed)


def _unpacked_values(packed: torch.Tensor, batch: Batch) -> Stats:
    """Return statistics as the kernels read them: scaled only where units are needed."""
    rows = as_array(packed)
    if len(rows) == 2:
        return Stats(packed[0], packed[1], None)
    mean, var, exponent, count = Pair(rows[0], rows[1]), rows[2], rows[3], _count(rows[4], batch)
    if not exponent.any():
        return Stats(mean, var, count)
    units = exponent.astype(np.int32)
    return Stats(Scaled(mean, units), Scaled(var, 2 * units), count)


def _count(row: Any, batch: Batch) -> Any:
    return batch.x.numel() // batch.x.shape[1] if batch.sample_weight is None else row[0]


# The operators. ``by_kernels`` and ``by_formulas`` compute the same, ``fake`` has the shapes. A vector that a layer
# does not have, or that is not needed, is an empty result.


def _step(kernels: Any, batch: Batch, params: Params, state: State, settings: Settings, *, training: bool) -> Any:
    """Return a step of the backend by the given kernels, or for None by those that it chooses."""
    if kernels is not None:
        return _backends[0].forward(kernels, batch, params, state, settings, training)
    x = batch.x
    kernels, batch = _chosen("train" if training else "evaluate", batch, None, (params, state))
    y, *rest = _backends[0].forward(kernels, batch, params, state, settings, training)
    return (_ordered(y, x) if kernels is TRACEABLE else y), *rest


def _ordered(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return a result of the formulas in the memory order that ``fake`` promises and the kernels keep."""
    like = torch.empty_like(x)
    return value if value.stride() == like.stride() else like.copy_(value)


def _chosen(operation: Operation, batch: Batch, other: Any, vectors: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return the kernels for a batch: the formulas for an invalid weight, NaN, which no error could refuse."""
    if batch.sample_weight is not None and math.isnan(batch.sample_weight.sum()):
        return TRACEABLE, batch
    return _backends[0].kernels_for(operation, batch, other, vectors)


class Train(Function):
    """A training step."""

    schema = (
        "train(Tensor x, Tensor? sample_weight, Tensor? weight, Tensor? bias, Tensor? running_mean, "
        "Tensor? running_var, Tensor? num_batches_tracked, Tensor? momentum, float eps, int correction, str dtype) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    differentiable = 0, 2, 3
    """The indices of the inputs that have a gradient."""

    @staticmethod
    def by_kernels(
        x: Any, sample_weight: Any, weight: Any, bias: Any, mean: Any, var: Any, count: Any, momentum: Any, *rest: Any
    ) -> tuple[torch.Tensor, ...]:
        eps, correction, dtype = rest
        settings = Settings(None, dtype, eps, None if momentum is None else momentum.item(), 1, correction)
        batch, params, state = Batch(x, sample_weight, dtype), Params(weight, bias), State(mean, var, count)
        y, after, stats = _step(None, batch, params, state, settings, training=True)
        return y, _packed_values(stats), *(x.new_empty(0) if value is None else value for value in after)

    @staticmethod
    def by_formulas(
        x: Any, sample_weight: Any, weight: Any, bias: Any, mean: Any, var: Any, count: Any, momentum: Any, *rest: Any
    ) -> tuple[torch.Tensor, ...]:
        eps, correction, dtype = rest
        settings = Settings(None, dtype, eps, momentum, 1, correction)
        batch, params, state = Batch(x, sample_weight, dtype), Params(weight, bias), State(mean, var, count)
        y, after, stats = _step(TRACEABLE, batch, params, state, settings, training=True)
        return y, _packed(stats), *(x.new_empty(0) if value is None else value for value in after)

    @staticmethod
    def fake(*inputs: Any) -> tuple[torch.Tensor, ...]:
        x, _, _, _, *before = inputs[:7]
        state = (x.new_empty(0) if value is None else torch.empty_like(value) for value in before)
        return torch.empty_like(x), x.new_empty((5, x.shape[1]), dtype=WIDE), *state

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, ...]:
        x, sample_weight, weight, *_, eps, _, ctx.dtype = inputs
        with below_autograd():
            y, stats, *state = torch.ops.mbn.train.default(*inputs)
        ctx.save_for_backward(x, sample_weight, weight, stats)
        ctx.eps = eps
        ctx.mark_non_differentiable(stats, *state)
        return y, stats, *state

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        dx, dweight, dbias = _gradients(ctx, dy)
        return dx, None, dweight, dbias, *[None] * 7


class Evaluate(Function):
    """A step of evaluation."""

    schema = (
        "evaluate(Tensor x, Tensor? sample_weight, Tensor? weight, Tensor? bias, Tensor running_mean, "
        "Tensor running_var, float eps, str dtype) -> Tensor"
    )
    differentiable = 0, 2, 3

    @staticmethod
    def by_kernels(*inputs: Any) -> torch.Tensor:
        return _evaluated(None, *inputs)

    @staticmethod
    def by_formulas(*inputs: Any) -> torch.Tensor:
        return _evaluated(TRACEABLE, *inputs)

    @staticmethod
    def fake(x: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.empty_like(x)

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        x, sample_weight, weight, _, mean, var, ctx.eps, ctx.dtype = inputs
        with below_autograd():
            y: torch.Tensor = torch.ops.mbn.evaluate.default(*inputs)
        # A later step may write to the running statistics before the backward pass: stack copies them.
        ctx.save_for_backward(x, sample_weight, weight, torch.stack((mean, var)))
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx, dweight, dbias = _gradients(ctx, dy)
        return dx, None, dweight, dbias, *[None] * 4


def _evaluated(
    kernels: Any, x: Any, sample_weight: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float, dtype: str
) -> torch.Tensor:
    settings = Settings(None, dtype, eps, None, 1, 1)
    batch, params, state = Batch(x, sample_weight, dtype), Params(weight, bias), State(mean, var, None)
    y: torch.Tensor = _step(kernels, batch, params, state, settings, training=False)[0]
    return y


def _gradients(ctx: Any, dy: torch.Tensor) -> list[torch.Tensor | None]:
    """Return the gradients of x, weight and bias of a step, None where they are not needed."""
    x, sample_weight, weight, stats = ctx.saved_tensors
    needs = [ctx.needs_input_grad[index] for index in (0, 2, 3)]
    found = torch.ops.mbn.pullback.default(dy, x, sample_weight, weight, stats, ctx.eps, needs, ctx.dtype)
    return [value if needed else None for value, needed in zip(found, needs, strict=True)]


class Pullback(Function):
    """The pullback of a step. Its own derivatives count mean and variance of a batch as functions of x."""

    schema = (
        "pullback(Tensor dy, Tensor x, Tensor? sample_weight, Tensor? weight, Tensor stats, float eps, bool[] needs, "
        "str dtype) -> (Tensor, Tensor, Tensor)"
    )
    differentiable = 0, 1, 3

    @staticmethod
    def by_kernels(
        dy: Any, x: Any, sample_weight: Any, weight: Any, packed: Any, eps: float, needs: list[bool], dtype: str
    ) -> tuple[torch.Tensor, ...]:
        batch = Batch(x, sample_weight, dtype)
        stats = _unpacked_values(packed, batch)
        kernels, prepared = _chosen("pullback", batch, dy, (weight, stats))
        if kernels is TRACEABLE:
            dx, *sums = Pullback.by_formulas(dy, x, sample_weight, weight, packed, eps, needs, dtype)
            return (_ordered(dx, x) if needs[0] else dx), *sums
        return _needed(_backends[0].pullback(kernels, dy, prepared, weight, stats, eps, tuple(needs)), x, weight, needs)

    @staticmethod
    def by_formulas(
        dy: Any, x: Any, sample_weight: Any, weight: Any, packed: Any, eps: float, needs: list[bool], dtype: str
    ) -> tuple[torch.Tensor, ...]:
        batch = Batch(x, sample_weight, dtype)
        stats = Stats(packed[0], packed[1], None) if packed.shape[0] == 2 else _unpacked(packed, batch)
        return _needed(_backends[0].pullback(TRACEABLE, dy, batch, weight, stats, eps, tuple(needs)), x, weight, needs)

    @staticmethod
    def fake(*inputs: Any) -> tuple[torch.Tensor, ...]:
        _, x, _, weight, _, _, needs, _ = inputs
        sums = x.new_empty(x.shape[1], dtype=WIDE) if weight is None else torch.empty_like(weight)
        results = torch.empty_like(x), sums, torch.empty_like(sums)
        return tuple(value if needed else x.new_empty(0) for value, needed in zip(results, needs, strict=True))

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, ...]:
        with below_autograd():
            results: tuple[torch.Tensor, ...] = torch.ops.mbn.pullback.default(*inputs)
        ctx.save_for_backward(*inputs[:5])
        ctx.set_materialize_grads(False)
        ctx.rest = inputs[5:]
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        dy, x, sample_weight, weight, packed = ctx.saved_tensors
        with torch.enable_grad():
            # Differentiate by views: dy is often a function of x, and only direct uses of x count here.
            views: list[Any] = [value if value is None else value.view_as(value) for value in (dy, x, weight)]
            outputs = Pullback.by_formulas(views[0], views[1], sample_weight, views[2], packed, *ctx.rest)
        is_needed = [ctx.needs_input_grad[index] for index in Pullback.differentiable]
        found = vjp(outputs, list(compress(views, is_needed)), gradients)
        of_dy, of_x, of_weight = (next(found) if needed else None for needed in is_needed)
        return of_dy, of_x, None, of_weight, *[None] * 4


def _needed(found: Any, x: torch.Tensor, weight: torch.Tensor | None, needs: list[bool]) -> tuple[torch.Tensor, ...]:
    """Return the gradients that are needed in the dtypes of the operator's results, and empty ones for the others.

    The sums are copied: those of some kernels are rows of one tensor, and no results of an operator may share memory.
    """
    of_sums, are_copied = WIDE if weight is None else weight.dtype, (False, True, True)
    dtypes = x.dtype, of_sums, of_sums
    return tuple(
        value.to(dtype, copy=is_copied) if needed else x.new_empty(0)
        for value, dtype, is_copied, needed in zip(found, dtypes, are_copied, needs, strict=True)
    )


def _differentiated(operator: Any, overload: Any) -> Callable[..., Any]:
    """Return the operator for inputs that autograd may record."""

    def call(*inputs: Any) -> Any:
        if is_interpreted():
            return operator.by_formulas(*inputs)
        if is_recorded(*(inputs[index] for index in operator.differentiable)):
            return operator.apply(*inputs)
        with below_autograd():
            return overload(*inputs)

    return call


for _operator in (Train, Evaluate, Pullback):
    _name = _operator.__name__.lower()
    _library.define(_operator.schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(_name, _operator.by_kernels, "CPU")
    _library.impl(_name, _operator.by_formulas, "FuncTorchBatched")
    _library.impl(_name, _differentiated(_operator, getattr(torch.ops.mbn, _name).default), "Autograd")
    torch.library.register_fake(f"mbn::{_name}", _operator.fake, lib=_library)
