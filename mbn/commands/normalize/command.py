"""The command: from options to statistics, to a new file and an exit code.

Bad options are refused before any work begins. The new file takes its name when it is complete; until then it is in a
temporary folder beside it, which is removed whatever happens.
"""

import argparse
import math
import signal
import sys
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
from mbn.registry import BackendUnavailableError, get_backend
from mbn.state import files, outputs

_WRITTEN, _FAILED = 0, 1
_FEW = 1 << 16
"""Values from which on kernels are the same for every number of them; NumPy's for fewer round otherwise."""
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
        with _terminable(), stores.opened(source) as array:
            bn = _layer(args, array)
            with _replacing(target.path) as path:
                try:
                    _normalize(args, bn, array, path)
                except UsageError:
                    raise
                except Exception as error:  # a file, a disk or a library may have anything raised
                    raise _FailureError(stores.reason(error)) from error
    except _FailureError as failure:
        print(f"mbn normalize: {failure} Nothing has been written; run the same command again.", file=sys.stderr)
        return _FAILED
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


class _TerminatedError(SystemExit):
    """The process was told to end."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Return a context in which SIGTERM is an exception, so that nothing is left behind."""

    def end(number: int, _: FrameType | None) -> None:
        raise _TerminatedError(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # this is not the main thread, which alone gets signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    replacing = files.replacing(path)
    try:
        new = replacing.__enter__()
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {stores.reason(error)}") from error
    try:
        yield new
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
        if path is not None and _are_one(path, target):
            raise UsageError(f"the output {target} is, or is within, {path}, {option}: name another file.")
    if args.save_layer and _are_one(source, args.save_layer):
        raise UsageError(f"--save-layer {args.save_layer} is, or is within, the input {source}: name another file.")
    if not target.exists():
        return
    if not args.overwrite:
        raise UsageError(f"{target} is there already: name another file, or give --overwrite to replace all of it.")
    if target.is_dir() and not any((target / name).exists() for name in _OF_ZARR):
        raise UsageError(f"{target} is a folder and no store of zarr, so it is not replaced: name another file.")
    if not target.is_dir() and not target.is_file():
        raise UsageError(f"{target} is no regular file: name another file.")


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
        return get_backend("numba")
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
        with stores.created(args.output, path, array) as target:
            unit = target.unit if size >= _FEW else tuple(array.shape)
            with closing(iter(Pieces(array, _settings(bn), unit=unit))) as pieces:
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
    mean, var, weight, bias = (None if vector is None else vector[part] for vector in (*bn.state[:2], *bn.params))
    rows = len(x)
    if x.size < _FEW <= size:
        x = np.tile(x, (math.ceil(_FEW / x.size), *[1] * (x.ndim - 1)))
    is_own = bn.backend in {"numpy", "numba"} and x.flags.writeable and x.dtype.isnative
    out = x if is_own else None
    given = bn.backend
    y = mbn.functional.batch_norm(x, mean, var, weight, bias, eps=bn.eps, axis=bn.axis, backend=given, out=out).output
    return mbn.to_numpy(y)[:rows]


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
