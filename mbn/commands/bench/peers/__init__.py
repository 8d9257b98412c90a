"""The batch norms that mbn is measured against, and how a framework's user calls ours. No backend.

A file per framework, imported in the process that measures it and nowhere else.
"""

PEERS = {
    "torch.nn": "mbn.commands.bench.peers.torch:Module",
    "flax.nnx": "mbn.commands.bench.peers.flax:Module",
    "formula": "mbn.commands.bench.peers.formula:Formula",
    "copy": "mbn.commands.bench.peers.limit:copy",
}
"""Where they are, by name. The last is the limit, which no batch norm of arrays beyond the caches can pass."""

FRAMEWORKS = {"torch.nn": "torch", "flax.nnx": "jax"}
"""The backend of the same arrays: who is measured on a device is measured beside the peer on that device."""

HOST_ONLY = {"formula"}
"""The peers that are nowhere but on the CPU."""

LAYERS = {
    "torch": "mbn.commands.bench.peers.torch:Layer",
    "jax": "mbn.commands.bench.peers.jax:Layer",
    "cupy": "mbn.commands.bench.peers.cupy:Layer",
}
"""mbn's layer on the backends whose framework has gradients, a compiler or a clock of its own."""

ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
"""What a process that shares a GPU with others has to set before it asks for the first array."""
