"""The batch norms that mbn is measured against, and how a framework's user calls ours. No backend.

A file per framework, imported in the process that measures it and nowhere else.
"""

PEERS = {
    "torch.nn": "mbn_peers.torch:Module",
    "flax.nnx": "mbn_peers.flax:Module",
    "formula": "mbn_peers.formula:Formula",
    "copy": "mbn_peers.limit:Copy",
}
"""Where they are, by name. The last is the limit, which no batch norm of arrays beyond the caches can pass."""

FRAMEWORKS = {"torch.nn": "torch", "flax.nnx": "jax"}
"""The backend of the same arrays: who is measured on a device is measured beside the peer on that device."""

LAYERS = {"torch": "mbn_peers.torch:Layer", "jax": "mbn_peers.jax:Layer"}
"""mbn's layer on the backends whose framework has gradients or a compiler of its own."""
