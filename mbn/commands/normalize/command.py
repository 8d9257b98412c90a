"""The command: from options to statistics, to a new file and an exit code.

Bad options are refused before any work begins. The new file takes its name when it is complete; until then it is in a
temporary folder beside it, which is removed whatever happens.
"""

import argparse
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import mbn
from mbn.chunked.reading import Pieces
from mbn.commands.normalize import stores
from mbn.commands.options import UsageError
from mbn.commands.output import console
from mbn.commands.progress import Steps, progress
from mbn.contract import Settings, dtype_name, layer_dtype
from mbn.registry import BackendUnavailableError, chosen_backend, get_backend
from mbn.state import files, outputs
from mbn.step.forward import evaluate_block

_WRITTEN, _FAILED = 0, 1
_OF_FIT = ("axis", "eps", "correction", "dtype")
"""The options of a layer that is fitted."""
_OF_ZARR = ("zarr.json", ".zarray", ".zgroup")
"""Files that a folder of zarr has, one of them at least."""


def run(args: argparse.Namespace) -> int:
    """Normalise the input by the options, and return the exit code.

    Raises:
        UsageError: an option cannot be honoured. Nothing has been written.
        BackendNotFoundError: the backend has an unknown name.
    """
    source, target = args.input, args.output
    given = [name for name in _OF_FIT if getattr(args, name) is not None]
    if args.layer and given:
        raise UsageError(f"--{given[0]} is for --fit: the layer of {args.layer} has its own. Leave one of them out.")
    for spec in (source, target):
        stores.check_package(spec)
    _check_paths(args)
    outputs.check_files({"--save-layer": args.save_layer}, given=args.layer)
    try:
        with _signals() as complete:
            return _write(args, complete)
    except _TerminatedError:
        return 128 + signal.SIGTERM
    except _FailureError as failure:
        print(f"mbn normalize: {failure} Nothing has been written: once that is mended, run it again.", file=sys.stderr)
        return _FAILED


def _write(args: argparse.Namespace, complete: Callable[[], None]) -> int:
    """Write the output, and then the layer if asked to; ``complete`` is called before the first takes its name."""
    source, target = args.input, args.output
    with stores.opened(source) as array:
        for path in stores.files_of(array):
            _check_apart(f"which {source} reads", path, target.path)
        bn = _layer(args, array)
        with _replacing(args, complete) as path:
            try:
                _normalize(args, bn, array, path)
            except UsageError:
                raise
            except Exception as error:  # a file, a disk or a library may have anything raised
                raise _FailureError(stores.reason(error)) from error
        written = f"{target}: {tuple(array.shape)}, {np.dtype(array.dtype).name}"
    if args.save_layer:
        try:
            bn.save(args.save_layer)
        except OSError as error:
            print(f"mbn normalize: {written}, but {args.save_layer}: {stores.reason(error)}", file=sys.stderr)
            return _FAILED
    if not args.quiet:
        by = args.layer or "its own statistics"
        console().print(f"{written}, is {source} normalised by {by}.", soft_wrap=True)
    return _WRITTEN


class _FailureError(Exception):
    """The input cannot be read, or the output not be written, after all."""


class _TerminatedError(KeyboardInterrupt):
    """The process was told to end; like an interrupt, no import of a backend may take it for an error of its own."""


@contextmanager
def _signals() -> Iterator[Callable[[], None]]:
    """Return a context in which SIGTERM is an exception, so that nothing is left behind.

    Its value is a function after whose call SIGTERM and SIGINT have no effect until the end of the context.
    """

    def end(number: int, _: FrameType | None) -> None:
        raise _TerminatedError

    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ignore() -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)

    signal.signal(signal.SIGTERM, end)
    try:
        yield ignore
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _replacing(args: argparse.Namespace, complete: Callable[[], None]) -> Iterator[Path]:
    """Return a context with the path of the new file, which takes the name of the output at its end."""
    path = args.output.path
    replacing = files.replacing(path)
    try:
        new = replacing.__enter__()
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {stores.reason(error)}") from error
    try:
        _check_new(path, args)  # there may be again what a command that was killed had moved away
        yield new
        _check_new(path, args)
        complete()
    except BaseException:
        replacing.__exit__(*sys.exc_info())
        raise
    try:
        replacing.__exit__(None, None, None)
    except OSError as error:
        raise _FailureError(f"{path} cannot be written: {stores.reason(error)}") from error


def _check_paths(args: argparse.Namespace) -> None:
    """Check that the output is another file than those that are read, and replaces nothing unasked.

    Raises:
        UsageError: it is not.
    """
    source, target = args.input.path, args.output.path
    for option, path in {"the input": source, "--layer": args.layer, "--save-layer": args.save_layer}.items():
        if path is not None:
            _check_apart(option, path, target)
    if args.save_layer and _are_one(source, args.save_layer):
        raise UsageError(f"--save-layer {args.save_layer} is, or is within, the input {source}: name another file.")
    if args.save_layer and args.save_layer.is_file():
        _check_new(args.save_layer, args)
    _check_new(target, args)
    if not target.exists():
        return
    if target.is_dir() and not any((target / name).exists() for name in _OF_ZARR):
        raise UsageError(f"{target} is a folder and no store of zarr, so it is not replaced: name another file.")
    if not target.is_dir() and not target.is_file():
        raise UsageError(f"{target} is no regular file: name another file.")


