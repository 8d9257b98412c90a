"""The part of one backend in a comparison, as a process of its own."""

import statistics
import time
from collections.abc import Callable
from typing import Any

from mbn import BatchNorm1d, get_backend
from mbn.commands.availability import refusal_in_this_process
from mbn.commands.compare.messages import Job, Measured, Outcome
from mbn.commands.processes import NotRun, broken, serve
from mbn.contract import Backend

_SECONDS = 0.02
"""Seconds for which a call is timed."""
_CALLS = range(5, 1000)
"""The least and the greatest number of calls in that time."""


def outcomes(spec: str, jobs: list[Job]) -> list[Outcome]:
    """Return the outcome of each job on a backend, ``NAME`` or ``NAME:DEVICE``; its errors become outcomes too."""
    refused = refusal_in_this_process(spec)
    if refused is not None:
        return [refused] * len(jobs)
    name, _, device = spec.partition(":")
    return [_outcome(get_backend(name), device or None, job) for job in jobs]


def _outcome(backend: Backend, device: str | None, job: Job) -> Outcome:
    try:
        if job.example.dtype not in backend.capabilities.dtypes:
            return NotRun(f"{backend.name} has no {job.example.dtype} here", broken=False)
        return _measure(backend, device, job)
    except Exception as error:  # noqa: BLE001 - a framework may raise anything; the user reads it
        return broken(error)


def _measure(backend: Backend, device: str | None, job: Job) -> Measured:
    example = job.example
    layer = BatchNorm1d(
        len(example.weight), example.eps, example.momentum, device=device, dtype=example.layer_dtype, backend=backend
    )
    layer.weight, layer.bias = example.weight, example.bias
    x = backend.asarray(example.x, device=device)
    for _ in range(example.steps):
        train_output = layer(x)
    arrays = {"train_output": train_output, "running_mean": layer.running_mean, "running_var": layer.running_var}
    layer.running_mean, layer.running_var = job.statistics
    arrays["eval_output"] = layer.eval()(x)
    return Measured(
        version=backend.version,
        device=device or backend.capabilities.devices[0],
        arrays={quantity: backend.to_numpy(array) for quantity, array in arrays.items()},
        seconds={"eval": _seconds_per_call(backend, layer, x), "train": _seconds_per_call(backend, layer.train(), x)},
    )


def _seconds_per_call(backend: Backend, layer: BatchNorm1d, x: Any) -> float:
    def wait(y: Any) -> None:  # a framework may queue its work; a value on the host has been computed
        backend.to_numpy(y[:1, :1, ...])

    y = layer(x)
    wait(y)
    return max(0.0, _median(lambda: wait(layer(x))) - _median(lambda: wait(y)))


def _median(call: Callable[[], None]) -> float:
    seconds: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(seconds) < _CALLS.start or (len(seconds) < _CALLS.stop and time.perf_counter() < end):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    serve(lambda question: outcomes(*question))
