"""All subjects of a benchmark do the same work: they normalise the same numbers and give the same gradients."""

import gpus
import numpy as np
import pytest

import mbn
from mbn.commands.bench import peers
from mbn.commands.bench.subjects import arrays, subject
from mbn.commands.bench.workloads import MODES, PULLBACK, Workload

WORKLOADS = [
    Workload((64, 8)),
    Workload((64, 8), transposed=True),
    Workload((64, 8), dtype="float16"),
    Workload((64, 8), dtype="float64"),
    Workload((64, 8), masked=True),
    Workload((64, 8, 4)),
    Workload((64, 8, 4), masked=True),
    Workload((64, 4, 8), axis=-1),
]
SPECS = [*mbn.list_backends(), *(peer for peer in peers.PEERS if peer != "copy")]


def outputs(spec, workload, mode):
    """Return y, and dx in a backward step, as float64 with the channels last."""
    found = [array for array in arrays(subject(spec, workload).step(mode)()) if hasattr(array, "dtype")]
    same = [mbn.to_numpy(array).astype(np.float64) for array in found]
    same = [array for array in same if array.size == workload.size]
    return [np.moveaxis(array, channels_axis(spec, workload), -1) for array in same]


def channels_axis(spec, workload):
    """Return the axis of the channels in the outputs; some peers have it fixed, whatever the workload says."""
    return {"flax.nnx": -1, "torch.nn": 1}.get(spec, workload.axis)


@pytest.mark.parametrize("mode", [*MODES, PULLBACK])
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "numpy"])
def test_subject_gives_the_results_of_numpy(spec, workload, mode):
    expected = outputs("numpy", workload, mode)
    try:
        found = outputs(spec, workload, mode)
    except mbn.BackendUnavailableError:
        if spec == "cupy" and (reason := gpus.missing("cupy")):
            pytest.skip(reason)
        raise
    except NotImplementedError as error:
        pytest.skip(str(error))
    assert len(found) == len(expected) == (2 if mode == "backward" else 1)
    tolerance = 5e-3 if workload.dtype == "float16" else 1e-5
    for actual, truth in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, truth, rtol=tolerance, atol=tolerance)


def test_evaluation_uses_statistics_from_training():
    layer = subject("numpy", Workload((64, 8)))
    before = layer.step("eval")()
    layer.step("train")()
    assert (layer.step("eval")() != before).any()


def test_copy_subject_copies_x():
    copy = subject("copy", Workload((64, 8)))
    copy.step("backward")()
    np.testing.assert_array_equal(copy._copy, Workload((64, 8)).x())


@pytest.mark.parametrize(
    ("spec", "workload", "message"),
    [
        ("formula", Workload((4, 3), masked=True), "takes no masks"),
        ("formula:cuda", Workload((4, 3)), "on the CPU alone"),
        ("numpy", Workload((4, 3), dtype="float8"), "numpy takes no float8"),
    ],
)
def test_subject_refuses_a_workload_it_cannot_do(spec, workload, message):
    with pytest.raises(NotImplementedError, match=message):
        subject(spec, workload)


@pytest.mark.torch
def test_torch_subject_records_gradients_in_backward_alone():
    layer = subject("torch", Workload((4, 3)))
    try:
        assert not layer.step("train")().requires_grad
        assert layer.step("backward")()[0].requires_grad
    finally:
        layer.step("backward")  # turns gradients on again for later tests
