"""No backend: what several of them share, formulas on the statistics of channels and the strides of a batch."""
