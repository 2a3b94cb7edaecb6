"""What the paper states of its models (arXiv 2401.10166), to be set beside what a run reached."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Quoted:
    """A row of one of the paper's tables.

    Attributes:
        name: As the paper calls the model.
        parameters: In millions.
        gmacs: Multiply-adds in 10⁹, at the input that the table's caption names.
        scores: In percent, by the columns of the table.
        models: Names under which this library has the same model.
    """

    name: str
    parameters: float
    gmacs: float | None
    scores: Mapping[str, float]
    models: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """A score of a table.

    Attributes:
        title: What the column is called.
        score: The score of the task that it is.
        averaged: Whether it is reached by averaging over sizes or mirror images.
    """

    title: str
    score: str
    averaged: bool = False


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables.

    Attributes:
        caption: What was measured.
        classes: The number of classes of its data, by which a run on the same data is known.
        columns: Its scores.
        rows: Its models.
    """

    caption: str
    classes: int
    columns: tuple[Column, ...]
    rows: tuple[Quoted, ...]


def _classifier(name: str, parameters: float, gmacs: float | None, top1: float, *models: str) -> Quoted:
    return Quoted(name, parameters, gmacs, {"top-1, %": top1}, models)


def _detector(name: str, parameters: float, gmacs: float, box: float, mask: float, *models: str) -> Quoted:
    return Quoted(name, parameters, gmacs, {"box AP, %": box, "mask AP, %": mask}, models)


def _segmenter(
    name: str, parameters: float, gmacs: float, single: float, multi: float, *models: str
) -> Quoted:
    scores = {"mIoU, %": single, "mIoU over several sizes, %": multi}
    return Quoted(name, parameters, gmacs, scores, models)


_CLASSIFICATION = PaperTable(
    caption="ImageNet-1K at 224² if nothing else is said (Table 1, Figure 9)",
    classes=1000,
    columns=(Column("top-1, %", "top1"),),
    rows=(
        _classifier("VMamba-T", 31, 4.9, 82.5, "vmamba_tiny", "vmamba_tiny_s2l5"),
        _classifier("VMamba-S", 50, 8.7, 83.6, "vmamba_small", "vmamba_small_s2l15"),
        _classifier("VMamba-B", 89, 15.4, 83.9, "vmamba_base", "vmamba_base_s2l15"),
        _classifier("VMamba-T, s1l8", 30.2, 4.91, 82.6, "vmamba_tiny_s1l8"),
        _classifier("V0 to V5 (vanilla VMamba-T)", 22.9, 5.63, 82.17, "vanilla_vmamba_tiny"),
        _classifier("V6", 29.0, 5.63, 81.65, "vmamba_tiny_v6"),
        _classifier("V7, shallow", 22.9, 4.02, 81.05, "vmamba_tiny_v7_shallow"),
        _classifier("V7", 28.2, 5.18, 82.24, "vmamba_tiny_v7"),
        _classifier("V8", 26.2, 4.86, 82.17, "vmamba_tiny_v8"),
        _classifier("RegNetY-4G", 21, 4.0, 80.0, "regnety_040"),
        _classifier("RegNetY-8G", 39, 8.0, 81.7, "regnety_080"),
        _classifier("RegNetY-16G", 84, 16.0, 82.9, "regnety_160"),
        _classifier("EfficientNet-B3, 300²", 12, 1.8, 81.6, "efficientnet_b3"),
        _classifier("EfficientNet-B4, 380²", 19, 4.2, 82.9, "efficientnet_b4"),
        _classifier("EfficientNet-B5, 456²", 30, 9.9, 83.6, "efficientnet_b5"),
        _classifier("EfficientNet-B6, 528²", 43, 19.0, 84.0, "efficientnet_b6"),
        _classifier("ViT-B/16, 384²", 86, 55.4, 77.9, "vit_base_patch16_384"),
        _classifier("ViT-L/16, 384²", 307, 190.7, 76.5, "vit_large_patch16_384"),
        _classifier("DeiT-S", 22, 4.6, 79.8, "deit_small_patch16_224"),
        _classifier("DeiT-B", 86, 17.5, 81.8, "deit_base_patch16_224"),
        _classifier("DeiT-B, 384²", 86, 55.4, 83.1, "deit_base_patch16_384"),
        _classifier("ConvNeXt-T", 29, 4.5, 82.1, "convnext_tiny"),
        _classifier("ConvNeXt-S", 50, 8.7, 83.1, "convnext_small"),
        _classifier("ConvNeXt-B", 89, 15.4, 83.8, "convnext_base"),
        _classifier("HiViT-T", 19, 4.6, 82.1, "hivit_tiny"),
        _classifier("HiViT-S", 38, 9.1, 83.5, "hivit_small"),
        _classifier("HiViT-B", 66, 15.9, 83.8, "hivit_base"),
        _classifier("Swin-T", 28, 4.6, 81.3, "swin_tiny_patch4_window7_224"),
        _classifier("Swin-S", 50, 8.7, 83.0, "swin_small_patch4_window7_224"),
        _classifier("Swin-B", 88, 15.4, 83.5, "swin_base_patch4_window7_224"),
        _classifier("S4ND-ConvNeXt-T", 30, None, 82.2, "s4nd_convnext_tiny"),
        _classifier("S4ND-ViT-B", 89, None, 80.4, "s4nd_vit_base"),
        _classifier("ViM-S", 26, None, 80.5, "vim_small"),
    ),
)

_DETECTION = PaperTable(
    caption="Mask R-CNN on COCO, GMACs at 800×1280 (Table 2)",
    classes=80,
    columns=(Column("box AP, %", "box_AP"), Column("mask AP, %", "mask_AP")),
    rows=(
        _detector("VMamba-T, 12 epochs", 50.2, 270.2, 47.4, 42.7, "vmamba_tiny", "vmamba_tiny_s2l5"),
        _detector("VMamba-S, 12 epochs", 69.7, 348.9, 48.7, 43.7, "vmamba_small", "vmamba_small_s2l15"),
        _detector("VMamba-B, 12 epochs", 108, 485.5, 49.2, 43.9, "vmamba_base", "vmamba_base_s2l15"),
        _detector("VMamba-T, 36 epochs", 50.2, 270.2, 48.9, 43.7, "vmamba_tiny", "vmamba_tiny_s2l5"),
        _detector("VMamba-S, 36 epochs", 69.7, 348.9, 49.9, 44.2, "vmamba_small", "vmamba_small_s2l15"),
    ),
)

_SEGMENTATION = PaperTable(
    caption="UPerNet on ADE20K, GMACs at 512×2048 (Table 3)",
    classes=150,
    columns=(
        Column("mIoU, %", "mIoU"),
        Column("mIoU over several sizes, %", "mIoU", averaged=True),
    ),
    rows=(
        _segmenter("VMamba-T", 62.4, 947.8, 48.3, 48.6, "vmamba_tiny", "vmamba_tiny_s2l5"),
        _segmenter("VMamba-S", 81.8, 1028.4, 50.6, 51.2, "vmamba_small", "vmamba_small_s2l15"),
        _segmenter("VMamba-B", 122.1, 1170.3, 51.0, 51.6, "vmamba_base", "vmamba_base_s2l15"),
    ),
)

TABLES = {
    "classification": _CLASSIFICATION,
    "detection": _DETECTION,
    "segmentation": _SEGMENTATION,
}
"""The paper's tables, by the name of the task."""
