"""The number of threads: its default, its setting, its environment variable."""

import os
import subprocess
import sys

import pytest

import mbn
from mbn import registry, threads


@pytest.fixture(autouse=True)
def four_processors(monkeypatch):
    monkeypatch.setattr(threads, "num_processors", lambda: 4)
    monkeypatch.delenv("MBN_NUM_THREADS", raising=False)
    yield
    mbn.set_num_threads(None)


def test_num_threads_defaults_to_all_processors(monkeypatch):
    mbn.set_num_threads(None)
    assert mbn.get_num_threads() == 4
    mbn.set_num_threads(3)
    assert mbn.get_num_threads() == 3
    mbn.set_num_threads(None)
    monkeypatch.setenv("MBN_NUM_THREADS", "2")
    assert mbn.get_num_threads() == 2
    mbn.set_num_threads(1)
    assert mbn.get_num_threads() == 1


def test_num_threads_is_at_most_the_number_of_processors(monkeypatch):
    mbn.set_num_threads(64)
    assert mbn.get_num_threads() == 4
    mbn.set_num_threads(None)
    monkeypatch.setenv("MBN_NUM_THREADS", "64")
    assert mbn.get_num_threads() == 4


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [
        (0, ValueError, "num_threads is a number of threads, at least 1, not 0"),
        (-2, ValueError, "at least 1, not -2"),
        (2.0, TypeError, "num_threads is an int or None, not 2.0"),
        (True, TypeError, "num_threads is an int or None, not True"),
        ("2", TypeError, "num_threads is an int or None, not '2'"),
    ],
)
def test_invalid_num_threads_is_refused_and_changes_nothing(number, error, words):
    mbn.set_num_threads(3)
    with pytest.raises(error, match=words):
        mbn.set_num_threads(number)
    assert mbn.get_num_threads() == 3


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "False"])
def test_invalid_environment_variable_is_refused_with_the_first_backend(text):
    program = "import mbn\nmbn.BatchNorm1d(3)"
    environment = os.environ | {"MBN_NUM_THREADS": text}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 1
    last_line = run.stderr.strip().splitlines()[-1]
    assert last_line == (
        f"ValueError: the environment variable MBN_NUM_THREADS is a number of threads, at least 1, not {text!r}."
    )


def test_environment_variable_may_change_after_a_backend_is_loaded(monkeypatch):
    monkeypatch.setenv("MBN_NUM_THREADS", "2")
    monkeypatch.setattr(registry, "_loaded", {})
    mbn.get_backend("numpy")
    monkeypatch.setenv("MBN_NUM_THREADS", "3")
    assert mbn.get_num_threads() == 3


def test_set_num_threads_overrides_an_invalid_environment_variable(monkeypatch):
    monkeypatch.setenv("MBN_NUM_THREADS", "x")
    monkeypatch.setattr(registry, "_loaded", {})
    with pytest.raises(ValueError, match="MBN_NUM_THREADS"):
        mbn.get_backend("numpy")
    mbn.set_num_threads(1)
    assert mbn.get_backend("numpy").name == "numpy"
