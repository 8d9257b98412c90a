"""Torch's operators: in compiled code they have the bits of eager calls, and derivatives of every order."""

import io
from functools import partial

import pytest
from torch_samples import KINDS, compile_fully, count_graphs, draw_weights, sample

import mbn

torch = pytest.importorskip("torch")
backend = mbn.get_backend("torch")
operators = pytest.importorskip("mbn_torch.operators")

# The first use of forward mode loads parts of Torch that Torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

DTYPES = ["float32", "float64", "float16", "bfloat16"]
SHAPES = {"(N, C)": (40, 3), "(N, C, L)": (9, 3, 5), "channels last": (9, 5, 3), "transposed": (9, 3, 5)}


@pytest.fixture
def for_all_sizes(monkeypatch):
    """Have operators called for small batches too."""
    monkeypatch.setattr(operators, "FEW", 0)


def names_of_operators(function, *arguments, **options):
    """Return the names of mbn's operators in the compiled graphs of a call."""
    found = set()

    def note(graph, _):
        found.update(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, backend=note, **options)(*arguments)
    return {name for name in found if name.startswith("mbn.")}


def train_arguments(dtype, *, weighted=False, tracked=True, affine=True, momentum=0.1):
    """Return arguments of the operator ``train``, some of which require a gradient."""
    x = sample(6, 3, 5, dtype=dtype).requires_grad_()
    vectors = [sample(3, seed=seed) for seed in range(4)]
    params = [vector.requires_grad_() for vector in vectors[:2]] if affine else [None] * 2
    state = [vectors[2], vectors[3].abs(), torch.tensor(3)] if tracked else [None] * 3
    share = None if momentum is None else torch.tensor(momentum, dtype=torch.float64)
    return (x, draw_weights("real" if weighted else None, x.shape, torch.float32), *params, *state, share, 1e-5, 1)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"weighted": True, "momentum": None}),
        (torch.float64, {"tracked": False, "affine": False}),
    ],
    ids=["plain", "weighted", "no vectors"],
)
def test_operators_keep_the_rules_of_torch(dtype, options):
    arguments = (*train_arguments(dtype, **options), "float32")
    torch.library.opcheck(torch.ops.mbn.train.default, arguments)
    if options.get("tracked", True):
        torch.library.opcheck(torch.ops.mbn.evaluate.default, (*arguments[:6], 1e-5, "float32"))
    x, sample_weight, weight, *_ = arguments
    dy = sample(6, 3, 5, dtype=dtype, seed=1).requires_grad_()
    packed = torch.ops.mbn.train.default(*arguments)[1]
    for needs in ([True, True, True], [False, True, False]):
        inputs = dy, x, sample_weight, weight, packed, 1e-5, needs, "float32"
        torch.library.opcheck(torch.ops.mbn.pullback.default, inputs)


def test_gradients_of_an_operator_share_no_memory(monkeypatch):
    """The kernels in Triton return rows of one tensor, which Torch refuses as results of an operator."""
    rows = sample(2, 3)
    monkeypatch.setattr(operators._backends[0], "pullback", lambda kernels, dy, *_: (dy.clone(), *rows))
    arguments = train_arguments(torch.float32)
    x, _, weight, *_ = (None if value is None else value.detach() for value in arguments[:3])
    packed = torch.ops.mbn.train.default(*arguments, "float32")[1]
    step = torch.compile(
        lambda dy: torch.ops.mbn.pullback.default(dy, x, None, weight, packed, 1e-5, [True] * 3, "float32")
    )
    for found, row in zip(step(sample(*x.shape))[1:], rows, strict=True):
        assert torch.equal(found, row)


@pytest.mark.usefixtures("for_all_sizes")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_steps_have_the_bits_of_eager_ones(shape, dtype, kind):
    axis = -1 if shape == "channels last" else 1
    wide = "float64" if dtype == "float64" else "float32"
    layers = [mbn.BatchNorm1d(3, dtype=wide, axis=axis, backend="torch") for _ in range(2)]
    modules = [bn.as_module() for bn in layers]
    calls = modules[0], compile_fully(modules[1])
    for step, training in enumerate((True, True, False)):
        results = []
        for module, call in zip(modules, calls, strict=True):
            module.train(training)
            x = sample(*SHAPES[shape], dtype=getattr(torch, dtype), seed=step)
            if shape == "transposed":
                x = x.mT.contiguous().mT
            cells = (x.mT if axis == -1 else x).shape
            x.requires_grad_()
            y = call(x, sample_weight=draw_weights(kind, cells, torch.float32))
            dy = sample(*x.shape, dtype=x.dtype, seed=9)
            gradients = torch.autograd.grad(y, [x, *module.parameters()], dy)
            results.append((y, *gradients, *module.buffers()))
            assert (y.stride(), gradients[0].stride()) == (x.stride(),) * 2
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert count_graphs() == 2  # one for each mode


