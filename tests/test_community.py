"""Files for contributors and hosted CI follow their schemas, and name only sessions, extras and files that exist."""

import os
import re
import subprocess
import sys
import tomllib
from itertools import product
from pathlib import Path

import pytest

import mbn

ROOT = Path(__file__).parents[1]
if not (ROOT / ".github").exists():
    pytest.skip("this is no repository", allow_module_level=True)
pytest.importorskip("check_jsonschema")
YAML = pytest.importorskip("ruamel.yaml").YAML(typ="safe")

SCHEMAS = {
    "github-workflows": ".github/workflows/*.yml",
    "github-actions": ".github/actions/*/action.yml",
    "github-issue-forms": ".github/ISSUE_TEMPLATE/[!c]*.yml",
    "github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
    "dependabot": ".github/dependabot.yml",
    "citation-file-format": "CITATION.cff",
}
WORKFLOWS = {path.stem: YAML.load(path) for path in ROOT.glob(SCHEMAS["github-workflows"])}
JOBS = [job for workflow in WORKFLOWS.values() for job in workflow["jobs"].values()]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def steps(job):
    return job.get("steps", [])


def commands():
    """Return the commands of all workflows, one for each value of a matrix that they name."""
    found = []
    for job in JOBS:
        matrix = job.get("strategy", {}).get("matrix", {})
        for values in product(*matrix.values()):
            for step in steps(job):
                command = step.get("run", "")
                for name, value in zip(matrix, values, strict=True):
                    command = command.replace(f"${{{{ matrix.{name} }}}}", str(value))
                found.append(command)
    return found


@pytest.mark.processes
@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_follow_their_schema(schema):
    files = list(ROOT.glob(SCHEMAS[schema]))
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, files)]
    check = subprocess.run(command, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr


@pytest.mark.processes
def test_named_sessions_exist():
    listed = subprocess.run(
        [sys.executable, "-m", "nox", "--noxfile", str(ROOT / "noxfile.py"), "--list"],
        capture_output=True,
        text=True,
        check=True,
    )
    sessions = set(re.findall(r"^[*-] (\w+)", listed.stdout, re.MULTILINE))
    texts = [
        *commands(),
        (ROOT / "CONTRIBUTING.md").read_text(),
        (ROOT / ".github/pull_request_template.md").read_text(),
    ]
    named = set(re.findall(r"nox -s (\S+?)[`\s]", "\n".join(texts) + "\n"))
    assert {"quick", "backend", "all", "lint", "docs", "bench"} <= named
    assert named <= sessions


def test_named_backends_exist():
    named = re.findall(r"nox -s backend -- (\w+)", "\n".join(commands()))
    assert named
    assert set(named) <= {"numpy", "numba", "torch", "jax", "mlx", "cupy"}


def test_named_extras_exist():
    texts = [*commands(), (ROOT / "CONTRIBUTING.md").read_text()]
    named = re.findall(r"(?:\.|\))\[(\w+)\]", "\n".join(texts))
    assert named
    assert set(named) <= EXTRAS.keys()


def test_workflows_have_few_rights_and_an_end():
    for workflow in WORKFLOWS.values():
        assert workflow["permissions"] == {"contents": "read"}
        assert "concurrency" in workflow
    for job in JOBS:
        assert "timeout-minutes" in job or "uses" in job
        for step in steps(job):
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
    others = [(job["permissions"], job["if"]) for job in JOBS if "permissions" in job]
    guard = "github.event_name == 'push' && startsWith(github.ref, 'refs/tags/v')"
    assert others == [({"id-token": "write"}, guard)]
    assert WORKFLOWS["release"]["on"] == {"push": {"tags": ["v*"]}}


def test_actions_have_one_version_each():
    text = "\n".join(path.read_text() for path in (ROOT / ".github").rglob("*.yml"))
    used = dict.fromkeys(re.findall(r"uses: ([^./\s]\S+)@(\S+)", text))
    assert {version for _, version in used} <= {"release/v1", *(f"v{major}" for major in range(1, 20))}
    assert len({name for name, _ in used}) == len(used)


@pytest.mark.processes
@pytest.mark.parametrize("tag", [f"v{mbn.__version__}", "v0.0.99"])
def test_a_release_needs_the_tag_of_its_version(tmp_path, tag):
    (step,) = (
        step for job in JOBS for step in steps(job) if step.get("name") == "Refuse a tag that is not the version"
    )
    wheel = tmp_path / "dist" / f"mbn_batchnorm-{mbn.__version__}-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    environment = os.environ | {"GITHUB_REF_NAME": tag}
    refused = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=tmp_path, env=environment, check=False).returncode  # noqa: S607
    assert bool(refused) == (tag != f"v{mbn.__version__}")


def test_addresses_of_the_project_are_those_of_pyproject():
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    citation = YAML.load(ROOT / "CITATION.cff")
    assert (citation["repository-code"], citation["url"]) == (urls["Source"], urls["Documentation"])
    for name in ("SECURITY.md", "CODE_OF_CONDUCT.md", ".github/ISSUE_TEMPLATE/config.yml"):
        assert urls["Source"] in (ROOT / name).read_text()


def test_files_that_contributors_are_sent_to_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"\]\((docs/[\w.]+)\)", text)
    named += re.findall(r"`((?:docs|tests|mbn|\.github|\.ci)/[\w./]+|[A-Z_]+\.(?:md|cff)|\.ci/run)`", text)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []
