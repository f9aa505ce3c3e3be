"""``generate`` of a loaded model: the tokens of transformers' own, and its arguments."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation import CompileConfig, GenerationConfig, TextStreamer
from transformers.generation.streamers import BaseStreamer

from slimwright.errors import InputError, SlimwrightError
from slimwright.runtime import decode, generate
from slimwright.runtime.generate import Generation
from slimwright.runtime.kv_cache import KvLayer, attention_layers, kv_cache
from slimwright.runtime.kv_format import KvFormat
from slimwright.zoo import bundled_path
from tests.families import FAMILIES, make
from tests.runtime.packing import prompts

DECODERS = [n for n, family in FAMILIES.items() if family.generates and n not in ("whisper", "home_made")]
OURS = {"llama", "llama_tied", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma2", "gemma3", "olmo2", "cohere",
        "mixtral", "qwen3_moe", "olmoe", "gpt_oss", "gpt2", "opt", "gpt_neox", "llava"}  # fmt: skip
"""Families whose attention the cache answers; the others run as transformers runs them."""


def packed(model, bits: int = 8) -> dict[int, KvFormat]:
    return {i: KvFormat(bits, 32, 32) for i, sliding in attention_layers(model.config).items() if not sliding}


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    """In float32, batched, padded on the left, over windows and hybrids; with a packed cache, while it packs
    nothing."""
    model = make(name)
    how = {**prompts(), "max_new_tokens": 16, "do_sample": False}
    expected = model.generate(**how)
    assert torch.equal(Generation(model)(**how), expected)
    assert (decode.supported(model) == "") == (name in OURS)
    if packed(model):
        assert torch.equal(Generation(model, packed(model, 2))(**how), expected)  # 28 tokens, a window of 32


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt_oss", "jamba", "bloom"])
def test_packed_and_unpacked_attention_agree(name: str) -> None:
    """Reading the cache packed gives the tokens that unpacking it gives."""
    model = make(name)
    how = {**prompts(2, 50), "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    expected = model.generate(**how, past_key_values=kv_cache(model.config, packed(model)))
    assert torch.equal(Generation(model, packed(model))(**how), expected)


def test_bfloat16_teacher_forced() -> None:
    """RUNTIME's criterion: mean KL below 1e-3 along the reference's own text; where the choice differs, the two best
    are closer than the noise between transformers' own two caches."""
    model = make("qwen2", dtype=torch.bfloat16)
    ids = torch.randint(3, 300, (1, 8), generator=torch.Generator().manual_seed(0))
    text = model.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    caches = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)]
    with torch.no_grad():
        ours = kv_cache(model.config, {}, ours=True)
        for cache in (*caches, ours):
            model(input_ids=ids, past_key_values=cache)
        reference, noise, got = [], [], []
        for token in range(8, 47):
            one, at = text[:, token : token + 1], torch.tensor([[token]])
            reference.append(model(input_ids=one, position_ids=at, past_key_values=caches[0]).logits[:, -1].float())
            noise.append(model(input_ids=one, position_ids=at, past_key_values=caches[1]).logits[:, -1].float())
            got.append(decode.decoded(model, ours, one, at).float())
    reference, noise, got = (torch.cat(part) for part in (reference, noise, got))
    kl = (reference.softmax(-1) * (reference.log_softmax(-1) - got.log_softmax(-1))).sum(-1)
    assert kl.mean() < 1e-3
    gap = reference.topk(2).values.diff().abs().flatten()
    differs = got.argmax(-1) != reference.argmax(-1)
    assert (gap[differs] <= 2 * (noise - reference).abs().max() + 2 * (got - reference).abs().max()).all()


class Recorded(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streaming() -> None:
    model, ours, theirs = make("llama"), Recorded(), Recorded()
    how = {**prompts(1), "max_new_tokens": 10, "do_sample": False}
    model.generate(**how, streamer=theirs)
    Generation(model)(**how, streamer=ours)
    assert ours.seen == theirs.seen and ours.ended


def test_stop_strings_and_text_of_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(bundled_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(bundled_path())
    inputs = tokenizer("def read(self, size=-1):\n", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    how = {
        "max_new_tokens": 40,
        "do_sample": False,
        "pad_token_id": 0,
        "stop_strings": ["self", "return"],
        "tokenizer": tokenizer,
    }
    expected = model.generate(**inputs, **how)
    generation = Generation(model, packed(model, 4))
    assert expected.shape[1] < inputs["input_ids"].shape[1] + 40
    assert torch.equal(Generation(model)(**inputs, **how), expected)
    assert torch.equal(generation(**inputs, **how, streamer=TextStreamer(tokenizer, skip_prompt=True)), expected)
    assert capsys.readouterr().out.strip()
    with pytest.raises(InputError, match="tokenizer"):
        generation(**inputs, **{**how, "tokenizer": None})


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "top_k": 20, "temperature": 0.7, "repetition_penalty": 1.3},
        {"do_sample": True, "top_p": 0.8, "num_return_sequences": 2},
        {"do_sample": False, "no_repeat_ngram_size": 2, "min_new_tokens": 8},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": False, "eos_token_id": list(range(3, 120))},
        {"do_sample": False, "return_dict_in_generate": True, "output_scores": True},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "prompt_lookup_num_tokens": 2},
        {"generation_config": GenerationConfig(max_new_tokens=7, do_sample=False, eos_token_id=2, pad_token_id=0)},
    ],
    ids=str,
)
def test_arguments_are_those_of_transformers(how: dict) -> None:
    """Same seed, same tokens; what our loop does not do is done by transformers."""
    model = make("qwen2")
    rows = 1 if "prompt_lookup_num_tokens" in how else 3
    given = {
        **prompts(rows),
        **({} if "generation_config" in how else {"max_new_tokens": 12, "pad_token_id": 0}),
        **how,
    }
    for call in (Generation(model), Generation(model, packed(model))):
        torch.manual_seed(3)
        expected = model.generate(**given)
        torch.manual_seed(3)
        got = call(**given)
        assert torch.equal(getattr(got, "sequences", got), getattr(expected, "sequences", expected))


