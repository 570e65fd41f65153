import pytest

from starflow.config import load_config
from starflow.errors import ConfigError
from starflow.presets import PRESETS
from training.config import TrainConfig
from training.recipes import RECIPES
from training.record import check_same_config


def test_recipe_fills_in_and_the_file_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("store: s3://b/p\nrun: a\npreset: emoji\nsteps: 10\n")
    config = load_config(TrainConfig, file, ["learning_rate=0.5"])
    assert (config.steps, config.learning_rate, config.global_batch_size, config.text_encoder) == (
        10,
        0.5,
        32,
        "minilm",
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ranks=3"], "does not divide over ranks 3"),
        (["micro_batch_size=5"], "does not divide 32"),
        (["stepz=3"], "did you mean steps"),
        (["run=../x"], "run"),
        (["preset=foo"], "^configuration: preset 'foo' does not exist; choose one of tiny, "),
        (["preset=[1]"], "preset = .* valid string"),
        (["steps=null"], "steps"),
        (["snapshot=true"], "snapshot = True"),
        (["offload=nvme"], "nvme_path"),
        (["offload=cpu", "zero_stage=0"], "zero_stage 1, 2 or 3"),
        (["zero_stage=0", "precision=bfloat16"], "zero_stage 1"),
    ],
)
def test_what_cannot_work_is_refused_by_name(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(TrainConfig, None, overrides, store="s", run="a")


def test_every_preset_has_a_recipe_that_makes_a_run():
    assert RECIPES.keys() == PRESETS.keys()
    for preset, flow in PRESETS.items():
        config = load_config(TrainConfig, None, [f"preset={preset}"], store="s", run="a")
        assert (config.text_encoder is not None) == bool(flow.text_length) or preset == "tiny"


def test_accumulation_follows_from_one_batch_size():
    config = load_config(TrainConfig, None, ["store=s", "run=a", "ranks=2", "micro_batch_size=8"])
    assert (config.per_rank, config.micro, config.accumulation) == (16, 8, 2)


@pytest.mark.parametrize(("text", "snapshot"), [("1", "1"), ("1-ab12", "1-ab12"), ("newest", "newest")])
def test_a_snapshot_may_be_a_number(text, snapshot):
    assert load_config(TrainConfig, None, ["store=s", "run=a", f"snapshot={text}"]).snapshot == snapshot


def test_the_order_of_a_run_stays_and_its_cache_may_change():
    """A run that was recorded before the order could be chosen had what is the default now."""
    config = load_config(TrainConfig, None, ["store=s", "run=a"])
    recorded = config.model_dump(mode="json")
    check_same_config(config.model_copy(update={"cache_gib": 1.0}), recorded)
    other = config.model_copy(update={"order_block": 2048})
    earlier = {key: value for key, value in recorded.items() if not key.startswith("order_")}
    check_same_config(config, earlier)
    for theirs in (recorded, earlier):
        with pytest.raises(ConfigError, match="was started with order_block=256, the config"):
            check_same_config(other, theirs)
