"""NumPy's verbs. Everything is on the host, so the border is a cast at most."""

from typing import Any, ClassVar

import numpy as np

from mbn.contract import Backend, Capabilities, Moments
from mbn_numpy import kernels


class NumpyBackend(Backend):
    """The backend of NumPy arrays."""

    name: ClassVar[str] = "numpy"
    capabilities = Capabilities(
        dtypes=frozenset({"float16", "bfloat16", "float32", "float64"}),
        devices=("cpu",),
        mutable=True,
        strided=True,
    )
    version = np.__version__

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

    def moments(self, x: np.ndarray) -> Moments:
        return kernels.moments(np.asarray(x))

    def normalize(
        self,
        x: np.ndarray,
        mean: kernels.Mean,
        var: np.ndarray,
        weight: np.ndarray | None,
        bias: np.ndarray | None,
        eps: float,
    ) -> np.ndarray:
        return kernels.normalize(np.asarray(x), mean, var, weight, bias, eps)

    def lerp(self, start: np.ndarray, end: kernels.Mean, weight: float) -> np.ndarray:
        return kernels.lerp(start, end, weight)

    def reciprocal(self, count: np.ndarray) -> np.ndarray:
        return 1 / count


def _dtype(name: str | None) -> np.dtype | None:
    if name != "bfloat16":
        return None if name is None else np.dtype(name)
    try:
        import ml_dtypes  # noqa: PLC0415 - the only dtype that NumPy itself does not have
    except ModuleNotFoundError as error:
        message = "NumPy has bfloat16 through ml_dtypes, which is not installed: pip install ml_dtypes."
        raise TypeError(message) from error
    return np.dtype(ml_dtypes.bfloat16)
