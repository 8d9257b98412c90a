"""What a layer holds, and where: its arrays, the backend and device that they are on, and how they travel.

A load or move that fails or is interrupted must leave everything as it was, and two threads must never see half an
update. Both follow from one rule: whatever is new is made completely first and stored in one assignment. Only what
somebody else holds is written to, since that one has to see it: parameters that a framework's optimizers train, and the
statistics that are shared with a module. They are written to all at once, and back if anything fails.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from operator import is_
from os import PathLike
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Self, TypeVar, overload

import numpy as np

from mbn import checks, registry
from mbn.contract import Array, Backend, dtype_name
from mbn.convert import asarray, owned, received, to_numpy
from mbn.state import IncompatibleKeys, Params, Settings, State, batch_norms, compare_keys, to_dict, versioned

_introduced: set[tuple[type, str]] = set()
"""The classes of layers, and the names of the backends that know of them."""


T = TypeVar("T")


class Fixed(Generic[T]):
    """Something that a layer is made with, as an attribute: it can be read, and setting it says what to do instead."""

    def __init__(self, read: Callable[[Any], T], doc: str, instead: str) -> None:
        self._read, self._instead, self.__doc__ = read, instead, doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, layer: None, owner: type) -> Self: ...
    @overload
    def __get__(self, layer: object, owner: type) -> T: ...
    def __get__(self, layer: Any, owner: type) -> Any:
        return self if layer is None else self._read(layer)

    def __set__(self, layer: object, value: Any) -> NoReturn:
        message = f"{self._name} of a layer can't be set. {self._instead}."
        raise AttributeError(message)

    def __delete__(self, layer: object) -> None:
        message = f"{self._name} of a layer can't be deleted."
        raise AttributeError(message)


if TYPE_CHECKING:
    of_class = classmethod
else:

    class of_class(classmethod):  # noqa: N801 - a decorator
        """A method that makes a layer: called on one that exists it would leave that as it is, so it is refused."""

        def __get__(self, layer: Any, owner: type | None = None) -> Any:
            return super().__get__(layer, owner) if layer is None else partial(_refuse, self.__func__.__name__)


def _refuse(name: str, *_: Any, **__: Any) -> NoReturn:
    message = (
        f"{name}() makes a new layer and does not change this one: bn = mbn.BatchNorm1d.{name}(path). For a layer that "
        "exists: bn.load_state_dict(mbn.BatchNorm1d.load(path).state_dict())."
    )
    raise TypeError(message)


def _counted(key: str, value: Any) -> Any:
    """Return an entry; of a count that has become floating with the rest of a model, the integer, if it is whole."""
    if key != "num_batches_tracked" or not dtype_name(getattr(value, "dtype", "int64")).startswith(("float", "bfloat")):
        return value
    number = np.asarray(to_numpy(value)).astype(float)
    return int(number) if number.shape == () and number.item().is_integer() else value


class _Entry:
    """A parameter or statistic as an attribute: reading gives the live array, setting stores a checked copy."""

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self._group = "_params" if name in Params._fields else "_state"

    def __get__(self, layer: "Storage | None", owner: type) -> Any:
        if layer is None:
            return self
        layer._channels()
        return getattr(getattr(layer, self._group), self._name)

    def __set__(self, layer: "Storage", value: Any) -> None:
        if self.__get__(layer, type(layer)) is None:
            message = f"this layer has no {self._name} to set: {layer!r}."
            raise ValueError(message)
        if value is None:
            message = (
                f"{self._name} is an array or a number, not None (NoneType): what a layer has is said when it is made, "
                "by affine, bias and track_running_stats."
            )
            raise TypeError(message)
        layer._store({self._name: layer._taken(self._name, value, fill=True)})

    def __delete__(self, layer: "Storage") -> None:
        message = (
            f"{self._name} of a layer can't be deleted: what a layer has is said when it is made, by affine, bias and "
            "track_running_stats."
        )
        raise AttributeError(message)


class Storage:
    """The part of :class:`mbn.BatchNorm1d` that keeps its parameters and statistics."""

    weight = _Entry("The scale, (C,), or None. Set it to an array or to one number for all channels.")
    bias = _Entry("The shift, (C,), or None. Set it to an array or to one number for all channels.")
    running_mean = _Entry("The running mean, (C,), or None. Set it to an array or to one number for all channels.")
    running_var = _Entry("The running variance, (C,), or None. Set it to an array or to one number for all channels.")
    num_batches_tracked = _Entry("The number of batches trained on, an integer scalar, or None. Settable.")

    num_features = Fixed[int | None](
        lambda layer: layer._settings.num_features,
        "The number of channels, or None while the first input has yet to tell.",
        "Make another layer: BatchNorm1d(num_features)",
    )
    dtype = Fixed[str](
        lambda layer: layer._settings.dtype,
        "The name of the dtype of parameters and statistics: float32 or float64.",
        "Move the layer: bn.to(dtype=...)",
    )
    device = Fixed[Any](
        lambda layer: layer._device,
        "Where parameters and statistics are, in the backend's words, or None where that binds nobody.",
        "Move the layer: bn.to(device=...)",
    )
    backend = Fixed[str | None](
        lambda layer: layer._backend.name if layer._is_bound else None,
        "The name of the backend, or None while the first input has yet to choose it.",
        "Move the layer: bn.to(backend=...)",
    )
    params = Fixed[Params](
        lambda layer: layer._channels() and layer._params,
        "Weight and bias, for :meth:`apply`.",
        "Set its weight and bias, or load_state_dict()",
    )
    state = Fixed[State](
        lambda layer: layer._channels() and layer._state,
        "The running statistics and the count of batches, for :meth:`apply`.",
        "Set its running_mean, running_var and num_batches_tracked, or load_state_dict()",
    )
    affine = Fixed[bool](
        lambda layer: layer._affine,
        "Whether there is a weight.",
        "Make another layer, BatchNorm1d(..., affine=...), and load what fits: "
        "load_state_dict(bn.state_dict(), strict=False)",
    )
    track_running_stats = Fixed[bool](
        lambda layer: layer._track_running_stats,
        "Whether there are running statistics.",
        "freeze() keeps the running statistics as they are, and train() normalises by those of each batch; to be "
        "without them, make another layer, BatchNorm1d(..., track_running_stats=False), and load what fits: "
        "load_state_dict(bn.state_dict(), strict=False)",
    )

    _settings: Settings
    _affine: bool
    _track_running_stats: bool
    _training: bool
    _has_bias: bool
    _params: Params
    _state: State
    _is_bound: bool
    """Whether a backend has been chosen; until then the arrays are NumPy's."""
    _is_shared: bool
    """Whether a module shares the statistics, which are then written to in place."""
    _backend: Backend
    _device: Any

    def parameters(self) -> Iterator[Array]:
        """Iterate over the weight and the bias, as far as there are any."""
        return (parameter for parameter in self.params if parameter is not None)

    def reset_parameters(self) -> None:
        """Set the weight to 1 and the bias to 0, and reset the running statistics."""
        parameters = {}
        if self.affine:
            parameters["weight"] = self._constant([1.0] * self._channels())
        if self.affine and self._has_bias:
            parameters["bias"] = self._constant([0.0] * self._channels())
        self._store({**parameters, **self._initial_statistics()})

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1 and the count of batches to 0."""
        self._store(self._initial_statistics())

    def _initial_statistics(self) -> dict[str, Array]:
        if not self.track_running_stats:
            return {}
        return {
            "running_mean": self._constant([0.0] * self._channels()),
            "running_var": self._constant([1.0] * self._channels()),
            "num_batches_tracked": self._constant(0, "int64"),
        }

    def _constant(self, values: Any, dtype: str | None = None) -> Array:
        """Return lists or a number as a new array. torch.compile follows those, and no arrays of NumPy."""
        return self._backend.asarray(values, dtype or self._settings.dtype, self._device if self._is_bound else None)

    def state_dict(self, *, backend: str | Backend | None = None) -> OrderedDict[str, Array]:
        """Return copies of the parameters and statistics under torch's keys, in torch's order and with its version.

        Args:
            backend: whose arrays they are to be; by default the layer's own. ``torch.nn.BatchNorm1d`` loads Torch's.

        Raises:
            BackendNotFoundError, BackendUnavailableError: see :func:`mbn.get_backend`.
        """
        self._channels()
        with self._backend.writing():
            held = vars(self).copy()  # as the layer is at one moment, whatever other threads do to it
            arrays = to_dict(held["_params"], held["_state"])
            entries = {key: held["_backend"].copy(value) for key, value in arrays.items()}
        if backend is not None:
            entries = {key: asarray(value, backend=backend) for key, value in entries.items()}
        return versioned(entries)

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,  # noqa: FBT001, FBT002 - torch's signature
        *,
        prefix: str = "",
    ) -> IncompatibleKeys:
        """Take over copies of the entries of a state_dict, from this class or from ``torch.nn.BatchNorm1d``.

        Args:
            state_dict: arrays of any known framework by torch's keys. A layer with ``num_features=None`` takes its
                number of features from them. As in torch, ``num_batches_tracked`` may be missing and is then kept,
                unless the state_dict says that it is of version 2.
            strict: refuse missing and unexpected keys; otherwise load what fits and return the rest.
            prefix: what comes before ``weight`` in the entries of this layer, where they are those of a whole model:
                ``"module.encoder.bn1."``. The last point may be left out. Dictionaries of state_dicts are looked into.

        Raises:
            TypeError: not a mapping, or entries that are not real numbers.
            ValueError: missing, unexpected or misshapen entries. The layer is unchanged.
        """
        if not isinstance(state_dict, Mapping):
            message = f"state_dict is a mapping from names to arrays, not {type(state_dict).__name__}."
            if isinstance(state_dict, str | PathLike):
                message += (
                    " From a file: mbn.BatchNorm1d.from_checkpoint(path, prefix), or .load(path) of one of save()."
                )
            elif hasattr(state_dict, "state_dict"):
                message += " Give what its state_dict() returns."
            raise TypeError(message)
        strict, entries, version, start = checks.flag("strict", strict), state_dict, None, ""
        if prefix:
            from mbn.state import checkpoints  # noqa: PLC0415 - for whole models

            entries, version, start = checkpoints.under(state_dict, prefix)
        return self._load(entries, start, model=state_dict, strict=strict, version=version)

    def _load(
        self,
        entries: Mapping[str, Any],
        prefix: str,
        *,
        model: Mapping[str, Any],
        strict: bool = True,
        version: int | None = None,
    ) -> IncompatibleKeys:
        """Take over copies of entries, which messages name by a prefix and as part of a model."""
        registry.check_uncompiled("loading a layer")
        trial = copy.copy(self)
        if trial.num_features is None:
            shapes = [np.shape(entries[key]) for key in ("weight", "running_mean") if key in entries]
            if not shapes or len(shapes[0]) != 1:
                message = "num_features is to come from this state_dict, but it has no weight or running_mean of (C,)."
                raise ValueError(message + batch_norms(model))
            trial._learn_features(shapes[0][0])
        expected = to_dict(trial.params, trial.state)
        incompatible = compare_keys(expected, entries, strict=strict, version=version, model=model, prefix=prefix)
        try:
            taken = {key: trial._taken(key, _counted(key, entries[key])) for key in expected if key in entries}
        except (TypeError, ValueError) as error:
            if not prefix or type(error) not in (TypeError, ValueError):
                raise
            message = f"{prefix}{error}"  # which begins with the name of the entry
            raise type(error)(message) from error
        self._become(trial, taken)
        return incompatible

    def to(self, device: Any = None, dtype: Any = None, *, backend: str | Backend | None = None) -> Self:
        """Move the layer with its state to another backend, device or dtype; return it.

        By position a device comes first, or a dtype alone, as in torch. Without a device the layer stays on the GPU
        where it is if the other backend's framework uses that too, and is on the default device of the backend
        otherwise.

        Raises:
            BackendNotFoundError, BackendUnavailableError: see :func:`mbn.get_backend`.
            TypeError, ValueError: the backend has no such dtype or device. The layer is unchanged.
        """
        registry.check_uncompiled("moving a layer")
        checks.device_index(device)
        if dtype is None and checks.is_dtype(device):
            device, dtype = None, device
        elif isinstance(device, Backend) or (isinstance(device, str) and device in registry.list_backends()):
            message = f"to() takes a device or dtype by position, and a backend by name: bn.to(backend={device!r})."
            raise TypeError(message)
        target = self._backend if backend is None else registry.get_backend(backend)
        if device is None and target is self._backend:
            device = self._device
        elif device is None and self._is_bound:
            device = self._device_on(target)
        settings = self._settings if dtype is None else self._settings._replace(dtype=checks.statistics_dtype(dtype))
        with self._backend.writing():  # so that all arrays are of one moment
            trial = copy.copy(self)
            trial._settings = settings
            if self._is_bound or backend is not None:
                trial._bind(target, device)
            else:
                trial._device = device
                trial._own_all()
            arrays, before = (*trial._params, *trial._state), (*self._params, *self._state)
            trial._is_shared = self._is_shared and all(map(is_, arrays, before))
            self._become(trial)
        return self

    def _device_on(self, target: Backend) -> Any:
        """Return where an array on the layer's device lies once it has come to another backend."""
        return target.device(asarray(self._backend.asarray([0.0], "float32", self._device), backend=target))

    def _meet(self, x: Any) -> Array:
        """Return an input as an array of the layer's backend; take from it what the layer does not know yet."""
        if not self._is_bound:
            backend = registry.owner_of(x)
            self._bind(backend, backend.device(x) if self._device is None else self._device)
        x = received(self._backend, "x", x, self._settings.dtype, self._device)
        if self.num_features is None:
            checks.rank(x.shape, self._settings.axis)
            self._learn_features(x.shape[self._settings.axis])
        return x

    def _bind(self, backend: Backend, device: Any) -> None:
        """Settle on a backend and a device, and bring there what the layer holds."""
        registry.check_uncompiled("making or moving a layer")
        self._backend, self._is_bound = backend, True
        # An empty array finds the device that the backend makes of this one, or its default, before anything moves.
        self._device = backend.device(backend.asarray(np.zeros(0, np.float32), device=device))
        self._own_all()
        self._introduce()

    def _learn_features(self, num_features: int) -> None:
        self._settings = self._settings._replace(num_features=checks.num_features(num_features))
        self.reset_parameters()

    def _own_all(self) -> None:
        self._store({key: self._own(key, value) for key, value in to_dict(self._params, self._state).items()})

    def _own(self, name: str, value: Any, *, fill: bool = False) -> Array:
        return owned(
            name,
            value,
            backend=self._backend,
            shape=() if name == "num_batches_tracked" else (self._channels(),),
            dtype="int64" if name == "num_batches_tracked" else self._settings.dtype,
            device=self._device if self._is_bound else None,
            fill=fill,
        )

    def _taken(self, name: str, value: Any, *, fill: bool = False) -> Array:
        """Return an entry that comes from outside as an own one, unless it is none that a layer can have."""
        array = self._own(name, value, fill=fill)
        if name == "running_var":
            checks.variance(self._backend, array)
        return array

    def _store(self, entries: Mapping[str, Array]) -> None:
        """Hold these arrays in the places of others, all of them or, if that fails, none."""
        if not any(name in entries for name in Params._fields):
            state = self._state._replace(**entries)
            self._state = self._backend.write(self._state, state) if self._is_shared else state
        else:
            self._become(self, entries)

    def _become(self, trial: "Storage", entries: Mapping[str, Array] | None = None) -> None:
        """Be what ``trial`` is, this layer or a copy of it, with these arrays in the places of others: wholly or not.

        Whether it trains, ``eps`` and ``momentum`` stay, which others may have set since the copy was made.
        """
        entries, backend = entries or {}, trial._backend
        params, state = trial._params, trial._state
        parameters = {
            key: backend.parameter(entries[key], current) for key, current in params._asdict().items() if key in entries
        }
        for parameter in parameters.values():
            registry.owner_of(parameter)  # Torch has a class for them, and a compiler could not look it up in a call
        statistics = {key: entries[key] for key in State._fields if key in entries}
        after = *params._replace(**parameters), *state._replace(**statistics)
        before = *params, *(state if trial._is_shared else after[len(params) :])
        new = {key: vars(trial)[key] for key in ("_backend", "_is_bound", "_device", "_is_shared")}
        with backend.writing():
            old = {key: vars(self)[key] for key in (*new, "_settings", "_params", "_state")}
            kept = tuple(backend.copy(array) if backend.owns(array) else array for array in before)
            try:
                held = backend.write(before, after)
                params, state = Params(*held[: len(params)]), State(*held[len(params) :])
                settings = trial._settings._replace(eps=self._settings.eps, momentum=self._settings.momentum)
                self._hold(new | {"_settings": settings, "_params": params, "_state": state})
            except BaseException:  # an interrupt too
                backend.write(before, kept)
                self._hold(old)
                raise

    def _hold(self, attributes: dict[str, Any]) -> None:
        """Replace attributes in one assignment: no thread sees some of them without the others."""
        self.__dict__.update(attributes)

    def _configure(self, **settings: Any) -> None:
        """Replace settings that may change at any time, while another thread loads or moves the layer too."""
        with self._backend.writing():
            self._settings = self._settings._replace(**settings)

    def _adopt(self, params: Params, state: State) -> None:
        """Hold these very arrays, of whatever device and dtype, if the layer still shares its arrays.

        Whoever shares them may have taken some away, or given others back.
        """
        if not self._is_shared:
            return
        if state.running_mean is None:
            state = State(None, None, None)
        new = {
            "_params": params,
            "_state": state,
            "_affine": params.weight is not None,
            "_has_bias": self._has_bias if params.weight is None else params.bias is not None,
            "_track_running_stats": state.running_mean is not None,
        }
        arrays = to_dict(params, state)
        if arrays:
            first = next(iter(arrays.values()))
            new["_settings"] = self._settings._replace(dtype=dtype_name(first.dtype))
            new["_device"] = self._backend.device(first)
        self._hold(new)

    def _introduce(self) -> None:
        """Look up now what a compiler could not look up in a call; tell the backend of this class, once."""
        empty = self._backend.asarray(np.zeros(0, np.float32))
        for array in (empty, *to_dict(self._params, self._state).values()):
            registry.owner_of(array)
        kind = type(self)
        if (kind, self._backend.name) not in _introduced:
            _introduced.add((kind, self._backend.name))
            self._backend.register(kind, kind._flatten, kind._unflatten)

    def _flatten(self) -> tuple[tuple[Params, State], tuple[tuple[str, Any], ...]]:
        """Return the layer's arrays, and all else that it is."""
        others = {"_params", "_state", "_is_shared"}
        rest = tuple((key, value) for key, value in sorted(self.__dict__.items()) if key not in others)
        return (self._params, self._state), rest

    @classmethod
    def _unflatten(cls, rest: tuple[tuple[str, Any], ...], arrays: tuple[Params, State]) -> Self:
        """Return a layer again, whatever stands for its arrays."""
        layer = cls.__new__(cls)
        params, state = arrays
        layer._hold({**dict(rest), "_params": params, "_state": state, "_is_shared": False})
        return layer

    def __getstate__(self) -> dict[str, Any]:
        """Return what is to be pickled or copied: the layer as it is at one moment."""
        return vars(self).copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was pickled or copied, in what may be another process."""
        self._hold(state)
        if self._is_bound:
            self._introduce()

    def _channels(self) -> int:
        if self.num_features is None:
            message = (
                "num_features is not known yet, so there are no parameters and statistics: call the layer on an input "
                "or load a state_dict first."
            )
            raise AttributeError(message)
        return self.num_features
