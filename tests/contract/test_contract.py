"""A backend that is written for another version of the contract, or for none, is told so."""

from typing import Any

import pytest
from toy import Toy

import mbn
from mbn.contract import Backend


@pytest.mark.parametrize("name", ["moments", "normalize", "batch_norm", "pullback"])
def test_backends_of_version_1_are_refused(name: str) -> None:
    mixin = type("Arithmetic", (), {name: lambda *_: None})
    for bases, attributes in (((Toy,), {name: lambda *_: None}), ((mixin, Toy), {})):
        with pytest.raises(TypeError, match=f"Old is written for version 1 of mbn.contract: it has {name}"):
            type("Old", bases, attributes)


@pytest.mark.parametrize("name", ["Residuals", "widened"])
def test_names_of_version_1_say_where_they_have_gone(name: str) -> None:
    with pytest.raises(ImportError, match=f"{name} is of version 1 .* version 2 has"):
        getattr(mbn.contract, name)


def test_helpers_may_have_any_other_name() -> None:
    assert issubclass(type("New", (Toy,), {"weights": lambda *_: None}), Backend)


@pytest.mark.parametrize("kernels", [None, Toy, dict])
def test_kernels_are_an_instance(kernels: Any) -> None:
    mbn.register_backend("without", type("Without", (Toy,), {"name": "without", "kernels": kernels}))
    with pytest.raises(mbn.BackendUnavailableError, match="its attribute kernels is to be an instance"):
        mbn.get_backend("without")
