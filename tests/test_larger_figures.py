"""The script asv_bench/larger.py: its arithmetic, its sources, and a small measurement from end to end."""

import importlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

ASV_BENCH = Path(__file__).parents[1] / "asv_bench"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ASV_BENCH)
    larger = importlib.import_module("larger")
    sources = importlib.import_module("benchmarks._sources")

DATA = sources.Data(10 * 256, 3 * 256)
"""Ten rows, in chunks of three."""
COMPARISON = larger.Comparison("part", "what", "task", "reference", at_most=1.3, workers=2)


def figures(*seconds, peak=2**20):
    return [larger.Figures(each, peak) for each in seconds]


def test_exact_statistics_are_those_of_fractions():
    x = larger.offset_values(50)
    columns = [[Fraction(float(value)) for value in column] for column in x.T]
    means = [sum(column) / 50 for column in columns]
    variances = [sum((value - mean) ** 2 for value in column) / 49 for column, mean in zip(columns, means, strict=True)]
    assert larger.exact_statistics(x, larger.OFFSET_STEP) == list(zip(means, variances, strict=True))


def test_exact_statistics_refuse_sums_beyond_int64():
    with pytest.raises(OverflowError, match="int64"):
        larger.exact_statistics(np.array([[0], [2.0**31]], np.float32), Fraction(1, 2))


def test_values_at_the_offset_are_multiples_of_the_step_about_it():
    x = larger.offset_values(1000).astype(np.float64)
    assert np.array_equal(x * 16, np.rint(x * 16))
    assert np.abs(x - 1e6).max() < 10
    assert 0.9 < x.std() < 1.1


def test_largest_error_is_relative_to_the_exact_value():
    assert larger.largest_error([1.5, -8], [Fraction(1), Fraction(-10)]) == 0.5


def test_ratio_is_the_median_of_the_rounds():
    assert larger.ratio(figures(2, 30, 9), figures(1, 10, 9)) == 2


def test_row_has_both_bounds_and_whether_they_hold():
    found = {"task": figures(1.5, 1.2, 1.2), "reference": figures(1, 1, 1)}
    row = larger.row(COMPARISON, found, DATA)
    assert row == ["what", "1.2", "1", "1.20", "1.30", "yes", "1", "64", "yes"]
    found["task"] = figures(1.4, 1.2, 1.4, peak=65 * 2**20)
    assert larger.row(COMPARISON, found, DATA) == ["what", "1.4", "1", "1.40", "1.30", "no", "65", "64", "no"]


def test_row_of_a_task_that_failed_has_the_bound_alone():
    row = larger.row(COMPARISON, {"task": [], "reference": figures(1)}, DATA)
    assert row == ["what", "-", "-", "-", "1.30", "-", "-", "-", "-"]


def test_row_without_a_bound_of_memory_has_none():
    found = {"task": figures(1), "reference": figures(1)}
    assert larger.row(COMPARISON._replace(workers=None), found, DATA)[-3:] == ["-"] * 3


def test_table_has_as_many_cells_in_each_line():
    lines = larger.table([larger.row(COMPARISON, {"task": [], "reference": []}, DATA)])
    assert {line.count("|") for line in lines} == {10}


def test_machine_is_described_with_versions():
    about, data = larger.machine(DATA, 3, cold=False)
    assert f"numpy {np.__version__}" in about
    assert "(10, 64)" in data


def test_tasks_take_turns_and_one_that_fails_is_not_repeated(monkeypatch, tmp_path):
    asked = []

    def ask(name, *_):
        asked.append(name)
        return "no such thing" if name == "reference" else (1.0, 2)

    monkeypatch.setattr(larger, "ask", ask)
    other = COMPARISON._replace(task="other", reference="task")
    rows = larger.compared([COMPARISON, other], tmp_path, DATA, 2, cold=False)
    assert asked == ["task", "reference", "other", "task", "other"]
    assert [row[3] for row in rows] == ["-", "1.00"]


@pytest.mark.processes
def test_error_of_a_process_is_its_last_line(tmp_path):
    assert larger.ask("nothing: fit", tmp_path, DATA) == "ValueError: nothing"


@pytest.mark.processes
def test_task_that_does_not_end_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(larger, "PATIENCE", 0.01)
    assert larger.ask("numpy: fit", tmp_path, DATA) == "it has not ended after 0.01 s"


def test_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        larger.main(["--only", "dask,nothing"])
    assert "not nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("numpy", "numpy"),
        ("memmap", "numpy"),
        ("zarr", "zarr"),
        ("zarr, uncompressed", "zarr"),
        ("hdf5", "h5py"),
        ("hdf5, gzip", "h5py"),
        ("dask", "dask.array"),
        ("dask, npy stack", "dask.array"),
    ],
)
def test_source_holds_the_same_values_in_chunks(source, package, tmp_path):
    pytest.importorskip(package)
    sources.write(source.removeprefix("dask, "), tmp_path, DATA)
    x = sources.opened(source, tmp_path, DATA)
    np.testing.assert_array_equal(np.asarray(x), DATA.in_memory())
    if hasattr(x, "chunks"):
        assert x.chunks in ((3, 64), ((3, 3, 3, 1), (64,)))


def test_source_without_its_package_is_not_measured():
    with pytest.raises(NotImplementedError, match="nowhere"):
        sources.needed("nowhere")


def test_source_without_its_package_fails_its_tasks_alone(monkeypatch, tmp_path):
    def write(source, *_):
        if source == "zarr":
            raise NotImplementedError

    monkeypatch.setattr(larger, "write", write)
    monkeypatch.setattr(larger, "ask", lambda *_: (1.0, None))
    rows = larger.compared([each for each in larger.COMPARISONS if each.part == "files"], tmp_path, DATA, 1, cold=False)
    assert [row[3] for row in rows] == ["-", "1.00", "1.00"]


def test_pages_of_a_mapped_file_are_not_in_the_peak(tmp_path):
    data = sources.Data(2**24, 2**24)
    sources.write("memmap", tmp_path, data)
    x = sources.opened("memmap", tmp_path, data)
    found = sources.peak(lambda: float(x.max()))
    assert found is None or found < 2**23  # None where this is not Linux


@pytest.mark.processes
@pytest.mark.parametrize("options", [(), ("--cold",)], ids=["cached", "cold"])
def test_script_measures_and_removes_its_files(monkeypatch, tmp_path, capsys, options):
    comparison = larger.Comparison("files", "fit, .npy", "memmap: fit", "memmap: read", 1e6, 1)
    monkeypatch.setattr(larger, "COMPARISONS", [comparison])
    monkeypatch.setattr(larger, "EXACT", ["batches"])
    sizes = "--gib", "0.001", "--chunk-mib", "0.25", "--rounds", "2"
    assert larger.main([*sizes, "--only", "files,exact", "--folder", str(tmp_path), *options]) == 0
    out, err = capsys.readouterr()
    fit, error = (line.split("|")[1:-1] for line in out.splitlines()[-2:])
    assert all(float(cell) > 0 for cell in fit[1:4])
    assert float(error[3]) <= 6e-8 < larger.AT_MOST
    assert err.count("memmap: fit") == 2
    assert list(tmp_path.iterdir()) == []
