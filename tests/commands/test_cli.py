"""The command line as its users see it: output, files and exit codes."""

import errno
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
import pytest

import mbn
from mbn import registry
from mbn.commands import availability
from mbn.commands.cli import main
from mbn.commands.compare import command, process, worker
from mbn.conformance import runner
from mbn.state import files
from mbn_numpy.backend import NumpyBackend


class Planted(NumpyBackend):
    """A backend whose outputs are a little off."""

    name = "planted"

    def bind(self, forward, pullback):
        def step(*args):
            y, *rest = forward(*args)
            return y + np.float32(1e-5), *rest

        return step, pullback


class Raising(NumpyBackend):
    """A backend that raises an error in every call."""

    name = "raising"

    def kernels_for(self, *_):
        message = "out of luck"
        raise RuntimeError(message)


@pytest.fixture
def plug_ins(monkeypatch):
    """Register two wrong backends and a missing one; they are known in this process alone, so workers run in it."""
    mbn.get_backend("numpy")
    monkeypatch.setattr(registry, "_loaded", dict(registry._loaded))
    for backend in (Planted, Raising):
        monkeypatch.setitem(registry._registered, backend.name, registry.Known(backend, "a test"))
    monkeypatch.setitem(registry._registered, "nowhere", registry.Known("mbn_nowhere:Backend", "a test"))
    monkeypatch.setattr(process, "run", worker.outcomes)
    monkeypatch.setattr(availability, "refusal", availability.refusal_in_this_process)


def compare(tmp_path, *arguments):
    """Return the exit code and the JSON of a comparison."""
    path = tmp_path / "out.json"
    return main(["compare", "--json", str(path), *arguments]), json.loads(path.read_text())


def refused(capsys, *arguments):
    """Return the one line with which a command is refused."""
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.strip().rpartition("\n")[2]


def test_compare_runs_built_in_examples_in_a_real_process(tmp_path):
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "mbn", "compare", "--backends", "numpy", "--json", str(path)]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1", "COLUMNS": "80"}
    )
    assert ended.returncode == 0, ended.stderr
    assert "AGREEMENT with the exact reference, within the bounds: numpy." in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 80
    assert "\x1b" not in ended.stdout
    record = json.loads(path.read_text())
    assert record["verdict"]["agreement"]
    assert record["versions"]["mbn"] == mbn.__version__
    assert len(record["examples"]) == 4
    for example in record["examples"]:
        (row,) = example["backends"]
        assert (row["status"], row["version"], row["device"]) == ("ran", np.__version__, "cpu")
        assert all(row["error_ulp"][quantity] <= bound for quantity, bound in example["bounds_ulp"].items())
        assert all(0 < seconds < 1 for seconds in row["seconds_per_call"].values())
    assert record["examples"][2]["backends"][0]["error_ulp"]["eval_output"] == 0  # x - 10, exactly


@pytest.mark.parametrize(
    ("dtype", "bounds"), [("float16", (1, 2)), ("bfloat16", (1, 2)), ("float32", (4, 2)), ("float64", (4, 4))]
)
def test_compare_applies_the_bounds_of_each_dtype(tmp_path, dtype, bounds):
    code, record = compare(tmp_path, "--backends", "numpy", "--shape", "20,3,2", "--dtype", dtype)
    (example,) = record["examples"]
    assert code == 0
    assert (example["dtype"], example["shape"]) == (dtype, [20, 3, 2])
    assert (example["bounds_ulp"]["eval_output"], example["bounds_ulp"]["running_var"]) == bounds


def test_compare_reads_npy(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(8.0).reshape(4, 2))
    code, record = compare(tmp_path, "--backends", "numpy", "--input", str(tmp_path / "x.npy"))
    assert (code, record["examples"][0]["dtype"]) == (0, "float64")


def test_compare_makes_an_example_of_each_array_in_npz(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.eye(3, dtype="float32"), b=np.ones((2, 3, 4)))
    code, record = compare(tmp_path, "--backends", "numpy", "--input", str(tmp_path / "x.npz"))
    assert code == 0
    assert [(e["name"], e["dtype"]) for e in record["examples"]] == [
        ("a of x.npz (3, 3)", "float32"),
        ("b of x.npz (2, 3, 4)", "float64"),
    ]


