"""Bugs planted in MLX's backend and in the pairs of float32 that it computes with on a GPU.

``python mlx_bugs.py FOLDER BUG...`` tries for each bug the test of the suite that must fail.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planted import Bug, conform


def in_pairs(plant: Callable[[], None]) -> Callable[[], None]:
    """Return a function that makes MLX compute as on a GPU, and plants a bug."""

    def compute_in_pairs_and_plant() -> None:
        import mlx_gpu_numbers

        assert mlx_gpu_numbers.array_api
        plant()

    return compute_in_pairs_and_plant


def derivatives_of_statistics() -> None:
    from mbn_mlx.backend import MlxKernels

    MlxKernels.constant = lambda _self, x: x


def default_dtype_of_mlx() -> None:
    from mbn_mlx import backend

    backend.MlxBackend.asarray = lambda _self, x, dtype=None, device=None: backend.mx.array(x)


def weights_unchecked_where_traced() -> None:
    from mbn import array_api

    checked = array_api.ArrayAPIKernels.sample_weights

    def sample_weights(*arguments: Any) -> Any:
        weights = checked(*arguments)
        xp = weights.__array_namespace__()
        return xp.where(xp.isnan(weights), 1.0, weights)

    array_api.ArrayAPIKernels.sample_weights = sample_weights


def pairs_without_a_rest() -> None:
    from mbn import array_api

    array_api._two_sum = lambda a, b: (a + b, 0 * a)


def numbers_of_python_in_float32() -> None:
    from mbn import array_api

    array_api._pair = lambda x: x if isinstance(x, array_api.Pair) else array_api.Pair(x)


BUGS = {
    "derivative of constants": Bug(derivatives_of_statistics, "test_running_statistics_have_no_derivative"),
    "float64 dropped": Bug(default_dtype_of_mlx, "test_long_channels"),
    "weights unchecked": Bug(weights_unchecked_where_traced, "test_invalid_traced_mask_arguments_give_nan"),
    "rest dropped": Bug(in_pairs(pairs_without_a_rest), "test_float32_is_accurate_with_a_large_mean"),
    "numbers rounded": Bug(in_pairs(numbers_of_python_in_float32), "test_masked_training_is_accurate_on_drawn_batches"),
}


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    conform("mlx", {name: BUGS[name] for name in names}, Path(folder))
