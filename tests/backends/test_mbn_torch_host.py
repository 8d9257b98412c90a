"""Tensors in host memory: results of the kernels for all kinds of tensors, and outputs written to ``out``."""

import copy
import pickle
from importlib import import_module

import numpy as np
import pytest
from steps import pullback, step
from torch_samples import relative_error, sample

import mbn
from mbn.contract import Batch
from mbn_cpu import installed, memory, thread_pool

torch = pytest.importorskip("torch")
backend = mbn.get_backend("torch")
host, module = import_module("mbn_torch.kernels.cpu"), import_module("mbn_torch.backend")
private = import_module("mbn_torch.private")
EAGER = import_module("mbn_torch.kernels.eager").EAGER

SHAPES = [(32, 8), (700, 40), (130, 12, 33), (9, 4, 5000), (70_000, 8), (150, 16, 256)]
"""Shapes for every path: steps at once for small batches, Torch's operations, and passes in tiles."""


@pytest.fixture(params=["numpy", "numba"])
def kernels(request, monkeypatch):
    """Choose the kernels with or without Numba, whatever is installed."""
    if request.param == "numba":
        pytest.importorskip("numba")
        assert type(installed.fastest()) is not installed.WithNumpy
    else:
        own = installed.WithNumpy()
        monkeypatch.setattr(module, "fastest", lambda: own)
    return request.param


def _results(x, dy, **masking):
    """Return the outputs, statistics and gradients of a layer in training and in evaluation."""
    bn = mbn.BatchNorm1d(x.shape[1], dtype="float64" if x.dtype == torch.float64 else None, backend="torch")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in bn.parameters():
            parameter.copy_(torch.randn(x.shape[1], generator=generator))
    results = []
    for training in (True, False):
        leaf = x.detach().requires_grad_()
        y = bn.train(training)(leaf, **masking)
        results += [y.detach(), *bn.state, *torch.autograd.grad(y, (leaf, *bn.parameters()), dy)]
    return results


def _views(x):
    """Return x in several memory orders."""
    views = [x, torch.stack([x, x], -1)[..., 0], torch.cat([x, x])[len(x) :]]
    if x.ndim == 2:
        return [*views, x.T.contiguous().T]
    return [*views, x.mT.contiguous().mT, x.permute(1, 2, 0).contiguous().permute(2, 0, 1)]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_depend_on_neither_memory_order_nor_threads(shape, dtype):
    x, dy = sample(*shape, dtype=dtype), sample(*shape, dtype=dtype, seed=1)
    before, expected = torch.get_num_threads(), None
    try:
        for view in _views(x):
            for num_threads in (1, 2, 5):
                torch.set_num_threads(num_threads)
                results = _results(view, dy)
                expected = expected or results
                assert all(map(torch.equal, results, expected))
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_results_agree_with_float64(shape, offset, masked):
    x, dy = offset + sample(*shape), sample(*shape, seed=1)
    masking = {"mask": torch.arange(len(x)) % 3 > 0} if masked else {}
    wide = _results(x.double(), dy.double(), **masking)
    for actual, expected in zip(_results(x, dy, **masking), wide, strict=True):
        # Running statistics are rounded before evaluation uses them.
        assert relative_error(actual, expected) < (1e-6 if offset == 0 else 1e-5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "view",
    [
        torch.nn.Parameter,
        lambda x: x.clone().requires_grad_(),
        lambda x: x.clone().requires_grad_() * 1,
        lambda x: x.conj(),
        lambda x: torch._neg_view(-x),
        lambda x: torch.stack([x, x])[1],
        lambda x: x.to(torch.float32, copy=True).detach_(),
        lambda x: x.as_subclass(type("Subclass", (torch.Tensor,), {})),
    ],
    ids=["parameter", "leaf", "function", "conjugate", "negative", "sliced", "detached", "subclass"],
)
@pytest.mark.parametrize("size", [16, 3000])
def test_unusual_tensors_give_the_same_output(view, size):
    x = sample(size, 8)
    expected = mbn.BatchNorm1d(8, backend="torch")(x)
    given = view(x)
    y = mbn.BatchNorm1d(8, backend="torch")(given)
    torch.testing.assert_close(y.detach().as_subclass(torch.Tensor), expected.detach())
    assert isinstance(y, torch.Tensor)
    assert torch.equal(given.detach().as_subclass(torch.Tensor), x)
    given.detach().resize_(size + 1, 8)  # no exported view forbids it


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("negative", ["x", "dy"])
def test_negative_views_give_the_same_gradients(negative):
    x, dy = sample(50, 8), sample(50, 8, seed=1)
    expected = _results(x, dy)
    views = {"x": x, "dy": dy}
    views[negative] = torch._neg_view(-views[negative])
    for actual, result in zip(_results(**views), expected, strict=True):
        torch.testing.assert_close(actual, result)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_can_be_copied_pickled_resized_and_shared(shape, training):
    bn = mbn.BatchNorm1d(shape[1], backend="torch").train(training)
    x = sample(*shape)
    with torch.no_grad():
        y = bn(x)
        expected = y.clone()
        assert torch.equal(pickle.loads(pickle.dumps(y)), expected)
        assert torch.equal(copy.deepcopy(y), expected)
        assert torch.equal(bn(x[:-1]).resize_(x.shape)[:0], x[:0])
        assert y.untyped_storage().nbytes() == x.nbytes
        y.add_(1).sub_(1).share_memory_()
        assert y.is_shared()
    for tensor in bn.state:
        copy.deepcopy(tensor).share_memory_()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", SHAPES)
