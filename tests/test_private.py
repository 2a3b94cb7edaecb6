"""Private interfaces of PyTorch and Lightning are as this library takes them to be."""

import platform

import pytest
import torch

from vmamba import _torch_private


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN is on x86 everywhere")
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_what_the_cpu_computes_in(kind: str) -> None:
    found = getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")()
    assert isinstance(found, bool)
    assert _torch_private.cpu_computes_in(kind) is found
