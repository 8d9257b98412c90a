"""Keras takes its backend when it is imported, and by default one that is not installed."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
