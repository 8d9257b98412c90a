"""Every benchmark works: a broken one has to fail here, since in asv it is a line that nobody reads."""

import importlib
import inspect
import itertools
import math
import os
import pkgutil
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

import mbn
from mbn.commands.bench import measurement, replicas
from mbn.commands.bench.workloads import Workload

pytestmark = pytest.mark.processes

ASV_BENCH = Path(__file__).parents[1] / "asv_bench"
IS_BENCHMARK = re.compile("(time|timeraw|peakmem|track)_").match


def _modules(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ASV_BENCH)
        package = importlib.import_module(folder)
        return {
            info.name: importlib.import_module(f"{folder}.{info.name}")
            for info in pkgutil.iter_modules(package.__path__)
        }


MODULES = _modules("benchmarks")
HISTORY = _modules("history")


def _benchmarks():
    """Yield the benchmarks that asv finds, each as a function that runs it with its first parameters, and its name."""
    for module_name, module in MODULES.items():
        if module_name in {"compiled", "gpu"}:
            continue  # they do not measure NumPy: see below, and test_gpu.py
        for name, found in vars(module).items():
            if inspect.isclass(found) and hasattr(found, "params"):
                for method in filter(IS_BENCHMARK, dir(found)):
                    yield pytest.param(partial(_run, found, method), method, id=f"{module_name}.{name}.{method}")
            elif IS_BENCHMARK(name):
                yield pytest.param(found, name, id=f"{module_name}.{name}")


def _run(cls, method):
    arguments = [values[0] for values in cls.params]
    assert arguments[0] == "numpy"
    assert len(cls.param_names) == len(arguments)
    benchmark = cls()
    cached = [benchmark.setup_cache()] if hasattr(cls, "setup_cache") else []
    benchmark.setup(*cached, *arguments)
    result = getattr(benchmark, method)(*cached, *arguments)
    if hasattr(benchmark, "teardown"):
        benchmark.teardown(*cached, *arguments)
    return result


@pytest.fixture
def few(monkeypatch):
    """Reduce the benchmarks in processes, which take minutes, to few calls on small inputs."""
    side_by_side = MODULES["side_by_side"]
    shapes = {workload: Workload(workload.shape).smaller().smaller() for workload in map(Workload, side_by_side.SHAPES)}
    monkeypatch.setattr(side_by_side, "Workload", lambda shape: shapes[Workload(shape)])
    monkeypatch.setattr(side_by_side, "SUBJECTS", ["numpy", "nowhere", "copy"])
    monkeypatch.setattr(measurement, "ROUNDS", 1)
    monkeypatch.setattr(replicas, "ROUNDS", 1)
    monkeypatch.setattr(MODULES["replicas"], "NAMES", ["numpy", "nowhere"])
    monkeypatch.setattr(MODULES["larger"], "DATA", MODULES["_sources"].Data(2**16, 2**14))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("run", "name"), list(_benchmarks()))
def test_benchmark_runs_on_numpy(run, name):
    result = run()
    if name.startswith("track_"):
        assert math.isfinite(result)
    if name.startswith("timeraw_"):
        subprocess.run([sys.executable, "-c", result], check=True)


@pytest.mark.parametrize("error", [mbn.BackendNotFoundError("unknown"), mbn.BackendUnavailableError("no GPU")])
def test_unusable_backend_is_not_measured(monkeypatch, error):
    def get_backend(_):
        raise error

    monkeypatch.setattr(mbn, "get_backend", get_backend)
    with pytest.raises(NotImplementedError, match=str(error)):
        MODULES["_backends"].layer("numpy", Workload((4, 3)))


def test_workload_that_a_backend_cannot_do_is_not_measured():
    with pytest.raises(NotImplementedError, match="numpy takes no float8"):
        MODULES["_backends"].layer("numpy", Workload((4, 3), dtype="float8"))


@pytest.mark.usefixtures("few")
def test_subject_that_did_not_run_is_not_measured():
    benchmark = MODULES["side_by_side"].Time()
    with pytest.raises(NotImplementedError, match="there is no backend 'nowhere'"):
        benchmark.setup(benchmark.setup_cache(), "nowhere", "train", "(32, 64)")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method:DeprecationWarning")  # Torch's own, in its compiler
@pytest.mark.parametrize("layers", MODULES["compiled"].Perceptron.params[0])
@pytest.mark.parametrize("mode", MODULES["compiled"].Perceptron.params[1])
def test_compiled_model_runs_on_torch(layers, mode):
    pytest.importorskip("torch")
    benchmark = MODULES["compiled"].Perceptron()
    benchmark.setup(layers, mode, 64)
    benchmark.time_step()


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("kind", "source", "package"),
    [
        ("Fit", "memmap", "numpy"),
        ("Fit", "zarr", "zarr"),
        ("Fit", "hdf5", "h5py"),
        ("Fit", "dask", "dask.array"),
        ("Evaluate", "dask", "dask.array"),
    ],
)
def test_benchmark_runs_on_source(kind, source, package):
    pytest.importorskip(package)
    benchmark = getattr(MODULES["larger"], kind)()
    benchmark.setup(source)
    assert benchmark.track_peak() >= 0
    benchmark.teardown(source)


