"""The state of a layer, and how it travels: as a state_dict, as a file, as a part of a checkpoint."""

from mbn.contract import Params, Settings, State
from mbn.state.keys import IncompatibleKeys

__all__ = ["IncompatibleKeys", "Params", "Settings", "State"]