def test_padding_on_the_right_or_within_is_left_to_transformers() -> None:
    model, how = make("llama"), prompts(2)
    how["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
    how["attention_mask"][0, 4:6] = 0
    expected = model.generate(**how, max_new_tokens=8, do_sample=False)
    assert torch.equal(Generation(model)(**how, max_new_tokens=8, do_sample=False), expected)


def test_attention_is_given_back_and_generation_copies() -> None:
    model = make("llama")
    model.generate = Generation(model, packed(model))
    before = model.config._attn_implementation
    model.generate(**prompts(), max_new_tokens=4)
    assert model.config._attn_implementation == before
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.generate.model is other and other.generate.formats == model.generate.formats
    assert isinstance(model.generate.cache().layers[0], KvLayer)


def test_a_model_that_changes_what_it_cached_is_run_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that does not get the very keys it cached must not be answered by the cache: it would see one token."""
    from transformers.models.llama import modeling_llama

    model, how = make("llama"), {**prompts(), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**how)
    own = modeling_llama.LlamaAttention.forward

    def changed(self, *args, past_key_values=None, **kwargs):
        class Copying:
            def update(self, keys, values, index):
                return tuple(part * 1.0 for part in past_key_values.update(keys, values, index))

        return own(self, *args, past_key_values=None if past_key_values is None else Copying(), **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", changed)
    assert "changes keys and values" in decode.supported(model)
    assert torch.equal(Generation(model)(**how), expected)


# -- bad input -----------------------------------------------------------------------------------------------------


def test_more_tokens_than_a_given_cache_holds() -> None:
    model, how = make("llama"), prompts(1)
    for cache in (
        StaticCache(config=model.config, max_cache_len=20),
        kv_cache(model.config, packed(model), capacity=20),
    ):
        with pytest.raises(InputError, match="holds 20 tokens"):
            Generation(model)(**how, max_new_tokens=15, past_key_values=cache)
    assert (
        Generation(model)(**how, max_new_tokens=9, past_key_values=StaticCache(config=model.config, max_cache_len=20))
        is not None
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError("attention"),
    ],
    ids=str,
)
def test_out_of_memory_in_the_middle_of_a_batch(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence; and the model generates again when there is room."""
    model, how = make("llama"), {**prompts(), "max_new_tokens": 6, "do_sample": False}
    model.generate = Generation(model, packed(model))
    expected, calls, own = model.generate(**how), [], KvLayer.attend

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise error
        return own(self, *args, **kwargs)

    monkeypatch.setattr(KvLayer, "attend", failing)
    with pytest.raises(InputError, match="not enough memory to generate for this batch of 3 rows"):
        model.generate(**how)
    assert torch.equal(model.generate(**how), expected)


def test_real_allocation_failure_is_one_sentence() -> None:
    model = make("llama")
    with pytest.raises(InputError, match="not enough memory"):
        Generation(model)(**prompts(), max_new_tokens=1 << 44)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match="max_length"):
        Generation(make("llama"))(**prompts(), max_length=5)


@pytest.mark.slow
def test_compiled_step() -> None:
    model, how = make("qwen2"), {**prompts(), "max_new_tokens": 12, "do_sample": False}
    compiled = Generation(model)(**how, compile_config=CompileConfig())
    assert torch.equal(compiled, model.generate(**how))
    other = make("jetmoe")
    assert decode.supported(other)
    with pytest.raises(SlimwrightError, match="cannot be compiled"):
        decode.compiled_step(other, {})


def test_the_loop_is_ours_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(generate, "_decode", lambda *args: seen.append(1) or args[1])
    Generation(make("qwen2"))(**prompts(), max_new_tokens=3)
    assert len(seen) == 1
    gemma = make("gemma2")
    gemma.generation_config.cache_implementation = "hybrid"  # as in the files on the hub
    Generation(gemma)(**prompts(), max_new_tokens=3)
    assert len(seen) == 2
