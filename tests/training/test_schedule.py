import pytest

from training.config import TrainConfig
from training.schedule import learning_rate


def config(**values):
    return TrainConfig.model_validate(
        {"store": "s", "run": "r", "preset": "tiny", "steps": 100, "warmup_steps": 10, "learning_rate": 1.0,
         "final_learning_rate": 0.1, **values}
    )  # fmt: skip


def test_cosine_warms_up_and_ends_at_the_final_rate():
    rates = [learning_rate(config(), step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == max(rates) == 1.0
    assert rates[99] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[54] == pytest.approx(0.55, abs=0.02)


def test_warmup_stable_decay_holds_then_falls():
    rates = [learning_rate(config(schedule="warmup-stable-decay", decay_steps=20), step) for step in range(100)]
    assert set(rates[9:81]) == {1.0}
    assert rates[99] == pytest.approx(0.1)
    assert rates[90] == pytest.approx(1 - 0.9 * 10 / 19)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_runs_shorter_than_their_warmup(steps):
    assert all(0 < learning_rate(config(steps=steps), step) <= 1 for step in range(steps))