def test_compare_takes_integers_only_with_a_dtype(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.arange(8).reshape(4, 2))
    file = str(tmp_path / "x.npy")
    assert "--dtype float32" in refused(capsys, "compare", "--input", file)
    code, record = compare(tmp_path, "--backends", "numpy", "--input", file, "--dtype", "float16")
    assert (code, record["examples"][0]["dtype"]) == (0, "float16")


@pytest.mark.usefixtures("plug_ins")
def test_backend_that_cannot_run_is_a_row_with_the_reason(tmp_path, capsys):
    code, record = compare(tmp_path, "--backends", "numpy,numpy:cpu,numpy:cuda,nowhere", "--shape", "4,3")
    rows = {row["backend"]: row for row in record["examples"][0]["backends"]}
    assert code == 0
    assert [row["status"] for row in rows.values()] == ["ran", "ran", "cannot run", "cannot run"]
    assert rows["numpy:cuda"]["why"] == "NumPy's only device is 'cpu', not 'cuda'."
    assert "mbn_nowhere" in rows["nowhere"]["why"]
    assert "No module named 'mbn_nowhere'" in " ".join(capsys.readouterr().out.split())
    assert record["examples"][0]["pairs"][0] == {
        "backends": ["numpy", "numpy:cpu"],
        "distance_ulp": {"train_output": 0, "eval_output": 0, "running_mean": 0, "running_var": 0},
    }


@pytest.mark.usefixtures("plug_ins")
def test_disagreement_gives_exit_code_1(tmp_path, capsys):
    code, record = compare(tmp_path, "--backends", "numpy,planted", "--shape", "64,3")
    good, bad = record["examples"][0]["backends"]
    assert code == 1
    assert good["error_ulp"]["train_output"] < 4 < bad["error_ulp"]["train_output"]
    assert not record["verdict"]["agreement"]
    assert "planted: train_output is" in capsys.readouterr().out


@pytest.mark.usefixtures("plug_ins")
def test_broken_backend_gives_exit_code_1(tmp_path):
    code, record = compare(tmp_path, "--backends", "numpy,raising", "--shape", "4,3")
    assert code == 1
    assert record["examples"][0]["backends"][1] == {
        "backend": "raising",
        "status": "failed",
        "why": "RuntimeError: out of luck",
    }


@pytest.mark.matplotlib
@pytest.mark.usefixtures("plug_ins")
def test_compare_without_a_result_gives_exit_code_2(tmp_path, monkeypatch):
    picture = tmp_path / "p.png"
    only = NumpyBackend().capabilities._replace(dtypes=frozenset({"float64"}))
    monkeypatch.setattr(Planted, "capabilities", only)
    code, record = compare(tmp_path, "--backends", "planted", "--shape", "4,3", "--plot", str(picture))
    assert (code, record["verdict"]["exit_code"]) == (2, 2)
    assert not picture.exists()


@pytest.mark.usefixtures("plug_ins")
def test_compare_without_a_usable_backend_ends_before_computing(capsys, monkeypatch):
    monkeypatch.setattr(command, "reference", None)
    line = refused(capsys, "compare", "--backends", "nowhere,numpy:cuda,numpy:cuda", "--shape", "4,3")
    assert "no backend can run. nowhere: backend 'nowhere' (a test) is broken: ModuleNotFoundError" in line
    assert line.endswith("numpy:cuda: NumPy's only device is 'cpu', not 'cuda'.")


