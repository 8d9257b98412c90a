"""The attributes of a layer: those that are fixed when it is made, and its parameters and statistics."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Self, TypeVar, overload

from mbn.contract import Params

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
        raise AttributeError(f"{self._name} of a layer can't be set. {self._instead}.")

    def __delete__(self, layer: object) -> None:
        raise AttributeError(f"{self._name} of a layer can't be deleted.")


if TYPE_CHECKING:
    of_class = classmethod
else:

    class of_class(classmethod):  # noqa: N801 - a decorator
        """A method that makes a layer: called on one that exists it would leave that as it is, so it is refused."""

        def __get__(self, layer: Any, owner: type | None = None) -> Any:
            return super().__get__(layer, owner) if layer is None else partial(_refuse, self.__func__.__name__)


def _refuse(name: str, *_: Any, **__: Any) -> NoReturn:
    raise TypeError(
        f"{name}() makes a new layer and does not change this one: bn = mbn.BatchNorm1d.{name}(path). For a layer that "
        "exists: bn.load_state_dict(mbn.BatchNorm1d.load(path).state_dict())."
    )


class Entry:
    """A parameter or statistic as an attribute: reading gives the live array, setting stores a checked copy."""

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self._group = "params" if name in Params._fields else "state"

    def __get__(self, layer: Any, owner: type) -> Any:
        if layer is None:
            return self
        _ = layer._storage.num_features  # without which there are none
        return getattr(getattr(layer._storage, self._group), self._name)

    def __set__(self, layer: Any, value: Any) -> None:
        if self.__get__(layer, type(layer)) is None:
            raise ValueError(f"this layer has no {self._name} to set: {layer!r}.")
        if value is None:
            raise TypeError(
                f"{self._name} is an array or a number, not None (NoneType): what a layer has is said when it is made, "
                "by affine, bias and track_running_stats."
            )
        layer._store({self._name: layer._storage.taken(self._name, value, fill=True)})

    def __delete__(self, layer: object) -> None:
        raise AttributeError(
            f"{self._name} of a layer can't be deleted: what a layer has is said when it is made, by affine, bias and "
            "track_running_stats."
        )
