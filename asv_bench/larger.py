"""Measure ``fit`` and lazy evaluation of data sets in files and in Dask arrays, and print the figures as Markdown.

``python asv_bench/larger.py`` writes a data set of 2 GiB into a temporary folder, once for each kind of file, and
removes it at the end. Each measurement is made in a process of its own: all take turns in each round, so that whatever
disturbs a round disturbs them alike. A process makes its call twice. The first call gives the peak of memory beyond
that before, and brings the files into the memory of the system; the second gives the time. A ratio is the median of
those of the rounds. With ``--cold`` the second call reads from the disk again.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import measure
import numpy as np
from benchmarks._sources import CHANNELS, Data, needed, opened, peak, write

import mbn

PACKAGES = ("numpy", "dask", "distributed", "zarr", "numcodecs", "h5py")
CHUNKS = 1000
"""The number of chunks of the data set whose statistics are compared with the exact ones."""
OFFSET = 1e6
OFFSET_STEP = Fraction(1, 16)
"""The distance of float32 numbers at the offset."""
PATIENCE = 600
"""Seconds that a task may take."""
_MIB = 2**20
_SAME_MIB = 64
"""MiB that may be needed beside chunks."""

Call = Callable[[], Any]


class Comparison(NamedTuple):
    """Two tasks, of which the time of the first is compared with that of the second."""

    part: str
    what: str
    task: str
    reference: str
    at_most: float
    """The largest ratio of times."""
    workers: int | None = None
    """How many chunks are read at the same time, for the bound of memory; None where memory is not bounded so."""


class Figures(NamedTuple):
    """The outcome of a task in one round."""

    seconds: float
    peak: int | None


CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
COMPARISONS = [
    *(
        Comparison(
            "dask", f"fit, Dask's threads over {name}", f"dask, {source}: fit", f"dask, {source}: sum", 1.3, CORES
        )
        for source, name in (
            ("npy stack", ".npy files"),
            ("zarr, uncompressed", "zarr, uncompressed"),
            ("zarr", "zarr, default compressor"),
        )
    ),
    Comparison("files", "fit, zarr, default compressor", "zarr: fit", "zarr: read", 1.2, 1),
    Comparison("files", "fit, HDF5, gzip", "hdf5, gzip: fit", "hdf5, gzip: read", 1.2, 1),
    Comparison("files", "fit, HDF5, uncompressed", "hdf5: fit", "hdf5: read", 1.2, 1),
    Comparison("lazy", "evaluation, Dask's blocks to nowhere", "dask: drop", "numpy: drop", 1.3, CORES),
    Comparison("lazy", "evaluation, Dask's blocks to an array", "dask: store", "numpy: store", 1.3, CORES),
    Comparison("cluster", "fit, two workers against one", "cluster: 2", "cluster: 1", 1 / 1.7),
]
EXACT = ["batches", "memmap", "zarr", "hdf5", "dask"]
"""Whose statistics are compared with the exact ones."""
AT_MOST = 2.4e-7
PARTS = [*dict.fromkeys(comparison.part for comparison in COMPARISONS), "exact"]


def main(arguments: Sequence[str]) -> int:
    """Measure what the arguments ask for, and return the exit code: 1 if a figure is beyond its bound or missing."""
    options = _parser().parse_args(arguments)
    data = Data(int(options.gib * 2**30), int(options.chunk_mib * _MIB))
    if options.task:
        print(json.dumps(task(options.task, Path(options.folder), data, cold=options.cold)))
        return 0
    wanted = options.only.split(",") if options.only else PARTS
    unknown = set(wanted) - set(PARTS)
    if unknown:
        _parser().error(f"--only takes some of {', '.join(PARTS)}, not {', '.join(sorted(unknown))}.")
    with TemporaryDirectory(dir=options.folder) as folder:
        comparisons = [comparison for comparison in COMPARISONS if comparison.part in wanted]
        rows = compared(comparisons, Path(folder), data, options.rounds, cold=options.cold)
        if "exact" in wanted:
            rows += exactness(Path(folder))
    print("\n".join([*machine(data, options.rounds, cold=options.cold), "", *table(rows)]))
    return int(any("no" in row or row[3] == "-" for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2, help="the size of the data set (default: %(default)s)")
    parser.add_argument("--chunk-mib", type=float, default=32, help="the size of a chunk (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--cold", action="store_true", help="read the files from the disk in the timed calls, too")
    parser.add_argument("--only", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser


# The tasks, each in a process of its own.


def task(name: str, folder: Path, data: Data, *, cold: bool) -> Any:
    """Do a task, and return its seconds and its peak of memory; or the errors of statistics."""
    source, _, action = name.rpartition(": ")
    if source == "exact":
        return errors(action, folder)
    if source == "cluster":
        with cluster(int(action)):
            return timed(_call("dask, npy stack", "fit", folder, data), folder, cold=cold)._replace(peak=None)
    return timed(_call(source, action, folder, data), folder, cold=cold)


def timed(call: Call, folder: Path, *, cold: bool) -> Figures:
    """Return the peak of memory in a first call and the seconds of a second."""
    found = peak(call)
    if cold:
        forget(folder)
    start = time.perf_counter()
    call()
    return Figures(time.perf_counter() - start, found)


def forget(folder: Path) -> None:
    """Let the system forget what it has read of the files in a folder."""
    os.sync()  # what is not on the disk yet would stay
    for path in filter(Path.is_file, folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _call(source: str, action: str, folder: Path, data: Data) -> Call:
    x = opened(source, folder, data)
    bn = mbn.BatchNorm1d(CHANNELS, backend="numpy").eval()
    if action == "fit":
        return lambda: bn.fit(x, progress=False) and None
    if action == "sum":
        return lambda: x.sum(0).compute()
    if action == "read":
        return lambda: _read(x, data)
    lazy = source.startswith("dask")
    # The target is written to once before, so that its pages do not count as memory of the call.
    target = _Nowhere() if action == "drop" else np.ones((data.rows, CHANNELS), np.float32)
    if lazy:
        return lambda: needed("dask.array").store(bn(x), target, lock=False)
    return (lambda: target.__setitem__((), bn(x))) if action == "store" else (lambda: bn(x) is None)


def _read(x: Any, data: Data) -> None:
    for rows in data.slices():
        x[rows]


class _Nowhere:
    """A target that forgets what it gets."""

    def __setitem__(self, rows: Any, values: np.ndarray) -> None: ...


@contextmanager
def cluster(workers: int) -> Iterator[None]:
    """Be the client of single-threaded worker processes on this machine."""
    distributed = needed("distributed")
    os.environ |= dict.fromkeys(("MBN_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # for the workers
    kind = {"processes": True, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    with (
        distributed.LocalCluster(n_workers=workers, memory_limit=0, **kind) as local,
        distributed.Client(local) as client,
    ):
        client.wait_for_workers(workers, timeout=60)
        yield


def offset_values(rows: int) -> np.ndarray:
    """Return values at the offset, (rows, CHANNELS) in float32: exact multiples of OFFSET_STEP."""
    drawn = np.random.default_rng(0).standard_normal((rows, CHANNELS))
    return (OFFSET + np.rint(drawn / float(OFFSET_STEP)) * float(OFFSET_STEP)).astype(np.float32)


def exact_statistics(x: np.ndarray, step: Fraction) -> list[tuple[Fraction, Fraction]]:
    """Return mean and unbiased variance of each column of multiples of ``step``, (N, C), without any rounding."""
    integers = (x.astype(np.float64) / float(step)).astype(np.int64)
    center = integers[0]
    d = integers - center
    n = len(x)
    if int(np.abs(d).max()) ** 2 * n >= 2**63:
        raise OverflowError("the sums of these values may leave the range of int64.")
    sums, squares = d.sum(0).tolist(), (d * d).sum(0).tolist()
    return [
        (step * (c + Fraction(s, n)), step**2 * (q - Fraction(s * s, n)) / (n - 1))
        for c, s, q in zip(center.tolist(), sums, squares, strict=True)
    ]


def largest_error(found: Iterable[float], exact: Iterable[Fraction]) -> float:
    """Return the largest relative error."""
    return max(float(abs(Fraction(float(a)) - b) / abs(b)) for a, b in zip(found, exact, strict=True))


def errors(source: str, folder: Path) -> tuple[float, float]:
    """Return the largest relative errors of mean and variance after ``fit`` on CHUNKS chunks of the source."""
    chunk = 256
    x = offset_values(CHUNKS * chunk)
    bn = mbn.BatchNorm1d(CHANNELS, backend="numpy")
    bn.fit(_in_chunks(source, x, chunk, folder), progress=False)
    means, variances = zip(*exact_statistics(x, OFFSET_STEP), strict=True)
    return largest_error(bn.running_mean, means), largest_error(bn.running_var, variances)


def _in_chunks(source: str, x: np.ndarray, chunk: int, folder: Path) -> Any:
    path, chunks = str(folder / "offset"), (chunk, CHANNELS)
    if source == "memmap":
        np.save(f"{path}.npy", x)
        return np.load(f"{path}.npy", mmap_mode="r")
    if source == "zarr":
        return needed("zarr").create_array(path, data=x, chunks=chunks)
    if source == "hdf5":
        return needed("h5py").File(f"{path}.h5", "w").create_dataset("x", data=x, chunks=chunks)
    if source == "dask":
        return needed("dask.array").from_array(x, chunks=chunks)
    return [x[start : start + chunk] for start in range(0, len(x), chunk)]


# The program, which starts these processes.


def compared(
    comparisons: Sequence[Comparison], folder: Path, data: Data, rounds: int, *, cold: bool
) -> list[list[str]]:
    """Measure the tasks of all comparisons in turn; return the rows of the table."""
    tasks = dict.fromkeys(name for each in comparisons for name in (each.task, each.reference))
    why: dict[str, str] = {}
    files = {_files_of(name) for name in tasks}
    for source in sorted(files):
        try:
            write(source, folder, data)
        except NotImplementedError as error:
            why |= {name: str(error) for name in tasks if _files_of(name) == source}
    found: dict[str, list[Figures]] = {name: [] for name in tasks}
    for number in range(rounds):
        for name in tasks:
            if name not in why:
                start = time.monotonic()
                outcome = ask(name, folder, data, *["--cold"] * cold)
                _tell(f"round {number + 1} of {rounds}, {name}: {time.monotonic() - start:.1f} s")
                if isinstance(outcome, str):
                    why[name] = outcome
                    _tell(f"{name} failed: {outcome}")
                else:
                    found[name].append(Figures(*outcome))
    for name in why:
        found[name] = []
    return [row(comparison, found, data) for comparison in comparisons]


def _files_of(name: str) -> str:
    """Return the source whose files a task reads."""
    source = name.rpartition(": ")[0]
    return "npy stack" if source == "cluster" else source.removeprefix("dask, ")


def ask(name: str, folder: Path, data: Data, *options: str) -> Any:
    """Return what a process of its own finds in a task, or the last line of its error."""
    sizes = "--gib", str(data.nbytes / 2**30), "--chunk-mib", str(data.chunk_bytes / _MIB)
    command = sys.executable, str(Path(__file__)), "--task", name, "--folder", str(folder), *sizes, *options
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as child:
        try:
            out, error = child.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            return f"it has not ended after {PATIENCE} s"
        finally:
            if child.poll() is None:  # after an interrupt, too
                os.killpg(child.pid, signal.SIGKILL)  # and its workers
    return json.loads(out.splitlines()[-1]) if child.returncode == 0 else (error.splitlines() or ["it died"])[-1]


def ratio(figures: Sequence[Figures], others: Sequence[Figures]) -> float:
    """Return the median, over the rounds, of the times as multiples of the others'."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(figures, others, strict=True))


