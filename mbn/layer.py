"""The layer: arguments, mode and state, and no arithmetic.

A call, load or move that fails must leave the layer as it was, and two threads must never see half an update. Both
follow from one rule: whatever is new is made completely first and stored in one assignment.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import numpy as np

from mbn import checks, registry
from mbn.contract import Array, Backend
from mbn.convert import owned, received, received_vectors
from mbn.forward import forward, forward_vjp
from mbn.masking import Masking
from mbn.pullback import Pullback
from mbn.state import IncompatibleKeys, Params, Settings, State, compare_keys, to_dict

_introduced: set[tuple[type, str]] = set()
"""The classes of layers, and the names of the backends that know of them."""


class _Entry:
    """A parameter or statistic as an attribute: reading gives the live array, setting stores a checked copy."""

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self._group = "_params" if name in Params._fields else "_state"

    def __get__(self, layer: "BatchNorm1d | None", owner: type) -> Any:
        if layer is None:
            return self
        layer._channels()
        return getattr(getattr(layer, self._group), self._name)

    def __set__(self, layer: "BatchNorm1d", value: Any) -> None:
        if self.__get__(layer, type(layer)) is None:
            message = f"this layer has no {self._name} to set: {layer!r}."
            raise ValueError(message)
        layer._store({self._name: layer._own(self._name, value, fill=True)})


class BatchNorm1d:
    """Batch normalisation of (N, C) or (N, C, L) inputs, with the semantics of ``torch.nn.BatchNorm1d``.

    In training, each channel is normalised by its own mean and biased variance over all other axes, and the running
    statistics move towards them; in evaluation, it is normalised by the running statistics::

        y = (x - mean) / sqrt(var + eps) * weight + bias
        running_mean = (1 - momentum) * running_mean + momentum * mean
        running_var  = (1 - momentum) * running_var  + momentum * var * n / (n - correction)

    where n is the number of values per channel.

    Args:
        num_features: the number of channels C, or None to take it from the first input.
        eps: added to the variance; 0 is allowed. Where variance + eps is 0 the output is the bias.
        momentum: the weight of the new value in the running statistics; None for the average over all batches.
        affine: have a weight and a bias, (C,), initially 1 and 0.
        track_running_stats: have running statistics; without them, evaluation uses those of its batch.
        device: a device of the backend; by default the backend's, or that of the first input.
        dtype: that of parameters and statistics: float32 (the default) or float64.
        bias: with ``affine``, have a bias too.
        axis: where the channels are: 1, or -1 for (N, C) and (N, L, C).
        correction: 1 for the unbiased running variance (torch's), 0 for the biased one (flax's, Keras's, ONNX's).
        backend: a name or a Backend. By default the one chosen by :func:`mbn.use_backend`,
            :func:`mbn.set_default_backend` or ``MBN_BACKEND``; else the layer takes that of its first input.

    Raises:
        BackendNotFoundError, BackendUnavailableError: see :func:`mbn.get_backend`.
        TypeError, ValueError: an argument is not what it should be.

    Source: Ioffe and Szegedy, Batch Normalization, 2015 (arXiv:1502.03167), algorithms 1 and 2.
    """

    weight = _Entry("The scale, (C,), or None. Set it to an array or to one number for all channels.")
    bias = _Entry("The shift, (C,), or None. Set it to an array or to one number for all channels.")
    running_mean = _Entry("The running mean, (C,), or None. Set it to an array or to one number for all channels.")
    running_var = _Entry("The running variance, (C,), or None. Set it to an array or to one number for all channels.")
    num_batches_tracked = _Entry("The number of batches trained on, an integer scalar, or None. Settable.")

    def __init__(
        self,
        num_features: int | None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,  # noqa: FBT001, FBT002 - torch's signature
        track_running_stats: bool = True,  # noqa: FBT001, FBT002
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        axis: int = 1,
        correction: int = 1,
        backend: str | Backend | None = None,
    ) -> None:
        self._settings = Settings(
            num_features=checks.num_features(num_features),
            dtype=checks.statistics_dtype(dtype),
            eps=checks.eps(eps),
            momentum=checks.momentum(momentum),
            axis=checks.axis(axis),
            correction=checks.correction(correction),
        )
        self.affine = bool(affine)
        self.track_running_stats = bool(track_running_stats)
        self.training = True
        self._has_bias = bool(bias)
        self._frozen = False
        self._params = Params(None, None)
        self._state = State(None, None, None)
        chosen = registry.get_backend(backend) if backend is not None else registry.chosen_backend()
        if chosen is not None:
            self._bind(chosen, device)
        else:  # until the first input chooses, the state is NumPy's
            self._is_bound, self._backend, self._device = False, registry.get_backend(), device
        if self.num_features is not None:
            self.reset_parameters()

    @property
    def num_features(self) -> int | None:
        """The number of channels, or None while the first input has yet to tell."""
        return self._settings.num_features

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        return self._settings.eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._settings = self._settings._replace(eps=checks.eps(value))

    @property
    def momentum(self) -> float | None:
        """The weight of the new value in the running statistics, or None for the average over all batches."""
        return self._settings.momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self._settings = self._settings._replace(momentum=checks.momentum(value))

    @property
    def axis(self) -> int:
        """The axis of the channels, 1 or -1."""
        return self._settings.axis

    @property
    def correction(self) -> int:
        """What running_var takes off the number of values, 1 or 0."""
        return self._settings.correction

    @property
    def backend(self) -> str | None:
        """The name of the backend, or None while the first input has yet to choose it."""
        return self._backend.name if self._is_bound else None

    @property
    def params(self) -> Params:
        """Weight and bias, for :meth:`apply`."""
        self._channels()
        return self._params

    @property
    def state(self) -> State:
        """The running statistics and the count of batches, for :meth:`apply`."""
        self._channels()
        return self._state

    def __call__(self, x: Any, *, mask: Any = None, lengths: Any = None, sample_weight: Any = None) -> Array:
        """Normalise ``x``; in training, update the running statistics.

        Args:
            x: (N, C) or (N, C, L); with ``axis=-1`` (N, C) or (N, L, C). An array of the layer's backend, or host data
                (a NumPy array, nested lists), which is brought there. float16, bfloat16 or float32; float64 too where
                the layer's dtype is float64.
            mask: True where x has a value: bool, (N,) or (N, L).
            lengths: how many values each sequence has, from its start: integers from 0 to L, (N,).
            sample_weight: how often a value counts in mean, variance and n: real numbers of at least 0, (N,) or (N, L).
                They are taken in the layer's dtype, and are constants to differentiation.

        Where mask, lengths or a weight of 0 leave no value, x may hold anything, NaN included: the output is 0 there,
        and nothing else depends on it. A batch whose weights add up to ``correction`` or less has no variance: the
        running statistics are kept.

        Returns:
            An array of the layer's backend with the shape, dtype, device and memory order of ``x``.

        Raises:
            TypeError: another framework's array, or a dtype that is not floating or would lose precision, or is not
                that of a mask, lengths or weights.
            ValueError: a wrong shape or device, one value per channel in training, a length beyond L, a weight that is
                negative or not finite. The layer is unchanged.
            RuntimeError: the new statistics would be those of a trace that ends before the layer does.
        """
        return self._run(forward, x, Masking.of(mask, lengths, sample_weight))

    def vjp(
        self, x: Any, *, mask: Any = None, lengths: Any = None, sample_weight: Any = None
    ) -> tuple[Array, Pullback]:
        """Do what a call does, and return the function from a gradient of the output to those of the input.

        Args:
            x, mask, lengths, sample_weight: as in a call.

        Returns:
            The output, and ``pullback(dy) -> (dx, dweight, dbias)``; see :class:`mbn.pullback.Pullback`.

        Raises:
            TypeError, ValueError, RuntimeError: as in a call.
        """
        result: tuple[Array, Pullback] = self._run(forward_vjp, x, Masking.of(mask, lengths, sample_weight))
        return result

    def apply(
        self,
        params: Params,
        state: State,
        x: Any,
        *,
        training: bool,
        mask: Any = None,
        lengths: Any = None,
        sample_weight: Any = None,
    ) -> tuple[Array, State]:
        """Do what a call does, as a pure function: from given parameters and state to the output and the new state.

        Args:
            params, state: as :attr:`params` and :attr:`state`.
            x, mask, lengths, sample_weight: as in a call.
            training: by which statistics, in place of the layer's mode. A frozen layer stays frozen.

        Raises:
            TypeError, ValueError: as in a call, and for parameters or statistics of a wrong shape or dtype.
        """
        num_features, settings = self._channels(), self._settings
        backend = self._backend if self._is_bound else registry.owner_of(x)
        device = self._device if self._is_bound else None
        x = received(backend, "x", x, settings.dtype, device)
        params, state = received_vectors(backend, params, state, num_features, settings.dtype, device)
        checks.running_statistics(state, needed=False, counted=settings.momentum is None)
        uses_batch, masking = self._uses_batch(state, training), Masking.of(mask, lengths, sample_weight)
        return forward(backend, x, params, state, settings, training=uses_batch, masking=masking)

    def _run(self, run: Callable[..., tuple[Any, State]], x: Any, masking: Masking | None) -> Any:
        """Do with the layer's own parameters and state what ``run`` does, and store the new state."""
        backend, settings, before = self._backend, self._settings, self._state
        if not self._is_bound or settings.num_features is None:
            return self._first_run(run, x, masking)
        x = received(backend, "x", x, settings.dtype, self._device)
        training = self._uses_batch(before, self.training)
        result, after = run(backend, x, self._params, before, settings, training=training, masking=masking)
        if after is not before and backend.stores(before, after):
            self._state = after
        return result

    def _uses_batch(self, state: State, training: bool) -> bool:  # noqa: FBT001 - in every call, where keywords cost
        """Tell whether to normalise by the batch's own statistics."""
        return (training and not self._frozen) or state.running_mean is None

    def _first_run(self, run: Callable[..., tuple[Any, State]], x: Any, masking: Masking | None) -> Any:
        trial = copy.copy(self)
        if not trial._is_bound:
            backend = registry.owner_of(x)
            trial._bind(backend, backend.device(x) if self._device is None else self._device)
        if trial.num_features is None:
            x = received(trial._backend, "x", x, self._settings.dtype, None)
            checks.rank(x.shape, self.axis)
            trial._learn_features(x.shape[self.axis])
        result = trial._run(run, x, masking)
        self.__dict__.update(trial.__dict__)
        return result

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 - torch's signature
        """Switch to training, or to evaluation with ``mode=False``; return the layer."""
        if not isinstance(mode, bool):
            message = f"mode is True or False, not {mode!r}."
            raise ValueError(message)  # noqa: TRY004 - as torch
        self.training = mode
        return self

    def eval(self) -> Self:
        """Switch to evaluation: normalise by the running statistics and leave them alone; return the layer."""
        return self.train(mode=False)

    def freeze(self) -> Self:
        """Normalise by the running statistics in training too, and leave them alone, until :meth:`unfreeze`.

        Raises:
            ValueError: the layer has no running statistics.
        """
        if not self.track_running_stats:
            message = "a layer with track_running_stats=False has no running statistics to be frozen on."
            raise ValueError(message)
        self._frozen = True
        return self

    def unfreeze(self) -> Self:
        """Take :meth:`freeze` back; return the layer."""
        self._frozen = False
        return self

    def parameters(self) -> Iterator[Array]:
        """Iterate over the weight and the bias, as far as there are any."""
        return (parameter for parameter in self.params if parameter is not None)

    def reset_parameters(self) -> None:
        """Set the weight to 1 and the bias to 0, and reset the running statistics."""
        parameters = {}
        if self.affine:
            parameters["weight"] = self._own("weight", np.ones(self._channels()))
        if self.affine and self._has_bias:
            parameters["bias"] = self._own("bias", np.zeros(self._channels()))
        self._store(parameters)
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1 and the count of batches to 0."""
        if self.track_running_stats:
            self._state = State(
                self._own("running_mean", np.zeros(self._channels())),
                self._own("running_var", np.ones(self._channels())),
                self._own("num_batches_tracked", 0),
            )

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the parameters and statistics under torch's keys, in torch's order."""
        return {key: self._backend.copy(value) for key, value in to_dict(self.params, self.state).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:  # noqa: FBT001, FBT002
        """Take over copies of the entries of a state_dict, from this class or from ``torch.nn.BatchNorm1d``.

        Args:
            state_dict: arrays of any known framework by torch's keys. A layer with ``num_features=None`` takes its
                number of features from them.
            strict: refuse missing and unexpected keys; otherwise load what fits and return the rest.

        Raises:
            TypeError: not a mapping, or entries that are not real numbers.
            ValueError: missing, unexpected or misshapen entries. The layer is unchanged.
        """
        if not isinstance(state_dict, Mapping):
            message = f"state_dict is a mapping from names to arrays, not {type(state_dict).__name__}."
            raise TypeError(message)
        trial = copy.copy(self)
        if trial.num_features is None:
            shapes = [np.shape(state_dict[key]) for key in ("weight", "running_mean") if key in state_dict]
            if not shapes or len(shapes[0]) != 1:
                message = "num_features is to come from this state_dict, but it has no weight or running_mean of (C,)."
                raise ValueError(message)
            trial._learn_features(shapes[0][0])
        expected = to_dict(trial.params, trial.state)
        incompatible = compare_keys(expected, state_dict, strict=strict)
        trial._store({key: trial._own(key, state_dict[key]) for key in expected if key in state_dict})
        self.__dict__.update(trial.__dict__)
        return incompatible

    def to(self, *, backend: str | Backend | None = None, device: Any = None, dtype: Any = None) -> Self:
        """Move the layer with its state to another backend, device or dtype; return it.

        Raises:
            BackendNotFoundError, BackendUnavailableError: see :func:`mbn.get_backend`.
            TypeError, ValueError: the backend has no such dtype or device. The layer is unchanged.
        """
        trial = copy.copy(self)
        if dtype is not None:
            trial._settings = self._settings._replace(dtype=checks.statistics_dtype(dtype))
        target = self._backend if backend is None else registry.get_backend(backend)
        if device is None and target is self._backend:
            device = self._device
        if self._is_bound or backend is not None:
            trial._bind(target, device)
        else:
            trial._device = device
            trial._own_all()
        self.__dict__.update(trial.__dict__)
        return self

    def __repr__(self) -> str:
        """Return torch's text and what this layer adds to it."""
        axis = f", axis={self.axis}" if self.axis != 1 else ""
        correction = f", correction={self.correction}" if self.correction != 1 else ""
        return (
            f"BatchNorm1d({self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.affine and self._has_bias}, track_running_stats={self.track_running_stats}{axis}{correction}, "
            f"backend={self.backend!r})"
        )

    def _bind(self, backend: Backend, device: Any) -> None:
        """Settle on a backend and a device, and bring there what the layer holds."""
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

    def _store(self, entries: Mapping[str, Array]) -> None:
        parameters = {
            key: self._backend.parameter(entries[key], current)
            for key, current in self._params._asdict().items()
            if key in entries
        }
        for parameter in parameters.values():
            registry.owner_of(parameter)  # Torch has a class for them, and a compiler could not look it up in a call
        self._params = self._params._replace(**parameters)
        self._state = self._state._replace(**{key: entries[key] for key in State._fields if key in entries})

    def _introduce(self) -> None:
        """Look up now what a compiler could not look up in a call; tell the backend of this class, once."""
        empty = self._backend.asarray(np.zeros(0, np.float32), device=self._device)
        for array in (empty, *to_dict(self._params, self._state).values()):
            registry.owner_of(array)
        kind = type(self)
        if (kind, self._backend.name) not in _introduced:
            _introduced.add((kind, self._backend.name))
            self._backend.register(kind, kind._flatten, kind._unflatten)

    def _flatten(self) -> tuple[tuple[Params, State], tuple[tuple[str, Any], ...]]:
        """Return the layer's arrays, and all else that it is."""
        rest = tuple((key, value) for key, value in sorted(self.__dict__.items()) if key not in {"_params", "_state"})
        return (self._params, self._state), rest

    @classmethod
    def _unflatten(cls, rest: tuple[tuple[str, Any], ...], arrays: tuple[Params, State]) -> Self:
        """Return a layer again, whatever stands for its arrays."""
        layer = cls.__new__(cls)
        layer.__dict__.update(rest)
        layer._params, layer._state = arrays
        return layer

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was pickled or copied, in what may be another process."""
        self.__dict__.update(state)
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
