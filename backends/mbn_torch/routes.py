"""Which kernels do the work on tensors: those of the place where their values are, if nothing has to see through it."""

import warnings
from functools import cache
from types import ModuleType

import torch

from mbn_torch import formulas, host, kernels
from mbn_torch.tracing import HOST, is_scripted, place


def chosen(*values: torch.Tensor | None) -> ModuleType:
    """Return what does the arithmetic on these where autograd need not record it; None is nothing."""
    where = place(*values)
    if where == HOST:
        return host
    if where is None:  # a graph is to be that of any batch, and made of operations that exporters know
        return formulas if is_scripted() else kernels
    return _on_gpu(where) or kernels


@cache
def _on_gpu(index: int) -> ModuleType | None:
    """Return the kernels in Triton if it works with this GPU.

    Not all builds of Torch bring it; it needs a C compiler, and a card that is not too old for it.
    """
    try:
        from mbn_torch import cuda  # noqa: PLC0415 - a quarter of a second, for those alone who have a GPU

        one = torch.ones((1, 1), device=torch.device("cuda", index))
        cuda.normalize(one, one[0], one[0], None, None, 0.0)
    except ModuleNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001 - whatever it is, there are kernels that work
        message = f"Triton does not work with this GPU, which makes mbn slower: {type(error).__name__}: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None
    return cuda
