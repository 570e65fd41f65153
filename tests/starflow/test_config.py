"""Configuration errors say what to change."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field, model_validator

from starflow.config import Config, load_config
from starflow.errors import ConfigError


class Optimizer(Config):
    lr: float = Field(default=1e-3, gt=0)


class Run(Config):
    name: str
    steps: int = 10
    optimizer: Optimizer = Optimizer()


def test_file_then_values_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: a\nsteps: 1\noptimizer: {lr: 0.1}\n")
    run = load_config(Run, file, ["optimizer.lr=0.3"], name="b", steps=None)
    assert run == Run(name="b", steps=1, optimizer=Optimizer(lr=0.3))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "name is missing"),
        (["name=a", "stepps=3"], "unknown key stepps, did you mean steps?"),
        (["name=a", "steps=many"], "steps = 'many'"),
        (["name=a", "optimizer.lr=-1"], "optimizer.lr = -1"),
        (["name=a", "steps"], "not of the form key=value"),
        (["name=a", "steps=[1"], "not valid YAML"),
        (["name=a", "name.x=1"], "not a group"),
    ],
)
def test_errors_name_key_value_and_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        load_config(Run, None, overrides)


@pytest.mark.parametrize(("text", "message"), [(None, "does not exist"), ("- 1", "holds a list"), ("a: [", "YAML")])
def test_unreadable_files(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(Run, file)


class Words(Config):
    words: tuple[str, ...] = ()
    flag: bool = False


@pytest.mark.parametrize("word", ["no", "NO", "yes", "on", "off", "y", "n"])
def test_words_that_older_yaml_takes_for_booleans(tmp_path: Path, word: str) -> None:
    """Norwegian is a language."""
    file = tmp_path / "run.yaml"
    file.write_text(f"words: [{word}, en]\n")
    assert load_config(Words, file).words == (word, "en")
    assert load_config(Words, None, [f"words=[{word}]", f"flag={word}"]).flag is (word in ("yes", "on", "y"))
    assert load_config(Words, None, ["flag=true"]).flag


class Range(Config):
    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def _check(self) -> Range:
        if self.low > self.high:
            raise ValueError("low is above high; swap them")
        return self


def test_an_error_of_the_whole_model_is_its_message_only() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Range, None, ["low=2"])
    assert str(caught.value) == "configuration: low is above high; swap them"
