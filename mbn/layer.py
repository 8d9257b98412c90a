"""The layer: its arguments, modes and calls. It contains no arithmetic.

A call that fails must leave the layer as it was; so must a failing first call, from which the layer would have taken
its backend or its number of channels.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from operator import is_
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mbn import checks, registry
from mbn.chunked import dask, reading
from mbn.contract import Array, Backend, Params, Pullback, Replicas, Settings, State
from mbn.convert import asarray, dtype_and_device_of, received, received_vectors
from mbn.replicas import Exchange, Kind, Membership
from mbn.state.attributes import Entries, Entry, Fixed, missing, of_class
from mbn.state.keys import IncompatibleKeys, versioned
from mbn.state.snapshot import Snapshot
from mbn.state.storage import Storage
from mbn.step import folding, population
from mbn.step.forward import forward, forward_vjp
from mbn.step.masks import Masking

_OPEN_UNDER_A_COMPILER = (
    "a layer that takes its backend or num_features from its first input cannot do so inside torch.compile or "
    "torch.export: make it with both, mbn.BatchNorm1d(C, backend='torch'), or call it once before."
)
_OWN = frozenset({"_storage", "_training", "_frozen", "__qualname__"})
"""The attributes of a BatchNorm1d itself; a subclass may have more."""
_NOTHING: Mapping[str, Array] = MappingProxyType({})
_introduced: set[tuple[type, str]] = set()
"""Pairs of a class of layers and the name of a backend that the class has been registered with."""


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
        dtype: the dtype of parameters and statistics: float32 (the default) or float64.
        bias: with ``affine``, have a bias too.
        axis: the axis of the channels: 1, or -1 for (N, C) and (N, L, C).
        correction: 1 for the unbiased running variance (torch's), 0 for the biased one (flax's, Keras's, ONNX's).
        group: the processes or devices that share the statistics of their batches in training; see :attr:`group`.
        backend: a name or a Backend. By default the one chosen by :func:`mbn.use_backend`,
            :func:`mbn.set_default_backend` or ``MBN_BACKEND``; else the layer takes the backend of its first input.

    Raises:
        BackendNotFoundError, BackendUnavailableError: see :func:`mbn.get_backend`.
        TypeError, ValueError: an argument has a wrong type or value.

    Source: Ioffe and Szegedy, Batch Normalization, 2015 (arXiv:1502.03167), algorithms 1 and 2.
    """

    def __init__(
        self,
        num_features: int | None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        axis: int = 1,
        correction: int = 1,
        group: Any = None,
        backend: str | Backend | None = None,
    ) -> None:
        settings = Settings(
            num_features=checks.num_features(num_features),
            dtype=checks.statistics_dtype(dtype),
            eps=checks.eps(eps),
            momentum=checks.momentum(momentum),
            axis=checks.axis(axis),
            correction=checks.correction(correction),
        )
        has = (
            checks.flag("affine", affine),
            checks.flag("bias", bias),
            checks.flag("track_running_stats", track_running_stats),
        )
        checks.device_index(device)
        self._training, self._frozen = True, False
        # torch's containers quote this name where they refuse a layer, which is no module: the only way to put a hint
        # into their message.
        self.__qualname__ = f"{type(self).__qualname__} (put its as_module() into the model)"
        chosen = registry.get_backend(backend) if backend is not None else registry.chosen_backend()
        # Until the first input determines the backend, the state is in NumPy arrays.
        self._storage = Storage(chosen or registry.get_backend(), device, settings, *has)
        if chosen is not None:
            self._become(*self._storage.moved(chosen, device))
        self.group = group
        if self.num_features is not None:
            try:
                self.reset_parameters()
            except MemoryError as error:
                raise MemoryError(checks.too_many_features(self.num_features)) from error

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute that layers have; refuse others, since a misspelt one would have no effect.

        Subclasses may have attributes of their own.
        """
        kind = type(self)
        if kind is BatchNorm1d and name[:1] != "_" and not hasattr(kind, name):
            raise AttributeError(checks.no_attribute(name, kind))
        object.__setattr__(self, name, value)

    if not TYPE_CHECKING:  # a type checker knows that there are no other attributes

        def __getattr__(self, name: str) -> Any:
            """Say for a name of torch's modules how a layer does the same; only names that are missing come here."""
            return missing(self, name)

    @property
    def __name__(self) -> str:
        """The name of the layer's class, by which Dask and JAX call a layer that they use as a function."""
        return type(self).__qualname__

    weight = Entry("The scale, (C,), or None. Set it to an array or to one number for all channels.")
    bias = Entry("The shift, (C,), or None. Set it to an array or to one number for all channels.")
    running_mean = Entry("The running mean, (C,), or None. Set it to an array or to one number for all channels.")
    running_var = Entry("The running variance, (C,), or None. Set it to an array or to one number for all channels.")
    num_batches_tracked = Entry("The number of batches trained on, an integer scalar, or None. Settable.")

    num_features = Fixed[int | None](
        lambda layer: layer._storage.settings.num_features,
        "The number of channels, or None before the first input determines it.",
        "Make another layer: BatchNorm1d(num_features)",
    )
    dtype = Fixed[str](
        lambda layer: layer._storage.settings.dtype,
        "The name of the dtype of parameters and statistics: float32 or float64.",
        "Move the layer: bn.to(dtype=...)",
    )
    device = Fixed[Any](
        lambda layer: layer._storage.device,
        "The device of parameters and statistics, as the backend names it; None where any device will do.",
        "Move the layer: bn.to(device=...)",
    )
    backend = Fixed[str | None](
        lambda layer: layer._storage.backend.name if layer._storage.is_bound else None,
        "The name of the backend, or None before the first input determines it.",
        "Move the layer: bn.to(backend=...)",
    )
    params = Entries[Params](
        Params,
        lambda layer: layer._storage.num_features and layer._storage.params,
        "Weight and bias, for :meth:`apply`. Set both at once to a :class:`Params` or a plain tuple.",
    )
    state = Entries[State](
        State,
        lambda layer: layer._storage.num_features and layer._storage.state,
        "The running statistics and the count of batches, for :meth:`apply`. Set all at once to a :class:`State` or a "
        "plain tuple.",
    )
    affine = Fixed[bool](
        lambda layer: layer._storage.affine,
        "Whether there is a weight.",
        "Make another layer, BatchNorm1d(..., affine=...), and load the entries that fit: "
        "load_state_dict(bn.state_dict(), strict=False)",
    )
    track_running_stats = Fixed[bool](
        lambda layer: layer._storage.track_running_stats,
        "Whether there are running statistics.",
        "freeze() keeps the running statistics as they are, and train() normalises by those of each batch; for a layer "
        "without them make another, BatchNorm1d(..., track_running_stats=False), and load the entries that fit: "
        "load_state_dict(bn.state_dict(), strict=False)",
    )
    axis = Fixed[int](
        lambda layer: layer._storage.settings.axis,
        "The axis of the channels, 1 or -1.",
        "Make another layer, BatchNorm1d(..., axis=...), and load_state_dict(bn.state_dict())",
    )
    correction = Fixed[int](
        lambda layer: layer._storage.settings.correction,
        "The number subtracted from n, the number of values, in running_var: 1 or 0.",
        "Make another layer, BatchNorm1d(..., correction=...), and load_state_dict(bn.state_dict())",
    )

    @property
    def eps(self) -> float:
        """The number added to the variance."""
        return self._storage.settings.eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._configure(eps=checks.eps(value))

    @property
    def momentum(self) -> float | None:
        """The weight of the new value in the running statistics, or None for the average over all batches."""
        return self._storage.settings.momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self._configure(momentum=checks.momentum(value))

    @property
    def group(self) -> Any:
        """The group whose replicas of this layer share the statistics of their batches in training, or None.

        It is an object of an engine: a ``torch.distributed`` process group on Torch, a communicator of ``mpi4py`` on
        NumPy and Numba, one of ``cupyx.distributed`` or ``mpi4py`` on CuPy, the name of an axis or several of
        ``shard_map``, ``pmap`` or ``vmap`` on JAX; True for all processes (Torch, NumPy, Numba); or a
        :class:`mbn.Group`. Settable; None ends it.

        All replicas begin with the same state, and call the layer equally often, with an empty batch where there is no
        data; so they do with its pullback. Evaluation and frozen layers are local, and :meth:`fit` is too: it has an
        argument of its own. A copy of the layer has the same group, and so has a layer that moves to another backend,
        which may have to be given another before it trains. A pickle keeps True and names of axes; a file has none.

        Raises:
            TypeError: no group of the backend's framework; from the first training step if the layer has no backend.
            ValueError: this process is not part of the group.
            ImportError: the library of the group is not installed.

        A call in training then raises :class:`mbn.ReplicaError` if another replica fails or computes another step,
        TimeoutError if one is missing, and RuntimeError if the library is not ready.
        """
        member = self._storage.group
        return None if member is None else member.given

    @group.setter
    def group(self, value: Any) -> None:
        self._join(self._membership(value))

    def _membership(self, group: Any, name: str = "") -> Membership | None:
        """Return the membership of the layer in a group; ``name`` is that of the layer in a model, for messages."""
        storage = self._storage
        return Membership.of(group, storage.backend if storage.is_bound else None, name)

    def _join(self, member: Membership | None) -> None:
        """Take over a membership, or leave the group."""
        with self._storage.backend.writing():
            self._change(lambda storage: storage._replace(group=member))

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
                (a NumPy array, nested lists), which is converted to one. float16, bfloat16 or float32; float64 too
                where the layer's dtype is float64. In evaluation also an array of Dask.
            mask: True where x has a value: bool, (N,) or (N, L).
            lengths: how many values each sequence has, from its start: integers from 0 to L, (N,).
            sample_weight: how often a value counts in mean, variance and n: real numbers of at least 0, (N,) or (N, L).
                They are converted to the layer's dtype, and are constants to differentiation.

        A value that the mask, the lengths or a weight of 0 exclude may be anything, NaN included: its output is 0, and
        no statistic, gradient or other output depends on it. A batch whose weights add up to ``correction`` or less
        has no variance: the running statistics are kept.

        Returns:
            An array of the layer's backend with the shape, dtype, device and memory order of ``x``. Of an array of Dask
            another one, which is lazy: its blocks are those of ``x``, of the same library, and have the bits of a call
            on the whole array. Later changes of the layer do not change it. mask, lengths and sample_weight may be
            arrays of Dask, too.

        Raises:
            TypeError: another framework's array, one of Dask in training, an x whose dtype is not floating or loses
                precision, or a wrong dtype of mask, lengths or weights.
            ValueError: a wrong shape or device, one value per channel in training, a length beyond L, a weight that is
                negative or not finite. The layer is unchanged.
            RuntimeError: the new statistics are traced, and the layer would keep them after the trace has ended.
        """
        return self._run(forward, x, Masking.of(mask, lengths, sample_weight))

    def vjp(
        self, x: Any, *, mask: Any = None, lengths: Any = None, sample_weight: Any = None
    ) -> tuple[Array, Pullback]:
        """Normalise ``x`` as a call does, and return the function from a gradient of the output to those of the input.

        Args:
            x, mask, lengths, sample_weight: as in a call.

        Returns:
            The output, and ``pullback(dy) -> (dx, dweight, dbias)``; see :class:`mbn.contract.Pullback`.

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
        """Compute a call as a pure function: from given parameters and state to the output and the new state.

        Args:
            params, state: as :attr:`params` and :attr:`state`, or plain tuples. Their dtype and device count, not the
                layer's own.
            x, mask, lengths, sample_weight: as in a call.
            training: the mode, instead of the layer's own. A frozen layer stays frozen.

        Raises:
            TypeError, ValueError: as in a call, and for parameters or statistics of a wrong shape or dtype.
        """
        training = checks.flag("training", training)
        masking = Masking.of(mask, lengths, sample_weight)
        if self._storage.group is None:
            return self._applied(params, state, x, training, masking)
        with self._exchange(training) as replicas:
            return self._applied(params, state, x, training, masking, replicas)

    def _applied(
        self,
        params: Params,
        state: State,
        x: Any,
        training: bool,
        masking: Masking | None,
        replicas: Replicas | None = None,
    ) -> tuple[Array, State]:
        storage = self._storage
        num_features, settings = storage.num_features, storage.settings
        if type(params) is not Params or type(state) is not State:
            params, state = checks.part("params", params, Params), checks.part("state", state, State)
        backend, device = (storage.backend, storage.device) if storage.is_bound else (registry.owner_of(x), None)
        dtype, device = dtype_and_device_of(backend, params, state, settings.dtype, device)
        if dtype != settings.dtype:
            settings = settings._replace(dtype=dtype)
        x = received(backend, "x", x, settings.dtype, device)
        params, state = received_vectors(backend, params, state, num_features, settings.dtype, device)
        checks.running_statistics(state, needed=False, counted=settings.momentum is None)
        uses_batch = self._uses_batch(state, training)
        return forward(backend, x, params, state, settings, training=uses_batch, masking=masking, replicas=replicas)

    def _exchange(self, training: bool, backend: Backend | None = None) -> AbstractContextManager[Any]:
        """Return a context whose value is the other replicas of a step, or None; by default on the layer's backend."""
        storage = self._storage
        if storage.group is None or not training or self._frozen:
            return nullcontext()
        return storage.group.exchange(backend or storage.backend, storage.settings, storage.device)

    def _run(
        self, run: Callable[..., tuple[Any, State]], x: Any, masking: Masking | None, replicas: Replicas | None = None
    ) -> Any:
        """Call ``run``, ``forward`` or ``forward_vjp``, with the layer's parameters and state; store the new state."""
        storage = self._storage
        backend, settings, before = storage.backend, storage.settings, storage.state
        if not storage.is_bound or settings.num_features is None:
            if registry.is_compiling():
                raise RuntimeError(_OPEN_UNDER_A_COMPILER)
            return registry.uncompiled(self._first_run)(run, x, masking)
        if storage.group is not None and replicas is None:
            with self._exchange(self._training) as others:
                if others is not None:
                    return self._run(run, x, masking, others)
        x = received(backend, "x", x, settings.dtype, storage.device)
        training = self._uses_batch(before, self._training)
        result, after = run(
            backend, x, storage.params, before, settings, training=training, masking=masking, replicas=replicas
        )
        # If a load or a move has come in between, the state that it has stored stays.
        if after is not before and backend.stores(before, after) and self._storage.state is before:
            held = backend.write(before, after) if storage.is_shared else after
            new = storage.with_state(held)
            if self._storage is storage:  # as ``_change``, but faster
                object.__setattr__(self, "_storage", new)
            else:
                self._change(lambda storage: storage.with_state(held) if storage.state is before else storage)
        return result

    def _change(self, change: Callable[[Storage], Storage]) -> None:
        """Replace the storage by ``change(storage)``; repeat it if another thread has replaced the storage meanwhile.

        So no thread's change is lost.
        """
        while True:
            storage = self._storage
            new = change(storage)
            if self._storage is storage:  # no other thread runs between this comparison and the assignment
                object.__setattr__(self, "_storage", new)
                return

    def _uses_batch(self, state: State, training: bool) -> bool:
        """Tell whether to normalise by the batch's own statistics."""
        return (training and not self._frozen) or state.running_mean is None

    def _first_run(self, run: Callable[..., tuple[Any, State]], x: Any, masking: Masking | None) -> Any:
        """Let a copy take the backend and number of channels of the first input, and its step; then take over the copy.

        If any of that fails, the layer itself is unchanged.
        """
        storage, group = self._storage, self._storage.group
        with self._exchange(self._training, None if storage.is_bound or group is None else group.backend_for(x)):
            storage, entries, x = storage.met(x)
            layer = self._trial(storage, entries)
            layer.group = self.group  # it is checked, now that there is a backend
        layer._join(group)
        result = layer._run(run, x, masking)
        self._become(layer._storage)
        self.__dict__.update({name: value for name, value in vars(layer).items() if name not in _OWN})  # a subclass's
        return result

    def train(self, mode: bool = True) -> Self:
        """Switch to training, or to evaluation with ``mode=False``; return the layer."""
        self._training = checks.flag("mode", mode, ValueError)  # torch raises a ValueError here
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
        """Undo :meth:`freeze`; return the layer."""
        self._frozen = False
        return self

    def fit(self, batches: Any, *, group: Any = None, progress: bool = True) -> Self:
        """Set the running statistics to those of an entire data set, in one pass over its batches; return the layer.

        The batches' statistics are merged exactly, so ``running_mean`` and ``running_var`` are mean and variance of
        all values together, ``running_var`` with the layer's ``correction``; ``num_batches_tracked`` counts the
        batches. There is never more than one batch in memory.

        Args:
            batches: the data set as one array, of the shape of an input, which counts as one batch. It may be larger
                than memory: a ``numpy.memmap`` is read in slices along its first axis, and an array of zarr or h5py, or
                any other with shape, dtype and slices, by its chunks, the next one while the last is added up. An array
                of Dask is computed block by block on the current scheduler; its statistics have the same bits on every
                scheduler. Or an iterable of inputs as in a call, of any number of samples; of a tuple or list of
                arrays, as a DataLoader gives, the first is the input.
            group: the processes that have batches of the data set, each its own and perhaps none: all layers then have
                the statistics of all batches, the same bits. See :attr:`group`; a name of an axis is none of these. By
                default the batches are those of this process alone, even if the layer has a group.
            progress: show a progress bar on standard error.

        Raises:
            TypeError, ValueError: an input is refused as in a call; the layer has no running statistics; there are
                ``correction`` values per channel or fewer; an array in a file changes meanwhile. The layer is then
                unchanged, as after an interrupt.
            ReplicaError, TimeoutError: another process failed, or is missing. The layer is unchanged.
        """
        checks.tracked(self.track_running_stats, "fit")
        checks.flag("progress", progress)
        storage = self._storage
        member = Membership.of(group, storage.backend if storage.is_bound else None)
        if member is None:
            return self._fit(batches, progress)
        if not storage.is_bound or storage.settings.num_features is None:
            raise ValueError(
                "a process of a group may have no batch to take backend and num_features from: make the layer with "
                "both, mbn.BatchNorm1d(C, backend=...)."
            )
        with member.exchange(storage.backend, storage.settings, storage.device, Kind.POPULATION) as replicas:
            if replicas is not None and not isinstance(replicas, Exchange):
                raise TypeError(
                    f"fit shares statistics among processes, and {group!r} is an axis within a program. On JAX fit one "
                    "array that is sharded over the devices, without a group."
                )
            return self._fit(batches, progress, replicas)

    def _fit(self, batches: Any, progress: bool, replicas: Exchange | None = None) -> Self:
        storage, is_one, is_lazy = self._storage, reading.is_array(batches), registry.is_lazy(batches)
        if is_lazy:
            batches = [batches]
        elif is_one:
            batches = reading.Pieces(batches, storage.settings, splits_channels=replicas is None)
        # A layer without a backend or num_features stays so until there are statistics. Others may change meanwhile,
        # in their settings for example.
        is_open = not storage.is_bound or storage.settings.num_features is None
        total = population.Total()
        inputs = population.inputs(batches, progress=progress and not is_lazy)
        with dask.progress(shown=progress and is_lazy), closing(inputs):
            for batch, channels in inputs:
                before = storage if is_open else self._storage
                storage, entries, x = before.met(batch)
                if storage is not before:
                    storage = self._trial(storage, entries)._storage
                settings = population.narrowed(storage.settings, channels)
                total.of(channels).add(storage.backend, x, settings, storage.device)
                del batch, x  # so that they are freed before the next batch is made
        if not is_open:
            storage = self._storage
        if replicas is not None:
            total.num_batches = 1 if is_one else total.num_batches
            total.share(storage.backend, storage.settings, storage.device, replicas)
        statistics = total.statistics(storage.backend, storage.settings, storage.device)
        count = storage.own("num_batches_tracked", 1 if is_one and replicas is None else total.num_batches)
        self._become(storage, {**statistics, "num_batches_tracked": count})
        return self

    def fold(self) -> tuple[Array, Array]:
        """Return ``(scale, shift)``, each (C,), such that in evaluation the layer computes ``x * scale + shift``.

        ``scale = weight / sqrt(running_var + eps)`` and ``shift = bias - running_mean * scale``, each to the accuracy
        of the layer's outputs. See also :func:`mbn.fold_linear`.

        Raises:
            ValueError: the layer has no running statistics.
        """
        checks.tracked(self.track_running_stats, "fold")
        registry.check_uncompiled("folding a layer")
        return folding.fold(self._evaluated, self.params, self.state)

    def _evaluated(self, params: Params, state: State, x: Any) -> Array:
        return self.apply(params, state, x, training=False)[0]

    def as_module(self) -> Any:
        """Return a module of the layer's framework, a ``torch.nn.Module`` or ``flax.nnx.Module``, with the same output.

        On Torch the two share their tensors: training, loading or moving the module changes the layer too, and training
        or loading the layer changes the module. A layer that moves to another device or backend no longer shares them.
        On JAX, where arrays never change, the module begins with the layer's. Layer and module each have arguments and
        modes of their own.

        Raises:
            TypeError: the layer's framework has no modules, or the layer has no backend yet.
            ImportError: the package of the framework's modules is not installed.
        """
        storage = self._storage
        channels = storage.num_features
        if not storage.is_bound:
            raise TypeError(
                f"the layer has no backend yet, and so no modules: BatchNorm1d({channels}, backend='torch')."
            )
        own = copy.copy(self)  # the module's: it keeps its backend and device when this layer moves
        own._storage = storage._replace(is_shared=True)
        module = storage.backend.module(own, partial(_adopt, (own, self)))
        self._change(lambda storage: storage._replace(params=own.params, state=own.state, is_shared=True))
        return module

    def save(self, path: str | PathLike[str]) -> None:
        """Write the layer to a safetensors file, with its arguments and modes in the metadata.

        The file is complete before it takes the name: at any moment there is the old file or the new one.

        Raises:
            OSError: the file cannot be written; an old file of this name is unchanged.
            AttributeError: the layer has no arrays yet.
        """
        from mbn.state import files

        files.write(path, self._snapshot())

    @of_class
    def load(cls, path: str | PathLike[str], *, backend: str | Backend | None = None, device: Any = None) -> Self:
        """Return the layer that :meth:`save` wrote, on any backend.

        Args:
            path: the file.
            backend, device: as of a new layer; the file has neither.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is damaged, of no mbn layer, or of a later format; or the backend has no such device.
            TypeError: the backend has no such dtype.
            BackendNotFoundError, BackendUnavailableError: see :func:`mbn.get_backend`.
        """
        from mbn.state import files

        return cls._from_snapshot(files.read(path), backend, device)

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
        """Return one layer of a model, from the model's checkpoint: a safetensors file or one of ``torch.save``.

        A file of ``torch.save`` is read by ``weights_only=True``, which executes nothing in it; the file has a
        state_dict, or dictionaries of them, for example ``{"state_dict": ...}``. The entries determine the number of
        channels, the dtype, and whether there are a weight and a bias. The layer begins in training mode.

        Args:
            path: the file.
            prefix: the text before ``weight`` in the entries of this layer: ``"module.encoder.bn1."``. The last point
                may be left out.
            backend, device: as of a new layer.
            settings: arguments of the layer that a checkpoint does not contain: ``eps``, ``momentum``, ``axis``,
                ``correction``; and ``track_running_stats=False`` for a layer without running statistics.

        Raises:
            OSError: the file cannot be read.
            ImportError: the file is of ``torch.save``, and torch is not installed.
            ValueError: the file is damaged, of :meth:`save`, or holds objects that are no tensors; no entries begin
                with the prefix, or they are not those of a batch norm.
            TypeError: an argument that the checkpoint determines, or that a layer does not have.
            BackendNotFoundError, BackendUnavailableError: see :func:`mbn.get_backend`.
        """
        from mbn.state import checkpoints

        entries, arguments, label = checkpoints.read(path, prefix, settings)
        layer = cls(**arguments, backend=backend, device=device)
        layer._become(layer._storage, layer._storage.loading(entries, label, model=entries)[0])
        return layer

    def parameters(self) -> Iterator[Array]:
        """Iterate over the weight and the bias, as far as there are any."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, Array]]:
        """Iterate over the weight and the bias with their names, as far as there are any."""
        return ((name, value) for name, value in zip(Params._fields, self.params, strict=True) if value is not None)

    def named_buffers(self) -> Iterator[tuple[str, Array]]:
        """Iterate over the running statistics and the count of batches with their names, if there are any."""
        return ((name, value) for name, value in zip(State._fields, self.state, strict=True) if value is not None)

    def reset_parameters(self) -> None:
        """Set the weight to 1 and the bias to 0, and reset the running statistics."""
        self._store({**self._storage.initial_parameters(), **self._storage.initial_statistics()})

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1 and the count of batches to 0."""
        self._store(self._storage.initial_statistics())

    def state_dict(self, *, backend: str | Backend | None = None) -> OrderedDict[str, Array]:
        """Return copies of the parameters and statistics under torch's keys, in torch's order and with its version.

        Args:
            backend: the backend of the copies; by default the layer's own. ``torch.nn.BatchNorm1d`` loads Torch's.

        Raises:
            BackendNotFoundError, BackendUnavailableError: see :func:`mbn.get_backend`.
        """
        _ = self._storage.num_features
        with self._storage.backend.writing():
            storage = self._storage  # of one moment, even if other threads change the layer
            entries = {key: storage.backend.copy(value) for key, value in storage.entries.items()}
        if backend is not None:
            entries = {key: asarray(value, backend=backend) for key, value in entries.items()}
        return versioned(entries)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, *, prefix: str = ""
    ) -> IncompatibleKeys:
        """Take over copies of the entries of a state_dict, from this class or from ``torch.nn.BatchNorm1d``.

        Args:
            state_dict: arrays of any known framework by torch's keys. A layer with ``num_features=None`` takes its
                number of channels from them. As in torch, ``num_batches_tracked`` may be missing and is then kept,
                unless the state_dict is marked as version 2.
            strict: refuse missing and unexpected keys; otherwise load the entries that fit and return the other keys.
            prefix: the text before ``weight`` in the entries of this layer, if the state_dict is a model's:
                ``"module.encoder.bn1."``. The last point may be left out. Dictionaries of state_dicts are searched too.

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
                message += " Give the result of its state_dict()."
            raise TypeError(message)
        registry.check_uncompiled("loading a layer")
        strict, entries, version, start = checks.flag("strict", strict), state_dict, None, ""
        if prefix:
            from mbn.state import checkpoints

            entries, version, start = checkpoints.under(state_dict, prefix)
        storage = self._storage
        if storage.settings.num_features is None:
            storage = self._trial(storage.with_features_of(entries, state_dict))._storage
        loaded, incompatible = storage.loading(entries, start, model=state_dict, strict=strict, version=version)
        self._become(storage, loaded)
        return incompatible

    def to(self, device: Any = None, dtype: Any = None, *, backend: str | Backend | None = None) -> Self:
        """Move the layer with its state to another backend, device or dtype; return it.

        The first positional argument is a device, or a dtype alone, as in torch. Without a device the layer stays on
        its GPU if the other backend's framework uses that too, and goes to the default device of the backend otherwise.

        Raises:
            BackendNotFoundError, BackendUnavailableError: see :func:`mbn.get_backend`.
            TypeError, ValueError: the backend has no such dtype or device. The layer is unchanged.
        """
        registry.check_uncompiled("moving a layer")
        checks.device_index(device)
        if dtype is None and checks.is_dtype(device):
            device, dtype = None, device
        elif isinstance(device, Backend) or (isinstance(device, str) and device in registry.list_backends()):
            raise TypeError(
                f"to() takes a device or dtype by position, and a backend by name: bn.to(backend={device!r})."
            )
        storage = self._storage
        target = storage.backend if backend is None else registry.get_backend(backend)
        if device is None and target is storage.backend:
            device = storage.device
        elif device is None and storage.is_bound:
            device = storage.device_on(target)
        settings = None if dtype is None else storage.settings._replace(dtype=checks.statistics_dtype(dtype))
        with storage.backend.writing():  # all arrays are of one moment
            chosen = target if storage.is_bound or backend is not None else None
            self._become(*self._storage.moved(chosen, device, settings))
        return self

    def __repr__(self) -> str:
        """Return torch's text with the arguments that only this layer has."""
        names = ["eps", "momentum", "affine", "bias", "track_running_stats"]
        names += ["axis"] * (self.axis != 1) + ["correction"] * (self.correction != 1)
        names += ["group"] * (self.group is not None) + ["backend"]
        shown = {name: getattr(self, name) for name in names if name != "bias"}
        shown["bias"] = self.affine and self._storage.has_bias
        return f"BatchNorm1d({self.num_features}, {', '.join(f'{name}={shown[name]!r}' for name in names)})"

    def _snapshot(self) -> Snapshot:
        """Return the layer as plain values, without its backend and device."""
        with self._storage.backend.writing():  # of one moment, even if other threads change the layer
            layer = copy.copy(self)
            held = layer.state_dict()
        storage = layer._storage
        arguments = {
            **storage.settings._asdict(),
            "affine": storage.affine,
            "track_running_stats": storage.track_running_stats,
            "bias": storage.has_bias,
        }
        entries = {key: storage.backend.to_numpy(value) for key, value in held.items()}
        return Snapshot(arguments, entries, training=layer.training, frozen=layer._frozen, group=layer.group)

    def _store(self, entries: Mapping[str, Array]) -> None:
        """Replace arrays of the layer: all those given or, if that fails, none."""
        if any(name in entries for name in Params._fields):
            self._become(self._storage, entries)
            return

        def stored(storage: Storage) -> Storage:
            state = storage.state._replace(**entries)
            return storage.with_state(storage.backend.write(storage.state, state) if storage.is_shared else state)

        self._change(stored)

    def _trial(self, storage: Storage, entries: Mapping[str, Array] = _NOTHING) -> Self:
        """Return a copy of the layer with a storage and entries in it.

        If the storage has a number of channels and the layer has none, the copy's arrays have their initial values.
        """
        layer = copy.copy(self)
        layer._become(storage, entries)
        if self.num_features is None and layer.num_features is not None:
            layer.reset_parameters()
        return layer

    def _become(self, trial: Storage, entries: Mapping[str, Array] = _NOTHING) -> None:
        """Take over a storage, the layer's own or another, with ``entries`` instead of its arrays; or change nothing.

        Arrays that others hold too are written to, so that the change reaches those: parameters that a framework's
        optimizers train, and statistics that a module shares. All are written, or all are restored if anything fails.
        ``eps`` and ``momentum`` stay the layer's own, since other threads may have set them since the storage was made.
        """
        backend, (params, state) = trial.backend, (trial.params, trial.state)
        parameters = {
            key: backend.parameter(entries[key], current) for key, current in params._asdict().items() if key in entries
        }
        statistics = {key: entries[key] for key in State._fields if key in entries}
        after = *params._replace(**parameters), *state._replace(**statistics)
        before = *params, *(state if trial.is_shared else after[len(params) :])
        if trial.is_bound:
            self._introduce(backend, after)
        with backend.writing():
            old = self._storage
            kept = tuple(backend.copy(array) if backend.owns(array) else array for array in before)
            try:
                held = backend.write(before, after)
                self._storage = trial._replace(
                    settings=trial.settings._replace(eps=old.settings.eps, momentum=old.settings.momentum),
                    params=Params(*held[: len(params)]),
                    state=State(*held[len(params) :]),
                    is_shared=trial.is_shared and all(map(is_, held, before)),
                )
            except BaseException:  # an interrupt too
                backend.write(before, kept)
                self._storage = old
                raise

    def _configure(self, **settings: Any) -> None:
        """Replace settings that may change at any time, even while another thread loads or moves the layer."""
        with self._storage.backend.writing():
            self._change(lambda storage: storage._replace(settings=storage.settings._replace(**settings)))

    def _introduce(self, backend: Backend, arrays: Iterable[Array | None]) -> None:
        """Find the arrays' backend now, since torch.compile could not in a call; register this class with it, once."""
        kind = type(self)
        for array in arrays:
            if array is not None:
                registry.owner_of(array)  # Torch has a class for parameters
        if (kind, backend.name) not in _introduced:
            registry.owner_of(backend.asarray(np.zeros(0, np.float32)))
            _introduced.add((kind, backend.name))
            backend.register(kind, kind._flatten, kind._unflatten)

    def _flatten(self) -> tuple[tuple[Params, State], tuple[tuple[tuple[str, Any], ...], ...]]:
        """Return the layer's arrays, and all its other attributes as hashable pairs."""
        own, storage = vars(self).copy(), self._storage._asdict()
        del own["_storage"], storage["is_shared"]
        arrays = storage.pop("params"), storage.pop("state")
        return arrays, (tuple(storage.items()), tuple(sorted(own.items())))

    @classmethod
    def _unflatten(cls, rest: tuple[tuple[tuple[str, Any], ...], ...], arrays: tuple[Params, State]) -> Self:
        """Return the layer of flattened parts; its arrays may be tracers or other placeholders."""
        layer = cls.__new__(cls)
        (storage, own), (params, state) = rest, arrays
        layer.__dict__.update(own, _storage=Storage(**dict(storage), params=params, state=state))
        return layer

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes of one moment, to be pickled or copied."""
        return vars(self).copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over pickled or copied attributes; register the class, since this process may be another."""
        self.__dict__.update(state if "_storage" in state else Storage.of_attributes(state))
        if self._storage.is_bound:
            self._introduce(self._storage.backend, self._storage.entries.values())

    @classmethod
    def _from_snapshot(cls, snapshot: Snapshot, backend: str | Backend | None, device: Any) -> Self:
        """Return the layer of a snapshot."""
        layer = cls(**snapshot.arguments, group=snapshot.group, backend=backend, device=device)
        if layer.num_features is not None:
            layer.load_state_dict(versioned(snapshot.entries))
        layer.train(snapshot.training)
        return layer.freeze() if snapshot.frozen else layer


def _adopt(layers: Iterable[BatchNorm1d], params: Params, state: State) -> None:
    """Give these arrays, as they are, to those of the layers that still share theirs."""
    for layer in layers:
        layer._change(lambda storage: storage.adopting(params, state) if storage.is_shared else storage)
