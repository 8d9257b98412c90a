"""The storage of a layer: its arrays, and the backend and device that they are on.

A load or move that fails or is interrupted must leave everything as it was, and no thread may read half an update. Both
follow from one rule: a change first makes another storage, completely, which the layer then takes over in one
assignment. A storage never changes, so that copies of a layer may share it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np

from mbn import checks, registry
from mbn.contract import Array, Backend, Params, Settings, State, dtype_name
from mbn.convert import asarray, device_of, owned, received, to_numpy
from mbn.replicas import Membership
from mbn.state.keys import IncompatibleKeys, batch_norms, compare_keys, to_dict


class Storage(NamedTuple):
    """The arrays of a layer, with their backend and device, and the settings that determine which arrays there are."""

    backend: Backend
    """NumPy's until a backend has been chosen."""
    device: Any
    settings: Settings
    affine: bool
    has_bias: bool
    """With ``affine``."""
    track_running_stats: bool
    is_bound: bool = False
    """Whether a backend has been chosen."""
    group: Membership | None = None
    """The layer's membership in a group of replicas."""
    is_shared: bool = False
    """Whether a module shares the statistics, which are then written to in place."""
    params: Params = Params(None, None)
    state: State = State(None, None, None)
    """The last field, since every step of training replaces it; see ``with_state``."""

    @property
    def num_features(self) -> int:
        """The number of channels.

        Raises:
            AttributeError: the first input has not determined it yet.
        """
        if self.settings.num_features is None:
            raise AttributeError(
                "num_features is not known yet, so there are no parameters and statistics: call the layer on an input "
                "or load a state_dict first."
            )
        return self.settings.num_features

    @property
    def entries(self) -> dict[str, Array]:
        """The arrays that there are, under torch's keys and in torch's order."""
        return to_dict(self.params, self.state)

    def with_state(self, state: State) -> "Storage":
        """Return a storage with another state, faster than ``_replace``."""
        return tuple.__new__(Storage, (*self[:-1], state))

    @classmethod
    def of_attributes(cls, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Return a layer's attributes from a pickle older than this class, with a storage instead of its parts."""
        names = {f"_{name}": name for name in cls._fields}
        own = {names[name]: value for name, value in attributes.items() if name in names}
        others = {name: value for name, value in attributes.items() if name not in names}
        return {**others, "_storage": cls(**own)}

    # Arrays and settings from outside.

    def met(self, x: Any) -> tuple[Self, Mapping[str, Array], Array]:
        """Return this storage with the backend and channels of an input, entries for it, and the input as an own array.

        A storage that has both is returned as it is, without entries.
        """
        storage, entries = self, dict[str, Array]()
        if not self.is_bound:
            backend = registry.owner_of(x)
            storage, entries = self.moved(backend, device_of(backend, x) if self.device is None else self.device)
        x = received(storage.backend, "x", x, storage.settings.dtype, storage.device)
        if storage.settings.num_features is None:
            checks.rank(x.shape, storage.settings.axis)
            storage = storage.with_features(x.shape[storage.settings.axis])
        return storage, entries, x

    def moved(
        self, backend: Backend | None, device: Any, settings: Settings | None = None
    ) -> tuple[Self, dict[str, Array]]:
        """Return a storage on a backend and a device, and copies of the entries there.

        Without a backend the storage stays unbound, and keeps the device for the backend that is chosen later.
        """
        settings = settings or self.settings
        if backend is None:
            moved = self._replace(device=device, settings=settings)
        else:
            registry.check_uncompiled("making or moving a layer")
            # An empty array yields the backend's own description of the device, or its default one, before any move.
            device = backend.device(backend.asarray(np.zeros(0, np.float32), device=device))
            moved = self._replace(backend=backend, is_bound=True, device=device, settings=settings)
        return moved, {key: moved.own(key, value) for key, value in self.entries.items()}

    def with_features(self, num_features: Any) -> Self:
        """Return a storage for a number of channels, which has no arrays yet."""
        return self._replace(settings=self.settings._replace(num_features=checks.num_features(num_features)))

    def with_features_of(self, entries: Mapping[str, Any], model: Mapping[str, Any]) -> Self:
        """Return a storage for the number of channels that entries have, which are those of a model.

        Raises:
            ValueError: the entries have no vector.
        """
        shapes = [np.shape(entries[key]) for key in ("weight", "running_mean") if key in entries]
        if not shapes or len(shapes[0]) != 1:
            message = "num_features is to come from this state_dict, but it has no weight or running_mean of (C,)."
            raise ValueError(message + batch_norms(model))
        return self.with_features(shapes[0][0])

    def own(self, name: str, value: Any, *, fill: bool = False) -> Array:
        """Return a copy of an entry on the storage's backend and device, in the dtype and shape of that entry."""
        is_count = name == "num_batches_tracked"
        return owned(
            name,
            value,
            backend=self.backend,
            shape=() if is_count else (self.num_features,),
            dtype="int64" if is_count else self.settings.dtype,
            device=self._current_device,
            fill=fill,
        )

    def taken(self, name: str, value: Any, *, fill: bool = False) -> Array:
        """Return a checked copy of an entry from outside, as ``own`` does; a variance must not be negative."""
        array = self.own(name, value, fill=fill)
        if name == "running_var":
            checks.variance(self.backend, array)
        return array

    def loading(
        self,
        entries: Mapping[str, Any],
        prefix: str,
        *,
        model: Mapping[str, Any],
        strict: bool = True,
        version: int | None = None,
    ) -> tuple[dict[str, Array], IncompatibleKeys]:
        """Return copies of the entries of a state_dict on the storage's backend, and the keys that do not fit.

        ``prefix`` and ``model``, the state_dict that the entries are part of, are for messages.

        Raises:
            TypeError, ValueError: see :meth:`mbn.BatchNorm1d.load_state_dict`.
        """
        expected = self.entries
        incompatible = compare_keys(expected, entries, strict=strict, version=version, model=model, prefix=prefix)
        try:
            taken = {key: self.taken(key, _integral(key, entries[key])) for key in expected if key in entries}
        except (TypeError, ValueError) as error:
            if not prefix or type(error) not in (TypeError, ValueError):
                raise
            message = f"{prefix}{error}"  # the error begins with the name of the entry
            raise type(error)(message) from error
        return taken, incompatible

    def adopting(self, params: Params, state: State) -> Self:
        """Return a storage of these arrays themselves, and of their device and dtype.

        A module that shares them may have removed or added some.
        """
        if state.running_mean is None:
            state = State(None, None, None)
        settings, device = self.settings, self.device
        for first in list(to_dict(params, state).values())[:1]:
            settings, device = settings._replace(dtype=dtype_name(first.dtype)), self.backend.device(first)
        return self._replace(
            device=device,
            settings=settings,
            affine=params.weight is not None,
            has_bias=self.has_bias if params.weight is None else params.bias is not None,
            track_running_stats=state.running_mean is not None,
            params=params,
            state=state,
        )

    def device_on(self, target: Backend) -> Any:
        """Return the device that an array on this storage's device has after conversion to another backend."""
        return target.device(asarray(self.backend.asarray([0.0], "float32", self.device), backend=target))

    # Initial values: of lists and numbers, since torch.compile cannot follow NumPy arrays.

    def initial_parameters(self) -> dict[str, Array]:
        """Return a weight of 1 and a bias of 0, as far as the layer has them."""
        parameters = {}
        if self.affine:
            parameters["weight"] = self._constant([1.0] * self.num_features)
        if self.affine and self.has_bias:
            parameters["bias"] = self._constant([0.0] * self.num_features)
        return parameters

    def initial_statistics(self) -> dict[str, Array]:
        """Return a running mean of 0, a running variance of 1 and a count of 0, if the layer has them."""
        if not self.track_running_stats:
            return {}
        return {
            "running_mean": self._constant([0.0] * self.num_features),
            "running_var": self._constant([1.0] * self.num_features),
            "num_batches_tracked": self._constant(0, "int64"),
        }

    def _constant(self, values: Any, dtype: str | None = None) -> Array:
        return self.backend.asarray(values, dtype or self.settings.dtype, self._current_device)

    @property
    def _current_device(self) -> Any:
        """The device of the arrays; None until a backend has been chosen, since ``device`` is for that backend."""
        return self.device if self.is_bound else None


def _integral(name: str, value: Any) -> Any:
    """Return an entry as it is; but a floating count of batches, as of converted models, as an int if it is one."""
    is_floating = dtype_name(getattr(value, "dtype", "int64")).startswith(("float", "bfloat"))
    if name != "num_batches_tracked" or not is_floating:
        return value
    number = np.asarray(to_numpy(value)).astype(float)
    return int(number) if number.shape == () and number.item().is_integer() else value
