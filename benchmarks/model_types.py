"""Every model type that transformers knows, made small: ``python -m benchmarks.model_types [TYPE ...] [--of causal]``.

The families of the tests are configured by hand. Here the default configuration of every other type is cut down by
rules (a few layers, 64 wide), built with random weights, and fit to 40 %, without data and calibrated, each verified in
this process. A type whose configuration the rules cannot cut, or whose own forward fails, is no failure: the row says
why. It is one if a job ends in anything but a result or one sentence.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto

import slimwright
from benchmarks.common import Row, exit_code, publish, scratch
from slimwright.errors import SlimwrightError
from slimwright.job import verify as verification
from slimwright.job.work import Work
from slimwright.model.inputs import dummy_inputs
from tests.families import FAMILIES

TABLES = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
}
MOST_PARAMETERS = 20_000_000
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("embedding_size", "moe_intermediate_size", "expert_intermediate_size", "lru_width"), 64),
    **dict.fromkeys(("shared_expert_intermediate_size", "expert_ffn_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "d_inner", "encoder_ffn_dim"), 128),
    **dict.fromkeys(("decoder_ffn_dim", "mamba_d_ssm", "ffn_hidden_size"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "mamba_n_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "d_kv", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "mamba_d_head", "sliding_window", "image_size", "qk_head_dim"), 32),
    "hidden_size_per_layer_input": 16, "zero_expert_num": 1, "vocab_size": 320, "vocab_size_per_layer_input": 320,
    "rotary_dim": 8, "patch_size": 8, "num_labels": 10, "num_kv_shared_layers": 0, "depths": [1, 1],
    "hidden_sizes": [32, 64], "initializer_range": 0.1, "init_std": 0.1, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
"""Values of whatever keys a configuration has."""


def small(kind: type[Any]) -> Any:
    """A small configuration of a class."""
    default = kind()
    values = {key: value for key, value in SMALL.items() if hasattr(default, key)}
    if getattr(default, "num_key_value_heads", None) == getattr(default, "num_attention_heads", 0):
        values.pop("num_key_value_heads", None)
    try:
        return kind(**values)
    except Exception:
        return kind(**{key: value for key, value in values.items() if key != "head_dim"})


def built(kind: type[Any], model_class: type[PreTrainedModel], directory: Path) -> int:
    """Write a model of random weights; its parameters.

    Raises:
        ValueError: too large even so, or its own forward fails.
    """
    torch.manual_seed(0)
    config = small(kind)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count:,} parameters")
    model = model_class(config).eval()
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    with torch.no_grad():
        model(**dummy_inputs(model))
    model.save_pretrained(directory)
    return count


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, with 320 or fewer tokens."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<mask>": 3}
    alphabet = {c: i + len(special) for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab={**special, **alphabet}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    )


def tried(function: Callable[[], Any]) -> tuple[str, bool]:
    """What came of a job, and whether that is allowed: a result, or one sentence."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            function()
    except SlimwrightError as error:
        said = str(error)
        return said, "was not published" not in said and "verifying process failed" not in said
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200], False
    return "done", True


def row_of(table: str, kind: type[Any], model_class: type[PreTrainedModel], folder: Path) -> Row:
    """One type."""
    row: Row = {"of": table, "type": kind.model_type}
    directory = folder / "model"
    try:
        row["parameters"] = built(kind, model_class, directory)
    except Exception as error:
        return row | {"note": f"not made: {type(error).__name__}: {str(error)[:120]}"}
    tokenizer().save_pretrained(directory)
    few: dict[str, Any] = {"calibration_tokens": 1024, "calibration_length": 64, "eval_tokens": 512}
    for name, options in (("plain", {"data": "none"}), ("calibrated", few)):
        out = folder / name
        found, allowed = tried(lambda: slimwright.fit(str(directory), size="40%", out=out, quiet=True, **options))  # noqa: B023
        row[name] = found if found != "done" else True
        row["ok"] = row.get("ok", True) and allowed
        if found != "done":
            break
        row["error"] = json.loads((out / "report.json").read_text())["verified"]["logits_error"]
    return row


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("types", nargs="*")
    arguments.add_argument("--of", nargs="*", choices=list(TABLES), default=list(TABLES))
    asked = arguments.parse_args()
    started = time.time()
    torch.set_num_threads(1)
    Work._verify_in_fresh_process = (  # type: ignore[method-assign]
        lambda self, held, spec, step: verification.verify(spec, step, "this process")
    )
    known = {family.config().model_type for family in FAMILIES.values()}
    rows: list[Row] = []
    with scratch("model-types") as folder:
        for table in asked.of:
            for kind, model_class in TABLES[table].items():
                if kind.model_type in asked.types or (not asked.types and kind.model_type not in known):
                    own = folder / f"{table}-{kind.model_type}"
                    own.mkdir()
                    first = model_class[0] if isinstance(model_class, tuple) else model_class
                    rows.append(row_of(table, kind, first, own))
                    shutil.rmtree(own)
                    print(json.dumps(rows[-1]), flush=True)
    columns = {"of": "table", "type": "type", "plain": "without data", "calibrated": "calibrated", "error": "logits",
               "note": "note", "ok": "ok"}  # fmt: skip
    return exit_code(publish("model_types", rows, columns, started))


if __name__ == "__main__":
    sys.exit(main())
