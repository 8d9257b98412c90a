"""Bugs planted in the toy backend, one at a time, on which the suite is tried.

``python toy_bugs.py FOLDER none`` tries the full suite on the correct backend, which must pass; ``python toy_bugs.py
FOLDER BUG...`` tries for each bug the test that must fail. Reports go to the folder.
"""

import sys
from functools import partial
from itertools import chain
from pathlib import Path

import border_bugs
import forward_bugs
import gradient_bugs
import mask_bugs
import merge_bugs
import module_bugs
import out_bugs
import transformation_bugs
from planted import Bug, conform
from toy import TRANSFORMS, Toy, ToyKernels

import mbn
from mbn.conformance import register_transforms


def register(bug: type[Toy] | type[ToyKernels]) -> None:
    toy = type(bug.__name__, (Toy,), {"kernels": bug()}) if issubclass(bug, ToyKernels) else bug
    mbn.register_backend("toy", toy)
    register_transforms("toy", getattr(toy, "transforms", TRANSFORMS))


_FILES = border_bugs, forward_bugs, gradient_bugs, mask_bugs, merge_bugs, module_bugs, out_bugs, transformation_bugs

BUGS = {
    toy.__name__: Bug(partial(register, toy), *expected)
    for toy, *expected in chain.from_iterable(file.BUGS for file in _FILES)
}


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    known = BUGS | {"none": Bug(partial(register, Toy), "test")}
    conform("toy", {name: known[name] for name in names}, Path(folder))
