"""Private interfaces of PyTorch that this library uses; tests/test_private.py says when one changes."""

import torch


def cpu_computes_in(kind: str) -> bool:
    """Whether this CPU has instructions for "bf16" or "fp16", so that its products need not be emulated.

    PyTorch tells this of oneDNN alone, and nowhere publicly. Where it cannot tell, yes.
    """
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", None)
    return True if supported is None else bool(supported())
