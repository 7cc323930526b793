"""What the documentation says of the code is so: messages, recipes, sums, commands and links."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from paws_hpc.__main__ import COMMANDS
from paws_hpc.own_images import OwnImages, recipe

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
SITUATIONS = [  # images, short side in pixels, classes, labels of each, on a GPU
    (200, 60, 4, 4, False), (1_000, 100, 8, 4, False), (2_000, 300, 8, 50, False),
    (1_000, 40, 8, 4, True), (2_000, 100, 8, 4, True), (2_000, 300, 8, 50, True), (20_000, 300, 20, 20, True),
    (100_000, 500, 100, 50, True), (1_000_000, 500, 1000, 12, True),
]  # fmt: skip


def rows(page: str, columns: int) -> list[list[str]]:
    """The cells of all rows of a page that have so many."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in cells if len(row) == columns]


def texts() -> Iterator[str]:
    """Every string of the package's source; where a value goes into one stands ``…``."""
    for path in (ROOT / "paws_hpc").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_message_that_is_explained_can_appear() -> None:
    said = list(texts())
    messages = [row[0].strip("`") for row in rows("troubleshooting.md", 2) if row[0].startswith("`")]
    assert len(messages) > 30
    for message in messages:
        parts = re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)
        assert any(parts.search(text) for text in said), f"no message of the source is like {message!r}"


def recipe_row(images: int, side: int, classes: int, labels: int, gpu: bool) -> str:
    names, counts = tuple(map(str, range(classes))), (labels,) * classes
    own = OwnImages("photos", {"train": "photos"}, "", images, side, False, names, counts, tests=None)
    value = {each.field: each.value for each in recipe(own, {}, gpu=gpu)}
    batch, epochs = int(value["pretrain.batch_size"]), int(value["pretrain.epochs"])
    supports = " x ".join(value[f"pretrain.support.{name}"] for name in ("classes", "images_per_class"))
    cells = [
        f"{images:,}", side, f"{classes:,} x {labels}", "GPU" if gpu else "CPU", f"`{value['model']}`",
        f"{value['views.large.size']} and {value['views.small.size']}", supports, batch, epochs,
        f"{epochs * (images // batch):,}",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def test_the_table_of_recipes_is_what_would_be_derived() -> None:
    page = (ROOT / "docs/which_recipe.md").read_text(encoding="utf-8").splitlines()
    table = [recipe_row(*situation) for situation in SITUATIONS]
    start = page.index("|--:|--:|--:|---|---|---|--:|--:|--:|--:|") + 1
    assert page[start : start + len(table)] == table, "\n".join(["write instead:", *table])


def test_hours_are_steps_times_the_time_of_one() -> None:
    reckoned = [row for row in rows("how_long.md", 5) if row[2][:1].isdigit()]
    assert len(reckoned) >= 6
    for run, where, steps, milliseconds, hours in reckoned:
        product = int(steps.replace(",", "")) * float(milliseconds) / 3.6e6
        assert float(hours) == pytest.approx(product, abs=0.051), (run, where, product)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere_and_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert "://" in target or (page.parent / target).exists(), target
    for heading_page, anchor in re.findall(r"\]\(([^):]*)#([^)]+)\)", text):
        other = page.parent / heading_page if heading_page else page
        headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert anchor in slugs, anchor
    if page.name == "CHANGELOG.md":
        return
    for module in re.findall(r"python -m paws_hpc\.(\w+)", text):
        assert (ROOT / f"paws_hpc/{module}.py").exists() or (ROOT / f"paws_hpc/{module}/__main__.py").exists(), module
    for command in re.findall(r"(?:`|^    )paws (\w+)", text, re.MULTILINE):
        assert command in COMMANDS, command
