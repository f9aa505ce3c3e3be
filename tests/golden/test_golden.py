"""Every released format version is read forever, to the same values."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import slimwright
from slimwright.runtime.format import FORMAT_VERSION
from slimwright.weights import Grid, decode_rows, parse_form
from tests.golden.make import IDS

VERSIONS = sorted(path for path in Path(__file__).parent.iterdir() if path.name.startswith("v"))


def test_the_current_version_has_a_golden_directory() -> None:
    assert [path.name for path in VERSIONS] == [f"v{number}" for number in range(1, FORMAT_VERSION + 1)]


@pytest.mark.parametrize("directory", VERSIONS, ids=lambda path: path.name)
def test_grids_decode_to_the_same_values(directory: Path) -> None:
    tensors = load_file(directory / "grids.safetensors")
    specs = sorted({name.split("/")[0] for name in tensors})
    assert len(specs) >= 17
    for spec in specs:
        parts = {
            name.removeprefix(f"{spec}/part"): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{spec}/part")
        }
        dense, wanted = decode_rows(parse_form(spec), parts, (6, 256), slice(0, 6)), tensors[f"{spec}/dense"]
        if isinstance(parse_form(spec), Grid):
            assert torch.equal(dense, wanted), spec
        else:  # the last digits of a product are the machine's
            torch.testing.assert_close(dense, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("directory", VERSIONS, ids=lambda path: path.name)
def test_the_model_gives_the_same_logits(directory: Path) -> None:
    config = json.loads((directory / "model" / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == int(directory.name[1:])
    assert len(config["quantization_config"]["grids"]) >= 5
    expected = load_file(directory / "logits.safetensors")["logits"]
    for model in (
        AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32),
        slimwright.load(directory / "model", dtype=torch.float32),
    ):
        with torch.no_grad():
            logits = model(IDS).logits
        assert torch.allclose(logits, expected, atol=1e-5 * float(expected.abs().max()))
