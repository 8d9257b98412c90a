"""A toy backend, correct but for one planted bug, and a run of the suite against it.

``python toy.py none REPORT.json`` runs the whole suite, which has to pass; ``python toy.py BUG REPORT.json`` runs the
test that has to name the bug.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import Phase, settings

import mbn
from mbn.conformance.runner import run
from mbn.contract import Array, Backend, Capabilities, Moments


class Toy(Backend):
    """The shortest correct backend over NumPy arrays: everything in extended precision, rounded once."""

    name = "toy"
    version = "1"
    capabilities = Capabilities(frozenset({"float16", "float32"}), ("cpu",), mutable=True, strided=True)

    def owns(self, x: object) -> bool:
        return isinstance(x, np.ndarray | np.generic) and not isinstance(x, np.ma.MaskedArray)

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> Array:
        if device not in (None, "cpu"):
            message = f"the toy's only device is 'cpu', not {device!r}"
            raise ValueError(message)
        return np.asarray(x, dtype)

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.asarray(x)

    def device(self, x: Array) -> Any:  # noqa: ARG002 - the contract's signature
        return "cpu"

    def moments(self, x: Array) -> Moments:
        d = x.astype(np.float64)
        mean = d.mean(axis=over(x))
        return Moments(x.size // x.shape[1], mean, ((d - column(mean, x)) ** 2).sum(axis=over(x)))

    def normalize(self, x: Array, mean: Array, var: Array, weight: Any, bias: Any, eps: float) -> Array:
        spread = var.astype(np.float64) + eps
        scale = np.divide(1, np.sqrt(spread), where=spread != 0, out=np.zeros_like(spread))
        y = (x.astype(np.float64) - column(mean.astype(np.float64), x)) * column(scale, x)
        y = y * column(1.0 if weight is None else weight, x) + column(0.0 if bias is None else bias, x)
        return y.astype(x.dtype, order="K")

    def lerp(self, start: Array, end: Array, weight: Any) -> Array:
        return ((1 - weight) * start.astype(np.float64) + weight * end).astype(start.dtype)

    def reciprocal(self, count: Array) -> Array:
        return 1 / count


def over(x: Array) -> tuple[int, ...]:
    return (0, 2)[: x.ndim - 1]


def column(vector: Any, x: Array) -> Array:
    return np.reshape(vector, (-1,) + (1,) * (x.ndim - 2))


class BiasedRunningVariance(Toy):
    def batch_norm(self, *args: Any, correction: int, **settings: Any) -> Any:  # noqa: ARG002 - the bug
        return super().batch_norm(*args, correction=0, **settings)


class UnbiasedOutput(Toy):
    def normalize(self, x: Array, mean: Array, var: Array, *rest: Any) -> Array:
        n = x.size // x.shape[1]
        return super().normalize(x, mean, var * n / max(n - 1, 1), *rest)


class EpsOutsideTheRoot(Toy):
    def normalize(self, x: Array, mean: Array, var: Array, weight: Any, bias: Any, eps: float) -> Array:
        return super().normalize(x, mean, (np.sqrt(var.astype(np.float64)) + eps) ** 2, weight, bias, 0.0)


class MomentumInverted(Toy):
    def lerp(self, start: Array, end: Array, weight: Any) -> Array:
        return super().lerp(start, end, 1 - weight)


class MomentumNoneIsATenth(Toy):
    def reciprocal(self, count: Array) -> Array:  # noqa: ARG002 - the bug
        return np.float64(0.1)


class MeanOfSquaresMinusSquareOfMean(Toy):
    def moments(self, x: Array) -> Moments:
        count, mean, _ = super().moments(x)
        squares = (x.astype(np.float32) ** 2).mean(axis=over(x))
        return Moments(count, mean, (squares - mean.astype(np.float32) ** 2) * count)


class NarrowSums(Toy):
    def moments(self, x: Array) -> Moments:
        d = x.astype(np.float32)
        mean = d.mean(axis=over(x))
        return Moments(x.size // x.shape[1], mean, ((d - column(mean, x)) ** 2).sum(axis=over(x)))


class ScaleAndShift(Toy):
    def normalize(self, x: Array, mean: Array, var: Array, weight: Any, bias: Any, eps: float) -> Array:
        scale = ((1.0 if weight is None else weight) / np.sqrt(var + eps)).astype(np.float32)
        shift = ((0.0 if bias is None else bias) - mean * scale).astype(np.float32)
        return (x * column(scale, x) + column(shift, x)).astype(x.dtype)


class HalfArithmetic(Toy):
    def normalize(self, x: Array, mean: Array, var: Array, weight: Any, bias: Any, eps: float) -> Array:
        if x.dtype != np.float16:
            return super().normalize(x, mean, var, weight, bias, eps)
        centred = x - column(mean, x).astype(np.float16)
        return super().normalize(centred, 0 * mean, var, weight, bias, eps)


class InputMutated(Toy):
    def normalize(self, x: Array, *rest: Any) -> Array:
        y = super().normalize(x, *rest)
        if x.flags.writeable and x.size:
            x[0] = 0
        return y


class StateMutated(Toy):
    def lerp(self, start: Array, end: Array, weight: Any) -> Array:
        start[...] = super().lerp(start, end, weight)
        return start


class WrongDtypeOut(Toy):
    def normalize(self, x: Array, *rest: Any) -> Array:
        return super().normalize(x, *rest).astype(np.float64)


class StatisticsWidened(Toy):
    def lerp(self, start: Array, end: Array, weight: Any) -> Array:
        return super().lerp(start.astype(np.float64), end, weight)


class StateUpdatedInEvaluation(Toy):
    def batch_norm(self, x: Array, params: Any, state: Any, *, training: bool, **settings: Any) -> Any:
        y, _ = super().batch_norm(x, params, state, training=training, **settings)
        return y, super().batch_norm(x, params, state, training=True, **settings)[1]


class BatchesNotCounted(Toy):
    def batch_norm(self, x: Array, params: Any, state: Any, **settings: Any) -> Any:
        y, new = super().batch_norm(x, params, state, **settings)
        return y, new._replace(num_batches_tracked=state.num_batches_tracked)


class NanTakenForZeroVariance(Toy):
    def normalize(self, x: Array, mean: Array, var: Array, *rest: Any) -> Array:
        return super().normalize(np.nan_to_num(x), np.nan_to_num(mean), np.nan_to_num(var), *rest)


class ZeroVarianceDivided(Toy):
    def normalize(self, x: Array, mean: Array, var: Array, weight: Any, bias: Any, eps: float) -> Array:
        with np.errstate(all="ignore"):
            invstd = 1 / np.sqrt(var + eps)
            unit = (x - column(mean, x)) * column(invstd, x)
        return super().normalize(unit, 0 * mean, 0 * var + 1, weight, bias, 0.0).astype(x.dtype)


class ChannelsOfALastAxis(Toy):
    def moments(self, x: Array) -> Moments:
        return super().moments(x[..., :1] if x.ndim == 3 else x)


class MemoryOrderLost(Toy):
    def normalize(self, x: Array, *rest: Any) -> Array:
        return np.ascontiguousarray(super().normalize(x, *rest))


class RandomBits(Toy):
    def normalize(self, x: Array, *rest: Any) -> Array:
        y = super().normalize(x, *rest)
        noise = np.random.default_rng().choice(np.array([0, 1e-7]), y.shape)
        return (y * (1 + noise)).astype(y.dtype, order="K")


class DeclaresMoreThanItDoes(Toy):
    capabilities = Toy.capabilities._replace(dtypes=frozenset({"float16", "float32", "float64"}))

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> Array:
        array = super().asarray(x, dtype, device)
        return array.astype(np.float32) if array.dtype == np.float64 else array


class AnyDeviceWillDo(Toy):
    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> Array:  # noqa: ARG002 - the bug
        return super().asarray(x, dtype)


BUGS: dict[str, tuple[type[Toy], str]] = {
    bug.__name__: (bug, named_by)
    for bug, named_by in [
        (BiasedRunningVariance, "test_running_var_is_unbiased"),
        (UnbiasedOutput, "test_output_uses_the_biased_variance"),
        (EpsOutsideTheRoot, "test_eps_is_added_to_the_variance"),
        (MomentumInverted, "test_momentum_weighs_the_new_value"),
        (MomentumNoneIsATenth, "test_momentum_none_averages_all_batches"),
        (MeanOfSquaresMinusSquareOfMean, "test_float32_with_a_large_mean"),
        (NarrowSums, "test_float32_with_a_large_mean"),
        (ScaleAndShift, "test_float32_with_a_large_mean"),
        (HalfArithmetic, "test_halves_are_computed_in_float32"),
        (InputMutated, "test_nothing_given_is_written_to"),
        (StateMutated, "test_nothing_given_is_written_to"),
        (WrongDtypeOut, "test_output_has_the_dtype_of_the_input"),
        (StatisticsWidened, "test_statistics_keep_the_dtype_of_the_layer"),
        (StateUpdatedInEvaluation, "test_evaluation_changes_nothing"),
        (BatchesNotCounted, "test_batches_are_counted_in_training_alone"),
        (NanTakenForZeroVariance, "test_nan_stays_in_its_channel"),
        (ZeroVarianceDivided, "test_zero_variance_and_eps_0_give_the_bias"),
        (ChannelsOfALastAxis, "test_sequences_example"),
        (MemoryOrderLost, "test_output_has_the_memory_order_of_the_input"),
        (RandomBits, "test_same_bits_on_every_run"),
        (DeclaresMoreThanItDoes, "test_output_has_the_dtype_of_the_input"),
        (AnyDeviceWillDo, "test_unknown_device_is_refused"),
    ]
}
"""Each bug, and the test of the suite that names it."""


if __name__ == "__main__":
    planted, report = sys.argv[1:]
    # What fails is named all the same; the smallest example that fails is of no interest here.
    settings.register_profile("planted", deadline=None, derandomize=True, max_examples=20, phases=[Phase.generate])
    bug, named_by = BUGS.get(planted, (Toy, "test"))
    mbn.register_backend("toy", bug)
    sys.exit(run("toy", json=Path(report), pytest_args=["--hypothesis-profile", "planted", "-k", named_by]))
