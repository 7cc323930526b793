"""Order is a function of (seed, epoch) and (seed, step): nothing else moves it, and every record is met once."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paws_hpc.data.samplers import EpochSampler, SupportSampler, Window, cipher_key, permute

WINDOW = Window(block_records=75, blocks=256)  # ImageNet: blocks of 8 MB


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**40))
def test_every_position_is_met_exactly_once(count: int, seed: int) -> None:
    image = permute(np.arange(count), count, cipher_key(seed))
    assert np.array_equal(np.sort(image), np.arange(count))


def test_an_epoch_visits_every_image_once_and_epochs_differ() -> None:
    order = EpochSampler(count=1000, batch_size=100, seed=3)
    first = np.concatenate([order.records(step) for step in range(10)])
    second = np.concatenate([order.records(step) for step in range(10, 20)])
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert np.array_equal(np.sort(second), np.arange(1000))
    assert np.mean(first == second) < 0.02


@settings(deadline=None)
@given(
    count=st.integers(1, 700),
    block_records=st.integers(1, 60),
    blocks=st.integers(1, 9),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
def test_a_windowed_epoch_visits_every_image_once(
    count: int, block_records: int, blocks: int, epoch: int, seed: int
) -> None:
    records = EpochSampler(count, count, seed, Window(block_records, blocks)).records(epoch)
    assert np.array_equal(np.sort(records), np.arange(count))
    batches = EpochSampler(count, -(-count // 5), seed, Window(block_records, blocks))
    first = epoch * batches.steps_per_epoch
    together = np.concatenate([batches.records(first + step) for step in range(batches.steps_per_epoch)])
    assert np.array_equal(together, records[: len(together)]), "a batch is a piece of the epoch, whatever its size"


def test_a_window_stays_in_few_places_of_the_disk_and_is_shuffled_there() -> None:
    order = EpochSampler(count=100_000, batch_size=500, seed=1, window=Window(block_records=100, blocks=20))
    records = np.concatenate([order.records(step) for step in range(4)])  # one window
    ordered = np.sort(records)
    runs = np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1)
    assert len(runs) <= 21
    assert min(len(run) for run in runs[1:-1]) >= 100
    assert np.corrcoef(np.arange(2000), records)[0, 1] < 0.1
    assert abs(records.mean() / 100_000 - 0.5) < 0.3
    neighbours = np.abs(np.diff(records)) == 1
    assert neighbours.mean() < 0.02
    again = np.concatenate([order.records(step) for step in range(200, 204)])
    assert len(np.intersect1d(records, again)) < 200, "the next epoch has other blocks in its first window"


def test_blocks_are_cut_in_other_places_in_each_epoch() -> None:
    """Else two images would be together in every epoch, and those of the last, shorter block always apart."""
    order = EpochSampler(count=1000, batch_size=1000, seed=1, window=Window(block_records=100, blocks=1))
    starts = set()
    for epoch in range(20):
        blocks = order.records(epoch).reshape(10, 100)
        starts |= {int(np.sort((block - block[0] + 500) % 1000)[0] + block[0] - 500) % 100 for block in blocks}
    assert len(starts) > 10


@pytest.mark.parametrize("window", [None, WINDOW])
def test_a_batch_costs_the_same_time_and_memory_for_a_million_records_and_a_billion(window: Window | None) -> None:
    seconds, peaks = [], []
    for count in (10**6, 10**9):
        order = EpochSampler(count, 4096, seed=0, window=window)
        steps = np.linspace(0, order.steps_per_epoch - 1, 8).astype(int).tolist()
        order.records(steps[0])
        best = np.inf
        for _ in range(5):
            began = time.process_time()
            for step in steps:
                order.records(step)
            best = min(best, time.process_time() - began)
        seconds.append(best)
        tracemalloc.start()
        order.records(steps[-1])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert seconds[1] < 3 * seconds[0], "a stored permutation would be a thousand times as long"
    assert peaks[1] < 1.5 * peaks[0] < 1.5e6


def test_small_permutations_are_uniform() -> None:
    first_two = permute(np.arange(2)[None], 4, cipher_key(0, np.arange(24_000))[:, None])
    counts = np.bincount(first_two[:, 0] * 4 + first_two[:, 1], minlength=16).reshape(4, 4)
    off_diagonal = counts[~np.eye(4, dtype=bool)]
    assert np.all(np.diag(counts) == 0)
    chi_square = ((off_diagonal - 2000) ** 2 / 2000).sum()
    assert chi_square < 31.3  # 99.9 % quantile with 11 degrees of freedom


def make_support(classes: int = 10, per_class: int = 12, **options: int | bool) -> tuple[SupportSampler, np.ndarray]:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), per_class))
    records = np.arange(len(labels)) + 1000
    return SupportSampler(records, labels, seed=1, **options), labels


def test_support_is_stratified_distinct_and_a_function_of_the_step() -> None:
    order, labels = make_support(num_classes=7, images_per_class=5)
    for step in (0, 1, 999_999):
        records, indices, repeats = order.draw(step)
        assert len(np.unique(records)) == 35
        assert not repeats.any()
        classes = labels[records - 1000].reshape(7, 5)
        assert np.all(classes == classes[:, :1]), "rows of one index share their class"
        assert len(np.unique(classes[:, 0])) == 7
        assert np.array_equal(indices, np.repeat(np.arange(7), 5))
        assert np.array_equal(records, make_support(num_classes=7, images_per_class=5)[0].draw(step)[0])
    assert not np.array_equal(order.draw(0)[0], order.draw(1)[0])


def test_over_many_steps_every_labelled_image_is_used_equally() -> None:
    order, _ = make_support(num_classes=5, images_per_class=3)
    counts = np.bincount(np.concatenate([order.draw(step)[0] for step in range(4000)]) - 1000, minlength=120)
    expected = 4000 * 15 / 120
    # Each count is binomial(4000, 1/8); five standard deviations.
    assert np.all(abs(counts - expected) < 5 * np.sqrt(4000 * 0.125 * 0.875))


@settings(deadline=None, max_examples=50)
@given(
    counts=st.lists(st.integers(1, 9), min_size=2, max_size=7),
    classes=st.integers(1, 7),
    images_per_class=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_balanced_supports_take_turns(counts: list[int], classes: int, images_per_class: int, seed: int) -> None:
    """However many labels a class has, one among them: images of a class and classes differ by one use at most."""
    labels = np.repeat(np.arange(len(counts)), counts)
    classes = min(classes, len(counts))
    order = SupportSampler(
        np.arange(len(labels)), labels, num_classes=classes, images_per_class=images_per_class, seed=seed, balanced=True
    )
    used = np.zeros(len(labels), int)
    for step in range(15):
        records, indices, repeats = order.draw(step)
        assert np.array_equal(indices, np.repeat(np.arange(classes), images_per_class))
        of_class = labels[records].reshape(classes, images_per_class)
        assert np.all(of_class == of_class[:, :1])
        assert len(np.unique(of_class[:, 0])) == classes
        assert len(set(zip(records.tolist(), repeats.tolist(), strict=True))) == len(records), "repeats are numbered"
        assert repeats.max() < order.most_repeats
        if images_per_class <= min(counts):
            assert not repeats.any(), "no image twice where there are enough"
        np.add.at(used, records, 1)
        for label in range(len(counts)):
            assert np.ptp(used[labels == label]) <= 1
        turns = np.bincount(labels, used) / images_per_class
        assert np.ptp(turns) <= 1
    assert np.array_equal(order.draw(7).records, order.draw(7).records)


def test_balanced_supports_come_in_ever_new_company() -> None:
    order = make_support(num_classes=10, images_per_class=4, balanced=True)[0]
    together = {tuple(sorted(order.draw(step).records[:4].tolist())) for step in range(300)}
    assert len(together) > 250, "a fixed order would show 30 sets of four images"


def test_too_few_labels_or_classes_say_what_would_fit() -> None:
    with pytest.raises(ValueError, match=r"class 3 has only 4 labelled.*at most 4.*support_order=balanced"):
        SupportSampler(np.arange(14), np.repeat([3, 5], [4, 10]), num_classes=2, images_per_class=6, seed=0)
    with pytest.raises(ValueError, match=r"support.classes=11, but only 10 classes"):
        make_support(num_classes=11, images_per_class=1)
    with pytest.raises(ValueError, match="batch_size=128 is larger than the data set of 100"):
        EpochSampler(count=100, batch_size=128, seed=0)
