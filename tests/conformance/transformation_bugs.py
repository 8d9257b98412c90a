"""Bugs in the transformations that a backend declares."""

from typing import Any

import numpy as np
from toy import TRANSFORMS, Toy, looped


class DeclaresAutogradAndHasNone(Toy):
    capabilities = Toy.capabilities._replace(autograd=True)


class DeclaresVmapAndHasNone(Toy):
    transforms = TRANSFORMS._replace(vmap=None)


def first_alone(function: Any) -> Any:
    call = looped(function)
    return lambda *arguments: call(*(np.stack([values[0]] * len(values)) for values in arguments))


class VmapOfTheFirst(Toy):
    transforms = TRANSFORMS._replace(vmap=first_alone)


class DeclaresJitAndHasNone(Toy):
    transforms = TRANSFORMS._replace(jit=None)


class DeclaresCompileAndHasNone(Toy):
    transforms = TRANSFORMS._replace(compile=None)


_NONE = "TypeError: 'NoneType' object is not callable"

BUGS = [
    (DeclaresAutogradAndHasNone, "test_grad_and_pullback_are_accurate", "NotImplementedError"),
    (DeclaresVmapAndHasNone, "test_vmap_of_a_training_step_is_accurate", _NONE),
    (VmapOfTheFirst, "test_vmap_of_a_training_step_is_accurate"),
    (DeclaresJitAndHasNone, "test_jit", _NONE),
    (DeclaresCompileAndHasNone, "test_compiled", _NONE),
]
"""Wrong backends, each with the test that must fail on it."""
