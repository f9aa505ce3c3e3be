"""Writes a golden directory of the current format version: ``python -m tests.golden.make tests/golden/v2``.

Run once per released format version and never again for an old one: what is here must be read by every later version.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from slimwright.job.fit import fit
from slimwright.methods import SiteStatistics, solver_for
from slimwright.plan import Assignment, Plan, method_on
from slimwright.weights import matrix_shape, parse_form

GRIDS = (
    "int2:g16", "int3:g32", "int4:g32", "int4:g100", "int5:row", "int6:g64:sym", "int7:g32:real", "int8:g64", "nf4",
    "nf4:single", "fp8", "fp8:tensor", "mxfp4", "q4_0", "q8_0", "q4_k", "q6_k",
    "lowrank:r3", "lowrank:r4:int8:g64", "int3:g32+lowrank:r2", "nf4+lowrank:r5:int4:row",
)  # fmt: skip
MODEL_GRIDS = (
    "int4:g32", "lowrank:r24", "int2:g16+lowrank:r6", "int3:g32", "int5:row+lowrank:r4:int8:row", "nf4", "mxfp4",
)  # fmt: skip
IDS = torch.arange(3, 19).reshape(2, 8)


def make(directory: Path) -> None:
    """Write ``grids.safetensors`` (parts and the dense values they stand for) and ``model/`` (a packed tiny Llama with
    the logits that it gave)."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(6, 256, generator=generator)
    tensors = {}
    for spec in GRIDS:
        form = parse_form(spec)
        value = solver_for(str(method_on(spec, "quantize/rtn,clip=none")), form).solve(weight, SiteStatistics.none())
        assert matrix_shape(value.shape) == (6, 256) and form.spec == spec
        tensors[f"{spec}/dense"] = value.dense().contiguous()
        tensors |= {f"{spec}/part{suffix}": part.contiguous() for suffix, part in value.save().items()}
    directory.mkdir(parents=True)  # an old version is never overwritten
    save_file(tensors, directory / "grids.safetensors")

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2, max_position_embeddings=64,
    )  # fmt: skip
    source = directory / "source"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    import slimwright

    groups = slimwright.inspect(str(source)).choice_groups()
    plan = Plan(
        assignments={
            group: Assignment(grid=spec, method=method_on(spec, "quantize/rtn"))
            for index, group in enumerate(groups)
            for spec in [MODEL_GRIDS[index % len(MODEL_GRIDS)]]
        }
    )
    (directory / "plan.yaml").write_text(plan.to_yaml())
    fit(str(source), str(directory / "out"), plan=str(directory / "plan.yaml"), quiet=True)
    model = LlamaForCausalLM.from_pretrained(directory / "out", dtype=torch.float32)
    with torch.no_grad():
        save_file({"logits": model(IDS).logits}, directory / "logits.safetensors")
    (directory / "model").mkdir()
    for name in ("config.json", "model.safetensors", "plan.yaml"):
        shutil.copy(directory / "out" / name, directory / "model" / name)
    for name in ("source", "out", "plan.yaml"):
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    make(Path(sys.argv[1]))