@pytest.mark.usefixtures("for_all_sizes")
@pytest.mark.parametrize("power", [-600, 600])
def test_compiled_steps_have_the_bits_of_eager_ones_beyond_the_range(power):
    results = []
    for compiled in (False, True):
        bn = mbn.BatchNorm1d(3, dtype="float64", eps=0, backend="torch")
        x = sample(40, 3, dtype=torch.float64)
        x[:, 1] *= 2.0**power
        x.requires_grad_()
        y = (compile_fully(bn) if compiled else bn)(x)
        results.append((y, *torch.autograd.grad(y, [x, *bn.parameters()], sample(40, 3, dtype=x.dtype)), *bn.state))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("for_all_sizes")
def test_inductor_has_the_bits_of_eager_steps():
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        layers = torch.nn.Linear(5, 6), mbn.BatchNorm1d(6, backend="torch").as_module(), torch.nn.ReLU()
        models.append(torch.nn.Sequential(*layers))
    torch._dynamo.reset()
    calls = models[0], torch.compile(models[1], fullgraph=True)
    for seed in range(2):
        outputs = [call(sample(50, 5, seed=seed)) for call in calls]
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
        for y in outputs:
            y.sum().backward()
    buffers, others = (dict(model.named_buffers()) for model in models)
    torch.testing.assert_close(buffers, others, rtol=0, atol=0)
    torch.testing.assert_close(*([parameter.grad for parameter in model[1].parameters()] for model in models))


