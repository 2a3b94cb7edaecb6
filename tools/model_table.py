"""Write what is said of every model: `src/vmamba_cli/models.json`, and rows of `docs/models.md`.

    python tools/model_table.py

These are the first table, and the accuracy of the weights that come with the package, which their file holds.
Run it after adding or changing a model; tests compare both with the models. `vmamba list` shows the first
without importing PyTorch.
"""

import json
import re
from pathlib import Path
from typing import Any

import timm
from safetensors import safe_open

from vmamba.analysis.complexity import count
from vmamba.models import ALIASES, model_names
from vmamba.models.factory import create_on_meta

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "src" / "vmamba_cli" / "models.json"
PAGE = ROOT / "docs" / "models.md"
_COUNTED = re.compile(r"(?<=\n\| model \| parameters \|)(.*\n\|[-|]+\n)((?:\|.*\n)+)")
_PACKAGED = re.compile(r"(?:\| `\w+`, its packaged weights \|.*\n)+")


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
        "weights": "authors'" if cfg.get("url") else "in the package" if cfg.get("file") else "",
    }


def table() -> str:
    """The file's text, a line for each model."""
    lines = ",\n".join(json.dumps(row(name)) for name in model_names())
    return f"[\n{lines}\n]\n"


def page(rows: list[dict[str, Any]], text: str) -> str:
    """The page's text with a line for each model, in the order of their definitions.

    Args:
        rows: Of the table.
        text: The page as it is.

    Raises:
        SystemExit: The page has no such table.
    """
    names = {row["model"]: [row["model"]] for row in rows if not row["same as"]}
    for row in rows:
        if row["same as"]:
            names[row["same as"]].insert(0, row["model"])
    lines = {_place(row["model"]): _line(row, names[row["model"]]) for row in rows if not row["same as"]}
    counted, packaged = _COUNTED.search(text), _PACKAGED.search(text)
    if not counted or not packaged:
        raise SystemExit(f"{PAGE}: expected a table 'model | parameters', and a row of packaged weights")
    accuracies = [_accuracy(row["model"]) for row in rows if row["weights"] == "in the package"]
    text = text.replace(packaged[0], "".join(accuracies), 1)
    return text.replace(counted[2], "".join(lines[place] for place in sorted(lines)), 1)


def _place(name: str) -> tuple[bool, str, int]:
    """Where a model is defined, those of VMamba first."""
    function = timm.model_entrypoint(name)
    return ".peers." in function.__module__, function.__module__, function.__code__.co_firstlineno


def _line(row: dict[str, Any], names: list[str]) -> str:
    config = getattr(create_on_meta(row["model"]), "config", None)
    depths = ", ".join(map(str, getattr(config, "depths", ())))
    states = getattr(getattr(config, "ss2d", None), "d_state", "")
    at = "" if row["input"] == 224 else f" at {row['input']}²"
    cells = [" = ".join(f"`{name}`" for name in names), f"{row['parameters']:,}", f"{row['GMACs']:.3f}{at}"]
    return f"| {' | '.join([*cells, depths, str(states), row['weights']])} |\n".replace("|  |", "| |")


def _accuracy(name: str) -> str:
    """The line of a model whose weights come with the package: how well they do, by their file."""
    with safe_open(timm.get_pretrained_cfg(name).file, framework="pt") as file:
        facts = file.metadata()
    how = f"`{facts['command']}`; {facts['processor']}, torch {facts['torch']}, {facts['date']}"
    top1 = f"{100 * float(facts['top1']):.2f} % top-1"
    result = f"{top1} on {facts['dataset']}, {facts['judged on']}"
    return f"| `{name}`, its packaged weights | {result} | {how} |\n"


def main() -> None:
    """Write both."""
    TABLE.write_text(table(), encoding="utf-8")
    PAGE.write_text(page(json.loads(table()), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(TABLE, PAGE, sep="\n")


if __name__ == "__main__":
    main()
