"""The command line: its options, its printed output, and the processes that do the work."""
