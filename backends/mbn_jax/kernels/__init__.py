"""The kernels of JAX arrays: passes over x, their sums, and the primitives that compute them in float64."""
