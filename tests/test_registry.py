"""From names and arrays to backends: the order of the choices, registration, and all errors."""

import asyncio
import re
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from border_bugs import ImportIgnoresStrides
from toy import Toy

import mbn
from mbn import registry
from mbn.commands import backends
from mbn.contract import Batch, Kernels


@pytest.fixture(autouse=True)
def _toys() -> Iterator[None]:
    for name in ("toy", "context", "default", "environment"):
        mbn.register_backend(name, type(name, (Toy,), {"name": name}))
    return


def test_backend_is_chosen_by_argument_context_default_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(**arguments: str) -> str | None:
        return mbn.BatchNorm1d(4, **arguments).backend

    assert chosen() is None
    monkeypatch.setenv("MBN_BACKEND", "environment")
    assert chosen() == "environment"
    mbn.set_default_backend("default")
    assert chosen() == "default"
    with mbn.use_backend("context"):
        assert chosen() == "context"
        assert chosen(backend="toy") == "toy"
        with mbn.use_backend("numpy"):
            assert chosen() == "numpy"
        assert chosen() == "context"
    assert chosen() == "default"
    mbn.set_default_backend(None)
    assert chosen() == "environment"


def test_layer_keeps_the_backend_of_the_context_it_was_made_in() -> None:
    with mbn.use_backend("toy"):
        bn = mbn.BatchNorm1d(4)
    assert bn.backend == "toy"
    bn(np.ones((2, 4), np.float32))
    assert bn.backend == "toy"


def test_functional_uses_the_chosen_backend() -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    calls = []

    class Recording(Toy):
        name = "recording"

        def kernels_for(self, operation: str, batch: Batch, *others: object) -> tuple[Kernels, Batch]:
            calls.append(batch.x.shape)
            return super().kernels_for(operation, batch, *others)

    mbn.register_backend("recording", Recording)
    with mbn.use_backend("recording"):
        mbn.functional.batch_norm(x, training=True)
    mbn.functional.batch_norm(x, training=True, backend="recording")
    mbn.functional.batch_norm(x, training=True)
    assert calls == [(2, 4), (2, 4)]


def test_get_backend_takes_a_name_a_backend_or_the_choice() -> None:
    assert mbn.get_backend("toy") is mbn.get_backend("toy")
    assert mbn.get_backend(mbn.get_backend("toy")) is mbn.get_backend("toy")
    assert mbn.get_backend().name == "numpy"
    with mbn.use_backend("toy") as chosen:
        assert mbn.get_backend() is chosen
    with pytest.raises(TypeError, match="a name or a mbn.contract.Backend, not int"):
        mbn.get_backend(3)
    with pytest.raises(TypeError, match="not None"), mbn.use_backend(None):
        pass


def test_use_backend_affects_its_thread_alone() -> None:
    with mbn.use_backend("toy"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: mbn.BatchNorm1d(4).backend).result() is None


def test_use_backend_affects_its_task_alone() -> None:
    async def choose(name: str) -> str | None:
        with mbn.use_backend(name):
            await asyncio.sleep(0)
            return mbn.BatchNorm1d(4).backend

    async def both() -> list[str | None]:
        return await asyncio.gather(choose("toy"), choose("context"))

    assert asyncio.run(both()) == ["toy", "context"]


def test_use_backend_ends_with_its_block_even_on_an_error() -> None:
    with pytest.raises(KeyError), mbn.use_backend("toy"):
        raise KeyError
    assert mbn.BatchNorm1d(4).backend is None


@pytest.mark.parametrize(
    "choose", [mbn.get_backend, mbn.set_default_backend, lambda name: mbn.BatchNorm1d(4, backend=name)]
)
def test_unknown_name_is_refused_with_a_suggestion(choose: object) -> None:
    with pytest.raises(
        mbn.BackendNotFoundError, match=r"no backend 'numpi'\. Did you mean 'numpy'\?.*numpy, torch"
    ) as caught:
        choose("numpi")
    assert isinstance(caught.value, ValueError)
    with pytest.raises(mbn.BackendNotFoundError, match=r"no backend 'xyzzy'\. Known backends"):
        choose("xyzzy")
    assert mbn.BatchNorm1d(4).backend is None


@pytest.mark.parametrize("nonsense", ["False", "0", " torch", "numpy,torch"])
def test_unknown_name_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch, nonsense: str) -> None:
    monkeypatch.setenv("MBN_BACKEND", nonsense)
    with pytest.raises(mbn.BackendNotFoundError, match=f"MBN_BACKEND is '{nonsense}'"):
        mbn.BatchNorm1d(4)
    assert mbn.BatchNorm1d(4, backend="numpy").backend == "numpy"


