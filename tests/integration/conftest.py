"""What tests of pages share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser import Page, browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page
