"""The scripts around asv: pages that need no other host, results without secrets, a check that finds a slowdown."""

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import opened

matplotlib_image = pytest.importorskip("matplotlib.image")
pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]
ASV_BENCH = ROOT / "asv_bench"
TO_ANOTHER_HOST = re.compile(r"""<(?!a\b)[^>]*\b(?:src|href)=["'](?:https?:)?//|url\(["']?(?:https?:)?//|@import""")

needs_asv = pytest.mark.skipif(find_spec("asv") is None, reason="asv is not installed")
in_a_repository = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no repository")


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
def results(tmp_path):
    """Return the folder of a machine's results as asv leaves them."""
    record = {
        "commit_hash": "0123456789",
        "env_name": "existing-py_home_someone_bin_python",
        "date": 1700000000000,
        "params": {"machine": "secret", "python": "/home/someone/bin/python", "numpy": "2"},
        "python": "/home/someone/bin/python",
        "requirements": {},
        "results": {"some.track_thing": [[1.0, 2.0], [["'a'", "'b'"]], "1"]},
    }
    machine = tmp_path / "some-machine"
    machine.mkdir()
    (machine / "01234567-existing-py_home_someone_bin_python.json").write_text(json.dumps(record))
    (machine / "machine.json").write_text('{"machine": "secret", "version": 1}')
    return machine


@pytest.fixture
def tidied(results):
    """Return the same folder after ``measure.py`` has tidied its results."""
    machine = {"machine": "some-machine", "arch": "x86_64", "cpu": "a processor", "num_cpu": "2", "ram": "1 GiB"}
    script("measure").tidy(results, machine)
    return results


def test_tidied_results_describe_the_machine_without_private_names(tidied):
    (path,) = tidied.glob("*-*.json")
    record = json.loads(path.read_text())
    assert re.fullmatch(r"[0-9a-f]{8}-existing-py3\.\d+", path.stem)
    assert record["params"]["cpu"] == "a processor"
    for file in tidied.iterdir():
        assert not re.search("secret|someone", file.read_text())


def test_packages_begin_no_new_line(tidied):
    (path,) = tidied.glob("*-*.json")
    record = json.loads(path.read_text())
    assert "numpy" in record["requirements"]
    assert not record["params"].keys() & set(script("measure").PACKAGES)


def test_later_results_of_a_commit_are_added_to_its_file(tidied):
    (path,) = tidied.glob("*-*.json")
    later = json.loads(path.read_text())
    later["results"] = {"other.track_thing": [[3.0], [], "1"]}
    (tidied / "xxxxxxxx-existing-py_other.json").write_text(json.dumps(later))
    script("measure").tidy(tidied, {"machine": "some-machine"})
    assert json.loads(path.read_text())["results"].keys() == {"some.track_thing", "other.track_thing"}
    assert len(list(tidied.iterdir())) == 2


def test_description_of_this_machine_has_no_private_name():
    described = script("measure").describe_machine()
    assert re.search(r"^\w+-\d+core(-[a-z0-9_-]+)?$", described["machine"])
    assert all(isinstance(value, str) for value in described.values())


@pytest.fixture
def history(tmp_path, monkeypatch):
    """measure.py in a repository of five commits, of which the first has no backend; asv is left out."""
    bench, backend = tmp_path / "asv_bench", tmp_path / "backends" / "mbn_numpy"
    bench.mkdir()
    git(tmp_path, "init", "-b", "main")
    for number in range(5):
        if number == 1:
            backend.mkdir(parents=True)
            (backend / "__init__.py").write_text("")
        (bench / "file").write_text(str(number))
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-m", f"Commit {number}")
    measure = script("measure")
    monkeypatch.setattr(measure, "HERE", bench)
    monkeypatch.setattr(measure, "HISTORY", bench / "results")
    measure.measured = []

    def stand_in(commit, results, sources, *arguments, config):
        tree = sources[0]
        number = int((tree / "asv_bench" / "file").read_text())
        measure.measured.append(number)
        if number == 2:
            return 2
        machine = results / measure.describe_machine()["machine"]
        machine.mkdir(parents=True, exist_ok=True)
        (machine / f"{commit[:8]}-{measure.ENVIRONMENT}.json").write_text("{}")
        return 0

    monkeypatch.setattr(measure, "measure", stand_in)
    return measure


@pytest.mark.parametrize(("number", "expected"), [(1, [4]), (2, [4, 1]), (3, [4, 2, 1]), (9, [4, 3, 2, 1])])
def test_commits_are_spread_from_the_first_with_a_backend_to_the_last(history, number, expected):
    history.main(["--history", str(number)])
    assert history.measured == expected


