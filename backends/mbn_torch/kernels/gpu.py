"""Launches of the kernels in Triton, for Torch's tensors on a GPU.

A pass over x is launched in the grid of ``triton_tiles``, a finishing kernel with one program per block of channels::

    train        moments -> partials -> finish_moments -> result, new state        2 launches
                 (for x or a layer in float64, 2 more before: moments -> finish_rough_moments -> center, exponents)
                 normalize -> y                                                    1 launch
    evaluate     normalize -> y                                                    1 launch
    pullback     grad_sums -> partials -> finish_grad_sums -> sums                 2 launches
                 grad_input -> dx                                                  1 launch

All launches are on the current stream of the tensors' own device. The host never waits for the device, so every call
can be captured in a CUDA graph. Beside the results, a call allocates a few vectors and a few MiB of partial sums.
"""

import struct
from typing import Any

import torch
import triton.language as tl

from mbn.contract import Batch, Moments, Params, Settings, State, Stats
from mbn_torch.channel_stats import WIDE, TorchKernels, heaviest, in_units, lifted, separate
from mbn_torch.kernels import triton_gradients, triton_moments, triton_normalize
from mbn_torch.kernels.triton_tiles import Tiling, tiling

_COMPUTE = {torch.float16: tl.float32, torch.bfloat16: tl.float32, torch.float32: tl.float32, torch.float64: tl.float64}
"""The dtype in which ``normalize`` computes, for each dtype of x."""
_NO_STATE = State(None, None, None)
_PARTIALS = 2048
"""Partial sums of a statistic that a program of a finishing kernel reads at a time."""