def test_inference_mode_gives_the_same_output(shape):
    x = sample(*shape)
    expected = mbn.BatchNorm1d(shape[1], backend="torch")(x)
    with torch.inference_mode():
        bn = mbn.BatchNorm1d(shape[1], backend="torch")
        for given in (x, x.clone()):
            y = bn(given)
            assert torch.equal(y, expected)
            assert y.is_inference()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("num_threads", [1, 2])
def test_kernels_use_the_number_of_threads_of_torch(num_threads, monkeypatch):
    seen = []
    run = thread_pool.run_tasks

    def watched(*args, **kwargs):
        seen.append(mbn.threads.get_num_threads())
        run(*args, **kwargs)

    monkeypatch.setattr(thread_pool, "run_tasks", watched)
    monkeypatch.setattr(mbn.threads, "_num_threads", 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        _results(sample(70_000, 8), sample(70_000, 8, seed=1))
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {num_threads}


class _Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_dispatch_modes_see_all_operations():
    bn = mbn.BatchNorm1d(8, backend="torch")
    x = sample(50, 8)
    expected = mbn.BatchNorm1d(8, backend="torch")(x)
    with _Operations() as mode:
        y = bn(x)
    assert {"sub", "mul_"} <= mode.names
    torch.testing.assert_close(y, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_of_the_module_works():
    bn = mbn.BatchNorm1d(8, backend="torch").eval()
    with torch.no_grad():
        traced = torch.jit.trace(bn.as_module(), sample(50, 8))
        x = sample(50, 8, seed=1)
        torch.testing.assert_close(traced(x), bn(x))


def test_arrays_are_writable_without_versions_of_dlpack(monkeypatch):
    monkeypatch.setattr(private, "_HAS_VERSIONS", False)
    x = sample(50, 8)
    assert not host.as_array(x).flags.writeable
    host._writable(x)[...] = 1
    assert x.eq(1).all()


@pytest.mark.parametrize("size", [0, 1, 1 << 22, (1 << 23) + 5])
def test_advice_on_memory_changes_no_value(size):
    x = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    expected = x.clone()
    memory.advise(x.data_ptr(), x.nbytes)
    assert torch.equal(x, expected)


def test_missing_madvise_is_no_error(monkeypatch):
    monkeypatch.delattr(memory.mmap, "MADV_HUGEPAGE", raising=False)
    monkeypatch.setattr(memory, "_madvise", memory._madvise.__wrapped__)
    assert memory._madvise() is None
    test_advice_on_memory_changes_no_value(1 << 22)


# Outputs written to the caller's tensors.


def _call(x, out, *params, training=True, weights=None):
    return step(
        backend,
        x,
        mbn.Params(*(params or (None, None))),
        mbn.State(torch.zeros(x.shape[1]), torch.ones(x.shape[1]), None),
        training=training,
        momentum=0.1,
        eps=1e-5,
        correction=1,
        weights=weights,
        out=out,
    )[0]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_out_gets_the_output_in_any_memory_order(shape, masked, training):
    x = sample(*shape)
    weights = (torch.arange(len(x)) % 3 > 0).float() if masked else None
    if masked and x.ndim == 3:
        weights = weights[:, None].expand(-1, shape[2])
    expected = _call(x, torch.empty_like(x), training=training, weights=weights)
    for out in (*_views(torch.zeros_like(x)), x):
        y = _call(x, out, training=training, weights=weights)
        assert y is out
        assert torch.equal(out, expected)


def test_out_gets_the_output_under_compilation():
    x = sample(50, 8)
    out, expected = torch.empty_like(x), _call(x, torch.empty_like(x))
    torch._dynamo.reset()
    torch.compile(_call, fullgraph=True, backend="aot_eager")(x, out)
    torch.testing.assert_close(out, expected)


def test_conflict_names_overlaps_and_gradients():
    x = sample(6, 4)
    base = sample(7, 8)
    leaf = x.clone().requires_grad_()
    with torch.inference_mode():
        inferred = torch.empty_like(x)
    for out, given, words in (
        (torch.empty_like(x), x, None),
        (x, x, None),
        (base[:6, ::2], base[:6, 1::2], None),
        (base[:6, :4], base[1:, :4], "overlaps"),
        (x.view(4, 6).T, x, "overlaps"),
        (x[:0], x[:0], None),
        (torch.empty(1, 4).expand(6, 4), x, "overlaps itself"),
        (torch.empty(24).as_strided((6, 4), (3, 1)), x, "overlaps itself"),
        (torch.empty(6, 4, dtype=torch.complex64).conj().imag, x, "differ from its memory"),
        (leaf, x, "requires grad"),
        (torch.empty_like(x), leaf, "x requires grad"),
        (inferred, x, "inference_mode"),
    ):
        reason = backend.conflict(out, given)
        assert (reason is None) if words is None else (words in reason)
    with torch.no_grad():
        assert backend.conflict(leaf, leaf) is None
    with torch.inference_mode():
        assert backend.conflict(inferred, x) is None


def test_out_is_refused_if_a_parameter_requires_a_gradient():
    x, weight = sample(6, 4), torch.ones(4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        _call(x, torch.empty_like(x), weight, None)
    with torch.no_grad():
        _call(x, torch.empty_like(x), weight, None)


def test_as_array_shares_memory():
    x = sample(4, 3)
    assert np.shares_memory(host.as_array(x), x.numpy())


def test_scaled_statistics_pass_between_kernels():
    x, dy = 1e200 * sample(20, 3, dtype=torch.float64), sample(20, 3, dtype=torch.float64, seed=1)
    results = []
    batch = Batch(x, None, "float64")
    on_host, prepared = backend.kernels_for("moments", batch)
    assert isinstance(on_host, host.CpuKernels)
    other = on_host.moments(host.ArrayBatch(batch._replace(x=3 * x)))
    for kernels, own in ((EAGER, batch), (on_host, prepared)):
        moments = kernels.moments(own)
        residuals = mbn.contract.Stats(moments.mean, kernels.variance(moments, 0), moments.count)
        dx, dweight, _ = pullback(backend, dy, x, None, residuals, 1e-5)
        merged = backend.kernels.merge(moments, other)
        mean = backend.kernels.lerp(torch.zeros(3, dtype=x.dtype), merged.mean, 1.0)
        results.append((1e200 * dx, dweight, mean))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4096, 160), (70_001, 16), (300, 5, 400)])
@pytest.mark.parametrize("kind", ["ordinary", "masked", "channels last", "strided"])
def test_large_halves_give_the_bits_of_copies_in_float32(dtype, shape, kind, monkeypatch):
    pytest.importorskip("ml_dtypes")
    torch.manual_seed(0)
    x, dy = (torch.randn(shape) * 3 + 5).to(dtype), torch.randn(shape).to(dtype)
    if kind == "channels last":
        x = x.mT.contiguous().mT
    elif kind == "strided":
        x = x.repeat_interleave(2, 0)[::2]
    masking = {"mask": torch.arange(x.numel() // shape[1]).reshape(shape[:1] + shape[2:]) % 3 > 0}

    def results():
        bn, leaf = mbn.BatchNorm1d(shape[1], backend="torch"), x.detach().requires_grad_()
        y = bn(leaf, **(masking if kind == "masked" else {}))
        y.backward(dy)
        return y, leaf.grad, bn.running_mean, bn.running_var, bn.eval()(leaf)

    given = results()
    monkeypatch.setattr(host, "_is_computable", lambda x: x.dtype not in host._HALVES)
    for one, other in zip(given, results(), strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one, other)
