"""The kernels in Triton against those in Torch's operations, on awkward batches; and bugs planted in them.

Triton has to interpret: ``test_mbn_torch_triton.py`` runs this file in a process with the plugin ``interpreted``.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from interpreted import gpu
from torch_samples import POWERS, assert_size_changes_nothing, draw_weights, relative_error, sample

import mbn
from mbn.conformance import oracle, ulp
from mbn.contract import Batch, Params, Settings, Stats
from mbn.step import compose
from mbn_torch.channel_stats import scaled, separate
from mbn_torch.kernels import triton_gradients, triton_moments, triton_normalize, triton_tiles
from mbn_torch.kernels.eager import EAGER
from mbn_torch.kernels.gpu import TRITON

BOUNDS = {torch.float16: 6e-4, torch.bfloat16: 5e-3, torch.float32: 1.2e-7, torch.float64: 1e-14}
"""Bounds of outputs and gradients of x, relative to the largest: one rounding, as two results may round differently."""

VIEWS = {
    "rows": lambda x: x(251, 13),
    "two values": lambda x: x(2, 1),
    "two rows": lambda x: x(2, 37),
    "many channels": lambda x: x(3, 700),
    "one position": lambda x: x(11, 5, 1),
    "one row": lambda x: x(1, 3, 1031),
    "one channel": lambda x: x(7, 1, 53),
    "positions": lambda x: x(5, 7, 131),
    "few positions": lambda x: x(17, 23, 3),
    "aligned": lambda x: x(6, 32, 64),
    "wide": lambda x: x(2, 3, 2050),
    "channels last": lambda x: x(5, 37, 16).mT,
    "transposed": lambda x: x(13, 251).T,
    "sliced": lambda x: x(40, 9, 33)[1::3, ::2, 2::5],
    "shifted": lambda x: x(33, 16)[:, 3:],
    "positions of rows": lambda x: x(7, 12, 5).permute(1, 0, 2),
    "expanded": lambda x: x(19, 6, 1).expand(-1, -1, 8),
}


def results(kernels, x, dy, weights, *, eps=1e-5):
    """Return all results of kernels for a batch, by name."""
    generator = torch.Generator().manual_seed(3)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = torch.randn((2, x.shape[1]), generator=generator, dtype=torch.float64).to(dtype)
    batch = Batch(x, weights)
    moments = kernels.moments(batch)
    count = moments.count
    own, given = Stats(moments.mean, kernels.variance(moments, 0), count), Stats(bias, weight.abs(), None)
    y = kernels.normalize(batch, own, Params(weight, bias), eps)
    evaluated = kernels.normalize(batch, given, Params(weight, None), eps)
    sums = kernels.grad_sums(dy, batch, own, eps)
    dx = kernels.grad_input(dy, batch, own, weight, eps, sums)
    constant = kernels.grad_input(dy, batch, given, weight, eps, None)
    hi, lo, m2, unit = separate(moments.mean, moments.m2)
    unit = 0 if unit is None else unit
    return {
        "count": torch.as_tensor(count, dtype=torch.float64),
        "mean": scaled(hi + lo, unit),
        "m2": scaled(m2, 2 * unit),
        "y": y,
        "evaluated": evaluated,
        "sum of dy": sums[0],
        "sum of dy * xhat": sums[1],
        "dx": dx,
        "dx in evaluation": constant,
    }


def assert_agreement(x, dy, weights=None):
    """Check that both kinds of kernels give the same results for a batch."""
    if weights is not None:
        keep = (weights > 0).reshape(len(x), 1, *weights.shape[1:]).expand(x.shape)
        x, dy = (torch.where(keep, values, torch.nan) for values in (x, dy))
    expected = results(EAGER, x, dy, weights)
    for name, actual in results(TRITON, x, dy, weights).items():
        assert actual.dtype == expected[name].dtype, name
        assert actual.shape == expected[name].shape, name
        assert actual.stride() == expected[name].stride() or name != "y"
        bound, terms = (BOUNDS[x.dtype], 1e-8) if actual.shape == x.shape else (1e-12, len(x))
        # Where the terms of a gradient cancel, only their rounding errors are left.
        largest = max(expected[name].double().abs().max(), terms * dy.double().nan_to_num().abs().max())
        error = (actual.double() - expected[name].double()).abs().max()
        assert error <= bound * largest, f"{name} is {error / largest:.3g} off"


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (None, torch.float32),
        ("real", torch.float32),
        ("mask", torch.float64),
        (None, torch.bfloat16),
        ("mask", torch.float16),
    ],
)
@pytest.mark.parametrize("view", VIEWS)
def test_triton_agrees_with_eager_kernels(view, kind, dtype):
    seeds = iter(range(9))
    x, dy = (VIEWS[view](lambda *shape: sample(*shape, dtype=dtype, seed=next(seeds))) for _ in range(2))
    weights = draw_weights(kind, x.shape, torch.float64 if dtype == torch.float64 else torch.float32)
    if weights is not None:
        weights.view(-1)[:2] = torch.tensor([0, 1])  # some value counts
    assert_agreement(x, dy, weights)


@pytest.mark.parametrize("view", VIEWS)
def test_triton_agrees_for_dy_in_other_memory_orders(view):
    x = VIEWS[view](sample)
    constant = sample(1).expand(x.shape)
    turned = sample(*reversed(x.shape), seed=1).permute(*reversed(range(x.ndim)))
    spread = sample(*x.shape, 2, seed=1)[..., 0]
    for dy in (constant, turned, spread):
        assert_agreement(x, dy)


def test_triton_agrees_for_expanded_weights():
    x, dy = sample(9, 4, 31), sample(9, 4, 31, seed=1)
    assert_agreement(x, dy, (torch.arange(9)[:, None] % 3).float().expand(9, 31))


def test_triton_agrees_for_offsets_beyond_32_bits():
    storage = torch.empty((1 << 31) + 64, dtype=torch.float16)  # almost none of its pages are touched
    x = storage.as_strided((3, 8), ((1 << 30) + 16, 1)).copy_(sample(3, 8))
    assert_agreement(x, sample(3, 8, dtype=torch.float16, seed=1))
    x = storage.as_strided((3, 2, 5), (8, (1 << 31) + 8, 1)).copy_(sample(3, 2, 5))
    assert_agreement(x, sample(3, 2, 5, dtype=torch.float16, seed=1))


def test_triton_agrees_where_programs_take_several_tiles(monkeypatch):
    monkeypatch.setattr(triton_tiles, "_MANY", {True: 3, False: 2})
    triton_tiles._tiling.cache_clear()
    for shape in ((9001, 3), (40, 2, 700)):
        assert_agreement(sample(*shape), sample(*shape, seed=1))
    triton_tiles._tiling.cache_clear()


@pytest.mark.parametrize(("dtype", "power"), POWERS)
def test_triton_takes_values_of_any_size(dtype, power):
    assert_size_changes_nothing(dtype, power)


def test_float64_statistics_of_float32_values_are_accurate():
    x = sample(200, 4)
    x[0] = 1e6
    bn, wide = (mbn.BatchNorm1d(4, dtype="float64", momentum=1.0, backend="torch") for _ in range(2))
    bn(x)
    wide(x.double())
    assert relative_error(bn.running_mean, wide.running_mean) < 8e-16
    assert relative_error(bn.running_var, wide.running_var) < 8e-16


def test_statistics_are_accurate_where_one_value_dwarfs_the_others():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_tiles, "_MANY", {True: 1, False: 1})  # one program takes all tiles, one after another
        triton_tiles._tiling.cache_clear()
        x = torch.ones(1000, 8, dtype=torch.float64)
        x[0] = torch.tensor([3.22e6, 12147.75, 1e10, 188.2, 4.2e8, 1129002.5, 1e6, 7.7e11])
        bn = mbn.BatchNorm1d(8, dtype="float64", momentum=1.0, backend="torch")
        bn(x)
    triton_tiles._tiling.cache_clear()
    exact = oracle.train(x.numpy(), np.zeros(8), np.ones(8), momentum=1.0, eps=1e-5)
    for actual, expected in zip(
        (bn.running_mean, bn.running_var), (exact.running_mean, exact.running_var), strict=True
    ):
        assert ulp.error(actual.numpy(), expected, "float64") <= ulp.STATISTICS_BOUNDS["float64"]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_of_values_neither_overflow_nor_underflow(scale):
    x = (torch.randn((64, 3), generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * scale).requires_grad_()
    bn = mbn.BatchNorm1d(3, eps=0, track_running_stats=False, backend="torch")
    y = bn(x)
    (dx,) = torch.autograd.grad(y, x, sample(64, 3))
    expected = mbn.BatchNorm1d(3, eps=0, dtype="float64", backend="torch")(x.detach().double())
    assert relative_error(y, expected) < 1e-6
    assert dx.isfinite().all()


@pytest.mark.parametrize("momentum", [None, 0.0, 0.25])
@pytest.mark.parametrize("kind", [None, "real", "nothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_triton_updates_running_statistics_as_eager_kernels(dtype, kind, momentum):
    x = sample(50, 6, dtype=dtype)
    weights = torch.zeros(50, dtype=dtype) if kind == "nothing" else draw_weights(kind, x.shape, dtype)
    state = mbn.State(sample(6, dtype=dtype), sample(6, dtype=dtype).abs(), torch.tensor(3))
    dtype_name = "float64" if dtype == torch.float64 else "float32"
    settings = Settings(6, dtype_name, 1e-5, momentum, 1, 1)
    batch, params = Batch(x, weights, dtype_name), Params(None, None)
    _, after, _ = TRITON.train(batch, params, state, settings, None)
    _, expected, _ = compose.forward(EAGER, batch, params, state, settings, training=True)
    assert after.num_batches_tracked == 4
    for actual, other, before in zip(after[:2], expected[:2], state[:2], strict=True):
        assert relative_error(actual, other.double()) <= (1e-15 if dtype == torch.float64 else 1.2e-7)
        assert not torch.equal(actual, before) or momentum == 0 or kind == "nothing"


def test_layer_calls_the_triton_kernels(monkeypatch):
    seen = []
    for name in ("train", "pullback", "normalize", "moments"):
        kernel = getattr(TRITON, name)
        monkeypatch.setattr(TRITON, name, lambda *a, _of=(name, kernel), **k: (seen.append(_of[0]), _of[1](*a, **k))[1])
    bn = mbn.BatchNorm1d(3, backend="torch")
    x = sample(5, 3).requires_grad_()
    bn(x).sum().backward()
    assert seen == ["train", "normalize", "pullback"]
    y = bn(x)
    first = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
    assert torch.autograd.grad(first.sum(), x)[0].isfinite().all()
    bn.fit([sample(5, 3)], progress=False)
    assert "moments" in seen


def test_pullback_computes_the_needed_gradients_alone():
    x, dy = sample(20, 4), sample(20, 4, seed=1)
    weight = torch.rand(4)
    mean, var = sample(4), torch.rand(4)
    arguments = TRITON, dy, Batch(x), weight, Stats(mean, var, None), 1e-5
    every = compose.pullback(*arguments)
    for needs in ((True, False, False), (False, True, True), (False, False, True)):
        some = compose.pullback(*arguments, needs)
        for needed, actual, expected in zip(needs, some, every, strict=True):
            if needed:
                torch.testing.assert_close(actual.to(expected.dtype), expected)


PLANTED = {  # No bug writes outside of its arrays, which would end the process.
    "positions beyond the last": ("mask = is_value[:, :, None] &", "mask = (is_value | True)[:, :, None] &"),
    "no shift": ("d = values - start[None, None, :]", "d = values"),
    "another shift in the end": (
        "hi = _one_of_three(x + channel * x_channel",
        "hi = _one_of_three(x + channel // 2 * x_channel",
    ),
    "no value for those that are not there": ("other=first[None, None, :]", "other=0"),
    "tiles of one program twice": ("range(tl.program_id(1), tiles,", "range(0, tiles,"),
    "partial sums twice": ("first + tl.arange(0, PROGRAMS)", "first + tl.arange(0, PROGRAMS) // 2"),
    "partial sums left out": ("for first in range(0, programs", "for first in range(PROGRAMS, programs"),
    "the power of two before the mean": ("values.to(COMPUTE) * before", "values.to(COMPUTE)"),
    "the power of two before deviations": ("d = values * before - center", "d = values - center"),
    "the power of two after gradients": ("gradients *= after", "gradients *= 1"),
    "units": ("values * factor[None, None, :] - start[None, None, :]", "values - start[None, None, :]"),
    "squares of one sum": ("square = (square + apart_squares) - apart_squares", "square = square * 1.0"),
    "parts left out": ("tl.sum(squares, 0) + tl.sum(squares_left, 0)", "tl.sum(squares, 0)"),
    "the square of a unit": ("_lerp(running_var, unbiased, 2 * unit", "_lerp(running_var, unbiased, unit"),
    "the largest of a few": ("largest = tl.maximum(largest, more)", "largest = largest"),
    "values of weight 0 in sums": ("d = tl.where((w > 0)[:, :, None], d, 0.0)", "d = d"),
    "values of weight 0 in sums of gradients": ("gradients = tl.where(keep, gradients, 0.0)", "gradients = gradients"),
    "values of weight 0 in outputs": ("values = tl.where(keep[:, None], values, 0.0)", "values = values"),
    "values of weight 0 in gradients": ("gradients = tl.where(w > 0, gradients, 0.0)", "gradients = gradients"),
    "weights once": ("square = once * d", "square = d * d"),
    "the rest of the mean, in outputs": ("((center - mean) - rest) * number", "(center * 0.0) * number"),
    "the mean of dy": ("(gradients - mean_dy) - projection", "gradients - projection"),
}


def _within_more(x):
    """Return the same values with other values around them in memory."""
    larger = torch.full((x.numel() + 20_000,), 1e3, dtype=x.dtype)
    return larger[10_000:-10_000].view(x.shape).copy_(x)


def _everything():
    """Check, the quickest first, a set of cases of which at least one fails for every planted bug."""
    test_statistics_are_accurate_where_one_value_dwarfs_the_others()
    _assert_all_agree(61, 13)
    for dtype, power in ((torch.float32, 100), (torch.float64, -600), (torch.float64, 600)):
        assert_size_changes_nothing(dtype, power)
    _assert_all_agree(3, 2, 70)
    _assert_all_agree(700, 3)


def _assert_all_agree(*shape):
    for dtype in (torch.float32, torch.float64):
        x = _within_more(1e4 + sample(*shape, dtype=dtype))
        dy = _within_more(sample(*shape, dtype=dtype, seed=1))
        assert_agreement(x, dy)
        assert_agreement(x, dy, draw_weights("real", shape, dtype))


def test_kernels_without_a_planted_bug_pass():
    _everything()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_found(name, tmp_path, monkeypatch):
    right, wrong = PLANTED[name]
    is_planted = False
    for module in (triton_moments, triton_normalize, triton_gradients):
        source = Path(module.__file__).read_text()
        if right in source:
            is_planted = True
            path = tmp_path / Path(module.__file__).name
            path.write_text(source.replace(right, wrong))
            spec = importlib.util.spec_from_file_location("planted", path)
            planted = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(planted)
            monkeypatch.setattr(gpu, module.__name__.rpartition(".")[2], planted)
    assert is_planted
    with pytest.raises(AssertionError):
        _everything()
