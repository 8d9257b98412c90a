"""The functions of .ci/run: a step of CI that fails or does nothing must not pass."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]


def bash(commands, folder, **environment):
    """Run shell commands in a folder with the settings and functions of .ci/run."""
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail\n. {ROOT / '.ci' / 'functions.sh'}\n{commands}"],  # noqa: S607
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_readme_command_prints_the_commands_of_the_readme():
    for number, word in ((1, "mbn compare"), (2, "python -m pytest")):
        run = bash(f"readme_command {number} '{word}'", ROOT)
        assert (run.returncode, run.stderr) == (0, "")
        assert f"```sh\n{run.stdout}```" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("fence", ["```bash", "```shell", "~~~sh", "```sh\n# first of all:"])
def test_readme_command_fails_without_the_shell_block(tmp_path, fence):
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text().replace("```sh", fence))
    run = bash("tests=$(readme_command 2 'python -m pytest')\nbash -c \"$tests\"\necho went on", tmp_path)
    assert run.returncode != 0
    assert run.stdout == ""
    assert "README.md has no command with 'python -m pytest' in its shell block 2" in run.stderr


def test_ci_stops_if_the_environment_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    first_step = re.search(r"^\($.*?^\)$", (ROOT / ".ci" / "run").read_text(), re.DOTALL | re.MULTILINE)[0]
    run = bash(f"scratch=$PWD/file main_job='echo went on'\n{first_step}\necho went on", tmp_path)
    assert run.returncode != 0
    assert "went on" not in run.stdout


ASV = """#!/usr/bin/env bash
case "$*" in
    *continuous*) exit $CONTINUOUS ;;
    *HEAD~1^!) exit $PARENT ;;
    *HEAD^!) exit $HEAD ;;
    *) exit 99 ;;
esac
"""


@pytest.mark.parametrize(
    ("continuous", "head", "parent", "expected"),
    [
        (0, 0, 0, 0),
        (1, 0, 0, 1),  # slower
        (2, 0, 2, 0),  # the parent is from before the benchmarks
        (2, 2, 0, 2),  # HEAD fails
        (2, 2, 2, 2),
        (2, 0, 0, 2),  # asv was called wrongly
        (3, 0, 2, 3),
    ],
)
def test_no_regression_tolerates_only_a_parent_that_cannot_be_measured(tmp_path, continuous, head, parent, expected):
    asv = tmp_path / "asv"
    asv.write_text(ASV)
    asv.chmod(0o755)
    codes = {"CONTINUOUS": str(continuous), "HEAD": str(head), "PARENT": str(parent)}
    run = bash("no_regression\necho went on", tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", **codes)
    assert run.returncode == expected
    assert ("went on" in run.stdout) == (expected == 0)
    assert ("nothing to compare with" in run.stdout) == (parent == 2 and expected == 0)


COVERAGE = """#!/usr/bin/env bash
case "$*" in
    *"-m pytest"*) exit $TESTS ;;
    *"-m mbn conform numpy"*) exit $NUMPY ;;
    *"-m mbn conform numba"*) exit $NUMBA ;;
    */mbn/*--fail-under*98*) exit $FRONTEND ;;
    */backends/*--fail-under*95*) exit $BACKENDS ;;
    erase|combine*) exit 0 ;;
    *) exit 99 ;;
esac
"""


@pytest.mark.parametrize("failing", ["TESTS", "NUMPY", "NUMBA", "FRONTEND", "BACKENDS", None])
def test_coverage_fails_with_its_tests_and_below_either_floor(tmp_path, failing):
    coverage = tmp_path / "coverage"
    coverage.write_text(COVERAGE)
    coverage.chmod(0o755)
    codes = {name: str(2 * (name == failing)) for name in ("TESTS", "NUMPY", "NUMBA", "FRONTEND", "BACKENDS")}
    run = bash("coverage_with_floors\necho went on", tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", **codes)
    assert (run.returncode, "went on" in run.stdout) == ((2, False) if failing else (0, True))


SKIPS = """
import pytest

def test_expected():
    pytest.skip("jax finds no GPU: none")

@pytest.mark.skipif(True, reason="renamed")
def test_marked():
    pass

def test_within():
    pytest.importorskip("a_module_that_was_renamed")

@pytest.mark.xfail(strict=True)
def test_known_to_fail():
    assert False

def test_passes():
    pass
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unexpected_skips_fail_where_everything_is_installed(tmp_path, workers):
    for name in ("conftest.py", "frameworks.py", "nested.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path)
    (tmp_path / "test_some.py").write_text(SKIPS)
    (tmp_path / "test_whole.py").write_text("import pytest\npytest.importorskip('a_module_that_was_renamed')\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        os.devnull,
        "--rootdir",
        str(tmp_path),
        "-n",
        workers,
        str(tmp_path),
    ]

    def outcomes(**environment):
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
        return run.returncode, set(re.findall(r"\d+ \w+", run.stdout.rstrip().rpartition("\n")[2])), run.stdout

    code, counted, _ = outcomes(MBN_NO_UNEXPECTED_SKIPS="")
    assert (code, counted) == (0, {"1 passed", "4 skipped", "1 xfailed"})
    code, _, out = outcomes(MBN_NO_UNEXPECTED_SKIPS="1")
    assert code != 0
    assert re.search("^ERROR .*test_whole.py", out, re.MULTILINE)
    (tmp_path / "test_whole.py").unlink()
    code, counted, out = outcomes(MBN_NO_UNEXPECTED_SKIPS="1")
    assert (code, counted) == (1, {"1 failed", "1 error", "1 passed", "1 skipped", "1 xfailed"})
    for reason in ("renamed", "could not import 'a_module_that_was_renamed'"):
        assert f"skipped, which tests/conftest.py does not expect: {reason}" in out