def test_empty_environment_variable_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBN_BACKEND", "")
    assert mbn.BatchNorm1d(4).backend is None


def test_missing_framework_makes_its_backend_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # makes the import fail
    for module in ("mbn_torch.backend", "mbn_torch.kernels.eager"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    registry._loaded.pop("torch", None)
    with pytest.raises(
        mbn.BackendUnavailableError, match=r"torch is not installed.*pip install 'torch>=2.8'"
    ) as caught:
        mbn.BatchNorm1d(4, backend="torch")
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_unusable_framework_makes_its_backend_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_device() -> None:
        raise RuntimeError("no device today")

    module = types.ModuleType("mbn_torch.backend")
    module.TorchBackend = no_device
    monkeypatch.setitem(sys.modules, "mbn_torch.backend", module)
    registry._loaded.pop("torch", None)
    with pytest.raises(mbn.BackendUnavailableError, match="torch is installed but cannot be used.*no device today"):
        mbn.get_backend("torch")


@pytest.mark.parametrize(
    ("target", "cause"),
    [
        ("no_such_module:Backend", "ModuleNotFoundError"),
        ("json:NoBackend", "AttributeError"),
        (lambda: 1 / 0, "ZeroDivision"),
    ],
)
def test_broken_backend_is_unavailable(target: object, cause: str) -> None:
    mbn.register_backend("broken", target)
    with pytest.raises(mbn.BackendUnavailableError, match=f"'broken' .* is broken: {cause}") as caught:
        mbn.get_backend("broken")
    assert caught.value.__cause__ is not None
    assert "broken" in mbn.list_backends()
    assert mbn.get_backend("toy").name == "toy"


def test_class_that_is_no_backend_is_refused() -> None:
    mbn.register_backend("dictionary", dict)
    with pytest.raises(mbn.BackendUnavailableError, match="gives a dict, which is not a mbn.contract.Backend"):
        mbn.get_backend("dictionary")


def test_register_backend_takes_a_path_a_class_or_an_instance() -> None:
    for target, kind in [
        ("toy:Toy", Toy),
        (Toy(), Toy),
        (Toy, Toy),
        ("border_bugs:ImportIgnoresStrides", ImportIgnoresStrides),
    ]:
        mbn.register_backend("toy", target)
        assert type(mbn.get_backend("toy")) is kind


def test_backend_with_another_name_is_refused() -> None:
    mbn.register_backend("alias", Toy)
    with pytest.raises(mbn.BackendUnavailableError, match="'alias' .* calls itself 'toy'"):
        mbn.get_backend("alias")


@pytest.mark.parametrize(
    ("name", "target", "error"),
    [
        ("numpy", Toy, ValueError),
        ("", Toy, ValueError),
        ("a b", Toy, ValueError),
        (3, Toy, ValueError),
        ("ok", "toy", TypeError),
        ("ok", 3, TypeError),
    ],
)
def test_invalid_registration_changes_nothing(name: str, target: object, error: type[Exception]) -> None:
    before = mbn.list_backends()
    with pytest.raises(error):
        mbn.register_backend(name, target)
    assert mbn.list_backends() == before


def test_owner_of_an_array_type_is_cached() -> None:
    class Array:
        shape = (2, 4)

    class ArrayBackend(Toy):
        name = "arrays"

        def owns(self, x: object) -> bool:
            asked.append(x)
            return isinstance(x, Array)

    asked: list[object] = []
    mbn.register_backend("arrays", ArrayBackend)
    x = Array()
    assert registry.owner_of(x) is mbn.get_backend("arrays")
    assert registry.owner_of(x) is mbn.get_backend("arrays")
    assert asked.count(x) == 1  # the answer is kept for the class


def test_owner_of_a_known_array_is_found_without_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    def look() -> None:
        raise AssertionError("entry points are read")

    monkeypatch.setattr(registry, "_owners", {})
    monkeypatch.setattr(registry, "_entry_points", look)
    assert registry.owner_of(np.ones(1)).name == "numpy"
    with pytest.raises(AssertionError, match="entry points"):
        registry.owner_of(object())


def test_lists_and_scalars_belong_to_numpy() -> None:
    for x in ([[1.0]], (1.0,), 1, 1.0, np.float32(1), np.ones(3)):
        assert registry.owner_of(x).name == "numpy"


def test_entry_point_whose_name_no_backend_can_have_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = registry.Known("module:Backend", "entry point of odd", "odd")
    monkeypatch.setattr(registry, "_all_entry_points", lambda: {"odd:name": known})
    assert "odd:name" not in mbn.list_backends()
    backends.show()
    assert re.search(r"odd:name +its name is not made of letters", capsys.readouterr().out)
