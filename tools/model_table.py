"""Write `src/vmamba_cli/models.json`, which `vmamba list` shows without importing PyTorch.

    python tools/model_table.py

To be run after a model was added or changed; a test compares the file with the models.
"""

import json
from pathlib import Path
from typing import Any

from vmamba.analysis.complexity import count
from vmamba.models import ALIASES, model_names
from vmamba.models.factory import create_on_meta

TABLE = Path(__file__).parent.parent / "src" / "vmamba_cli" / "models.json"


def row(name: str) -> dict[str, Any]:
    """What the table says of a model, at its own input size."""
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
    lines = ",\n".join(json.dumps(row(name)) for name in model_names())
    return f"[\n{lines}\n]\n"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
    print(TABLE)
