"""The verbs on host memory: what its backends have in common, which is all but the passes over x.

Everything is on the host, so the border is a cast at most.
"""

from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from mbn.contract import Backend, Capabilities, Moments, Residuals, overlaps_itself, widened
from mbn.state import Params, State
from mbn_cpu import extremes, vectors


class HostBackend(Backend):
    """A backend of NumPy arrays, made of the passes over x of a module of kernels."""

    kernels: ClassVar[ModuleType]
    """The passes: ``moments``, ``normalize``, ``grad_sums`` and ``grad_input``, with the arguments of the verbs.

    ``normalize`` takes a line instead. What is beyond their range is computed apart.
    """
    whole: ClassVar[ModuleType]
    """The whole of a call at once, for those batches that it ``takes``: ``train``, ``evaluate`` and ``pullback``.

    The first two give None where they cannot.
    """
    capabilities = Capabilities(
        dtypes=frozenset({"float16", "bfloat16", "float32", "float64"}),
        devices=("cpu",),
        mutable=True,
        strided=True,
        masks=True,
        any_size=True,
        out=True,
    )

    def owns(self, x: object) -> bool:
        # A mask would be lost and a matrix would multiply in its own way, so neither passes for an array.
        return isinstance(x, np.ndarray | np.generic) and not isinstance(x, np.ma.MaskedArray | np.matrix)

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> np.ndarray:
        if device not in (None, "cpu"):
            message = f"NumPy's only device is 'cpu', not {device!r}."
            raise ValueError(message)
        return np.asarray(x, _dtype(dtype))

    def to_numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x)

    def device(self, x: np.ndarray) -> None:
        """There is one device, so none to be on by mistake."""

    def copy(self, x: np.ndarray) -> np.ndarray:
        return np.array(x)

    def conflict(self, out: np.ndarray, x: np.ndarray) -> str | None:
        if not out.flags.writeable:
            return "is read-only"
        if not out.flags.forc and overlaps_itself(out.shape, out.strides, out.itemsize):
            return "overlaps itself: some of its values share memory"
        # Writing to x itself is safe: each value is read before the one in its place is written.
        is_same = out.__array_interface__["data"] == x.__array_interface__["data"] and out.strides == x.strides
        return None if is_same or not np.shares_memory(out, x) else "overlaps x in memory without being x"

    def weights(
        self,
        shape: tuple[int, ...],
        dtype: str,
        mask: np.ndarray | None,
        lengths: np.ndarray | None,
        sample_weight: np.ndarray | None,
    ) -> np.ndarray:
        return vectors.combine_weights(shape, dtype, mask, lengths, sample_weight)

    def within(self, values: np.ndarray, low: float, high: float) -> bool:
        return bool(np.all((low <= values) & (values < high)))

    def moments(self, x: np.ndarray, weights: np.ndarray | None = None) -> Moments:
        x = np.asarray(x)
        found = self.kernels.moments(x, weights)
        if not vectors.is_wide(x):
            return found
        with np.errstate(all="ignore"):
            return extremes.moments(self.kernels.moments, x, weights, found)

    def merge(self, first: Moments, second: Moments) -> Moments:
        return vectors.merge(first, second)

    def variance(self, moments: Moments, correction: int) -> vectors.Variance:
        return vectors.variance(moments, correction)

    @np.errstate(all="ignore")
    def normalize(
        self,
        x: np.ndarray,
        mean: vectors.Mean,
        var: vectors.Variance,
        weight: np.ndarray | None,
        bias: np.ndarray | None,
        eps: float,
        weights: np.ndarray | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        x = np.asarray(x)
        line = vectors.line(mean, var, weight, bias, eps, vectors.compute_dtype(x))
        channels = extremes.of_line(line, mean, var, weight, eps)
        if channels is None:
            return self.kernels.normalize(x, line, weights, out)
        values = extremes.normalize(x, channels, mean, var, weight, bias, eps, weights)  # before x is written to
        y = self.kernels.normalize(x, line, weights, out)
        y[:, channels] = values
        return y

    @np.errstate(all="ignore")
    def lerp(self, start: np.ndarray, end: vectors.Mean | vectors.Variance, weight: float) -> np.ndarray:
        return vectors.lerp(start, end, weight)

    def step(
        self, momentum: float | None, num_batches_tracked: np.ndarray | None, count: float, correction: int
    ) -> float:
        return vectors.step(momentum, num_batches_tracked, count, correction)

    def grad_sums(
        self,
        dy: np.ndarray,
        x: np.ndarray,
        mean: vectors.Mean,
        var: vectors.Variance,
        eps: float,
        weights: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        dy, x, kernel = np.asarray(dy), np.asarray(x), self.kernels.grad_sums
        sums = kernel(dy, x, mean, var, eps, weights)
        if _has_room(x, mean):
            return sums
        with np.errstate(all="ignore"):
            channels = extremes.of_sums(sums, var, eps)
            if channels is not None:
                of_channels = extremes.grad_sums(kernel, dy, x, channels, mean, var, eps, weights)
                for total, own in zip(sums, of_channels, strict=True):
                    total[channels] = own
        return sums

    def grad_input(
        self,
        dy: np.ndarray,
        x: np.ndarray,
        mean: vectors.Mean,
        var: vectors.Variance,
        weight: np.ndarray | None,
        eps: float,
        sums: tuple[np.ndarray, np.ndarray] | None,
        count: float | None,
        weights: np.ndarray | None = None,
    ) -> np.ndarray:
        dy, x = np.asarray(dy), np.asarray(x)
        dx = self.kernels.grad_input(dy, x, mean, var, weight, eps, sums, count, weights)
        if _has_room(x, mean, weight):
            return dx
        with np.errstate(all="ignore"):
            channels = extremes.of_factors(sums, var, weight, eps, count)
            if channels is not None:
                kernel, held = self.kernels.grad_sums, None if sums is None else count
                dx[:, channels] = extremes.grad_input(kernel, dy, x, channels, mean, var, weight, eps, held, weights)
        return dx

    def batch_norm_residuals(
        self,
        x: np.ndarray,
        params: Params,
        state: State,
        *,
        training: bool,
        momentum: float | None,
        eps: float,
        correction: int,
        weights: np.ndarray | None = None,
        **out: np.ndarray,
    ) -> tuple[np.ndarray, State, Residuals]:
        result = None
        if self.whole.takes(x, weights, *out.values()) and not (training and widened(x, params, state)):
            result = self.at_once(x, params, state, training, momentum, eps, correction, **out)
        if result is not None:
            return result
        return super().batch_norm_residuals(
            x,
            params,
            state,
            training=training,
            momentum=momentum,
            eps=eps,
            correction=correction,
            weights=weights,
            **out,
        )

    def at_once(
        self,
        x: np.ndarray,
        params: Params,
        state: State,
        training: bool,  # noqa: FBT001 - in every call, where keywords cost
        momentum: float | None,
        eps: float,
        correction: int,
        out: np.ndarray | None = None,
    ) -> tuple[np.ndarray, State, Residuals] | None:
        """Do what ``batch_norm_residuals`` does of what ``whole`` takes; None, and nothing is written, if it cannot."""
        if training:
            return self.whole.train(x, params, state, momentum, eps, correction, out)
        y = self.whole.evaluate(x, params, state, eps, out)
        return None if y is None else (y, state, Residuals(state.running_mean, state.running_var, None))

    def pullback(
        self,
        dy: np.ndarray,
        x: np.ndarray,
        weight: np.ndarray | None,
        residuals: Residuals,
        eps: float,
        weights: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.whole.takes(x, weights, dy) and _has_room(x, residuals.mean, weight):
            return self.whole.pullback(dy, x, weight, residuals, eps)
        dx, *sums = super().pullback(dy, x, weight, residuals, eps, weights)
        if weight is not None:
            with np.errstate(over="ignore"):  # beyond its range they are infinite
                sums = [total.astype(weight.dtype, copy=False) for total in sums]
        return dx, *sums


def _has_room(x: np.ndarray, mean: vectors.Mean, weight: np.ndarray | None = None) -> bool:
    """Tell whether float64 holds all that is made of x: no vector has the range of float64, which that of x has not."""
    return not (
        vectors.is_wide(x)
        or (weight is not None and vectors.is_wide(weight))
        or (not isinstance(mean, vectors.Pair) and vectors.is_wide(mean))
    )


def _dtype(name: str | None) -> np.dtype | None:
    if name != "bfloat16":
        return None if name is None else np.dtype(name)
    try:
        import ml_dtypes  # noqa: PLC0415 - the only dtype that NumPy itself does not have
    except ModuleNotFoundError as error:
        message = "NumPy has bfloat16 through ml_dtypes, which is not installed: pip install ml_dtypes."
        raise TypeError(message) from error
    return np.dtype(ml_dtypes.bfloat16)
