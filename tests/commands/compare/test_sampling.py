"""Large files: which rows are compared, how they are read, and how the work is cut."""

import json

import numpy as np
import pytest

from mbn.commands.cli import main
from mbn.commands.compare import comparison, examples, reference
from mbn.commands.compare.messages import Measured
from mbn.commands.options import UsageError


@pytest.fixture
def path(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(30, dtype=np.float32).reshape(10, 3))
    return tmp_path / "x.npy"


def test_rows_are_evenly_spaced(path):
    (example,) = examples.read(path, None, 4)
    assert example.x[:, 0].tolist() == [0, 6, 15, 21]
    assert example.name == "x.npy (10, 3)"
    assert example.title == "x.npy (10, 3), float32"
    assert example.sampled == "Compared 4 of its 10 rows, evenly spaced; --rows 0 compares all."


@pytest.mark.parametrize("rows", [0, 10, 11, None])
def test_all_rows_are_compared_where_the_limit_allows_it(path, rows):
    (example,) = examples.read(path, None, rows)
    assert len(example.x) == 10
    assert example.sampled is None


def test_the_default_limit_is_a_number_of_values(path, monkeypatch):
    for values, rows in ((30, 10), (29, 9), (12, 4), (1, 2)):
        monkeypatch.setattr(examples, "_VALUES", values)
        (example,) = examples.read(path, None)
        assert len(example.x) == rows


def test_one_row_of_an_n_c_array_is_refused(path):
    with pytest.raises(UsageError, match=r"x.npy, 1 rows of it, has shape \(1, 3\); training takes more"):
        examples.read(path, None, 1)


def test_an_npy_is_mapped_and_an_npz_is_read_array_by_array(path):
    ((name, mapped),) = examples._arrays(path)
    assert name == "x.npy"
    assert isinstance(mapped, np.memmap)
    np.savez(path.with_suffix(".npz"), a=np.ones((4, 2)), b=np.ones((6, 2)))
    found = [(example.name, len(example.x)) for example in examples.read(path.with_suffix(".npz"), None, 3)]
    assert found == [("a of x.npz (4, 2)", 3), ("b of x.npz (6, 2)", 3)]


def test_report_and_json_tell_the_rows(path, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main(["compare", "--backends", "numpy", "--input", str(path), "--rows", "4", "--json", str(out)]) == 0
    assert "Compared 4 of its 10 rows, evenly spaced; --rows 0 compares all." in capsys.readouterr().out
    (example,) = json.loads(out.read_text())["examples"]
    assert (example["rows"], example["shape"]) == ({"compared": 4, "of": 10}, [4, 3])


def test_the_reference_does_not_depend_on_the_groups_of_channels(monkeypatch):
    example = examples.seeded((20, 5, 2), "float32")
    whole, sizes = reference.reference(example), []
    monkeypatch.setattr(reference, "_VALUES", 80)
    grouped = reference.reference(example, sizes.append)
    assert sizes == [80, 80, 40]
    for quantity, exact in whole.exact.items():
        for a, b in zip(exact, grouped.exact[quantity], strict=True):
            np.testing.assert_array_equal(a, b, strict=True)
    np.testing.assert_array_equal(whole.statistics, grouped.statistics, strict=True)


def test_errors_do_not_depend_on_the_blocks(monkeypatch):
    example = examples.seeded((20, 5, 2), "float32")
    truth, random = reference.reference(example), np.random.default_rng(0)
    outcomes = {
        name: Measured("1", "cpu", {q: (e.hi + random.normal(0, 1e-5, e.hi.shape)) for q, e in truth.exact.items()}, {})
        for name in "ab"
    }
    whole = comparison.compare(example, truth, outcomes)
    monkeypatch.setattr(comparison, "_BLOCK", 7)
    calls = []
    blocks = comparison.compare(example, truth, outcomes, lambda: calls.append(1))
    assert (blocks.errors, blocks.distances) == (whole.errors, whole.distances)
    assert len(calls) == 3
