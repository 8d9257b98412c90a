"""``mbn compare``: the numbers of one layer on every backend, on given data and this machine."""
