"""A stand-in for the part of cupyx that ``mbn_cupy`` meets: communicators of NCCL, among threads of one process."""
