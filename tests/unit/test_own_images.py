"""A folder of own images: which shapes are understood, what is derived from them, and what is refused."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from paws_hpc import own_images
from paws_hpc.cluster.chain import check_begun
from paws_hpc.cluster.compose import compose_run, derivation, parameters_of, runs_of
from paws_hpc.cluster.frozen import freeze
from paws_hpc.cluster.preflight import preflight_checks
from paws_hpc.own_images import OwnImages, recipe
from paws_hpc.packing import SourceConfig, open_source
from paws_hpc.stages.prepare import packed_from
from paws_hpc.stages.run_folder import RunFolder, mark_done
from paws_hpc.store.format import StoreError
from tests.photographs import FOLDERS
from tests.photographs import make as make_photographs
from tests.pictures import tile, write_tiles


def flat(root: Path, count: int = 12) -> Path:
    root.mkdir(parents=True)
    for number in range(count):
        tile(5 * number, 40, 100, 80, photo=number % 2).save(root / f"{number:02d}.jpg")
    return root


def own(**changes: object) -> OwnImages:
    fields = {"name": "x", "folders": {}, "digest": "", "images": 1000, "side": 300, "grey": False}
    fields |= {"classes": ("a", "b", "c", "d"), "counts": (4,) * 4, "tests": None}
    return OwnImages(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and shards go to a folder beside the images."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    forget()


def forget() -> None:
    """A process lists a folder once."""
    derivation.cache_clear()
    own_images._listed.cache_clear()


def test_train_and_test_with_a_folder_per_class(tmp_path: Path) -> None:
    write_tiles(tmp_path / "photos/train", 24, classes=("cat", "dog"))
    write_tiles(tmp_path / "photos/test", 6, classes=("cat", "dog"))
    config, _ = compose_run([f"data.root={tmp_path}/photos", "labels.per_class=3", "seed=5"])
    assert config.data.folders == {name: f"{tmp_path}/photos/{name}" for name in ("train", "test")}
    assert config.data.train.startswith("shards/photos-")
    assert config.data.test == config.data.train.replace("/train", "/test")
    assert (config.name, config.data.classes, config.data.labelled) == ("photos-seed5", 2, None)
    assert (config.labels.per_class, config.labels.all, config.labels.validated) == (3, False, False)
    assert (config.pretrain.support.classes, config.pretrain.support.images_per_class) == (2, 3)


def test_the_doctor_says_that_the_images_are_packed_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_tiles(tmp_path / "photos", 24, classes=("cat", "dog"))
    monkeypatch.setenv("PATH", "")  # no Slurm here
    config, parameters = parameters_of([f"data.root={root}", "hydra/launcher=submitit_slurm"])
    checks = {check.name: check for check in preflight_checks(config, parameters, RunFolder(tmp_path / "run"))}
    assert checks["data.train"].verdict == "ok"
    assert checks["data.train"].found.endswith(f"the stage prepare packs it from {root}")


def test_the_doctor_finds_a_file_system_without_locks_and_leaves_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object) -> bool:
        raise OSError(errno.ENOSYS, "Function not implemented")  # as Lustre without the mount option says

    monkeypatch.setenv("PATH", "")  # no Slurm here
    config, parameters = parameters_of(["hydra/launcher=submitit_slurm"])
    (tmp_path / "runs").mkdir()

    def found() -> tuple[str, str]:
        checks = preflight_checks(config, parameters, RunFolder(tmp_path / "runs" / "run"))
        return next((check.verdict, check.found) for check in checks if check.name == "run directory")

    assert found() == ("ok", f"{tmp_path / 'runs' / 'run'} can be written and locked here")
    monkeypatch.setattr("paws_hpc.cluster.preflight.try_lock", refuse)
    assert found() == ("problem", f"{tmp_path / 'runs'} cannot be written or locked: Function not implemented")
    assert not list((tmp_path / "runs").iterdir())


def test_one_folder_per_class_has_no_test_images_and_the_store_is_named_after_its_content(tmp_path: Path) -> None:
    root = write_tiles(tmp_path / "photos", 24, classes=("cat", "dog"))
    before, _ = compose_run([f"data.root={root}"])
    assert before.data.test is None
    assert before.labels.all
    (root / "cat/000.jpg").unlink()
    forget()
    assert compose_run([f"data.root={root}"])[0].data.train != before.data.train


def test_other_images_under_a_finished_run_are_refused_before_they_are_packed(tmp_path: Path) -> None:
    root = write_tiles(tmp_path / "photos", 24, classes=("cat", "dog"))
    config, _ = compose_run([f"data.root={root}"])
    run = RunFolder(tmp_path / "run")
    run.prepare.mkdir(parents=True)
    freeze(config, run.config)
    mark_done(run.prepare, digests={"train": "of the images then"})
    run.result.write_text("{}")
    check_begun(config, run)  # its store is packed again, and compared then
    (root / "cat/000.jpg").rename(root / "cat/other.jpg")
    forget()
    other, _ = compose_run([f"data.root={root}"])
    with pytest.raises(ValueError, match=r"begun with other images.*accept_changes=\[digest\.train\]"):
        check_begun(other, run)
    check_begun(replace(other, accept_changes=["digest.train"]), run)
    assert not Path("shards").exists()


def test_a_flat_folder_and_a_list_with_a_heading_blanks_and_a_byte_order_mark(tmp_path: Path) -> None:
    root, labels = flat(tmp_path / "photos"), tmp_path / "labels.csv"
    lines = ["file,label", "00.jpg,great white shark", '01.jpg,"egret, great"', "02.jpg,great white shark"]
    lines += ['03.jpg,"egret, great"']
    labels.write_text("\n".join(lines), encoding="utf-8-sig")
    config, _ = compose_run([f"data.root={root}", f"data.labels={labels}"])
    source = open_source(packed_from(config.data, "labelled"))
    assert source.classes == ("egret, great", "great white shark")
    assert list(zip(source.keys, source.labels.tolist(), strict=True)) == [
        ("00.jpg", 1), ("01.jpg", 0), ("02.jpg", 1), ("03.jpg", 0),
    ]  # fmt: skip
    everything = open_source(packed_from(config.data, "train"))
    assert len(everything.keys) == 12
    assert everything.classes == ("unlabelled",)
    assert config.data.classes == 2


def test_unlabelled_images_beside_a_folder_of_classes(tmp_path: Path) -> None:
    labelled = write_tiles(tmp_path / "labelled", 8, classes=("cat", "dog"))
    config, _ = compose_run([f"data.unlabelled={flat(tmp_path / 'all')}", f"data.labelled={labelled}"])
    assert config.data.folders == {"train": f"{tmp_path}/all", "labelled": str(labelled)}
    assert config.data.labelled == config.data.train.replace("/train", "/labelled")
    assert config.name == "all-seed0"


def test_every_derived_value_can_be_given_and_what_depends_on_it_follows(tmp_path: Path) -> None:
    root = write_tiles(tmp_path / "photos", 24, classes=("cat", "dog"))
    given = [f"data.root={root}", "views.large.size=32", "pretrain.batch_size=8", "name=mine", "optimizer.peak_lr=0.2"]
    config, _ = compose_run(given)
    assert (config.views.large.size, config.views.small.size, config.finetune.crop.size) == (32, 16, 32)
    assert (config.pretrain.batch_size, config.name, config.optimizer.peak_lr) == (8, "mine", 0.2)
    assert {"views.large.size", "pretrain.batch_size"}.isdisjoint(each.field for each in derivation(tuple(given))[2])


def test_runs_of_a_sweep_are_named_after_the_folder_and_what_is_swept(tmp_path: Path) -> None:
    root = write_tiles(tmp_path / "photos", 24, classes=("cat", "dog"))
    runs = runs_of([f"data.root={root}", "seed=1,2", "objective.me_max=true,false"])
    names = [compose_run(overrides)[0].name for overrides in runs]
    assert names == [f"photos-seed{seed}-me_max={me_max}" for seed in (1, 2) for me_max in (True, False)]


def test_a_named_experiment_means_what_its_file_says(tmp_path: Path) -> None:
    root = write_tiles(tmp_path / "photos", 24, classes=("cat", "dog"))
    config, _ = compose_run([f"data.root={root}", "experiment=digits"])
    plain, _ = compose_run(["experiment=digits"])
    assert (config.views, config.pretrain, config.finetune) == (plain.views, plain.pretrain, plain.finetune)
    assert config.data.folders == {"train": str(root)}


def test_the_recipe_follows_images_sizes_and_labels() -> None:
    def of(*, gpu: bool = False, given: dict[str, object] | None = None, **changes: object) -> dict[str, str]:
        return {each.field: each.value for each in recipe(own(**changes), given or {}, gpu=gpu)}

    few, many = of(), of(counts=(50,) * 4)
    assert few["labels.validation_per_class"] == "null"
    assert many["labels.validation_per_class"] == "10"
    assert (few["views.large.size"], of(side=30)["views.large.size"], of(gpu=True)["views.large.size"]) == (
        "48", "32", "224",
    )  # fmt: skip
    assert (few["model"], of(gpu=True)["model"], of(gpu=True, side=80)["model"]) == (
        "small_resnet", "resnet18", "wrn28_2",
    )  # fmt: skip
    one = {"labels.per_class": 1, "labels.validation_per_class": 2}
    assert of(given=one)["optimizer"] == "lars_small"
    assert "optimizer" not in few
    assert of(images=40)["pretrain.batch_size"] == "10"
    assert int(of(images=100_000)["pretrain.epochs"]) < int(few["pretrain.epochs"])
    assert "views.augment" in of(grey=True)


def test_sizes_divide_by_the_ranks(tmp_path: Path) -> None:
    root = write_tiles(tmp_path / "photos", 60, classes=("cat", "dog"))
    given = [f"data.root={root}", "hydra/launcher=slurm_8gpu", "pretrain.accumulate_steps=2"]
    config, _ = parameters_of(given)
    assert config.resources["pretrain"].ranks == 8
    assert config.pretrain.batch_size == 16
    assert (config.pretrain.support.classes, config.pretrain.support.images_per_class) == (2, 24)


def test_given_values_of_the_data_stay(tmp_path: Path) -> None:
    write_tiles(tmp_path / "photos/train", 24, classes=("cat", "dog"))
    for name in ("test", "val"):
        write_tiles(tmp_path / f"photos/{name}", 6, classes=("cat", "dog"))
    root = f"data.root={tmp_path}/photos"
    config, _ = compose_run([root, "data.test=null", "data.name=mine"])
    assert (config.data.test, config.name) == (None, "mine-seed0")
    assert "test" not in config.data.folders
    (reason,) = (each.reason for each in derivation((root,))[2] if each.field == "data.classes")
    assert reason == "cat, dog; 6 test images in test; val is not used"


def test_listed_validation_images_take_the_place_of_those_held_out(tmp_path: Path) -> None:
    root = write_tiles(tmp_path / "photos", 60, classes=("cat", "dog"))
    config, _ = compose_run([f"data.root={root}", "labels.validation_file=list.txt"])
    assert (config.labels.validation_per_class, config.labels.validation_file) == (None, "list.txt")
    config, _ = compose_run([f"data.root={root}", "labels.validation_per_class=null"])
    assert not config.labels.validated
    assert config.pretrain.support.images_per_class == 30, "all labels, as nothing is held out"


def test_labels_of_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.labels=labels\.csv has no effect\. Give data\.root=FOLDER"):
        compose_run(["data.labels=labels.csv"])


def nested(root: Path) -> list[str]:
    write_tiles(root / "animals", 8, classes=("cat", "dog"))
    write_tiles(root / "plants", 8, classes=("oak", "fir"))
    return []


def one_class(root: Path) -> list[str]:
    write_tiles(root, 8, classes=("cat",))
    return []


def empty_class(root: Path) -> list[str]:
    write_tiles(root, 8, classes=("cat", "dog"))
    (root / "cow").mkdir()
    return []


def loose(root: Path) -> list[str]:
    write_tiles(root, 8, classes=("cat", "dog"))
    tile(0, 0, 50, 50).save(root / "one.jpg")
    return []


def only_loose(root: Path) -> list[str]:
    flat(root)
    return []


def other_test_classes(root: Path) -> list[str]:
    write_tiles(root / "train", 8, classes=("cat", "dog"))
    write_tiles(root / "test", 8, classes=("cat", "cow"))
    return []


def unknown_file(root: Path) -> list[str]:
    flat(root)
    (root / "labels.csv").write_text("file,label\n00.jpg,cat\n99.jpg,dog\n")
    return [f"data.labels={root}/labels.csv"]


def latin_1(root: Path) -> list[str]:
    flat(root)
    (root / "labels.csv").write_text("00.jpg,kätzchen\n01.jpg,hund\n", encoding="latin-1")
    return [f"data.labels={root}/labels.csv"]


def inside(root: Path) -> list[str]:
    write_tiles(root.parent / "here", 8, classes=("cat", "dog"))
    root.symlink_to(root.parent / "here")
    return []


def split_below(root: Path) -> list[str]:
    for name in ("x", "y"):
        write_tiles(root / name / "train", 8, classes=("cat", "dog"))
    return []


def misspelt_first_line(root: Path) -> list[str]:
    flat(root)
    (root / "labels.csv").write_text("0.jpg,cat\n01.jpg,dog\n02.jpg,cat\n")
    return [f"data.labels={root}/labels.csv"]


def empty_list(root: Path) -> list[str]:
    flat(root)
    (root / "labels.csv").write_text("\n")
    return [f"data.labels={root}/labels.csv"]


def refused(*more: str) -> Callable[[Path], list[str]]:
    """Two classes of twelve images, and these overrides."""

    def make(root: Path) -> list[str]:
        write_tiles(root, 24, classes=("cat", "dog"))
        return list(more)

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nested, "animals has no images but the folders cat, dog. If animals is what holds"),
        (one_class, "has images of one class only (cat)"),
        (empty_class, "cow has no images"),
        (loose, "has 2 folders and 1 images beside them"),
        (only_loose, "has 12 images and no folder per class. Say which images are what: data.labels=FILE"),
        (other_test_classes, "photos/test has 2 classes, ['cat', 'cow'] …, but "),
        (unknown_file, "has a label for '99.jpg', but"),
        (latin_1, "labels.csv cannot be read"),
        (inside, "inside itself. Launch elsewhere"),
        (split_below, "x has no images but the folders train. If x is what holds the classes, name it"),
        (misspelt_first_line, "has a label for '0.jpg', but"),
        (empty_list, "labels.csv has no lines '<image>,<class>'"),
        (refused("data.train=store"), "and data.train=store: give one of them"),
        (refused("data.source=digits"), "and data.source=digits: give one of them"),
        (refused("labels=four_per_class"), "labels=four_per_class is for stores"),
        (refused("labels.file=f"), "labels.file=f is for stores. Of own images give labels.per_class=N"),
        (refused("labels.per_class=four"), "labels.per_class=four must be a whole number, at least 1"),
        (refused("labels.per_class=20"), "labels.per_class=20 need 20 labels of each class, but class 'cat' has 12"),
        (
            refused("labels.per_class=2", "labels.validation_per_class=11"),
            "labels.per_class=2 and labels.validation_per_class=11 need 13 labels of each class, but",
        ),
        (refused("labels.per_class=1"), "Cross-validation needs two labels of each class, but labels.per_class=1"),
        (refused("pretrain.batch_size=0"), "pretrain.batch_size=0 must be a whole number, at least 1"),
        (refused("pretrain.batch_size=null"), "pretrain.batch_size=null must be given"),
        (refused("pretrain.support.classes=0"), "pretrain.support.classes=0 must be a whole number, at least 1"),
        (refused("views.large.size=big"), "views.large.size=big must be a whole number, at least 1"),
    ],
)
def test_another_shape_is_refused_in_one_line_before_anything_is_packed(
    make: object, message: str, tmp_path: Path
) -> None:
    root = tmp_path / "photos"
    more = make(root)  # type: ignore[operator]
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        compose_run([f"data.root={root}", *more])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "here/shards").exists()


def test_train_and_test_are_no_classes(tmp_path: Path) -> None:
    write_tiles(tmp_path / "photos/train", 8, classes=("cat", "dog"))
    write_tiles(tmp_path / "photos/test", 8, classes=("cat", "dog"))
    with pytest.raises(StoreError, match=r"has test/ and train/, which are no classes"):
        open_source(SourceConfig("folder", str(tmp_path / "photos")))


def test_hidden_folders_and_thumbnails_in_a_class_are_passed_over(tmp_path: Path) -> None:
    root = write_tiles(tmp_path / "photos", 8, classes=("cat", "dog"))
    for folder in (root / "cat/.ipynb_checkpoints", root / "cat/@eaDir", root / "@eaDir"):
        folder.mkdir()
        tile(0, 0, 50, 50).save(folder / "copy.jpg")
    source = open_source(SourceConfig("folder", str(root)))
    assert (source.classes, len(source.keys)) == (("cat", "dog"), 8)


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_real_images_are_the_same_every_time_and_derive_a_recipe(name: str, tmp_path: Path) -> None:
    """What docs/results.md measures the derived recipes on."""
    few = replace(FOLDERS[name], train=5, test=2, pixels=(60, 120))
    for folder in ("first", "second"):
        make_photographs(few, tmp_path / folder)
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*"))
    assert len(files) == 7 * len(few.sources)
    assert all((tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes() for file in files)
    config, _ = compose_run([f"data.root={tmp_path / 'first'}", "labels.per_class=4"])
    assert config.pretrain.support.classes == len(few.sources)
    assert config.views.large.size == 48
    assert (config.views.augment.hue == 0) == few.grey


def test_a_recipe_that_asks_torch_for_a_gpu_lets_openmp_sleep(tmp_path: Path) -> None:
    """The process that derives it trains, too; GNU's library reads the environment as torch loads it."""
    write_tiles(tmp_path / "photos", 24, classes=("cat", "dog"))
    ask = "import sys; from paws_hpc.cluster.compose import compose_run; compose_run(sys.argv[1:]); import os; "
    ask += "print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    quiet = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", ask, f"data.root={tmp_path / 'photos'}"]
    done = subprocess.run(command, env=quiet, capture_output=True, text=True, check=True)
    assert done.stdout == "True passive\n"
