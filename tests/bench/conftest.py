import pytest
import torch

from vmamba.bench import timing


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measurement is a single call, on one thread: no speed is asserted here."""
    monkeypatch.setattr(timing, "SHORTEST", 0)
    torch.set_num_threads(1)
