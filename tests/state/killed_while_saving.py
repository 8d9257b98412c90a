"""Kill processes while they save: ``python killed_while_saving.py FOLDER KILLS`` counts the files that they leave.

Each process saves two layers in turn to one file, until it is killed; then the file must hold one of the two layers.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import numpy as np

import mbn


def layer(num_features: int) -> mbn.BatchNorm1d:
    bn = mbn.BatchNorm1d(num_features, momentum=1 / num_features, backend="numpy")
    for key in bn.state_dict():
        setattr(bn, key, num_features)
    return bn


LAYERS = {num_features: layer(num_features) for num_features in (4_000, 40_000)}


def save_for_ever(path: Path) -> NoReturn:
    signal.alarm(60)  # ends the process if its parent is gone
    while True:
        for bn in LAYERS.values():
            bn.save(path)


def is_complete(bn: mbn.BatchNorm1d) -> bool:
    saved = LAYERS[bn.num_features]
    same = (np.array_equal(value, bn.state_dict()[key]) for key, value in saved.state_dict().items())
    return repr(bn.to(backend="numpy")) == repr(saved) and all(same)


def main(folder: Path, kills: int) -> None:
    path = folder / "bn.safetensors"
    LAYERS[4_000].save(path)
    delays = np.random.default_rng(0).uniform(0.0, 0.02, kills)
    left = {"whole": 0, "unfinished": 0}
    for delay in delays:
        child = os.fork()
        if child == 0:
            save_for_ever(path)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left["whole"] += is_complete(mbn.BatchNorm1d.load(path))
        unfinished = list(folder.glob(".mbn-*"))
        left["unfinished"] += bool(unfinished)
    LAYERS[4_000].save(path)
    assert list(folder.iterdir()) == [path]
    json.dump(left, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
