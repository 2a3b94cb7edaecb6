"""The table that `vmamba list` shows says what the models are."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import model_table

from vmamba.models import model_names

ROWS = {row["model"]: row for row in json.loads(model_table.TABLE.read_text(encoding="utf-8"))}

GMACS = {  # at 224: the figures of the paper and of its authors' tables
    "vmamba_tiny": 4.858,
    "vmamba_small": 8.716,
    "vmamba_base": 15.359,
    "vmamba_tiny_s1l8": 4.906,
    "vmamba_small_s1l20": 8.612,
    "vmamba_base_s1l20": 15.221,
    "vanilla_vmamba_tiny": 5.627,
    "vanilla_vmamba_small": 11.232,
    "vanilla_vmamba_base": 18.020,
    "vmamba_tiny_v6": 5.633,
    "vmamba_tiny_v7": 5.179,
    "vmamba_tiny_v7_shallow": 4.018,
    "vmamba_tiny_v8": 4.861,
}
MEND = "run `python tools/model_table.py`"


def test_it_has_every_model() -> None:
    assert list(ROWS) == model_names(), MEND


@pytest.mark.parametrize("name", ROWS)
def test_its_row_is_right(name: str) -> None:
    assert ROWS[name] == model_table.row(name), MEND


@pytest.mark.parametrize("name", GMACS)
def test_the_figures_are_those_of_the_paper(name: str) -> None:
    assert ROWS[name]["GMACs"] == pytest.approx(GMACS[name], rel=1e-3)


def test_its_text_is_what_the_tool_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_table, "row", ROWS.get)
    assert model_table.table() == model_table.TABLE.read_text(encoding="utf-8")


def test_the_page_says_the_same() -> None:
    text = model_table.PAGE.read_text(encoding="utf-8")
    assert model_table.page(list(ROWS.values()), text) == text, MEND
    first = text.split("## Counted here")[1].split("## Measured here")[0]
    assert all(f"`{name}`" in first for name in ROWS)


def test_a_new_model_gets_a_line_of_the_page() -> None:
    text = model_table.PAGE.read_text(encoding="utf-8")
    without = "".join(
        line for line in text.splitlines(keepends=True) if not line.startswith("| `vmamba_nano")
    )
    assert without != text
    assert model_table.page(list(ROWS.values()), without) == text


@pytest.mark.parametrize("missing", ["| model | parameters |", "its packaged weights"])
def test_a_page_without_the_tables_is_refused(missing: str) -> None:
    text = model_table.PAGE.read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match=r"models\.md: expected a table"):
        model_table.page(list(ROWS.values()), text.replace(missing, ""))
