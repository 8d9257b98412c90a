"""The command line: the options of all commands; other files do the work.

A wrong option ends the command with one line on standard error and exit code 2, never with a traceback.
"""

import argparse
import importlib.util
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import mbn
from mbn.commands import options
from mbn.commands.bench import command as bench
from mbn.commands.bench.workloads import MODES, PULLBACK
from mbn.commands.compare import command as compare
from mbn.commands.normalize import command as normalize
from mbn.commands.normalize import stores
from mbn.commands.options import DTYPES, UsageError
from mbn.commands.output import checked_output
from mbn.registry import BackendNotFoundError, BackendUnavailableError
from mbn.state import outputs

_INTERRUPTED = 128 + signal.SIGINT
"""The exit code that shells give to an interrupted program."""
_COMPARE = """\
Run training and evaluation steps of the same BatchNorm1d on every backend, each in a process of its own, and measure
outputs and running statistics against an exact reference, and the backends against each other.

Without --shape or --input, the examples are three easy textbook ones and a hard one, whose mean is 10 000 standard
deviations.

Errors are in ulp (units in the last place) of the terms whose sum the result is. The bounds: outputs 4 ulp in float32
and float64, 1 ulp in float16 and bfloat16; running statistics 2 ulp in float32, 4 ulp in float64. Every backend
evaluates with the reference's running statistics, so that no error is counted twice.

Of a large file, evenly spaced rows are compared, and the report says how many; --rows 0 compares all of them.
"""
_COMPARE_EXITS = "exit codes: 0 agreement; 1 a disagreement, or a backend failed; 2 bad usage, or no backend could run"
_BENCH = """\
Time BatchNorm1d on every backend, and the batch norms of other packages beside it: torch.nn.BatchNorm1d, flax's
nnx.BatchNorm under jit, the textbook formula in NumPy, and a copy of the input, which is the limit. Each has a process
and arrays of its own; they take turns over several rounds.

Modes: train (forward), eval, backward (training, forward and backward), and if asked for pullback (the backward pass
alone). On backends whose framework has gradients these are the framework's; on JAX each step is compiled.

With --device, every backend that has this device is measured there, beside its peers and a copy within the device; the
other backends are left out. On a GPU the times are those of CUDA events. JAX has no events, so many of its calls are
queued, and the host's clock times the wait for the last one.

With --replicas N, each backend trains in N processes, once with statistics shared and once alone, and the difference is
shown beside a bare gather: NumPy and Numba over MPI, Torch over gloo. Every process has a batch of the shape. Modes are
train and backward.
"""
_BENCH_EXITS = "exit codes: 0 measured; 1 measured, but a subject failed; 2 bad usage, or no backend could run"
_NORMALIZE = """\
Normalise an array that may be larger than memory, chunk by chunk, and write it to a new file: with --fit (the default)
by the mean and variance of its own values, with --layer by the running statistics, weight and bias of a saved layer.

IN and OUT are each, by suffix:
  x.npy          a file of np.save
  x.npz:NAME     an array in a file of np.savez
  x.zarr:PATH    an array in a zarr store; x.zarr.zip:PATH in one that is an archive
  x.h5:PATH      a dataset in an HDF5 file; x.hdf5:PATH
Without NAME or PATH, IN is the only array of the file. The array is (N, C) or (N, C, L), of floating-point numbers.

OUT has the shape, dtype and chunks of IN and, where both are of one kind, its compression, fill value, attributes and
names of dimensions. OUT is written whole or not at all: after an error, an interrupt, a full disk or SIGTERM nothing of
it is there, and a file that it was to replace is as before. The memory is that of a few chunks.
"""
_NORMALIZE_EXITS = (
    "exit codes: 0 written; 1 IN could not be read, or OUT not be written, after all; 2 bad usage; 130 interrupted; "
    "143 ended by SIGTERM. After all but 0 nothing of OUT has been written, unless the message says that it was"
)
_CONFORM = """\
Hold a backend to the contract: run the conformance suite that every backend of mbn must pass. All other options go to
pytest: `mbn conform numpy -x -k float16`.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser, command = _parser(), ""
    try:
        with checked_output():
            args, rest = parser.parse_known_args(_joined(sys.argv[1:] if arguments is None else arguments))
            command = f" {args.command}"
            if rest and args.command != "conform":
                parser.error(f"unrecognized arguments: {' '.join(rest)}")
            args.pytest_args = rest
            return int(args.run(args))
    except (UsageError, outputs.OutputError, BackendNotFoundError) as error:
        message = str(error)
    except MemoryError as error:
        message = f"there is too little memory: {error}"
    except KeyboardInterrupt:
        print(f"mbn{command}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    print(f"mbn{command}: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2


def _joined(arguments: Sequence[str]) -> list[str]:
    """Return arguments with ``--shape -1,3`` as a single one: argparse takes a -1,3 by itself for an unknown option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--shape" and argument[:1] == "-" and argument[1:2].isdigit():
            joined[-1] = f"--shape={argument}"
        else:
            joined.append(argument)
    return joined


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mbn", description="Batch normalisation with the same numbers on every array library."
    )
    parser.add_argument("--version", action="version", version=f"mbn {mbn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_compare(commands)
    _add_bench(commands)
    _add_normalize(commands)
    _add_backends(commands)
    _add_conform(commands)
    return parser


def _add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "compare",
        help="compare the backends with an exact reference and with each other",
        description=_COMPARE,
        epilog=_COMPARE_EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_backend_option(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--shape", type=_shape, metavar="N,C[,L]", help="compare on seeded random data of this shape")
    source.add_argument("--input", type=_file, metavar="FILE", help="compare on the array(s) of a .npy or .npz file")
    parser.add_argument(
        "--rows",
        type=_rows,
        metavar="N",
        help="with --input, compare N rows of each array, evenly spaced; 0 for all (default: rows of about 8 million "
        "values)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, metavar="DTYPE", help=f"{', '.join(DTYPES)} (default: the file's, or float32)"
    )
    _add_files(parser, "draw the agreement")
    parser.set_defaults(run=compare.run)


def _add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "bench",
        help="time the backends and their peers on a shape",
        description=_BENCH,
        epilog=_BENCH_EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", type=_shape, metavar="N,C[,L]", required=True, help="of x; N,L,C with --axis -1")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", metavar="DTYPE", help=f"{', '.join(DTYPES)} (default: float32)"
    )
    parser.add_argument("--axis", type=int, choices=(1, -1), default=1, help="the axis of the channels (default: 1)")
    parser.add_argument("--modes", type=_modes, metavar="A,B", help=f"{', '.join(MODES)} (default: all), {PULLBACK}")
    parser.add_argument("--masked", action="store_true", help="mask every third position")
    _add_backend_option(parser)
    parser.add_argument(
        "--device", type=_device, metavar="DEVICE", help="measure on this device alone: cuda, cuda:1, cpu"
    )
    parser.add_argument(
        "--replicas", type=_replicas, metavar="N", help="measure steps in N processes that share their statistics"
    )
    _add_files(parser, "draw the times")
    parser.set_defaults(run=bench.run)


def _add_normalize(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "normalize",
        help="normalise an array in a file, which may be larger than memory",
        description=_NORMALIZE,
        epilog=_NORMALIZE_EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", type=_array, metavar="IN", help="the array to read")
    parser.add_argument("output", type=_array, metavar="OUT", help="the array to write, in a new file")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--fit", action="store_true", help="normalise by the mean and variance of IN (the default)")
    source.add_argument("--layer", type=_file, metavar="FILE", help="normalise by a layer of BatchNorm1d.save")
    parser.add_argument("--axis", type=int, choices=(1, -1), help="with --fit, the axis of the channels (default: 1)")
    parser.add_argument("--eps", type=float, metavar="EPS", help="with --fit, added to the variance (default: 1e-5)")
    parser.add_argument(
        "--correction", type=int, choices=(0, 1), help="with --fit, 1 for the unbiased variance, 0 for the biased one"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        help="with --fit, of the statistics (default: float64 for float64); float64 for large means too",
    )
    parser.add_argument("--save-layer", type=_file, metavar="FILE", help="save the layer too, after OUT, for --layer")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace OUT, with all arrays of its file, and the file of --save-layer",
    )
    parser.add_argument(
        "--backend", metavar="NAME", help="the backend (default: MBN_BACKEND, else numba if it can run, else numpy)"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress and no result")
    parser.set_defaults(run=normalize.run)


def _add_backend_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backends",
        type=_names,
        metavar="A,B",
        help="NAME or NAME:DEVICE, separated by commas: numpy,torch:cuda (default: every known backend)",
    )


def _add_files(parser: argparse.ArgumentParser, picture: str) -> None:
    parser.add_argument("--json", type=_file, metavar="FILE", help="write every figure as JSON")
    parser.add_argument("--plot", type=_png, metavar="FILE.png", help=f"{picture} (needs matplotlib)")


def _add_backends(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "list the known backends with their capabilities, or the reason why they cannot be used here"
    parser = commands.add_parser("backends", help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(run=_backends)


def _add_conform(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "conform",
        help="run the conformance suite on a backend",
        description=_CONFORM,
        usage="%(prog)s NAME[:DEVICE] [--device DEVICE] [--json FILE] [--junit-xml FILE] [pytest options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="the backend, or NAME:DEVICE")
    parser.add_argument(
        "--device", type=_device, metavar="DEVICE", help="the device of its arrays, as in NAME:DEVICE: cuda, cuda:1"
    )
    parser.add_argument("--json", type=_file, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--junit-xml", type=_file, metavar="FILE", help="write the results as JUnit XML")
    parser.set_defaults(run=_conform)


def _backends(_: argparse.Namespace) -> int:
    from mbn.commands import backends

    backends.show()
    return 0


def _conform(args: argparse.Namespace) -> int:
    (spec,) = options.backends([options.on_device(args.name, args.device)])
    missing = [module for module in ("pytest", "hypothesis", "ml_dtypes") if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(
            f"the suite needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}, or "
            "'.[conformance]' where mbn's sources are."
        )
    outputs.check_files({"--json": args.json, "--junit-xml": args.junit_xml})
    from mbn.conformance import runner
    from mbn.conformance.target import Target

    try:
        Target.parse(spec)
    except (BackendUnavailableError, ValueError) as error:
        raise UsageError(str(error)) from error
    code = runner.run(spec, json=args.json, junit_xml=args.junit_xml, pytest_args=args.pytest_args)
    return 2 if code == runner.UNUSABLE else code


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of backends, such as numpy,torch:cuda")
    return list(dict.fromkeys(names))


def _device(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("'' is no device: it needs a name, cpu say")
    return text


def _modes(text: str) -> list[str]:
    modes = text.split(",")
    if not set(modes) <= {*MODES, PULLBACK}:
        raise argparse.ArgumentTypeError(f"{text!r} are no modes, such as {','.join(MODES)}")
    return modes


def _shape(text: str) -> tuple[int, ...]:
    message = f"{text!r} is no shape N,C or N,C,L of sizes of at least 1, such as 256,32"
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(message) from error
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise argparse.ArgumentTypeError(message)
    return shape


def _replicas(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes: give 2 or more")
    return int(text)


def _rows(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rows: give 0 for all, or how many, such as 65536")
    return int(text)


def _file(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' is no file: it needs a name")
    return Path(text)


def _array(text: str) -> stores.Spec:
    try:
        return stores.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r}: the picture is a PNG, FILE.png")
    return Path(text)
