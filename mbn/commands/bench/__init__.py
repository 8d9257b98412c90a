"""``mbn bench``: the speed of every backend and its peers on a shape, measured side by side."""