@pytest.mark.matplotlib
def test_plot_is_a_png(tmp_path):
    picture = tmp_path / "p.png"
    assert compare(tmp_path, "--backends", "numpy", "--shape", "4,3", "--plot", str(picture))[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backends", "numpi"), "there is no backend 'numpi'. Did you mean 'numpy'?"),
        (("--backends", "numpi:cpu"), "there is no backend 'numpi'"),
        (("--backends", "numpy,,jax"), "no list of backends"),
        (("--shape", "4"), "no shape N,C or N,C,L"),
        (("--shape", "4,-1"), "no shape N,C or N,C,L"),
        (("--shape", "-1,3"), "'-1,3' is no shape N,C or N,C,L of sizes of at least 1"),
        (("--backends", "numpy:"), "'numpy:' names no device: numpy alone"),
        (
            ("--backends", "numpy:cuda,numpy:cuda:1"),
            "numpy:cuda: NumPy's only device is 'cpu', not 'cuda'. numpy:cuda:1",
        ),
        (("--shape", "a,b"), "no shape N,C or N,C,L"),
        (("--shape", "1,3"), "more than one value per channel"),
        (("--shape", "4,3", "--input", "x.npy"), "not allowed with"),
        (("--dtype", "int8"), "invalid choice"),
        (("--input", "/nowhere/x.npy"), "cannot be read: No such file or directory"),
        (("--shape", "9999999999999,3"), "takes 2.4e+14 bytes in float64, and this machine has"),
        (("--shape", f"{9 * 10**40},3"), "and this machine has"),
        (("--shape", f"{10**400},3"), "and this machine has"),
        (("--json", "/nowhere/x.json"), "--json: /nowhere/x.json cannot be written: No such file or directory."),
        (("--json", "/"), "/ cannot be written: Is a directory."),
        (("--json", f"{__file__}/x.json"), "cannot be written: Not a directory."),
        (("--json", f"{300 * 'x'}.json"), "cannot be written: File name too long."),
        (("--plot", f"{__file__}/x.png"), f"--plot: {__file__}/x.png cannot be written: Not a directory."),
        (("--plot", "x.svg"), "the picture is a PNG"),
        (("--nonsense",), "unrecognized arguments"),
        (("--shape", "4,3", "--rows", "2"), "--rows is about the rows of a file: give --input FILE"),
        (("--input", "x.npy", "--rows=-1"), "'-1' is no number of rows: give 0 for all"),
    ],
)
def test_bad_usage_of_compare_is_refused_in_one_line(capsys, arguments, message):
    assert message in refused(capsys, "compare", *arguments)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("bench", "--shape", "9999999999999,3"), "takes 1.2e+14 bytes in float32"),
        (("bench", "--shape", "9,3", "--json", f"{__file__}/x.json"), "Not a directory"),
        (("bench", "--shape", "9,3", "--plot", "/nowhere/x.png"), "No such file or directory"),
        (("conform", "numpy", "--json", "/nowhere/x.json"), "No such file or directory"),
        (("conform", "numpy", "--junit-xml", f"{__file__}/x.xml"), f"--junit-xml: {__file__}/x.xml cannot be written"),
        (("conform", "numpy:"), "'numpy:' names no device"),
        (("conform", "numpy", "--device", ""), "argument --device: '' is no device"),
        (("bench", "--shape", "9,3", "--device", ""), "argument --device: '' is no device"),
        (("bench", "--shape", "9,3", "--backends", "numpy:"), "'numpy:' names no device"),
        (("bench", "--shape", "-9,3"), "'-9,3' is no shape"),
        (("conform", "numpi"), "there is no backend 'numpi'. Did you mean 'numpy'?"),
        (("conform", "numpy:cuda"), "NumPy's only device is 'cpu', not 'cuda'."),
    ],
)
def test_bad_usage_of_other_commands_is_refused_in_one_line(capsys, command, message):
    assert message in refused(capsys, *command)


