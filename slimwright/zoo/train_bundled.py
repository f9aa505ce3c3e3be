"""Trains the bundled LM on this machine: `python -m slimwright.zoo.train_bundled OUT`.

A small Llama on the train part of the standard library's text. Its shapes are chosen so that every format takes it:
widths are multiples of 256 (the longest block of GGUF's k-quants), pairs of queries share keys, embedding and head tie.
Progress is judged on the calibrate part; the held-out part is read once, by `bits_per_byte`, after the last step.
A run that is stopped goes on from its last saved step when started again. Needs a C++ compiler (torch.compile).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slimwright.zoo.bits_per_byte import bits_per_byte
from slimwright.zoo.text import Document, standard_library

END = "<|endoftext|>"
VOCABULARY = 3072
POSITIONS = 1024
SEED = 0

TOKENS_PER_STEP = 4096
PEAK_RATE = 3e-3
WARMUP_STEPS = 100
DECAY_SHARE = 0.4  # of the steps, at the end: the rate falls linearly to zero
LONG_SHARE = 0.2  # of the steps, at the end: windows of POSITIONS tokens instead of half as many, which cost less
SAVE_EVERY = 300
LOG_EVERY = 50


@dataclass
class Progress:
    """How far a run is: steps done and seconds spent, over all its starts."""

    step: int = 0
    seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory that receives the model")
    parser.add_argument("--steps", type=int, default=1500, help=f"optimizer steps of {TOKENS_PER_STEP} tokens")
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps)


def train(out: Path, steps: int) -> None:
    """Train for `steps` steps in all and leave the model in `out`, which is rewritten at every saved step."""
    torch.manual_seed(SEED)
    documents = standard_library("train")
    tokenizer = train_tokenizer(documents)
    save_tokenizer(tokenizer, out)
    tokens = packed(tokenizer, documents)
    watched = standard_library("calibrate")[::16]
    model = LlamaForCausalLM(configuration(tokenizer.eos_token_id))
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    optimizers = optimizers_for(model)
    state_file = Path(tempfile.gettempdir()) / f"slimwright-bundled-{steps}.pt"
    progress = _resume(state_file, model, optimizers)
    log(parameters=model.num_parameters(), train_tokens=len(tokens), first_step=progress.step, state=str(state_file))
    loss_of = compiled_loss(model)
    began = time.perf_counter() - progress.seconds
    model.train()
    while progress.step < steps:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(progress.step, steps)
        window = POSITIONS if progress.step >= (1 - LONG_SHARE) * steps else POSITIONS // 2
        loss = loss_of(batch(tokens, window, progress.step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        progress.step += 1
        progress.seconds = time.perf_counter() - began
        if progress.step % LOG_EVERY == 0:
            log(step=progress.step, loss=round(loss.item(), 4), seconds=round(progress.seconds))
        if progress.step % SAVE_EVERY == 0 or progress.step == steps:
            saved = save(model, out)
            _keep(state_file, model, optimizers, progress)
            log(step=progress.step, calibrate_bits_per_byte=round(bits_per_byte(saved, tokenizer, watched), 4))
    heldout = bits_per_byte(save(model, out), tokenizer, standard_library("heldout"))
    log(heldout_bits_per_byte=round(heldout, 4), steps=steps, seconds=round(progress.seconds))


def train_tokenizer(documents: Sequence[Document]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY tokens, split by GPT-2's rule; every byte is a token, so any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the tokenizer's files; its class goes by the name that transformers 4 and other readers know as well."""
    tokenizer.save_pretrained(out)
    file = out / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(config, indent=2) + "\n")


def packed(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> Tensor:
    """All documents in a random but fixed order, the end-of-text token before each: int64 (tokens,)."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(SEED)).tolist()
    stream: list[int] = []
    for index in order:
        stream.append(tokenizer.eos_token_id)
        stream += tokenizer.encode(documents[index].text, add_special_tokens=False, verbose=False)
    return torch.tensor(stream)


def configuration(end: int) -> LlamaConfig:
    """3.74 million parameters, 7.5 MB in bfloat16."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=None,  # an id here would freeze that row of the embedding, and the end of text is a real token
    )


def optimizers_for(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices (Jordan 2024; updates scaled to AdamW's size), AdamW for embedding and gains."""
    matrices = [weight for name, weight in model.named_parameters() if "proj" in name]
    others = [weight for name, weight in model.named_parameters() if "proj" not in name]
    return [
        torch.optim.Muon(matrices, lr=PEAK_RATE, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def rate(step: int, steps: int) -> float:
    """Learning rate of a step: linear warm-up, a plateau, a linear fall to zero."""
    decay_steps = max(1, round(DECAY_SHARE * steps))
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / decay_steps)


def batch(tokens: Tensor, window: int, step: int) -> Tensor:
    """The step's windows, cut at random places that depend on the step alone: int64 (rows, window + 1)."""
    generator = torch.Generator().manual_seed(SEED + step)
    starts = torch.randint(len(tokens) - window, (TOKENS_PER_STEP // window,), generator=generator)
    return tokens[starts[:, None] + torch.arange(window + 1)]


def compiled_loss(model: LlamaForCausalLM) -> Callable[[Tensor], Tensor]:
    """The mean next-token loss in nats of windows as `batch` gives them; bfloat16 products where the CPU has them."""
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported()

    def loss(windows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16):
            logits = model(windows[:, :-1], use_cache=False).logits
        return cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    compiled: Callable[[Tensor], Tensor] = torch.compile(loss, dynamic=False)
    return compiled


def save(model: LlamaForCausalLM, out: Path) -> LlamaForCausalLM:
    """Write the model to `out` in bfloat16; what was written is returned, in float32 and ready to evaluate."""
    written = deepcopy(model).bfloat16().eval()
    written.save_pretrained(out)
    return written.float()


def _keep(file: Path, model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer], progress: Progress) -> None:
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": progress.step,
        "seconds": progress.seconds,
    }
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)


def _resume(file: Path, model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer]) -> Progress:
    if not file.exists():
        return Progress()
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(kept)
    return Progress(state["step"], state["seconds"])


def log(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
