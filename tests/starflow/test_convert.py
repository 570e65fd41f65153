"""The released layout: exact both ways, and every misfit named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from starflow.convert import (
    WeightsError,
    build,
    export_released,
    import_released,
    load_released,
    read_model,
    released_names,
    to_released,
    write_safetensors,
)
from starflow.model import FlowConfig
from tests.starflow.flows import LABELS, PLAIN, TEXT, random_flow

VECTORS = Path(__file__).parent.parent / "vectors"
NAMES = ["tiny_square", "tiny_wide"]


def architecture(name: str) -> FlowConfig:
    return FlowConfig.from_released(json.loads((VECTORS / f"{name}.json").read_text()))


def released(name: str) -> dict[str, torch.Tensor]:
    return torch.load(VECTORS / f"{name}.checkpoint.pth", weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_import_and_export_are_inverse_bit_for_bit(name: str, tmp_path: Path) -> None:
    config = architecture(name)
    import_released(VECTORS / f"{name}.checkpoint.pth", config, tmp_path / "model")
    export_released(tmp_path / "model", tmp_path / "again.pth")
    before, after = released(name), torch.load(tmp_path / "again.pth", weights_only=True)
    assert after.keys() == released_names(config).keys()
    assert all(torch.equal(before[key].view(torch.int32), after[key].view(torch.int32)) for key in after)
    dropped = before.keys() - after.keys()
    assert all(key == "var" or key.endswith("attn_mask") or key.startswith("feat_rope.") for key in dropped)


def test_imported_weights_are_the_model(tmp_path: Path) -> None:
    config = architecture("tiny_wide")
    import_released(VECTORS / "tiny_wide.checkpoint.pth", config, tmp_path)
    read, tensors = read_model(tmp_path)
    assert read == config
    flow = build(read, tensors)
    expected = load_released(VECTORS / "tiny_wide.checkpoint.pth", config)
    assert not flow.training
    for (name, ours), (other, theirs) in zip(flow.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_import_keeps_the_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    state = to_released(random_flow(TEXT).to(dtype).state_dict(), TEXT)
    torch.save(state, tmp_path / "weights.pth")
    import_released(tmp_path / "weights.pth", TEXT, tmp_path / "model")
    ours = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in ours.values()} == {dtype}
    assert load_released(tmp_path / "weights.pth", TEXT).blocks[0].start.dtype == torch.float32


def test_safetensors_are_read_like_pth(tmp_path: Path) -> None:
    save_file(to_released(random_flow(PLAIN).state_dict(), PLAIN), tmp_path / "weights.safetensors")
    flow = load_released(tmp_path / "weights.safetensors", PLAIN)
    for ours, theirs in zip(flow.parameters(), random_flow(PLAIN).parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.surprise": torch.zeros(1)}, "unknown key blocks.0.surprise"),
        ({"blocks.1.final_norm.weight": None}, "missing key blocks.1.final_norm.weight"),
        ({"blocks.1.final_norm.weight": torch.zeros(65)}, r"blocks.1.final_norm.weight has shape \(65,\).*\(64,\)"),
    ],
)
def test_misfits_are_named(change: dict, message: str, tmp_path: Path) -> None:
    state = {**to_released(random_flow(TEXT).state_dict(), TEXT), **change}
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=message):
        load_released(tmp_path / "weights.pth", TEXT)
    with pytest.raises(WeightsError, match=message):
        import_released(tmp_path / "weights.pth", TEXT, tmp_path / "model")
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_unusable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"missing\.pth does not exist"):
        load_released(tmp_path / "missing.pth", TEXT)
    (tmp_path / "noise.pth").write_bytes(b"not a state dict")
    (tmp_path / "noise.safetensors").write_bytes(b"nor this")
    for name in ("noise.pth", "noise.safetensors"):
        with pytest.raises(WeightsError, match=rf"{name} is not what torch\.save or safetensors writes"):
            load_released(tmp_path / name, TEXT)
    torch.save({"weights": [1, 2]}, tmp_path / "nested.pth")
    with pytest.raises(WeightsError, match="flat state dict"):
        load_released(tmp_path / "nested.pth", TEXT)
    with pytest.raises(WeightsError, match="not a model folder"):
        read_model(tmp_path)


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weights": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"evil\.pth"):
        load_released(tmp_path / "evil.pth", TEXT)
    assert not (tmp_path / "ran").exists()


def test_class_conditional_models_have_no_released_layout() -> None:
    with pytest.raises(WeightsError, match="label"):
        to_released(random_flow(LABELS).state_dict(), LABELS)


def test_build_names_what_does_not_fit() -> None:
    state = random_flow(TEXT).state_dict()
    with pytest.raises(WeightsError, match=r"missing parameter blocks\.0\.start"):
        build(TEXT, ((name, tensor) for name, tensor in state.items() if name != "blocks.0.start"))
    with pytest.raises(WeightsError, match="unknown parameter extra"):
        build(TEXT, [("extra", torch.zeros(1))])


def test_an_interrupted_write_leaves_no_file(tmp_path: Path) -> None:
    path, layout = tmp_path / "x.safetensors", {"a": (torch.float32, torch.Size([2]))}
    with pytest.raises(ValueError, match="shorter"):
        write_safetensors(path, layout, [])
    assert not path.exists()
    write_safetensors(path, layout, [("a", torch.tensor([1.0, 2.0]))])
    assert load_file(path)["a"].tolist() == [1.0, 2.0]
