"""The arithmetic: four passes over x, and formulas on (C,) vectors."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from mbn.contract.values import Array, Batch, Moments, Params, Settings, State, Stats, counted

_NO_REPLICAS = "these kernels have no vectors for other processes, so their backend must not declare replicas."


class Kernels(ABC):
    """One way to compute batch normalisation.

    Kernels take and return the framework's own arrays. Their arguments have been checked: kernels validate nothing.
    Vectors are (C,) in the layer's dtype, float32 or float64. No kernel writes to its arguments, except to ``out``.

    Each backend chooses its own representation of statistics, the same for all of its kernels: it may have more digits
    than x, and numbers beyond the range of float64.
    """

    # Passes over x.

    @abstractmethod
    def moments(self, batch: Batch) -> Moments:
        """Return the statistics of each channel over all other axes; finite ones where all sample weights are 0."""

    @abstractmethod
    def normalize(self, batch: Batch, stats: Stats, params: Params, eps: float, out: Array | None = None) -> Array:
        """Return ``(x - mean) / sqrt(var + eps) * weight + bias``, rounded once to x's dtype.

        Where ``var + eps`` is 0 the result is the bias; where the weight of a sample is 0 it is 0. Memory order and
        device are those of x. A backend that declares the capability ``out`` writes the result to ``out`` if given.
        """

    @abstractmethod
    def grad_sums(self, dy: Array, batch: Batch, stats: Stats, eps: float) -> tuple[Array, Array]:
        """Return the sums of ``dy`` and of ``dy * xhat`` for each channel; ``xhat = (x - mean) / sqrt(var + eps)``.

        They are the gradients of bias and weight: (C,), in the dtype of the statistics or a wider one. Values of weight
        0 are left out; no other sample weight matters, since ``dy`` contains the weight of each output. Where
        ``var + eps`` is 0 so is ``xhat``.
        """

    @abstractmethod
    def grad_input(
        self, dy: Array, batch: Batch, stats: Stats, weight: Array | None, eps: float, sums: tuple[Array, Array] | None
    ) -> Array:
        """Return the gradient of x, in its dtype, memory order and device.

        With ``w`` the weight of a sample (1 if there is none) and ``(sum_dy, sum_dy_xhat) = sums``, of ``grad_sums``::

            weight / sqrt(var + eps) * (dy - w * sum_dy / count - w * xhat * sum_dy_xhat / count)

        or, where ``sums`` is None because mean and variance are constants, ``weight / sqrt(var + eps) * dy``. It is 0
        where the weight of a sample is 0.
        """

    # Formulas on vectors.

    @abstractmethod
    def sample_weights(
        self, shape: tuple[int, ...], dtype: str, mask: Array | None, lengths: Array | None, sample_weight: Array | None
    ) -> Array:
        """Return the weight of each value: its sample weight where mask and lengths include it, else 0.

        Args:
            shape: of the result, (N,) or (N, L).
            dtype: of the result, the layer's: float32 or float64.
            mask: True for a value: bool, (N,) or (N, L).
            lengths: how many values each sequence has, from its start: integers, (N,), for a shape (N, L) alone.
            sample_weight: real numbers, (N,) or (N, L); 1 if None.

        Traced arguments cannot be checked by ``within``: for them a negative weight, or a length outside of 0 to L,
        gives NaN, so that the error shows in the results.
        """

    @abstractmethod
    def merge(self, first: Moments, second: Moments) -> Moments:
        """Return the statistics of two batches taken together.

        With n the counts, and d the difference of the means, the second less the first::

            count = n1 + n2    mean = mean1 + d * n2 / count    m2 = m2_1 + m2_2 + d**2 * n1 * n2 / count

        Rounding errors are smallest where n2 <= n1, so ``fit`` passes the larger batch first. The result of two batches
        without values is that of a batch without values.

        Source: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances,
        1979, equations 2.1.
        """

    @abstractmethod
    def variance(self, moments: Moments, correction: int) -> Any:
        """Return ``m2 / (count - correction)``, in the representation that ``normalize`` and ``lerp`` read.

        It is 0 where the sample weights add up to ``correction`` or less; without them the count is greater.
        """

    @abstractmethod
    def step(self, momentum: float | None, num_batches_tracked: Array | None, count: Any, correction: int) -> Any:
        """Return how far a batch moves the running statistics, for ``lerp``, without synchronizing with a device.

        It is ``momentum``, or ``1 / num_batches_tracked`` where ``momentum`` is None; and 0 for a batch without a
        variance, whose ``count``, a sum of sample weights, is ``correction`` or less.
        """

    @abstractmethod
    def lerp(self, start: Array, end: Any, step: Any) -> Array:
        """Return ``(1 - step) * start + step * end`` for (C,) statistics, rounded once to the dtype of ``start``.

        ``end`` is a vector, ``Moments.mean`` or the result of ``variance``; ``step`` is a float or the result of
        ``step``. With a step of 0 the result is ``start``, even if ``end`` is NaN. To differentiation it is a constant.
        """

    # The same statistics as plain vectors, for other processes (the capability ``replicas``).

    def to_vectors(self, moments: Moments, dtype: str) -> tuple[Array, ...]:
        """Return mean and m2 as vectors, (C,) each, that ``Arrays.concatenated`` takes; as many for all batches.

        ``dtype`` is that of the layer, on which their number may depend.
        """
        raise NotImplementedError(_NO_REPLICAS)

    def from_vectors(self, count: Any, vectors: tuple[Array, ...]) -> Moments:
        """Return the statistics of which ``to_vectors`` made the vectors, after ``concatenated`` and an exchange.

        ``count`` is an int, or a number of the concatenated vector for a batch with sample weights.
        """
        raise NotImplementedError(_NO_REPLICAS)

    # Compositions of the above. A backend overrides those that it computes faster, within the same bounds.

    def advance(self, state: State, moments: Moments, settings: Settings) -> tuple[Stats, State]:
        """Return the statistics to normalise a batch by, and the state after the step."""
        mean, var, num_batches_tracked = state
        if num_batches_tracked is not None:
            num_batches_tracked = counted(num_batches_tracked)
        if mean is not None:
            # Without a momentum the running statistics are the average over all batches, each with the same weight.
            step = self.step(settings.momentum, num_batches_tracked, moments.count, settings.correction)
            mean = self.lerp(mean, moments.mean, step)
            var = self.lerp(var, self.variance(moments, settings.correction), step)
        return Stats(moments.mean, self.variance(moments, 0), moments.count), State(mean, var, num_batches_tracked)

    train: Callable[..., tuple[Array, State, Stats] | None] | None = None
    """``train(batch, params, state, settings, out)``: a fused step of training; output, new state and statistics.

    It returns None, and writes nothing, for a batch that it does not support.
    """
    evaluate: Callable[..., Array | None] | None = None
    """``evaluate(batch, params, state, settings, out)``: the output of fused evaluation, or None as ``train``."""
    pullback: Callable[..., tuple[Array, Array, Array] | None] | None = None
    """``pullback(dy, batch, weight, stats, eps)``: the gradients of x, weight and bias, or None as ``train``."""
