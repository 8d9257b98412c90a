"""The shared suite: what every backend must do, ours or a stranger's."""

from mbn.conformance.transforms import Transforms, register_transforms

__all__ = ["Transforms", "register_transforms"]
