"""Torch's verbs, and its border with NumPy: neither a warning nor a refusal where the data can be brought over."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from itertools import chain
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch

from mbn.contract import Arrays, Backend, Capabilities, Moments, Residuals, dtype_name
from mbn.state import Params, State
from mbn_torch import autograd, formulas, host, kernels, masks, overlaps, routes, vectors
from mbn_torch.module import BatchNorm1d
from mbn_torch.tracing import is_backward, is_constant, is_fake, is_recorded, is_scripted, is_traced, is_transformed

_NOT_REGISTERED = (
    "torch.export, torch.jit.trace and torch.onnx.export keep what is registered in a model, and this layer is not: "
    "what it learns would be no part of the graph. Put a module in its place: bn.as_module()."
)
_NO_VALUES = (
    "a tensor on the meta device, or of FakeTensorMode, has no values to bring elsewhere. A layer gets some by its "
    "module, bn.as_module(): to_empty(device=...) and reset_parameters(), or load_state_dict(..., assign=True)."
)
_NOT_SEEN = (
    "torch.fx sees modules, and looks into no layer or function of mbn. Put a module in the layer's place, "
    "bn.as_module(), which becomes one node of the graph; or have torch's own traced: "
    "mbn.replace_batchnorm(model, back=True)."
)


class TorchBackend(Backend):
    """The backend of Torch tensors. Autograd sees through outputs; running statistics are detached."""

    name: ClassVar[str] = "torch"
    version = str(torch.__version__)

    def __init__(self) -> None:
        for dtype in (*vars(torch).values(), *map(np.dtype, ("float32", "float64", "int64"))):
            if isinstance(dtype, torch.dtype | np.dtype):
                # Dynamo can look up names, but not find them; and it compiles anew where there are more.
                dtype_name(dtype)
        _ = self.capabilities  # nor can it find those, behind the lock of a cached property

    @cached_property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            dtypes=frozenset({"float16", "bfloat16", "float32", "float64"}),
            # Counting does not start CUDA, which would keep a process that only uses the CPU from forking.
            devices=("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))),
            mutable=True,
            strided=True,
            masks=True,
            any_size=True,
            autograd=True,
            vmap=True,
            compile=True,
            modules=True,
            out=True,
        )

    def owns(self, x: object) -> bool:
        if isinstance(x, torch.fx.Proxy):
            raise TypeError(_NOT_SEEN)
        return isinstance(x, torch.Tensor)

    def asarray(self, x: Any, dtype: str | None = None, device: Any = None) -> torch.Tensor:
        if device is not None:
            device = _device(device, self.capabilities.devices)
        if isinstance(x, list | int | float) and dtype is not None:  # which Dynamo follows, unlike arrays of NumPy
            x = torch.as_tensor(x, dtype=_dtype(dtype), device=device or torch.get_default_device())
        elif not isinstance(x, torch.Tensor):
            # Unlike Tensor.to, as_tensor knows of torch.set_default_device.
            x = torch.as_tensor(_from_numpy(np.asarray(x)), device=device or torch.get_default_device())
        if x.is_meta and device is not None and device.type != "meta":
            raise ValueError(_NO_VALUES)
        return x.to(device=device, dtype=_dtype(dtype))

    def to_numpy(self, x: torch.Tensor) -> np.ndarray:
        if is_fake(x):
            raise ValueError(_NO_VALUES)
        if x.dtype == torch.bfloat16:
            return x.detach().view(torch.int16).numpy(force=True).view(_numpy_bfloat16())
        return x.numpy(force=True)

    def from_dlpack(self, x: Any) -> torch.Tensor:
        return torch.from_dlpack(x)

    @contextmanager
    def exported(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        with torch.cuda.device_of(x):  # Torch exports from the current device alone
            yield x.resolve_neg()  # it would export a negative view as what it is a view of

    def device(self, x: torch.Tensor) -> torch.device:
        return x.device

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().clone()

    def flaw(self, name: str, x: torch.Tensor) -> str | None:
        if x.layout is torch.strided:
            return None
        return f"{name} is a tensor of layout {x.layout}, whose values are not all in memory. Give {name}.to_dense()."

    def conflict(self, out: torch.Tensor, x: torch.Tensor) -> str | None:
        return overlaps.conflict(out, x)

    def weights(
        self,
        shape: tuple[int, ...],
        dtype: str,
        mask: torch.Tensor | None,
        lengths: torch.Tensor | None,
        sample_weight: torch.Tensor | None,
    ) -> torch.Tensor:
        return masks.weights(shape, getattr(torch, dtype), mask, lengths, sample_weight)

    def within(self, values: torch.Tensor, low: float, high: float) -> bool | None:
        return masks.within(values, low, high)

    def constant(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    def moments(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> Moments:
        self._check_layouts(x=x)
        return _verbs(x).moments(x, weights)

    def merge(self, first: Moments, second: Moments) -> Moments:
        statistics = first.mean, first.m2, second.mean, second.m2
        return (host if _verbs(*statistics) is host else vectors).merge(first, second)

    def variance(self, moments: Moments, correction: int) -> vectors.Variance:
        return vectors.variance(moments, correction)

    def normalize(
        self,
        x: torch.Tensor,
        mean: vectors.Mean,
        var: vectors.Variance,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        weights: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return _verbs(x, mean, var, weight, bias).normalize(x, mean, var, weight, bias, eps, weights, out)

    def lerp(
        self, start: torch.Tensor, end: vectors.Mean | vectors.Variance, weight: float | torch.Tensor
    ) -> torch.Tensor:
        return vectors.lerp(start, end, weight)

    def step(
        self, momentum: float | None, num_batches_tracked: torch.Tensor | None, count: Any, correction: int
    ) -> float | torch.Tensor:
        return vectors.step(momentum, num_batches_tracked, count, correction)

    def grad_sums(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        mean: vectors.Mean,
        var: vectors.Variance,
        eps: float,
        weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _verbs(dy, x, mean, var).grad_sums(dy, x, mean, var, eps, weights)

    def grad_input(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        mean: vectors.Mean,
        var: vectors.Variance,
        weight: torch.Tensor | None,
        eps: float,
        sums: tuple[torch.Tensor, torch.Tensor] | None,
        count: Any,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        verbs = _verbs(dy, x, mean, var, weight, *(sums or ()))
        return verbs.grad_input(dy, x, mean, var, weight, eps, sums, count, weights)

    def batch_norm(self, x: torch.Tensor, params: Params, state: State, **settings: Any) -> tuple[torch.Tensor, State]:
        y, state, _ = self._run(x, params, state, **settings)
        return y, state

    def batch_norm_residuals(
        self, x: torch.Tensor, params: Params, state: State, **settings: Any
    ) -> tuple[torch.Tensor, State, Residuals]:
        y, state, residuals = self._run(x, params, state, **settings)
        return y, state, host.tensors(residuals)

    def _run(
        self,
        x: torch.Tensor,
        params: Params,
        state: State,
        *,
        weights: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **settings: Any,
    ) -> tuple[torch.Tensor, State, Residuals]:
        """Do what ``batch_norm_residuals`` does; the residuals may be arrays."""
        followed = is_transformed() or (not settings["training"] and is_recorded(*state[:2]))
        verbs = formulas if followed else routes.chosen(x, *params, *state, weights)
        if verbs is formulas or verbs is kernels:
            mean, var, _ = state
            self._check_layouts(x=x, weight=params.weight, bias=params.bias, running_mean=mean, running_var=var)
        if verbs is formulas:
            if is_scripted() and any(
                value is not None and value.requires_grad and is_constant(value) for value in params
            ):
                raise RuntimeError(_NOT_REGISTERED)
            # x is widened once, since what it gets of a gradient from each place is summed up in its dtype.
            y, state, residuals = super().batch_norm_residuals(
                x.to(vectors.WIDE), params, state, weights=weights, **settings
            )
            y = y.to(x.dtype)
            return y if out is None else out.copy_(y), state, residuals
        run = super().batch_norm_residuals if verbs is kernels else verbs.batch_norm_residuals
        if not is_recorded(x, *params):
            return run(x, params, state, weights=weights, **({} if out is None else {"out": out}), **settings)
        if out is not None:
            message = "out is written to, which autograd cannot record: call it under torch.no_grad()."
            raise RuntimeError(message)
        return autograd.BatchNorm.apply(x, *params, state, weights, settings, run)

    def _check_layouts(self, **tensors: torch.Tensor | None) -> None:
        for name, tensor in tensors.items():
            flaw = None if tensor is None else self.flaw(name, tensor)
            if flaw is not None:
                raise TypeError(flaw)

    def pullback(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        residuals: Residuals,
        eps: float,
        weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return autograd.pullback(dy, x, weight, residuals, eps, weights)

    def parameter(self, value: torch.Tensor, current: torch.Tensor | None) -> torch.Tensor:
        if torch.compiler.is_compiling():  # ``write`` keeps the parameter that there is
            return value
        with torch.inference_mode(mode=False):  # what is made within could never be trained
            return torch.nn.Parameter(value.detach().clone(), requires_grad=getattr(current, "requires_grad", True))

    def stores(self, before: State, after: State) -> bool:
        if torch.compiler.is_compiling():
            # Dynamo keeps what is stored, and hands over real arrays. Nobody does for what it does not follow.
            if not (torch.compiler.is_dynamo_compiling() or any(map(is_fake, before))) and any(map(is_fake, after)):
                raise RuntimeError(_NOT_REGISTERED)
            return True
        if is_transformed() and any(map(is_traced, after)) and not any(map(is_traced, before)):
            message = (
                "a layer in training would keep running statistics that end with this transformation of torch.func. "
                "Use bn.apply(params, state, x, training=True), which returns the new state, or eval() or freeze()."
            )
            raise RuntimeError(message)
        if is_scripted() and any(map(is_constant, before)):
            raise RuntimeError(_NOT_REGISTERED)
        return not is_backward()

    def write(self, before: Arrays, after: Arrays) -> Arrays:
        pairs = [(old, new) for old, new in zip(before, after, strict=True) if old is not new]
        if not all(isinstance(old, torch.Tensor) and _is_alike(new, old) for old, new in pairs):
            return after
        if torch.compiler.is_compiling():  # a program with a switch of autograd in it can be saved, and not loaded
            for old, new in pairs:
                old.detach().copy_(new)
            return before
        with torch.no_grad():
            if is_transformed() or is_scripted():
                for old, new in pairs:
                    old.copy_(new)
            elif pairs:  # in one call, which no interrupt splits
                with self.writing():
                    torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
        return before

    def writing(self) -> AbstractContextManager[Any]:
        return nullcontext() if torch.compiler.is_compiling() else super().writing()

    def module(self, layer: Any, adopt: Callable[[Params, State], None]) -> BatchNorm1d:
        return BatchNorm1d(self, layer, adopt)

    def grad(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return torch.func.grad(function)

    def jvp(
        self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, tangent: torch.Tensor
    ) -> torch.Tensor:
        return _quietly(torch.func.jvp)(function, (x,), (tangent,))[1]

    def vmap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.func.vmap(function)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return _quietly(torch.compile(function, fullgraph=True))


def _verbs(*values: vectors.Mean | None) -> ModuleType:
    """Return what does the arithmetic on these: the formulas where anything follows it, else the kernels."""
    tensors = list(chain.from_iterable(map(vectors.parts, values)))
    return formulas if is_transformed() or is_recorded(*tensors) else routes.chosen(*tensors)


def _quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that passes over one warning: some features of Torch use others that it has deprecated."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
            return function(*args, **kwargs)

    return call


def _is_alike(value: torch.Tensor, current: torch.Tensor) -> bool:
    return (value.shape, value.dtype, value.device) == (current.shape, current.dtype, current.device)


def _from_numpy(x: np.ndarray) -> torch.Tensor:
    """Return a CPU tensor that shares memory with x where Torch can write and address that memory."""
    addressable = all(stride >= 0 and stride % x.itemsize == 0 for stride in x.strides)
    if not (addressable and x.flags.writeable and x.dtype.isnative):
        x = x.astype(x.dtype.newbyteorder("="))
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _dtype(name: str | None) -> torch.dtype | None:
    dtype = None if name is None else getattr(torch, name, name)
    if isinstance(dtype, str) or not isinstance(dtype, torch.dtype | None):
        message = f"Torch has no dtype {name!r}."
        raise TypeError(message)
    return dtype


def _device(device: Any, usable: tuple[str, ...]) -> torch.device:
    names = {"cpu:0", "meta", *usable, *(name.partition(":")[0] for name in usable)}
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    # Of a text, Torch keeps the last digits of an index alone.
    if str(found) not in names or (isinstance(device, str) and str(found) != device):
        message = f"Torch's devices here are {', '.join(usable)}, not {device!r}."
        raise ValueError(message)
    return found


def _numpy_bfloat16() -> np.dtype:
    try:
        import ml_dtypes  # noqa: PLC0415 - the only dtype that NumPy itself does not have
    except ModuleNotFoundError as error:
        message = "NumPy has bfloat16 through ml_dtypes, which is not installed: pip install ml_dtypes."
        raise TypeError(message) from error
    return np.dtype(ml_dtypes.bfloat16)
