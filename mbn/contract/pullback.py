"""The gradient of one call, as a function that the frontend makes of a backend's kernels."""

from abc import ABC, abstractmethod
from typing import Any

from mbn.contract.values import Array


class Pullback(ABC):
    """The function from the gradient of an output to those of x, weight and bias, which ``bn.vjp`` returns.

    It may be called any number of times, gives the same gradients each time, and changes no state.
    """

    @abstractmethod
    def __call__(self, dy: Any) -> tuple[Array, Array | None, Array | None]:
        """Return the gradients ``(dx, dweight, dbias)`` of a loss, given ``dy``, its gradient by the output.

        Args:
            dy: in the shape and dtype of the output; an array of its backend, or host data.

        Returns:
            ``dx`` in the shape, dtype, memory order and on the device of x; ``dweight`` and ``dbias``, (C,) in the
            layer's dtype, or None where there is no such parameter. At a position without a value ``dx`` is 0, and
            ``dy`` has no effect.

        Raises:
            TypeError: a wrong dtype, or another framework's array.
            ValueError: a wrong shape or device.

        Source: Ioffe and Szegedy, Batch Normalization, 2015 (arXiv:1502.03167), section 3.
        """