def test_large_batches_and_varying_sizes_call_operators():
    bn = mbn.BatchNorm1d(3, backend="torch")
    assert names_of_operators(bn, sample(40, 3)) == set()
    assert names_of_operators(bn, sample(operators.FEW // 3 + 1, 3)) == {"mbn.train.default"}
    assert names_of_operators(bn.eval(), sample(operators.FEW // 3 + 1, 3)) == {"mbn.evaluate.default"}
    x = sample(40, 3)
    torch._dynamo.mark_dynamic(x, 0)
    assert names_of_operators(bn, x) == {"mbn.evaluate.default"}


class Own(torch.Tensor):
    """A class of tensors, which may have rules of its own."""


@pytest.mark.usefixtures("for_all_sizes")
def test_tensors_of_other_kinds_call_no_operators():
    bn = mbn.BatchNorm1d(3, backend="torch").eval()
    function = partial(mbn.functional.batch_norm, training=True)
    assert names_of_operators(bn, sample(40, 3).as_subclass(Own)) == set()
    assert names_of_operators(function, torch.empty(40, 3, device="meta")) == set()


@pytest.mark.usefixtures("for_all_sizes")
def test_neither_counts_nor_sizes_nor_momenta_compile_anew():
    bn, twin = (mbn.BatchNorm1d(3, backend="torch") for _ in range(2))
    call = compile_fully(bn)
    for step, size in enumerate((40, 40, 50, 2, 90_000, 7)):
        x = sample(size, 3, seed=step)
        torch.testing.assert_close(call(x), twin(x), rtol=0, atol=0)
    assert count_graphs() == 2  # one more for sizes that vary
    for momentum in (0.2, 0.3, 0.4):
        bn.momentum = twin.momentum = momentum
        torch.testing.assert_close(call(x), twin(x), rtol=0, atol=0)
    assert count_graphs() == 3  # one more for momenta that vary
    torch.testing.assert_close(dict(bn.state_dict()), dict(twin.state_dict()), rtol=0, atol=0)


def third_derivatives(call, x, v):
    """Return the gradient of a cubic loss and two more derivatives in the direction v."""
    (first,) = torch.autograd.grad((call(x) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first * v).sum(), x, create_graph=True)
    return first, second, *torch.autograd.grad((second * v).sum(), x)


@pytest.mark.usefixtures("for_all_sizes")
@pytest.mark.parametrize("training", [True, False])
def test_operators_have_derivatives_of_higher_order(training):
    v = sample(8, 3, dtype=torch.float64, seed=1)
    results = []
    for compiled in (False, True):
        bn = mbn.BatchNorm1d(3, dtype="float64", backend="torch").train(training)
        torch._dynamo.reset()
        call = torch.compile(bn, fullgraph=True, backend="eager") if compiled else bn  # Inductor has first ones alone
        results.append(third_derivatives(call, sample(8, 3, dtype=torch.float64).requires_grad_(), v))
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-13)
    assert results[0][2].any()


def _jvp(function, x):
    return torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]


TRANSFORMS = {
    "grad": torch.func.grad,
    "grad of grad": lambda loss: torch.func.grad(lambda x: (torch.func.grad(loss)(x) ** 2).sum()),
    "jvp": lambda loss: partial(_jvp, loss),
    "jvp of grad": lambda loss: partial(_jvp, torch.func.grad(loss)),
    "vmap of grad": lambda loss: lambda x: torch.vmap(torch.func.grad(loss))(torch.stack([x, 2 * x])),
}


@pytest.mark.usefixtures("for_all_sizes")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_operators_are_formulas_in_compiled_transforms(transform, training):
    bn = mbn.BatchNorm1d(3, dtype="float64", backend="torch")

    def loss(x):
        return (bn.apply(bn.params, bn.state, x, training=training)[0] ** 3).sum()

    function, x = TRANSFORMS[transform](loss), sample(8, 3, dtype=torch.float64)
    torch.testing.assert_close(compile_fully(function)(x), function(x), rtol=1e-13, atol=1e-13)
    assert names_of_operators(function, x)


@pytest.mark.usefixtures("for_all_sizes")
def test_vmap_of_a_compiled_pullback_agrees_with_a_loop():
    x, dy = sample(8, 3), sample(2, 8, 3, seed=1)

    def gradients(dy):
        return mbn.functional.batch_norm_vjp(x, training=True)[1](dy)[0]

    looped = torch.stack([gradients(one) for one in dy])
    torch.testing.assert_close(compile_fully(torch.vmap(gradients))(dy), looped)


@pytest.mark.usefixtures("for_all_sizes")
def test_autocast_changes_no_bits():
    bn, twin = (mbn.BatchNorm1d(3, backend="torch") for _ in range(2))
    x = sample(40, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = compile_fully(bn)(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, twin(x), rtol=0, atol=0)


@pytest.mark.usefixtures("for_all_sizes")
@pytest.mark.parametrize("name", ["lengths", "sample_weight"])
@pytest.mark.parametrize("training", [True, False])
def test_invalid_weights_give_nan(name, training):
    bn = mbn.BatchNorm1d(3, backend="torch").train(training)
    values = {"lengths": torch.tensor([1, 2, 3, 9]), "sample_weight": -torch.ones(4)}[name]
    x = sample(4, 3, 5).requires_grad_()
    y = compile_fully(lambda x, values: bn(x, **{name: values}))(x, values)
    assert y[-1].isnan().all()
    assert torch.autograd.grad(y.sum(), x)[0][-1].isnan().all()


@pytest.mark.usefixtures("for_all_sizes")
@pytest.mark.parametrize("training", [True, False])
def test_inductor_gives_nan_for_invalid_weights_in_any_memory_order(training):
    bn = mbn.BatchNorm1d(3, backend="torch").train(training)
    torch._dynamo.reset()
    call = torch.compile(lambda x, weights: bn(x, sample_weight=weights), fullgraph=True)
    for x in (sample(5, 3, 4).permute(2, 1, 0), sample(5, 4, 3).permute(1, 2, 0), sample(4, 5, 3).swapaxes(1, 2)):
        x = x.requires_grad_()  # noqa: PLW2901
        y = call(x, torch.tensor([1.0, 1, 1, -1])[:, None].expand(4, 5))
        assert y[-1].isnan().all()
        (dx,) = torch.autograd.grad(y, x, torch.ones(5, 3, 4).permute(2, 1, 0))
        assert dx[-1].isnan().all()
        assert dx.stride() == torch.empty_like(x).stride()


@pytest.mark.usefixtures("for_all_sizes")
def test_compiled_steps_with_out_write_to_it():
    bn = mbn.BatchNorm1d(3, backend="torch").eval()
    x = sample(40, 3)
    out = torch.empty_like(x)

    def evaluate(x, out):
        with torch.no_grad():
            return mbn.functional.batch_norm(x, bn.running_mean, bn.running_var, *bn.params, out=out)

    compile_fully(evaluate)(x, out)
    torch.testing.assert_close(out, bn(x).detach(), rtol=0, atol=0)


@pytest.mark.usefixtures("for_all_sizes")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_exported_programs_contain_formulas_and_no_operators(training, strict):
    model = torch.nn.Sequential(mbn.BatchNorm1d(3, backend="torch").as_module()).train(training)
    shapes = ({0: torch.export.Dim("n", min=2)},)
    program, file = torch.export.export(model, (sample(8, 3),), dynamic_shapes=shapes, strict=strict), io.BytesIO()
    assert not any(str(node.target).startswith("mbn") for node in program.graph.nodes)
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (8, 50):
        torch.testing.assert_close(loaded(sample(size, 3)), model(sample(size, 3)))
    expected = dict(model.named_buffers())
    for key, buffer in loaded.named_buffers():
        torch.testing.assert_close(buffer, expected[key])
