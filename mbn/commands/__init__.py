"""The command line: what is asked for, how it is printed, and the processes that do the work."""
