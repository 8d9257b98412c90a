"""Errors of the conversions: for arguments that are no layer, and for packages that are not installed."""

import sys

import pytest

import mbn

CONVERSIONS = {
    "torch": [mbn.from_torch, mbn.to_torch, mbn.replace_batchnorm],
    "flax": [mbn.from_flax, mbn.to_flax],
    "keras": [mbn.from_keras, mbn.to_keras],
    "onnx": [lambda bn: mbn.from_onnx(bn, "y"), mbn.to_onnx],
}


@pytest.mark.parametrize("package", CONVERSIONS)
@pytest.mark.parametrize("given", [None, "bn"])
def test_conversion_refuses_an_argument_that_is_no_layer(package, given):
    pytest.importorskip(package)
    convert = getattr(mbn, f"to_{package}")
    with pytest.raises(TypeError, match=f"to_{package} takes a mbn.BatchNorm1d, not {type(given).__name__}"):
        convert(given)


@pytest.mark.parametrize("package", CONVERSIONS)
def test_conversion_without_its_package_says_how_to_install_it(package, monkeypatch):
    monkeypatch.delitem(sys.modules, f"mbn.interop.{package}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    for convert in CONVERSIONS[package]:
        with pytest.raises(ImportError, match=f"{package} is not installed.*pip install {package}"):
            convert(mbn.BatchNorm1d(4))
