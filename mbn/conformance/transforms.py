"""The transformations of a framework, with which the suite tests the capabilities that a backend declares.

This file has those of mbn's own backends. A plug-in supplies a :class:`Transforms` by an entry point of the group
``mbn.transforms`` with the name of its backend, or in its own tests by :func:`register_transforms`.
"""

import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

from mbn.contract import Backend

ENTRY_POINTS = "mbn.transforms"


def _missing(*_: Any) -> Any:
    raise NotImplementedError(
        "the backend declares a transformation that was not given to the suite: see docs/backends.md, Transforms."
    )


class Transforms(NamedTuple):
    """The transformations of functions that a framework has."""

    grad: Callable[..., Any] = _missing
    """``grad(function)``: the gradient of a function whose result is a scalar, by its first argument (``autograd``)."""
    jvp: Callable[..., Any] = _missing
    """``jvp(function, x, tangent)``: the derivative of a function of x in a direction, forwards (``autograd``)."""
    vmap: Callable[..., Any] = _missing
    """``vmap(function)``: the function over the first axes of all its arguments and results (``vmap``)."""
    jit: Callable[..., Any] = _missing
    """``jit(function)``: a pure function of arrays, compiled (``jit``)."""
    named_vmap: Callable[..., Any] | None = None
    """``named_vmap(function, name)``: as ``vmap``, over an axis with a name that is the group of layers (``replicas``).

    It is None where replicas are in processes, which the suite replaces by threads.
    """
    compile: Callable[..., Any] = _missing
    """``compile(function)``: a function, possibly with side effects, compiled without a graph break (``compile``)."""


_registered: dict[str, Transforms] = {}


def register_transforms(name: str, transforms: Transforms) -> None:
    """Give the suite the transformations of the backend with this name."""
    _registered[name] = transforms


def transforms_of(backend: Backend) -> Transforms:
    """Return the transformations of a backend's framework."""
    name = backend.name
    if name not in _registered:
        if name in _BUILT_IN:
            _registered[name] = _BUILT_IN[name]()
        else:
            points = metadata.entry_points(group=ENTRY_POINTS, name=name)
            _registered[name] = next((point.load() for point in points), Transforms())
    return _registered[name]


def _of_torch() -> Transforms:
    import torch

    def jvp(function: Callable[..., Any], x: Any, tangent: Any) -> Any:
        return _quiet(torch.func.jvp)(function, (x,), (tangent,))[1]

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return _quiet(torch.compile(function, fullgraph=True))

    return Transforms(torch.func.grad, jvp, torch.func.vmap, compile=compiled)


def _quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function without one warning: some features of Torch use others that Torch has deprecated."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
            return function(*args, **kwargs)

    return call


def _of_jax() -> Transforms:
    import jax

    return Transforms(
        grad=jax.grad,
        jvp=lambda function, x, tangent: jax.jvp(function, (x,), (tangent,))[1],
        vmap=jax.vmap,
        jit=jax.jit,
        named_vmap=lambda function, name: jax.vmap(function, axis_name=name),
    )


def _of_mlx() -> Transforms:
    import mlx.core as mx

    return Transforms(
        grad=mx.grad,
        jvp=lambda function, x, tangent: mx.jvp(function, [x], [tangent])[1][0],
        vmap=mx.vmap,
        jit=mx.compile,
    )


_BUILT_IN = {"torch": _of_torch, "jax": _of_jax, "mlx": _of_mlx}
