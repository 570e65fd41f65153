"""The loader: any number of ranks reads the same samples, errors arrive, closing stops the thread."""

import threading

import numpy as np
import pytest

from starflow.errors import CorruptError
from starflow.reader import Batch
from training.loader import Loader, load_batch, rank_slice
from training.order import BatchOrder

GRID = (2, 2)


class FakeReader:
    """Samples whose latents are their ordinals and whose captions are their draws."""

    def __init__(self, broken=None):
        self.broken, self.prefetched = broken, 0

    def gather(self, grid, ordinals, draws=None):
        if self.broken is not None and self.broken in ordinals:
            raise CorruptError(f"sample {self.broken} is broken")
        mean = np.broadcast_to(ordinals[:, None, None, None], (len(ordinals), 1, *grid)).astype(np.float16)
        return Batch(grid, ordinals, mean, mean, [f"{draw:.9f}" for draw in draws], None, list)

    def prefetch(self, grid, ordinals):
        self.prefetched += len(ordinals)


@pytest.fixture
def order():
    return BatchOrder({GRID: 100, (1, 4): 30}, seed=7, global_batch_size=12, block=4, window=4)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_together_read_the_global_batch(order, ranks):
    reader = FakeReader()
    for step in range(20):
        batches = [load_batch(reader, order, rank, ranks, step) for rank in range(ranks)]
        grid, ordinals = order.batch(step)
        assert {batch.grid for batch in batches} == {grid}
        together = np.concatenate([batch.ordinals for batch in batches])
        assert np.array_equal(np.sort(together), np.sort(ordinals))
        alone = load_batch(reader, order, 0, 1, step)
        drawn = dict(zip(alone.ordinals.tolist(), alone.captions, strict=True))
        if len(drawn) == 12:  # no sample twice
            assert all(drawn[o] == c for b in batches for o, c in zip(b.ordinals.tolist(), b.captions, strict=True))


def test_loader_yields_every_step_from_start_to_stop(order):
    reader = FakeReader()
    with Loader(reader, order, 1, 2, start=5, stop=30) as loader:
        found = list(loader)
    assert [step for step, _ in found] == list(range(5, 30))
    for step, batch in found:
        assert np.array_equal(batch.ordinals, load_batch(reader, order, 1, 2, step).ordinals)
    assert reader.prefetched >= 25 * 6


def test_errors_arrive_where_the_batch_would_be(order):
    with Loader(FakeReader(broken=3), order, 0, 1) as loader, pytest.raises(CorruptError, match="sample 3"):
        for _ in loader:
            pass


def test_close_stops_an_endless_loader(order):
    before = set(threading.enumerate())  # some of which may end meanwhile
    loader = Loader(FakeReader(), order, 0, 1)
    assert next(iter(loader))[0] == 0
    loader.close()
    assert set(threading.enumerate()) <= before


def test_uneven_shares_are_refused(order):
    with pytest.raises(ValueError, match="12 cannot be shared by rank 0 of 5"):
        rank_slice(12, 0, 5)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Loader(FakeReader(), order, 2, 2)
