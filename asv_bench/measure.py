"""Measure what is installed, as the commit that is checked out, and keep the results in ``results/``: in git.

``python asv_bench/measure.py`` measures everything. Further arguments go to ``asv run``: with ``--bench Time`` a part
is measured, and what else is known of the commit is kept. What is kept describes the machine by what it is, not by its
name or its paths: the results are for other people too.
"""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PACKAGES = (
    *("numpy", "numba", "torch", "triton", "jax", "flax", "cupy-cuda13x", "cupy-cuda12x"),
    *("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"),
)
NOT_ON_A_GPU = r"^(?!gpu\.)"
"""The benchmarks that ``gpu.py`` measures, without asv, are left to it: elsewhere they are hundreds of n/a."""
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_GIBIBYTE = 2**30


def main(arguments: list[str]) -> int:
    """Run asv and return its exit code."""
    machine, commit = describe_machine(), head()
    name = machine["machine"]
    some = [] if "--bench" in arguments else ["--bench", NOT_ON_A_GPU]
    run = ["run", "-E", "existing", "--machine", name, "--set-commit-hash", commit, *some, *arguments]
    codes = [asv("machine", "--yes", "--machine", name), asv(*run)]
    tidy(RESULTS / name, machine)
    return max(codes)


def head() -> str:
    """Return the commit that is checked out, and end where something else is."""
    if _output("git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results"):
        sys.exit("There are changes that are in no commit, so no commit could be said to be measured.")
    return _output("git", "rev-parse", "HEAD")


def describe_machine() -> dict[str, str]:
    """Return what asv keeps of a machine, under a name that says what it is."""
    arch, cores = platform.machine(), str(os.cpu_count())
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIBIBYTE
    return {
        "machine": f"{arch}-{cores}core",
        "arch": arch,
        "cpu": _processor(),
        "num_cpu": cores,
        "os": platform.system(),
        "ram": f"{ram:.0f} GiB",
    }


def asv(*arguments: str) -> int:
    """Run asv here, and return its exit code."""
    # asv takes PYTHONPATH out of the environment; this is how it is told where an mbn lies that is not installed.
    sources = {str(Path(find_spec(package).origin).parents[1]) for package in ("mbn", "mbn_numpy")}
    environment = os.environ | {"ASV_PYTHONPATH": os.pathsep.join(sorted(sources))}
    return subprocess.run([sys.executable, "-m", "asv", *arguments], cwd=HERE, env=environment, check=False).returncode


def tidy(results: Path, machine: dict[str, str]) -> None:
    """Put versions in the place of paths: asv names an existing environment by where its Python lies."""
    environment = f"existing-py{PYTHON}"
    for path in results.glob("*-existing-py_*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        target = results / f"{record['commit_hash'][:8]}-{environment}.json"
        known = json.loads(target.read_text(encoding="utf-8"))["results"] if target.exists() else {}
        record["results"] = known | record["results"]
        record |= {"env_name": environment, "python": PYTHON, **environment_of(machine)}
        target.write_text(json.dumps(record) + "\n", encoding="utf-8")
        path.unlink()
    (results / "machine.json").write_text(json.dumps({**machine, "version": 1}, indent=4) + "\n", encoding="utf-8")


def environment_of(machine: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return what asv's results say of where they were measured."""
    return {"params": {**machine, "python": PYTHON, **_versions()}, "requirements": _versions()}


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
