"""``mbn bench``: how fast every backend and its peers normalise a shape, measured side by side."""