def test_unknown_backend_is_refused_before_the_suite_is_imported():
    code = """
import sys
from mbn.commands.cli import main
code = main(["conform", "nope"])
sys.exit("pytest" in sys.modules or code)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("mbn conform: there is no backend 'nope'. Known backends: numpy,")


@pytest.mark.usefixtures("plug_ins")
def test_unusable_backend_is_refused_before_the_suite_begins(capsys):
    assert "No module named 'mbn_nowhere'" in refused(capsys, "conform", "nowhere")


def test_conform_refuses_unknown_pytest_option_with_exit_code_2(capsys):
    assert main(["conform", "numpy", "--no-such-option-of-pytest"]) == 2
    assert "--no-such-option-of-pytest" in capsys.readouterr().err


def header_with_shape(shape):
    return f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}"


def npy(header):
    text = f"{header}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def zipped(name, data, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        file.writestr(name, data)
    return buffer.getvalue()


def with_flags(data, *, encrypted=False, method=0):
    """Return a zip file whose only member is marked as encrypted, or as compressed by another method."""
    data = bytearray(data)
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.index(signature) + flags
        data[at] |= encrypted
        data[at + 2] = method
    return bytes(data)


X = npy(header_with_shape((2, 2))) + bytes(16)
FILES = {
    "huge.npy": npy(header_with_shape((10**13, 3))),
    "beyond.npy": npy(header_with_shape((10**30, 3))),
    "negative.npy": npy(header_with_shape((-3, 3))),
    "short.npy": npy(header_with_shape((2, 2))),
    "nested.npy": npy(9_000 * "(" + 9_000 * ")"),
    "lists.npy": npy(header_with_shape(1_000 * "[" + 1_000 * "]")),
    "text.npz": zipped("notes.txt", "no array"),
    "encrypted.npz": with_flags(zipped("x.npy", X), encrypted=True),
    "odd.npz": with_flags(zipped("x.npy", X), method=97),
    "damaged.npz": with_flags(zipped("x.npy", X), method=zipfile.ZIP_DEFLATED),
    "lzma.npz": with_flags(zipped("x.npy", X), method=zipfile.ZIP_LZMA),
    "cut.npz": zipped("x.npy", X)[:-30],
    "empty.npy": b"",
    "text.py": b"import numpy\n",
}


@pytest.mark.parametrize("name", FILES)
def test_unreadable_input_is_refused_in_one_line(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(FILES[name])
    line = refused(capsys, "compare", "--backends", "numpy", "--input", str(tmp_path / name))
    assert line.startswith(f"mbn compare: {tmp_path / name} is no ")
    assert "pickle" not in line


@pytest.fixture
def x(tmp_path):
    """Return the path of an input."""
    path = tmp_path / "x.npy"
    np.save(path, np.arange(8, dtype=np.float32).reshape(4, 2))
    return path


@pytest.mark.parametrize("option", ["--json", "--plot"])
@pytest.mark.parametrize("how", ["path", "other path", "symbolic link", "hard link"])
def test_output_never_overwrites_the_input(x, capsys, option, how):
    if option == "--plot":
        x = x.rename(x.with_suffix(".png"))
    before, link = x.read_bytes(), x.with_name("link.png")
    if how == "symbolic link":
        link.symlink_to(x)
    if how == "hard link":
        link.hardlink_to(x)
    output = {"path": x, "other path": x.parent / ".." / x.parent.name / x.name}.get(how, link)
    line = refused(capsys, "compare", "--backends", "numpy", "--input", str(x), option, str(output))
    assert f"the output {output} would overwrite the input {x}" in line
    assert x.read_bytes() == before


@pytest.mark.parametrize(
    "command",
    [
        ("compare", "--shape", "4,3", "--json", "p.png", "--plot", "./p.png"),
        ("bench", "--shape", "4,3", "--json", "p.png", "--plot", "./p.png"),
        ("conform", "numpy", "--json", "p.png", "--junit-xml", "./p.png"),
    ],
)
def test_two_outputs_to_one_file_are_refused(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert "would be written over" in refused(capsys, *command)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_found_before_computing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(process, "run", None)
    path = tmp_path / "out.json"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        line = refused(capsys, "compare", "--backends", "numpy", "--shape", "4,3", "--json", str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert line == f"mbn compare: --json: {path} cannot be written: File too large."
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.matplotlib
@pytest.mark.parametrize("rescued", [True, False])
def test_disk_that_fills_up_during_a_comparison_loses_no_result(tmp_path, capsys, monkeypatch, rescued):
    path, picture, elsewhere = tmp_path / "out.json", tmp_path / "p.png", tmp_path / "elsewhere"
    path.write_text("old")
    elsewhere.mkdir()
    replace = files.replace

    def full(target, data):
        if target == path:
            monkeypatch.setattr(tempfile, "tempdir", str(elsewhere if rescued else tmp_path / "nowhere"))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(target, data)

    monkeypatch.setattr(files, "replace", full)
    arguments = ["compare", "--backends", "numpy", "--shape", "4,3", "--json", str(path), "--plot", str(picture)]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert "AGREEMENT" in out
    assert f"mbn compare: {path} cannot be written: No space left on device." in err
    assert path.read_text() == "old"
    assert picture.read_bytes().startswith(b"\x89PNG")
    if rescued:
        (file,) = elsewhere.iterdir()
        assert f"Its contents are in {file}." in err
        assert json.loads(file.read_text())["verdict"]["agreement"]
    else:
        assert "Nor can a temporary file: No such file or directory." in err


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("where", ["full", "closed"])
@pytest.mark.parametrize(
    "command",
    [
        ("compare", "--backends", "numpy", "--shape", "4,3", "--json", "out.json"),
        ("backends",),
        ("conform", "numpy", "-k", "test_errors and test_unknown"),
        ("bench", "--help"),
        ("--version",),
    ],
    ids=" ".join,
)
@pytest.mark.processes
def test_unwritable_standard_output_is_one_line(tmp_path, command, where, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    if where == "full":
        os.close(writing)
        writing = os.open("/dev/full", os.O_WRONLY)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered, "MBN_BACKEND": ""}
    run = subprocess.run(
        [sys.executable, "-m", "mbn", *command],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    os.close(writing)
    why = {"full": "No space left on device", "closed": "Broken pipe"}[where]
    name = "mbn" if command[-1].startswith("--") else f"mbn {command[0]}"
    *_, last = run.stderr.splitlines()  # a slow machine gets lines of progress before it
    assert (run.returncode, last) == (2, f"{name}: standard output cannot be written: {why}.")
    assert "Traceback" not in run.stderr
    if "--json" in command:
        assert json.loads((tmp_path / "out.json").read_text())["verdict"]["agreement"]


def test_compare_writes_json_to_a_device_file(capsys):
    assert main(["compare", "--backends", "numpy", "--shape", "4,3", "--json", os.devnull]) == 0
    assert "AGREEMENT" in capsys.readouterr().out


@pytest.mark.processes
def test_unwritable_result_of_conform_is_saved_elsewhere(tmp_path, monkeypatch, capfd):
    path, elsewhere = tmp_path / "c.json", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "replace", full)
    assert main(["conform", "numpy", "--json", str(path), "-k", "test_errors and test_unknown"]) == 2
    (file,) = elsewhere.iterdir()
    assert f"{path} cannot be written: No space left on device. Its contents are in {file}.\n" in capfd.readouterr().err
    assert json.loads(file.read_text())["mbn"] == mbn.__version__


def test_plot_without_matplotlib_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install matplotlib" in refused(capsys, "compare", "--plot", str(tmp_path / "p.png"))


@pytest.mark.usefixtures("plug_ins")
def test_backends_lists_usable_and_unusable_backends(capsys):
    assert main(["backends"]) == 0
    out = capsys.readouterr().out
    usable, _, others = out.partition("cannot be used here")
    assert np.__version__ in usable
    assert "planted" in usable
    assert "nowhere" in others
    assert max(map(len, out.splitlines())) <= 80


def test_backends_lists_bfloat16_of_numpy_only_with_ml_dtypes():
    code = """
