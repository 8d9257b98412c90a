"""``mbn normalize``: normalise an array in a file, chunk by chunk, to a new file."""
