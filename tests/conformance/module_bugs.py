"""Bugs in the modules that are made of layers."""

from contextlib import nullcontext
from time import sleep
from typing import Any

from toy import Toy, ToyModule

from mbn.contract import Array, Backend


class StatisticsNotShared(Toy):
    def write(self, before: Any, after: Any) -> Any:
        return after


class ParametersWrittenBeforeStatistics(Toy):
    def parameter(self, value: Array, current: Array | None) -> Array:
        return value if current is None else super().write((current,), (value,))[0]


class FirstOfSeveralWritten(Toy):
    def write(self, before: Any, after: Any) -> Any:
        pairs = list(zip(before, after, strict=True))
        first = next((new for old, new in pairs if old is not new), None)
        return tuple(new if new is first or old is None else old for old, new in pairs)


class WrittenInSteps(Toy):
    def write(self, before: Any, after: Any) -> Any:
        sleep(0)
        return super().write(before, after)

    def copy(self, x: Array) -> Array:
        sleep(0)
        return super().copy(x)

    def writing(self) -> Any:
        return nullcontext()


class DeclaresModulesAndHasNone(Toy):
    def module(self, *_: Any) -> Any:
        return Backend.module(self, *_)


class ModuleInTrainingForEver(Toy):
    def module(self, *given: Any) -> Any:
        module = super().module(*given)
        module.eval = module.train
        return module


class ModuleBeginsInTraining(Toy):
    def module(self, *given: Any) -> Any:
        module = super().module(*given)
        module.train()
        return module


class ModuleIgnoresMasks(Toy):
    def module(self, *given: Any) -> Any:
        module = super().module(*given)
        return Unmasked(self, module.layer, lambda *_: None)


class Unmasked(ToyModule):
    def __call__(self, x: Any, **_: Any) -> Array:
        return super().__call__(x)


BUGS = [
    (StatisticsNotShared, "test_module_and_layer_share_their_arrays"),
    (ParametersWrittenBeforeStatistics, "test_interrupted_change_is_complete_or_absent"),
    (FirstOfSeveralWritten, "test_params_and_state_are_set_together"),
    (WrittenInSteps, "test_concurrent_reader_sees_no_mixed_state"),
    (DeclaresModulesAndHasNone, "test_module_computes_and_learns_as_the_layer_does", "TypeError: toy has no modules"),
    (ModuleInTrainingForEver, "test_module_computes_and_learns_as_the_layer_does"),
    (ModuleBeginsInTraining, "test_module_starts_in_the_mode_of_the_layer"),
    (ModuleIgnoresMasks, "test_module_passes_masks_to_the_layer"),
]
"""Wrong backends, each with the test that must fail on it."""
