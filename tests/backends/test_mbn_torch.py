"""Tests of Torch alone: memory formats, its border with NumPy, threads, and agreement with torch.nn."""

import os
import subprocess
import sys

import numpy as np
import pytest
from torch_samples import sample

import mbn

torch = pytest.importorskip("torch")
backend = mbn.get_backend("torch")

_BITS = """
import hashlib, torch, mbn
torch.set_num_threads({threads})
digest = hashlib.sha256()
for shape in [(20_001, 37), (700, 12, 33)]:
    for dtype in ("float32", "float64"):
        x, dy = torch.rand((2, *shape), generator=torch.Generator().manual_seed(1), dtype=getattr(torch, dtype)) + 1000
        x = x.clone().requires_grad_()
        for mask in (None, x.detach()[:, 0] > 1000.3):
            bn = mbn.BatchNorm1d(shape[1], dtype=dtype, backend="torch")
            y = bn(x, mask=mask)
            gradients = torch.autograd.grad(y, (x, *bn.parameters()), dy)
            for result in (y, bn.running_mean, bn.running_var, *gradients):
                digest.update(mbn.to_numpy(result).tobytes())
print(digest.hexdigest())
"""


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.mT.contiguous().mT,
        lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        lambda x: x[::2, :, 1::3],
        lambda x: x[:, :, :1].expand(-1, -1, 9),
        lambda x: x[:, :, 0].T.contiguous().T,
        lambda x: x[:1, :, 0].expand(5, -1),
    ],
    ids=["contiguous", "channels last", "rows last", "sliced", "expanded", "transposed", "expanded rows"],
)
def test_output_and_gradient_have_the_memory_format_of_x(view, dtype, masked, needs_grad):
    x = view(sample(8, 4, 9, dtype=dtype))
    mask = torch.arange(len(x)) % 3 > 0 if masked else None
    before = x.clone()
    bn = mbn.BatchNorm1d(4, backend="torch")
    leaf = x.detach().requires_grad_(needs_grad)
    y = bn(leaf, mask=mask)
    results = [y]
    if needs_grad:
        results += torch.autograd.grad(y, leaf, view(sample(8, 4, 9, dtype=dtype, seed=1)))
    for result in results:
        assert (result.dtype, result.device, result.stride()) == (x.dtype, x.device, torch.empty_like(x).stride())
    assert torch.equal(x, before)
    expected = mbn.BatchNorm1d(4, backend="torch")(x.contiguous(), mask=mask)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6, check_stride=False)


def _read_only(x):
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(
    "view",
    [
        _read_only,
        lambda x: x[::-1, ::-1],
        lambda x: x.astype(">f4"),
        lambda x: np.rec.fromarrays([x, x.astype("i1")], names="x,rest").x,
        np.asfortranarray,
    ],
    ids=["read-only", "reversed", "big-endian", "packed record", "Fortran order"],
)
def test_asarray_takes_numpy_arrays_of_any_layout(view):
    x = view(np.arange(12, dtype="f4").reshape(4, 3))
    brought = backend.asarray(x)
    assert brought.dtype == torch.float32
    assert np.array_equal(backend.to_numpy(brought), x)


def test_bfloat16_converts_from_and_to_numpy():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.arange(12).reshape(4, 3).astype(ml_dtypes.bfloat16).T
    brought = mbn.asarray(x, backend="torch")
    assert brought.dtype == torch.bfloat16
    assert brought.tolist() == x.tolist()
    back = mbn.to_numpy(brought.requires_grad_())
    assert back.dtype == x.dtype
    assert np.array_equal(back, x)


def test_bfloat16_without_ml_dtypes_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match="pip install ml_dtypes"):
        mbn.to_numpy(torch.zeros(2, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["float128", "nonsense", "nn"])
def test_unknown_dtype_is_refused(name):
    with pytest.raises(TypeError, match=name):
        backend.asarray([1.0], dtype=name)


@pytest.mark.parametrize("device", ["nonsense", f"cuda:{torch.cuda.device_count()}", "cuda:256", 3.5])
def test_error_for_an_unusable_device_names_the_usable_ones(device):
    with pytest.raises(ValueError, match="Torch's devices here are cpu"):
        mbn.BatchNorm1d(3, backend="torch", device=device)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu"), *backend.capabilities.devices])
def test_layer_is_made_on_the_given_device(device):
    bn = mbn.BatchNorm1d(3, backend="torch", device=device)
    assert bn.running_mean.device.type == torch.device(device).type


def test_bits_do_not_depend_on_the_number_of_threads():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    digests = {
        subprocess.run(
            [sys.executable, "-c", _BITS.format(threads=threads)],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for threads in (1, 2)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("shape", [(64, 5), (16, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_results_agree_with_torch_nn(shape, dtype, momentum):
    reference = torch.nn.BatchNorm1d(5, momentum=momentum, dtype=dtype)
    bn = mbn.BatchNorm1d(5, momentum=momentum, dtype=dtype, backend="torch")
    for seed in range(3):
        x = sample(*shape, dtype=dtype, seed=seed)
        torch.testing.assert_close(bn(x), reference(x).detach())
    for name, expected in reference.state_dict().items():
        torch.testing.assert_close(bn.state_dict()[name], expected)
    torch.testing.assert_close(bn.eval()(x), reference.eval()(x).detach())


def test_state_dict_loads_into_torch_nn_and_back():
    ours, theirs = mbn.BatchNorm1d(5, backend="torch"), torch.nn.BatchNorm1d(5)
    ours(sample(64, 5))
    theirs.load_state_dict(ours.state_dict())
    x = sample(8, 5, seed=1)
    torch.testing.assert_close(theirs.eval()(x).detach(), ours.eval()(x))
    theirs.train()(x)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, expected in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], expected)
        assert ours.state_dict()[name].dtype == expected.dtype


def test_from_dlpack_shares_memory_with_jax():
    jax = pytest.importorskip("jax", reason="another framework's arrays come by DLPack")
    for dtype in ("float32", "float16", "bfloat16"):
        array = jax.numpy.arange(6, dtype=dtype)
        tensor = backend.from_dlpack(array)
        assert (tensor.data_ptr(), str(tensor.dtype)) == (array.unsafe_buffer_pointer(), f"torch.{dtype}")


def test_exported_tensor_has_the_values_of_its_view():
    x = torch.arange(6.0)
    with backend.exported(x) as exported:
        assert torch.from_dlpack(exported).data_ptr() == x.data_ptr()
    with backend.exported(torch._neg_view(x)) as exported:
        assert torch.equal(torch.from_dlpack(exported), -x)
    with backend.exported(backend.constant(x.clone().requires_grad_())) as exported:
        assert torch.equal(torch.from_dlpack(exported), x)
