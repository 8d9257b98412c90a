"""The attributes of a layer: its fixed arguments, its parameters and statistics, and those that only modules have."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Self, TypeVar, overload

from mbn import checks
from mbn.contract import Params, State

T = TypeVar("T")
Part = TypeVar("Part", bound=Params | State)

_OF_MODULES = "Modules have it, and bn.as_module() makes one of the layer, which on Torch shares its tensors"
INSTEAD: Mapping[str, str] = {
    "forward": "Call the layer, bn(x); its pure function is bn.apply(params, state, x, training=...)",
    "buffers": "bn.state has the statistics, and bn.named_buffers() their names too",
    "get_buffer": "The statistics are attributes: bn.running_mean",
    "get_parameter": "The parameters are attributes: bn.weight",
    "requires_grad_": "On Torch each parameter has it: bn.weight.requires_grad_(False). bn.freeze() keeps the running "
    "statistics as they are",
    "zero_grad": "On Torch the optimizer of bn.parameters() has it: optimizer.zero_grad()",
    "compile": "Give the layer to the framework's compiler: torch.compile(bn)",
    "float": "Move the layer: bn.to(dtype='float32')",
    "double": "Move the layer: bn.to(dtype='float64')",
    "type": "bn.dtype tells the dtype; bn.to(dtype=...) moves the layer to another",
    **dict.fromkeys(
        ("half", "bfloat16"),
        "A float32 layer takes float16 and bfloat16 inputs, and its parameters and statistics stay float32: convert x",
    ),
    **{name: f"Move the layer: bn.to(device={name!r})" for name in ("cpu", "cuda", "ipu", "mtia", "xpu")},
    **dict.fromkeys(
        (
            *("add_module", "children", "modules", "named_children", "named_modules", "get_submodule", "set_submodule"),
            *("register_module", "register_parameter", "register_buffer", "register_backward_hook"),
            *("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"),
            *("register_full_backward_pre_hook", "register_load_state_dict_pre_hook"),
            *("register_load_state_dict_post_hook", "register_state_dict_pre_hook", "register_state_dict_post_hook"),
            *("extra_repr", "get_extra_state", "set_extra_state", "share_memory", "to_empty"),
        ),
        _OF_MODULES,
    ),
}
"""The names of ``torch.nn.BatchNorm1d`` that a layer does not have, and the way to do the same with a layer."""


def missing(layer: object, name: str) -> Any:
    """Raise the AttributeError for an attribute that a layer does not have, with the way to do the same."""
    if hasattr(type(layer), name):
        return object.__getattribute__(layer, name)  # raises the error of a property of this name
    hint = f". {INSTEAD[name]}." if name in INSTEAD else ""
    raise AttributeError(f"{type(layer).__name__!r} object has no attribute {name!r}{hint}")


class _Readable(Generic[T]):
    """An attribute of a layer that a function reads."""

    def __init__(self, read: Callable[[Any], T], doc: str) -> None:
        self._read, self.__doc__ = read, doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, layer: None, owner: type) -> Self: ...
    @overload
    def __get__(self, layer: object, owner: type) -> T: ...
    def __get__(self, layer: Any, owner: type) -> Any:
        return self if layer is None else self._read(layer)

    def __delete__(self, layer: object) -> None:
        raise AttributeError(f"{self._name} of a layer can't be deleted.")


class Fixed(_Readable[T]):
    """An argument that a layer keeps: it can be read, and the error of an assignment names the way to change it."""

    def __init__(self, read: Callable[[Any], T], doc: str, instead: str) -> None:
        super().__init__(read, doc)
        self._instead = instead

    def __set__(self, layer: object, value: Any) -> NoReturn:
        raise AttributeError(f"{self._name} of a layer can't be set. {self._instead}.")


if TYPE_CHECKING:
    of_class = classmethod
else:

    class of_class(classmethod):  # noqa: N801 - a decorator
        """A class method that makes a layer. A call on a layer is refused, since it would not change that layer."""

        def __get__(self, layer: Any, owner: type | None = None) -> Any:
            return super().__get__(layer, owner) if layer is None else partial(_refuse, self.__func__.__name__)


def _refuse(name: str, *_: Any, **__: Any) -> NoReturn:
    raise TypeError(
        f"{name}() makes a new layer and does not change this one: bn = mbn.BatchNorm1d.{name}(path). For a layer that "
        "exists: bn.load_state_dict(mbn.BatchNorm1d.load(path).state_dict())."
    )


class Entry:
    """A parameter or statistic as an attribute: reading returns the layer's array, setting stores a checked copy."""

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self._tuple = "params" if name in Params._fields else "state"

    def __get__(self, layer: Any, owner: type) -> Any:
        if layer is None:
            return self
        _ = layer._storage.num_features  # raises where the first input has not determined it: there are no arrays yet
        return getattr(getattr(layer._storage, self._tuple), self._name)

    def __set__(self, layer: Any, value: Any) -> None:
        _store(layer, {self._name: value})

    def __delete__(self, layer: object) -> None:
        raise AttributeError(
            f"{self._name} of a layer can't be deleted: a layer's arguments affine, bias and track_running_stats "
            "decide which arrays it has."
        )


class Entries(_Readable[Part]):
    """The parameters, or the statistics, as one attribute: setting it stores checked copies of all or of none."""

    def __init__(self, kind: type[Part], read: Callable[[Any], Part], doc: str) -> None:
        super().__init__(read, doc)
        self._kind = kind

    def __set__(self, layer: Any, values: Part | tuple[Any, ...]) -> None:
        current, given = self._read(layer), checks.part(self._name, values, self._kind)
        names = zip(given._fields, current, given, strict=True)
        _store(layer, {name: new for name, old, new in names if old is not None or new is not None})


def _store(layer: Any, values: Mapping[str, Any]) -> None:
    """Store checked copies of parameters or of statistics in a layer: all of them, or none if one is refused."""
    storage = layer._storage
    _ = storage.num_features  # raises where the first input has not determined it: there are no arrays yet
    held = storage.entries
    for name, value in values.items():
        if name not in held:
            raise ValueError(f"this layer has no {name} to set: {layer!r}.")
        if value is None:
            raise TypeError(
                f"{name} is an array or a number, not None (NoneType): a layer's arguments affine, bias and "
                "track_running_stats decide which arrays it has."
            )
    layer._store({name: storage.taken(name, value, fill=True) for name, value in values.items()})
