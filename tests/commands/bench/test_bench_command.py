"""``mbn bench`` as its users see it: output, files and exit codes."""

import json
import os
import subprocess
import sys

import pytest

from mbn import registry
from mbn.commands import availability, options
from mbn.commands.bench import clocks, measurement, peers, worker
from mbn.commands.cli import main
from mbn_numpy.backend import NumpyBackend

pytestmark = pytest.mark.processes


class InThisProcess:
    """Answers questions in this process, in place of a worker process."""

    def __init__(self, _):
        self._worker = worker.Worker()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, question):
        return self._worker.answer(question)


@pytest.fixture
def quick(monkeypatch):
    """Let workers run in this process, with as few calls as possible."""
    monkeypatch.setattr(measurement, "Process", InThisProcess)
    monkeypatch.setattr(availability, "refusal", availability.refusal_in_this_process)
    monkeypatch.setattr(measurement, "ROUNDS", 2)
    monkeypatch.setattr(clocks, "TURN", 0)
    monkeypatch.setattr(worker, "_SETTLE", 0)
    monkeypatch.setattr(measurement, "PEERS", {name: peers.PEERS[name] for name in ("formula", "copy")})


def bench(tmp_path, *arguments):
    """Return the exit code and the JSON of a benchmark."""
    path = tmp_path / "out.json"
    return main(["bench", "--json", str(path), *arguments]), json.loads(path.read_text())


def refused(capsys, *arguments):
    """Return the one line with which the command is refused."""
    try:
        code = main(["bench", *arguments])
    except SystemExit as end:
        code = end.code
    assert code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.strip().rpartition("\n")[2]


def test_bench_measures_in_real_processes(tmp_path):
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "mbn", "bench", "--shape", "64,8", "--modes", "train", "--json", str(path)]
    ended = subprocess.run(
        [*command, "--backends", "numpy"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "80"},
    )
    assert ended.returncode == 0, ended.stderr
    assert max(map(len, ended.stdout.splitlines())) <= 80
    assert "\x1b" not in ended.stdout
    subjects = {row["subject"]: row for row in json.loads(path.read_text())["subjects"]}
    assert list(subjects) == ["numpy", *measurement.PEERS]
    for name in ("numpy", "formula", "copy"):
        assert subjects[name]["status"] == "ran", subjects[name]
        assert len(subjects[name]["seconds_by_round"]["train"]) == measurement.ROUNDS
    assert subjects["copy"]["ratio"]["train"]["copy"] == 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "arguments",
    [
        ("--shape", "16,3"),
        ("--shape", "16,3,4", "--masked"),
        ("--shape", "16,4,3", "--axis", "-1"),
        ("--shape", "16,3", "--dtype", "float16"),
        ("--shape", "16,3", "--dtype", "bfloat16"),
    ],
)
def test_bench_measures_every_kind_of_workload(tmp_path, arguments):
    code, written = bench(tmp_path, "--backends", "numpy", *arguments)
    assert code == 0
    assert written["subjects"][0]["status"] == "ran"
    assert written["subjects"][0]["seconds_per_call"].keys() == {"train", "eval", "backward"}


@pytest.mark.usefixtures("quick")
def test_modes_are_measured_in_a_fixed_order(tmp_path):
    _, written = bench(tmp_path, "--backends", "numpy", "--shape", "4,3", "--modes", "eval,train")
    assert written["modes"] == ["train", "eval"]


@pytest.mark.usefixtures("quick")
def test_subject_that_cannot_run_is_listed_with_the_reason(tmp_path, capsys):
    code, written = bench(tmp_path, "--backends", "numpy,numpy:cuda", "--shape", "4,3", "--masked")
    rows = {row["subject"]: row for row in written["subjects"]}
    assert code == 0
    assert rows["numpy:cuda"] == {
        "subject": "numpy:cuda",
        "status": "cannot run",
        "why": "NumPy's only device is 'cpu', not 'cuda'.",
    }
    out = capsys.readouterr().out
    assert "NumPy's only device is 'cpu', not 'cuda'." in out
    assert "the formula takes no masks" in out


