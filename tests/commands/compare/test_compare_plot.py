"""The picture of ``mbn compare``."""

import struct
from importlib import import_module

import numpy as np
import pytest

from mbn.commands.compare import examples
from mbn.commands.compare.comparison import compare
from mbn.commands.compare.messages import Measured
from mbn.commands.compare.reference import reference

pytest.importorskip("matplotlib")
plot = import_module("mbn.commands.compare.plot")


@pytest.mark.parametrize("names", [["numpy"], ["numpy", "torch", "jax", "cupy", "a-plug-in:with-a-long-device:0"]])
def test_picture_is_a_png_of_sensible_size(tmp_path, names):
    example = examples.seeded((16, 3), "float32")
    truth = reference(example)
    arrays = {quantity: exact.hi.astype(np.float32) for quantity, exact in truth.exact.items()}
    outcomes = {name: Measured("1", "cpu", arrays, {"train": 1.0, "eval": 1.0}) for name in names}
    plot.save([compare(example, truth, outcomes)], tmp_path / "p.png")
    data = (tmp_path / "p.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG")
    assert 600 < width < 6000
    assert 600 < height < 6000


def test_the_picture_names_file_shape_and_dtype(tmp_path):
    np.savez(tmp_path / "x.npz", **{f"layer{k}": np.eye(8) for k in range(8)})
    several = [compare(example, reference(example), {}) for example in examples.read(tmp_path / "x.npz", "float32", 4)]
    lines = plot._data(several, 8)
    assert lines[0] == "layer0 of x.npz (8, 8), float32, 4 of its 8 rows"
    assert lines[-1] == "and 2 more"
    assert max(map(len, plot._data(several, 3))) <= 27


def test_a_file_name_of_any_bytes_is_drawn(tmp_path):
    example = examples.seeded((4, 3), "float32")._replace(name="bad\udcff \N{CJK UNIFIED IDEOGRAPH-65E5}.npy")
    truth = reference(example)
    arrays = {quantity: exact.hi.astype(np.float32) for quantity, exact in truth.exact.items()}
    comparison = compare(example, truth, {"numpy": Measured("1", "cpu", arrays, {"train": 1.0, "eval": 1.0})})
    assert plot._data([comparison], 8)[0].startswith("bad\N{REPLACEMENT CHARACTER}")
    plot.save([comparison], tmp_path / "p.png")
    assert (tmp_path / "p.png").exists()
