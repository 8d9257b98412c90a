"""The batch norms that mbn is measured against, and mbn's layer called as a user of each framework calls it.

Each framework has a file, which is imported only in the process that measures it.
"""

PEERS = {
    "torch.nn": "mbn.commands.bench.peers.torch:Module",
    "flax.nnx": "mbn.commands.bench.peers.flax:Module",
    "formula": "mbn.commands.bench.peers.formula:Formula",
    "copy": "mbn.commands.bench.peers.limit:copy",
}
"""Their classes, by name. The last is the limit, which no batch norm of arrays beyond the caches can pass."""

FRAMEWORKS = {"torch.nn": "torch", "flax.nnx": "jax"}
"""The backend that has the same arrays. A backend on a device is measured beside its peer on that device."""

HOST_ONLY = {"formula"}
"""The peers that the CPU alone has."""

LAYERS = {
    "torch": "mbn.commands.bench.peers.torch:Layer",
    "jax": "mbn.commands.bench.peers.jax:Layer",
    "cupy": "mbn.commands.bench.peers.cupy:Layer",
}
"""mbn's layer on the backends whose framework has gradients, a compiler or a clock of its own."""

ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
"""The environment of a process that shares a GPU with others, from before its first array."""
