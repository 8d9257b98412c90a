"""What the layer costs: time by backend, shape and dtype; memory for an input that outgrows the caches."""

import numpy as np

from mbn.contract import layer_dtype

from ._backends import NAMES, Subject
from ._data import batch

INPUTS = {
    "(32, 64) float32": ((32, 64), "float32"),
    "(65536, 256) float32": ((65536, 256), "float32"),
    "(65536, 256) float16": ((65536, 256), "float16"),
    "(4096, 64, 16) float32": ((4096, 64, 16), "float32"),
    "(4096, 64, 16) float64": ((4096, 64, 16), "float64"),
}


class _Layer:
    """A layer and its input on a backend."""

    param_names = ("backend", "x")

    def setup(self, name: str, description: str) -> None:
        shape, dtype = INPUTS[description]
        subject = Subject(name, dtype)
        self._wait = subject.wait
        self._x = subject.array(batch(shape, dtype))
        self._layer = subject.layer(shape[1], dtype=layer_dtype(dtype))

    def _train(self) -> None:
        self._wait((self._layer.train()(self._x), self._layer.state))

    def _evaluate(self) -> None:
        self._wait(self._layer.eval()(self._x))


class Speed(_Layer):
    """Time of a call, without compilation."""

    params = (NAMES, list(INPUTS))

    def setup(self, name: str, description: str) -> None:
        super().setup(name, description)
        self._train()
        self._evaluate()

    def time_train(self, *_: str) -> None:
        self._train()

    def time_eval(self, *_: str) -> None:
        self._evaluate()


class Masked(_Layer):
    """Time of a call in which every third place is masked; to be compared with that of all places, in Speed."""

    params = (NAMES, ["(65536, 256) float32", "(4096, 64, 16) float32"])

    def setup(self, name: str, description: str) -> None:
        super().setup(name, description)
        n, _, *length = self._x.shape
        self._mask = Subject(name).array(np.arange(n * int(np.prod(length))).reshape(n, *length) % 3 > 0)
        self.time_train()
        self.time_eval()

    def time_train(self, *_: str) -> None:
        self._wait((self._layer.train()(self._x, mask=self._mask), self._layer.state))

    def time_eval(self, *_: str) -> None:
        self._wait(self._layer.eval()(self._x, mask=self._mask))


class Gradient(_Layer):
    """Time of a pullback, and of the step that it belongs to."""

    params = (NAMES, list(INPUTS))

    def setup(self, name: str, description: str) -> None:
        super().setup(name, description)
        self._dy = self._x
        _, self._pullback = self._layer.vjp(self._x)
        self.time_pullback()
        self.time_step()

    def time_pullback(self, *_: str) -> None:
        self._wait(self._pullback(self._dy))

    def time_step(self, *_: str) -> None:
        y, pullback = self._layer.vjp(self._x)
        self._wait((y, pullback(self._dy), self._layer.state))


class Memory(_Layer):
    """Peak memory of a process that makes one call; most of what is beyond the arrays is the framework itself."""

    params = (NAMES, ["(65536, 256) float32"])

    def peakmem_train(self, *_: str) -> None:
        self._train()

    def peakmem_eval(self, *_: str) -> None:
        self._evaluate()