@pytest.mark.usefixtures("quick")
def test_failing_subject_gives_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(peers.PEERS, "formula", "mbn.commands.bench.peers.formula:Nonsense")
    code, written = bench(tmp_path, "--backends", "numpy", "--shape", "4,3")
    assert code == 1
    assert written["subjects"][1]["status"] == "failed"
    assert "failed: AttributeError" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("quick")
def test_bench_without_a_usable_backend_ends_before_measuring(capsys, monkeypatch):
    monkeypatch.setattr(measurement, "measure", None)
    line = refused(capsys, "--backends", "numpy:cuda", "--shape", "4,3")
    assert line == "mbn bench: no backend can run. numpy:cuda: NumPy's only device is 'cpu', not 'cuda'."


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("modes", ["train", "train,eval,backward"])
def test_plot_is_a_png(tmp_path, modes):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "p.png"
    bench(tmp_path, "--backends", "numpy", "--shape", "4,3", "--modes", modes, "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


class OnGpu(NumpyBackend):
    """A backend that accepts the device ``cuda`` without having a GPU."""

    name = "ongpu"

    def asarray(self, x, dtype=None, device=None):
        return super().asarray(x, dtype, None if device == "cuda" else device)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setitem(registry._registered, "ongpu", registry.Known(OnGpu, "a test"))


@pytest.mark.usefixtures("quick", "gpu")
def test_bench_on_a_device_leaves_out_subjects_without_it(tmp_path, capsys):
    code, written = bench(tmp_path, "--backends", "numpy,ongpu", "--device", "cuda", "--shape", "4,3")
    assert code == 0
    assert [row["subject"] for row in written["subjects"]] == ["ongpu:cuda", "copy:cuda"]
    assert written["subjects"][0]["status"] == "ran"
    assert "Not on cuda, and so left out: numpy." in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_pullback_is_measured_on_request(tmp_path):
    _, written = bench(tmp_path, "--backends", "numpy", "--shape", "4,3", "--modes", "pullback,train")
    assert written["modes"] == ["train", "pullback"]


@pytest.mark.parametrize("backends", [(), ("--backends", "numpy")])
def test_missing_device_is_refused_in_one_line(capsys, monkeypatch, backends):
    monkeypatch.setattr(measurement, "Process", InThisProcess)
    monkeypatch.setattr(availability, "refusal", availability.refusal_in_this_process)
    monkeypatch.setattr(options, "known_backends", lambda: {"numpy": None})
    assert "no backend here has a device 'cuda'" in refused(capsys, "--shape", "4,3", "--device", "cuda", *backends)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "4,3", "--backends", "torch:cuda", "--device", "cpu"), "leave one of them out"),
        ((), "the following arguments are required: --shape"),
        (("--shape", "4"), "no shape N,C or N,C,L"),
        (("--shape", "1,3"), "one value per channel"),
        (("--shape", "4,3", "--backends", "numpi"), "Did you mean 'numpy'?"),
        (("--shape", "4,3", "--modes", "train,test"), "no modes, such as train,eval,backward"),
        (("--shape", "4,3", "--axis", "2"), "invalid choice"),
        (("--shape", "4,3", "--dtype", "int8"), "invalid choice"),
        (("--shape", "4,3", "--json", "/nowhere/x.json"), "cannot be written"),
        (("--shape", "4,3", "--plot", "x.svg"), "the picture is a PNG"),
    ],
)
def test_bad_usage_is_refused_in_one_line(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_bfloat16_without_ml_dtypes_is_refused(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert "pip install ml_dtypes" in refused(capsys, "--shape", "4,3", "--dtype", "bfloat16")


def test_plot_without_matplotlib_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda _: None)
    assert "pip install matplotlib" in refused(capsys, "--shape", "4,3", "--plot", str(tmp_path / "p.png"))
