"""JAX: a step of mbn's layer in one compiled function, with parameters and state passed through it.

JAX has no events on a device, so many calls are queued, and the clock stops after the last.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import jax

from mbn.commands.bench import subjects
from mbn.commands.bench.calls import Call
from mbn.commands.bench.clocks import Clock, HostClock, QueueClock
from mbn.commands.bench.subjects import Subject
from mbn.commands.bench.workloads import FORWARD, PULLBACK, Workload
from mbn.contract import Backend


class JaxSubject(Subject):
    """A subject on JAX: its steps are compiled for each shape, and computed while Python goes on."""

    compiles_for_each_shape: ClassVar[bool] = True

    @property
    def clock(self) -> Clock:  # type: ignore[override]  # it depends on x
        return HostClock() if self.x.devices().pop().platform == "cpu" else QueueClock(jax.block_until_ready)

    def wait(self, result: Any) -> Any:
        return jax.block_until_ready(result)


class Layer(JaxSubject, subjects.Layer):
    """mbn's layer on JAX."""

    def __init__(self, backend: Backend, workload: Workload, device: str | None) -> None:
        super().__init__(backend, workload, device)
        self._steps = Steps(self.layer.apply, self.masks)

    def call(self, mode: str) -> Call:
        dy = None if mode in FORWARD else self.dy
        return self._steps.call(mode, self.layer.params, self.layer.state, self.x, dy)


class Steps:
    """The compiled steps of a pure function, ``forward(params, state, x, *, training) -> (y, state)``."""

    def __init__(self, forward: Callable[..., tuple[Any, Any]], constants: Mapping[str, Any]) -> None:
        def linearised(params: Any, state: Any, x: Any, **constants: Any) -> tuple[Any, ...]:
            def step(params: Any, x: Any) -> tuple[Any, Any]:
                return forward(params, state, x, training=True, **constants)

            return jax.vjp(step, params, x, has_aux=True)

        def backward(params: Any, state: Any, x: Any, dy: Any, **constants: Any) -> tuple[Any, ...]:
            y, pullback, state = linearised(params, state, x, **constants)
            return y, *pullback(dy), state

        self._constants = constants
        self._steps = {
            "train": jax.jit(partial(forward, training=True)),
            "eval": jax.jit(partial(forward, training=False)),
            "backward": jax.jit(backward),
        }
        self._residuals = jax.jit(lambda *arguments, **constants: linearised(*arguments, **constants)[1])
        self._pullback = jax.jit(lambda pullback, dy: pullback(dy))

    def call(self, mode: str, params: Any, state: Any, x: Any, dy: Any) -> Call:
        """Return the call of a mode, which does not wait for its outputs."""
        constants = self._constants
        if mode == PULLBACK:
            pull, residuals = self._pullback, self._residuals(params, state, x, **constants)
            return lambda: pull(residuals, dy)
        step = self._steps[mode]
        arguments = (params, state, x) if dy is None else (params, state, x, dy)
        return lambda: step(*arguments, **constants)
