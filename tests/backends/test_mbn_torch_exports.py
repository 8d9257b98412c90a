"""Traces, graphs and exports of models with layers of mbn: they do what the model does, or are refused."""

import copy
import io
from functools import partial

import numpy as np
import pytest
from torch_samples import sample

import mbn

torch = pytest.importorskip("torch")

# The tracers are deprecated, and warn of every condition; the layer has conditions on shapes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are using the legacy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Setting `training` to something:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:ONNX Preprocess - Removing mutation:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

X = sample(8, 5)


def _model(training, **arguments):
    torch.manual_seed(0)
    norm = mbn.BatchNorm1d(3, backend="torch", **arguments)
    norm.running_mean, norm.running_var, norm.weight = 0.5, 2, [1, 2, 3]
    return torch.nn.Sequential(torch.nn.Linear(5, 3), norm.as_module()).train(training)


def _replaced(training):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3)).train(training)
    return mbn.replace_batchnorm(model)


class Holder(torch.nn.Module):
    """A model with a layer that is no module, and so is not registered."""

    def __init__(self, bn):
        super().__init__()
        self.bn = bn

    def forward(self, x):
        return self.bn(x)


def _assert_same_steps(actual, model):
    """Check outputs, gradients and statistics over batches of several sizes."""
    for n in (8, 3, 50):
        inputs = [sample(n, 5, seed=n).requires_grad_() for _ in range(2)]
        outputs = [call(x) for call, x in zip((actual, model), inputs, strict=True)]
        torch.testing.assert_close(*outputs)
        gradients = [torch.autograd.grad(y.pow(3).sum(), x)[0] for y, x in zip(outputs, inputs, strict=True)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    expected = dict(model.named_buffers())
    for key, buffer in actual.named_buffers():
        torch.testing.assert_close(buffer, expected[key])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [_replaced, _model, partial(_model, momentum=None), partial(_model, correction=0)])
def test_jit_trace_does_what_the_model_does(training, make):
    model = make(training)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (X,)), file)  # tracing is a training step of the model, as with torch.nn
    file.seek(0)
    _assert_same_steps(torch.jit.load(file), model)


@pytest.mark.parametrize("name", ["mask", "lengths", "sample_weight"])
def test_jit_trace_takes_masks_lengths_and_sample_weights(name):
    x = sample(8, 3, 4)
    values = {"mask": x[:, 0] > 3, "lengths": torch.arange(8) % 5, "sample_weight": x[:, 0].abs()}[name]
    module = mbn.BatchNorm1d(3, backend="torch").as_module()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = module

        def forward(self, x, values):
            return self.norm(x, **{name: values})

    traced = torch.jit.trace(Model(), (x, values))
    twin = copy.deepcopy(module)
    for shift in (1, 2):
        torch.testing.assert_close(traced(x, values.roll(shift)), twin(x, **{name: values.roll(shift)}))
    torch.testing.assert_close(dict(module.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [_replaced, _model])
def test_onnx_export_does_what_the_model_does(training, make):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, file = make(training), io.BytesIO()
    modes = torch.onnx.TrainingMode
    torch.onnx.export(
        model,
        (X,),
        file,
        dynamo=False,
        input_names=["x"],
        dynamic_axes={"x": {0: "n"}},
        training=modes.TRAINING if training else modes.EVAL,
        do_constant_folding=not training,
    )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for n in (8, 3, 50):
        x = sample(n, 5, seed=n)
        (y,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(y, model(x).detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_module_is_a_leaf_of_a_symbolic_trace(training):
    model = _replaced(training)
    twin = copy.deepcopy(model)
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert int(model[1].num_batches_tracked) == 0
    _assert_same_steps(graph, twin)


def test_leaf_of_a_symbolic_trace_takes_a_mask():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = mbn.BatchNorm1d(3, backend="torch").as_module()

        def forward(self, x, mask):
            return self.norm(x, mask=mask)

    model, x = Model(), sample(8, 3)
    twin, mask = copy.deepcopy(model), x[:, 0] > 3
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x, mask), twin(x, mask))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: Holder(mbn.BatchNorm1d(3, backend="torch")), r"as_module.*replace_batchnorm\(model, back=True\)"),
        (lambda: Holder(mbn.BatchNorm1d(None)), "as_module"),
        (lambda: Holder(partial(mbn.functional.batch_norm, training=True)), "as_module"),
        (lambda: mbn.BatchNorm1d(3, backend="torch").as_module(), "put it into a model"),
    ],
    ids=["layer", "open layer", "function", "module alone"],
)
def test_symbolic_trace_into_a_layer_is_refused(model, words):
    with pytest.raises(TypeError, match=words):
        torch.fx.symbolic_trace(model())


@pytest.mark.parametrize("make", [_replaced, lambda training: _model(training)[1]], ids=["model", "module"])
def test_jit_script_is_refused(make):
    model = make(training=False)
    with pytest.raises(RuntimeError, match=r"replace_batchnorm\(model, back=True\)"):
        torch.jit.script(model)
    mbn.replace_batchnorm(model, back=True)
    torch.jit.script(model)


def _export_to_onnx(model, inputs):
    pytest.importorskip("onnx")
    kept = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    return torch.onnx.export(model, inputs, io.BytesIO(), dynamo=False, **kept)


TRACERS = {
    "torch.jit.trace": torch.jit.trace,
    "torch.onnx.export": _export_to_onnx,
    "torch.export.export": partial(torch.export.export, strict=False),
}


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("trace", TRACERS.values(), ids=TRACERS)
def test_tracing_a_layer_that_is_no_module_is_refused_in_training(trace, trainable):
    bn = mbn.BatchNorm1d(3, backend="torch")
    for parameter in bn.parameters():
        parameter.requires_grad_(trainable)
    before = bn.state
    with pytest.raises(RuntimeError, match=r"bn\.as_module\(\)"):
        trace(Holder(bn), (sample(8, 3),))
    assert bn.state is before
    bn(sample(8, 3))
    assert type(bn.running_mean) is torch.Tensor
    assert bn.num_batches_tracked == 1


def test_jit_trace_of_a_constant_layer_works_in_evaluation():
    bn = mbn.BatchNorm1d(3, backend="torch").eval()
    bn.running_mean, bn.running_var = 0.5, 2
    for parameter in bn.parameters():
        parameter.requires_grad_(requires_grad=False)
    traced = torch.jit.trace(Holder(bn), (sample(8, 3),))
    x = sample(5, 3, seed=1)
    torch.testing.assert_close(traced(x), bn(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("decomposed", [True, False])
def test_exported_program_can_be_saved_and_loaded(training, strict, decomposed):
    model, file = _replaced(training), io.BytesIO()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (X,), dynamic_shapes=({0: batch},), strict=strict)
    torch.export.save(program.run_decompositions() if decomposed else program, file)
    file.seek(0)
    _assert_same_steps(torch.export.load(file).module(), model)


def test_export_of_an_unbound_layer_is_refused():
    bn = mbn.BatchNorm1d(None)
    with pytest.raises(RuntimeError, match="call it once before"):
        torch.export.export(Holder(bn), (sample(8, 3),), strict=False)
    assert (bn.backend, bn.num_features) == (None, None)
