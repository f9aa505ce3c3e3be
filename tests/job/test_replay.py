"""Models whose blocks remember: the guard finds them, and whole forwards calibrate them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from slimwright.calibrate.replay import runs_apart
from slimwright.calibrate.walk import Batch
from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.job.open import model_of
from slimwright.job.source import PlainSource
from slimwright.job.walked import WalkSource
from slimwright.model.discover import discover
from slimwright.runtime.streamed import load_streamed
from tests.families import HomeMadeConfig, HomeMadeForCausalLM, HomeMadeLayer, make
from tests.job.conftest import fitted

FEW: dict[str, Any] = {"calibration_tokens": 512, "calibration_length": 16, "data": None}


class RememberingConfig(HomeMadeConfig):
    model_type = "remembering"

    def __init__(self, **values: Any) -> None:
        HomeMadeConfig.__init__(self, **values)


class RememberingLayer(HomeMadeLayer):
    """Adds what it was given before in the same forward of the model."""

    memory: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        given = hidden_states if self.memory is None else hidden_states + 0.5 * self.memory
        self.memory = hidden_states
        return super().forward(given)


class RememberingForCausalLM(HomeMadeForCausalLM):
    config_class = RememberingConfig
    _no_split_modules = ["RememberingLayer"]

    def __init__(self, config: RememberingConfig) -> None:
        super().__init__(config)
        for index in range(config.depth):
            self.stages[index] = RememberingLayer(config)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        for stage in self.stages:
            stage.memory = None
        return super().forward(input_ids)


AutoConfig.register("remembering", RememberingConfig, exist_ok=True)
AutoModelForCausalLM.register(RememberingConfig, RememberingForCausalLM, exist_ok=True)


@pytest.fixture(scope="module")
def remembering(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("remembering") / "model"
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = RememberingConfig(**ids, tie_word_embeddings=True, use_cache=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RememberingForCausalLM(config).eval()
    model.load_state_dict(make("home_made").state_dict())
    model.save_pretrained(directory)
    return str(directory)


def apart(directory: str) -> bool:
    source = Checkpoint.open(directory)
    structure = discover(source)
    sources = {name: WalkSource(PlainSource(source, site)) for name, site in structure.sites.items()}
    cls, config = model_of(source)
    model = load_streamed(cls, source.model_path, config, sources)
    batch = Batch({"input_ids": torch.arange(24).reshape(2, 12)})
    return runs_apart(model, structure, batch)


def test_the_guard_tells_them_apart(remembering: str, tmp_path: Path) -> None:
    assert not apart(remembering)
    make("home_made").save_pretrained(tmp_path / "model")
    assert apart(str(tmp_path / "model"))


def test_a_block_that_fails_when_it_is_run_again_is_told_too(remembering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """XLM's attention puts the keys of the first run beside those of the second, and its mask is too short then."""

    def forward(self: RememberingLayer, hidden_states: Tensor) -> Tensor:
        if self.memory is not None:
            raise RuntimeError("The expanded size of the tensor must match the existing size.")
        self.memory = hidden_states
        return HomeMadeLayer.forward(self, hidden_states)

    monkeypatch.setattr(RememberingLayer, "forward", forward)
    assert not apart(remembering)


def test_whole_forwards_calibrate_what_remembers(remembering: str, tmp_path: Path) -> None:
    """The same weights without the memory give the same statistics, for a plain forward never uses it."""
    options = {"grid": "int4:g32", "method": "quantize/gptq", **FEW}
    report = fitted(remembering, tmp_path / "out", **options)
    assert report["verified"]["ok"] and any("run apart" in note for note in report["notes"])
    make("home_made").save_pretrained(tmp_path / "model")
    plain = fitted(str(tmp_path / "model"), tmp_path / "plain", **options)
    assert not any("run apart" in note for note in plain["notes"])
    calibrated = {line["site"]: line for line in report["ledger"] if line["state"] == "calibrated"}
    assert calibrated.keys() == {line["site"] for line in plain["ledger"] if line["state"] == "calibrated"}
    for line in plain["ledger"]:
        if line["site"] in calibrated:
            assert line["tokens"] == calibrated[line["site"]]["tokens"]
            assert line["error_after"] == pytest.approx(calibrated[line["site"]]["error_after"], rel=0.02)


def test_a_budget_is_searched_without_sensitivities(remembering: str, tmp_path: Path) -> None:
    report = fitted(remembering, tmp_path / "out", size="40%", method="quantize/gptq", **FEW)
    assert report["verified"]["ok"]
    assert 0.99 * report["budget"]["bytes"] <= report["size"]["after"] <= report["budget"]["bytes"]


def test_tokens_cannot_be_weighed_there(remembering: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be run apart"):
        fitted(remembering, tmp_path / "out", grid="int4:g32", method="quantize/rsq", folds=["none"], **FEW)
