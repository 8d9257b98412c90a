"""The layer and torch: repr, state_dict, moves by position, and tensors that hold no array."""

from typing import Any

import numpy as np
import pytest

import mbn
from mbn.conformance.target import configured

torch = pytest.importorskip("torch")

X = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)


def test_repr_is_that_of_torch_with_the_backend() -> None:
    theirs = repr(torch.nn.BatchNorm1d(4, momentum=None, affine=False))
    assert repr(mbn.BatchNorm1d(4, momentum=None, affine=False)) == f"{theirs[:-1]}, backend=None)"
    assert repr(mbn.BatchNorm1d(4, backend="torch")).endswith("backend='torch')")
    assert "axis=-1, correction=0, " in repr(mbn.BatchNorm1d(4, axis=-1, correction=0))
    assert repr(mbn.BatchNorm1d(None)).startswith("BatchNorm1d(None, eps=1e-05, ")


def test_state_dict_of_torch_loads_everywhere() -> None:
    theirs = torch.nn.BatchNorm1d(4)
    theirs(torch.from_numpy(X))
    for backend in ("numpy", "torch"):
        bn = mbn.BatchNorm1d(4, backend=backend)
        assert bn.load_state_dict(theirs.state_dict()) == ([], [])
        y = mbn.to_numpy(bn.eval()(X))
        np.testing.assert_allclose(y, theirs.eval()(torch.from_numpy(X)).detach().numpy(), atol=1e-6)


def test_state_dict_loads_into_torch() -> None:
    bn = configured(mbn.BatchNorm1d(4), seed=5)
    theirs = torch.nn.BatchNorm1d(4).eval()
    theirs.load_state_dict(bn.to(backend="torch").state_dict())
    np.testing.assert_allclose(mbn.to_numpy(bn.eval()(X)), theirs(torch.from_numpy(X)).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (("cpu",), "float32"),
        ((torch.device("cpu"),), "float32"),
        ((torch.float64,), "float64"),
        ((np.float64,), "float64"),
        (("float64",), "float64"),
        (("cpu", torch.float64), "float64"),
        ((None, "float64"), "float64"),
    ],
)
def test_to_takes_device_and_dtype_by_position(given: tuple[Any, ...], dtype: str) -> None:
    for backend in ("torch", None):
        bn = configured(mbn.BatchNorm1d(4, backend=backend), seed=3)
        assert bn.to(*given) is bn
        assert bn.dtype == dtype
        assert mbn.to_numpy(bn.running_mean).dtype == dtype


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("jax", TypeError, r"bn.to\(backend='jax'\)"),
        ("cuda:99", ValueError, "not 'cuda:99'"),
        (torch.float16, TypeError, "float32 or float64, not float16"),
        (torch.zeros(3), ValueError, "devices here"),
    ],
)
def test_to_refuses_other_positional_arguments(given: Any, error: type[Exception], words: str) -> None:
    bn = mbn.BatchNorm1d(4, backend="torch")
    with pytest.raises(error, match=words):
        bn.to(given)
    assert bn.dtype == "float32"


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr"])
def test_sparse_tensors_are_refused(kind: str) -> None:
    x = getattr(torch.from_numpy(X), kind)()
    bn = mbn.BatchNorm1d(4, backend="torch")
    for call in (bn, bn.vjp, lambda x: bn.fit([x], progress=False), mbn.functional.batch_norm):
        with pytest.raises(TypeError, match=r"layout torch.sparse_.*x.to_dense\(\)"):
            call(x, **({"training": True} if call is mbn.functional.batch_norm else {}))
    assert bn.num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr", "to_sparse_csc", "to_mkldnn"])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("mask", lambda bn, x, sparse: bn(x, mask=sparse(x > 0))),
        ("lengths", lambda bn, x, sparse: bn(x, lengths=sparse(x.to(torch.int64)))),
        ("sample_weight", lambda bn, x, sparse: bn.vjp(x, sample_weight=sparse(x))),
        ("dy", lambda bn, x, sparse: bn.vjp(x)[1](sparse(x))),
        ("weight", lambda bn, x, sparse: setattr(bn, "weight", sparse(x))),
        ("running_var", lambda bn, x, sparse: bn.load_state_dict({**bn.state_dict(), "running_var": sparse(x)})),
        ("out", lambda bn, x, sparse: mbn.functional.batch_norm(x, training=True, out=sparse(x))),
        ("weight", lambda bn, x, sparse: mbn.fold_linear(sparse(x[:4]), None, bn)),
    ],
)
def test_sparse_tensors_are_refused_as_any_argument(kind: str, name: str, call: Any) -> None:
    x = torch.from_numpy(X)
    bn = mbn.BatchNorm1d(4, backend="torch").eval()
    with pytest.raises(TypeError, match=rf"{name} is a tensor of layout torch\..*Give {name}.to_dense\(\)"):
        # oneDNN has floating tensors alone.
        call(bn, x, lambda dense: getattr(dense.float() if kind == "to_mkldnn" else dense, kind)())
    assert bn.running_var.tolist() == bn.weight.tolist() == [1.0] * 4


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("training", [True, False])
def test_sparse_vectors_are_refused_by_functional_batch_norm(index: int, training: bool) -> None:
    vectors = [torch.ones(4) for _ in range(4)]
    vectors[index] = vectors[index].to_sparse()
    name = ("running_mean", "running_var", "weight", "bias")[index]
    with pytest.raises(TypeError, match=rf"{name} is a tensor of layout torch.sparse_coo.*{name}.to_dense\(\)"):
        mbn.functional.batch_norm(torch.from_numpy(X), *vectors, training=training)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    bn = mbn.BatchNorm1d(4, backend="torch")
    x = torch.nested.nested_tensor([torch.zeros(4, 3), torch.zeros(4, 2)])
    for call in (bn, bn.vjp, lambda x: bn.fit([x], progress=False)):
        with pytest.raises(TypeError, match=r"nested.*to_padded_tensor"):
            call(x)
