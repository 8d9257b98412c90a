"""Synchronize: all layers of a model join a group, or none does."""

from typing import Any

import numpy as np
import pytest
from interop_samples import warns

import mbn


class Pair(mbn.Group):
    rank, size = 0, 2

    def gather(self, vector: Any) -> Any:
        return np.stack([vector, vector])


def test_layers_of_containers_join_and_leave() -> None:
    first, second, group = mbn.BatchNorm1d(3), mbn.BatchNorm1d(3, backend="numpy"), Pair()
    model = {"a": first, "b": [second, "no layer"]}
    assert mbn.synchronize(model, group) is model
    assert first.group is second.group is group
    with pytest.raises(ValueError, match=r"the layer 'b.0'|channels"):
        second(np.ones((2, 5), np.float32))
    mbn.synchronize(model, None)
    assert first.group is second.group is None


def test_model_without_layers_is_rejected() -> None:
    for model in (3, [], {"a": "b"}):
        with pytest.raises(ValueError, match="there is no layer of mbn in this"):
            mbn.synchronize(model, Pair())


def test_no_layer_joins_if_one_cannot() -> None:
    pytest.importorskip("jax")
    first, second = mbn.BatchNorm1d(3, backend="numpy"), mbn.BatchNorm1d(3, backend="jax")
    with pytest.raises(TypeError, match="JAX"):
        mbn.synchronize([first, second], Pair())
    assert first.group is None


def test_modules_of_torch_join_and_its_own_stay_local() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Sequential(torch.nn.BatchNorm2d(3)))
    mbn.replace_batchnorm(model)
    model.append(torch.nn.SyncBatchNorm(3))
    with warns("'1.0' stays local", "BatchNorm2d"):
        mbn.synchronize(model, True)
    assert model[0].group is True
    assert model[0].layer.group is True
    del model[1:]
    mbn.synchronize({"model": model}, None)
    assert model[0].group is None


def test_modules_of_flax_join() -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Sequential(mbn.BatchNorm1d(3, backend="jax").as_module(), nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    assert mbn.synchronize([model], "batch") == [model]
    assert model.layers[0].group == "batch"
    mbn.synchronize(model, None)
    assert model.layers[0].group is None
