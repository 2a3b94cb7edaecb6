"""Write `src/vmamba_cli/models.json`, which `vmamba list` shows without importing PyTorch.

    python tools/model_table.py

Run it after adding or changing a model; a test compares the file with the models.
"""

import json
from pathlib import Path
from typing import Any

import timm

from vmamba.analysis.complexity import count
from vmamba.models import ALIASES
from vmamba.models.factory import create_on_meta

TABLE = Path(__file__).parent.parent / "src" / "vmamba_cli" / "models.json"


def names() -> list[str]:
    """The models that the library registers with timm, aliases first."""
    registered = [
        name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("vmamba.")
    ]
    return [*ALIASES, *(name for name in registered if name not in ALIASES)]


def row(name: str) -> dict[str, Any]:
    """The table's row of a model, at its default input size."""
    model = create_on_meta(name)
    cfg = model.pretrained_cfg
    counts = count(model, cfg["input_size"])
    return {
        "model": name,
        "same as": ALIASES.get(name, ""),
        "input": cfg["input_size"][-1],
        "parameters": counts.parameters,
        "GMACs": round(counts.macs / 1e9, 3),
        "weights": "authors'" if cfg.get("url") else "",
    }


def table() -> str:
    """The file's text, a line for each model."""
    lines = ",\n".join(json.dumps(row(name)) for name in names())
    return f"[\n{lines}\n]\n"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
    print(TABLE)
