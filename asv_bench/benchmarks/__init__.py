"""The benchmarks that asv tracks from commit to commit: speed, memory, accuracy, and the overhead of the frontend.

asv imports all of these modules in one process, so none of them may import a framework: only ``setup`` does, in the
process that asv starts for one benchmark with one set of parameters. So the threads of two frameworks are never timed
together. Parameters must not change, nor the source of a benchmark, or its history ends.

The workloads are those of ``mbn.commands.bench``, so that asv measures the same as ``mbn bench``.
"""
