"""Keras chooses its backend when it is imported; its default, TensorFlow, is not installed."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
