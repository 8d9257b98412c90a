"""The pytest plugin that runs the suite: ``pytest --pyargs mbn.conformance -p mbn.conformance.plugin --backend NAME``.

A plugin must define the options, since pytest reads a conftest.py inside the package too late for ``--pyargs``. At the
end the plugin prints a report by area; the reason of each skip names the capability that is missing.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import mbn
from mbn.conformance.target import Target
from mbn.state import outputs

AREAS = (
    *("semantics", "accuracy", "errors", "state", "files", "population", "folding", "modules"),
    *("dtypes", "masks", "out", "gradients", "transforms", "replicas", "chunked", "agreement"),
)

settings.register_profile(
    "mbn",
    deadline=None,  # the first example takes a compiled backend seconds
    derandomize=True,  # the verdict on a backend must be reproducible
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)

settings.register_profile("compiled", settings.get_profile("mbn"), max_examples=12)
"""For backends that compile for each shape: each example takes them a good part of a second."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the suite's options."""
    group = parser.getgroup("mbn", "conformance of mbn backends")
    group.addoption("--backend", action="append", metavar="NAME[:DEVICE]", help="backend to test; repeatable")
    group.addoption("--conformance-json", type=Path, metavar="FILE", help="write the report as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Find the backends before the first test, so that a wrong name gives one line and not a hundred failures."""
    names = config.getoption("--backend")
    if not names:
        raise pytest.UsageError(
            f"the conformance suite needs --backend NAME; known backends: {', '.join(mbn.list_backends())}"
        )
    try:
        outputs.check_files({"--conformance-json": config.getoption("--conformance-json")})
        targets = {name: Target.parse(name) for name in names}
    except (outputs.OutputError, mbn.BackendUnavailableError, ValueError) as error:
        raise pytest.UsageError(str(error)) from error
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("mbn")
    config.pluginmanager.register(_Suite(targets, config.getoption("--conformance-json")), "mbn-conformance-suite")


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> Target:
    """Give a test the backend under test."""
    backend: Target = request.param
    return backend


class _Suite:
    """The hooks of pytest that parametrise tests by target, and the report on the targets."""

    def __init__(self, targets: dict[str, Target], json_file: Path | None) -> None:
        self._targets = targets
        self._json_file = json_file
        self._reports: list[pytest.TestReport] = []

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "target" in metafunc.fixturenames:
            metafunc.parametrize(
                "target", self._targets.values(), ids=self._targets.keys(), indirect=True, scope="session"
            )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if _area(report.nodeid) and (report.when == "call" or not report.passed):
            self._reports.append(report)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section(f"conformance of {', '.join(self._targets)}")
        for area, counts in self._counts().items():
            verdict = "FAILED" if counts["failed"] else "passed" if counts["passed"] else "not tested"
            figures = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
            terminalreporter.write_line(f"{area:<10} {verdict:<10} {figures}")
        for reason, count in Counter(map(_reason, self._of("skipped"))).items():
            terminalreporter.write_line(f"skipped {count}: {reason}")
        for report in self._of("failed"):
            terminalreporter.write_line(f"failed {_test(report)}: {_message(report)}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self._json_file is not None:
            try:
                outputs.write({self._json_file: (json.dumps(self._as_data(int(exitstatus)), indent=2) + "\n").encode()})
            except outputs.OutputError as error:
                session.exitstatus = pytest.ExitCode.USAGE_ERROR
                sys.stderr.write(f"{error}\n")

    def _as_data(self, exitstatus: int) -> dict[str, Any]:
        return {
            "backends": {
                name: {
                    "version": target.backend.version,
                    "device": target.device or target.capabilities.devices[0],
                    "dtypes": sorted(target.capabilities.dtypes),
                    "capabilities": {k: v for k, v in target.capabilities._asdict().items() if isinstance(v, bool)},
                }
                for name, target in self._targets.items()
            },
            "mbn": mbn.__version__,
            "exit_status": exitstatus,
            "areas": self._counts(),
            "failed": [{"test": _test(report), "message": _message(report)} for report in self._of("failed")],
            "skipped": [{"test": _test(report), "reason": _reason(report)} for report in self._of("skipped")],
        }

    def _counts(self) -> dict[str, dict[str, int]]:
        counts = {area: dict.fromkeys(("passed", "failed", "skipped"), 0) for area in AREAS}
        for report in self._reports:
            counts[_area(report.nodeid)][report.outcome] += 1
        return counts

    def _of(self, outcome: str) -> Iterator[pytest.TestReport]:
        return (report for report in self._reports if report.outcome == outcome)


def _area(nodeid: str) -> str:
    """Return the area of a test, by the name of its file; the empty string if the test is not of the suite."""
    stem = Path(nodeid.partition("::")[0]).stem.removeprefix("test_")
    return stem if stem in AREAS else ""


def _test(report: pytest.TestReport) -> str:
    return f"{_area(report.nodeid)}: {report.nodeid.partition('::')[2]}"


def _message(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return text.partition("\n")[0]


def _reason(report: pytest.TestReport) -> str:
    location = report.longrepr
    return location[2].removeprefix("Skipped: ") if isinstance(location, tuple) else str(location)
