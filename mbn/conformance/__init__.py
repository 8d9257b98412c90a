"""The conformance suite: the tests that every backend must pass, those of mbn and those of plug-ins."""

from mbn.conformance.transforms import Transforms, register_transforms

__all__ = ["Transforms", "register_transforms"]
