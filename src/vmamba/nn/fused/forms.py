"""The fused form of each layer that has one: the same mathematics as the layer's `forward`, in other calls.

A form does not check for hooks or patches: `entry` did. Its submodules' forms come from `view`.
"""

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vmamba.nn.block import VSSBlock
from vmamba.nn.embed import ConvDownsample, ConvStem, MergeDownsample
from vmamba.nn.fused import products
from vmamba.nn.fused.blocking import add_by_rows, in_groups
from vmamba.nn.fused.entry import ABSENT, Form, view
from vmamba.nn.mlp import Mlp
from vmamba.nn.ss2d import SS2D, CascadeSS2D


class FusedMlp(Form, Mlp, of=Mlp):
    """GELU fused with the products; with gradients the hidden layer is kept once instead of twice."""

    submodules = {"fc1": (nn.Linear,), "act": (nn.GELU,), "fc2": (nn.Linear,)}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        return products.linear_gelu_linear(x, self.fc1, self.fc2)


class FusedSS2D(Form, SS2D, of=SS2D):
    """SiLU fused with the convolution; out_norm with out_proj where there are gradients and no gate."""

    submodules = {  # noqa: RUF012
        "in_proj": (nn.Linear,),
        "conv": (nn.Conv2d, nn.Identity),
        "act": (nn.SiLU,),
        "out_norm": (nn.LayerNorm,),
        "gate_act": (nn.SiLU, ABSENT),
        "out_proj": (nn.Linear,),
    }

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return products.linear(x, weight)

    def _expand(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x, z = self._split(products.linear(x, self.in_proj.weight, self.in_proj.bias))
        if type(self.conv) is nn.Conv2d:
            return products.conv_silu(x, self.conv), z
        return self.act(x), z

    def finish(self, y: Tensor, z: Tensor | None) -> Tensor:
        if z is None:
            joined = products.normed_linear(y, self.out_norm, self.out_proj)
            if joined is not None:
                return joined
        y = self._gated_norm(y, z)
        return products.linear(y, self.out_proj.weight, self.out_proj.bias)


class FusedCascadeSS2D(FusedSS2D, CascadeSS2D, of=CascadeSS2D):
    """As `FusedSS2D`."""


class FusedVSSBlock(Form, VSSBlock, of=VSSBlock):
    """Without gradients: in chunks of images, and what follows the scan in chunks of rows."""

    submodules = {  # noqa: RUF012
        "norm1": (nn.LayerNorm,),
        "op": (SS2D, CascadeSS2D),
        "drop_path1": (DropPath, nn.Identity),
        "norm2": (nn.LayerNorm, ABSENT),
        "mlp": (Mlp, ABSENT),
        "drop_path2": (DropPath, nn.Identity, ABSENT),
    }

    def forward(self, x: Tensor) -> Tensor:
        op: SS2D = view(self.op)
        if not torch.is_grad_enabled() and not self.training and not self._draws():
            values = x.numel() // x.shape[-1] * self.op.x_proj_weight.shape[2]
            return in_groups(self._by_rows, x, values)
        x = x + self.drop_path1(op.forward(self.norm1(x)))
        if self.mlp is not None:
            x = x + self.drop_path2(view(self.mlp).forward(self.norm2(x)))
        return x

    def _draws(self) -> bool:
        """Whether a drop path draws random numbers, which depend on the number of images."""
        return any(type(layer) is DropPath and layer.training for layer in (self.drop_path1, self.drop_path2))

    def _by_rows(self, x: Tensor) -> Tensor:
        op: SS2D = view(self.op)
        x = add_by_rows(x, op.finish, self._scanned(op, x), op.x_proj_weight.shape[2])
        if self.mlp is None:
            return x
        return add_by_rows(x, self._mlp_branch, (x,), self.mlp.fc1.out_features)

    def _scanned(self, op: SS2D, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The arguments of `finish`. A separate function, so that the scan's operands are freed on return."""
        x, delta, B, C, z = op.project(self.norm1(x))
        return op.scan(x, delta, B, C), z

    def _mlp_branch(self, x: Tensor) -> Tensor:
        return view(self.mlp).forward(self.norm2(x))


class FusedConvStem(Form, ConvStem, of=ConvStem):
    """Without gradients: in chunks of images."""

    submodules = {  # noqa: RUF012
        "conv1": (nn.Conv2d,),
        "norm1": (nn.LayerNorm,),
        "act": (nn.GELU,),
        "conv2": (nn.Conv2d,),
        "norm2": (nn.LayerNorm,),
    }

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        pixels = x.numel() // x.shape[1] // self.conv1.stride[0] ** 2
        return in_groups(super().forward, x, pixels * self.conv1.out_channels)


class FusedConvDownsample(Form, ConvDownsample, of=ConvDownsample):
    """Without gradients: a product over patches where the image is small."""

    submodules = {"conv": (nn.Conv2d,), "norm": (nn.LayerNorm,)}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(products.conv2d(x.permute(0, 3, 1, 2), self.conv).permute(0, 2, 3, 1))


class FusedMergeDownsample(Form, MergeDownsample, of=MergeDownsample):
    """The product by the faster of oneDNN and MKL."""

    submodules = {"norm": (nn.LayerNorm,), "reduction": (nn.Linear,)}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        return products.linear(self.norm(self.gather(x)), self.reduction.weight, self.reduction.bias)