class Triton(TorchKernels):
    """Kernels in Triton, for a GPU: a training step and a pullback are three launches each, evaluation is one.

    A training step of x or a layer in float64 is five.
    """

    def moments(self, batch: Batch) -> Moments:
        """Return count, mean (a Pair) and m2 of each channel of x, (N, C) or (N, C, L); scaled for x in float64."""
        with torch.cuda.device_of(batch.x):
            (hi, lo, m2, *_), exponents, count, _ = _moments(batch)
        return Moments(count, *in_units(hi, lo, m2, exponents))

    def normalize(
        self, batch: Batch, stats: Stats, params: Params, eps: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return (x - mean) / sqrt(var + eps) * weight + bias in x's dtype and memory order."""
        x, weights, _ = batch
        mean, var, _ = stats
        weight, bias = params
        y = torch.empty_like(x) if out is None else out
        tiles = tiling((x, y), weights, sums=False)
        of_x, of_y, *of_weights = tiles.strides
        unit_x, unit_y = tiles.units
        with torch.cuda.device_of(x):
            triton_normalize.normalize[tiles.grid](
                x,
                y,
                *_contiguous(*separate(mean, var), weight, bias),
                weights,
                _bits(eps),
                *tiles.extents,
                *of_x,
                *of_y,
                *_along(of_weights),
                COMPUTE=_COMPUTE[x.dtype],
                UNIT_X=unit_x,
                UNIT_Y=unit_y,
                **tiles.constants,
            )
        return y

    def grad_sums(self, dy: torch.Tensor, batch: Batch, stats: Stats, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums of dy and of dy * xhat for each channel, in float64."""
        sums, _ = _grad_sums(dy, batch, stats, eps, None)
        return sums

    def grad_input(
        self,
        dy: torch.Tensor,
        batch: Batch,
        stats: Stats,
        weight: torch.Tensor | None,
        eps: float,
        sums: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Return the gradient of x, in its dtype and memory order."""
        x, weights, _ = batch
        mean, var, count = stats
        dx = torch.empty_like(x)
        tiles = tiling((x, dy, dx), weights, sums=False)
        of_x, of_dy, of_dx, *of_weights = tiles.strides
        unit_x, unit_dy, unit_dx = tiles.units
        is_tensor = isinstance(count, torch.Tensor)
        with torch.cuda.device_of(x):
            triton_gradients.grad_input[tiles.grid](
                x,
                dy,
                dx,
                *_contiguous(*separate(mean, var), weight, *(sums or (None, None))),
                count if is_tensor else None,
                weights,
                _bits(eps),
                1 if is_tensor or count is None else count,
                *tiles.extents,
                *of_x,
                *of_dy,
                *of_dx,
                *_along(of_weights),
                UNIT_X=unit_x,
                UNIT_DY=unit_dy,
                UNIT_DX=unit_dx,
                **tiles.constants,
            )
        return dx

    def train(
        self, batch: Batch, params: Params, state: State, settings: Settings, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, State, Stats]:
        """Return the output, the new state and the statistics of a training step."""
        with torch.cuda.device_of(batch.x):
            (hi, lo, _, var, *_), exponents, count, state = _moments(
                batch, state, settings.momentum, settings.correction
            )
            stats = Stats(*in_units(hi, lo, var, exponents), count)
            return self.normalize(batch, stats, params, settings.eps, out), state, stats

    def pullback(
        self, dy: torch.Tensor, batch: Batch, weight: torch.Tensor | None, stats: Stats, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of x, weight and bias."""
        sums, (dbias, dweight) = _grad_sums(dy, batch, stats, eps, None if weight is None else weight.dtype)
        dx = self.grad_input(dy, batch, stats, weight, eps, None if stats.count is None else sums)
        return dx, dweight, dbias


def _moments(
    batch: Batch, state: State = _NO_STATE, momentum: float | None = 0.0, correction: int = 0
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None, Any, State]:
    """Return the vectors of ``finish_moments``, their exponents, the count and the new state.

    The vectors, (C,) in float64 each, are the two parts of the mean, m2, the biased variance and, with weights, the
    count. For x in float64 they are in units, whose exponents are (C,) int32; for other dtypes the exponents are None.
    """
    x, weights, dtype = batch
    shift = None if weights is None else heaviest(lifted(x), weights)
    tiles = tiling((x,), weights, sums=True)
    exponents = None
    if x.dtype == WIDE or dtype == "float64":
        shift, exponents = _rough_moments(x, shift, weights, tiles)
    channels, (_, programs) = x.shape[1], tiles.grid
    partials = _sums(x, shift, exponents, weights, tiles, 2 if exponents is None else 4)
    # Rows: the two parts of the mean, m2, the variance, and the sum of the weights, which is equal in all channels.
    result = torch.empty((4 if weights is None else 5, channels), dtype=WIDE, device=x.device)
    number = x.numel() // channels
    before = State(*_contiguous(*state))
    after = State(*(None if old is None else torch.empty_like(old) for old in before))
    grid, shape = _finishing(programs, channels)
    triton_moments.finish_moments[grid](
        partials,
        x,
        shift,
        exponents,
        *before,
        result,
        *after,
        programs,
        channels,
        x.stride(1),
        *_other_rows(x),
        number,
        correction,
        None if momentum is None else _bits(momentum),
        WEIGHTED=weights is not None,
        **shape,
    )
    vectors = result.unbind()
    count = number if weights is None else vectors[4][0]
    return vectors, exponents if x.dtype == WIDE else None, count, after


def _rough_moments(
    x: torch.Tensor, shift: torch.Tensor | None, weights: torch.Tensor | None, tiles: Tiling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result of a rough first pass, (3, C) in float64, and the exponents of the channels' units, (C,).

    The rows are an approximate mean and two powers of two, for the exact second pass; see ``finish_rough_moments``.
    """
    channels, (_, programs) = x.shape[1], tiles.grid
    partials = _sums(x, shift, None, weights, tiles, 3)
    center = torch.empty((3, channels), dtype=WIDE, device=x.device)
    exponents = torch.empty(channels, dtype=torch.int32, device=x.device)
    grid, shape = _finishing(programs, channels)
    triton_moments.finish_rough_moments[grid](
        partials,
        x,
        shift,
        center,
        exponents,
        programs,
        channels,
        x.stride(1),
        *_other_rows(x),
        x.numel() // channels,
        WEIGHTED=weights is not None,
        **shape,
    )
    return center, exponents


def _sums(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    exponents: torch.Tensor | None,
    weights: torch.Tensor | None,
    tiles: Tiling,
    statistics: int,
) -> torch.Tensor:
    """Return the partial sums of ``moments``, (programs, rows, C): a row per statistic, and one of the weights if any.

    ``statistics`` is 2 for a plain pass, 3 for a rough one and 4 for an exact one.
    """
    channels, (_, programs) = x.shape[1], tiles.grid
    partials = torch.empty((programs, statistics + (weights is not None), channels), dtype=WIDE, device=x.device)
    of_x, *of_weights = tiles.strides
    triton_moments.moments[tiles.grid](
        x,
        weights,
        shift,
        exponents,
        partials,
        *tiles.extents,
        *of_x,
        *_along(of_weights),
        *_other_rows(x),
        UNIT_X=tiles.units[0],
        UNROLLED=tiles.loads,
        ROUGH=statistics == 3,
        **tiles.constants,
    )
    return partials


def _grad_sums(
    dy: torch.Tensor, batch: Batch, stats: Stats, eps: float, dtype: torch.dtype | None
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return the sums of dy and of dy * xhat for each channel, in float64 and again in ``dtype`` (None: float64)."""
    x, weights, _ = batch
    tiles = tiling((x, dy), weights, sums=True)
    of_x, of_dy, *of_weights = tiles.strides
    unit_x, unit_dy = tiles.units
    channels, (_, programs) = x.shape[1], tiles.grid
    known = _contiguous(*separate(stats.mean, stats.var))
    with torch.cuda.device_of(x):
        partials = torch.empty((programs, 2, channels), dtype=WIDE, device=x.device)
        triton_gradients.grad_sums[tiles.grid](
            x,
            dy,
            *known,
            weights,
            partials,
            _bits(eps),
            *tiles.extents,
            *of_x,
            *of_dy,
            *_along(of_weights),
            UNIT_X=unit_x,
            UNIT_DY=unit_dy,
            UNROLLED=tiles.loads,
            **tiles.constants,
        )
        sums = torch.empty((2, channels), dtype=WIDE, device=x.device)
        rounded = None if dtype in {None, WIDE} else torch.empty((2, channels), dtype=dtype, device=x.device)
        grid, shape = _finishing(programs, channels)
        triton_gradients.finish_grad_sums[grid](
            partials, *known, sums, rounded, _bits(eps), programs, channels, WIDE=x.dtype == WIDE, **shape
        )
    vectors: Any = sums.unbind()
    narrow: Any = vectors if rounded is None else rounded.unbind()
    return vectors, narrow


def _contiguous(*vectors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Return contiguous vectors, since the kernels take no strides of vectors; None stays None."""
    return [None if vector is None else vector.contiguous() for vector in vectors]


def _other_rows(x: torch.Tensor) -> tuple[int, int]:
    """Return the offsets of the middle row and of the last row from the first, in values."""
    return len(x) // 2 * x.stride(0), (len(x) - 1) * x.stride(0)


def _along(of_weights: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the strides of the weights along rows and positions; 0 where there are no weights."""
    return of_weights[0][:2] if of_weights else (0, 0)


def _finishing(programs: int, channels: int) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid and the constants of a kernel that finishes the partial sums of ``programs`` programs.

    Each of its own programs finishes ``CHANNELS`` channels, and reads the sums of ``PROGRAMS`` programs at a time.
    """
    along = min(256, 1 << (programs - 1).bit_length())
    across = min(64, _PARTIALS // along)
    return (-(-channels // across),), {"PROGRAMS": along, "CHANNELS": across, "num_warps": 8, "enable_fp_fusion": True}


def _bits(number: float) -> int:
    """Return the bits of a float64 as an integer, since Triton would round a Python float to float32."""
    bits: int = struct.unpack("q", struct.pack("d", number))[0]
    return bits


TRITON = Triton()
