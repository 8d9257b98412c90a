"""Bugs in the transformations that a backend declares."""

from typing import Any

import numpy as np
from toy import Toy

from mbn.contract import Backend


class DeclaresAutogradAndHasNone(Toy):
    capabilities = Toy.capabilities._replace(autograd=True)


class DeclaresVmapAndHasNone(Toy):
    vmap = Backend.vmap


class VmapOfTheFirst(Toy):
    def vmap(self, function: Any) -> Any:
        first_alone = super().vmap(function)
        return lambda *arguments: first_alone(*(np.stack([values[0]] * len(values)) for values in arguments))


class DeclaresJitAndHasNone(Toy):
    jit = Backend.jit


class DeclaresCompileAndHasNone(Toy):
    compile = Backend.compile


BUGS = [
    (DeclaresAutogradAndHasNone, "test_gradient_is_that_of_the_pullback"),
    (DeclaresVmapAndHasNone, "test_vmap_is_a_loop"),
    (VmapOfTheFirst, "test_vmap_is_a_loop"),
    (DeclaresJitAndHasNone, "test_jit"),
    (DeclaresCompileAndHasNone, "test_compiled"),
]
"""Backends, and the tests that have to name what is wrong with them."""
