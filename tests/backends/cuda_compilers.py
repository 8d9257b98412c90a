"""CUDA's compilers, which need no GPU: nvcc if it is on PATH, else NVRTC, which CuPy uses, from its wheel."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple


class Compiled(NamedTuple):
    """The result of a compilation."""

    log: str
    """The messages of the compiler and the assembler, registers and spills included."""
    ptx: str


def find() -> Callable[[str, tuple[str, ...], str], Compiled] | None:
    """Return a function that compiles a source with options for an architecture ("sm_90"), or None without a compiler.

    It raises AssertionError with the log if the source does not compile.
    """
    if shutil.which("nvcc"):
        return nvcc
    return nvrtc if has_nvrtc() else None


def has_nvrtc() -> bool:
    return _library() is not None


def nvcc(source: str, options: tuple[str, ...], architecture: str) -> Compiled:
    with TemporaryDirectory() as folder:
        (Path(folder) / "kernels.cu").write_text(source, encoding="utf-8")
        command = ["nvcc", *options, "-arch", architecture, "-Xptxas", "-v", "--cubin", "--keep", "kernels.cu"]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        log = run.stdout + run.stderr
        assert run.returncode == 0, log
        return Compiled(log, (Path(folder) / "kernels.ptx").read_text())


def nvrtc(source: str, options: tuple[str, ...], architecture: str) -> Compiled:
    library, program = ctypes.CDLL(_library()), ctypes.c_void_p()
    names = source.encode(), b"kernels.cu"
    assert library.nvrtcCreateProgram(ctypes.byref(program), *names, 0, None, None) == 0
    given = [option.encode() for option in (*options, f"-arch={architecture}", "--ptxas-options=-v")]
    status = library.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    log = _text(library, program, "ProgramLog")
    assert status == 0, log
    compiled = Compiled(log, _text(library, program, "PTX"))
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return compiled


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    assert library[f"nvrtcGet{what}Size"](program, ctypes.byref(size)) == 0
    text = ctypes.create_string_buffer(size.value)
    assert library[f"nvrtcGet{what}"](program, text) == 0
    return text.value.decode()


def _library() -> str | None:
    try:
        files = metadata.files("nvidia-cuda-nvrtc") or ()
    except metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name.startswith("libnvrtc.so")), None)
