"""Samples of tensors for the tests of Torch, the definition of batch norm, and functions that compare results."""

import copy
import io
import pickle

import pytest
from steps import step

import mbn

torch = pytest.importorskip("torch")
backend = mbn.get_backend("torch")

KINDS = [None, "mask", "real"]


def sample(*shape, dtype=torch.float32, seed=0):
    return 3 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_weights(kind, shape, dtype):
    """Return sample weights for an x of this shape: None, those of a mask, or real numbers."""
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(9)
    cells = shape[0], *shape[2:]
    mask = torch.rand(cells, generator=generator) > 0.3
    return mask.to(dtype) * (torch.rand(cells, generator=generator).to(dtype) if kind == "real" else 1)


def output_of(x, weight, bias, *statistics, weights=None, eps=1e-5):
    """Normalise by the backend, by the given statistics or else by those of x."""
    y, _, _ = step(
        backend,
        x,
        mbn.Params(weight, bias),
        mbn.State(*(statistics or (None, None)), None),
        training=not statistics,
        momentum=0.1,
        eps=eps,
        correction=1,
        weights=weights,
    )
    return y


def by_definition(x, weight, bias, *statistics, weights=None, eps=1e-5):
    """Normalise by the definition, in float64."""
    values = x.to(torch.float64)
    if values.ndim == 2:
        values = values[:, :, None]
    w = torch.ones_like(values[:, :1]) if weights is None else weights.to(torch.float64).reshape(len(x), 1, -1)
    zero = torch.zeros((), dtype=torch.float64)
    values = torch.where(w > 0, values, zero)
    mean, var = (vector[:, None] for vector in statistics) if statistics else (None, None)
    if mean is None:
        mean = (w * values).sum((0, 2), keepdim=True) / w.sum()
        var = (w * (values - mean) ** 2).sum((0, 2), keepdim=True) / w.sum()
    y = (values - mean) / (var + eps).sqrt() * weight[:, None] + bias[:, None]
    return torch.where(w > 0, y, zero).reshape(x.shape)


def draw_arguments(shape, dtype=torch.float64, *, training=True):
    """Return x, weight and bias, and for evaluation also running statistics."""
    vectors = [sample(3, dtype=dtype, seed=seed) for seed in (1, 2)]
    statistics = [] if training else [sample(3, dtype=dtype, seed=3), sample(3, dtype=dtype, seed=4).abs()]
    return [sample(*shape, dtype=dtype), *vectors, *statistics]


def leaves_of(arrays, dtype=None):
    return [array.detach().clone().to(dtype or array.dtype).requires_grad_() for array in arrays]


def relative_error(actual, expected):
    """Return the largest error, relative to the largest expected value."""
    actual, expected = actual.detach().double(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def compile_fully(function):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def count_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _saved(value):
    """Return the value after ``torch.save`` and ``torch.load``."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value)), "torch.save": _saved}
"""Functions that copy a layer or module, by name."""


POWERS = [
    *((torch.float32, power) for power in (-148, -110, 60, 100, 124)),
    *((torch.float64, power) for power in (-1070, -600, -300, 300, 600, 1020)),
]
"""Dtypes and powers of two; small multiples of these powers have subnormal or very large squares or inverses."""


def assert_size_changes_nothing(dtype, power):
    """Check that a batch multiplied by a power of two gives the same results, but for that power."""
    generator = torch.Generator().manual_seed(5)
    ones = torch.randint(-8, 9, (40, 3), generator=generator).to(dtype)
    ones[:, 2] = ones[0, 2]
    dy = sample(40, 3, dtype=dtype)
    bound, gradient_bound = (1e-14, 1e-12) if dtype == torch.float64 else (3e-7, 3e-6)
    expected, statistics, expected_gradients = _of_size(ones, dy, 0, 0)
    for weight_power in (0, power // 2, power):
        y, actual, gradients = _of_size(ones, dy, power, weight_power)
        for own, other, times in zip(actual, statistics, (power, 2 * power), strict=True):
            rounded = _times(other.double(), times).to(dtype)
            least = 2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            assert own.tolist() == pytest.approx(rounded.tolist(), rel=bound, abs=least)
        if weight_power == 0:
            assert relative_error(y, expected) < bound
        left = power - weight_power
        if abs(left) < (120 if dtype == torch.float32 else 1000):  # dx is within the range of the dtype
            dx = _times(gradients[0].double(), left)
            assert relative_error(dx, expected_gradients[0].double()) < gradient_bound
        assert relative_error(gradients[1], expected_gradients[1]) < gradient_bound


def _of_size(ones, dy, power, weight_power):
    bn = mbn.BatchNorm1d(3, eps=0, momentum=1.0, dtype=str(ones.dtype)[6:], backend="torch")
    bn.weight = _times(torch.tensor([1.0, -2.0, 1.0], dtype=ones.dtype), weight_power)
    x = _times(ones, power).requires_grad_()
    y = bn(x)
    return y.detach(), bn.state[:2], torch.autograd.grad(y, [x, *bn.parameters()], dy)


def _times(values, power):
    half = power // 2
    return values.detach() * 2.0**half * 2.0 ** (power - half)
