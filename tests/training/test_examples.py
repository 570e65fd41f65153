import numpy as np
import pytest
import torch

from starflow.reader import SnapshotReader
from starflow.snapshots import load_snapshot
from tests.training.small_snapshot import TEXT
from training.architecture import architecture
from training.conditions import Labels, make_conditioner
from training.examples import ExampleMaker, prefetch

GRID = (8, 8)


@pytest.fixture
def data(make_config, store):
    config = make_config(ranks=1, caption_dropout=0.5, latent_noise=0.3)
    reader = SnapshotReader(store, load_snapshot(store), config.cache / "snapshots")
    return config, reader, make_conditioner(config, architecture(config), reader.text, "cpu")


def test_draws_depend_on_seed_step_and_sample_only(data):
    config, reader, conditioner = data
    maker = ExampleMaker(config, conditioner)
    whole = maker.training(3, reader.gather(GRID, np.arange(40)))
    part = maker.training(3, reader.gather(GRID, np.arange(20, 25)))
    assert torch.equal(part.latents, whole.latents[20:25])
    assert torch.equal(part.condition, whole.condition[20:25])
    assert not torch.equal(maker.training(4, reader.gather(GRID, np.arange(40))).latents, whole.latents)
    dropped = (whole.condition == 0).flatten(1).all(1)
    assert 8 < int(dropped.sum()) < 32


def test_noise_has_the_stated_size(data):
    config, reader, conditioner = data
    batch = reader.gather(GRID, np.arange(96))
    noise = ExampleMaker(config, conditioner).training(0, batch).latents - torch.from_numpy(batch.mean).float()
    assert float(noise.std()) == pytest.approx((0.3**2 + 0.05**2) ** 0.5, rel=0.05)
    plain = config.model_copy(update={"latent_noise": 0.0, "resample": False})
    exact = ExampleMaker(plain, conditioner).held_out(batch)
    assert torch.equal(exact.latents, torch.from_numpy(batch.mean).float())
    assert torch.equal(exact.condition, torch.from_numpy(batch.text).float())


def test_labels_are_read_from_captions():
    labels, _ = Labels(10)(["3", "7"], None, np.array([False, True]))
    assert labels.tolist() == [3, 10]
    with pytest.raises(Exception, match="'cat' is not a class number below 10"):
        Labels(10)(["cat"], None, np.array([False]))


def test_prefetch_passes_errors_on_and_stops():
    def source():
        yield 1
        raise OSError("disk")

    items = prefetch(source())
    assert next(items) == 1
    with pytest.raises(OSError, match="disk"):
        next(items)
    endless = prefetch(iter(int, 1))
    next(endless)
    endless.close()


def test_encoded_text_remembers_captions(make_config, monkeypatch):
    calls = []

    class Encoder:
        identity, width, length = TEXT, 24, 6

        def encode(self, captions):
            calls.append(list(captions))
            return torch.stack([torch.full((6, 24), float(len(caption))) for caption in captions])

    monkeypatch.setattr("starflow.encoders.load_text_encoder", lambda *_: Encoder())
    config = make_config(ranks=1)
    conditioner = make_conditioner(config, architecture(config), None, "cpu")
    first, _ = conditioner(["a", "bb", "a"], None, np.array([False, False, True]))
    second, _ = conditioner(["bb", "ccc"], None, np.array([False, False]))
    assert first[:, 0, 0].tolist() == [1, 2, 0]
    assert second[:, 0, 0].tolist() == [2, 3]
    assert calls == [["a", "bb", ""], ["ccc"]]
