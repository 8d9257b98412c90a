"""Measure commits with asv, and keep the results in git. They describe the machine by what it is, not by its name.

``python asv_bench/measure.py`` measures what is installed in full, as the commit that is checked out, and keeps that in
``results/``. ``python asv_bench/measure.py --history 16`` measures so many commits, spread evenly over the history, by
the benchmarks in ``history/``, and keeps that in ``history/results/``: each commit from a worktree of its own, all with
the packages that are installed. ``--history COMMIT ...`` measures these. A commit with results is measured with
``--again`` only; an interrupt loses no commit that has been measured.

Further arguments go to ``asv run``: with ``--bench Time`` a part is measured, and what else is known of the commit is
kept.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
HISTORY = HERE / "history" / "results"
PACKAGES = (
    *("numpy", "numba", "torch", "triton", "jax", "flax", "cupy-cuda13x", "cupy-cuda12x"),
    *("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"),
)
NOT_ON_A_GPU = r"^(?!gpu\.)"
"""The benchmarks that ``gpu.py`` measures, without asv, are left to it: elsewhere they are hundreds of n/a."""
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
ENVIRONMENT = f"existing-py{PYTHON}"
_SHORTEST_HASH = 4
_GIBIBYTE = 2**30


def main(arguments: list[str]) -> int:
    """Measure as the arguments say, and return asv's exit code, the largest of several."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--history", nargs="+", metavar="COMMIT", help="the commits, or a number of them")
    parser.add_argument("--again", action="store_true", help="measure commits of which there are results, too")
    options, others = parser.parse_known_args(arguments)
    if options.history:
        return history(options.history, again=options.again, others=others)
    some = [] if "--bench" in others else ["--bench", NOT_ON_A_GPU]
    # asv takes PYTHONPATH out of the environment, so it is told where an mbn lies that is not installed.
    sources = sorted({Path(find_spec(package).origin).parents[1] for package in ("mbn", "mbn_numpy")})
    return measure(head(), RESULTS, sources, *some, *others)


def history(wanted: Sequence[str], *, again: bool, others: Sequence[str]) -> int:
    """Measure commits from worktrees, the newest first, and return the largest of asv's exit codes."""
    names = spread(int(wanted[0])) if len(wanted) == 1 and len(wanted[0]) < _SHORTEST_HASH else wanted
    commits = [_output("git", "rev-parse", "--verify", f"{name}^{{commit}}") for name in names]
    known = HISTORY / describe_machine()["machine"]
    codes = [0]
    for number, commit in enumerate(commits, 1):
        title = f"{number} of {len(commits)}: {_output('git', 'log', '-1', '--format=%h %s', commit)}"
        if (known / f"{commit[:8]}-{ENVIRONMENT}.json").exists() and not again:
            print(f"{title}: there are results", flush=True)
            continue
        print(title, flush=True)
        with worktree(commit) as tree:
            codes.append(
                measure(commit, HISTORY, (tree, tree / "backends"), *others, config=("--config", "asv.history.json"))
            )
        if codes[-1]:
            print(f"{title}: asv ended with {codes[-1]}; its own words are above", flush=True)
    return max(codes)


def spread(number: int) -> list[str]:
    """Return commits of the first-parent history at even distances, from the first with a backend to the last."""
    commits = _output("git", "rev-list", "--first-parent", "HEAD").splitlines()
    first = _output("git", "rev-list", "--first-parent", "HEAD", "--", "../backends/mbn_numpy").splitlines()[-1]
    last = commits.index(first)
    return list(dict.fromkeys(commits[round(last * step / max(number - 1, 1))] for step in range(number)))


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Give a folder with the files of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "mbn"
        _output("git", "worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            _output("git", "worktree", "remove", "--force", str(tree))


def measure(commit: str, results: Path, sources: Sequence[Path], *arguments: str, config: tuple[str, ...] = ()) -> int:
    """Run asv with the mbn that lies in ``sources``, keep the results as a commit's, and return asv's exit code."""
    machine = describe_machine()
    name = machine["machine"]
    environment = os.environ | {"ASV_PYTHONPATH": os.pathsep.join(map(str, sources))}
    run = ("run", "-E", "existing", "--machine", name, "--set-commit-hash", commit, *arguments)
    codes = [
        subprocess.run(
            [sys.executable, "-m", "asv", *config, *command], cwd=HERE, env=environment, check=False
        ).returncode
        for command in (("machine", "--yes", "--machine", name), run)
    ]
    tidy(results / name, machine)
    return max(codes)


def head() -> str:
    """Return the commit that is checked out, and end where something else is."""
    if _output("git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results"):
        sys.exit("There are changes that are in no commit, so no commit could be said to be measured.")
    return _output("git", "rev-parse", "HEAD")


def describe_machine() -> dict[str, str]:
    """Return what asv keeps of a machine, under a name that says what it is."""
    arch, cores, processor = platform.machine(), str(os.cpu_count()), _processor()
    kind = re.sub(r"\W+", "-", processor.partition("@")[0]).strip("-").lower()
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIBIBYTE
    return {
        "machine": "-".join(filter(None, (arch, f"{cores}core", kind))),
        "arch": arch,
        "cpu": processor,
        "num_cpu": cores,
        "os": platform.system(),
        "ram": f"{ram:.0f} GiB",
    }


def tidy(results: Path, machine: dict[str, str]) -> None:
    """Put versions in the place of paths: asv names an existing environment by where its Python lies."""
    for path in results.glob("*-existing-py_*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        target = results / f"{record['commit_hash'][:8]}-{ENVIRONMENT}.json"
        known = json.loads(target.read_text(encoding="utf-8"))["results"] if target.exists() else {}
        record["results"] = known | record["results"]
        record |= {"env_name": ENVIRONMENT, "python": PYTHON, **environment_of(machine)}
        target.write_text(json.dumps(record) + "\n", encoding="utf-8")
        path.unlink()
    (results / "machine.json").write_text(json.dumps({**machine, "version": 1}, indent=4) + "\n", encoding="utf-8")


def environment_of(machine: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return what asv's results say of where they were measured.

    Packages are no parameters: asv would begin another line wherever one of them comes, goes or changes.
    """
    return {"params": {**machine, "python": PYTHON}, "requirements": _versions()}


def _versions() -> dict[str, str]:
    installed = {distribution.name for distribution in metadata.distributions()}
    return {package: metadata.version(package) for package in PACKAGES if package in installed}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
