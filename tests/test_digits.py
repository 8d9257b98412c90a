"""The experiment of docs/digits.md, for every pair of backends, and for the plug-in and CuPy too."""

import doctest
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import mbn

for needed in ("torch", "jax", "sklearn", "matplotlib", "array_api_strict"):
    pytest.importorskip(needed)

PAGE = Path(__file__).parents[1] / "docs" / "digits.md"


@pytest.fixture(scope="module")
def page():
    """Return the names that the page defines, after training on every backend that is usable here."""
    names = {}
    for example in doctest.DocTestParser().get_examples(PAGE.read_text()):
        exec(compile(example.source, PAGE.name, "single"), names)  # noqa: S102 - the page is our own
    made = SimpleNamespace(**names)
    for backend, namespace in (("strict", "array_api_strict"), ("cupy", "cupy")):
        try:
            mbn.get_backend(backend)
        except mbn.BackendUnavailableError:
            continue
        made.trained[backend] = made.train_by_hand(backend, pytest.importorskip(namespace))
        made.save(backend)
    return made


@pytest.fixture(scope="module")
def answers(page):
    """Return the digits read by each backend with the model trained on each, by (trained on, read on)."""
    return {(name, backend): page.read_digits(name, backend) for name in page.trained for backend in page.trained}


def test_every_backend_has_been_trained(page):
    assert page.trained.keys() >= {"numpy", "torch", "jax", "strict"}
    assert all(len(losses) == 5 * 25 for losses, _, _ in page.trained.values())


def test_loss_curves_coincide_at_every_step(page):
    curves = [np.array(losses) for losses, _, _ in page.trained.values()]
    assert max(np.max(np.abs(one - other)) for one, other in combinations(curves, 2)) < 1e-4
    assert all(curve[-25:].mean() < curve[:25].mean() / 4 for curve in curves)


def test_accuracies_agree_and_are_high(page, answers):
    correct = {np.mean(answers[name, name] == page.digits[page.test]) for name in page.trained}
    assert len(correct) == 1
    assert correct.pop() > 0.9


def test_model_reads_the_same_digits_on_every_backend(answers):
    for (name, backend), read in answers.items():
        np.testing.assert_array_equal(read, answers["numpy", "numpy"], err_msg=f"trained on {name}, read on {backend}")


def test_running_statistics_agree(page):
    first = page.trained["numpy"][2].state_dict()
    for name in page.trained:
        entries = page.trained[name][2].state_dict(backend="numpy")
        for key, value in first.items():
            np.testing.assert_allclose(entries[key], value, rtol=1e-4, atol=1e-5, err_msg=f"{key} on {name}")
        assert entries["num_batches_tracked"] == 125
