"""A plugin of pytest by which JAX's passes take the compiled loops for arrays of every size."""

from mbn_jax.kernels import compiled_loops

compiled_loops.LEAST[:] = 2 * [0]
assert all(map(compiled_loops.is_registered, range(4)))
