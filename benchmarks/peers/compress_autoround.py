"""A model put on a grid by AutoRound, in its own environment: compress_autoround.py SPEC.json (compressing.py).

Its defaults: 200 steps a block in batches of 8 sequences, symmetric groups of 128, every linear layer but the head;
written in the layout of GPTQ checkpoints. Rows of an encoder, which end with their document, are padded to one length.
"""

import torch
from compressing import Work
from torch.nn.utils.rnn import pad_sequence

BATCH = 8


def main() -> None:
    import auto_round
    from auto_round import AutoRound

    work = Work()
    rows = pad_sequence(work.rows, batch_first=True, padding_value=work.tokenizer.pad_token_id or 0)
    real = torch.arange(rows.shape[1]) < torch.tensor([len(row) for row in work.rows])[:, None]
    data = [
        {"input_ids": part, "attention_mask": mask.long()}
        for part, mask in zip(rows.split(BATCH), real.split(BATCH), strict=True)
    ]
    rounding = AutoRound(
        work.model, work.tokenizer, scheme=work.spec["scheme"], iters=200, batch_size=BATCH, nsamples=len(rows),
        seqlen=len(rows[0]), dataset=data, device_map="cpu",
    )  # fmt: skip
    rounding.quantize()
    compressed = work.logits(rounding.model)
    rounding.save_quantized(work.spec["out"], format="auto_gptq")
    work.save(compressed, {"auto-round": auto_round.__version__})


if __name__ == "__main__":
    main()
