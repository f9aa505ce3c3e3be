"""A small report like the ones that a job writes."""


def line(site, role, block, parameters, grid, *, bits, error, state="data-free", reason="no data was given"):
    kept = state == "kept"
    return {
        "site": site,
        "group": site.rpartition(".")[0],
        "state": state,
        "reason": reason,
        "method": "" if kept else "quantize/rtn,clip=mse",
        "grid": grid,
        "bits": bits,
        "bytes": round(parameters * bits / 8),
        "bytes_before": parameters * 2,
        "parameters": parameters,
        "error_before": None if kept else error * 1.15,
        "error_after": 0.0 if kept else error,
        "tokens": 0,
        "role": role,
        "block": block,
    }


def sample_report(blocks=6, hidden=512, vocabulary=8192, experts=0):
    grids = [("int3:g64", 3.5), ("int4:g128", 4.25), ("int5:g128", 5.25), ("int8:g128", 8.25), ("int2:g32", 3.0)]
    ledger = [line("model.embed_tokens.weight", "embed", None, vocabulary * hidden, "int4:g64", bits=4.5, error=0.09)]
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        shapes = {"q": 1.0, "k": 0.25, "v": 0.25, "o": 1.0}
        for place, (role, scale) in enumerate(shapes.items()):
            grid, bits = grids[(block + place // 3) % 5]
            name = f"{prefix}.self_attn.{role}_proj.weight"
            ledger.append(line(name, role, block, int(scale * hidden**2), grid, bits=bits, error=2.2 * 2**-bits))
        for place, role in enumerate(("gate", "up", "down")):
            grid, bits = grids[(block + place // 2 + 2) % 5]
            names = [f"{prefix}.mlp.experts.{index}.{role}_proj.weight" for index in range(experts)]
            for name in names or [f"{prefix}.mlp.{role}_proj.weight"]:
                ledger.append(line(name, role, block, 3 * hidden**2, grid, bits=bits, error=2.4 * 2**-bits))
        norm = f"{prefix}.input_layernorm.weight"
        ledger.append(line(norm, "norm", block, hidden, "", bits=16.0, error=0, state="kept", reason="norm"))
    ledger.append(line("model.norm.weight", "norm", None, hidden, "", bits=16.0, error=0, state="kept", reason="norm"))
    ledger.append(
        line(
            "lm_head.weight",
            "head",
            None,
            vocabulary * hidden,
            "",
            bits=16.0,
            error=0,
            state="kept",
            reason="rule lm_head: keep",
        )
    )
    parameters = sum(entry["parameters"] for entry in ledger)
    after = sum(entry["bytes"] for entry in ledger) + 4096
    return {
        "format_version": 1,
        "model": {
            "path": "/models/tiny-llama",
            "fingerprint": "5f3c9a" * 6,
            "family": "llama",
            "parameters": parameters,
        },
        "budget": {"asked": "4.25bit", "bytes": after + 1000},
        "size": {"before": 2 * parameters + 4096, "after": after, "bits_per_weight": 8 * after / parameters},
        "measured_on": {
            "tokens": 16384,
            "documents": 41,
        },
        "quality": {
            "kl": {"value": 0.01234, "low": 0.01171, "high": 0.01308},
            "top1_agreement": {"value": 0.9371, "low": 0.9312, "high": 0.9427},
        },
        "job": {
            "seconds": 48.2,
            "peak_memory_bytes": 612_000_000,
            "evaluations": 1,
            "predicted": {"seconds": 55.0, "peak_memory_bytes": 700_000_000, "bytes": after - 900},
        },
        "ledger": ledger,
        "verified": {
            "how": "reloaded in a fresh process; logits equal those of the plan applied to the source",
            "ok": True,
            "largest_relative_difference": 3.1e-6,
            "tolerance": 1e-4,
        },
        "hash": "9b" * 32,
        "versions": {"slimwright": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "threads": 2},
        "how_to_load": "import slimwright\nfrom transformers import AutoModelForCausalLM\n"
        'model = AutoModelForCausalLM.from_pretrained("small")',
        "samples": [
            {
                "prompt": "def read_lines(path):",
                "before": '\n    """Return the lines of a file."""\n    return open(path).readlines()',
                "after": '\n    """Return the lines of the file."""\n    return list(open(path))',
            }
        ],
        "notes": ["No data was given: weights were rounded without it."],
    }
