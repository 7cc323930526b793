"""Configuration of the data: which stores, whose labels, and what the network sees of an image. Without torch.

The defaults are the ImageNet recipe of the paper (multi-crop 2 x 224 and 6 x 96, SimCLR's colour operations).
View numbers name the random draws of an image: large crops 0 and 1, small crops from 2 on, supports from
``FIRST_SUPPORT_VIEW`` on, training crops of fine-tuning from ``FIRST_FINETUNE_VIEW`` on, so that none shares numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from paws_hpc.sizes import check_ranges

FIRST_SMALL_VIEW = 2
FIRST_SUPPORT_VIEW = 1024
FIRST_FINETUNE_VIEW = 2048
MAX_SUPPORT_VIEWS = FIRST_FINETUNE_VIEW - FIRST_SUPPORT_VIEW


@dataclass
class DataConfig:
    """Stores of images, how to pack them, and the order of images.

    Attributes:
        name: of the data set, for people.
        classes: their number, for recipes whose sizes follow from it; checked against the store. None: unknown.
        train: store of the training images; without ``labelled`` the labelled ones are among them.
        labelled: a store of its own for labelled and validation images. Classes are this store's then, and labels of
            ``train`` are never read. All images are normalised by the statistics of ``train``.
        test: store of the test images, read once, after selection. None: there are none, and nothing is scored on any.
        allow_overlap: whether test images may be among the training or labelled images, by equal pixels. They are
            counted in any case, near duplicates too.
        source: kind of source with a train and a test split, from which missing stores are packed. None: a missing
            store is an error.
        source_path: its folder; None for a source that a package ships.
        root: folder of own images, which are packed into ``shards/`` on first use: ``train/`` and ``test/`` with a
            folder per class, one folder per class, or images without folders and ``labels``. A recipe is derived from
            them unless ``experiment=`` names one (docs/own_images.md).
        unlabelled: or the folder of own images without labels, with ``labelled`` a folder of one folder per class.
        labels: list of ``<image>,<label>`` lines for those of the images that have a label.
        folders: where missing stores ``train``, ``labelled`` and ``test`` are packed from; follows from these.
        threads: that decode and crop, per rank.
        copy_to: folder on each node's own disk; pre-training first copies its stores there. ``$NAMES`` of the node's
            environment are filled in. None: no copies.
        order: of unlabelled images in an epoch: ``full`` shuffles all; ``window`` keeps neighbours on disk together for
            a while, which a cold parallel file system rewards (``paws_hpc.data.samplers.EpochSampler``).
        support_order: ``paper`` draws supports anew in each step; ``balanced`` lets the images of a class take turns,
            and repeats those of classes with fewer than ``pretrain.support.images_per_class``, as other crops.
    """

    name: str = "digits"
    classes: int | None = None
    train: str = "shards/digits/train"
    labelled: str | None = None
    test: str | None = "shards/digits/test"
    allow_overlap: bool = False
    source: str | None = None
    source_path: str | None = None
    root: str | None = None
    unlabelled: str | None = None
    labels: str | None = None
    folders: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    copy_to: str | None = None
    order: str = "full"
    support_order: str = "paper"

    @property
    def stores(self) -> dict[str, str]:
        """Paths of the stores that a run reads, by field."""
        stores = {"labelled": self.labelled, "train": self.train, "test": self.test}
        return {name: path for name, path in stores.items() if path is not None}

    def __post_init__(self) -> None:
        check_ranges("data", self, threads="[1, inf)")
        for name in ("root", "unlabelled", "labels"):
            if getattr(self, name) is not None and not self.folders:
                raise ValueError(
                    f"data.{name}={getattr(self, name)} has no effect. Give data.root=FOLDER or data.unlabelled=FOLDER "
                    "on the command line, with all else that says where own images are."
                )
        if self.source is not None:
            from paws_hpc.packing import SOURCES  # noqa: PLC0415 - HDF5, which status and a job's last moments don't load

            divided = [source for source, kind in SOURCES.items() if kind.has_splits]
            if self.source not in divided:
                raise ValueError(f"data.source={self.source!r} must be null or one of {', '.join(divided)}.")
        for name, allowed in (("order", ("full", "window")), ("support_order", ("paper", "balanced"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"data.{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}.")


@dataclass
class LabelsConfig:
    """Which images are labelled.

    Give each set either a number per class, drawn from the run's seed, or a file with one image per line: a key of the
    store, ImageNet's ``nXXXXXXXX_id.JPEG``, or an index (CIFAR). In a file's name ``{seed}`` stands for the run's seed.
    Without images for validation the labelled ones choose, by cross-validation (``paws_hpc.data.splits.folds``).

    Attributes:
        per_class: labelled images of each class.
        file: or a list of them.
        all: or all images but those for validation.
        validation_per_class: images of each class that choose between fine-tuned networks; never labelled ones.
        validation_file: or a list of them.
    """

    per_class: int | None = None
    file: str | None = None
    all: bool = False
    validation_per_class: int | None = None
    validation_file: str | None = None

    def __post_init__(self) -> None:
        check_ranges("labels", self, per_class="[1, inf)", validation_per_class="[1, inf)")

    @property
    def validated(self) -> bool:
        """Whether images are held out for validation."""
        return self.validation_per_class is not None or self.validation_file is not None

    def check_complete(self) -> None:
        """Raise ValueError unless the labelled images are given in exactly one way, and those for validation in one."""
        if [self.per_class is not None, self.file is not None, self.all].count(True) != 1:
            raise ValueError(
                f"labels.per_class={self.per_class}, labels.file={self.file}, labels.all={self.all}: give exactly one "
                "of them, and null or false for the others."
            )
        if self.validation_per_class is not None and self.validation_file is not None:
            raise ValueError(
                f"labels.validation_per_class={self.validation_per_class} and labels.validation_file="
                f"{self.validation_file}: give one of them at most, and null for the other."
            )


@dataclass
class CropConfig:
    """Random-resized crops of one size, whose width/height is drawn log-uniformly from 3/4 to 4/3.

    Attributes:
        size: side of the square result, pixels.
        count: crops of this kind per image.
        scale: least and greatest share of the image's area that a crop covers.
    """

    size: int = 224
    count: int = 1
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])

    def check(self, section: str) -> None:
        """Raise ValueError, naming the field as one of ``section``, if no crop could be made."""
        check_ranges(section, self, size="[1, inf)", count="[0, inf)")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"{section}.scale={self.scale} must be [least, greatest] share of the area in (0, 1].")


@dataclass
class CenterCropConfig:
    """Evaluation: the central square of a resized image.

    Attributes:
        resize: to which the shorter side is resized, pixels.
        size: side of the square, pixels.
    """

    resize: int = 256
    size: int = 224

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.resize:
            raise ValueError(
                f"views.evaluation.size={self.size} must be positive and at most views.evaluation.resize={self.resize}"
            )


@dataclass
class AugmentConfig:
    """Strengths and probabilities of the operations on a crop; a strength or probability of 0 turns one off.

    Attributes:
        brightness, contrast, saturation: factors are uniform in [max(0, 1 - s), 1 + s].
        hue: the shift is uniform in [-h, h], as a share of the colour circle; at most 0.5.
        jitter_probability: chance that the four operations above are applied, in a random order.
        grayscale_probability, flip_probability: chance of each operation.
        blur_probability: chance of a Gaussian whose standard deviation is uniform in [0.1, 2] pixels.
        solarize_probability: chance that values above a threshold, drawn uniformly, are inverted.
        equalize_probability: chance that each channel's histogram is made flat.
    """

    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    jitter_probability: float = 0.8
    grayscale_probability: float = 0.2
    blur_probability: float = 0.5
    flip_probability: float = 0.5
    solarize_probability: float = 0.0
    equalize_probability: float = 0.0

    def check(self, section: str) -> None:
        """Raise ValueError, naming the field as one of ``section``, if a value is out of its range."""
        factors = dict.fromkeys(("brightness", "contrast", "saturation"), "[0, inf)")
        chances = {each.name: "[0, 1]" for each in fields(self) if each.name.endswith("_probability")}
        check_ranges(section, self, hue="[0, 0.5]", **factors, **chances)


@dataclass
class ViewsConfig:
    """All views of an image.

    Attributes:
        large: the two crops that are anchors and targets; supports are cropped like these.
        small: further anchors (multi-crop); ``count`` 0 turns them off.
        support_views: augmented views of each support image in a step.
        augment: operations applied to every crop, supports included.
        evaluation: the crop for scoring, without augmentation.
    """

    large: CropConfig = field(default_factory=lambda: CropConfig(size=224, count=2, scale=[0.14, 1.0]))
    small: CropConfig = field(default_factory=lambda: CropConfig(size=96, count=6, scale=[0.05, 0.14]))
    support_views: int = 1
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    evaluation: CenterCropConfig = field(default_factory=CenterCropConfig)

    def __post_init__(self) -> None:
        self.large.check("views.large")
        self.small.check("views.small")
        self.augment.check("views.augment")
        if self.large.count != 2:
            raise ValueError(
                f"views.large.count={self.large.count} must be 2: each large crop's target is the other's prediction"
            )
        if FIRST_SMALL_VIEW + self.small.count > FIRST_SUPPORT_VIEW:
            raise ValueError(
                f"views.small.count={self.small.count} must be at most {FIRST_SUPPORT_VIEW - FIRST_SMALL_VIEW}"
            )
        check_ranges("views", self, support_views=f"[1, {MAX_SUPPORT_VIEWS}]")
