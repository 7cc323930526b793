"""The recipe that packs ImageNet by a job array, on a small stand-in: a lost task does not matter, nor to the bytes."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import sklearn.datasets
from PIL import Image

from paws_hpc.files import file_hash
from paws_hpc.packing import PackOptions, SourceConfig, open_source, pack
from paws_hpc.store import ImageStore
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.timeout(240)
PROJECT = Path(__file__).parents[2]
PHOTO = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"


def write_images(folder: Path) -> None:
    """``ILSVRC2012_img_train.tar`` as it is distributed, and ``val`` in folders."""
    with Image.open(PHOTO) as photo, tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as whole:
        for label in range(3):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for number in range(20):
                    file = io.BytesIO()
                    photo.crop((9 * number, label, 9 * number + 400, label + 300)).save(file, "JPEG", quality=97)
                    member = tarfile.TarInfo(f"n{label}_{number}.JPEG")
                    member.size = file.tell()
                    archive.addfile(member, io.BytesIO(file.getvalue()))
                    if number == 0:
                        (folder / "val" / f"n{label}").mkdir(parents=True)
                        (folder / "val" / f"n{label}" / "v.JPEG").write_bytes(file.getvalue())
            member = tarfile.TarInfo(f"n{label}.tar")
            member.size = len(inner.getvalue())
            whole.addfile(member, io.BytesIO(inner.getvalue()))


def test_the_array_packs_what_one_process_packs_though_a_task_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "jobs").mkdir(parents=True)
    script = (PROJECT / "jobs" / "pack_imagenet_slurm.sh").read_text()
    assert script.count('--to "shards/imagenet/$split")') == 1
    small = script.replace('--to "shards/imagenet/$split")', '--to "shards/imagenet/$split" --shard-mib 1)')
    (project / "jobs" / "pack_imagenet_slurm.sh").write_text(small)
    for name in (".venv", "paws_hpc"):
        (project / name).symlink_to(PROJECT / name)
    (tmp_path / "imagenet").mkdir()
    write_images(tmp_path / "imagenet")
    environment = {"IMAGENET": str(tmp_path / "imagenet"), "PARTS": "3", "CORES": "1"}
    recipe = ["env", f"--chdir={project}", "bash", "jobs/pack_imagenet_slurm.sh", "--hold"]
    printed = cluster.run(*recipe, environment=environment)
    arrays, lasts = (re.findall(rf"{word} (\d+)", printed) for word in ("array", "job"))
    assert len(arrays) == len(lasts) == 2
    cluster.run("scancel", f"{arrays[0]}_2")
    for job in (*arrays, *lasts):
        cluster.run("scontrol", "release", job)
    for job in lasts:
        cluster.wait_for(job, "COMPLETED", timeout_s=180)
    train = project / "shards" / "imagenet" / "train"
    log = (train.parent / "logs" / "train-verify.log").read_text()
    assert re.search(r"part 1/1 of .*: [1-9]\d* shards packed", log), "the last job packed what the lost task did not"
    assert "verification found no faults" in log
    source = open_source(SourceConfig("tar", str(tmp_path / "imagenet" / "ILSVRC2012_img_train.tar")))
    pack(source, tmp_path / "alone", options=PackOptions(shard_bytes=1 << 20, workers=1))
    assert {path.name: file_hash(path) for path in train.iterdir()} == {
        path.name: file_hash(path) for path in (tmp_path / "alone").iterdir()
    }
    assert len(ImageStore(project / "shards" / "imagenet" / "val")) == 3
    shutil.rmtree(project / "shards")
