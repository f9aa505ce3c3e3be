"""Trains the bundled LM on this machine: `python -m slimwright.zoo.train_bundled OUT`.

A small Llama on the train part of the standard library's text. Its shapes are chosen so that every format takes it:
widths are multiples of 256 (the longest block of GGUF's k-quants), pairs of queries share keys, embedding and head tie.
Progress is judged on the calibrate part; the held-out part is read once, by `bits_per_byte`, after the last step.
A run that is stopped goes on from its last saved step when started again. Needs a C++ compiler (torch.compile).
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slimwright.zoo.bits_per_byte import bits_per_byte
from slimwright.zoo.text import standard_library
from slimwright.zoo.tokens import VOCABULARY, packed, save_tokenizer, train_tokenizer, windows
from slimwright.zoo.training import SEED, Progress, Schedule, bfloat16_products, train

END = "<|endoftext|>"
POSITIONS = 1024

TOKENS_PER_STEP = 4096
PEAK_RATE = 3e-3
LONG_SHARE = 0.2  # of the steps, at the end: windows of POSITIONS tokens instead of half as many, which cost less
SAVE_EVERY = 300
LOG_EVERY = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory that receives the model")
    parser.add_argument("--steps", type=int, default=1500, help=f"optimizer steps of {TOKENS_PER_STEP} tokens")
    arguments = parser.parse_args()
    train_bundled(arguments.out, arguments.steps)


def train_bundled(out: Path, steps: int) -> None:
    """Train for `steps` steps in all and leave the model in `out`, which is rewritten at every saved step."""
    torch.manual_seed(SEED)
    documents = standard_library("train")
    tokenizer = end_of_text_tokenizer(train_tokenizer(documents, [END]))
    save_tokenizer(tokenizer, out)
    tokens = packed(tokenizer, documents, tokenizer.eos_token_id)
    watched = standard_library("calibrate")[::16]
    model = LlamaForCausalLM(configuration(tokenizer.eos_token_id))
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    state_file = Path(tempfile.gettempdir()) / f"slimwright-bundled-{steps}.pt"

    def batch(step: int) -> Tensor:
        window = POSITIONS if step >= (1 - LONG_SHARE) * steps else POSITIONS // 2
        return windows(tokens, TOKENS_PER_STEP // window, window + 1, step)

    def began(progress: Progress) -> None:
        parameters = model.num_parameters()
        log(parameters=parameters, train_tokens=len(tokens), first_step=progress.step, state=str(state_file))

    def after_step(progress: Progress, loss: float) -> None:
        if progress.step % LOG_EVERY == 0:
            log(step=progress.step, loss=round(loss, 4), seconds=round(progress.seconds))
        if progress.step % SAVE_EVERY == 0 or progress.step == steps:
            saved = save(model, out)
            log(step=progress.step, calibrate_bits_per_byte=round(bits_per_byte(saved, tokenizer, watched), 4))

    progress = train(
        model,
        batch,
        compiled_loss(model),
        Schedule(steps, PEAK_RATE),
        state_file=state_file,
        save_every=SAVE_EVERY,
        began=began,
        after_step=after_step,
    )
    heldout = bits_per_byte(save(model, out), tokenizer, standard_library("heldout"))
    log(heldout_bits_per_byte=round(heldout, 4), steps=steps, seconds=round(progress.seconds))


def end_of_text_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers' own, END marking the beginning and the end of a text and filling up batches."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


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


def compiled_loss(model: LlamaForCausalLM) -> Callable[[Tensor], Tensor]:
    """The mean next-token loss in nats of windows, int64 (rows, tokens + 1)."""

    def loss(windows: Tensor) -> Tensor:
        with bfloat16_products():
            logits = model(windows[:, :-1], use_cache=False).logits
        return cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    compiled: Callable[[Tensor], Tensor] = torch.compile(loss, dynamic=False)
    return compiled


def save(model: LlamaForCausalLM, out: Path) -> LlamaForCausalLM:
    """Write the model to `out` in bfloat16; what was written is returned, in float32 and ready to evaluate."""
    written = deepcopy(model).bfloat16().eval()
    written.save_pretrained(out)
    return written.float()


def log(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
