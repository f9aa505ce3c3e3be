"""A model put on a grid by llm-compressor's GPTQ, in its own environment: compress_llmcompressor.py SPEC.json.

The spec is that of compressing.py, the recipe that of its examples: every linear layer but the head.
"""

from compressing import Work


def main() -> None:
    import compressed_tensors
    import llmcompressor
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    work = Work()
    rows = work.rows
    data = Dataset.from_dict({"input_ids": [r.tolist() for r in rows], "attention_mask": [[1] * len(r) for r in rows]})
    oneshot(
        model=work.model, dataset=data,
        recipe=GPTQModifier(targets="Linear", scheme=work.spec["scheme"], ignore=["lm_head"]),
        max_seq_length=max(map(len, rows)), num_calibration_samples=len(rows), shuffle_calibration_samples=False,
        processor=work.tokenizer,
    )  # fmt: skip
    compressed = work.logits(work.model)
    work.model.save_pretrained(work.spec["out"], save_compressed=True)
    versions = {"llm-compressor": llmcompressor.__version__, "compressed-tensors": compressed_tensors.__version__}
    work.save(compressed, versions)


if __name__ == "__main__":
    main()
