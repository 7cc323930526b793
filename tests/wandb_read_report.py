"""What test_wandb_report asks of W&B: python -m tests.wandb_read_report URL prints what its package reads of a report.

A process of its own, because W&B's package starts threads and a service that would outlive a test.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(url: str) -> None:
    """Print title, panels, curves, texts and how runs are chosen and grouped."""
    import wandb_workspaces.reports.v2 as wr

    report = wr.Report.from_url(url)
    panels: list[Any] = [panel for block in report.blocks for panel in getattr(block, "panels", [])]
    content = {
        "title": report.title,
        "panels": [type(panel).__name__ for panel in panels],
        "curves": [getattr(y, "name", y) for panel in panels if isinstance(panel, wr.LinePlot) for y in panel.y],
        "patterns": [panel.metric_regex for panel in panels if getattr(panel, "metric_regex", None)],
        "groups": [runset.groupby for block in report.blocks for runset in getattr(block, "runsets", [])],
        "markdown": [block.text for block in report.blocks if isinstance(block, wr.MarkdownBlock)],
        "filters": [runset.filters for block in report.blocks for runset in getattr(block, "runsets", [])],
    }
    print(json.dumps(content))


if __name__ == "__main__":
    main(sys.argv[1])
