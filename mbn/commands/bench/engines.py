"""The engines of the replicas that a benchmark starts: for each backend, how its ranks find each other and gather.

Each framework is imported only in the ranks that use it.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np

from mbn.commands.bench.calls import Call

_PATIENCE = 60
"""Seconds that a rank waits for the others."""


class World(NamedTuple):
    """All ranks, as one of them sees them."""

    rank: int
    group: Any
    """The engine's own object, which layers take."""
    bare: Callable[[np.ndarray], Call]
    """Return the engine's own gather of a vector, (K,), as a call that returns an array of (ranks, K)."""
    leave: Callable[[], object]
    """End the communication, after the last gather."""


class Engine(NamedTuple):
    """A library for communication."""

    name: str
    join: Callable[[int, int, str], World]
    """``join(rank, size, file)``: MPI knows rank and size itself; Torch's ranks meet in a new file."""
    has_launcher: bool
    """Whether ``mpiexec`` starts the ranks."""


def _mpi(rank: int, size: int, file: str) -> World:
    from mpi4py import MPI

    world = MPI.COMM_WORLD

    def bare(vector: np.ndarray) -> Call:
        rows = np.empty((size, len(vector)))

        def gather() -> np.ndarray:
            world.Allgather(vector, rows)
            return rows

        return gather

    return World(world.rank, world, bare, world.Barrier)


def _gloo(rank: int, size: int, file: str) -> World:
    import torch
    import torch.distributed as dist

    all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the name before Torch 2.13
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=size, timeout=timedelta(seconds=_PATIENCE)
    )

    def bare(vector: np.ndarray) -> Call:
        own, rows = torch.from_numpy(vector), torch.empty(size * len(vector), dtype=torch.float64)

        def gather() -> Any:
            all_gather(rows, own)
            return rows.view(size, -1)

        return gather

    return World(rank, dist.group.WORLD, bare, dist.destroy_process_group)


ENGINES = {
    "numpy": Engine("MPI", _mpi, has_launcher=True),
    "numba": Engine("MPI", _mpi, has_launcher=True),
    "torch": Engine("gloo", _gloo, has_launcher=False),
}
"""The engine of each backend. JAX's replicas are devices of one process, and those of CuPy need a GPU each."""