def test_a_commit_that_fails_is_named_and_the_others_are_measured(history, capfd):
    assert history.main(["--history", "4"]) == 2
    assert re.search(r"3 of 4: [0-9a-f]+ Commit 2: asv ended with 2", capfd.readouterr().out)
    assert history.measured == [4, 3, 2, 1]
    assert git(history.HERE, "worktree", "list").count("\n") == 0


def test_a_commit_with_results_is_measured_again_only_if_that_is_asked_for(history):
    history.main(["--history", "HEAD"])
    history.main(["--history", "HEAD", "HEAD~1"])
    assert history.measured == [4, 3]
    history.main(["--history", "HEAD", "--again"])
    assert history.measured == [4, 3, 4]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages of the results that this repository holds."""
    if shutil.which("npm") is None:
        pytest.skip("there is no npm")
    folder = tmp_path_factory.mktemp("published") / "site"
    command = [sys.executable, str(ASV_BENCH / "publish.py"), str(folder)]
    published = subprocess.run(command, capture_output=True, text=True, check=False)
    assert published.returncode == 0, published.stdout + published.stderr
    return folder


@needs_asv
@in_a_repository
def test_published_pages_refer_to_no_other_host(site):
    pages = [path for path in site.rglob("*") if path.suffix in (".html", ".css", ".js")]
    for page in pages:
        assert not TO_ANOTHER_HOST.search(page.read_text(encoding="utf-8")), page
    index = (site / "index.html").read_text(encoding="utf-8")
    referred = re.findall(r'<(?:script|link)\b[^>]*\b(?:src|href)="([^"]+)"', index)
    assert len(referred) > 15
    assert [name for name in referred if not (site / name).is_file()] == []


@needs_asv
@in_a_repository
def test_a_browser_draws_a_line_for_every_benchmark(site):
    index = json.loads((site / "index.json").read_text(encoding="utf-8"))
    assert len(index["graph_param_list"]) == 1  # so one series, and one machine
    assert len(index["machines"]) == 1
    with opened(site) as page:
        page.set_viewport_size({"width": 1280, "height": 1000})
        page.goto("index.html")
        page.wait_for_selector("canvas")
        page.wait_for_load_state("networkidle")
        thumbnails = page.locator("#summarygrid-display .benchmark-plot").all()
        assert len(thumbnails) == len(index["benchmarks"])
        for thumbnail in thumbnails:
            assert coloured_columns(thumbnail) > MOST
        for benchmark in index["benchmarks"]:
            page.goto(f"index.html#{benchmark}")
            page.wait_for_load_state("networkidle")
            assert coloured_columns(page.locator("#main-graph")) > MOST
            assert page.locator("#graphdisplay-navigation").inner_text().count(*index["machines"]) == 1
        page.goto("index.html#regressions?sort=3&dir=desc")
        page.wait_for_selector("text=Best after")


MOST = 0.7
"""Of a picture's columns of pixels, which a line crosses and a dot does not."""


def coloured_columns(locator):
    """Return the share of columns with a pixel that has a colour: axes, frames and text are black and grey."""
    image = matplotlib_image.imread(io.BytesIO(locator.screenshot()))[..., :3]
    return (image.max(-1) - image.min(-1) > 0.1).any(0).mean()


def test_pages_that_refer_to_an_unknown_script_are_refused(tmp_path):
    (tmp_path / "index.html").write_text('<script src="https://example.org/new.js"></script>')
    with pytest.raises(ValueError, match=r"ask for new\.js"):
        script("publish").make_self_contained(tmp_path)


@needs_asv
@pytest.mark.skipif(find_spec("virtualenv") is None, reason="virtualenv is not installed")
@in_a_repository
def test_quick_check_finds_a_slowdown(tmp_path):
    checkout = tmp_path / "checkout"
    git(tmp_path, "clone", "--quiet", str(ROOT), str(checkout))
    backend = checkout / "backends" / "mbn_numpy" / "__init__.py"
    slow = "import time\nimport mbn.step.forward\nrun = mbn.step.forward.forward\n"
    slow += "mbn.layer.forward = lambda *args, **kwargs: (time.sleep(0.01), run(*args, **kwargs))[1]\n"
    backend.write_text(backend.read_text() + slow)
    git(checkout, "commit", "--all", "-m", "Sleep")
    # The check as it is, of one backend and one input.
    check = """. ../.ci/functions.sh; quick="Step.*'numpy'.*'\\(32, 64\\)'"; asv machine --yes && quick_check"""
    home = {
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_CONFIG_HOME": os.environ.get("XDG_CONFIG_HOME", str(Path.home() / ".config")),
    }
    checked = subprocess.run(
        ["bash", "-c", check],  # noqa: S607
        cwd=checkout / "asv_bench",
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 1, checked.stdout + checked.stderr
    assert "PERFORMANCE DECREASED" in checked.stdout
