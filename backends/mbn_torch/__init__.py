"""The Torch backend of mbn."""
