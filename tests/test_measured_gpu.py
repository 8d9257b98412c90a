"""The tables of docs/gpu.md: figures that were measured, and "not measured" for the others."""

import importlib
import itertools
import json
import math
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
TIMES = " \N{MULTIPLICATION SIGN}\N{NO-BREAK SPACE}"
ROOT = Path(__file__).parents[1]
LARGE, HALVES, SMALL = "(1048576, 256) float32", "(1048576, 256) bfloat16", "(32, 64) float32"


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("measured_gpu")


@pytest.fixture
def record():
    """Return results of asv_bench/gpu.py: two backends, a peer and the copy, with some measurements missing."""
    axes = ("cupy", "jax", "torch.nn", "copy"), ("train", "eval", "pullback"), (LARGE, HALVES, SMALL)
    seconds = {
        ("cupy", "train", LARGE): 0.003,
        ("cupy", "train", HALVES): 0.0018,
        ("cupy", "pullback", LARGE): 0.005,
        ("torch.nn", "train", LARGE): 0.006,
        ("torch.nn", "train", HALVES): 0.0024,
        ("copy", "eval", LARGE): 0.002,
    }
    ideal = {
        ("torch.nn", "train", LARGE): 2.0,
        ("cupy", "train", LARGE): 1.0,
        ("cupy", "train", HALVES): 1.15,
        ("cupy", "pullback", LARGE): 1.0,
    }

    def column(values):
        return [[values.get(key, math.nan) for key in itertools.product(*axes)], [[*map(repr, a)] for a in axes], "1"]

    return {
        "commit_hash": "0123456789",
        "date": 2,
        "params": {"machine": "some-card", "gpu": "a card", "driver": "1.2", "python": "3.12"},
        "requirements": {"torch": "2.11"},
        "results": {
            "gpu.Step.track_seconds": column(seconds),
            "gpu.Step.track_times_ideal": column(ideal),
            "gpu.Step.track_peak": column({("cupy", "train", LARGE): 3 * 2**20}),
        },
        "gpu": {
            "conformance": {
                "cupy": {
                    "areas": {"masks": {"passed": 5, "failed": 0}, "out": {"passed": 2, "failed": 0}},
                    "exit_status": 0,
                },
                "jax": {"exit_status": 4},
            }
        },
    }


def test_missing_results_are_shown_once_as_not_measured(pages, tmp_path):
    assert pages.newest(tmp_path) is None
    pages.generate(tmp_path / "made", None)
    text = (tmp_path / "made" / "gpu.md").read_text()
    assert text.count("measured") == 1
    rows = [line for line in text.splitlines() if line.startswith(("| cupy", "| torch", "| jax"))]
    assert len(rows) == len(pages.TARGETS)
    assert rows[0] == "| cupy | Training, forward | the ideal time | 1.2 |"
    assert not list((tmp_path / "made").glob("*.svg"))


def test_page_shows_measured_figures(pages, record, tmp_path):
    machine = tmp_path / "results" / "some-card"
    machine.mkdir(parents=True)
    (machine / "01234567-existing-py3.12.json").write_text(json.dumps(record))
    pages.generate(tmp_path / "made", pages.newest(tmp_path / "results"))
    lines = (tmp_path / "made" / "gpu.md").read_text().splitlines()
    for line in (
        "| GPU | a card |",
        "| cupy | Training, forward | the ideal time | 1.2 | 1.15 |",
        "| cupy | Training, backward alone | the ideal time | 1.25 | 1.00 |",
        "| cupy | Evaluation | the ideal time | 1.1 | - |",
        "| cupy | Training, forward | torch.nn | 1 | 0.75 |",
        "| jax | Training, forward | flax.nnx | 1 | - |",
        "| `cupy` | 7 | 0 | conforms |",
        "| `jax` | 0 | 0 | does not conform |",
        "| time / torch.nn | cupy | the ideal time | torch.nn, ms |",
        f"| 1048576{TIMES}256 float32 | 0.50 | 0.50 | 6 |",
        f"| 1048576{TIMES}256 bfloat16 | 0.75 | - | 2.4 |",
        "| cupy | 3.0 | - | - | - |",
    ):
        assert line in lines, line
    assert "![Training, forward](_generated/gpu-train.svg)" in lines
    assert {path.name for path in (tmp_path / "made").glob("*.svg")} == {"gpu-train.svg"}


def test_results_of_a_cpu_are_ignored(pages, record, tmp_path):
    (tmp_path / "here").mkdir()
    del record["params"]["gpu"]
    (tmp_path / "here" / "01234567-existing-py3.12.json").write_text(json.dumps(record))
    assert pages.newest(tmp_path) is None


def test_targets_are_among_the_measured_inputs(pages, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "asv_bench")
    gpu = importlib.import_module("benchmarks.gpu")
    for target in pages.TARGETS:
        assert {target.subject, target.against} <= {*gpu.SUBJECTS, "the ideal time"}
        assert all(any(x.startswith(begin) for x in gpu.INPUTS) for begin in target.inputs)
