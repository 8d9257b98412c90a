"""Measure one backend, as a process of its own: ``python _worker.py NAME`` prints all figures as JSON.

The script uses mbn as a program would that has run since its first release. A commit that cannot do something lacks
that figure and no other.
"""

import ctypes
import gc
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from timeit import Timer
from typing import Any

import numpy as np

COPY = "copy"
"""A copy of x, measured like a backend. It is the same for all commits, so it shows how fast the machine was."""
TINY = (2, 1)
SHAPES = ((32, 64), (1024, 256), (4096, 64, 16), (65536, 256))
"""A small and a medium input, which fit caches, and two large ones: 16 and 64 MiB."""
MODES = ("train", "eval", "backward")
LARGE = SHAPES[-1]
QUANTITIES = ("y, training", "y, evaluation", "running mean", "running variance", "gradient of x")

_ROUNDS = 9
_SAMPLE = 0.01
"""The least seconds of a sample: shorter calls are timed several at a time."""
_OFFSET = 1e4
"""The mean of x. There, sums of squares and float32 sums of values have lost most of their digits."""
_MOMENTUM, _EPS = 0.1, 1e-5

Figures = dict[str, float]
"""Figures by the names that ``key`` makes of a kind and its parameters."""
Call = Callable[[], Any]


def key(kind: str, *parameters: str) -> str:
    """Return the name of a figure."""
    return " | ".join((kind, *parameters))


class _OneCommit:
    """A finder that hides the backends of an installed mbn from a commit that does not have them."""

    def find_spec(self, name: str, *_: object) -> None:
        if re.fullmatch("mbn_[a-z]+", name):
            root = Path(sys.modules["mbn"].__file__).parents[1]
            if not any((root / folder / name).exists() for folder in (".", "backends")):
                raise ModuleNotFoundError(name)


def figures(name: str) -> tuple[Figures, dict[str, str]]:
    """Return the figures of a backend, and by name why a figure is missing."""
    found: Figures = {}
    missing: dict[str, str] = {}
    calls: dict[tuple[str, ...], Call] = {}
    for shape in (TINY, *SHAPES):
        x, dy = (_own(name, np.random.default_rng(seed).standard_normal(shape, np.float32)) for seed in (0, 1))
        for mode in MODES:
            named = ("seconds", mode, str(shape))
            try:
                call = step(name, mode, x, dy)
                call()  # compiles
                if shape == LARGE:
                    found[key("bytes", mode)] = peak(call)
                calls[named] = call
            except Exception as error:  # noqa: BLE001 - an old commit may raise anything
                missing[key(*named)] = repr(error)
    found |= {key(*named): seconds for named, seconds in shortest(calls).items()}
    for quantity, error in errors(name, missing).items():
        found[key("ulp", quantity)] = error
    return found, missing


def step(name: str, mode: str, x: Any, dy: Any) -> Call:
    """Return a call that returns after its outputs have been computed.

    JAX runs a compiled step and waits for its results; the others call a layer.
    """
    if name == COPY:
        if mode != "eval":
            raise NotImplementedError(f"a copy has no mode {mode}")
        return x.copy
    if name == "jax":
        return _compiled(mode, x, dy)
    import mbn

    layer = mbn.BatchNorm1d(x.shape[1], backend=name).train(mode != "eval")
    if mode != "backward":
        return _without_gradients(name, lambda: layer(x))

    def backward() -> Any:
        y, pullback = layer.vjp(x)
        return y, pullback(dy)

    return backward


def _without_gradients(name: str, call: Call) -> Call:
    if name != "torch":
        return call
    import torch

    return torch.no_grad()(call)


