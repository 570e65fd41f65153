"""The data order: pure, exactly once an epoch, in proportion, well shuffled."""

from collections import Counter

import numpy as np
import pytest

from training.order import CYCLE, BatchOrder

SQUARE, WIDE, TINY = (32, 32), (24, 40), (40, 24)


@pytest.mark.parametrize(("count", "block", "window"), [(1000, 7, 3), (64, 8, 4), (5, 8, 2), (1, 1, 1), (999, 256, 64)])
def test_every_epoch_visits_every_sample_once(count, block, window):
    order = BatchOrder({SQUARE: count}, seed=1, global_batch_size=16, block=block, window=window)
    epochs = [order.positions(SQUARE, epoch * count, count) for epoch in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(count))
    if count > 100:
        assert not np.array_equal(epochs[0], epochs[1])


def test_batches_are_consecutive_positions_over_the_end_of_epochs():
    order = BatchOrder({SQUARE: 50}, seed=3, global_batch_size=16, block=4, window=3)
    stream = np.concatenate([order.batch(step)[1] for step in range(25)])
    assert np.array_equal(stream, order.positions(SQUARE, 0, 400))
    assert all(np.array_equal(np.sort(stream[i : i + 50]), np.arange(50)) for i in range(0, 400, 50))


def test_order_is_a_pure_function_of_the_step():
    counts = {SQUARE: 3000, WIDE: 1000}
    forward = BatchOrder(counts, seed=5, global_batch_size=32, block=16, window=4)
    batches = [forward.batch(step) for step in range(600)]
    for step in (599, 0, 300, 257):
        grid, ordinals = BatchOrder(dict(reversed(counts.items())), 5, 32, 16, 4).batch(step)
        assert grid == batches[step][0]
        assert np.array_equal(ordinals, batches[step][1])
    other = BatchOrder(counts, seed=6, global_batch_size=32, block=16, window=4)
    assert not np.array_equal(other.batch(0)[1], batches[0][1])


def test_grids_take_turns_in_proportion_and_streams_have_no_gaps():
    counts = {SQUARE: 7000, WIDE: 2990, TINY: 10, (1, 1): 0}
    order = BatchOrder(counts, seed=0, global_batch_size=8, block=8, window=4)
    steps = 20 * CYCLE
    turns = [order.turn(step) for step in range(steps)]
    taken = Counter(grid for grid, _ in turns)
    for grid in (SQUARE, WIDE, TINY):
        assert abs(taken[grid] - steps * counts[grid] / 10_000) <= 1
        assert [turn for g, turn in turns if g == grid] == list(range(taken[grid]))
    squares = np.array([grid == SQUARE for grid, _ in turns[:CYCLE]])
    assert 80 < np.abs(np.diff(squares)).sum() < 150  # shuffled: a random mix of 7:3 changes about 107 times


def test_many_small_grids_never_lose_a_turn():
    order = BatchOrder({(1, n): n for n in range(1, 12)}, seed=0, global_batch_size=4, block=2, window=2)
    turns = [order.turn(step) for step in range(12 * CYCLE)]
    for n in range(1, 12):
        mine = [turn for grid, turn in turns if grid == (1, n)]
        assert mine == list(range(len(mine)))
        assert len(mine) == pytest.approx(12 * CYCLE * n / 66, abs=1.5)


def test_shuffle_quality():
    """Neighbours in the stream are nearly uncorrelated, and a batch draws from all over the data set."""
    count, batch = 200_000, 1024
    order = BatchOrder({SQUARE: count}, seed=0, global_batch_size=batch)
    stream = order.positions(SQUARE, 0, count)
    correlation = np.corrcoef(stream[:-1], stream[1:])[0, 1]
    assert abs(correlation) < 0.05  # about 1/window
    blocks = [len(np.unique(stream[i : i + batch] // 256)) for i in range(0, count - batch, batch)]
    assert np.mean(blocks) > 60  # nearly all of the 64 blocks of a window


def test_nothing_to_order_is_refused():
    with pytest.raises(ValueError, match="positive"):
        BatchOrder({SQUARE: 0}, seed=0, global_batch_size=8)
    with pytest.raises(ValueError, match="global_batch_size 0"):
        BatchOrder({SQUARE: 10}, seed=0, global_batch_size=0)
