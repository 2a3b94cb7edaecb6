"""The four studies: their subjects, with the values that the paper states (arXiv 2401.10166, version 2)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm

from vmamba.models.factory import check_name
from vmamba.report.paper import TABLES
from vmamba.studies import figures
from vmamba.studies.growth import exponent
from vmamba.studies.study import INFERENCE, Row, Study, Subject

_SPEEDS = {
    "DeiT-S": (1759, 2397),
    "DeiT-B": (500, 1024),
    "DeiT-B, 384²": (498, 344),
    "ConvNeXt-T": (1189, 701),
    "ConvNeXt-S": (682, 444),
    "ConvNeXt-B": (435, 334),
    "HiViT-T": (1391, 1300),
    "HiViT-S": (711, 697),
    "HiViT-B": (456, 541),
    "Swin-T": (1247, 985),
    "Swin-S": (719, 640),
    "Swin-B": (457, 494),
    "S4ND-ConvNeXt-T": (684, 331),
    "S4ND-ViT-B": (404, 340),
    "ViM-S": (811, 232),
    "VMamba-T": (1335, 464),
    "VMamba-S": (874, 313),
    "VMamba-B": (645, 246),
}
"""Images/s of Table 1 on an A100, batch 128: inference and training."""


def _quoted(
    parameters: float | None = None,
    gmacs: float | None = None,
    inference: float | None = None,
    training: float | None = None,
    top1: float | None = None,
) -> dict[str, float]:
    values = {
        "parameters, M": parameters,
        "GMACs": gmacs,
        "inference, images/s": inference,
        "training, images/s": training,
        "top-1, %": top1,
    }
    return {column: value for column, value in values.items() if value is not None}


def _table_1() -> dict[str, Subject]:
    """The rows of Table 1, each at the size that its name states."""
    subjects = {}
    for row in TABLES["classification"].rows:
        size = re.search(r", (\d+)²", row.name)
        inference, training = _SPEEDS.get(row.name, (None, None))
        quoted = _quoted(row.parameters, row.gmacs, inference, training, row.scores["top-1, %"])
        label = row.name.split(", ")[0] if size else row.name
        subjects[row.name] = Subject(label, row.models[0], int(size[1]) if size else 224, quoted=quoted)
    return subjects


_TABLE_1 = _table_1()
_TINY = _TABLE_1["VMamba-T"]


_THROUGHPUT = [
    ["Swin-T", "ConvNeXt-T", "DeiT-S", "HiViT-T", "RegNetY-4G"],
    ["VMamba-T, s1l8", "ViM-S", "S4ND-ConvNeXt-T", "EfficientNet-B3, 300²"],
    ["VMamba-S", "Swin-S", "ConvNeXt-S", "HiViT-S", "RegNetY-8G"],
    ["VMamba-B", "Swin-B", "ConvNeXt-B", "HiViT-B", "DeiT-B", "RegNetY-16G"],
    ["EfficientNet-B4, 380²", "EfficientNet-B5, 456²", "S4ND-ViT-B"],
    ["EfficientNet-B6, 528²", "DeiT-B, 384²", "ViT-B/16, 384²"],
    ["ViT-L/16, 384²"],
]
"""Rows of Table 1 that are timed in turns, beside VMamba-T; the cheapest first."""


def throughput(models: Sequence[str] = ()) -> Study:
    """Every row of Table 1 at its own size.

    Args:
        models: Those to measure, of the table or others of timm's registry; none for the whole table.
    """
    groups = [[_TINY, *(_TABLE_1[name] for name in names)] for names in _THROUGHPUT]
    if models:
        by_model = {s.model: s for s in reversed(_TABLE_1.values())}
        names = dict.fromkeys(models)
        groups = [[by_model.get(name) or Subject(name, name, _own_size(name)) for name in names]]
    return Study("throughput", "Throughput of backbones (Table 1)", groups, figures.draw_throughput)


def _own_size(name: str) -> int:
    """The side of the images that a model is made for."""
    check_name(name)
    config = timm.get_pretrained_cfg(name)
    return 224 if config is None else int(config.input_size[-1])


SIZES = (224, 384, 512, 640, 768, 1024)
"""Sides of the images in Table 4."""

_RESOLUTION: dict[str, tuple[str, Sequence[float], Sequence[float]]] = {
    "VMamba-T": ("vmamba_tiny", (1226, 450, 272, 170, 117, 66), (82.5, 82.5, 81.1, 79.3, 76.1, 62.3)),
    "Swin-T": (
        "swin_tiny_patch4_window7_224",
        (1061, 305, 168, 85, 52, 22),
        (81.2, 80.7, 79.0, 76.6, 73.1, 61.9),
    ),
    "DeiT-S": ("deit_small_patch16_224", (1559, 494, 256, 144, 87, 36), ()),
    "ConvNeXt-T": ("convnext_tiny", (1107, 405, 225, 147, 103, 60), ()),
    "HiViT-T": ("hivit_tiny", (1259, 392, 186, 93, 54, 21), ()),
    "ResNet-50": ("resnet50", (2988, 1192, 705, 435, 309, 181), ()),
}
"""Of Table 4: images/s in inference on an A100, batch 32, and top-1, at each size."""


def _at(label: str, size: int) -> Subject:
    """A model of Table 4, or of timm's registry, at a size."""
    model, speeds, scores = _RESOLUTION.get(label, (label, (), ()))
    speed, score = (dict(zip(SIZES, values, strict=False)).get(size) for values in (speeds, scores))
    # In the paper Swin's windows grow with the image.
    args: dict[str, Any] = {"window_size": size // 32} if label == "Swin-T" else {}
    return Subject(label, model, size, args, quoted=_quoted(inference=speed, top1=score))


def resolution(models: Sequence[str] = (), sizes: Sequence[int] = SIZES) -> Study:
    """The models of Table 4 at each of its sizes.

    Args:
        models: Those to measure, of the table or others of timm's registry; none for the table's.
        sizes: Sides of the images.
    """
    labels = {model: label for label, (model, _, _) in _RESOLUTION.items()}
    chosen = [labels.get(model, model) for model in dict.fromkeys(models)] or list(_RESOLUTION)
    return Study(
        "resolution",
        "Models at larger images (Table 4, Figure 11)",
        [[_at(label, size) for label in chosen] for size in sorted(set(sizes))],
        figures.draw_resolution,
        _exponents,
    )


def _exponents(rows: Sequence[Row]) -> list[str]:
    lines = []
    for label in dict.fromkeys(row.subject.label for row in rows):
        of_model = [row for row in rows if row.subject.label == label]
        timed = [row for row in of_model if row.inference is not None]
        pixels = [float(row.subject.size**2) for row in of_model]
        fits = {
            "multiply-adds": exponent(pixels, [row.macs for row in of_model]),
            "time of an image": exponent(
                [float(row.subject.size**2) for row in timed],
                [1 / row.inference.images_per_second for row in timed if row.inference],
            ),
            "the paper's time": exponent(
                [float(row.subject.size**2) for row in of_model if INFERENCE in row.subject.quoted],
                [1 / row.subject.quoted[INFERENCE] for row in of_model if INFERENCE in row.subject.quoted],
            ),
        }
        texts = [f"{what} ∝ pixels^({fit})" for what, fit in fits.items() if fit is not None]
        if texts:
            lines.append(f"{label}: {', '.join(texts)}")
    return lines


_VANILLA = "vanilla_vmamba_tiny"
_LADDER = [
    Subject(
        "V0: scan in plain operations",
        _VANILLA,
        backend="chunked",
        fused=False,
        quoted=_quoted(22.9, 5.63, 426, 138, 82.17),
    ),
    Subject("V2: scan in a kernel", _VANILLA, fused=False, quoted=_quoted(22.9, 5.63, 467, 165, 82.17)),
    Subject("V5: layers without permutations", _VANILLA, quoted=_quoted(22.9, 5.63, 638, 195, 82.17)),
    Subject(
        "V6: MLP, no depthwise convolution",
        "vmamba_tiny_v6",
        quoted=_quoted(29.0, 5.63, 813, 248, 81.65),
    ),
    Subject("SSM ratio 1", "vmamba_tiny_v7_shallow", quoted=_quoted(22.9, 4.02, 1336, 405, 81.05)),
    Subject("V7: depths 2, 2, 5, 2", "vmamba_tiny_v7", quoted=_quoted(28.2, 5.18, 1137, 348, 82.24)),
    Subject("V8: no gate", "vmamba_tiny_v8", quoted=_quoted(26.2, 4.86, 1179, 360, 82.17)),
    Subject(
        "depthwise convolution again",
        "vmamba_tiny_v8",
        args={"ssm_conv": 3},
        quoted=_quoted(26.3, 4.87, 1164, 358, 82.31),
    ),
    Subject(
        "state size 1",
        "vmamba_tiny_v8",
        args={"ssm_conv": 3, "d_state": 1},
        quoted=_quoted(25.6, 3.98, 1942, 647, 81.87),
    ),
    Subject(
        "V9: SSM ratio 2",
        "vmamba_tiny_s2l5",
        quoted=_quoted(30.7, 4.86, 1340, 464, 82.49),
    ),
    Subject("s1l8", "vmamba_tiny_s1l8", quoted=_quoted(30.2, 4.91, 1686, 571, 82.60)),
]


def ladder() -> Study:
    """The steps of Figure 9 that are models or settings of this library."""
    note = (
        "The paper's V1 (routes as an autograd function), V3 (operands in half precision) and V4 (linear "
        "layers instead of einsum) have no counterpart here: no step of this library is without them."
    )
    title = "The steps to a faster VMamba-T (Figure 9)"
    return Study("ladder", title, [_LADDER], figures.draw_ladder, lambda rows: [note])


TABLE_5 = {
    "cross": _quoted(30.70, 4.86, 1343, 464, 82.5),
    "unidirectional": _quoted(30.70, 4.86, 1342, 464, 82.2),
    "bidirectional": _quoted(30.70, 4.86, 1344, 465, 74.8),
    "cascade": _quoted(30.70, 4.86, 817, 253),
}
"""The scan patterns, as `routes` of a model."""

PATTERNS = (*TABLE_5, "snake", "diagonal", "window:7", "atrous:2")
"""Table 5's patterns, and this library's others."""


def patterns(
    model: str = "vmamba_tiny",
    size: int | None = None,
    routes: Sequence[str] = (),
    args: Mapping[str, Any] | None = None,
) -> Study:
    """The patterns of Table 5 and others.

    Args:
        model: That reads images so; the paper's values stand beside "vmamba_tiny".
        size: Side of the images; None for the model's own.
        routes: Names of patterns, as the model's argument `routes`; none for `PATTERNS`.
        args: Other arguments of the model.
    """
    side = size or _own_size(model)
    quoted = TABLE_5 if model == "vmamba_tiny" and side == 224 and not args else {}
    group = [
        Subject(name, model, side, {**(args or {}), "routes": name}, quoted=quoted.get(name, {}))
        for name in dict.fromkeys(routes or PATTERNS)
    ]
    note = (
        "The paper's 74.8 % of bidirectional came with NaN after about 50 epochs; its later version states "
        "82.49 %."
    )
    return Study(
        "patterns",
        "Scan patterns (Table 5, Figure 12)",
        [group],
        figures.draw_patterns,
        lambda rows: [note] if quoted else [],
    )


STUDIES = {"throughput": throughput, "resolution": resolution, "ladder": ladder, "patterns": patterns}
"""A function for each study, by its name."""
