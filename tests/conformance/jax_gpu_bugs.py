"""Bugs planted in JAX's form for GPUs, which runs on the CPU for once.

``python jax_gpu_bugs.py FOLDER BUG...`` runs for each bug the test of the suite that has to name it.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from planted import Bug, conform


def planted(plant: Callable[[], None]) -> Callable[[], None]:
    """Return what plants a bug once the form is taken. JAX is imported there: a process that has it cannot fork."""

    def take_form_and_plant() -> None:
        import jax_gpu_form  # noqa: PLC0415

        assert jax_gpu_form.MAPS
        plant()

    return take_form_and_plant


def last_run_dropped() -> None:
    from mbn_jax import runs  # noqa: PLC0415

    in_runs = runs._in_runs

    def whole_runs(x, axis):
        run = min(runs.RUN, x.shape[axis])
        whole = x.shape[axis] // run * run
        return in_runs(x.at[(slice(None),) * axis + (slice(whole, None),)].set(0), axis)

    runs._in_runs = whole_runs


def deviations_from_nothing() -> None:
    from mbn_jax import kernels  # noqa: PLC0415

    kernels._first_few = lambda x: kernels.jnp.zeros(x.shape[1], "float64")


def channels_mixed_up() -> None:
    from mbn_jax import forms, kernels  # noqa: PLC0415

    kernels.GPU = forms.GPU._replace(place=lambda vector, ndim: forms.GPU.place(vector[::-1], ndim))


BUGS = {
    "dropped": Bug(planted(last_run_dropped), "test_long_channels"),
    "cancelled": Bug(planted(deviations_from_nothing), "test_float32_with_a_large_mean"),
    "mixed up": Bug(planted(channels_mixed_up), "test_first_values_masked"),
}


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    conform("jax", {name: BUGS[name] for name in names}, Path(folder))
