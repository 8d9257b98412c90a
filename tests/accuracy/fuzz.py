"""Random calls of one backend, held to docs/accuracy.md: ``python tests/accuracy/fuzz.py BACKEND --cases 20000``.

A case is drawn from one number, its seed, and is numerically hard: values of any size that the dtype has, channels of
different sizes, terms that cancel, dominating values, constants; any eps, parameters, statistics and weights. Shapes
come from a short list, since some backends compile for each. float64 on JAX needs ``JAX_ENABLE_X64=1``, and
``--few-shapes`` saves JAX most of the compilations.
"""

import argparse
import sys
from typing import Any, NamedTuple

import excuses
import ml_dtypes
import numpy as np
from excuses import least_normal

import mbn
from mbn.conformance import derivatives, oracle, strategies, ulp
from mbn.contract import layer_dtype

SHAPES = [(2, 1), (2, 3), (3, 2), (5, 4), (17, 3), (64, 2), (300, 1), (2, 2, 2), (3, 4, 5), (4, 2, 40), (6, 3, 1)]
LARGE_SHAPES = [(9000, 2), (70, 3, 90)]
"""Shapes of more values than the paths for small arrays take."""
LARGE_SHARE = 0.005
FEW_SHAPES = [(2, 3), (17, 3), (3, 4, 5)]
"""One shape of each kind, for backends that compile for every new one."""
FEW = 8
"""The error of a gradient near 0 in least numbers of its dtype: each of its factors is rounded there."""


class Case(NamedTuple):
    """A call, and the layer that it is made on."""

    x: np.ndarray
    dy: np.ndarray
    layer: dict[str, Any]
    entries: dict[str, np.ndarray]
    training: bool
    masking: dict[str, np.ndarray]
    weights: np.ndarray | None

    def __str__(self) -> str:
        mode = "training" if self.training else "evaluation"
        masks = f" with {', '.join(self.masking)}" if self.masking else ""
        return f"x {self.x.dtype}{self.x.shape}, layer {self.layer}, {mode}{masks}"


def drawn(seed: int, dtypes: list[str], shapes: list[tuple[int, ...]] | None = None) -> Case:
    """Return the case of a seed, with one of the given shapes or of all."""
    generator = np.random.default_rng(seed)
    dtype = str(generator.choice(dtypes))
    wide = "float64" if "float64" in dtypes and generator.random() < 0.2 else layer_dtype(dtype)
    shape = _one_of(generator, shapes or (LARGE_SHAPES if generator.random() < LARGE_SHARE else SHAPES))
    c, cells = shape[1], (shape[0], *shape[2:])
    x = _values(generator, shape, dtype)
    if dtype in {"float32", "float64"} and generator.random() < 0.05:
        x = x.astype(x.dtype.newbyteorder())
    eps = _one_of(generator, [0.0, 1e-12, 1e-7, 1e-5, 1e-3, 1.0, 10.0 ** generator.uniform(-40, 3)])
    layer = {
        "num_features": c,
        "dtype": wide,
        "eps": eps,
        "momentum": _one_of(generator, [0.1, 0.25, 0.9, 1.0]),
        "correction": int(generator.integers(0, 2)),
        "affine": bool(generator.random() < 0.7),
    }
    size = np.abs(x.astype(np.float64)).max()
    entries = {
        "running_mean": _sized(generator, c, wide, size),
        "running_var": np.abs(_sized(generator, c, wide, min(size, 1e150) ** 2)),
    }
    if layer["affine"]:
        entries["weight"], entries["bias"] = (_sized(generator, c, wide, 1.0) for _ in range(2))
    masking, weights = _masking(generator, cells, wide)
    dy = _values(generator, shape, dtype)
    return Case(x, dy, layer, entries, bool(generator.random() < 0.7), masking, weights)


def _one_of(generator: np.random.Generator, choices: list[Any]) -> Any:
    return choices[generator.integers(len(choices))]


def _limits(dtype: str) -> tuple[float, float]:
    """Return the exponents of the least number of a dtype and of a large one whose sums do not overflow."""
    info = ml_dtypes.finfo(dtype)
    return float(np.log2(float(info.smallest_subnormal))), info.maxexp - 4


