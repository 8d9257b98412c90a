"""Arrays in chunks, most of which are not in memory.

Each chunk is used once, and few of them are in memory at a time.
"""
