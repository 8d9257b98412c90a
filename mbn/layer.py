"""The layer: arguments, mode and calls, and no arithmetic.

A call that fails must leave the layer as it was, whatever it was about to learn.
"""

import copy
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from os import PathLike
from typing import Any, Self

from mbn import checks, registry
from mbn.contract import Array, Backend
from mbn.convert import place_of, received, received_vectors
from mbn.state import Params, Settings, State, versioned
from mbn.state.snapshot import Portable
from mbn.state.storage import Fixed, Storage, of_class
from mbn.step import folding, population
from mbn.step.forward import forward, forward_vjp
from mbn.step.masks import Masking
from mbn.step.pullback import Pullback

_OPEN_UNDER_A_COMPILER = (
    "a layer that takes its backend or num_features from its first input cannot do so inside torch.compile or "
    "torch.export: make it with both, mbn.BatchNorm1d(C, backend='torch'), or call it once before."
)


_OWN = frozenset({"_training", "_frozen", "__qualname__", *Storage.__annotations__})
"""The attributes of a layer that is of no subclass."""


class BatchNorm1d(Storage):
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
        self._affine = checks.flag("affine", affine)
        self._track_running_stats = checks.flag("track_running_stats", track_running_stats)
        self._training = True
        self._has_bias = checks.flag("bias", bias)
        checks.device_index(device)
        self._frozen = False
        self._is_shared = False
        self._params = Params(None, None)
        self._state = State(None, None, None)
        # By this name, torch's containers refuse what is no module: there is no other way into that message.
        self.__qualname__ = f"{type(self).__qualname__} (put its as_module() into the model)"
        chosen = registry.get_backend(backend) if backend is not None else registry.chosen_backend()
        if chosen is not None:
            self._bind(chosen, device)
        else:  # until the first input chooses, the state is NumPy's
            self._is_bound, self._backend, self._device = False, registry.get_backend(), device
        if self.num_features is not None:
            try:
                self.reset_parameters()
            except MemoryError as error:
                raise MemoryError(checks.too_many_features(self.num_features)) from error

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute that layers have: by any other name nobody would read it. Subclasses may have their own."""
        kind = type(self)
        if kind is BatchNorm1d and name[:1] != "_" and not hasattr(kind, name):
            raise AttributeError(checks.no_attribute(name, kind))
        object.__setattr__(self, name, value)

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        return self._settings.eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._configure(eps=checks.eps(value))

    @property
    def momentum(self) -> float | None:
        """The weight of the new value in the running statistics, or None for the average over all batches."""
        return self._settings.momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self._configure(momentum=checks.momentum(value))

    axis = Fixed[int](
        lambda layer: layer._settings.axis,
        "The axis of the channels, 1 or -1.",
        "Make another layer, BatchNorm1d(..., axis=...), and load_state_dict(bn.state_dict())",
    )
    correction = Fixed[int](
        lambda layer: layer._settings.correction,
        "What running_var takes off the number of values, 1 or 0.",
        "Make another layer, BatchNorm1d(..., correction=...), and load_state_dict(bn.state_dict())",
    )

    @property
    def training(self) -> bool:
        """The mode: True in training, False in evaluation."""
        return self._training

    @training.setter
    def training(self, value: bool) -> None:
        self._training = checks.flag("training", value)

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
            The output, and ``pullback(dy) -> (dx, dweight, dbias)``; see :class:`mbn.step.pullback.Pullback`.

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
            params, state: as :attr:`params` and :attr:`state`, or plain tuples. Their dtype and device count, not the
                layer's own.
            x, mask, lengths, sample_weight: as in a call.
            training: by which statistics, in place of the layer's mode. A frozen layer stays frozen.

        Raises:
            TypeError, ValueError: as in a call, and for parameters or statistics of a wrong shape or dtype.
        """
        training, num_features, settings = checks.flag("training", training), self._channels(), self._settings
        if type(params) is not Params or type(state) is not State:
            params, state = checks.parts(params, state)
        backend = self._backend if self._is_bound else registry.owner_of(x)
        device = self._device if self._is_bound else None
        dtype, device = place_of(backend, params, state, settings.dtype, device)
        if dtype != settings.dtype:
            settings = settings._replace(dtype=dtype)
        x = received(backend, "x", x, settings.dtype, device)
        params, state = received_vectors(backend, params, state, num_features, settings.dtype, device)
        checks.running_statistics(state, needed=False, counted=settings.momentum is None)
        uses_batch, masking = self._uses_batch(state, training), Masking.of(mask, lengths, sample_weight)
        return forward(backend, x, params, state, settings, training=uses_batch, masking=masking)

    def _run(self, run: Callable[..., tuple[Any, State]], x: Any, masking: Masking | None) -> Any:
        """Do with the layer's own parameters and state what ``run`` does, and store the new state."""
        backend, settings, params, before = self._backend, self._settings, self._params, self._state
        if not self._is_bound or settings.num_features is None:
            return self._first_run(run, x, masking)
        x = received(backend, "x", x, settings.dtype, self._device)
        return self._step(run, x, masking, backend, settings, params, before)

    def _step(
        self,
        run: Callable[..., tuple[Any, State]],
        x: Array,
        masking: Masking | None,
        backend: Backend,
        settings: Settings,
        params: Params,
        before: State,
    ) -> Any:
        training = self._uses_batch(before, self._training)
        result, after = run(backend, x, params, before, settings, training=training, masking=masking)
        # A load or a move may have come in between: then what that has stored stays.
        if after is not before and backend.stores(before, after) and self._state is before:
            state = backend.write(before, after) if self._is_shared else after
            object.__setattr__(self, "_state", state)  # in every call, where that of the class costs
        return result

    def _uses_batch(self, state: State, training: bool) -> bool:  # noqa: FBT001 - in every call, where keywords cost
        """Tell whether to normalise by the batch's own statistics."""
        return (training and not self._frozen) or state.running_mean is None

    def _first_run(self, run: Callable[..., tuple[Any, State]], x: Any, masking: Masking | None) -> Any:
        if registry.is_compiling():
            raise RuntimeError(_OPEN_UNDER_A_COMPILER)
        return registry.uncompiled(self._begin)(run, x, masking)

    def _begin(self, run: Callable[..., tuple[Any, State]], x: Any, masking: Masking | None) -> Any:
        """Have a copy meet the first input, and be what it is if the step succeeds."""
        layer = copy.copy(self)
        x = layer._meet(x)
        result = layer._step(run, x, masking, layer._backend, layer._settings, layer._params, layer._state)
        self._become(layer)
        self._hold({name: value for name, value in vars(layer).items() if name not in _OWN})  # those of a subclass
        return result

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 - torch's signature
        """Switch to training, or to evaluation with ``mode=False``; return the layer."""
        self._training = checks.flag("mode", mode, ValueError)  # which torch raises
        return self

    def eval(self) -> Self:
        """Switch to evaluation: normalise by the running statistics and leave them alone; return the layer."""
        return self.train(mode=False)

    def freeze(self) -> Self:
        """Normalise by the running statistics in training too, and leave them alone, until :meth:`unfreeze`.

        Raises:
            ValueError: the layer has no running statistics.
        """
        checks.tracked(self.track_running_stats, "freeze")
        self._frozen = True
        return self

    def unfreeze(self) -> Self:
        """Take :meth:`freeze` back; return the layer."""
        self._frozen = False
        return self

    def fit(self, batches: Any, *, progress: bool = True) -> Self:
        """Set the running statistics to those of a whole data set, in one pass over its batches; return the layer.

        The batches' statistics are merged exactly, so ``running_mean`` and ``running_var`` are mean and variance of
        all values together, ``running_var`` with the layer's ``correction``; ``num_batches_tracked`` counts the
        batches. There is never more than one batch in memory.

        Args:
            batches: the data set as one array, of the shape of an input: it counts as one batch, and is gone through in
                slices along its first axis, so that a ``numpy.memmap`` takes the memory of a slice. Or an iterable of
                inputs as in a call, of any number of rows; of a tuple or list of arrays, as a DataLoader gives, the
                first is the input.
            progress: show a progress bar on standard error.

        Raises:
            TypeError, ValueError: an input is refused as in a call; the layer has no running statistics; there are
                ``correction`` values per channel or fewer. The layer is then unchanged, as after an interrupt.
        """
        checks.tracked(self.track_running_stats, "fit")
        checks.flag("progress", progress)
        is_one = hasattr(batches, "shape")
        if is_one:
            batches = population.Slices(batches, self._settings)
        # An open layer stays open until there are statistics; any other may change meanwhile, its mode say.
        layer = copy.copy(self) if self.num_features is None or not self._is_bound else self
        whole = population.Population()
        with closing(population.inputs(batches, progress=progress)) as inputs:
            for batch in inputs:
                x = layer._meet(batch)
                whole.add(layer._backend, x, layer._settings)
                del batch, x  # before the next one is made
        entries = whole.statistics(layer._backend, layer._settings, layer._device)
        count = layer._own("num_batches_tracked", 1 if is_one else whole.num_batches)
        self._become(layer, {**entries, "num_batches_tracked": count})
        return self

    def fold(self) -> tuple[Array, Array]:
        """Return the evaluation mode as ``(scale, shift)``, each (C,): there, the layer is ``x * scale + shift``.

        ``scale = weight / sqrt(running_var + eps)`` and ``shift = bias - running_mean * scale``, each to the accuracy
        of the layer's outputs. See also :func:`mbn.fold_linear`.

        Raises:
            ValueError: the layer has no running statistics.
        """
        checks.tracked(self.track_running_stats, "fold")
        return folding.fold(self)

    def as_module(self) -> Any:
        """Return a module of the layer's framework, a ``torch.nn.Module`` or ``flax.nnx.Module``, that does its work.

        On Torch the two share their tensors: whatever trains, loads or moves the module does it to the layer, and what
        trains or loads the layer does it to the module; a layer that moves elsewhere shares no more. On JAX, where
        arrays never change, the module begins with the layer's. Arguments and modes are each one's own.

        Raises:
            TypeError: the layer's framework has no modules, or the layer has no backend yet.
            ImportError: it has, but in a package that is not installed.
        """
        channels = self._channels()
        if not self._is_bound:
            message = f"the layer has no backend yet, and so no modules: BatchNorm1d({channels}, backend='torch')."
            raise TypeError(message)
        own = copy.copy(self)  # which stays where it is when this layer moves
        own._is_shared = True
        module = self._backend.module(own, partial(_adopt, (own, self)))
        self._params, self._state, self._is_shared = own._params, own._state, True
        return module

    def save(self, path: str | PathLike[str]) -> None:
        """Write the layer to a safetensors file, with its arguments and modes in the metadata.

        The file is complete before it takes the name: at any moment there is the old file or the new one.

        Raises:
            OSError: the file cannot be written; what was there is still there.
            AttributeError: the layer has no arrays yet.
        """
        from mbn.state import files  # noqa: PLC0415 - its imports take longer than all others of mbn together

        files.write(path, self._pack())

    @of_class
    def load(cls, path: str | PathLike[str], *, backend: str | Backend | None = None, device: Any = None) -> Self:
        """Return the layer that :meth:`save` wrote, on any backend.

        Args:
            path: the file.
            backend, device: as of a new layer; the file does not say.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged, not of an mbn layer, or of a later format; or the backend has no such device.
            TypeError: the backend has no such dtype.
            BackendNotFoundError, BackendUnavailableError: see :func:`mbn.get_backend`.
        """
        from mbn.state import files  # noqa: PLC0415 - as above

        return cls._unpack(files.read(path), backend, device)

    @of_class
    def from_checkpoint(
        cls,
        path: str | PathLike[str],
        prefix: str = "",
        *,
        backend: str | Backend | None = None,
        device: Any = None,
        **settings: Any,
    ) -> Self:
        """Return the layer of a model whose checkpoint is in a file, a safetensors file or one of ``torch.save``.

        What is in a file of ``torch.save`` is read by ``weights_only=True`` and never run; it may be a state_dict, or
        dictionaries of them, ``{"state_dict": ...}`` say. Number of channels, dtype, and whether there are a weight and
        a bias come from the entries. The layer begins in training mode.

        Args:
            path: the file.
            prefix: what comes before ``weight`` in the entries of this layer: ``"module.encoder.bn1."``. The last point
                may be left out.
            backend, device: as of a new layer.
            settings: arguments of the layer that a checkpoint does not tell: ``eps``, ``momentum``, ``axis``,
                ``correction``; and ``track_running_stats=False`` for a layer without running statistics.

        Raises:
            OSError: the file cannot be read.
            ImportError: it is of ``torch.save``, and torch is not installed.
            ValueError: it is damaged, of :meth:`save`, or holds objects that are no tensors; no entries begin with the
                prefix, or they are not those of a batch norm.
            TypeError: an argument that the checkpoint tells, or that a layer does not have.
            BackendNotFoundError, BackendUnavailableError: see :func:`mbn.get_backend`.
        """
        from mbn.state import checkpoints  # noqa: PLC0415 - as above

        entries, arguments, label = checkpoints.read(path, prefix, settings)
        layer = cls(**arguments, backend=backend, device=device)
        layer._load(entries, label, model=entries)
        return layer

    def __repr__(self) -> str:
        """Return torch's text and what this layer adds to it."""
        axis = f", axis={self.axis}" if self.axis != 1 else ""
        correction = f", correction={self.correction}" if self.correction != 1 else ""
        return (
            f"BatchNorm1d({self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.affine and self._has_bias}, track_running_stats={self.track_running_stats}{axis}{correction}, "
            f"backend={self.backend!r})"
        )

    def _pack(self) -> Portable:
        """Return all that the layer is, but for where it is."""
        with self._backend.writing():  # as it is at one moment, whatever other threads do to it
            layer = copy.copy(self)
            held = layer.state_dict()
        arguments = {
            **layer._settings._asdict(),
            "affine": layer.affine,
            "track_running_stats": layer.track_running_stats,
            "bias": layer._has_bias,
        }
        entries = {key: layer._backend.to_numpy(value) for key, value in held.items()}
        return Portable(arguments, entries, training=layer.training, frozen=layer._frozen)

    @classmethod
    def _unpack(cls, portable: Portable, backend: str | Backend | None, device: Any) -> Self:
        """Return a layer that is all this."""
        layer = cls(**portable.arguments, backend=backend, device=device)
        if layer.num_features is not None:
            layer.load_state_dict(versioned(portable.entries))
        layer.train(portable.training)
        return layer.freeze() if portable.frozen else layer


def _adopt(layers: Iterable[BatchNorm1d], params: Params, state: State) -> None:
    """Have all these layers hold these very arrays."""
    for layer in layers:
        layer._adopt(params, state)