def _size(generator: np.random.Generator, dtype: str) -> float:
    """Return a power of two: mostly of an ordinary size, otherwise of any size that a dtype has."""
    least, most = _limits(dtype)
    if generator.random() < 0.6:
        return 2.0 ** generator.integers(max(least, -10), min(most, 10))
    return 2.0 ** generator.integers(least, most)


def _values(generator: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return an array whose channels all have one pattern and size, or each their own."""
    values = np.empty(shape)
    pattern, size = _one_of(generator, strategies.PATTERNS), _size(generator, dtype)
    is_mixed = generator.random() < 0.3
    digits = ml_dtypes.finfo(dtype).nmant
    for channel in range(shape[1]):
        if is_mixed:
            pattern, size = _one_of(generator, strategies.PATTERNS), _size(generator, dtype)
        column = strategies.pattern(pattern, (shape[0], 1, *shape[2:]), generator)
        if generator.random() < 0.1:
            column.flat[generator.integers(column.size)] = 2.0 ** generator.integers(5, 30)
        if generator.random() < 0.4:
            column = column * 2.0 ** -generator.integers(0, digits) + generator.normal()
        values[:, channel : channel + 1] = column * (size / max(1, np.abs(column).max() / 8))
    return values.astype(dtype)


def _sized(generator: np.random.Generator, c: int, dtype: str, typical: float) -> np.ndarray:
    """Return parameters or statistics: of a typical size or of any other, and a few zeros."""
    size = np.array([typical if generator.random() < 0.7 else _size(generator, dtype) for _ in range(c)])
    vector = generator.normal(size=c) * np.minimum(size, 2.0 ** (_limits(dtype)[1]))
    return np.where(generator.random(c) < 0.05, 0, vector).astype(dtype)


def _masking(
    generator: np.random.Generator, cells: tuple[int, ...], dtype: str
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    kind = generator.random()
    if kind < 0.6:
        return {}, None
    if kind < 0.9:
        kinds = strategies.maskings(cells, int(generator.integers(10)))
        return tuple(_one_of(generator, list(kinds.values())))
    weights = (generator.uniform(0.5, 2, cells) * _size(generator, dtype)).astype(dtype)
    return {"sample_weight": weights}, weights.astype(np.float64)


def violations(backend: mbn.contract.Backend, case: Case) -> list[str]:
    """Return the wrong results of a backend in a case, each as a name and its error."""
    flushes = _takes_subnormals_for_0(backend)
    case = _without_subnormals(case) if flushes else case
    bn = mbn.BatchNorm1d(backend=backend, **case.layer).train(case.training)
    for name, value in case.entries.items():
        setattr(bn, name, value)
    eps, weight = case.layer["eps"], case.entries.get("weight")
    y, pullback = bn.vjp(backend.asarray(case.x) if case.x.dtype.isnative else case.x, **case.masking)
    gradients = pullback(backend.asarray(case.dy))
    exact = {}
    if case.training:
        arguments = {"momentum": case.layer["momentum"], "eps": eps, "correction": case.layer["correction"]}
        step = oracle.train(case.x, **case.entries, **arguments, weights=case.weights)
        exact = {"y": step.y, "running_mean": step.running_mean, "running_var": step.running_var}
    else:
        exact = {"y": oracle.evaluate(case.x, **case.entries, eps=eps, weights=case.weights)}
    results = {"y": y, "running_mean": bn.running_mean, "running_var": bn.running_var}
    if case.training and case.weights is None:
        # With momentum 1 the old statistics have no effect, as in fit.
        step = oracle.train(case.x, **case.entries, **arguments | {"momentum": 1.0})
        exact |= {"fitted mean": step.running_mean, "fitted variance": step.running_var}
        batches = np.array_split(case.x, [1, len(case.x) // 2])
        bn.fit(map(backend.asarray, batches), progress=False)
        results |= {"fitted mean": bn.running_mean, "fitted variance": bn.running_var}
    found, size = [], excuses.sizes(case)
    for name, truth in exact.items():
        host = backend.to_numpy(results[name])
        bounds = ulp.OUTPUT_BOUNDS if name == "y" else ulp.STATISTICS_BOUNDS
        dtype = host.dtype.name
        keep = _representable(truth.hi, truth.magnitude, dtype)
        if flushes:
            keep &= abs(host.astype(np.float64) - truth.hi) > excuses.underflow_error(name, case, size)
        error = ulp.error(host[keep], ulp.Exact(*(part[keep] for part in truth)), dtype)
        if error > bounds[dtype] * excuses.more_ulp(name, case, size):
            found.append(f"{name} is {error:.3g} ulp off")
    statistics = None if case.training else (case.entries["running_mean"], case.entries["running_var"])
    truth = derivatives.gradients(case.x, case.dy, weight, eps=eps, weights=case.weights, statistics=statistics)
    for name, array, terms in zip(("dx", "dweight", "dbias"), gradients, truth.sizes, strict=True):
        if array is not None:
            host, right = backend.to_numpy(array), excuses.right(name, backend.name, case, size)
            error = _gradient_error(host, getattr(truth, name), terms, flushes * least_normal(host.dtype.name), right)
            if error > 1:
                found.append(f"{name} is {error:.3g} times its bound off")
    return found


def _representable(value: np.ndarray, magnitude: np.ndarray, dtype: str) -> np.ndarray:
    """Return True for results that a dtype can hold, together with the terms that they are added from."""
    largest = float(ml_dtypes.finfo(dtype).max)
    return (np.abs(value) < largest) & (magnitude < largest)


def _takes_subnormals_for_0(backend: mbn.contract.Backend) -> bool:
    """Return whether the framework's own arithmetic does, as XLA's on the CPU: docs/accuracy.md excuses it."""
    x = backend.asarray(np.full(1, 1e-40, np.float32))
    return bool(backend.to_numpy(x + x) == 0)


def _without_subnormals(case: Case) -> Case:
    """Return a case with 0 in place of subnormal values, parameters and statistics."""

    def flushed(values: np.ndarray) -> np.ndarray:
        return np.where(abs(values) < least_normal(values.dtype.name), np.zeros((), values.dtype), values)

    entries = {name: flushed(value) for name, value in case.entries.items()}
    return case._replace(x=flushed(case.x).astype(case.x.dtype), dy=flushed(case.dy), entries=entries)


def _gradient_error(actual: np.ndarray, exact: np.ndarray, size: np.ndarray, least: float, right: np.ndarray) -> float:
    """Return the largest error of a gradient as a multiple of the allowed error.

    The allowed error is the bound, relative to the largest gradient of the channel, plus the rounding of its terms,
    plus the rounding near 0; numbers below ``least`` may be 0. Only channels that have to be right are compared.
    """
    dtype = actual.dtype.name
    keep = _representable(exact, size, dtype) & right
    axes = tuple(axis for axis in range(exact.ndim) if axis != 1)
    largest = np.where(keep, np.abs(exact), 0).max(axis=axes, keepdims=True, initial=0)
    allowed = (
        ulp.GRADIENT_BOUNDS[dtype] * largest + ulp.CANCELLATION * size + FEW * ulp.spacing(np.zeros(()), dtype) + least
    )
    error = np.where(keep, np.abs(actual.astype(np.float64) - exact), 0) / allowed
    return float(np.where(np.isnan(error), np.inf, error).max(initial=0))


def run(name: str, seeds: range, shapes: list[tuple[int, ...]] | None) -> int:
    """Print the wrong results of a backend in the cases of these seeds; return the number of these cases."""
    backend = mbn.get_backend(name)
    dtypes = sorted(backend.capabilities.dtypes)
    wrong = 0
    for seed in seeds:
        case = drawn(seed, dtypes, shapes)
        try:
            with np.errstate(all="ignore"):
                found = violations(backend, case)
        except Exception as error:  # noqa: BLE001 - any error is a violation, and the next case is tried
            found = [f"raises {type(error).__name__}: {error}".partition("\n")[0]]
        if found:
            wrong += 1
            print(f"seed {seed}: {case}: {'; '.join(found)}")
    print(f"{name}: {len(seeds)} cases, {wrong} with violations")
    return wrong


def main() -> int:
    """Read the command line, try the cases, and return 1 if there are violations."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("backend")
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--few-shapes", action="store_true", help="three shapes, for what compiles for each: JAX")
    arguments = parser.parse_args()
    seeds = range(arguments.first, arguments.first + arguments.cases)
    return int(run(arguments.backend, seeds, FEW_SHAPES if arguments.few_shapes else None) > 0)


if __name__ == "__main__":
    sys.exit(main())
