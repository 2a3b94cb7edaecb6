"""What is exported: a module in float32 on the CPU, with what is known of its input and output."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vmamba.data.preprocessing import Preprocessing
from vmamba.errors import ExportError
from vmamba.export.pixels import WithPreprocessing
from vmamba.heads.mask_rcnn import MaskRCNN
from vmamba.heads.upernet import UPerNet
from vmamba.inference import Predictor
from vmamba.nn.ss2d import SS2D

WeightType = Literal["float32", "float16"]

_SMALL = 64
"""Side of the example with which a model of any image size is traced."""


@dataclass(frozen=True)
class Subject:
    """A module to export.

    Attributes:
        module: It computes in float32 on the CPU, in evaluation mode.
        name: Of the model.
        preprocessing: Of the model; its size is the one for which speed is measured.
        classes: Names of the classes; empty if they are not known.
        scans: Whether there is a selective scan in it.
        preprocesses: Whether it takes images of uint8, (b, h, w, 3).
    """

    module: nn.Module
    name: str
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    scans: bool
    preprocesses: bool = False

    @classmethod
    def of(cls, model: nn.Module | Predictor) -> "Subject":
        """A copy of a model, or of a predictor's.

        Of a `MaskRCNN` it is the backbone and the pyramid: what follows them is no graph.

        Raises:
            ExportError: The model is not in float32.
        """
        classes: tuple[str, ...] = ()
        if isinstance(model, Predictor):
            preprocessing, classes = model.preprocessing, tuple(model.classes)
            model = model.model
        else:
            preprocessing = Preprocessing.of_model(model)
        cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        classes = classes or tuple(cfg.get("label_names") or ())
        name = str(cfg.get("architecture") or type(model).__name__)
        module: nn.Module = model.backbone if isinstance(model, MaskRCNN) else model
        if wrong := {str(p.dtype) for p in module.parameters()} - {"torch.float32"}:
            raise ExportError(
                f"{name}: expected a model in float32, got {', '.join(sorted(wrong))}; export it before it "
                "is converted, with weights='float16' for a file of half the size"
            )
        scans = any(isinstance(each, SS2D) for each in module.modules())
        module = copy.deepcopy(module).cpu().eval().requires_grad_(False)
        return cls(module, name, preprocessing, classes, scans)

    def with_weights(self, kind: WeightType) -> "Subject":
        """With weights rounded to `kind`, computing in float32 all the same.

        What a scan keeps in float32 in a half-precision model stays as it is.
        """
        if kind == "float16":
            module = copy.deepcopy(self.module)
            for name, parameter in module.named_parameters():
                if parameter.ndim > 1 and not name.endswith("A_log"):
                    parameter.copy_(parameter.half().float())
            return replace(self, module=module)
        if kind != "float32":
            raise ValueError(f"weights: expected 'float32' or 'float16', got {kind!r}")
        return self

    def with_preprocessing(self) -> "Subject":
        """Preceded by the preprocessing, followed by softmax.

        Raises:
            ExportError: It is not a classifier.
            ModelError: The preprocessing can't be put into a graph.
        """
        with torch.no_grad():
            output = self.module(self.example(self.preprocessing.size, batch=1))
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise ExportError(f"{self.name}: preprocessing goes into the graph of a classifier alone")
        module = WithPreprocessing(self.module, self.preprocessing)
        return replace(self, module=module, preprocesses=True)

    @property
    def example_size(self) -> tuple[int, int]:
        """Height and width with which a model of any image size is traced.

        Not so small that a map within has one row: PyTorch takes a size of 1 for a constant.
        """
        height, width = self.preprocessing.size
        if self.preprocesses:
            return height, width
        return (_SMALL, _SMALL) if self.scans else (max(height, _SMALL), max(width, _SMALL))

    def example(self, size: tuple[int, int], batch: int = 2, seed: int = 0) -> Tensor:
        """Random input of a size."""
        generator = torch.Generator().manual_seed(seed)
        if self.preprocesses:
            return torch.randint(256, (batch, *size, 3), generator=generator, dtype=torch.uint8)
        return torch.randn(batch, self.preprocessing.channels, *size, generator=generator)

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """The module's outputs by name.

        Raises:
            ExportError: They are neither a tensor nor a list or mapping of tensors.
        """
        with torch.inference_mode():
            output = self.module(images)
        if isinstance(output, Tensor):
            return {"probabilities" if self.preprocesses else "logits": output}
        named: dict[str, Any] = (
            {f"map_{key}": value for key, value in output.items()}
            if isinstance(output, Mapping)
            else {f"map_{number}": value for number, value in enumerate(output)}
        )
        if not all(isinstance(value, Tensor) for value in named.values()):
            kinds = ", ".join(sorted({type(value).__name__ for value in named.values()}))
            raise ExportError(f"{self.name}: expected a tensor or several as its output, got {kinds}")
        return named

    def metadata(self) -> dict[str, str]:
        """What a file says of the model: strings, some of them JSON."""
        from vmamba import __version__

        config: Any = getattr(self.module, "config", None)
        task = "segmentation" if isinstance(self.module, UPerNet) else None
        facts: dict[str, Any] = {
            "vmamba.model": self.name,
            "vmamba.version": __version__,
            "vmamba.classes": list(self.classes),
            "vmamba.preprocessing": self.preprocessing.to_dict(),
            "vmamba.preprocesses": self.preprocesses,
            "vmamba.config": config.arguments() if hasattr(config, "arguments") else {},
        }
        if task is not None:
            facts["vmamba.task"] = task
        return {
            key: value if isinstance(value, str) else json.dumps(value, default=str)
            for key, value in facts.items()
        }
