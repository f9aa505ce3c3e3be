"""Language models on text: windows, tokens, bytes, likelihoods, against direct forwards of every prefix."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slimwright.calibrate.data import Document
from slimwright.errors import InputError
from slimwright.evaluate import BITS_PER_BYTE, KL, PERPLEXITY, TOP1_AGREEMENT, compare_logits
from slimwright.evaluate.language import encode, language_table, tokens_digest, windows
from tests.evaluate.samples import byte_tokenizer, perturbed, word_tokenizer
from tests.families import make

TEXTS = [Document("a", "héllo wörld"), Document("b", "x = 1\n" * 30), Document("c", "🙂" * 9)]


@pytest.mark.parametrize("length", [1, 2, 7, 8, 64])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9, 16, 61, 64, 65, 66])
def test_windows_predict_every_token_once_from_at_least_half_a_window(tokens, length):
    predicted = []
    for first, end, new in windows(tokens, length):
        assert 0 <= first <= new < end <= tokens - 1 and end - first <= length
        for target in range(new + 1, end + 1):
            context = target - first
            assert context >= min(target, length // 2)
            predicted.append(target)
    assert predicted == list(range(1, tokens))


def test_tokens_and_their_bytes():
    tokenizer = byte_tokenizer()
    found = encode(tokenizer, TEXTS)
    for document, one in zip(TEXTS, found):
        assert one.ids[0] == tokenizer.bos_token_id and one.nbytes[0] == 0
        assert len(one.ids) == 1 + len(document.text.encode())
        assert int(one.nbytes.sum()) == len(document.text.encode())
    tokenizer.bos_token = None
    assert encode(tokenizer, TEXTS[:1])[0].ids[0] == tokenizer.eos_token_id
    tokenizer.eos_token = None
    bare = encode(tokenizer, TEXTS[:1])[0]
    assert torch.equal(bare.ids, found[0].ids[1:]) and bare.nbytes[0] == 1
    special = encode(word_tokenizer(), [Document("a", "the cat")], "masked")[0]
    assert special.ids[[0, -1]].tolist() == [2, 3] and special.nbytes.tolist() == [0, 3, 4, 0]
    assert tokens_digest(found) != tokens_digest(encode(byte_tokenizer(reverse=True), TEXTS))
    assert tokens_digest(found) == tokens_digest(encode(byte_tokenizer(), TEXTS))
    with pytest.raises(InputError, match="makes no tokens"):
        encode(tokenizer, [Document("a", "")])


@pytest.mark.parametrize("length", [16, 300])
def test_a_causal_table_equals_forwards_of_every_prefix(length):
    model, other = make("llama"), perturbed(make("llama"), 0.02)
    documents = encode(byte_tokenizer(), TEXTS[:2])
    table = language_table("causal", model, documents, length)
    both = language_table("causal", other, documents, length, reference=model)
    half = length // 2
    for row, document in enumerate(documents):
        ids, nats, kl, same = document.ids, [], [], []
        for target in range(1, len(ids)):
            # Causal: a token's distribution hangs on its prefix alone, which begins where its window does.
            start = 0 if target <= length else -(-(target - length) // half) * half
            with torch.no_grad():
                x, y = (m(ids[None, start:target]).logits[0, -1:].double() for m in (model, other))
            nats.append(-torch.log_softmax(y, 1)[0, ids[target]].item())
            compared = compare_logits(x, y)
            kl.append(compared["kl"].item())
            same.append(compared["top1_agreement"].item())
            if row == 0 and target == 1:
                first = -torch.log_softmax(x, 1)[0, ids[target]].item()
        assert both.columns["nats"][row] == pytest.approx(sum(nats), rel=1e-5)
        assert both.columns["kl"][row] == pytest.approx(sum(kl), rel=1e-3, abs=1e-6)
        assert both.columns["top1_agreement"][row] == sum(same)
        assert both.columns["tokens"][row] == len(ids) - 1
        assert both.columns["bytes"][row] == len(TEXTS[row].text.encode())
    assert first > 0 and not np.allclose(table.columns["nats"], both.columns["nats"])
    assert BITS_PER_BYTE.score(both).value == pytest.approx(
        both.columns["nats"].sum() / math.log(2) / both.columns["bytes"].sum()
    )
    assert not KL.within(table) and PERPLEXITY.within(table)


def test_a_model_is_no_distance_from_itself():
    model = make("llama")
    table = language_table("causal", model, encode(byte_tokenizer(), TEXTS), 64, reference=model)
    assert KL.score(table).to_json() == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert TOP1_AGREEMENT.score(table).value == 1.0
    assert table.columns["nats"] == pytest.approx(
        language_table("causal", model, encode(byte_tokenizer(), TEXTS), 64).columns["nats"]
    )


def test_padding_of_a_vocabulary_does_not_count_but_a_missing_token_does():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        )
        small = LlamaForCausalLM(config).eval()
        wide = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "vocab_size": 288})).eval()
    wide.load_state_dict(
        {
            name: torch.cat([value, 9 * torch.ones(28, 32)]) if len(value) == 260 else value
            for name, value in small.state_dict().items()
        }
    )
    documents = encode(byte_tokenizer(), TEXTS)
    table = language_table("causal", wide, documents, 64, reference=small, vocabulary=259)
    assert table.columns["kl"].max() < 1e-5
    with pytest.raises(InputError, match="have 260 and 288 entries, but the tokenizer of both has 270"):
        language_table("causal", wide, documents, 64, reference=small, vocabulary=270)
    tiny = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "vocab_size": 20})).eval()
    with pytest.raises(InputError, match="outside the model's vocabulary of 20"):
        language_table("causal", tiny, documents, 64)


def test_a_masked_table_compares_every_place():
    model, other = make("bert"), perturbed(make("bert"), 0.05)
    documents = encode(word_tokenizer(), [Document("a", "the cat sat"), Document("b", "a dog ran on")], "masked")
    table = language_table("masked", other, documents, 5, model)
    with torch.no_grad():
        kl = [
            compare_logits(model(d.ids[None, :5]).logits[0], other(d.ids[None, :5]).logits[0])["kl"].sum().item()
            for d in documents
        ]
    assert table.columns["tokens"].tolist() == [5, 5] and table.columns["kl"] == pytest.approx(kl)
    assert not PERPLEXITY.within(table)


def test_an_encoder_decoder_predicts_the_second_half():
    model, other = make("t5"), perturbed(make("t5"), 0.02)
    documents = encode(byte_tokenizer(), TEXTS[:2], "seq2seq")
    assert documents[0].ids.tolist() == byte_tokenizer().encode(TEXTS[0].text, add_special_tokens=False)
    table = language_table("seq2seq", other, documents, 20, model)
    start = model.config.decoder_start_token_id
    for row, document in enumerate(documents):
        middle = len(document.ids) // 2
        source, target = document.ids[:middle][:20], document.ids[middle:][:20]
        kl = nats = 0.0
        for place in range(len(target)):  # one token after another, as it would be generated
            before = torch.cat([torch.tensor([start]), target[:place]])
            with torch.no_grad():
                x, y = (
                    m(input_ids=source[None], decoder_input_ids=before[None]).logits[0, -1:] for m in (model, other)
                )
            kl += compare_logits(x, y)["kl"].item()
            nats += -torch.log_softmax(y.double(), 1)[0, target[place]].item()
        assert table.columns["nats"][row] == pytest.approx(nats, rel=1e-5)
        assert table.columns["kl"][row] == pytest.approx(kl, rel=1e-3)
        assert table.columns["tokens"][row] == len(target)
        assert table.columns["bytes"][row] == document.nbytes[middle:][:20].sum()
