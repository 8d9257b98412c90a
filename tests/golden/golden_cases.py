"""Calls whose results are recorded: every backend, path, dtype, mask and memory order, small and large.

``record.py`` records the results of a commit; ``test_golden.py`` compares those of every later commit with them.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import mbn
from mbn import functional
from mbn.contract import layer_dtype

EXACT = ("numpy", "numba", "torch")
"""The backends whose bits must stay. XLA may change JAX's bits, so JAX's values only have to stay within the bounds."""
BACKENDS = (*EXACT, "jax")
KEPT = 64
"""The number of values that are recorded of each array of JAX."""
SHAPES = {
    "two values": (2, 1),
    "few": (7, 3),
    "small": (32, 64),
    "medium": (1024, 256),
    "large": (70001, 9),
    "few positions": (4, 3, 5),
    "small positions": (16, 8, 33),
    "medium positions": (16, 64, 128),
    "large positions": (301, 32, 65),
}
_DTYPES = ("float16", "bfloat16", "float32", "float64")


class Case(NamedTuple):
    """One call and its pullback, or another use of a backend."""

    shape: str
    dtype: str = "float32"
    layer: str = ""
    """The dtype of parameters and statistics, if it is not the default for x."""
    values: str = "ordinary"
    weights: str = "none"
    order: str = "C"
    settings: tuple[tuple[str, Any], ...] = ()
    training: bool = True
    way: str = "vjp"
    """How results are computed: by ``vjp``, ``out``, ``fit``, or a transformation of the framework."""

    def __str__(self) -> str:
        """Return a unique name, of the fields that differ from their defaults."""
        parts = [self.shape, self.dtype]
        for field, usual in self._field_defaults.items():
            value = getattr(self, field)
            if field != "dtype" and value != usual:
                parts.append(f"{field}={dict(value) if field == 'settings' else value}")
        return ", ".join(parts)


def _settings(**settings: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(settings.items())


CALLED = Case("small")
"""The case whose layers are recorded as files."""


def cases() -> list[Case]:
    """Return all cases, always in the same order."""
    positions = [name for name, shape in SHAPES.items() if len(shape) == 3]
    some = ("few", "small positions", "large")
    found = [Case(shape, dtype) for shape, dtype in itertools.product(SHAPES, _DTYPES)]
    found += [Case(shape, dtype, layer="float64") for shape in some for dtype in ("float16", "float32")]
    found += [Case(shape, dtype, training=False) for shape in SHAPES for dtype in _DTYPES]
    for dtype in ("float32", "float64"):
        found += [
            Case(shape, dtype, values=values)
            for shape in ("few", "medium", "large positions")
            for values in ("offset", "outlier", "tiny", "huge", "constant", "not a number")
        ]
        found += [Case(shape, dtype, values="huge", training=False) for shape in ("few", "medium")]
        found += [
            Case(shape, dtype, order=order)
            for shape in ("small", "medium", "small positions", "large positions")
            for order in ("F", "sliced", "expanded", "swapped")
        ]
        found += [Case(shape, dtype, settings=_settings(axis=-1)) for shape in positions]
        found += [
            Case(shape, dtype, settings=settings, training=training)
            for shape in ("few", "small positions")
            for settings in (
                _settings(affine=False),
                _settings(bias=False),
                _settings(momentum=None),
                _settings(correction=0),
                _settings(eps=0.0),
                _settings(track_running_stats=False),
            )
            for training in (True, False)
        ]
        found += [Case(shape, dtype, way="out") for shape in ("small", "large positions")]
        found += [Case(shape, dtype, way="fit") for shape in ("small", "small positions")]
        found += [Case("small", dtype, training=training, way="autograd") for training in (True, False)]
        found += [
            Case("few", dtype, weights="sample_weight", way="autograd"),
            Case("few positions", dtype, way="second"),
        ]
        found += [Case("few", dtype, way="vmap"), Case("few", dtype, training=False, way="vmap")]
    found += [
        Case(shape, dtype, weights=weights, training=training)
        for shape in ("few", "medium", "large", *positions)
        for dtype in ("float16", "float32", "float64")
        for weights in ("mask", "sample_weight", *(["lengths"] if shape in positions else []))
        for training in ((True, False) if shape in ("few", "small positions") else (True,))
    ]
    return found


def inputs(case: Case) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Return x, dy, and the mask, lengths or weights.

    They are made of PCG64 and additions alone, whose results are the same in every release of NumPy.
    """
    shape = SHAPES[case.shape]
    generator = np.random.Generator(np.random.PCG64(hash_of(case.shape)))

    def bell(*shape: int) -> np.ndarray:
        return 2 * (generator.random((3, *shape)).sum(0) - 1.5)  # near a normal distribution, by additions alone

    x, dy = 3 + 2 * bell(*shape), bell(*shape)
    _change(x, case)
    weights = _weights(case, generator)
    kind = np.dtype(ml_dtypes.bfloat16 if case.dtype == "bfloat16" else case.dtype)
    with np.errstate(over="ignore"):
        x, dy = x.astype(kind), dy.astype(kind)
    return _ordered(x, case), _ordered(dy, case), weights


