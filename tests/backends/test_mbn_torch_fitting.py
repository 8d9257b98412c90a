"""``fit`` on torch's data loaders, and on tensors with a graph."""

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import mbn

torch = pytest.importorskip("torch")

X = np.random.default_rng(1).normal(2, 3, (10, 4)).astype(np.float32)
TENSOR, LABELS = torch.from_numpy(X), torch.arange(10)


class Stream(torch.utils.data.IterableDataset):
    """A data set of unknown length."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(TENSOR)


@pytest.mark.parametrize(
    "dataset",
    [torch.utils.data.TensorDataset(TENSOR, LABELS), torch.utils.data.TensorDataset(TENSOR), TENSOR, Stream()],
    ids=["inputs and labels", "inputs alone", "a tensor", "a stream"],
)
def test_fit_takes_a_torch_data_loader(dataset: Any) -> None:
    bn = mbn.BatchNorm1d(4).fit(torch.utils.data.DataLoader(dataset, batch_size=3), progress=True)
    assert bn.backend == "torch"
    assert int(bn.num_batches_tracked) == 4
    np.testing.assert_allclose(bn.running_mean, X.mean(0), rtol=1e-6)
    np.testing.assert_allclose(bn.running_var, X.var(0, ddof=1), rtol=1e-6)


class Graph:
    """An object that the graph of an activation refers to."""


class Activation(torch.autograd.Function):
    """The identity, whose graph refers to an object; the object is freed with the graph."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, graph: Graph) -> torch.Tensor:
        ctx.graph = graph
        return x.clone()


def test_fit_frees_the_graph_of_every_batch() -> None:
    source, graphs = TENSOR.clone().requires_grad_(), []

    def activations() -> Iterator[torch.Tensor]:
        for _ in range(5):
            assert not any(graph() for graph in graphs)
            graph = Graph()
            graphs.append(weakref.ref(graph))
            x = Activation.apply(source, graph)
            del graph
            yield x
            del x

    bn = mbn.BatchNorm1d(4, backend="torch").fit(activations(), progress=False)
    assert len(graphs) == 5
    assert not bn.running_var.requires_grad


def test_fit_with_a_batch_of_another_framework_leaves_the_layer_unbound() -> None:
    jax = pytest.importorskip("jax", reason="it is the other framework")
    bn = mbn.BatchNorm1d(None)
    with pytest.raises(TypeError):
        bn.fit([TENSOR, TENSOR, jax.numpy.array(X)], progress=False)
    assert (bn.backend, bn.num_features) == (None, None)
