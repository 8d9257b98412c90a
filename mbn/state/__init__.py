"""The arrays of a layer, and their exchange: state_dicts, files, checkpoints."""

from mbn.contract import Params, Settings, State
from mbn.state.keys import IncompatibleKeys

__all__ = ["IncompatibleKeys", "Params", "Settings", "State"]
