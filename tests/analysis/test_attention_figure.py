from pathlib import Path

import pytest
import torch

from vmamba import VMamba
from vmamba.analysis import memory
from vmamba.analysis.attention import AttentionError, ScanAttention, scan_attention
from vmamba.analysis.attention_figure import SECTIONS, draw, draw_panel, panels

QUERY = (0.3, 0.7)


@pytest.fixture(scope="module")
def scan() -> ScanAttention:
    torch.manual_seed(0)
    model = VMamba(num_classes=0, depths=(1,), dims=(8,), routes=("row", "row", "column_reversed"))
    return scan_attention(model, torch.randn(3, 16, 24), stage=0, block=0)  # 4 x 6 positions


def test_each_panel_holds_what_it_says(scan: ScanAttention) -> None:
    position = scan.position(QUERY)
    by_name = {panel.name: panel for panel in panels(scan, position, deltas=(False, True))}
    assert {panel.section for panel in by_name.values()} == set(SECTIONS)
    row, reached = scan.row(position, "CwBw", True), scan.reached(position)
    panel = by_name["query-CwBw-delta-column_reversed"]
    assert panel.star == divmod(position, 6)
    assert torch.equal(panel.values.isnan(), ~reached[2])
    torch.testing.assert_close(panel.values.nan_to_num(), row[2])
    torch.testing.assert_close(by_name["query-CwBw-delta-sum"].values, row.sum(0))
    torch.testing.assert_close(by_name["query-CB-diagonal"].values, scan.diagonal("CB"))
    assert "query-ww-diagonal" not in by_name  # the same everywhere
    assert {"map-ww-row_0", "map-ww-row_1"} <= set(by_name)
    maps = scan.maps("ww")
    torch.testing.assert_close(by_name["map-ww-sum"].values, maps.merged())
    torch.testing.assert_close(by_name["map-ww-row_1"].values.nan_to_num(), maps.maps[1])
    assert all(name.isascii() for name in by_name)
    assert {"progress-CB-1_4", "progress-CB-1_2", "progress-CB-3_4"} <= set(by_name)
    end = by_name["progress-CB-end"]
    assert end.star == (3, 5)
    torch.testing.assert_close(end.values, scan.row(23, "CB")[0])
    assert len(by_name) == 6 * (3 + 1) + 5 + 6 * (3 + 1) + 6 * 4


def test_maps_too_large_are_refused_before_they_are_begun(
    scan: ScanAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_available_memory", lambda: 1000)
    with pytest.raises(AttentionError, match=r"3 routes over 4 x 6 positions .* --no-maps"):
        panels(scan, 0)
    assert {panel.section for panel in panels(scan, 0, maps=False)} == {"query", "progress"}


@pytest.mark.parametrize("maps", [True, False])
def test_the_pictures(maps: bool, scan: ScanAttention, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shown = panels(scan, scan.position(QUERY), ["CB"], maps=maps)
    draw(shown, torch.rand(1 if maps else 3, 16, 24), QUERY, "a title", tmp_path / "figure.png")
    draw_panel(shown[0], tmp_path / "panel.png")
    for name in ("figure.png", "panel.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
