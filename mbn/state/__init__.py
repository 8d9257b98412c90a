"""What a layer holds, and how that travels: as a state_dict, as a file, as a part of a checkpoint."""

from mbn.contract import Params, Settings, State

__all__ = ["Params", "Settings", "State"]
