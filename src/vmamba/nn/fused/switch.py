"""The one switch of the fused forms."""

from contextvars import ContextVar
from types import TracebackType

_ENABLED = ContextVar("vmamba_fused", default=True)


class fused:  # noqa: N801  (called like a function, as torch.no_grad is)
    """Allow or forbid the fused forms of our layers; allowed at the start.

    The fused forms compute the same mathematics in other calls, which are faster on a CPU and need less
    memory there. Results may differ in the last bits. Without them a layer is what its `forward` says: plain
    calls of PyTorch. Use it as a plain call, for the rest of the program, or as a context manager:

        vmamba.nn.fused(False)
        with vmamba.nn.fused(False):
            logits = model(images)

    It holds for the thread (more exactly: the context of contextvars) that calls it, and a new thread starts
    with the fused forms allowed.

    Args:
        enabled: Whether the fused forms may be entered.
    """

    def __init__(self, enabled: bool) -> None:
        self._before = _ENABLED.get()
        _ENABLED.set(enabled)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _ENABLED.set(self._before)


def is_enabled() -> bool:
    """Whether the fused forms are allowed in this thread."""
    return _ENABLED.get()
