"""Random numbers are Philox4x32-10 and depend on (seed, stream, epoch, sample, view) alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paws_hpc.data.philox import Stream, philox4x32, uniform


def draw(**changes: Any) -> np.ndarray:
    arguments = {"seed": 7, "stream": Stream.CROP, "epoch": 3, "samples": np.arange(10), "view": 1, "count": 6}
    return uniform(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_equals_the_published_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    words = np.array([[int(word, 16)] * 2 for word in counter.split()], dtype=np.uint64)
    first, second = (int(word, 16) for word in key.split())
    result = philox4x32(words, (first, second))
    assert [[f"{int(word):08x}" for word in row] for row in result] == [[word] * 2 for word in expected.split()]


def test_where_each_argument_sits_in_the_counter_never_changes() -> None:
    """A changed layout would silently change every run that is resumed."""
    sample, epoch, view, seed = 0xAB_1234_5678, 0x9ABC_DEF0, 0x1357, 0x0246_8ACE_1133_5577
    numbers = draw(seed=seed, epoch=epoch, samples=np.array([sample]), view=view, count=8)[0]
    high = (view << 16) | (int(Stream.CROP) << 8) | 0xAB
    counters = np.array([[0x1234_5678] * 2, [epoch] * 2, [0, 1], [high] * 2], dtype=np.uint64)
    words = philox4x32(counters, (0x1133_5577, 0x0246_8ACE))
    np.testing.assert_array_equal(numbers, words.T.ravel() / 2**32)


def test_a_row_does_not_depend_on_the_others_or_on_how_many_numbers_are_drawn() -> None:
    np.testing.assert_array_equal(draw(samples=np.array([5, 9])), draw(samples=np.array([9, 1, 5]))[[2, 0]])
    np.testing.assert_array_equal(draw(count=3), draw(count=9)[:, :3])


def test_a_view_per_sample_equals_one_view_at_a_time() -> None:
    together = draw(samples=np.tile(np.arange(4), 2), view=np.repeat([2, 3], 4))
    apart = [draw(samples=np.arange(4), view=view) for view in (2, 3)]
    np.testing.assert_array_equal(together, np.concatenate(apart))


@pytest.mark.parametrize(
    "changes",
    [
        *({"seed": seed} for seed in (8, 7 + (1 << 32))),
        {"stream": Stream.AUGMENT},
        *({"epoch": epoch} for epoch in (4, (1 << 32) - 1)),
        *({"samples": np.arange(10) + start} for start in (10, 1 << 39)),
        *({"view": view} for view in (2, (1 << 16) - 1)),
    ],
)
def test_every_argument_changes_the_numbers(changes: dict[str, Any]) -> None:
    assert not np.isin(draw(**changes), draw()).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("seed", seed) for seed in (-1, 1 << 64)),
        *(("epoch", epoch) for epoch in (-1, 1 << 32)),
        *(("samples", np.array([sample])) for sample in (1 << 40, -1, 0.5)),
        *(("view", view) for view in (1 << 16, -1, np.arange(3))),
        ("count", -1),
    ],
)
def test_an_argument_that_the_counter_cannot_hold_is_an_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        draw(**{name: value})


def test_no_samples_or_no_numbers_give_an_empty_array() -> None:
    assert draw(samples=np.empty(0, dtype=np.int64)).shape == (0, 6)
    assert draw(count=0).shape == (10, 0)


@pytest.mark.parametrize("axis", ["samples", "epochs", "columns"])
def test_numbers_are_uniform_and_uncorrelated_along(axis: str) -> None:
    """Chi-square over 64 bins (63 degrees of freedom: 99.9 % lie within 25 .. 115) and correlation of neighbours."""
    if axis == "samples":
        numbers = draw(samples=np.arange(100_000), count=1).ravel()
    elif axis == "epochs":
        numbers = np.concatenate([draw(samples=np.arange(100), epoch=epoch, count=1).ravel() for epoch in range(1000)])
    else:
        numbers = draw(samples=np.arange(2), count=50_000).ravel()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    observed = np.histogram(numbers, bins=64, range=(0, 1))[0]
    expected = numbers.size / 64
    assert 25 < ((observed - expected) ** 2 / expected).sum() < 115
    correlation = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(numbers.size)
