"""Damaged checkpoints through the command line: ``python -m benchmarks.hostile [--cases N] [--only CASE ...]``.

Small checkpoints of several families, some with tokenizers, and results of ours are damaged (headers, offsets, shapes,
JSON, sizes, links, config.json, quantization_config, plan.yaml) and given to ``inspect``, ``fit`` or
``slimwright.load``, each in a forked child; so are checkpoints that others quantized, and adapters and configurations
of merges. A case holds if the exit code is 0, 1 or 2, stderr has one sentence and no
traceback, no error was unforeseen, it takes at most 20 s and 300 MB of anonymous memory more than its parent, and no
file appears or changes but OUT. Children verify in their own process and on few tokens, so that a case costs little.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import slimwright
from benchmarks.common import Row, exit_code, forked, publish, scratch
from slimwright.job import fit as fit_module
from slimwright.job import verify as verification
from slimwright.job.memory import anonymous_bytes
from slimwright.job.work import Work
from tests.checkpoint.mutations import Step, damage, mutations
from tests.families import FAMILIES, HIDDEN

SEED = 11
SECONDS, GROWTH = 20.0, 300_000_000
SOURCES = ("llama", "qwen2", "gemma3", "mixtral", "gpt_oss", "gpt2", "mamba", "bert", "t5", "vit")
RESULTS = ("llama", "mixtral", "bert", "gpt2")
OTHERS = ("gptq", "awq", "compressed-tensors", "fp8", "mxfp4", "bitsandbytes")
KINDS = (
    "files", "config", "both", "result files", "result config", "result both", "plan", "others' files",
    "others' config", "merge", "adapter",
)  # fmt: skip
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 63, 64, 65, 4096, 2**20, 2**31, 2**40, 2**63, 2**64, 10**30, 0.5, -0.0,
    1e-300, 1e300, float("inf"), float("nan"), "", "x", "\ud800", "../../x", "a" * 100_000,
    [], {}, [[]], [0] * 1000, [None], {"": {}},
    "llama", "bert", "t5", "mamba", "LlamaForCausalLM", "BertModel", "float16", "int8", "int4:g128", "nf4", "keep",
    "slimwright", "gptq", "int4:g0", "int4:g99999999999", "int9", "experts.[0-999999].w", "experts.[0-99999999999].w",
)  # fmt: skip
ADDED = (
    "auto_map", "quantization_config", "architectures", "model_type", "dtype", "torch_dtype", "rope_scaling",
    "rope_parameters", "text_config", "vision_config", "tie_word_embeddings", "num_hidden_layers", "layer_types",
    "is_encoder_decoder", "head_dim", "sub_configs", "per_layer_config", "id2label", "num_labels", "edits", "extra",
    "attn_implementation", "experts_implementation", "max_position_embeddings", "transformers_version",
)  # fmt: skip


# -- damage --------------------------------------------------------------------------------------------------------


def drawn(count: int, seed: int) -> list[list[Step]]:
    """Steps of damage to files, from the strategy of the tests."""
    found: list[list[Step]] = []

    @hypothesis_seed(seed)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(mutations())
    def draw(steps: list[Step]) -> None:
        found.append(steps)

    draw()
    return found


def edit(value: Any, choose: random.Random) -> Any:
    """A JSON value with one thing inside it changed, removed, added, or exchanged for another of its own values."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            walk(node[key])

    walk(value)
    if not places or choose.random() < 0.15:
        if isinstance(value, dict):
            value[choose.choice(ADDED)] = choose.choice(VALUES)
            return value
        return choose.choice(VALUES)
    node, key = choose.choice(places)
    action = choose.random()
    if action < 0.15:
        del node[key]
    elif action < 0.3:
        other, place = choose.choice(places)
        node[key] = json.loads(json.dumps(other[place])) if other is not node or place != key else None
    elif action < 0.5 and isinstance(node[key], int):
        node[key] = node[key] + choose.choice((-1, 1, node[key], -node[key] // 2))
    else:
        node[key] = choose.choice(VALUES)
    return value


def edit_json(file: Path, choose: random.Random, inside: str | None = None) -> None:
    """Edit a JSON file in one to three places, all inside one key if it is named."""
    if not file.is_file() or file.is_symlink():
        return
    try:
        value = json.loads(file.read_text())
        for _ in range(choose.randint(1, 3)):
            if inside is None:
                value = edit(value, choose)
            else:
                value[inside] = edit(value[inside], choose)
        file.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return


def edit_plan(file: Path, choose: random.Random) -> None:
    """Edit plan.yaml as a value or as text."""
    text = file.read_text()
    if choose.random() < 0.3:
        cut = choose.randrange(len(text))
        file.write_text(
            text[:cut]
            + choose.choice(("", "&a [*a]", "!!python/object:os.system x", "\0", ": :", "\t- x"))
            + text[cut + 3 :]
        )
        return
    value = yaml.safe_load(text)
    try:
        for _ in range(choose.randint(1, 3)):
            value = edit(value, choose)
        file.write_bytes(yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass"))
    except RecursionError:  # a value too deep to be edited again, or written
        return


def prepare(kind: str, directory: Path, bases: Path, choose: random.Random, steps: list[Step]) -> tuple[str, list[str]]:
    """Lay a damaged checkpoint into ``directory``; what was done, and the command to try."""
    if kind in ("merge", "adapter"):
        return "llama", prepare_merge(kind, directory, bases, choose)
    others = kind.startswith("others")
    family = choose.choice(OTHERS if others else RESULTS if kind.startswith("result") or kind == "plan" else SOURCES)
    packed = kind.startswith("result")
    model, out = directory / "model", str(directory / "out")
    shutil.copytree(bases / (f"{family}-result" if packed else family), model)
    if "files" in kind or "both" in kind:
        damage(model, steps)
    if "config" in kind or "both" in kind:
        inside = "quantization_config" if (packed or others) and choose.random() < 0.7 else None
        edit_json(model / "config.json", choose, inside)
        if choose.random() < 0.2:
            edit_json(model / choose.choice(TOKENIZER), choose)
    data = (
        ["--data", "none"] if choose.random() < 0.5 else ["--calibration-tokens", "256", "--calibration-length", "16"]
    )
    command = ["fit", str(model), "--size", "40%", *data, "--out", out]
    if kind == "plan":
        shutil.copy(bases / f"{family}-result" / "plan.yaml", directory / "plan.yaml")
        edit_plan(directory / "plan.yaml", choose)
        command = ["fit", str(model), "--plan", str(directory / "plan.yaml"), "--out", out]
    elif choose.random() < 0.3:
        command = ["inspect", str(model), *choose.choice(([], ["--json"]))]
    elif packed and choose.random() < 0.6:
        command = ["load", str(model)]
    return family, command


def prepare_merge(kind: str, directory: Path, bases: Path, choose: random.Random) -> list[str]:
    """A merge of two models whose configuration is damaged, or of a model and a damaged adapter; the command to try."""
    for name in ("one", "two"):
        shutil.copytree(bases / "llama", directory / name)
    file, out = directory / "merge.yaml", str(directory / "out")
    value: dict[str, Any] = {"method": "ties", "base": "one", "models": [{"model": "one"}, {"model": "two"}]}
    if choose.random() < 0.5:
        sources = [{"model": name, "layer_range": [0, 2]} for name in ("one", "two")]
        value = {"merge_method": "slerp", "base_model": "one", "slices": [{"sources": sources}]}
        value["parameters"] = {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.5}]}
    if kind == "merge":
        file.write_text(yaml.safe_dump(value))
        edit_plan(file, choose)
    else:
        shutil.copytree(bases / "adapter", directory / "adapter")
        edit_json(directory / "adapter" / "adapter_config.json", choose)
        if choose.random() < 0.6:
            weights = directory / "adapter" / "adapter_model.safetensors"
            content = bytearray(weights.read_bytes())
            header = int.from_bytes(content[:8], "little")
            for _ in range(choose.randint(1, 4)):
                content[choose.randrange(choose.choice((8, 8 + header, len(content))))] = choose.randrange(256)
            weights.write_bytes(bytes(content[: choose.choice((len(content), choose.randrange(len(content))))]))
        adapted = {"method": "linear", "models": ["one+adapter", "two"]}
        file.write_text(yaml.safe_dump(adapted))
    return ["merge", str(file), "--out", out, *choose.choice(([], ["--no-verify"], ["--dry-run"]))]


# -- one case ------------------------------------------------------------------------------------------------------


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything below a directory but OUT and what belongs to it."""
    found = {}
    for folder, names, files in os.walk(directory):
        if Path(folder) == directory:
            names[:] = [name for name in names if name not in ("out", "out.partial", ".out.scratch")]
        for name in names + files:
            status = os.lstat(os.path.join(folder, name))
            found[os.path.relpath(os.path.join(folder, name), directory)] = (
                status.st_size if name in files else 0, status.st_mtime_ns if name in files else 0,
            )  # fmt: skip
    return found


def act(command: list[str], directory: Path) -> None:
    """In the child: run a command as the user would."""
    tempfile.tempdir = str(directory / "tmp")
    os.chdir(directory)
    if command[0] == "load":
        try:
            slimwright.load(command[1])
        except slimwright.errors.SlimwrightError as error:
            print(f"slimwright: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
    else:
        from slimwright.cli import main as cli

        cli(command)


def watched(child: int) -> tuple[int | None, str | None, float]:
    """(exit status, what went wrong, seconds) of a child, which is killed when it is too slow or too large."""
    started, base = time.monotonic(), anonymous_bytes()
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - started
        if pid:
            return os.waitstatus_to_exitcode(status), None, seconds
        grown = anonymous_bytes(child) - base
        problem = f"memory grew by {grown / 1e6:.0f} MB" if grown > GROWTH else None
        # Time on the processor: other work on the machine must not fail a case. The wall has a wider limit.
        if _processor_seconds(child) > SECONDS or seconds > 6 * SECONDS:
            problem = f"no end after {SECONDS:.0f} s"
        if problem:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None, problem, seconds
        time.sleep(0.004)


def _processor_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def case(number: int, seed: int, bases: Path, directory: Path, steps: list[Step]) -> Row:
    """Prepare, run and judge one case."""
    choose = random.Random(seed * 1_000_003 + number)
    kind = KINDS[number % len(KINDS)]
    work = directory / f"case-{number}"
    (work / "tmp").mkdir(parents=True)
    family, command = prepare(kind, work, bases, choose, steps)
    before, output = snapshot(work), directory / f"output-{number}"
    status, problem, seconds = watched(forked(lambda: act(command, work), output))
    stderr = output.read_text(errors="replace")
    said = [line for line in stderr.splitlines() if line.startswith("slimwright: ")]
    after = snapshot(work)
    if problem is None:
        if status not in (0, 1, 2):
            problem = f"exit {status}"
        elif "Traceback" in stderr:
            problem = "traceback"
        elif "Unexpected" in stderr or any((work / "tmp").iterdir()):
            problem = "unforeseen error"
        elif status and len(said) != 1:
            problem = f"{len(said)} sentences"
        elif before != after:
            problem = f"touched {sorted(before.items() ^ after.items())[0][0]}"
        elif status and (work / "out").exists():
            problem = "failed but OUT exists"
        elif status == 0 and command[0] in ("fit", "merge") and "--dry-run" not in command and not _result(work):
            problem = "succeeded without a result"
    message = (said or stderr.strip().splitlines()[-1:] or [""])[0][:300]
    if problem is None:
        shutil.rmtree(work, ignore_errors=True)
    output.unlink()
    return {
        "case": number, "kind": kind, "family": family, "command": command[0], "status": status, "ok": problem is None,
        "problem": problem, "message": message.replace(str(directory), ""), "seconds": round(seconds, 2),
    }  # fmt: skip


def _result(work: Path) -> bool:
    return any((work / "out" / name).exists() for name in ("report.json", "adapter_config.json"))


def quantized_by_others(source: Path, method: str, experts: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, quantization_config) of a checkpoint as another program stores it, in that program's own layout."""
    from safetensors.torch import load_file

    from tests.formats.test_quantized import stream

    def words(codes: torch.Tensor) -> torch.Tensor:
        return torch.tensor([stream(row, 4) for row in codes.tolist()], dtype=torch.int32)

    files = sorted((experts if method == "mxfp4" else source).glob("*.safetensors"))
    tensors: dict[str, Any] = {}
    for name, tensor in (pair for file in files for pair in load_file(file).items()):
        inside = name.endswith(("gate_up_proj", "down_proj") if method == "mxfp4" else "_proj.weight")
        if not inside:
            tensors[name] = tensor
            continue
        base, weight = name.removesuffix(".weight"), tensor.float()
        out = weight.shape[0]
        codes = (weight * 32 + 8).round().clamp(0, 15).int()
        if method == "gptq":
            tensors[f"{base}.qweight"] = words(codes).t().contiguous()
            tensors[f"{base}.qzeros"] = torch.full((1, out // 8), 0x77777777, dtype=torch.int32)
            tensors[f"{base}.scales"] = torch.full((1, out), 1 / 32, dtype=torch.float16)
            tensors[f"{base}.g_idx"] = torch.zeros(weight.shape[1], dtype=torch.int32)
        elif method == "awq":
            order = torch.tensor((0, 2, 4, 6, 1, 3, 5, 7))
            tensors[f"{base}.qweight"] = words(codes.t().unflatten(1, (-1, 8))[..., order].flatten(1))
            tensors[f"{base}.qzeros"] = torch.full((1, out // 8), -0x77777778, dtype=torch.int32)
            tensors[f"{base}.scales"] = torch.full((1, out), 1 / 32, dtype=torch.float16)
        elif method == "compressed-tensors":
            tensors[f"{base}.weight_packed"] = words(codes)
            tensors[f"{base}.weight_scale"] = torch.full((out, 1), 1 / 32)
            tensors[f"{base}.weight_shape"] = torch.tensor(weight.shape)
        elif method == "fp8":
            tensors[f"{base}.weight"] = weight.to(torch.float8_e4m3fn)
            tensors[f"{base}.weight_scale_inv"] = torch.ones(-(-out // 32), -(-weight.shape[1] // 32))
        elif method == "mxfp4":
            codes = codes.transpose(1, 2).contiguous().unflatten(2, (-1, 16, 2))
            tensors[f"{name}_blocks"] = (codes[..., 0] | (codes[..., 1] << 4)).to(torch.uint8)
            tensors[f"{name}_scales"] = torch.full(codes.shape[:3], 120, dtype=torch.uint8)
        else:
            flat = codes.flatten()
            state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
            tensors[name] = (flat[0::2] << 4 | flat[1::2]).to(torch.uint8)[:, None]
            tensors[f"{name}.absmax"] = torch.full((flat.numel() // 64,), 0.25)
            tensors[f"{name}.quant_map"] = torch.linspace(-1, 1, 16)
            tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode())).byte()
    settings: dict[str, Any] = {"quant_method": method, "bits": 4, "group_size": -1 if method == "gptq" else HIDDEN}
    settings |= {
        "awq": {"version": "gemm", "zero_point": True}, "fp8": {"weight_block_size": [32, 32]},
        "compressed-tensors": {"format": "pack-quantized", "config_groups": {}}, "bitsandbytes": {"load_in_4bit": True},
    }.get(method, {})  # fmt: skip
    return tensors, settings


def make_bases(directory: Path) -> None:
    """Sources in two shards with a tokenizer of as many tokens as they have embeddings, and results of some."""
    from huggingface_hub import save_torch_state_dict
    from peft import LoraConfig, get_peft_model

    from tests.families import VOCABULARY, make

    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet)
    words.train_from_iterator([inspect.getsource(argparse)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    for name in SOURCES:
        model = make(name, torch.bfloat16)
        half = sum(t.nbytes for t in model.state_dict().values()) * 11 // 20
        model.save_pretrained(directory / name, max_shard_size=half)
        tokenizer.save_pretrained(directory / name)
    for name in OTHERS:
        source = directory / ("gpt_oss" if name == "mxfp4" else "llama")
        tensors, settings = quantized_by_others(source, name, directory / "gpt_oss")
        shutil.copytree(source, directory / name, ignore=shutil.ignore_patterns("model*"))
        save_torch_state_dict(
            tensors, directory / name, max_shard_size=sum(t.nbytes for t in tensors.values()) * 11 // 20
        )
        config = json.loads((source / "config.json").read_text()) | {"quantization_config": settings}
        (directory / name / "config.json").write_text(json.dumps(config))
    adapted = get_peft_model(make("llama", torch.bfloat16), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    adapted.save_pretrained(directory / "adapter")
    for name in RESULTS:
        total = sum(f.stat().st_size for f in (directory / name).glob("*.safetensors"))
        fit_module.fit(
            str(directory / name), str(directory / f"{name}-result"), size="40%", data="none", quiet=True,
            max_shard_bytes=int(total * 0.4 * 0.55),
        )  # fmt: skip


def main() -> list[Row]:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cases", type=int, default=1000)
    arguments.add_argument("--only", type=int, nargs="*", help="numbers of single cases")
    arguments.add_argument("--seed", type=int, default=SEED)
    arguments.add_argument("--workers", type=int, default=3)
    arguments.add_argument("--keep", action="store_true", help="leave the directories of failed cases")
    options = arguments.parse_args()
    started = time.time()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    Work._verify_in_fresh_process = (  # type: ignore[method-assign]
        lambda self, held, spec, step: verification.verify(
            dataclasses.replace(spec, tokens=256, batch_tokens=256, sample=False), step, "this process"
        )
    )
    assert FAMILIES
    rows: list[Row] = []
    with scratch("hostile") as directory:
        bases = directory / "bases"
        maker = forked(lambda: make_bases(bases))  # in a child: fitting starts threads, and what comes next forks
        if os.waitstatus_to_exitcode(os.waitpid(maker, 0)[1]) != 0:
            raise SystemExit("the undamaged checkpoints could not be made or fitted")
        all_steps = drawn(options.cases, options.seed)
        numbers = range(options.cases) if options.only is None else options.only
        workers = []
        for worker in range(options.workers):

            def work(worker: int = worker) -> None:
                with open(directory / f"rows-{worker}", "w") as file:
                    for number in list(numbers)[worker :: options.workers]:
                        row = case(number, options.seed, bases, directory, all_steps[number % len(all_steps)])
                        file.write(json.dumps(row) + "\n")
                        file.flush()
                        if not row["ok"]:
                            print(json.dumps(row), flush=True)

            workers.append(forked(work))
        if any([os.waitpid(worker, 0)[1] for worker in workers]):
            raise SystemExit("a worker failed")
        for worker in range(options.workers):
            rows += map(json.loads, (directory / f"rows-{worker}").read_text().splitlines())
        rows.sort(key=lambda row: row["case"])
        if options.keep:
            shutil.copytree(directory, "/tmp/slimwright-hostile", dirs_exist_ok=True, symlinks=True)
    summary = []
    for kind in KINDS:
        own = [row for row in rows if row["kind"] == kind]
        counts = Counter(row["status"] for row in own)
        problems = Counter(row["problem"] for row in own if row["problem"])
        summary.append({
            "kind": kind, "cases": len(own), "accepted": counts[0], "failed": counts[1], "refused": counts[2],
            "slowest": max((row["seconds"] for row in own), default=0.0), "ok": not problems,
            "problems": ", ".join(f"{problem}: {count}" for problem, count in problems.most_common()),
        })  # fmt: skip
    columns = {
        "kind": "damage to", "cases": "cases", "accepted": "exit 0", "failed": "exit 1", "refused": "exit 2",
        "slowest": "slowest, s", "ok": "ok", "problems": "problems",
    }  # fmt: skip
    return publish("hostile", summary, columns, started, seed=options.seed, cases=rows)


if __name__ == "__main__":
    sys.exit(exit_code(main()))
