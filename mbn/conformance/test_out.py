"""Out: ``out=`` receives the same bits as a new output array would, and no other array is written to."""

from typing import Any

import numpy as np
import pytest

import mbn
from mbn.conformance.target import Target
from mbn.conformance.test_errors import assert_refused
from mbn.contract import Array, transposed

X = np.random.default_rng(31).normal(3, 2, (12, 5, 8)).astype(np.float32)
MASK = np.random.default_rng(32).random((12, 8)) > 0.3
VECTORS = [np.linspace(low, low + 1, 5).astype(np.float32) for low in (2.5, 3.5, 0.5, -0.5)]
"""Running mean and variance, weight and bias."""


def run(target: Target, x: Array, out: Array | None = None, **arguments: Any) -> mbn.functional.BatchNormResult:
    """Normalise x with running statistics, weight and bias."""
    vectors = [target.array(vector) for vector in VECTORS]
    return mbn.functional.batch_norm(x, *vectors, out=out, backend=target.backend, **arguments)


def test_out_is_written_to_if_declared_and_rejected_otherwise(target: Target) -> None:
    x = target.array(X)
    if target.capabilities.out:
        out = target.array(np.zeros_like(X))
        assert run(target, x, out).output is out
        assert target.numpy(out).any()
    else:
        assert_refused(TypeError, "declares no out", lambda: run(target, x, x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("axis", [1, -1])
def test_output_is_written_to_out(target: Target, axis: int, *, masked: bool, training: bool) -> None:
    target.require("out")
    if masked:
        target.require("masks")
    arguments = {"training": training, "axis": axis, "mask": target.array(MASK) if masked else None}
    host = X if axis == 1 else np.ascontiguousarray(X.swapaxes(1, 2))
    x = target.array(host)
    expected = run(target, x, **arguments)
    swapped = transposed(target.array(np.full_like(host.swapaxes(1, 2), np.nan, order="C")))
    for out in (target.array(np.full_like(host, np.nan)), swapped):
        result = run(target, x, out, **arguments)
        assert result.output is out
        np.testing.assert_array_equal(target.numpy(out), target.numpy(expected.output), strict=True)
        for given, wanted in zip(result[1:], expected[1:], strict=True):
            np.testing.assert_array_equal(target.numpy(given), target.numpy(wanted), strict=True)
    np.testing.assert_array_equal(target.numpy(x), host, strict=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(12, 5, 8), (96, 5), (300, 5, 100)])
def test_out_may_be_x(target: Target, shape: tuple[int, ...], *, training: bool) -> None:
    target.require("out")
    host = np.random.default_rng(33).normal(3, 2, shape).astype(np.float32)
    expected = run(target, target.array(host), training=training)
    x = target.array(host)
    result = run(target, x, x, training=training)
    assert result.output is x
    np.testing.assert_array_equal(target.numpy(x), target.numpy(expected.output), strict=True)
    np.testing.assert_array_equal(target.numpy(result.running_var), target.numpy(expected.running_var), strict=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_out_may_have_any_dtype_of_x(target: Target, dtype: str) -> None:
    target.require("out")
    target.require_dtype(dtype)
    x, out = (target.array(values.astype(dtype)) for values in (X, np.zeros_like(X)))
    arguments: dict[str, Any] = {"training": True, "backend": target.backend}
    expected = mbn.functional.batch_norm(x, **arguments).output
    mbn.functional.batch_norm(x, out=out, **arguments)
    np.testing.assert_array_equal(target.numpy(out), target.numpy(expected), strict=True)


def test_out_is_returned_for_an_empty_batch(target: Target) -> None:
    target.require("out")
    out = target.array(X[:0])
    assert run(target, target.array(X[:0]), out, training=True).output is out


@pytest.mark.parametrize("overlap", ["rows", "order"])
def test_out_that_overlaps_x_is_rejected(target: Target, overlap: str) -> None:
    target.require("out")
    held = target.array(np.concatenate([X[..., :5], X[:1, :, :5]]))
    x, out = (held[:-1, ...], held[1:, ...]) if overlap == "rows" else (held, transposed(held))
    before = target.numpy(held)
    assert_refused(ValueError, "overlaps", lambda: run(target, x, out, training=True))
    np.testing.assert_array_equal(target.numpy(held), before, strict=True)


def strided(target: Target, shape: tuple[int, ...], steps: tuple[int, ...]) -> Array:
    """Return an array of zeros with the strides ``steps``, in values."""
    host = np.lib.stride_tricks.as_strided(np.zeros(24, np.float32), shape, [4 * step for step in steps])
    array = target.backend.asarray(host, device=target.device)
    if (array.stride() if hasattr(array, "stride") else tuple(step // 4 for step in array.strides)) != steps:
        pytest.skip(f"{target.backend.name} declares no memory that it shares with the host")
    return array


@pytest.mark.parametrize(
    ("shape", "steps"), [((4, 3), (0, 1)), ((4, 3), (1, 0)), ((4, 3), (1, 1)), ((4, 3), (2, 3)), ((2, 3, 2), (7, 2, 3))]
)
def test_out_that_overlaps_itself_is_rejected(target: Target, shape: tuple[int, ...], steps: tuple[int, ...]) -> None:
    target.require("out")
    out, x = strided(target, shape, steps), target.array(np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    assert_refused(
        ValueError,
        "out overlaps itself",
        lambda: mbn.functional.batch_norm(x, training=True, out=out, backend=target.backend),
    )
    assert not target.numpy(out).any()


@pytest.mark.parametrize(("shape", "steps"), [((2, 3), (3, 2)), ((2, 2, 3), (12, 3, 2)), ((2, 3, 1), (3, 1, 0))])
def test_out_may_have_interleaved_rows(target: Target, shape: tuple[int, ...], steps: tuple[int, ...]) -> None:
    target.require("out")
    out, x = strided(target, shape, steps), target.array(X[: shape[0], : shape[1], : ((*shape, 1))[2]].reshape(shape))
    expected = mbn.functional.batch_norm(x, training=True, backend=target.backend).output
    assert mbn.functional.batch_norm(x, training=True, out=out, backend=target.backend).output is out
    np.testing.assert_array_equal(target.numpy(out), target.numpy(expected), strict=True)


@pytest.mark.parametrize(
    ("out", "error", "words"),
    [
        (X[:5], ValueError, r"out has shape \(5, 5, 8\).*\(12, 5, 8\)"),
        (X.astype(np.float16), TypeError, "out is float16.*float32"),
    ],
)
def test_out_of_another_shape_dtype_or_type_is_rejected(
    target: Target, out: np.ndarray, error: type[Exception], words: str
) -> None:
    target.require("out")
    assert_refused(error, words, lambda: run(target, target.array(X), target.array(out), training=True))
    assert_refused(TypeError, "out is list", lambda: run(target, target.array(X), [[0.0]], training=True))


def test_rejected_call_does_not_write_to_out(target: Target) -> None:
    target.require("out")
    out = target.array(np.zeros((1, 5), np.float32))
    refused = target.array(X[:1, :, 0])
    assert_refused(ValueError, "one value per channel", lambda: run(target, refused, out, training=True))
    assert not target.numpy(out).any()
