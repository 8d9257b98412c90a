"""The module of flax: it computes as the layer does, and behaves as a module of flax in everything else."""

import copy
import doctest
import os
import pickle
import subprocess
import sys
import textwrap
from functools import partial

import numpy as np
import pytest

import mbn

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
optax = pytest.importorskip("optax")
jnp = jax.numpy

from mbn_jax import module as module_of_flax

KINDS = [
    {},
    {"affine": False},
    {"bias": False},
    {"momentum": None},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"axis": -1, "correction": 0, "eps": 1e-3, "momentum": 0.01},
]


class Net(nnx.Module):
    """A network with a layer's module."""

    def __init__(self, rngs):
        self.first = nnx.Linear(5, 4, rngs=rngs)
        self.norm = new_layer().as_module()
        self.dropout = nnx.Dropout(0.0, rngs=rngs)
        self.second = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))


def new_layer(**arguments):
    return mbn.BatchNorm1d(4, backend="jax", **arguments)


def data(*shape, seed=0):
    return 3 + 2 * jax.random.normal(jax.random.key(seed), shape or (16, 4), jnp.float32)


def statistics(module):
    return {key: np.asarray(value) for key, value in nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)).items()}


def pickled_and_back(module):
    return pickle.loads(pickle.dumps(module))


def run(script, *arguments, **variables):
    """Run a script in a process with the import path of this one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    subprocess.run(command, check=True, env=environment)


def assert_same(module, layer):
    """Assert that module and layer hold the same arrays, to the bit."""
    held = {key: np.asarray(value) for key, value in nnx.to_pure_dict(nnx.state(module)).items()}
    expected = layer.state_dict(backend="numpy")
    assert held.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(held[key], value)
        assert held[key].dtype == value.dtype


@pytest.mark.parametrize("arguments", KINDS)
@pytest.mark.parametrize("shape", [(16, 4), (16, 4, 4)])
def test_module_gives_the_bits_of_the_layer(arguments, shape):
    layer = new_layer(**arguments)
    if layer.weight is not None:
        layer.weight = [1.0, -2.0, 3.0, 0.5]
    module = layer.as_module()
    for seed in range(3):
        x = data(*shape, seed=seed)
        np.testing.assert_array_equal(module(x), layer(x))
    module.eval()
    layer.eval()
    np.testing.assert_array_equal(module(x), layer(x))
    assert_same(module, layer)


@pytest.mark.parametrize("arguments", KINDS)
def test_module_has_param_and_batch_stat_variables(arguments):
    layer = new_layer(**arguments)
    module = layer.as_module()
    params, tracked = nnx.to_pure_dict(nnx.state(module, nnx.Param)), nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
    assert set(params) == {key for key, value in layer.params._asdict().items() if value is not None}
    assert set(tracked) == {key for key, value in layer.state._asdict().items() if value is not None}


def test_module_starts_in_the_mode_of_the_layer():
    assert not new_layer().as_module().use_running_average
    assert new_layer().eval().as_module().use_running_average


def test_mode_follows_train_eval_view_and_argument():
    net = Net(nnx.Rngs(0))
    net.eval()
    net(data(16, 5))
    assert net.norm.num_batches_tracked[...] == 0
    nnx.view(net, deterministic=False, use_running_average=False)(data(16, 5))  # the view shares the variables
    net.norm(data(), use_running_average=False)
    assert net.norm.num_batches_tracked[...] == 2
    net.train()
    net(data(16, 5))
    assert net.norm.num_batches_tracked[...] == 3
    nnx.view(net, deterministic=True, use_running_average=True)(data(16, 5))
    net.norm(data(), use_running_average=True)
    assert net.norm.num_batches_tracked[...] == 3
    assert "use_running_average" in nnx.view_info(net)


def test_module_of_a_frozen_layer_is_frozen():
    layer = new_layer()
    layer(data())
    module = layer.freeze().as_module()
    before = statistics(module)
    module.train()
    np.testing.assert_array_equal(module(data(seed=1)), layer(data(seed=1)))
    np.testing.assert_equal(statistics(module), before)


def test_module_takes_masks_lengths_and_sample_weights():
    x, rows = data(16, 4, 6), jnp.arange(16)
    for given in (
        {"mask": rows[:, None] > jnp.arange(6)},
        {"lengths": rows % 7},
        {"mask": rows > 3, "sample_weight": rows * 0.5},
    ):
        layer = new_layer()
        module = layer.as_module()
        np.testing.assert_array_equal(
            nnx.jit(lambda module, x, given: module(x, **given))(module, x, given),
            jax.jit(lambda layer, x, given: (layer(x, **given), layer)[0])(layer, x, given),
        )
        layer(x, **given)
        for key, value in statistics(module).items():
            np.testing.assert_allclose(value, layer.state_dict()[key], rtol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_module_normalises_halves_in_float32(dtype):
    module, layer = new_layer().as_module(), new_layer()
    y = module(data().astype(dtype))
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, layer(data().astype(dtype)))
    assert_same(module, layer)


def test_training_with_the_module_equals_training_in_pure_jax():
    net, layer = Net(nnx.Rngs(0)), new_layer()
    x, target = data(16, 5), jax.random.randint(jax.random.key(1), 16, 0, 3)

    @nnx.jit
    def step(net, optimizer):
        def loss(net):
            return optax.softmax_cross_entropy_with_integer_labels(net(x), target).mean()

        value, gradients = nnx.value_and_grad(loss)(net)
        optimizer.update(net, gradients)
        return value

    @jax.jit
    def pure_step(params, state):
        def loss(params):
            (kernel, shift), ours, (other, other_shift) = params
            y, new = layer.apply(ours, state, x @ kernel + shift, training=True)
            logits = jax.nn.relu(y) @ other + other_shift
            return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean(), new

        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients), new

    dense = [(linear.kernel[...], linear.bias[...]) for linear in (net.first, net.second)]
    params, state = (dense[0], layer.params, dense[1]), layer.state
    optimizer = nnx.Optimizer(net, optax.sgd(0.5), wrt=nnx.Param)
    losses = []
    for _ in range(20):
        value, params, state = pure_step(params, state)
        losses.append(float(step(net, optimizer)))
        assert losses[-1] == pytest.approx(float(value), rel=1e-5)
    assert losses[-1] < losses[0] / 2
    np.testing.assert_allclose(net.norm.weight[...], params[1].weight, rtol=1e-5)
    np.testing.assert_allclose(net.norm.running_var[...], state.running_var, rtol=1e-5)
    assert net.norm.num_batches_tracked[...] == 20


def test_module_gives_the_gradients_of_the_layer():
    module, layer = new_layer().as_module(), new_layer()
    x = data()
    gradients = nnx.to_pure_dict(nnx.grad(lambda module: jnp.sum(module(x) ** 3))(module))
    apply = partial(layer.apply, state=layer.state, x=x, training=True)
    expected = jax.grad(lambda params: jnp.sum(apply(params)[0] ** 3))(layer.params)
    assert gradients.keys() == {"weight", "bias"}
    for key, value in gradients.items():
        np.testing.assert_array_equal(value, getattr(expected, key))


def test_equal_modules_share_a_compiled_function():
    step = nnx.jit(lambda module, x: module(x))
    traced = []

    @nnx.jit
    def counted(module, x):
        traced.append(module)
        return module(x)

    first = new_layer()
    modules = [first.as_module(), first.as_module(), new_layer().eval().as_module()]
    modules[2].train()
    modules += [copy.deepcopy(modules[0]), nnx.clone(modules[0]), pickled_and_back(modules[0])]
    for module in modules:
        step(module, data())
        counted(module, data())
        counted(module, data(seed=1))
    assert len(traced) == 1
    counted(new_layer(eps=1e-3).as_module(), data())
    assert len(traced) == 2


def test_as_module_leaves_the_layer_unchanged():
    layer = new_layer()
    module = layer.as_module()
    assert jax.tree.structure(layer) == jax.tree.structure(new_layer())
    nnx.jit(lambda module, x: module(x), donate_argnums=0)(module, data())
    np.testing.assert_array_equal(layer.running_mean, np.zeros(4))
    np.testing.assert_array_equal(layer.weight, np.ones(4))
    assert module.num_batches_tracked[...] == 1


def test_module_can_be_split_and_merged():
    module, layer = new_layer().as_module(), new_layer()
    graphdef, params, tracked = nnx.split(module, nnx.Param, nnx.BatchStat)

    @jax.jit
    def step(params, tracked, x):
        merged = nnx.merge(graphdef, params, tracked)
        y = merged(x)
        return y, nnx.state(merged, nnx.BatchStat)

    for seed in range(2):
        y, tracked = step(params, tracked, data(seed=seed))
        np.testing.assert_allclose(y, layer(data(seed=seed)), atol=1e-6)
    assert module.num_batches_tracked[...] == 0
    nnx.update(module, tracked)
    np.testing.assert_allclose(module.running_var[...], layer.running_var, rtol=2.4e-7)
    assert module.num_batches_tracked[...] == 2


def test_module_is_a_pytree_of_jax():
    module, layer = new_layer().as_module(), new_layer()
    y, module = jax.jit(lambda module, x: (module(x), module))(module, data())
    np.testing.assert_allclose(y, layer(data()), atol=1e-6)
    assert module.num_batches_tracked[...] == 1


def test_vmap_trains_an_ensemble_of_modules():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rate):
        module = new_layer().as_module()
        module.weight[...] *= rate
        return module

    ensemble = make(jnp.arange(1, 4, dtype=jnp.float32))
    assert ensemble.running_mean[...].shape == (3, 4)
    x = data(3, 16, 4)
    y = nnx.vmap(lambda module, x: module(x))(ensemble, x)
    for index in range(3):
        layer = new_layer()
        layer.weight = index + 1.0
        np.testing.assert_allclose(y[index], layer(x[index]), atol=5e-6)
        np.testing.assert_allclose(ensemble.running_var[...][index], layer.running_var, rtol=2.4e-7)
    np.testing.assert_array_equal(ensemble.num_batches_tracked[...], [1, 1, 1])


def test_scan_trains_the_module_over_batches():
    module, layer = new_layer().as_module(), new_layer()
    batches = data(5, 16, 4)
    nnx.scan(lambda module, x: (module, module(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(module, batches)
    for batch in batches:
        layer(batch)
    np.testing.assert_allclose(module.running_mean[...], layer.running_mean, rtol=1e-6)
    assert module.num_batches_tracked[...] == 5


def test_remat_counts_a_batch_once():
    net, plain = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    x = data(16, 5)
    gradients = nnx.grad(lambda net: jnp.sum(nnx.remat(lambda net, x: net(x))(net, x) ** 2))(net)
    expected = nnx.grad(lambda net: jnp.sum(net(x) ** 2))(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients, expected)
    assert net.norm.num_batches_tracked[...] == 1
    np.testing.assert_allclose(net.norm.running_var[...], plain.norm.running_var[...], rtol=1e-6)


def test_module_can_be_made_under_a_trace():
    abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    assert abstract.norm.running_mean.get_value().shape == (4,)
    made = nnx.jit(lambda: Net(nnx.Rngs(0)))()
    made(data(16, 5))
    assert made.norm.num_batches_tracked[...] == 1
    assert nnx.graphdef(made.norm) == nnx.graphdef(abstract.norm) == nnx.graphdef(new_layer().as_module())


def test_traced_layer_can_make_a_module():
    @jax.jit
    def normalised(layer, x):
        return layer.as_module()(x)

    np.testing.assert_allclose(normalised(new_layer(), data()), new_layer()(data()), atol=1e-6)


@pytest.mark.parametrize("again", [copy.deepcopy, nnx.clone, pickled_and_back])
def test_copies_of_a_module_are_independent(again):
    module = new_layer().as_module()
    module(data())
    other = again(module)
    np.testing.assert_equal(statistics(other), statistics(module))
    np.testing.assert_array_equal(other(data(seed=1)), nnx.clone(module)(data(seed=1)))
    assert (module.num_batches_tracked[...], other.num_batches_tracked[...]) == (1, 2)


def test_pickled_module_loads_in_another_process(tmp_path):
    module = new_layer().as_module()
    module(data())
    (tmp_path / "module").write_bytes(pickle.dumps(module))
    script = """
        import pathlib, pickle, sys
        module = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
        module([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 9.0]])
        assert module.num_batches_tracked[...] == 2, module
    """
    run(script, tmp_path / "module")


@pytest.mark.parametrize("x", [np.zeros((3, 5)), np.zeros((1, 4)), np.zeros(4), np.zeros((3, 4), int)])
def test_failed_call_leaves_the_module_unchanged(x):
    module = new_layer().as_module()
    before = statistics(module)
    with pytest.raises((TypeError, ValueError)):
        module(jnp.asarray(x))
    np.testing.assert_equal(statistics(module), before)


def test_jit_of_a_closed_over_module_fails_in_training_alone():
    module = new_layer().as_module()
    before = statistics(module)
    with pytest.raises(Exception, match="different trace level"):
        jax.jit(module)(data())
    np.testing.assert_equal(statistics(module), before)
    module.eval()
    np.testing.assert_allclose(jax.jit(module)(data()), module(data()), atol=1e-6)


def test_empty_batch_gives_the_same_state_as_the_layer():
    module, layer = new_layer().as_module(), new_layer()
    assert module(jnp.zeros((0, 4), jnp.float32)).shape == (0, 4)
    layer(jnp.zeros((0, 4), jnp.float32))
    assert_same(module, layer)


def test_repr_names_the_layer():
    assert "BatchNorm1d(4, eps=0.001, momentum=0.1" in repr(new_layer(eps=1e-3).as_module())


def test_docstring_example_passes():
    result = doctest.testmod(module_of_flax)
    assert result.attempted > 5
    assert result.failed == 0


def test_module_computes_on_the_device_of_its_arrays():
    script = """
        import jax, mbn
        from flax import nnx
        here, there = jax.local_devices()
        module = mbn.BatchNorm1d(4, backend="jax", device=here).as_module()
        nnx.update(module, jax.device_put(nnx.state(module), there))
        y = module(jax.device_put(jax.numpy.arange(8, dtype="float32").reshape(2, 4), there))
        assert y.devices() == module.running_mean[...].devices() == {there}, module
        assert nnx.graphdef(module) == nnx.graphdef(mbn.BatchNorm1d(4, backend="jax").as_module())
    """
    run(script, XLA_FLAGS="--xla_force_host_platform_device_count=2", JAX_PLATFORMS="cpu")


def test_module_of_a_float64_layer_computes_in_float64():
    script = """
        import jax, mbn
        from flax import nnx
        layer = mbn.BatchNorm1d(4, backend="jax", dtype="float64")
        module = layer.as_module()
        x = jax.numpy.arange(8.0).reshape(2, 4)
        assert module(x).dtype == module.running_mean[...].dtype == "float64", module
        assert mbn.BatchNorm1d(4, affine=False, track_running_stats=False, backend="jax", dtype="float64").as_module()(
            x
        ).dtype == "float64"
        assert nnx.graphdef(module) != nnx.graphdef(mbn.BatchNorm1d(4, backend="jax").as_module())
    """
    run(script, JAX_ENABLE_X64="1")


def test_as_module_without_flax_says_how_to_install_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "mbn_jax.module")
    monkeypatch.delattr("mbn_jax.module")
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(ImportError, match=r"flax.*not installed.*pip install flax"):
        new_layer().as_module()


def test_layer_does_not_import_flax():
    script = """
        import sys, mbn
        mbn.BatchNorm1d(4, backend="jax")([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 9.0]])
        assert "flax" not in sys.modules
    """
    run(script)
