"""The shared suite: what every backend must do, ours or a stranger's."""
