"""CUDA C++ on the CPU: it compiles the source of kernels with g++ and runs them without a GPU.

It is stricter than a GPU. The threads of a block run one at a time, in an order that is shuffled between barriers;
shared memory is NaN when a block starts; and undefined behaviour ends the launch with a LaunchError that names the
line: a barrier that a thread of the block doesn't reach, a misaligned address, an index outside of an array, an
overflow. It has the part of CUDA C++ that mbn's kernels use; it does not tell how fast they are.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent
_HEADERS = ("cuda.hpp", "block.hpp", "checks.hpp")
_OPTIONS = (
    *("-x", "c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-gnu-unique"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    # CUDA's compiler has no strict aliasing; and every operation has to be rounded on its own, in the given precision.
    *("-fno-strict-aliasing", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-fno-exceptions", "-fno-rtti"),
    "-fsanitize=alignment,null,bounds-strict,shift,integer-divide-by-zero,signed-integer-overflow",
)
_LIBRARIES = ("-Wl,-z,defs", "-nodefaultlibs", "-lm", "-lc", "-lgcc")  # not the sanitizer's library: it would print
_KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\(([^,)]+)[^)]*\)\s*)?(\w+)\s*\(')
_MOST_THREADS = 1024
_LIMITS = (("grid", (2**31 - 1, 65535, 65535)), ("block", (1024, 1024, 64)))
_running = threading.Lock()


class LaunchError(RuntimeError):
    """A launch that CUDA refuses, or undefined behaviour in a kernel."""


class _Description(ctypes.Structure):
    _fields_ = (
        ("launch", ctypes.CFUNCTYPE(ctypes.c_char_p, *[ctypes.c_void_p] * 3, ctypes.c_uint64)),
        ("bound", ctypes.c_uint),
        ("parameters", ctypes.c_uint),
        ("kinds", ctypes.c_char * 64),
        ("sizes", ctypes.c_ubyte * 64),
    )


class Kernel:
    """A kernel of a library.

    Attributes:
        parameters: For each, its kind ("P"ointer, "I"nteger or "F"loat) and its size in bytes.
    """

    def __init__(self, description: _Description) -> None:
        count = description.parameters
        self.parameters = tuple(zip(description.kinds.decode()[:count], description.sizes[:count], strict=True))
        self._description = description

    def launch(self, grid: Sequence[int], block: Sequence[int], values: Sequence[bytes], seed: int) -> None:
        """Run all threads; ``values`` are the arguments as bytes, ``seed`` determines the order of blocks and threads.

        Raises:
            LaunchError: CUDA has no such grid or block, or the kernel has undefined behaviour.
        """
        for (name, limits), sizes in zip(_LIMITS, (grid, block), strict=True):
            if not all(0 < size <= limit for size, limit in zip(sizes, limits, strict=True)):
                message = f"A {name} is {limits} at most and nowhere 0, not {tuple(sizes)}."
                raise LaunchError(message)
        bound = self._description.bound or _MOST_THREADS
        if (threads := block[0] * block[1] * block[2]) > bound:
            message = f"A block of this kernel has {bound} threads at most, not {threads}."
            raise LaunchError(message)
        if [size for _, size in self.parameters] != [len(value) for value in values]:
            message = f"The parameters have {self.parameters}, the arguments {[len(value) for value in values]} bytes."
            raise LaunchError(message)
        buffers = [ctypes.create_string_buffer(value, len(value)) for value in values]
        addresses = (ctypes.c_void_p * max(1, len(buffers)))(*map(ctypes.addressof, buffers))
        sizes = ((ctypes.c_uint * 3)(*sizes) for sizes in (grid, block))
        with _running:
            error = self._description.launch(*sizes, addresses, seed * 2 + 1)
        if error is not None:
            raise LaunchError(error.decode())


class Library:
    """The kernels of a compiled source, by name."""

    def __init__(self, path: Path) -> None:
        self._loaded = ctypes.CDLL(str(path))

    def kernel(self, name: str) -> Kernel:
        """Return a kernel.

        Raises:
            AttributeError: There is no kernel of that name.
        """
        try:
            return Kernel(_Description.in_dll(self._loaded, f"cuda_on_host_{name}"))
        except ValueError:
            message = f"The source has no kernel {name}."
            raise AttributeError(message) from None


@cache
def compile(source: str, options: tuple[str, ...] = ()) -> Library:  # noqa: A001 - the name says what the function does
    """Return the kernels of a CUDA source, compiled with options of a C++ compiler such as ``-D``, and cached on disk.

    Raises:
        RuntimeError: There is no g++, or it refuses the source; the error has its messages.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        message = "Running CUDA kernels without a GPU needs g++, and there is none on PATH."
        raise RuntimeError(message)
    exported = "\n".join(f"CUDA_ON_HOST_KERNEL({name}, {bound or 0})" for bound, name in _KERNEL.findall(source))
    # With #line the compiler's messages refer to the lines of the source.
    text = f'#include "cuda.hpp"\n#line 1 "kernels.cu"\n{source}\n#line 1 "exported"\n{exported}\n'
    headers = "".join((_HERE / name).read_text() for name in _HEADERS)
    identity = repr((text, headers, _OPTIONS, _LIBRARIES, options, _version(compiler)))
    folder = Path(tempfile.gettempdir()) / f"cuda_on_host-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()}.so"
    if not path.exists():
        made = folder / f"{path.stem}.{os.getpid()}.part"
        command = [compiler, *_OPTIONS, *options, f"-I{_HERE}", "-o", made, "-", *_LIBRARIES]
        run = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if run.returncode:
            message = f"g++ refuses the kernels:\n{run.stderr}"
            raise RuntimeError(message)
        made.replace(path)  # atomic, since other processes may compile the same source
    return Library(path)


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
