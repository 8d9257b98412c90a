"""The arithmetic of JAX arrays: passes over x, the sums that they need, and the primitives that carry them."""
