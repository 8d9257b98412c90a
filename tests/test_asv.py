"""The scripts around asv: pages that need no other host, results without secrets, a check that finds a slowdown."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]
ASV_BENCH = ROOT / "asv_bench"
TO_ANOTHER_HOST = re.compile(r"""<(?!a\b)[^>]*\b(?:src|href)=["'](?:https?:)?//|url\(["']?(?:https?:)?//|@import""")

needs_asv = pytest.mark.skipif(find_spec("asv") is None, reason="asv is not installed")


def script(name):
    """Return a script of asv_bench as a module."""
    spec = importlib.util.spec_from_file_location(name, ASV_BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def git(where, *arguments):
    identity = ("-c", "user.name=mbn", "-c", "user.email=mbn@example.org", "-c", "commit.gpgsign=false")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=where, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """Return the benchmarks' folder in a repository with one commit and a result of it."""
    bench = tmp_path / "checkout" / "asv_bench"
    shutil.copytree(ASV_BENCH, bench, ignore=shutil.ignore_patterns(".asv", "results", "__pycache__"))
    git(bench.parent, "init", "-b", "main")
    git(bench.parent, "add", ".")
    git(bench.parent, "commit", "-m", "The benchmarks")
    name, commit = "some.track_thing", git(bench.parent, "rev-parse", "HEAD")
    benchmark = {"name": name, "code": "", "params": [["'a'", "'b'"]], "param_names": ["x"], "type": "track"}
    benchmark |= {"unit": "seconds", "version": "1"}
    result = {
        "commit_hash": commit,
        "env_name": "existing-py_home_someone_bin_python",
        "date": 1700000000000,
        "params": {"machine": "secret", "python": "/home/someone/bin/python"},
        "python": "/home/someone/bin/python",
        "requirements": {},
        "env_vars": {},
        "result_columns": ["result", "params", "version", "started_at", "duration"],
        "results": {name: [[1.0, 2.0], benchmark["params"], "1", 1700000000000, 1.0]},
        "durations": {},
        "version": 2,
    }
    machine = bench / "results" / "some-machine"
    machine.mkdir(parents=True)
    (bench / "results" / "benchmarks.json").write_text(json.dumps({name: benchmark, "version": 2}))
    (machine / f"{commit[:8]}-existing-py_home_someone_bin_python.json").write_text(json.dumps(result))
    (machine / "machine.json").write_text('{"machine": "secret", "version": 1}')
    return bench


@pytest.fixture
def tidied(checkout):
    """Return the same folder after ``measure.py`` has tidied its results."""
    machine = {"machine": "some-machine", "arch": "x86_64", "cpu": "a processor", "num_cpu": "2", "ram": "1 GiB"}
    script("measure").tidy(checkout / "results" / "some-machine", machine)
    return checkout


def test_tidied_results_describe_the_machine_without_private_names(tidied):
    (path,) = (tidied / "results" / "some-machine").glob("*-*.json")
    record = json.loads(path.read_text())
    assert re.fullmatch(r"[0-9a-f]{8}-existing-py3\.\d+", path.stem)
    assert record["params"]["cpu"] == "a processor"
    assert "numpy" in record["requirements"]
    for file in (tidied / "results" / "some-machine").iterdir():
        assert not re.search("secret|someone", file.read_text())


def test_later_results_of_a_commit_are_added_to_its_file(tidied):
    machine = tidied / "results" / "some-machine"
    (path,) = machine.glob("*-*.json")
    later = json.loads(path.read_text())
    later["results"] = {"other.track_thing": [[3.0], [], "1"]}
    (machine / "xxxxxxxx-existing-py_other.json").write_text(json.dumps(later))
    script("measure").tidy(machine, {"machine": "some-machine"})
    assert json.loads(path.read_text())["results"].keys() == {"some.track_thing", "other.track_thing"}
    assert len(list(machine.iterdir())) == 2


def test_description_of_this_machine_has_no_private_name():
    described = script("measure").describe_machine()
    assert described["machine"].endswith("core")
    assert all(isinstance(value, str) for value in described.values())


@needs_asv
@pytest.mark.skipif(find_spec("js") is None, reason="the libraries of the pages are not installed")
def test_published_pages_refer_to_no_other_host(tidied, tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, str(tidied / "publish.py"), str(site)]
    published = subprocess.run(command, capture_output=True, text=True, check=False)
    assert published.returncode == 0, published.stdout + published.stderr
    pages = [path for path in site.rglob("*") if path.suffix in (".html", ".css", ".js")]
    for page in pages:
        assert not TO_ANOTHER_HOST.search(page.read_text(encoding="utf-8")), page
    index = (site / "index.html").read_text(encoding="utf-8")
    referred = re.findall(r'<(?:script|link)\b[^>]*\b(?:src|href)="([^"]+)"', index)
    assert len(referred) > 15
    assert [name for name in referred if not (site / name).is_file()] == []
    assert index.index("jquery.flot.min.js") < index.index("plugins.js") < index.index("graphdisplay.js")
    (graph,) = (path for path in site.glob("graphs/**/some.track_thing.json") if "summary" not in path.parts)
    assert json.loads(graph.read_text())[0][1] == [1.0, 2.0]


def test_pages_that_refer_to_an_unknown_script_are_refused(tmp_path):
    (tmp_path / "index.html").write_text('<script src="https://example.org/new.js"></script>')
    with pytest.raises(ValueError, match=r"ask for new\.js"):
        script("publish").make_self_contained(tmp_path)


@needs_asv
@pytest.mark.skipif(find_spec("virtualenv") is None, reason="virtualenv is not installed")
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no repository")
def test_quick_check_finds_a_slowdown(tmp_path):
    checkout = tmp_path / "checkout"
    git(tmp_path, "clone", "--quiet", str(ROOT), str(checkout))
    backend = checkout / "backends" / "mbn_numpy" / "__init__.py"
    slow = "import time\nimport mbn.step.forward\nrun = mbn.step.forward.forward\n"
    slow += "mbn.layer.forward = lambda *args, **kwargs: (time.sleep(0.01), run(*args, **kwargs))[1]\n"
    backend.write_text(backend.read_text() + slow)
    git(checkout, "commit", "--all", "-m", "Sleep")
    command = re.search(
        r"asv (--config asv\.numpy\.json .*? HEAD~1 HEAD)", (ROOT / ".ci" / "functions.sh").read_text()
    )[1]
    home = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": os.environ.get("XDG_CONFIG_HOME", str(Path.home() / ".config"))}
    asv = f"{sys.executable} -m asv"
    checked = subprocess.run(  # noqa: S602 - the command of .ci/functions.sh is for a shell
        f"{asv} machine --yes && {asv} {command}",
        shell=True,
        cwd=checkout / "asv_bench",
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 1, checked.stdout + checked.stderr
    assert "PERFORMANCE DECREASED" in checked.stdout
