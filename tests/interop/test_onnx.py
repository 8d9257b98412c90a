"""Layers from and to nodes of ONNX, which the reference evaluator and the runtime execute."""

import copy
from functools import partial

import numpy as np
import pytest
from interop_samples import (
    ARGUMENTS,
    CHANNELS,
    SHAPES,
    assert_evaluates_as,
    assert_learns_as,
    assert_same_layer,
    layer,
    sample,
    vectors,
    warns,
)

import mbn

onnx = pytest.importorskip("onnx")
onnx_reference = pytest.importorskip("onnx.reference")
onnxruntime = pytest.importorskip("onnxruntime")
helper, numpy_helper = onnx.helper, onnx.numpy_helper

BACKENDS = ["numpy", "torch"]

WEIGHTS = ["scale", "shift", "mean", "var"]

TYPES = {"float16": 10, "bfloat16": 16, "float32": 1, "float64": 11}
"""By dtype: onnx.TensorProto.DataType."""


def initializers(dtype="float32", names=WEIGHTS):
    return [
        helper.make_tensor(name, TYPES[dtype], (CHANNELS,), values)
        for name, values in zip(names, vectors(), strict=True)
    ]


def model_of(nodes, weights, *, opset=15, ir_version=10, dtype="float32", ndim=2, outputs=("y",)):
    """Return a checked model from x to y whose tensors are all of one type."""
    shape = ["N", CHANNELS, "L"][:ndim]
    inputs = [helper.make_tensor_value_info("x", TYPES[dtype], shape)]
    if ir_version < 4:
        inputs += [helper.make_tensor_value_info(each.name, each.data_type, each.dims) for each in weights]
    infos = [
        helper.make_tensor_value_info(name, TYPES[dtype], shape if name in {"y", "h", "z"} else (CHANNELS,))
        for name in outputs
    ]
    graph = helper.make_graph(nodes, "graph", inputs, infos, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    return checked(model)


def checked(model):
    onnx.checker.check_model(model, full_check=True)
    return model


def node_of(outputs=("y",), **attributes):
    return helper.make_node("BatchNormalization", ["x", *WEIGHTS], list(outputs), **attributes)


def in_runtime(model, x):
    """Return the outputs of a model in the runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})


def in_reference(model, x):
    """Return the outputs of a model in the reference evaluator of ONNX."""
    return onnx_reference.ReferenceEvaluator(model).run(None, {"x": x})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[1])
@pytest.mark.parametrize("opset", [7, 9, 14, 15, 21])
@pytest.mark.parametrize("attributes", [{}, {"epsilon": 1e-3, "momentum": 0.75}, {"epsilon": 0.0}])
def test_from_onnx_gives_the_same_output(attributes, opset, shape, backend):
    model, x = model_of([node_of(**attributes)], initializers(), opset=opset, ndim=len(shape)), sample(shape)
    bn = mbn.from_onnx(model, "y", backend=backend)
    assert not bn.training
    assert (bn.eps, bn.momentum) == (
        attributes.get("epsilon", 1e-5),
        {0.9: 0.1, 0.75: 0.25}[attributes.get("momentum", 0.9)],
    )
    assert_evaluates_as(bn, in_runtime(model, x)[0], x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[1])
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_to_onnx_gives_the_same_output(arguments, shape, backend):
    bn, x = layer(correction=0, **arguments, backend=backend), sample(shape)
    if bn.affine:
        node, weights = mbn.to_onnx(bn)
    else:
        with warns("weight and bias", "ones and zeros"):
            node, weights = mbn.to_onnx(bn)
    for opset in (9, 15):
        model = model_of([node], weights, opset=opset, ndim=len(shape))
        assert_evaluates_as(bn, in_runtime(model, x)[0], x)
    assert_evaluates_as(bn, in_reference(model, x)[0], x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[1])
@pytest.mark.parametrize("momentum", [0.9, 0.25])
def test_from_and_to_onnx_keep_training_the_same(momentum, shape, backend):
    outputs = ("y", "new_mean", "new_var")
    node = node_of(outputs, training_mode=1, momentum=momentum)
    model = model_of([node], initializers(), ndim=len(shape), outputs=outputs)
    bn = mbn.from_onnx(model, "y", backend=backend)
    assert bn.training
    back = mbn.to_onnx(bn, model, "y")
    for each in (model, checked(back)):
        assert_learns_as(copy.deepcopy(bn), lambda x, each=each: in_reference(each, x)[1:], sample(shape), bound=8)


def test_from_onnx_reads_training_from_the_outputs_of_old_nodes():
    outputs = ["y", "m", "v", "saved_m", "saved_v"]
    assert mbn.from_onnx(node_of(outputs), initializers()).training
    assert not mbn.from_onnx(node_of(), initializers()).training


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arguments", [{}, {"eps": 1e-3, "momentum": 0.25}, {"eps": 0.0, "momentum": 1.0}])
def test_round_trips_are_exact(arguments, backend):
    bn = layer(correction=0, **arguments, backend=backend)
    node, weights = mbn.to_onnx(bn)
    assert_same_layer(mbn.from_onnx(node, weights, backend=backend), bn)
    assert_same_layer(mbn.from_onnx(model_of([node], weights), "y", backend=backend), bn)


def test_float64_stays_float64_with_an_eps_of_float32():
    bn, x = layer(correction=0, dtype="float64", eps=2.0**-10, backend="numpy"), sample(dtype="float64")
    node, weights = mbn.to_onnx(bn)
    model = model_of([node], weights, dtype="float64")
    assert_evaluates_as(copy.deepcopy(bn), in_runtime(model, x)[0], x, bound=4)
    assert_same_layer(mbn.from_onnx(model, "y", backend="numpy"), bn)
    bn.eps = 1e-5
    with warns("eps=1e-05", "float32"):
        node, weights = mbn.to_onnx(bn)
    assert mbn.from_onnx(node, weights).eps == float(np.float32(1e-5))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_from_onnx_widens_halves_to_float32(dtype):
    with warns(f"weight .{dtype}., bias", "running_var", "float32"):
        bn = mbn.from_onnx(node_of(), initializers(dtype))
    np.testing.assert_array_equal(bn.weight, numpy_helper.to_array(initializers(dtype)[0]).astype("float32"))


def test_weights_may_come_from_constant_and_identity_nodes():
    scale, shift, mean, var = initializers()
    constant = helper.make_node("Constant", [], ["mean"], value=mean)
    scale.name = "elsewhere"
    identity = helper.make_node("Identity", ["elsewhere"], ["scale"])
    model, x = model_of([constant, identity, node_of()], [scale, shift, var]), sample()
    bn = mbn.from_onnx(model, "y", backend="numpy")
    assert_evaluates_as(bn, in_runtime(model, x)[0], x)
    bn.running_mean, bn.weight = 2.0, 3.0
    assert_evaluates_as(bn, in_runtime(checked(mbn.to_onnx(bn, model, "y")), x)[0], x)


def test_to_onnx_changes_one_node_of_a_model_and_no_other():
    """Both nodes share their weights, and one of them reads its scale as its variance too."""
    first = helper.make_node("BatchNormalization", ["x", "w", "shift", "mean", "w"], ["h"], "bn1")
    second = helper.make_node("BatchNormalization", ["h", "w", "shift", "mean", "var"], ["y"], "bn2", epsilon=0.5)
    model = model_of([first, second], initializers(names=["w", "shift", "mean", "var"]), outputs=("y", "h"))
    x, before = sample(), model.SerializeToString()
    bn = layer(correction=0, eps=0.25, momentum=0.75, backend="numpy")
    bn.weight, bn.running_mean = 0.5, 7.0
    one, two = checked(mbn.to_onnx(bn, model, "bn1")), checked(mbn.to_onnx(bn, model, "bn2"))
    assert model.SerializeToString() == before
    assert_same_layer(mbn.from_onnx(one, "bn1", backend="numpy"), bn)
    assert_same_layer(mbn.from_onnx(two, "bn2", backend="numpy"), bn)
    assert_same_layer(mbn.from_onnx(one, "bn2"), mbn.from_onnx(model, "bn2"))
    assert_same_layer(mbn.from_onnx(two, "bn1"), mbn.from_onnx(model, "bn1"))
    assert_evaluates_as(copy.deepcopy(bn), in_runtime(one, x)[1], x)
    assert len(two.graph.initializer) == len(model.graph.initializer) + 3  # var was not shared


def test_to_onnx_keeps_a_weight_that_a_branch_reads():
    branch = helper.make_graph(
        [helper.make_node("Identity", ["mean"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", 1, (CHANNELS,))],
    )
    condition = numpy_helper.from_array(np.bool_(1), "condition")
    choice = helper.make_node("If", ["condition"], ["chosen"], then_branch=branch, else_branch=branch)
    model = model_of([node_of(), choice], [*initializers(), condition], outputs=("y", "chosen"))
    x, bn = sample(), layer(correction=0, backend="numpy")
    bn.running_mean = 9.0
    y, chosen = in_runtime(checked(mbn.to_onnx(bn, model, "y")), x)
    assert_evaluates_as(bn, y, x)
    np.testing.assert_array_equal(chosen, vectors()[2])


def test_to_onnx_serves_old_models_whose_weights_are_inputs():
    twice = [node_of(("h",)), helper.make_node("BatchNormalization", ["h", *WEIGHTS], ["y"])]
    model = model_of(twice, initializers(), opset=8, ir_version=3)
    bn = layer(correction=0, backend="numpy")
    bn.weight = 0.5
    result = checked(mbn.to_onnx(bn, model, "y"))
    assert_same_layer(mbn.from_onnx(result, "y", backend="numpy"), bn)


def test_to_onnx_keeps_the_dtype_of_weights_in_a_model():
    model = model_of([node_of()], initializers("float16"), dtype="float16", opset=9)
    bn = layer(correction=0)
    with pytest.warns(mbn.ConversionWarning, match="rounded to float16") as caught:
        result = mbn.to_onnx(bn, model, "y")
    assert len(caught) == 4
    assert {each.data_type for each in checked(result).graph.initializer} == {TYPES["float16"]}
    for name in ("weight", "bias", "running_mean", "running_var"):
        setattr(bn, name, 0.5)
    assert mbn.to_onnx(bn, model, "y") != model
    bn.running_var = 1e6
    with pytest.raises(ValueError, match="running_var is float16 in the model, which cannot hold 1000000"):
        mbn.to_onnx(bn, model, "y")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"correction": 1}, ("running_var", "correction=1", "biased")),
        ({"momentum": None}, ("momentum=None", "0.9")),
        ({"momentum": 1e-9}, ("momentum=1e-09", "old value", "1.0")),
        ({"axis": -1}, ("axis=-1", "transposed")),
        ({"bias": False}, ("bias: ", "zeros")),
    ],
)
def test_to_onnx_warns_of_settings_that_onnx_lacks(arguments, words):
    bn = layer(**{"correction": 0, **arguments})
    with warns(*words):
        node, weights = mbn.to_onnx(bn)
    assert_evaluates_as(bn, in_runtime(model_of([node], weights), sample())[0], sample())


def test_to_onnx_makes_an_evaluation_node_of_a_frozen_layer():
    with warns("freeze", "evaluation"):
        node, _ = mbn.to_onnx(layer(correction=0).train().freeze())
    assert "training_mode" not in {attribute.name for attribute in node.attribute}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"track_running_stats": False}, "ONNX.*track_running_stats=False"),
        ({"eps": 1e-50}, "eps.*float32.*1e-50"),
        ({"momentum": 1e39}, "momentum.*float32"),
    ],
)
def test_to_onnx_refuses_settings_that_onnx_cannot_hold(arguments, words):
    with pytest.raises(ValueError, match=words):
        mbn.to_onnx(layer(correction=0, **arguments))


def _in_another_file(name):
    tensor = numpy_helper.from_array(np.ones(CHANNELS, np.float32), name)
    onnx.external_data_helper.set_external_data(tensor, "weights.bin")
    tensor.ClearField("raw_data")
    return tensor


def _changed(index, **fields):
    """Return a node and its initializers; the initializer of this index has other fields."""
    tensors = initializers()
    for field, value in fields.items():
        setattr(tensors[index], field, value)
    return node_of(), tensors


def _by_way_of(*nodes):
    """Return an unchecked model whose last weight comes from these nodes."""
    model = model_of([node_of()], initializers())
    del model.graph.initializer[3]
    model.graph.node.extend(nodes)
    return model, "y"


def _without_a_name():
    model = MODEL()
    del model.graph.node[0].output[:]
    return model, "nowhere"


def _truncated():
    node, tensors = node_of(), [numpy_helper.from_array(np.ones(CHANNELS, np.float32), name) for name in WEIGHTS]
    tensors[2].raw_data = tensors[2].raw_data[:-2]
    return node, tensors


RELU = helper.make_node("Relu", ["y"], ["z"], "relu")
MODEL = partial(model_of, [node_of(), RELU], initializers(), outputs=("z",))


@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        (lambda: (MODEL(), "nowhere"), ValueError, "0 nodes named 'nowhere'; its batch norms are: y"),
        (lambda: (MODEL(), ""), ValueError, "0 nodes named ''"),
        (lambda: (MODEL(), "relu"), ValueError, "is a Relu, not a BatchNormalization"),
        (lambda: (RELU, initializers()), ValueError, "is a Relu"),
        (lambda: (node_of(), initializers()[:3]), ValueError, "running_var is 'var', and there is neither"),
        (lambda: (node_of(spatial=0), initializers()), ValueError, "spatial=0"),
        (lambda: (helper.make_node("BatchNormalization", ["x"], ["y"]), []), ValueError, "1 inputs; .* has 5"),
        (lambda: (node_of(), map(_in_another_file, WEIGHTS)), ValueError, "weight is in another file.*onnx.load"),
        (lambda: (MODEL(), initializers()), TypeError, "onnx.ModelProto and the name.*not ModelProto and list"),
        (lambda: (node_of(), "y"), TypeError, "not NodeProto and str"),
        (lambda: (node_of(), None), TypeError, "not NodeProto and NoneType"),
        (lambda: ("model.onnx", "y"), TypeError, "not str and str"),
        *(
            (lambda nodes=nodes: _by_way_of(*nodes), ValueError, "running_var is 'var', and there is neither")
            for nodes in [
                [helper.make_node("Identity", ["var"], ["var"])],
                [helper.make_node("Identity", ["b"], ["var"]), helper.make_node("Identity", ["var"], ["b"])],
                [helper.make_node("Identity", [], ["var"])],
                [helper.make_node("Constant", [], ["var"])],
                [helper.make_node("Constant", [], ["var"], value_float=1.0)],
                [onnx.NodeProto(op_type="Constant", output=["var"], attribute=[onnx.AttributeProto(name="value")])],
            ]
        ),
        (_without_a_name, ValueError, "its batch norms are: one without a name"),
        (lambda: _changed(1, data_type=99), TypeError, "bias is of the unknown type 99; there are layers from float16"),
        (lambda: _changed(1, data_type=0), TypeError, "bias is undefined; there are layers from float16"),
        (lambda: _changed(1, data_type=6), TypeError, "bias is int32; there are layers from float16"),
        (lambda: _changed(1, data_type=17), TypeError, "bias is float8e4m3fn; there are layers from float16"),
        (_truncated, ValueError, "running_mean is damaged"),
        (lambda: (node_of(momentum=float("nan")), initializers()), ValueError, "momentum .* from 0 to 1, not nan"),
        (lambda: (node_of(momentum=float("inf")), initializers()), ValueError, "momentum .* from 0 to 1, not inf"),
        (lambda: (node_of(momentum=5.0), initializers()), ValueError, "momentum .* from 0 to 1, not 5"),
        (lambda: (node_of(momentum="0.9"), initializers()), TypeError, "the attribute momentum is no float"),
        (lambda: (node_of(epsilon=float("nan")), initializers()), ValueError, "eps is added to a variance.*nan"),
        (lambda: (node_of(epsilon=[1e-5]), initializers()), TypeError, "the attribute epsilon is no float"),
        (lambda: (node_of(training_mode=7), initializers()), ValueError, "training_mode is 0 or 1, not 7"),
        (lambda: (node_of(training_mode=0.0), initializers()), TypeError, "the attribute training_mode is no int"),
    ],
)
def test_from_onnx_refuses_bad_model_or_node(made, error, words):
    with pytest.raises(error, match=words):
        mbn.from_onnx(*made())


def _with_inputs(number):
    model = MODEL()
    del model.graph.node[0].input[number:]
    return model


def _of_type(data_type):
    model = MODEL()
    model.graph.initializer[0].data_type = data_type
    return model


def test_from_onnx_refuses_a_name_that_two_nodes_have():
    model = model_of([node_of(("h",)), helper.make_node("BatchNormalization", ["h", *WEIGHTS], ["y"])], initializers())
    for node in model.graph.node:
        node.name = "bn"
    with pytest.raises(ValueError, match="2 nodes named 'bn'; its batch norms are: bn, bn"):
        mbn.from_onnx(model, "bn")
    assert mbn.from_onnx(model, "h").num_features == CHANNELS


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((MODEL(),), TypeError, "both the model and the name"),
        ((None, "y"), TypeError, "both the model and the name"),
        (("model.onnx", "y"), TypeError, "onnx.ModelProto, not str"),
        ((MODEL(), "relu"), ValueError, "is a Relu"),
        (_by_way_of(helper.make_node("Identity", ["var"], ["var"])), ValueError, "running_var is 'var'"),
        ((_with_inputs(2), "y"), ValueError, "the node has 2 inputs; .* has 5"),
        ((_of_type(99), "y"), TypeError, "weight is of the unknown type 99"),
    ],
)
def test_to_onnx_refuses_bad_model_or_node(arguments, error, words):
    with pytest.raises(error, match=words):
        mbn.to_onnx(layer(correction=0), *arguments)


def test_to_onnx_refuses_a_node_with_another_number_of_channels():
    with pytest.raises(ValueError, match=r"weight has shape \(5,\) in the model and \(3,\) in the layer"):
        mbn.to_onnx(mbn.BatchNorm1d(3, correction=0), MODEL(), "y")


def test_torch_module_converts_to_onnx_through_a_layer():
    torch = pytest.importorskip("torch")
    theirs, x = torch.nn.BatchNorm1d(CHANNELS), sample()
    theirs(torch.from_numpy(x))
    bn = mbn.from_torch(theirs.eval())
    with warns("correction=1"):
        node, weights = mbn.to_onnx(bn)
    assert_evaluates_as(bn, theirs(torch.from_numpy(x)).detach(), x)
    assert_evaluates_as(bn, in_runtime(model_of([node], weights), x)[0], x)
