"""The parts of a comparison, each on its own."""

import json
import sys

import numpy as np
import pytest

from mbn.commands.compare import examples, process, record
from mbn.commands.compare.comparison import compare, verdict
from mbn.commands.compare.messages import Job, Measured
from mbn.commands.compare.reference import reference
from mbn.commands.compare.report import format_ulp
from mbn.commands.options import UsageError
from mbn.commands.output import essence
from mbn.commands.processes import NotRun


@pytest.fixture(scope="module")
def example():
    return examples.seeded((16, 3), "float32")


def measured(truth, *, off=0.0):
    arrays = {quantity: (exact.hi + off).astype(np.float32) for quantity, exact in truth.exact.items()}
    return Measured("1.0", "cpu", arrays, {"train": 1e-3, "eval": 1e-3})


def test_built_in_examples_have_known_statistics():
    first, _, third, hard = (reference(example) for example in examples.built_in("float32"))
    assert first.statistics[0].tolist() == [4, 5, 6, 7]
    assert first.statistics[1].tolist() == [16, 16, 16, 16]
    np.testing.assert_array_equal(third.exact["eval_output"].hi, np.arange(60.0).reshape(3, 4, 5) - 10)
    np.testing.assert_allclose(hard.statistics[0], 1e4 * (1 - 0.9**3), rtol=1e-4)


def test_verdict_gives_the_exit_code(example):
    truth = reference(example)
    good, off = measured(truth), measured(truth, off=np.float32(0.5))

    def judged(**outcomes):
        return verdict([compare(example, truth, outcomes)]).exit_code

    cannot, broken = NotRun("no GPU", broken=False), NotRun("segmentation fault", broken=True)
    assert judged(a=good) == judged(a=good, b=good) == judged(a=good, b=cannot) == 0
    assert judged(a=good, b=off) == judged(a=good, b=broken) == 1
    assert judged(a=cannot) == judged(a=broken) == 2


@pytest.mark.parametrize("wrong", [np.full((16, 3), np.nan), np.zeros((3, 16))], ids=["nan", "shape"])
def test_nan_or_wrong_shape_is_an_infinite_error_in_strict_json(example, wrong):
    truth = reference(example)
    good = measured(truth)
    bad = good._replace(arrays={**good.arrays, "eval_output": wrong})
    comparison = compare(example, truth, {"good": good, "bad": bad})
    text = record.to_json([comparison], verdict([comparison]))
    written = json.loads(text, parse_constant=pytest.fail)["examples"][0]
    assert written["backends"][1]["error_ulp"]["eval_output"] == "inf"
    assert written["pairs"][0]["distance_ulp"]["eval_output"] == "inf"


@pytest.mark.parametrize(
    ("script", "words"),
    [("kill -SEGV $$", "signal 11"), ("echo noise >&2; echo last words >&2; exit 7", "exit code 7: last words")],
)
def test_dead_worker_is_reported_with_its_last_words(tmp_path, monkeypatch, example, script, words):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    (outcome,) = process.run("numpy", [Job(example, reference(example).statistics)])
    assert outcome.broken
    assert words in outcome.why


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), "takes \\(N, C\\) or \\(N, C, L\\)"),
        (np.zeros((1, 3)), "more than one value per channel"),
        (np.zeros((4, 0)), "more than one value per channel"),
        (np.zeros((4, 3), complex), "is complex128"),
        (np.full((4, 3), np.nan), "NaN, infinite or huge"),
        (np.full((4, 3), 1e200), "NaN, infinite or huge"),
    ],
)
def test_input_that_cannot_be_normalised_is_refused(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(UsageError, match=message):
        examples.read(tmp_path / "x.npy", None)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 no zip"])
def test_file_of_another_format_is_refused(tmp_path, content):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(UsageError, match=r"no \.npy or \.npz file"):
        examples.read(tmp_path / "x.npy", None)


def test_npz_without_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz")
    with pytest.raises(UsageError, match="holds no arrays"):
        examples.read(tmp_path / "x.npz", None)


def test_bfloat16_without_ml_dtypes_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(UsageError, match="pip install ml_dtypes"):
        examples.built_in("bfloat16")


@pytest.mark.parametrize(
    ("ulp", "text"), [(0.0, "0"), (0.001, "0.00"), (1.5, "1.50"), (123456.0, "1.2e+05"), (float("inf"), "inf")]
)
def test_format_ulp_has_three_digits_at_most(ulp, text):
    assert format_ulp(ulp) == text


def test_essence_shortens_a_reason():
    assert essence("backend 'torch' is known but torch is not installed.") == "torch is not installed."
    assert len(essence(f"backend 'x': {'word ' * 1000}")) <= 300