@pytest.fixture
def small(monkeypatch):
    """Of the history's figures, those that take little time; their names stay."""
    worker = HISTORY["_worker"]
    monkeypatch.setattr(worker, "_ROUNDS", 1)
    monkeypatch.setattr(worker, "_SAMPLE", 0)
    step = worker.step
    monkeypatch.setattr(worker, "step", lambda name, mode, x, dy: step(name, mode, x[:8], dy[:8]))
    return worker


HISTORY_BENCHMARKS = [
    pytest.param(found, method, id=f"{name}.{method}")
    for name, found in vars(HISTORY["layer"]).items()
    if hasattr(found, "params")
    for method in filter(IS_BENCHMARK, dir(found))
]


@pytest.mark.parametrize("backend", HISTORY["layer"].BACKENDS)
def test_history_has_every_figure_of_this_commit(small, monkeypatch, backend):
    monkeypatch.setattr(small, "errors", lambda *_: dict.fromkeys(small.QUANTITIES, 0.5))
    figures = {backend: small.figures(backend)}
    assert figures[backend][1] == {}
    for found, method in (param.values for param in HISTORY_BENCHMARKS):
        for arguments in itertools.product([backend], *found.params[1:]):
            benchmark = found()
            benchmark.setup(figures, *arguments)
            assert math.isfinite(getattr(benchmark, method)(*arguments))


@pytest.mark.parametrize("backend", HISTORY["layer"].BACKENDS)
def test_history_measures_errors_within_the_bounds(backend):
    missing = {}
    errors = HISTORY["_worker"].errors(backend, missing)
    assert missing == {}
    assert errors.keys() == set(HISTORY["_worker"].QUANTITIES)
    assert max(errors.values()) <= 4


def test_history_lacks_of_an_old_commit_only_the_figures_of_its_missing_parts(small, monkeypatch):
    monkeypatch.delattr(mbn.BatchNorm1d, "vjp")
    figures, missing = small.figures("numpy")
    assert {name for name in missing if "backward" not in name} == {"ulp | gradient of x"}
    assert figures.keys() >= {"seconds | train | (32, 64)", "bytes | eval", "ulp | y, training"}
    with pytest.raises(NotImplementedError, match="has no attribute 'vjp'"):
        HISTORY["layer"].Step().setup({"numpy": (figures, missing)}, "numpy", "backward", "(32, 64)")


def test_history_lacks_all_figures_of_a_backend_whose_process_fails(monkeypatch):
    monkeypatch.setattr(HISTORY["layer"]._worker, "__file__", "nowhere.py")
    found = {"numpy": HISTORY["layer"]._measured("numpy")}
    with pytest.raises(NotImplementedError, match=r"nowhere\.py"):
        HISTORY["layer"].Memory().setup(found, "numpy", "train")


def test_history_measures_the_mbn_that_asv_imports(tmp_path, monkeypatch):
    (tmp_path / "mbn.py").write_text("raise RuntimeError('the mbn of this commit')")
    monkeypatch.syspath_prepend(tmp_path)
    _, missing = HISTORY["layer"]._measured("numpy")
    assert all("the mbn of this commit" in why for why in missing.values())
    statement, setup = HISTORY["imports"].timeraw_import()
    imported = subprocess.run(
        [sys.executable, "-c", f"{setup}\n{statement}"], capture_output=True, text=True, check=False
    )
    assert "the mbn of this commit" in imported.stderr


def test_history_takes_no_backend_from_another_commit():
    finder = HISTORY["_worker"]._OneCommit()
    assert finder.find_spec("mbn_numpy") is None
    assert finder.find_spec("torch") is None
    with pytest.raises(ModuleNotFoundError, match="mbn_elsewhere"):
        finder.find_spec("mbn_elsewhere")


@pytest.mark.skipif(find_spec("asv") is None, reason="asv is not installed")
@pytest.mark.parametrize("config", ["asv.conf.json", "asv.history.json"])
def test_asv_accepts_the_benchmarks(config):
    # asv removes PYTHONPATH from the environment; ASV_PYTHONPATH tells it where an mbn is that is not installed.
    sources = {str(Path(find_spec(package).origin).parents[1]) for package in ("mbn", "mbn_numpy")}
    check = subprocess.run(
        [sys.executable, "-m", "asv", "--config", config, "check", "-E", "existing"],
        cwd=ASV_BENCH,
        env=os.environ | {"ASV_PYTHONPATH": os.pathsep.join(sorted(sources))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stdout + check.stderr
