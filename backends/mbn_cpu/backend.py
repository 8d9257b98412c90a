"""The verbs on host memory: what its backends have in common, which is all but the passes over x.

Everything is on the host, so the border is a cast at most.
"""

from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from mbn.contract import Backend, Capabilities, Moments, Residuals, overlaps_itself
from mbn.state import Params, State
from mbn_cpu import vectors


class HostBackend(Backend):
    """A backend of NumPy arrays, made of the passes over x of a module of kernels."""

    kernels: ClassVar[ModuleType]
    """The passes: ``moments``, ``normalize``, ``grad_sums`` and ``grad_input``, with the arguments of the verbs."""
    whole: ClassVar[ModuleType]
    """The whole of a call at once, for those batches that it ``takes``: ``train``, ``evaluate`` and ``pullback``."""
    capabilities = Capabilities(
        dtypes=frozenset({"float16", "bfloat16", "float32", "float64"}),
        devices=("cpu",),
        mutable=True,
        strided=True,
        masks=True,
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
        return self.kernels.moments(np.asarray(x), weights)

    def merge(self, first: Moments, second: Moments) -> Moments:
        return vectors.merge(first, second)

    def variance(self, moments: Moments, correction: int) -> np.ndarray:
        return vectors.variance(moments, correction)

    def normalize(
        self,
        x: np.ndarray,
        mean: vectors.Mean,
        var: np.ndarray,
        weight: np.ndarray | None,
        bias: np.ndarray | None,
        eps: float,
        weights: np.ndarray | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        return self.kernels.normalize(np.asarray(x), mean, var, weight, bias, eps, weights, out)

    def lerp(self, start: np.ndarray, end: vectors.Mean, weight: float) -> np.ndarray:
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
        var: np.ndarray,
        eps: float,
        weights: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        return self.kernels.grad_sums(np.asarray(dy), np.asarray(x), mean, var, eps, weights)

    def grad_input(
        self,
        dy: np.ndarray,
        x: np.ndarray,
        mean: vectors.Mean,
        var: np.ndarray,
        weight: np.ndarray | None,
        eps: float,
        sums: tuple[np.ndarray, np.ndarray] | None,
        count: float | None,
        weights: np.ndarray | None = None,
    ) -> np.ndarray:
        return self.kernels.grad_input(np.asarray(dy), np.asarray(x), mean, var, weight, eps, sums, count, weights)

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
        if not self.whole.takes(x, weights, *out.values()):
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
        if training:
            return self.whole.train(x, params, state, momentum, eps, correction, **out)
        y = self.whole.evaluate(x, params, state, eps, **out)
        return y, state, Residuals(state.running_mean, state.running_var, None)

    def pullback(
        self,
        dy: np.ndarray,
        x: np.ndarray,
        weight: np.ndarray | None,
        residuals: Residuals,
        eps: float,
        weights: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.whole.takes(x, weights, dy):
            return self.whole.pullback(dy, x, weight, residuals, eps)
        return super().pullback(dy, x, weight, residuals, eps, weights)


def _dtype(name: str | None) -> np.dtype | None:
    if name != "bfloat16":
        return None if name is None else np.dtype(name)
    try:
        import ml_dtypes  # noqa: PLC0415 - the only dtype that NumPy itself does not have
    except ModuleNotFoundError as error:
        message = "NumPy has bfloat16 through ml_dtypes, which is not installed: pip install ml_dtypes."
        raise TypeError(message) from error
    return np.dtype(ml_dtypes.bfloat16)
