"""BatchNorm over the batches of all processes, on any device."""

import torch
import torch.distributed
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from vmamba._torch_private import AnyBatchNorm
from vmamba.errors import RecipeError


def synchronise_batchnorm(model: nn.Module, on_cpu: bool) -> nn.Module:
    """The model, whose BatchNorm layers see the batches of all processes as one in training.

    Names of parameters and buffers stay as they are.

    Args:
        model: Its layers are replaced.
        on_cpu: PyTorch's own layer computes on GPUs alone; on a CPU ours is taken.

    Raises:
        RecipeError: On a CPU the model has a kind of BatchNorm for which there is none.
    """
    if not on_cpu:
        converted: nn.Module = convert_sync_batchnorm(model)
        return converted
    for name, layer in model.named_modules():
        if not isinstance(layer, AnyBatchNorm):
            continue
        if type(layer) not in _SYNCED:
            raise RecipeError(
                f"train.sync_batchnorm: {name} is a {type(layer).__name__}, for which there is no "
                "synchronised form on a CPU; set it to false"
            )
        # The class alone: parameters, buffers, hooks and the place in the model stay.
        layer.__class__ = _SYNCED[type(layer)]
    return model


class SyncedBatchNorm(AnyBatchNorm):
    """BatchNorm of (b, c, …), with mean and variance of all processes' samples in training."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected an input (b, c, …), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not torch.distributed.is_initialized():
            return super().forward(input)
        self._check_input_dim(input)
        over = [0, *range(2, input.ndim)]
        shape = (1, -1, *[1] * (input.ndim - 2))
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        number = wide.new_tensor(float(input.numel() // input.shape[1]))
        torch.distributed.all_reduce(number)
        mean = all_reduce(wide.sum(over)) / number
        centred = wide - mean.view(shape)
        variance = all_reduce(centred.square().sum(over)) / number
        self._follow(mean.detach(), variance.detach() * number / (number - 1))
        normed = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normed = normed * self.weight.view(shape) + self.bias.view(shape)
        return normed.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running mean and variance towards a batch's."""
        if self.num_batches_tracked is None or self.running_mean is None or self.running_var is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)


class SyncedBatchNormAct(SyncedBatchNorm):
    """The same of timm's layer that ends with an activation."""

    act: nn.Module
    drop: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.act(self.drop(super().forward(x)))
        return output


_SYNCED: dict[type, type[SyncedBatchNorm]] = {
    nn.BatchNorm1d: SyncedBatchNorm,
    nn.BatchNorm2d: SyncedBatchNorm,
    nn.BatchNorm3d: SyncedBatchNorm,
    BatchNormAct2d: SyncedBatchNormAct,
}