def _compiled(mode: str, x: Any, dy: Any) -> Call:
    import jax

    from mbn import functional

    vectors = [jax.numpy.full(x.shape[1], value, "float32") for value in (0, 1, 1, 0)]

    def backward(x: Any, dy: Any, *vectors: Any) -> Any:
        result, pullback = functional.batch_norm_vjp(x, *vectors, training=True, backend="jax")
        return result, tuple(pullback(dy))

    def forward(x: Any, *vectors: Any) -> Any:
        return functional.batch_norm(x, *vectors, training=mode == "train", backend="jax")

    if mode == "backward":
        compiled = jax.jit(backward)
        return lambda: jax.block_until_ready(compiled(x, dy, *vectors))
    compiled = jax.jit(forward)
    return lambda: jax.block_until_ready(compiled(x, *vectors))


def shortest(calls: dict[tuple[str, ...], Call]) -> dict[tuple[str, ...], float]:
    """Return the least seconds of each call. All take turns, so that a disturbance does not hit one alone."""
    timers = {named: Timer(call) for named, call in calls.items()}
    numbers = {named: max(1, round(_SAMPLE / timer.timeit(1))) for named, timer in timers.items()}
    rounds = [
        {named: timers[named].timeit(numbers[named]) / numbers[named] for named in timers} for _ in range(_ROUNDS)
    ]
    return {named: min(seconds[named] for seconds in rounds) for named in timers}


def peak(call: Call) -> float:
    """Return by how many bytes memory grows during a call, its outputs included; Linux alone tells.

    Before it, the C library gives back the memory of earlier calls, which this one could take unnoticed.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    result = call()
    del result
    return _status("VmHWM") - before


def _status(name: str) -> float:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024.0 * int(re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)[1])


def errors(name: str, missing: dict[str, str]) -> Figures:
    """Return the largest errors of a step, in units of the last place of the exact value, at least of that of 1."""
    import mbn

    generator = np.random.default_rng(2)
    x = (_OFFSET + generator.standard_normal((1024, 16))).astype(np.float32)
    dy = generator.standard_normal(x.shape).astype(np.float32)
    exact, exact_dy = x.astype(np.float64), dy.astype(np.float64)
    mean, var = exact.mean(0), exact.var(0)
    rstd = 1 / np.sqrt(var + _EPS)
    normal = (exact - mean) * rstd
    running_mean = _MOMENTUM * mean
    running_var = 1 - _MOMENTUM + _MOMENTUM * exact.var(0, ddof=1)
    found: Figures = {}
    try:
        layer = mbn.BatchNorm1d(x.shape[1], backend=name)
        found["y, training"] = _ulp(_without_gradients(name, lambda: layer(_own(name, x)))(), normal)
        found["running mean"] = _ulp(layer.running_mean, running_mean)
        found["running variance"] = _ulp(layer.running_var, running_var)
        held, spread = _host(layer.running_mean), _host(layer.running_var)
        y = _without_gradients(name, lambda: layer.eval()(_own(name, x)))()
        found["y, evaluation"] = _ulp(y, (exact - held) / np.sqrt(spread + _EPS))
        _, pullback = layer.train().vjp(_own(name, x))
        dx = rstd * (exact_dy - exact_dy.mean(0) - normal * (exact_dy * normal).mean(0))
        found["gradient of x"] = _ulp(pullback(_own(name, dy))[0], dx)
    except Exception as error:  # noqa: BLE001 - as above
        missing |= {key("ulp", quantity): repr(error) for quantity in QUANTITIES if quantity not in found}
    return found


def _ulp(actual: Any, exact: np.ndarray) -> float:
    units = np.spacing(np.maximum(np.abs(exact), 1).astype(np.float32)).astype(np.float64)
    return round(float(np.max(np.abs(_host(actual) - exact) / units)), 2)


def _host(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def _own(name: str, host: np.ndarray) -> Any:
    """Return an array of the library whose arrays the backend takes."""
    if name == "torch":
        import torch

        return torch.from_numpy(host)
    if name == "jax":
        import jax

        return jax.numpy.asarray(host)
    return host


if __name__ == "__main__":
    sys.meta_path.insert(0, _OneCommit())
    json.dump(figures(*sys.argv[1:]), sys.stdout)
