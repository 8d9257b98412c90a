"""Errors for backends that are written for version 1 of the contract, or have no kernels."""

from typing import Any

import pytest
from toy import Toy

import mbn
from mbn import contract
from mbn.contract import Backend


@pytest.mark.parametrize("name", ["moments", "normalize", "batch_norm", "pullback"])
def test_backend_of_version_1_is_refused(name: str) -> None:
    mixin = type("Arithmetic", (), {name: lambda *_: None})
    for bases, attributes in (((Toy,), {name: lambda *_: None}), ((mixin, Toy), {})):
        with pytest.raises(TypeError, match=f"Old is written for version 1 of mbn.contract: it has {name}"):
            type("Old", bases, attributes)


@pytest.mark.parametrize("name", ["Residuals", "widened"])
def test_import_of_a_name_of_version_1_names_its_replacement(name: str) -> None:
    with pytest.raises(ImportError, match=f"{name} is of version 1 .* version 2 has"):
        getattr(mbn.contract, name)


def test_backend_may_have_methods_of_other_names() -> None:
    assert issubclass(type("New", (Toy,), {"weights": lambda *_: None}), Backend)


@pytest.mark.parametrize("kernels", [None, Toy, dict])
def test_kernels_must_be_an_instance(kernels: Any) -> None:
    mbn.register_backend("without", type("Without", (Toy,), {"name": "without", "kernels": kernels}))
    with pytest.raises(mbn.BackendUnavailableError, match="its attribute kernels is to be an instance"):
        mbn.get_backend("without")


def test_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'mbn.contract' has no attribute 'nothing'"):
        getattr(contract, "nothing")  # noqa: B009 - types know that there is none
