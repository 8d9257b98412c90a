"""``mbn compare``: does this layer give the same numbers on every backend, on this data and this machine?"""
