"""The backend under test: a backend on one device, which tests use through the public names alone."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import mbn
from mbn.conformance import derivatives, ulp
from mbn.conformance.transforms import Transforms, transforms_of
from mbn.contract import Array, Backend, Capabilities, layer_dtype


class Target(NamedTuple):
    """A backend on one of its devices; None is the default one."""

    backend: Backend
    device: str | None

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Return the target that ``NAME`` or ``NAME:DEVICE`` names.

        Raises:
            BackendNotFoundError, BackendUnavailableError: see :func:`mbn.get_backend`.
            ValueError: the backend has no such device.
        """
        name, _, device = text.partition(":")
        target = cls(mbn.get_backend(name), device or None)
        target.array(np.zeros((1, 1), np.float32))
        return target

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities that the backend declares."""
        return self.backend.capabilities

    @property
    def transforms(self) -> Transforms:
        """The transformations of the backend's framework."""
        return transforms_of(self.backend)

    def layer(self, num_features: int | None, **arguments: Any) -> mbn.BatchNorm1d:
        """Make a layer on this backend and device."""
        return mbn.BatchNorm1d(num_features, backend=self.backend, device=self.device, **arguments)

    def array(self, host: np.ndarray) -> Array:
        """Return a new array of the backend with the values and dtype of a NumPy array."""
        return self.backend.asarray(np.array(host), device=self.device)

    def numpy(self, array: Array) -> np.ndarray:
        """Return a NumPy array of its own with the values of an array of the backend."""
        assert self.backend.owns(array), f"{type(array)} is no array of {self.backend.name}"
        return np.array(self.backend.to_numpy(array))

    def require_dtype(self, dtype: str) -> None:
        """Skip the test if the backend declares no such dtype."""
        if dtype not in self.capabilities.dtypes:
            pytest.skip(f"{self.backend.name} declares no {dtype}")

    def require(self, capability: str) -> None:
        """Skip the test if the backend does not declare a capability: masks, sizes, modules or a transformation."""
        if not getattr(self.capabilities, capability):
            pytest.skip(f"{self.backend.name} declares no {capability}")

    def require_numbers_of(self, size: float, dtype: str) -> None:
        """Skip the test if the framework's own arithmetic flushes numbers of this size, subnormal ones, to 0."""
        if self._takes_for_0(size, dtype):
            pytest.skip(f"{self.backend.name} declares {dtype}, of which its framework takes {size} for 0")

    def _takes_for_0(self, size: float, dtype: str) -> bool:
        x = self.array(np.full(1, size, dtype))
        with np.errstate(over="ignore"):
            return not self.numpy(x + x).any()

    def require_memory_orders(self) -> None:
        """Skip the test if the backend's arrays have no choice of memory orders."""
        if not self.capabilities.strided:
            pytest.skip(f"{self.backend.name} declares no memory orders")

    def arrays(self, arguments: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Return the arguments of a call as new arrays of the backend."""
        return {name: self.array(value) for name, value in arguments.items()}

    def snapshot(self, layer: mbn.BatchNorm1d) -> dict[str, np.ndarray]:
        """Return copies of all entries of a layer, for a later comparison."""
        return {key: self.numpy(value) for key, value in layer.state_dict().items()}

    def assert_output(self, y: Array, exact: ulp.Exact, dtype: str) -> None:
        """Check the type, dtype, shape and values of an output, in this order."""
        self._assert_array(y, exact, dtype, ulp.OUTPUT_BOUNDS[dtype])

    def assert_statistic(self, statistic: Array, exact: ulp.Exact, dtype: str) -> None:
        """Check the type, dtype, shape and values of a running statistic, in this order."""
        self._assert_array(statistic, exact, dtype, ulp.STATISTICS_BOUNDS[dtype])

    def assert_gradients(self, gradients: Sequence[Array], exact: derivatives.Gradients, dtype: str) -> None:
        """Check the gradients of x, which has this dtype, and of weight and bias, as many as are given."""
        for name, array, truth in zip(("dx", "dweight", "dbias"), gradients, exact[:3], strict=False):
            own_dtype = dtype if name == "dx" else layer_dtype(dtype)
            self.assert_derivative(array, truth, own_dtype, ulp.GRADIENT_BOUNDS[own_dtype], name)

    def assert_derivative(self, array: Array, exact: np.ndarray, dtype: str, bound: float, name: str = "it") -> None:
        """Check the type, dtype, shape and values of a derivative, in this order."""
        host = self.numpy(array)
        assert host.dtype.name == dtype, f"dtype of {name} is {host.dtype}, not {dtype}"
        assert host.shape == exact.shape, f"shape of {name} is {host.shape}, not {exact.shape}"
        error = ulp.relative_error(host, exact)
        assert error <= bound, f"{name} is {error:.3g} off, relatively; {bound:.3g} is allowed"

    def _assert_array(self, array: Array, exact: ulp.Exact, dtype: str, bound: float) -> None:
        host = self.numpy(array)
        assert host.dtype.name == dtype, f"dtype is {host.dtype}, not {dtype}"
        assert host.shape == exact.hi.shape, f"shape is {host.shape}, not {exact.hi.shape}"
        least = float(ml_dtypes.finfo(dtype).smallest_normal)
        is_0 = (host == 0) & (np.abs(exact.hi) < least)
        if is_0.any() and self._takes_for_0(least / 2, dtype):
            exact = ulp.Exact(np.where(is_0, 0, exact.hi), np.where(is_0, 0, exact.lo), exact.magnitude)
        error = ulp.error(host, exact, dtype)
        assert error <= bound, f"{error:.3g} ulp off; {bound} are allowed"


def strides(array: Array) -> tuple[int, ...]:
    """Return the strides of an array: an attribute in most frameworks, a method in Torch."""
    return tuple(array.stride() if hasattr(array, "stride") else array.strides)


def assert_same(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> None:
    """Check that two snapshots of a layer have the same bits."""
    assert list(before) == list(after)
    for key, value in before.items():
        assert value.dtype == after[key].dtype, f"{key} changed its dtype"
        np.testing.assert_array_equal(after[key], value, err_msg=f"{key} changed", strict=True)


def configured(layer: mbn.BatchNorm1d, seed: int) -> mbn.BatchNorm1d:
    """Give a layer parameters and statistics other than the initial ones, and return the layer."""
    generator = np.random.default_rng(seed)
    for key, value in layer.state_dict().items():
        if key == "num_batches_tracked":
            layer.num_batches_tracked = 3
        else:
            drawn = generator.uniform(0.5, 2.0, size=tuple(value.shape))
            setattr(layer, key, drawn if key in {"weight", "running_var"} else drawn - 1)
    return layer