def row(comparison: Comparison, found: Mapping[str, Sequence[Figures]], data: Data) -> list[str]:
    """Return the row of a comparison: its name, seconds, ratio and peak, each with its bound and whether it holds."""
    figures, others = found[comparison.task], found[comparison.reference]
    if not figures or not others:
        return [comparison.what, "-", "-", "-", f"{comparison.at_most:.2f}", "-", "-", "-", "-"]
    multiple = ratio(figures, others)
    cells = [
        comparison.what,
        *(f"{statistics.median(each.seconds for each in some):.3g}" for some in (figures, others)),
        f"{multiple:.2f}",
        f"{comparison.at_most:.2f}",
        _holds(multiple <= comparison.at_most),
    ]
    peaks = [each.peak for each in figures if each.peak is not None]
    if comparison.workers is None or not peaks:
        return [*cells, "-", "-", "-"]
    used, bound = max(peaks) / _MIB, 2 * comparison.workers * data.chunk * 4 * CHANNELS / _MIB + _SAME_MIB
    return [*cells, f"{used:.0f}", f"{bound:.0f}", _holds(used <= bound)]


def exactness(folder: Path) -> list[list[str]]:
    """Return the rows of the errors of statistics."""
    rows = []
    for source in EXACT:
        with TemporaryDirectory(dir=folder) as own:
            found = ask(f"exact: {source}", Path(own), Data(0, 1))
        what = f"error, {CHUNKS} chunks at {OFFSET:.0e}, {source}"
        if isinstance(found, str):
            _tell(f"{what}: {found}")
            rows.append([what, "-", "-", "-", f"{AT_MOST:.1e}", "-", "-", "-", "-"])
        else:
            rows.append([what, "-", "-", f"{max(found):.1e}", f"{AT_MOST:.1e}", _holds(max(found) <= AT_MOST), *"---"])
    return rows


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    header = ["what", "s", "s of reference", "ratio or error", "at most", "holds", "peak MiB", "at most", "holds"]
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def machine(data: Data, rounds: int, *, cold: bool) -> list[str]:
    """Return lines that describe the machine, the packages and the data set."""
    about = measure.describe_machine()
    versions = [f"{name} {_version(name)}" for name in PACKAGES]
    processor = f"{about['cpu'] or about['arch']}, {CORES} cores, {about['ram']}"
    sizes = f"{data.nbytes / 2**30:.2f} GiB in chunks of {data.chunk * 4 * CHANNELS / _MIB:.2f} MiB"
    state = "not in" if cold else "in"
    return [
        f"{processor}; {about['os']}, Python {measure.PYTHON}, mbn {mbn.__version__}, {', '.join(versions)}.",
        f"x of ({data.rows}, {CHANNELS}) in float32, {sizes}; files {state} the system's cache; {rounds} rounds.",
    ]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "is not installed"


def _holds(is_within: bool) -> str:
    return "yes" if is_within else "no"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
