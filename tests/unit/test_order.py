"""Order is a function of (seed, epoch) and (seed, step): nothing else moves it, and every record is met once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paws_hpc.data.order import EpochOrder, SupportOrder, cipher_key, permute


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**40))
def test_every_position_is_met_exactly_once(count: int, seed: int) -> None:
    image = permute(np.arange(count), count, cipher_key(seed))
    assert np.array_equal(np.sort(image), np.arange(count))


def test_an_epoch_visits_every_image_once_and_epochs_differ() -> None:
    order = EpochOrder(count=1000, batch_size=100, seed=3)
    first = np.concatenate([order.records(step) for step in range(10)])
    second = np.concatenate([order.records(step) for step in range(10, 20)])
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert np.array_equal(np.sort(second), np.arange(1000))
    assert np.mean(first == second) < 0.02


def test_a_step_needs_no_history_and_no_memory_at_a_billion_records() -> None:
    order = EpochOrder(count=10**9, batch_size=4096, seed=0)
    far = order.records(200_000)
    assert np.array_equal(far, EpochOrder(count=10**9, batch_size=4096, seed=0).records(200_000))
    assert len(np.unique(far)) == 4096
    assert far.max() < 10**9
    # A uniform draw has mean 0.5 with standard error 0.0045 here.
    assert abs(far.mean() / 10**9 - 0.5) < 0.025


def test_small_permutations_are_uniform() -> None:
    first_two = permute(np.arange(2)[None], 4, cipher_key(0, np.arange(24_000))[:, None])
    counts = np.bincount(first_two[:, 0] * 4 + first_two[:, 1], minlength=16).reshape(4, 4)
    off_diagonal = counts[~np.eye(4, dtype=bool)]
    assert np.all(np.diag(counts) == 0)
    chi_square = ((off_diagonal - 2000) ** 2 / 2000).sum()
    assert chi_square < 31.3  # 99.9 % quantile with 11 degrees of freedom


def make_support(classes: int = 10, per_class: int = 12, **asked: int) -> tuple[SupportOrder, np.ndarray]:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), per_class))
    records = np.arange(len(labels)) + 1000
    return SupportOrder(records, labels, seed=1, **asked), labels


def test_support_is_stratified_distinct_and_a_function_of_the_step() -> None:
    order, labels = make_support(num_classes=7, images_per_class=5)
    for step in (0, 1, 999_999):
        records, places, repeats = order.draw(step)
        assert len(np.unique(records)) == 35
        assert not repeats.any()
        classes = labels[records - 1000].reshape(7, 5)
        assert np.all(classes == classes[:, :1]), "rows of one place share their class"
        assert len(np.unique(classes[:, 0])) == 7
        assert np.array_equal(places, np.repeat(np.arange(7), 5))
        assert np.array_equal(records, make_support(num_classes=7, images_per_class=5)[0].draw(step)[0])
    assert not np.array_equal(order.draw(0)[0], order.draw(1)[0])


def test_over_many_steps_every_labelled_image_is_used_equally() -> None:
    order, _ = make_support(num_classes=5, images_per_class=3)
    counts = np.bincount(np.concatenate([order.draw(step)[0] for step in range(4000)]) - 1000, minlength=120)
    expected = 4000 * 15 / 120
    # Each count is binomial(4000, 1/8); five standard deviations.
    assert np.all(abs(counts - expected) < 5 * np.sqrt(4000 * 0.125 * 0.875))


def test_too_few_labels_or_classes_say_what_would_fit() -> None:
    with pytest.raises(ValueError, match=r"class 3 has only 4 labelled.*at most 4"):
        SupportOrder(np.arange(14), np.repeat([3, 5], [4, 10]), num_classes=2, images_per_class=6, seed=0)
    with pytest.raises(ValueError, match=r"support.classes=11, but only 10 classes"):
        make_support(num_classes=11, images_per_class=1)
    with pytest.raises(ValueError, match="batch_size=128 is larger than the data set of 100"):
        EpochOrder(count=100, batch_size=128, seed=0)