def _change(x: np.ndarray, case: Case) -> None:
    """Change ordinary values, in place, to those of a case."""
    largest = {"float16": 3e4, "bfloat16": 1e38, "float32": 1e38, "float64": 1e300}[case.dtype]
    match case.values:
        case "offset":
            x += 1e6
        case "outlier":
            x[0] += largest / 1e8
        case "tiny":
            x *= {"float32": 1e-40, "float64": 1e-310}[case.dtype]
        case "huge":
            x *= largest / 100
        case "constant":
            x[...] = x[:1]
        case "not a number":
            x[0, 0] = np.nan


def _weights(case: Case, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Return the mask, lengths or sample weights of a case, by name; at least two values count."""
    shape = SHAPES[case.shape]
    cells = shape[0], *shape[2:]
    match case.weights:
        case "mask":
            given = generator.random(cells) > 0.3
        case "lengths":
            given = (generator.random(shape[0]) * (shape[2] + 1)).astype(np.int64)
        case "sample_weight":
            given = np.where(generator.random(cells) > 0.2, generator.random(cells), 0)
        case _:
            return {}
    given.reshape(-1)[:2] = given.max()
    return {case.weights: given}


def _ordered(values: np.ndarray, case: Case) -> np.ndarray:
    """Return values in the memory order of a case, with their channels last if its axis is -1."""
    if ("axis", -1) in case.settings:
        values = np.ascontiguousarray(values.swapaxes(1, -1))
    match case.order:
        case "F":
            return np.asfortranarray(values)
        case "sliced":
            wide = np.zeros((*values.shape[:-1], 2 * values.shape[-1]), values.dtype)
            wide[..., ::2] = values
            return wide[..., ::2]
        case "expanded":
            return np.broadcast_to(values[:1] if values.ndim == 2 else values[..., :1], values.shape)
        case "swapped":
            return np.ascontiguousarray(values.swapaxes(0, -1)).swapaxes(0, -1)
    return values


def hash_of(text: str) -> int:
    """Return a hash of a text that is the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def statistics_dtype(case: Case) -> str:
    """Return the dtype of parameters and statistics of a case."""
    return case.layer or layer_dtype(case.dtype)


def layer_of(case: Case, backend: str) -> mbn.BatchNorm1d:
    """Return a layer whose entries are not those that it was made with."""
    channels, dtype = SHAPES[case.shape][1], statistics_dtype(case)
    bn = mbn.BatchNorm1d(channels, dtype=dtype, backend=backend, **dict(case.settings))
    ramp = np.arange(channels) / channels
    values = {"weight": 1.5 - ramp, "bias": ramp - 0.25, "running_mean": 3 + ramp, "running_var": 4 + ramp}
    held = bn.state_dict()
    kept = {key: values[key].astype(dtype) for key in held if key in values}
    bn.load_state_dict(held | kept)
    return bn.train(case.training)


def results(case: Case, backend: str) -> dict[str, np.ndarray]:
    """Return all results of a case on a backend, by name; bfloat16 as float32, which holds it exactly."""
    with _wide_enough(backend, case):
        bn, (x, dy, weights) = layer_of(case, backend), inputs(case)
        own = mbn.get_backend(backend)
        x, dy = own.asarray(x), own.asarray(dy)
        weights = {
            key: own.asarray(value, bn.dtype if value.dtype == np.float64 else None) for key, value in weights.items()
        }
        found = _WAYS[case.way](bn, x, dy, weights)
        for key, value in bn.state_dict().items():
            if key.startswith(("running", "num")):
                found[key] = value
        return {key: _exactly(own.to_numpy(value)) for key, value in found.items() if value is not None}


def _wide_enough(backend: str, case: Case) -> AbstractContextManager[Any]:
    if backend != "jax" or "float64" not in (case.dtype, case.layer):
        return nullcontext()
    from mbn_jax.kernels.primitives import enable_x64

    return enable_x64(True)


def _exactly(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32) if value.dtype.name == "bfloat16" else value


def _vjp(bn: mbn.BatchNorm1d, x: Any, dy: Any, weights: dict[str, Any]) -> dict[str, Any]:
    y, pullback = bn.vjp(x, **weights)
    return {"y": y, **dict(zip(("dx", "dweight", "dbias"), pullback(dy), strict=True))}


def _out(bn: mbn.BatchNorm1d, x: Any, dy: Any, weights: dict[str, Any]) -> dict[str, Any]:
    given = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    given = [vector.detach() if hasattr(vector, "detach") else vector for vector in given]
    y, mean, var = functional.batch_norm(x, *given, training=True, out=dy, **weights)
    return {"y": y, "new mean": mean, "new var": var}


def _fit(bn: mbn.BatchNorm1d, x: Any, dy: Any, weights: dict[str, Any]) -> dict[str, Any]:
    bn.fit([x, dy, x[:5]], progress=False)
    return {}


def _autograd(bn: mbn.BatchNorm1d, x: Any, dy: Any, weights: dict[str, Any]) -> dict[str, Any]:
    if bn.backend == "torch":
        x.requires_grad_()
        y = bn(x, **weights)
        y.backward(dy)
        return {"y": y.detach(), "dx": x.grad, "dweight": bn.weight.grad, "dbias": bn.bias.grad}
    import jax

    def loss(params: Any, x: Any) -> Any:
        y, _ = bn.apply(params, bn.state, x, training=bn.training, **weights)
        return (y * dy).sum()

    (dweight, dbias), dx = jax.jit(jax.grad(loss, (0, 1)))(bn.params, x)
    return {"dx": dx, "dweight": dweight, "dbias": dbias}


def _second(bn: mbn.BatchNorm1d, x: Any, dy: Any, weights: dict[str, Any]) -> dict[str, Any]:
    if bn.backend == "torch":
        import torch

        x.requires_grad_()
        (dx,) = torch.autograd.grad((bn(x, **weights) * dy).sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad((dx**2).sum(), x)
        return {"dx": dx.detach(), "ddx": ddx}
    import jax

    def loss(x: Any) -> Any:
        return (bn.apply(bn.params, bn.state, x, training=True, **weights)[0] * dy).sum()

    return {"ddx": jax.jit(jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum()))(x)}


def _vmap(bn: mbn.BatchNorm1d, x: Any, dy: Any, weights: dict[str, Any]) -> dict[str, Any]:
    own = mbn.get_backend(bn.backend)
    stack, vmap = _STACKS[bn.backend]()

    def call(x: Any) -> Any:
        return bn.apply(bn.params, bn.state, x, training=bn.training, **weights)[0]

    y = vmap(call)(stack([x, dy]))
    return {"y": own.constant(y)}


def _of_torch() -> tuple[Callable[..., Any], Callable[..., Any]]:
    import torch

    return torch.stack, torch.func.vmap


def _of_jax() -> tuple[Callable[..., Any], Callable[..., Any]]:
    import jax

    return jax.numpy.stack, jax.vmap


_STACKS = {"torch": _of_torch, "jax": _of_jax}
_WAYS = {"vjp": _vjp, "out": _out, "fit": _fit, "autograd": _autograd, "second": _second, "vmap": _vmap}


def of_backend(backend: str) -> Iterator[Case]:
    """Iterate over the cases that apply to a backend."""
    for case in cases():
        if case.way in ("autograd", "second", "vmap") and backend in ("numpy", "numba"):
            continue
        # Each case takes JAX seconds to compile, and JAX has no memory orders; the suite tests the others on JAX.
        is_few = case.shape.startswith("few") and case.dtype == "float32" and case.order == "C" and case.way != "out"
        if backend == "jax" and not is_few:
            continue
        yield case


def digest(value: np.ndarray) -> str:
    """Return a digest of all bits of an array; all NaNs count as the same."""
    canonical = np.where(np.isnan(value), np.nan, value).astype(value.dtype)
    return hashlib.sha256(np.ascontiguousarray(canonical).tobytes()).hexdigest()[:32]


def excerpt(value: np.ndarray) -> np.ndarray:
    """Return some values of an array, at equal distances from each other."""
    flat = value.reshape(-1)
    return flat[:: max(1, flat.size // KEPT)][:KEPT]


def called(backend: str) -> mbn.BatchNorm1d:
    """Return a layer after the call of ``CALLED``."""
    bn, (x, _, _) = layer_of(CALLED, backend), inputs(CALLED)
    bn(mbn.get_backend(backend).asarray(x))
    return bn


def waiting(backend: str) -> mbn.BatchNorm1d:
    """Return a layer that takes its number of features from its first input."""
    return mbn.BatchNorm1d(None, momentum=None, backend=backend).eval()
