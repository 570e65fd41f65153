"""What later stages could not use is said before any server is asked."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.encode_plan import EncodeConfig
from starflow.encoders import EncoderError
from starflow.errors import ConfigError, StarflowError
from tests.pipelines.fake_crawl import (
    Bench,
    fake_encode,
    png,
    url,
)


def test_a_public_host_needs_a_contact(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="contact"):
        bench.refresh(bench.write_list({url(0): png(0)}), contact="")
    assert bench.refresh(bench.write_list({url(0): png(0)}), contact="", allow_host=("pictures.example",)).added == 1


def test_other_latents_than_the_parents_are_refused_before_any_request(bench: Bench) -> None:
    bench.refresh(bench.write_list({url(0): png(0)}))
    listed = bench.write_list({url(0): png(0), url(1): png(1)}, "longer")
    with pytest.raises(ConfigError, match=r"hold 32 px latents of VAE emoji; set image_size=32, or"):
        bench.refresh(listed, image_size=64)
    with pytest.raises(ConfigError, match=r"set image_size=32 and vae=emoji, or use another store"):
        bench.refresh(listed, image_size=64, vae="other")
    assert bench.web.requests[url(1)] == 0
    assert bench.refresh(listed).added == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "nowhere:f"}, "score 'nowhere:f' cannot be imported"),
        ({"languages": ("english",)}, "'english' is not known"),
        ({"captioner": "http://127.0.0.1:9/v1"}, "set captioner_model"),
    ],
)
def test_settings_that_later_stages_cannot_use_are_said_before_any_request(
    bench: Bench, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(StarflowError, match=message):
        bench.refresh(bench.write_list({url(0): png(0)}), **settings)
    assert not bench.web.requests


def test_an_empty_list_is_refused(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="empty"):
        bench.refresh(bench.write_list({}))


def test_encode_settings_are_passed_on_by_name(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EncodeConfig] = []

    def encode(store: Any, tables: Any, config: EncodeConfig, work: str, on_progress: Any) -> Any:
        seen.append(config)
        return fake_encode(store, tables, config, work, on_progress)

    monkeypatch.setattr("pipelines.encode.encode", encode)
    settings = {"image_size": 48, "patch": 2, "actors": 3, "gpus_per_actor": 0.5, "text_length": 9, "vae": "x"}
    bench.refresh(bench.write_list({url(0): png(0)}), **settings, ray_address="auto", vae_batch=7)
    assert seen[0].model_dump(include=set(settings)) == settings
    assert (seen[0].address, seen[0].vae_batch, seen[0].text_encoder) == ("auto", 7, "minilm")
    assert seen[0].aspect_ratios == EncodeConfig().aspect_ratios


@pytest.mark.parametrize(
    "settings",
    [{"vae": "someone/nothing"}, {"text_encoder": "nothing"}, {"captioner": "nothing"}, {"vae": "not--nothing"}],
)
def test_a_model_that_cannot_be_had_is_said_before_any_request(bench: Bench, settings: dict[str, Any]) -> None:
    listed = bench.write_list({url(0): png(0)})
    with pytest.raises(EncoderError, match=r"cannot load the .* '(someone/|not--)?nothing'.*hf download"):
        bench.refresh(listed, **settings)
    assert not bench.web.requests
    if "captioner" not in settings:  # the cluster may have it
        assert bench.refresh(listed, **settings, ray_address="auto").added == 1


def test_a_misspelt_name_is_answered_with_that_of_the_shipped_model(bench: Bench) -> None:
    with pytest.raises(EncoderError, match="write emoji for the one that is shipped"):
        bench.refresh(bench.write_list({url(0): png(0)}), vae="emojii")
    (bench.folder / "empty").mkdir()
    with pytest.raises(EncoderError, match=r"the VAE .*empty' from that folder: it holds no config.json"):
        bench.refresh(bench.write_list({url(0): png(0)}), vae=str(bench.folder / "empty"))


def test_a_list_without_captions_is_refused_while_filters_ask_for_some(bench: Bench) -> None:
    bench.write_list({url(0): png(0)})
    listed = bench.folder / "list.txt"
    listed.write_text(url(0) + "\n")
    with pytest.raises(ConfigError, match="set min_text=0, or name a captioner"):
        bench.refresh(listed)
    with pytest.raises(ConfigError, match="has no captions"):
        bench.refresh(bench.folder / "list.parquet", caption_column=None)
    assert not bench.web.requests
    assert bench.refresh(listed, min_text=0).added == 1


def test_block_hosts_are_compared_in_one_spelling(bench: Bench) -> None:
    listed = bench.write_list({url(0): png(0), "http://xn--bcher-kva.example/1.png": png(1)})
    result = bench.refresh(listed, block_hosts=("Bücher.example.",))
    assert (result.added, result.dropped) == (1, {"blocked_host": 1})
    with pytest.raises(ValueError, match=r"host 'a\.\.b' is not a valid name"):
        bench.refresh(listed, block_hosts=("a..b",))
    for asked in ("https://example.org/", "*.example.org", "example.org:80"):
        with pytest.raises(ValueError, match="is not a name or address alone"):
            bench.refresh(listed, block_hosts=(asked,))
