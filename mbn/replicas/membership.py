"""The group of a layer, and all that a layer remembers of it from step to step."""

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import count
from typing import Any

from mbn import registry
from mbn.contract import LIVE, Backend, Group, Settings
from mbn.replicas.exchange import Agreement, Exchange, Kind


class _Detached:
    """The group of a layer that was pickled: a communicator exists in its own process alone."""

    def __repr__(self) -> str:
        return "<detached: the layer was pickled without its group>"

    def __reduce__(self) -> str:
        return "DETACHED"


DETACHED = _Detached()
_numbers = count()


def _resolved(given: Any, backend: Backend) -> Any:
    if not backend.capabilities.replicas:
        raise TypeError(f"{backend.name} has no replicas, so its layers have no group; not {given!r}.")
    return backend.group(given)


class Membership:
    """The membership of a layer in a group, which copies of the layer share.

    It is compared by the group alone, since it is a part of the layer's pytree.
    """

    def __init__(self, given: Any, name: str = "") -> None:
        """Note the engine's object that was ``given``; ``name`` is the layer's, for messages."""
        self.given = given
        self.key = f"membership {next(_numbers)}"
        LIVE[self.key] = self
        self._agreement = Agreement(name)

    @classmethod
    def of(cls, given: Any, backend: Backend | None, name: str = "") -> "Membership | None":
        """Return the membership of a layer, checked if its backend is known; None without a group.

        Raises:
            TypeError: no group of the backend's framework.
            ValueError: this process is not part of the group.
            ImportError: the engine is not installed.
        """
        if given is None:
            return None
        if given is False or isinstance(given, list | dict | set):
            raise TypeError(
                "group is a group of the library that connects the processes, the name of an axis of JAX or a tuple of "
                f"names, an mbn.Group, True for all processes, or None; not {given!r}."
            )
        if backend is not None:
            with suppress(RuntimeError):  # the engine may not be ready yet; training raises that error
                _resolved(given, backend)
        return cls(given, name)

    def backend_for(self, x: Any) -> Backend:
        """Return the backend of the group's framework, or else of ``x``, the input of an open layer or a function.

        The result is a backend even if ``x`` is refused, so that the other replicas hear of it.
        """
        of_group = registry.backend_of_package(type(self.given).__module__)
        if of_group is not None:
            return of_group
        try:
            return registry.owner_of(x)
        except Exception:  # noqa: BLE001 - the input is refused later, by the same error
            return registry.get_backend()

    def exchange(
        self, backend: Backend, settings: Settings | None, device: Any, kind: Kind = Kind.STEP
    ) -> AbstractContextManager[Any]:
        """Return a context whose value is the replicas of one step, or None where there is one replica alone.

        An error within the context, before the replicas have exchanged anything, reaches all of them.
        """
        traced = backend.traced_replicas(self.key)
        if traced is not None:
            return nullcontext(traced)
        return self._exchange(backend, settings, device, kind)

    def _exchange(
        self, backend: Backend, settings: Settings | None, device: Any, kind: Kind
    ) -> AbstractContextManager[Any]:
        if self.given is DETACHED:
            raise RuntimeError(
                "the layer has been pickled or loaded, and its group stayed in the other process: set bn.group, to "
                "None for a layer of this process alone. Evaluation works without."
            )
        group = _resolved(self.given, backend)
        if not isinstance(group, Group):
            return nullcontext(group)
        if group.size == 1:
            return nullcontext(None)
        return Exchange(self._agreement, group, backend, settings, device, kind)

    def resumed(self, backend: Backend) -> Any:
        """Return an exchange of a compiled step, which has found this membership by its key."""
        context = self._exchange(backend, None, None, Kind.STEP)
        return context if isinstance(context, Exchange) else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Membership) and bool(self.given == other.given)

    def __hash__(self) -> int:
        # mpi4py's communicators are equal where they are the same to MPI, and have no hash.
        return hash(self.given if isinstance(self.given, Hashable) else type(self.given))

    def __repr__(self) -> str:
        return repr(self.given)

    def __deepcopy__(self, memo: object) -> "Membership":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle names of axes and True, which mean the same in another process."""
        parts = self.given if isinstance(self.given, tuple) else (self.given,)
        lasts = all(part is True or isinstance(part, str) for part in parts)
        return Membership, (self.given if lasts else DETACHED, self._agreement.name)
