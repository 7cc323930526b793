"""What tests of pages and of Weights & Biases share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Page, browser
from tests.wandb_server import WandbServer, outside, serving


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    """A server to which the environment leads; WANDB_* is as before afterwards."""
    with serving() as double:
        outside(monkeypatch, tmp_path, double)
        yield double
