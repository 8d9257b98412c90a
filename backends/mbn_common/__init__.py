"""Code that several backends share: formulas on the statistics of channels, and the strides of a batch. No backend."""