def _check_apart(what: str, path: Path, target: Path) -> None:
    if _are_one(path, target):
        raise UsageError(f"the output {target} is, or is within, {path}, {what}: name another file.")


def _check_new(path: Path, args: argparse.Namespace) -> None:
    if path.exists() and not args.overwrite:
        raise UsageError(f"{path} is there already: name another file, or give --overwrite to replace all of it.")


def _are_one(one: Path, other: Path) -> bool:
    """Tell whether two paths name the same file, also by links, or one of them a folder that the other is in."""
    first, second = one.resolve(), other.resolve()
    if first == second or first in second.parents or second in first.parents:
        return True
    try:
        return one.samefile(other)
    except OSError:
        return False


def _layer(args: argparse.Namespace, array: Any) -> mbn.BatchNorm1d:
    """Return the layer, in evaluation mode, after the checks of the input's shape and dtype.

    Raises:
        UsageError: the layer cannot be loaded, the backend not be used, or the layer does not take the input.
    """
    try:
        backend = get_backend(args.backend) if args.backend else _default_backend()
        if args.layer:
            bn = mbn.BatchNorm1d.load(args.layer, backend=backend)
        else:
            options = {name: getattr(args, name) for name in _OF_FIT if getattr(args, name) is not None}
            dtype = layer_dtype(np.dtype(array.dtype).name)
            bn = mbn.BatchNorm1d(None, backend=backend, **{"dtype": dtype, **options})
        if not bn.track_running_stats:
            raise UsageError(f"the layer of {args.layer} has no running statistics to normalise by.")
        shape = tuple(array.shape)
        nothing = (0, *shape[1:]) if len(shape) in {2, 3} else shape  # a wrong rank is refused as it is
        bn.eval()(np.broadcast_to(np.zeros((), array.dtype), nothing))
    except BackendUnavailableError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(f"{args.layer} cannot be read: {stores.reason(error)}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{args.input}: {error}" if not args.layer else str(error)) from error
    return bn


def _default_backend() -> mbn.contract.Backend:
    try:
        return chosen_backend() or get_backend("numba")
    except BackendUnavailableError:
        return get_backend("numpy")


def _normalize(args: argparse.Namespace, bn: mbn.BatchNorm1d, array: Any, path: Path) -> None:
    """Fit the layer, unless it has been loaded, and write the normalised array to a new file."""
    size = math.prod(array.shape)
    nbytes = size * np.dtype(array.dtype).itemsize
    with nullcontext(Steps()) if args.quiet else progress(in_bytes=True) as steps:
        steps.plan(nbytes if args.layer else 2 * nbytes)
        if not args.layer:
            steps.begin("statistics")
            bn.fit(_Watched(array, steps.advance), progress=False)
        steps.begin("output")
        with (
            stores.created(args.output, path, array) as target,
            closing(iter(Pieces(array, _settings(bn), unit=target.unit))) as pieces,
        ):
            for values, count, box, channels in pieces:
                if count:
                    target.write(box, _evaluated(bn, values, channels, size))
                    steps.advance(count)
                del values  # so that it is freed before the next piece is read


def _settings(bn: mbn.BatchNorm1d) -> Settings:
    return Settings(bn.num_features, dtype_name(bn.running_mean.dtype), bn.eps, bn.momentum, bn.axis, bn.correction)


def _evaluated(bn: mbn.BatchNorm1d, x: np.ndarray, channels: range | None, size: int) -> np.ndarray:
    """Return the values of a piece, normalised with the bits of one call on all ``size`` values.

    Its own memory is used where that is possible.
    """
    part = slice(None) if channels is None else slice(channels.start, channels.stop)
    vectors: list[Any] = [None if given is None else mbn.to_numpy(given)[part] for given in (*bn.params, *bn.state[:2])]
    weight, bias, mean, var = vectors
    is_own = bn.backend in {"numpy", "numba"} and x.flags.writeable and x.dtype.isnative
    y: np.ndarray = evaluate_block(
        get_backend(bn.backend), bn.device, _settings(bn), size, x, weight, bias, mean, var, out=x if is_own else None
    )
    return y


class _Watched:
    """An array whose reads are counted."""

    def __init__(self, array: Any, count: Callable[[float], None]) -> None:
        self.__wrapped__, self._count = array, count
        self.shape, self.dtype = array.shape, array.dtype
        self.chunks, self.shards = getattr(array, "chunks", None), getattr(array, "shards", None)

    def __getitem__(self, key: Any) -> Any:
        values = self.__wrapped__[key]
        self._count(values.nbytes)
        return values
