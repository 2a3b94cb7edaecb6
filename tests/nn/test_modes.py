import pytest
from torch import nn

from vmamba.nn.modes import evaluating


class Merging(nn.Linear):
    """Does something when it leaves training mode, and undoes it on the way back."""

    merged = False

    def train(self, mode: bool = True) -> "Merging":
        self.merged = not mode
        return super().train(mode)


def test_every_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(1))).train()
    model[1].eval()
    model[1][0].train()
    modes = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [m.training for m in model.modules()] == modes


def test_a_modules_own_train_is_called() -> None:
    model = nn.Sequential(Merging(1, 1)).train()
    with evaluating(model):
        assert model[0].merged
    assert not model[0].merged
