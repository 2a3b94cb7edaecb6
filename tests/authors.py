"""The names that VMamba's authors gave their weights.

They are written down here independent of `vmamba.models.official`, whose two tables the tests prove right by
them. Tests that only need a file under these names take `official.authors_names`.
"""

import re

from torch import Tensor


def authors_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ours → the authors', with their shapes."""
    renamed = {}
    for name, value in state_dict.items():
        for old, new in (
            ("stem.conv1", "patch_embed.0"),
            ("stem.norm1", "patch_embed.2"),
            ("stem.conv2", "patch_embed.5"),
            ("stem.norm2", "patch_embed.7"),
            (".norm1.", ".norm."),
            (".op.conv.", ".op.conv2d."),
            (".op.dt_", ".op.dt_projs_"),
            ("head.fc", "classifier.head"),
        ):
            name = name.replace(old, new)
        if name.startswith("norm."):
            name = f"classifier.{name}"
        if name.endswith((".A_log", ".op.D")):
            name, value = f"{name}s", value.flatten(0, 1)
        if match := re.match(r"stages\.(\d)\.downsample\.(conv|norm)(.*)", name):
            index = {"conv": "1", "norm": "3"}[match[2]]
            name = f"layers.{int(match[1]) - 1}.downsample.{index}{match[3]}"
        renamed[name.replace("stages.", "layers.")] = value
    return renamed
