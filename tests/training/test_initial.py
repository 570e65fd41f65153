import pytest
import torch

from starflow.checkpoints import Checkpoint, TrainedInfo
from starflow.errors import ConfigError
from starflow.model import FlowConfig, STARFlow
from tests.training.small_snapshot import TEXT, VAE
from training import initial

TRAINED = TrainedInfo(
    run="new", step=0, samples=0, snapshot="7", vae=VAE, text_encoder=TEXT.name, text_identity=TEXT, latent_noise=0.1,
    held_out=0.0,
)  # fmt: skip


@pytest.fixture
def start_from(monkeypatch):
    """Makes `initialise` find the given model's weights."""

    def replace(flow, trained=TRAINED):
        weights = {name: p.detach() for name, p in flow.named_parameters()}
        found = Checkpoint.model_construct(
            parameters={name: tuple(p.shape) for name, p in weights.items()},
            model=flow.config.to_dict(),
            trained=trained,
        )
        monkeypatch.setattr(initial, "load_manifest", lambda *_: found)
        monkeypatch.setattr(initial, "iterate_weights", lambda *_: iter(weights.items()))

    return replace


def model(**values):
    flow = STARFlow(FlowConfig(**{"width": 64, "layers": (1, 2), "grid": (4, 4), **values}))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.normal_(std=0.1)
    return flow


def test_same_shapes_are_copied(start_from, tmp_path):
    old, new = model(), model()
    start_from(old)
    initial.initialise(new, f"{tmp_path}/run@3", TRAINED)
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))


def test_a_larger_patch_starts_alike_on_uniform_cells(start_from, tmp_path):
    """Latents that are constant over each patch get the smaller patch's Gaussians."""
    old, new = model(grid=(2, 2)), model(patch=2)
    start_from(old)
    initial.initialise(new, f"{tmp_path}/run", TRAINED)
    x = torch.randn(3, 4, 2, 2)
    expected = old(x)
    found = new(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(found.logdets[0], expected.logdets[0].repeat(1, 1, 4))
    torch.testing.assert_close(found.z, expected.z.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_other_differences_are_named(start_from, tmp_path):
    start_from(model())
    with pytest.raises(ConfigError, match=r"layers \(1, 2\).*\(1, 3\)"):
        initial.initialise(model(layers=(1, 3)), f"{tmp_path}/run", TRAINED)
    with pytest.raises(ConfigError, match="shape"):
        initial.initialise(model(width=128), f"{tmp_path}/run", TRAINED)
    with pytest.raises(ConfigError, match="STORE/RUN"):
        initial.initialise(model(), "run", TRAINED)


def test_other_encoders_are_named(start_from, tmp_path):
    other = {"name": "sdxl", "sha256": "a" * 64}
    start_from(model(), TRAINED.model_copy(update={"vae": VAE.model_copy(update=other)}))
    with pytest.raises(ConfigError, match=r"VAE sdxl \(weights a{12}\), snapshot 7 has those of test \(0{12}\)"):
        initial.initialise(model(), f"{tmp_path}/run", TRAINED)
    start_from(model(), TRAINED.model_copy(update={"text_identity": TEXT.model_copy(update=other)}))
    with pytest.raises(ConfigError, match=r"text encoder sdxl \(weights a{12}\), .* test-text \(1{12}\)"):
        initial.initialise(model(), f"{tmp_path}/run", TRAINED)
