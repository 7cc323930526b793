"""What stages leave for the report."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paws_hpc.exhibits import lines, read_exhibits, table, text, write_exhibits
from paws_hpc.report.page import build_report


def test_the_report_shows_whatever_a_stage_left(tmp_path: Path) -> None:
    shown = [
        table("Per class", ["class", "recall"], [["<b>cat</b>", 0.5], ["dog", 1]], caption="On the test split."),
        lines(
            "Reliability", {"before": ([0.1, 0.9], [0.2, 0.8]), "ideal": ([0, 1], [0, 1])}, x="confidence", y="accuracy"
        ),
        text("Note", "Nothing else."),
    ]
    write_exhibits(tmp_path / "pretrain", shown)
    assert read_exhibits(tmp_path / "pretrain") == shown
    page = build_report(tmp_path).read_text()
    assert "&lt;b&gt;cat&lt;/b&gt;" in page
    assert '<td class="number">0.5</td>' in page
    assert ">confidence</text>" in page
    assert "Nothing else." in page
    assert 'id="exhibits-pretrain"' in page
    assert 'id="exhibits-selection"' not in page


def test_what_is_no_exhibit_is_refused_where_it_is_made_and_where_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every row of the table needs 2 entries"):
        table("t", ["a", "b"], [[1]])
    with pytest.raises(ValueError, match="as many x as y, at least one, all finite"):
        lines("l", {"a": ([1, float("nan")], [1, 2])}, x="x", y="y")
    path = tmp_path / "pretrain" / "exhibits.json"
    path.parent.mkdir()
    for content in ("{}", "3", '[{"title": "t"}]', '[{"title": "t", "caption": "", "kind": "film"}]'):
        path.write_text(content)
        with pytest.raises(ValueError, match=re.escape(f"{path} is no list of exhibits")):
            read_exhibits(path.parent)