import sys
if sys.argv[1]:
    sys.modules["ml_dtypes"] = None
from mbn.commands import backends
known = backends.known_backends()
backends.known_backends = lambda: {"numpy": known["numpy"]}
backends.show()
"""
    for without in (True, False):
        run = subprocess.run([sys.executable, "-c", code, "1" * without], capture_output=True, text=True, check=True)
        assert ("bfloat16" in run.stdout) is not without
        assert "float16" in run.stdout


def test_conform_passes_its_arguments_to_the_suite(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(runner, "run", lambda *args, **kwargs: calls.append((args, kwargs)) or 3)
    path = tmp_path / "c.json"
    assert main(["conform", "numpy", "-x", "--json", str(path), "-k", "float16"]) == 3
    assert calls == [(("numpy",), {"json": path, "junit_xml": None, "pytest_args": ["-x", "-k", "float16"]})]


@pytest.mark.parametrize("name", ["numpy", "numpy:cpu"])
def test_conform_passes_its_device_to_the_suite(monkeypatch, name):
    monkeypatch.setattr(runner, "run", lambda spec, **_: {"numpy:cpu": 3}[spec])
    assert main(["conform", name, "--device", "cpu"]) == 3


def test_conform_on_two_devices_is_refused(capsys):
    assert "leave one of them out" in refused(capsys, "conform", "torch:cpu", "--device", "cuda")


def test_conform_without_its_packages_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    line = refused(capsys, "conform", "numpy")
    assert "pip install pytest hypothesis ml_dtypes, or '.[conformance]'" in line
    assert "there is no backend 'numpi'" in refused(capsys, "conform", "numpi")


@pytest.mark.parametrize(
    "command",
    [("compare", "--json"), ("compare", "--input"), ("conform", "numpy", "--json"), ("conform", "x", "--junit-xml")],
)
def test_empty_file_name_is_refused(capsys, command):
    with pytest.raises(SystemExit, match="2"):
        main([*command, ""])
    assert f"argument {command[-1]}: '' is no file" in capsys.readouterr().err


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"mbn {mbn.__version__}\n"


@pytest.mark.parametrize("command", [(), ("compare",), ("backends",), ("conform",)])
def test_help_is_printed(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    assert capsys.readouterr().out.startswith("usage: mbn")


def test_import_of_mbn_does_not_import_the_commands():
    code = "import sys, mbn; sys.exit(not {'rich', 'mbn.commands'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
