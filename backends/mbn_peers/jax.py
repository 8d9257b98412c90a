"""JAX: a step of mbn's layer, compiled as a whole, with parameters and state passed through it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import jax

from mbn.bench import subjects
from mbn.bench.subjects import Call
from mbn.bench.workloads import Workload
from mbn.contract import Backend


class Layer(subjects.Layer):
    """mbn's layer on JAX."""

    compiles_for_each_shape: ClassVar[bool] = True

    def __init__(self, backend: Backend, workload: Workload, device: str | None) -> None:
        super().__init__(backend, workload, device)
        self._steps = Steps(self.layer.apply, self.masks)

    def step(self, mode: str) -> Call:
        dy = self.dy if mode == "backward" else None
        return self._steps.call(mode, self.layer.params, self.layer.state, self.x, dy)

    def wait(self, result: Any) -> Any:
        return jax.block_until_ready(result)


class Steps:
    """The compiled steps of a pure function, ``forward(params, state, x, *, training) -> (y, state)``."""

    def __init__(self, forward: Callable[..., tuple[Any, Any]], constants: Mapping[str, Any]) -> None:
        def backward(params: Any, state: Any, x: Any, dy: Any, **constants: Any) -> tuple[Any, ...]:
            def step(params: Any, x: Any) -> tuple[Any, Any]:
                return forward(params, state, x, training=True, **constants)

            y, pullback, state = jax.vjp(step, params, x, has_aux=True)
            return y, *pullback(dy), state

        self._constants = constants
        self._steps = {
            "train": jax.jit(partial(forward, training=True)),
            "eval": jax.jit(partial(forward, training=False)),
            "backward": jax.jit(backward),
        }

    def call(self, mode: str, params: Any, state: Any, x: Any, dy: Any) -> Call:
        """Return the call of a mode, which waits for all of its outputs."""
        step, constants = self._steps[mode], self._constants
        arguments = (params, state, x) if dy is None else (params, state, x, dy)
        return lambda: jax.block_until_ready(step(*arguments, **constants))
