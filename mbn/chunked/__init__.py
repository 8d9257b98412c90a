"""Arrays that need not fit into memory, since they consist of parts."""
