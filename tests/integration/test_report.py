"""The HTML report in a real browser: what a colleague sees who opens the mailed file."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from sklearn.metrics import precision_recall_fscore_support

from paws_hpc.files import sealed_write, write_json
from paws_hpc.report.page import build_report, notices
from paws_hpc.report.run_record import read_run
from paws_hpc.report.tables import result_table
from paws_hpc.stages.attempts import record_failure
from tests.attempts import write_attempt
from tests.browser import CONTRAST, CUT_OFF, Page

DIGITS = [str(digit) for digit in range(10)]
STEPS = 330  # thirty epochs of eleven
PANELS = [
    "loss", "validation-accuracy", "learning-rate", "gradient-norm", "throughput", "confidence", "diagnostics",
    "finetune-sweep", "baseline-sweep", "finetune-curves", "baseline-curves",
    "confusion-paws-nn", "confusion-fine-tuned", "confusion-linear-probe", "confusion-k-nn", "confusion-baseline",
    "by-class", "crops", "pairs-paws-nn", "pairs-fine-tuned", "mistakes", "map", "labelled",
]  # fmt: skip


def write_run(
    run: Path,
    *,
    classes: list[str] | None = None,
    collapsed: bool = False,
    me_max: bool = True,
    entropy_weight: float = 0.0,
) -> Path:
    """Write a run directory as the digits demo leaves it, with made-up but plausible numbers; the same every time."""
    classes, random = classes or DIGITS, np.random.default_rng(0)
    write_json(run / "chain.json", {
        "name": "digits", "created": "2025-11-22T16:53:07+00:00", "commit": "536bd850a1b2c3d4e5f60718293a4b5c6d7e8f90",
        "versions": {"paws_hpc": "0.1.0", "torch": "2.11.0"}, "host_cores": 2, "processor": "Xeon",
        "command": "paws launch pretrain.epochs=30", "submissions": [],
    })  # fmt: skip
    for stage in ("prepare", "pretrain", "finetune", "baseline", "selection"):
        write_attempt(run, stage, how="done", seconds=21.3)
    write_attempt(run, "report", how=None)
    (run / "config.yaml").write_text(
        "seed: 0\ndata:\n  name: digits\npretrain:\n  support:\n    classes: 10\n  # <not a tag>\n"
        f"objective:\n  me_max: {json.dumps(me_max)}\n  entropy_weight: {entropy_weight}\n"
    )
    _jsonl(run / "pretrain" / "metrics.jsonl", _pretrain_rows(random, collapsed, me_max, entropy_weight))
    write_json(
        run / "pretrain" / "summary.json",
        {"collapsed": collapsed, "steps": STEPS, "seconds": 81.3, "device": "NVIDIA H200"},
    )
    digit = Image.fromarray((load_digits().images[0] * 15.9).astype(np.uint8))
    digit.resize((204, 204)).save(run / "pretrain" / "crops.png")
    _gallery(run / "selection", random)
    for rate in (0.01, 0.05, 0.2):
        for epochs in (10, 30):
            _trial(run / "finetune", random, rate, epochs, 0.97 - 0.6 * abs(rate - 0.05) - 0.1 / epochs)
            _trial(run / "baseline", random, rate, epochs, 0.80 - 0.7 * abs(rate - 0.2))
    (run / "finetune" / "lr=0.2,epochs=30" / "result.json").unlink()
    write_json(run / "selected.json", {
        "trial": "lr=0.05,epochs=30", "missing": ["lr=0.2,epochs=30"],
        "baseline": {"trial": "lr=0.2,epochs=30", "missing": []},
    })  # fmt: skip
    accuracies = {"paws_nn": 0.961, "fine_tuned": 0.967, "baseline": 0.80, "linear_probe": 0.93, "k_nn": 0.95}
    settings = {
        "fine_tuned": {"learning_rate": 0.05, "epochs": 30}, "baseline": {"learning_rate": 0.2, "epochs": 30},
        "linear_probe": {"penalty": 0.01}, "k_nn": {"k": 5},
    }  # fmt: skip
    guesses = {method: _guess(random, len(classes), accuracy) for method, accuracy in accuracies.items()}
    save_predictions(run, len(classes), guesses)
    scores = {method: scored(guess, len(classes)) | settings.get(method, {}) for method, guess in guesses.items()}
    write_json(run / "result.json", {
        "labels": 4 * len(classes), "validation_labels": 90, "classes": classes, "seed": 0,
        "test": {"count": 360} | scores, "digests": {"data": "9f2c" * 16, "splits": {"test": "33cc" * 16}},
    })  # fmt: skip
    return run


def _pretrain_rows(
    random: np.random.Generator, collapsed: bool, me_max: bool, entropy_weight: float
) -> list[dict[str, Any]]:
    rows, log_k = [], math.log(10)
    for step in range(STEPS):
        done = step / STEPS
        left, noise = math.exp(-7 * done), random.normal(scale=0.01)
        row = {
            "step": step, "epoch": step / 11,
            "train/loss_consistency": log_k if collapsed else 0.28 + 1.9 * left + noise,
            "train/lr": 2.5 + 2.5 * math.cos(math.pi * done),
            "train/instance_discrimination": 3.3 + 2.2 * left + noise, "train/support_classification": 0.05 + 2 * left,
            "train/confidence": 0.1 if collapsed else 0.95 - 0.8 * left + noise,
            "train/images_per_s": 520 + 1500 * noise, "train/data_wait": 0.04 + abs(noise),
            "train/grad_norm": 0.2 + 3 * left,
        }  # fmt: skip
        if me_max:
            row["train/loss_me_max"] = -log_k if collapsed else -log_k + 0.03 + 0.5 * left
        if done < 1 / 3:
            row["train/loss_support_nce"] = 0.03 + 2.2 * left
        row["train/loss"] = sum(value for name, value in row.items() if name.startswith("train/loss_"))
        if entropy_weight:
            row["train/loss_entropy"] = 2.0 * row["train/loss_consistency"]
            row["train/loss"] += entropy_weight * row["train/loss_entropy"]
        if (step + 1) % 22 == 0:
            row["val/paws_nn_top1"] = 0.962 - 0.6 * left
        rows.append(row)
    if collapsed:
        message = "Collapse: predictions have been uniform over 10 classes: turn on the support warm-up."
        rows.append({"step": STEPS - 1, "epoch": 30, "event": "collapse", "message": message})
    return rows


def _trial(folder: Path, random: np.random.Generator, rate: float, epochs: int, best: float) -> None:
    curve = best - 0.5 * np.exp(-np.arange(1, epochs + 1) / 3) - 0.01 * random.random(epochs)
    trial = folder / f"lr={rate:g},epochs={epochs}"
    _jsonl(
        trial / "metrics.jsonl",
        [{"epoch": epoch, "val/top1": float(value)} for epoch, value in enumerate(curve, start=1)],
    )
    write_json(trial / "result.json", {"validation_accuracy": float(curve.max())})


def _guess(random: np.random.Generator, classes: int, accuracy: float) -> np.ndarray:
    truth = np.arange(360) % classes
    wrong = random.choice(360, size=360 - round(accuracy * 360), replace=False)
    guess = truth.copy()
    guess[wrong] = (truth[wrong] + random.choice([1, 1, 1, 2, 5], size=len(wrong))) % classes
    return guess


def scored(guess: np.ndarray, classes: int) -> dict[str, Any]:
    """What result.json says of predictions for the 360 test images."""
    truth, confusion = np.arange(360) % classes, np.zeros((classes, classes), dtype=int)
    np.add.at(confusion, (truth, guess), 1)
    return {"top1": float((truth == guess).mean()), "top5": None, "confusion": confusion.tolist()}


def save_predictions(run: Path, classes: int, guesses: dict[str, Any]) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, labels=np.arange(360) % classes, **guesses)
    with sealed_write(run / "selection" / "predictions.npz") as file:
        file.write(content.getvalue())


def _gallery(folder: Path, random: np.random.Generator) -> None:
    """Pictures of 32 digits, of which the first is everybody's mistake."""
    folder.mkdir(parents=True)
    sheet = np.hstack([np.vstack(load_digits().images[place : place + 32 : 16]) for place in range(16)])
    Image.fromarray((sheet * 15.9).astype(np.uint8)).convert("RGB").save(folder / "gallery.png")
    pair = {"true": 0, "predicted": 3, "images": 9, "tiles": [0, 10, 20], "probabilities": [0.97, 0.8, 0.55]}
    other = {"true": 0, "predicted": 4, "images": 1, "tiles": [30], "probabilities": [0.6]}
    supports = [{"tile": 3, "class": 3, "similarity": 0.93}, {"tile": 1, "class": 0, "similarity": 0.5}]
    truth = np.arange(200) % 10
    write_json(folder / "gallery.json", {
        "map": {
            "images": 360, "shown": random.random((200, 2)).round(3).tolist(), "true": truth.tolist(),
            "predicted": np.where(np.arange(200) < 9, (truth + 1) % 10, truth).tolist(),
            "labelled": random.random((40, 2)).round(3).tolist(), "labelled_classes": (np.arange(40) % 10).tolist(),
        },
        "pairs": {"paws_nn": [pair], "fine_tuned": [pair, other]},
        "labelled": [{"class": number, "images": 4, "tiles": [number]} for number in range(10)],
        "mistakes": [{"tile": 0, "true": 0, "predicted": 3, "probability": 0.97, "supports": supports}],
        "tile_pixels": 8, "columns": 16,
    })  # fmt: skip


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def kill(run: Path) -> Path:
    """Leave of a run what SIGKILL leaves in the middle of pretraining: a torn last line and nothing after it."""
    for name in ("finetune", "baseline", "selection"):
        shutil.rmtree(run / name)
    for name in ("result.json", "selected.json", "pretrain/summary.json", "pretrain/crops.png"):
        (run / name).unlink()
    metrics = run / "pretrain" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[: metrics.stat().st_size // 2 - 7])
    (run / "jobs/pretrain/end-0001.json").unlink()
    for stage in ("finetune", "baseline", "selection", "report"):
        shutil.rmtree(run / "jobs" / stage)
    return run


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(write_run(tmp_path_factory.mktemp("run")))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_panel_is_drawn_and_readable(page: Page, report: Path, scheme: str, width: int) -> None:
    page.open(report, scheme=scheme, width=width)
    for name in PANELS:
        picture = page.picture(f"#panel-{name}")
        assert picture.shape[0] > 100, name
        assert picture.shape[1] > 250, name
        # An empty frame has hardly any contrast inside; strokes and letters do.
        assert np.ptp(picture[8:-8, 8:-8]) > 100, name
    assert page.count(".panel") == len(PANELS)
    assert page.count(".absent") == 0
    assert page.script("return document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    contrasts = page.script(CONTRAST)
    assert len(contrasts) > 300
    assert min(contrasts)[0] >= 4.5, f"WCAG AA: {min(contrasts)}"
    own, *others = page.requests()
    assert own == report.as_uri()
    assert all(url.startswith("data:image/png;base64,") for url in others), others
    assert page.complaints() == []


def test_says_in_words_what_it_shows(page: Page, report: Path) -> None:
    page.open(report)
    texts = page.script(
        "return [...document.querySelectorAll('svg, img, .tile')].map(e => e.getAttribute('aria-label') || e.alt)"
    )
    assert min(len(text) for text in texts) > 20
    assert page.script("return [...document.querySelectorAll('table')].every(t => t.caption.textContent.trim() !== '')")
    assert page.script(
        "return [...document.querySelectorAll('figure')].every(f => f.querySelector('figcaption, caption') !== null)"
    )
    ids = page.script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    label = page.label("#panel-validation-accuracy svg")
    assert re.search(r"PAWS-NN goes from \d\d\.\d % to 96\.1 % at epoch 29\.", label)


def test_the_page_and_the_terminal_show_the_same_numbers(page: Page, report: Path) -> None:
    page.open(report)
    shown = page.text("#result")
    assert "Accuracy on 360 test images from 40 labels and 90 for validation" in shown
    table = result_table(read_run(report.parent.parent))
    assert dict(table)["PAWS-NN"] == "96.1 % (95 % interval 93.6\N{EN DASH}97.7 %)"
    assert [name for name, _ in table] == [
        "labels", "labels for validation", "test images",
        "PAWS-NN", "fine-tuned (lr 0.05, epochs 30)", "linear probe (penalty 0.01)", "k-NN (k 5)",
        "baseline (lr 0.2, epochs 30)",
        "stage prepare", "stage pretrain", "stage finetune", "stage baseline", "stage selection", "stage calibrate",
    ]  # fmt: skip
    for name, value in table:
        for part in filter(
            None, re.split(r"^stage |^labels (?=for)| \(|\)", name) + re.split(r" \(95 % interval |\)", value)
        ):
            assert part in shown, (name, part)


def test_the_sweep_marks_the_winner_and_the_trial_that_failed(page: Page, report: Path) -> None:
    page.open(report)
    assert page.text("#panel-finetune-sweep td.chosen") == "96.6 %chosen"
    assert page.text("#panel-finetune-sweep td.missing") == "no result"
    assert page.text("#warnings .alarm strong") == "Fine-tuning: 1 trial has no result"
    assert "Missing: lr=0.2,epochs=30." in page.text("#warnings .alarm p")
    label = page.label("#panel-finetune-curves svg")
    assert label.endswith(
        "6 trials, one line each. The strong line is the winner: lr 0.05, epochs 30, 96.6 % at its best."
    )


def without_winner(run: Path, *, stages: list[str]) -> Path:
    """Leave of a sweep for fine-tuning what a run without it has: names of trials, and no winner."""
    shutil.rmtree(run / "finetune")
    selected = json.loads((run / "selected.json").read_text())
    missing = [f"lr={rate:g},epochs=10" for rate in (0.01, 0.05)]
    write_json(run / "selected.json", {"missing": missing, "baseline": selected["baseline"]})
    with (run / "config.yaml").open("a") as config:
        config.write(f"stages: [{', '.join(stages)}]\n")
    return run


def test_a_sweep_without_any_result_has_no_winner_and_one_that_was_not_launched_lacks_nothing(tmp_path: Path) -> None:
    other = ["prepare", "pretrain", "baseline", "selection", "report"]
    assert notices(read_run(without_winner(write_run(tmp_path / "other"), stages=other))) == []
    (notice,) = notices(read_run(without_winner(write_run(tmp_path), stages=["finetune", "selection"])))
    assert (notice.level, notice.title) == ("alarm", "Fine-tuning: 2 trials have no result")
    assert notice.text == (
        "None had one when selection chose, so the result has no score of it. Missing: lr=0.01,epochs=10; "
        "lr=0.05,epochs=10."
    )


def test_a_mistake_stands_beside_the_labelled_images_that_explain_it(page: Page, report: Path) -> None:
    page.open(report)
    assert page.text("#panel-pairs-paws-nn .pair") == "0 taken for 3: 9, first of them"
    assert page.texts("#panel-pairs-paws-nn .tiles .setting") == ["97.0 %", "80.0 %", "55.0 %"], "the surest first"
    assert page.text("#panel-mistakes li") == "0, taken for 3probability 97.0 % 3 0.93 0 0.50"
    assert page.text("#panel-mistakes .same") == "0", "of the true class"
    assert page.count("#panel-map .wrong") == 9
    assert page.count("#panel-map .labelled") == 40
    label = page.label("#panel-map svg")
    assert label == "Map of the test images: 200 images of 10 classes, 9 of them mistaken."


def test_every_class_of_the_map_has_a_colour_and_every_mark_its_names(page: Page, report: Path, tmp_path: Path) -> None:
    page.open(report)
    fills = page.script("return [...document.querySelectorAll('#panel-map .right')].map(e => getComputedStyle(e).fill)")
    assert len(set(fills)) == 10
    titles = page.texts("#panel-map .wrong title")
    assert titles[0] == "0, taken for 1"
    assert page.text("#panel-map .right title") == "9"
    assert "Colours are true classes. Circles" in page.text("#panel-map figcaption")
    page.open(build_report(write_run(tmp_path / "14", classes=[f"species {k}" for k in range(14)])))
    assert "they repeat after 10" in page.text("#panel-map figcaption")


def test_many_classes_have_one_colour_and_their_most_confused_pairs(page: Page, tmp_path: Path) -> None:
    page.open(build_report(write_run(tmp_path, classes=[f"species {k}" for k in range(40)])))
    assert "All have one colour" in page.text("#panel-map figcaption")
    counts = [int(images) for images in page.texts("#panel-confusion-baseline td:nth-child(3)")]
    assert len(counts) == 15
    assert counts == sorted(counts, reverse=True)


def test_a_report_without_pictures_or_before_the_result_says_so(page: Page, tmp_path: Path) -> None:
    run = write_run(tmp_path / "before")
    shutil.rmtree(run / "selection")
    page.open(build_report(run))
    for panel in ("#panel-mistakes", "#panel-map"):
        assert "there were no test images, or an older version scored them" in page.text(panel)
    assert page.text("#result .big") == "96.1 %"
    # Selection writes the pictures first; nothing is wrong with them, and nobody must remove them.
    run = write_run(tmp_path / "between")
    (run / "result.json").unlink()
    page.open(build_report(run))
    for panel in ("#panel-mistakes", "#panel-map"):
        assert "selection has not finished" in page.text(panel)
    assert "This run is unfinished" in page.text("#warnings")


def test_pictures_that_do_not_fit_the_result_are_refused_and_a_torn_sheet_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    index = run / "selection" / "gallery.json"
    fitting = json.loads(index.read_text())
    mistakes = [{**fitting["mistakes"][0], "tile": 99}]
    for wrong in ({**fitting, "mistakes": mistakes}, {}, []):
        write_json(index, wrong)
        with pytest.raises(ValueError, match=r"selection: gallery\.json does not fit gallery\.png .*Remove both"):
            build_report(run)
    sheet = run / "selection" / "gallery.png"
    whole = sheet.read_bytes()
    for torn in (whole[: len(whole) // 2], b"no picture"):
        sheet.write_bytes(torn)
        with pytest.raises(
            ValueError, match=r"selection/gallery\.png is not a whole PNG file .*Restore it, or remove it"
        ):
            build_report(run)


def test_a_collapsed_run_says_so_before_any_number(page: Page, tmp_path: Path) -> None:
    page.open(build_report(write_run(tmp_path, collapsed=True)))
    assert page.text("main > :first-child .alarm strong") == "Collapse at step 329"
    assert page.text("#warnings .alarm p") == (
        "predictions have been uniform over 10 classes: turn on the support warm-up."
    )
    assert page.script("return document.querySelector('#warnings').getBoundingClientRect().bottom < innerHeight")
    assert page.text("#panel-loss svg").count("collapse") == 1


def test_the_loss_is_drawn_with_the_terms_that_it_has(page: Page, tmp_path: Path) -> None:
    page.open(build_report(write_run(tmp_path, me_max=False)))
    rows = [json.loads(line) for line in (tmp_path / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    first, last = rows[0]["train/loss"], rows[-1]["train/loss"]
    label = page.label("#panel-loss svg")
    assert label.startswith(f"Loss against step: loss goes from {first:.4g} to {last:.4g} at step 329 ")
    assert "me-max" not in label
    assert page.script(
        "return [...document.querySelectorAll('#panel-loss svg text')].map(e => e.textContent)"
        ".filter(text => /[a-z]/.test(text))"
    ) == ["step", "log K", "loss", "consistency", "support NCE"]
    caption = page.text("#panel-loss figcaption")
    assert caption.endswith("A collapsed run stays at consistency = log K.")
    page.open(build_report(write_run(tmp_path / "entropy", entropy_weight=0.1)))
    assert "entropy goes from" in page.label("#panel-loss svg")
    caption = page.text("#panel-loss figcaption")
    assert "Entropy is the mean of single predictions (D.2)" in caption
    assert caption.endswith("stays at consistency = log K and me-max = -log K and entropy = log K.")


def test_a_killed_run_is_shown_as_far_as_it_got(page: Page, tmp_path: Path) -> None:
    page.open(build_report(kill(write_run(tmp_path))))
    warnings = page.text("#warnings")
    assert "This run is unfinished" in warnings
    assert "The last line of pretrain/metrics.jsonl is incomplete" in warnings
    assert page.script("return document.querySelector('#panel-loss svg') !== null")
    assert page.text("#panel-finetune-sweep .absent") == (
        "No trials in finetune/. Stage finetune writes them; its state is: pending."
    )
    assert "Stage selection writes it; its state is: pending" in page.text("#panel-confusion")
    assert "Stage pretrain writes it; its state is: running" in page.text("#panel-crops")
    assert "seed 0" in page.text("header"), "known from the frozen config"
    assert "PAWS-NN" in dict(result_table(read_run(tmp_path)))
    assert page.complaints() == []


def test_a_failed_stage_says_why_and_where_its_log_is_if_there_is_one(page: Page, tmp_path: Path) -> None:
    run = kill(write_run(tmp_path))
    folder = write_attempt(run, "finetune/lr=0.1,epochs=2", how="failed", job_id="17")
    record_failure(folder, "17-0", 1, RuntimeError("connection closed"), permanent=False)
    record_failure(folder, "17-0", 0, ValueError("<the disk> is full"), permanent=True)
    for number, said in ((0, "0.0"), (1, "9.9")):  # rank 1 failed first
        failure = folder / f"failure-17-0-rank{1 - number}.json"
        write_json(failure, json.loads(failure.read_text()) | {"time": said[0]})
    write_attempt(run, "baseline/lr=0.2,epochs=2", how="crashed")
    page.open(build_report(run))
    alarms = dict(zip(page.texts("#warnings .alarm strong"), page.texts("#warnings .alarm p"), strict=True))
    assert alarms["Stage finetune failed"] == "finetune/lr=0.1,epochs=2: RuntimeError: connection closed"
    assert alarms["Stage baseline failed"] == "baseline/lr=0.2,epochs=2: It left no message."
    log = run / "logs" / "finetune" / "17_1_log.out"
    log.parent.mkdir(parents=True)
    log.write_text("connection closed")
    page.open(build_report(run))
    assert "connection closed Its log: logs/finetune/17_1_log.out." in page.text("#warnings")


def test_contents_lead_to_every_section_and_stand_at_the_side_of_a_wide_page(page: Page, report: Path) -> None:
    page.open(report)
    assert page.texts(".contents a") == page.texts("h2")
    assert page.count("h2") > 6
    targets = "[...document.querySelectorAll('.contents a')].map(a => document.querySelector(a.getAttribute('href')))"
    assert page.script(f"return {targets}.every(section => section !== null && section.querySelector('h2') !== null)")
    place = "const [nav, main] = ['.contents', 'main'].map(s => document.querySelector(s).getBoundingClientRect());"
    assert page.script(f"{place} return nav.right < main.left")
    page.script("scrollTo(0, 3000)")
    assert page.script(f"{place} return nav.top >= 0 && nav.bottom <= innerHeight"), "it stays in sight"
    page.open(report, width=390)
    assert page.script(f"{place} return nav.bottom < main.top")


def test_each_word_of_the_glossary_is_explained_once_where_it_first_stands(page: Page, report: Path) -> None:
    page.open(report)
    explained = page.texts(".words dt")
    assert len(explained) == len(set(explained)) > 12
    assert {"PAWS-NN", "baseline", "k-NN", "top-1"} <= set(page.texts("#result .words dt"))
    assert {"me-max", "target"} <= set(page.texts("#pretraining .words dt"))
    source = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text()
    meanings = page.texts(".words dd")
    assert all(meaning in source.replace("`", "") for meaning in meanings), "there is no second list"
    assert page.script("return document.querySelector('#result .words').open") is False
    assert "collapse" not in explained, "it stands nowhere on this page"


def test_the_page_says_by_which_command_and_on_what_the_run_was_made(page: Page, report: Path) -> None:
    page.open(report)
    assert page.text("header code") == "paws launch pretrain.epochs=30"
    rows = page.script(
        "return [...document.querySelectorAll('.facts tr')].map(row => [...row.cells].map(c => c.innerText))"
    )
    facts = dict(rows)
    assert facts["commit"].startswith("536bd850a1b2")
    assert (facts["launched on"], facts["trained on"], facts["torch"]) == ("Xeon, 2 cores", "NVIDIA H200", "2.11.0")


def test_figures_by_class_are_those_of_the_selected_network(page: Page, report: Path) -> None:
    page.open(report)
    result = json.loads((report.parents[1] / "result.json").read_text())
    with np.load(report.parents[1] / "selection" / "predictions.npz") as file:
        expected = precision_recall_fscore_support(file["labels"], file["fine_tuned"])
    rows = page.script(
        "return [...document.querySelectorAll('#panel-by-class tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    shown = {name: values for name, *values, _ in rows}
    for number, name in enumerate(result["classes"]):
        precision, recall, f1, images = (column[number] for column in expected)
        assert shown[name] == [f"{images}", *(f"{100 * value:.1f} %" for value in (precision, recall, f1))]
    assert [float(row[4].split()[0]) for row in rows] == sorted(float(row[4].split()[0]) for row in rows)


def test_labelled_images_are_shown_by_class(page: Page, report: Path) -> None:
    page.open(report)
    assert page.texts("#panel-labelled dt") == [f"{digit} 4" for digit in DIGITS]
    assert page.count("#panel-labelled .tile") == 10
    picture = page.picture("#panel-labelled .tile")
    expected = Image.fromarray((load_digits().images[0] * 15.9).astype(np.uint8)).resize(
        (48, 48), Image.Resampling.NEAREST
    )
    assert np.abs(picture[2:-2, 2:-2].astype(int) - np.asarray(expected)[2:-2, 2:-2]).mean() < 2, "its own picture"


def test_a_sheet_of_photographs_keeps_the_page_small(page: Page, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    photograph = Image.fromarray(load_sample_image("flower.jpg")).resize((16 * 48, 20 * 48))
    photograph.save(run / "selection" / "gallery.png")
    index = run / "selection" / "gallery.json"
    write_json(index, json.loads(index.read_text()) | {"tile_pixels": 48})
    path = build_report(run)
    assert (run / "selection" / "gallery.png").stat().st_size > 600_000
    assert path.stat().st_size < 450_000
    page.open(path)
    assert any(url.startswith("data:image/webp") for url in page.requests())
    assert page.complaints() == []


def test_folds_of_a_cross_validation_are_thin_lines_below_their_mean(page: Page, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    page.open(build_report(run))
    before = page.count("#panel-finetune-curves svg path")
    for number in (1, 2):
        rows = [{"epoch": epoch, "val/top1": 0.8 + 0.01 * number} for epoch in (10, 20, 30)]
        _jsonl(run / f"finetune/lr=0.05,epochs=30/fold-{number}/metrics.jsonl", rows)
    page.open(build_report(run))
    caption = page.text("#panel-finetune-curves figcaption")
    assert caption.endswith("It is the mean of 2 folds, the thin lines, each scored on the labels it left out.")
    assert "6 trials, one line each" in caption
    assert page.count("#panel-finetune-curves svg path") == before + 2


def test_an_empty_run_directory_still_gives_a_page(page: Page, tmp_path: Path) -> None:
    page.open(build_report(tmp_path))
    assert page.count(".panel.missing") == 13
    assert "No values of val/paws_nn_top1 in pretrain/metrics.jsonl" in page.text("#panel-validation-accuracy")
    assert page.script("return document.documentElement.scrollWidth <= innerWidth")


def test_names_are_text_and_never_markup(page: Page, tmp_path: Path) -> None:
    classes = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "$\\frac{1}$", "猫", *DIGITS[4:]]
    run = write_run(tmp_path, classes=classes)
    chain = json.loads((run / "chain.json").read_text())
    write_json(run / "chain.json", chain | {"name": "<b>run</b> & more"})
    page.open(build_report(run))
    assert page.script("return document.scripts.length") == 0
    assert page.script("return [...document.images].every(image => image.src.startsWith('data:image/png'))")
    alts = page.script("return [...document.querySelectorAll('#panel-pairs-paws-nn .tile')].map(e => e.ariaLabel)")
    assert alts[0] == f"Test image of class {classes[0]}, taken for {classes[3]}"
    assert page.text("h1") == "<b>run</b> & more"
    names = page.texts("#panel-confusion-baseline tbody th")
    assert names == classes
    assert "# <not a tag>" in page.text("#config pre")
    assert page.complaints() == []


def test_print_shows_the_configuration_and_light_colours(page: Page, report: Path) -> None:
    page.open_as_printed(report)
    assert page.script("return getComputedStyle(document.documentElement).getPropertyValue('--card')") == "#ffffff"
    assert page.script("return document.querySelector('#config pre').getBoundingClientRect().height") > 50
    assert page.script(CUT_OFF) == []
    assert min(page.script(CONTRAST))[0] >= 4.5


def test_the_same_run_gives_the_same_bytes(report: Path, tmp_path: Path) -> None:
    again = build_report(write_run(tmp_path))
    assert again.read_bytes() == report.read_bytes()
    assert build_report(tmp_path).read_bytes() == report.read_bytes(), "a second report must not see the first"


def test_a_garbled_run_is_refused_and_keeps_its_earlier_report(tmp_path: Path) -> None:
    earlier = build_report(write_run(tmp_path)).read_bytes()
    metrics = tmp_path / "pretrain" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([*lines[:4], lines[4][:20] + "\n", *lines[5:]]))
    with pytest.raises(ValueError, match=r"pretrain/metrics\.jsonl, line 5 is not JSON"):
        build_report(tmp_path)
    assert (tmp_path / "report" / "index.html").read_bytes() == earlier
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["index.html"]


@pytest.mark.parametrize("nodes", [2, 40])
def test_a_run_on_gpus_shows_each_node(page: Page, tmp_path: Path, nodes: int) -> None:
    run = write_run(tmp_path)
    path = run / "pretrain" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        for node in range(nodes):
            row[f"gpu/node{node}/utilisation"] = 0.5 if node == 1 else 0.9
            row[f"gpu/node{node}/memory_gb"] = 60.0 + node
    _jsonl(path, rows)
    page.open(build_report(run))
    assert np.ptp(page.picture("#panel-gpus-by-node")[8:-8, 8:-8]) > 100
    label = page.label("#panel-gpus-by-node svg")
    assert "GPUs by node against step: utilisation on average: from 50.0 % (node 1) to 90.0 % (node 0)" in label
    assert f"memory (GB) on average: from 60.0 (node 0) to {59 + nodes:.1f} (node {nodes - 1})" in label
    legend = page.text("#panel-gpus-by-node svg").count("node 1")
    assert legend == (2 if nodes == 2 else 0), "of many nodes none has a colour of its own"
    assert min(page.script(CONTRAST))[0] >= 4.5
