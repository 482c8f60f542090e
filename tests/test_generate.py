"""transformers' `generate` on a model of states: strategies, padding, kept states, chunks, streamers, criteria."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

import ophis
from ophis.models import ModelState
from ophis.models.state import fingerprint
from ophis.training import byte_tokenizer
from tiny_models import PATTERNS, build, close, tokens

# Without a padding token: transformers would take that for padding wherever it stands in a prompt without a mask.
GREEDY: dict[str, Any] = dict(max_new_tokens=8, do_sample=False)
NO_SPECIAL_TOKENS = dict(eos_token_id=None, pad_token_id=None)
PROMPTS = [tokens(1, 5, seed=2), tokens(1, 11, seed=3), tokens(1, 1, seed=4)]


@pytest.fixture(params=PATTERNS)
def model(request) -> ophis.LanguageModel:
    return build(request.param, **NO_SPECIAL_TOKENS).double()


@pytest.fixture
def hybrid() -> ophis.LanguageModel:
    return build("hybrid", **NO_SPECIAL_TOKENS).double()


def padded(side: str) -> tuple[Tensor, Tensor]:
    """The three prompts as a batch and its mask."""
    gaps = [11 - p.shape[1] for p in PROMPTS]
    pads = [(g, 0) if side == "left" else (0, g) for g in gaps]
    batch = torch.cat([F.pad(p, pad) for p, pad in zip(PROMPTS, pads, strict=True)])
    return batch, torch.cat([F.pad(torch.ones_like(p), pad) for p, pad in zip(PROMPTS, pads, strict=True)])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_a_padded_batch_goes_on_as_each_prompt_alone(model, side: str, chunk: int | None):
    batch, mask = padded(side)
    together = model.generate(batch, attention_mask=mask, prefill_chunk_size=chunk, **GREEDY)
    assert torch.equal(together[:, :11], batch)
    for row, prompt in zip(together, PROMPTS, strict=True):
        assert torch.equal(row[11:], model.generate(prompt, **GREEDY)[0, prompt.shape[1] :])


def test_a_padded_batch_without_states(hybrid):
    for side in ("left", "right"):
        batch, mask = padded(side)
        expected = hybrid.generate(batch, attention_mask=mask, **GREEDY)
        assert torch.equal(hybrid.generate(batch, attention_mask=mask, use_cache=False, **GREEDY), expected)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_a_document_in_chunks_equals_it_whole(model, chunk: int):
    document = tokens(2, 200)
    options = dict(GREEDY, output_logits=True, return_dict_in_generate=True)
    whole = model.generate(document, **options)
    parts = model.generate(document, prefill_chunk_size=chunk, **options)
    assert torch.equal(parts.sequences, whole.sequences)
    close(torch.stack(parts.logits), torch.stack(whole.logits))
    assert parts.past_key_values.length == 200 + 7  # the last token has not been read


def test_a_state_passed_on_from_chunk_to_chunk_of_a_document(model):
    """In each of the ways to say what is new, with the state of a forward call or of `generate`."""
    document = tokens(1, 90)
    expected = model.generate(document, **GREEDY)[:, 90:]
    chunks, state = document.split(40, 1), None
    for chunk in chunks[:-1]:
        state = model(chunk, past_key_values=state).past_key_values
    assert state.length == 80
    whole = model.generate(document, past_key_values=state, **GREEDY)
    assert torch.equal(whole[:, 90:], expected)
    last = chunks[-1]
    assert torch.equal(model.generate(last, past_key_values=state.as_prefix(), **GREEDY)[:, 10:], expected)
    mask = torch.ones_like(document)
    assert torch.equal(model.generate(last, attention_mask=mask, past_key_values=state, **GREEDY)[:, 10:], expected)
    chunked = model.generate(document, past_key_values=state, prefill_chunk_size=3, **GREEDY)
    assert torch.equal(chunked, whole)
    state = None
    for chunk in chunks:
        options = dict(GREEDY, return_dict_in_generate=True, max_new_tokens=1 if chunk is not chunks[-1] else 8)
        output = model.generate(chunk, past_key_values=state, **options)
        state = output.past_key_values.as_prefix()
    assert torch.equal(output.sequences[:, 10:], expected)


def test_a_kept_state_goes_on_where_it_stopped(hybrid):
    for side in ("left", "right"):
        batch, mask = padded(side)
        options = dict(GREEDY, return_dict_in_generate=True, max_new_tokens=4)
        begun = hybrid.generate(batch, attention_mask=mask, **options)
        longer = F.pad(mask, (0, 4), value=1)
        options.update(attention_mask=longer, past_key_values=begun.past_key_values)
        resumed = hybrid.generate(begun.sequences, **options)
        assert torch.equal(resumed.sequences, hybrid.generate(batch, attention_mask=mask, **GREEDY))
        # And a second time: the state is a value.
        again = hybrid.generate(begun.sequences, **options)
        assert torch.equal(again.sequences, resumed.sequences)


@pytest.mark.parametrize("strategy", [dict(num_return_sequences=3, do_sample=True), dict(num_beams=3)])
def test_several_sequences_from_a_kept_state(hybrid, strategy: dict[str, Any]):
    document = tokens(2, 30)
    state = hybrid(document[:, :25]).past_key_values
    texts = []
    for past in (None, state):
        torch.manual_seed(0)
        texts.append(hybrid.generate(document, past_key_values=past, **{**GREEDY, **strategy}))
    assert torch.equal(*texts)


def test_one_prefix_for_a_batch_of_prompts(hybrid):
    prefix = tokens(1, 20)
    state = hybrid(prefix).past_key_values
    batch, mask = padded("left")
    together = hybrid.generate(batch, attention_mask=mask, past_key_values=state.as_prefix(), **GREEDY)
    for row, prompt in zip(together, PROMPTS, strict=True):
        assert torch.equal(row[11:], hybrid.generate(torch.cat([prefix, prompt], 1), **GREEDY)[0, -8:])


def test_beams_equal_beams_without_states(model):
    batch, mask = padded("left")
    options = GREEDY | dict(num_beams=4, num_return_sequences=2, length_penalty=0.5, eos_token_id=7, pad_token_id=8)
    for more in (dict(), dict(do_sample=True, top_k=20)):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            texts.append(model.generate(batch, attention_mask=mask, use_cache=use_cache, **{**options, **more}))
        assert torch.equal(*texts), more


def test_a_seed_gives_the_same_samples(hybrid):
    options = dict(GREEDY, do_sample=True, temperature=0.7, top_k=30, top_p=0.9, repetition_penalty=1.2)
    texts = []
    for use_cache in (True, True, False):
        torch.manual_seed(5)
        texts.append(hybrid.generate(tokens(3, 9), use_cache=use_cache, **options))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_prompt_of_embeddings(model, chunk: int | None):
    batch, mask = padded("left")
    embedded = model.get_input_embeddings()(batch)
    options = dict(attention_mask=mask, prefill_chunk_size=chunk, **GREEDY)
    assert torch.equal(model.generate(inputs_embeds=embedded, **options), model.generate(batch, **options)[:, 11:])


def test_streamers_get_every_token(hybrid):
    tokenizer = byte_tokenizer()
    model = build("hybrid", vocab_size=257, eos_token_id=256, pad_token_id=256)
    prompt = tokenizer("It was", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    options = dict(**prompt, max_new_tokens=20, do_sample=False)
    thread = threading.Thread(target=model.generate, kwargs=dict(streamer=streamer, **options))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(model.generate(**options)[0, 6:])


def test_stopping_criteria_and_stop_strings():
    class At(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 9, device=input_ids.device)

    tokenizer = byte_tokenizer()
    model = build("mamba2", vocab_size=257, eos_token_id=256, pad_token_id=256)
    prompt = tokenizer("It was", return_tensors="pt")
    options = dict(**prompt, max_new_tokens=20, do_sample=False)
    assert model.generate(stopping_criteria=StoppingCriteriaList([At()]), **options).shape[1] == 9
    full = model.generate(**options)[0]
    third = int(full[8])
    assert model.generate(eos_token_id=third, **options).shape[1] == full.tolist().index(third, 6) + 1
    stop = chr(65)
    loud = torch.zeros(257)
    loud[65] = 1e4
    with torch.no_grad():
        model.lm_head.bias = torch.nn.Parameter(loud)  # says nothing but A
    stopped = model.generate(stop_strings=[stop * 3], tokenizer=tokenizer, **options)
    assert tokenizer.decode(stopped[0, 6:]) == "AAA"


def test_hidden_states_scores_and_logits_of_each_step(hybrid):
    options = dict(GREEDY, return_dict_in_generate=True)
    options |= dict(output_hidden_states=True, output_scores=True, output_logits=True)
    output = hybrid.generate(tokens(2, 6), **options)
    assert len(output.hidden_states) == len(output.scores) == len(output.logits) == 8
    assert len(output.hidden_states[0]) == 3 + 1
    whole = hybrid(output.sequences[:, :-1]).logits
    torch.testing.assert_close(torch.stack(output.logits, 1).double(), whole[:, 5:], rtol=1e-5, atol=1e-6)


def test_a_state_under_either_name(hybrid):
    """transformers' before 5.24 and since."""
    document = tokens(1, 30)
    state = hybrid(document[:, :20]).past_key_values
    expected = hybrid.generate(document, past_key_values=state, **GREEDY)
    assert torch.equal(hybrid.generate(document, cache=state, past_key_values=None, **GREEDY), expected)
    ends = [hybrid(document[:, 20:], **{name: state}).logits for name in ("past_key_values", "cache")]
    assert torch.equal(*ends)
    for call in (hybrid, hybrid.generate, hybrid.backbone):
        with pytest.raises(ValueError, match="past_key_values and cache are two names of the state"):
            call(document, past_key_values=state, cache=state)


def test_a_state_of_other_text_is_refused(hybrid):
    document = tokens(1, 30)
    state = hybrid(document[:, :20]).past_key_values
    with pytest.raises(ValueError, match=r"not the first 20 of input_ids.*state.as_prefix\(\)"):
        hybrid.generate(document[:, 5:], past_key_values=state, **GREEDY)
    with pytest.raises(ValueError, match=r"has read 20 tokens, of 10 that are given; .*state.as_prefix\(\)"):
        hybrid.generate(document[:, 20:], past_key_values=state, **GREEDY)
    with pytest.raises(ValueError, match=r"has read 20 tokens, of 20 .*at least one more"):
        hybrid.generate(document[:, :20], past_key_values=state, **GREEDY)
    with pytest.raises(ValueError, match=r"attention_mask has 27 positions, expected 30: 20 .* and 10 new ones"):
        hybrid.generate(document[:, 20:], attention_mask=torch.ones(1, 27), past_key_values=state, **GREEDY)
    with pytest.raises(ValueError, match=r"past_key_values is of 2 sequences, the prompts are 3"):
        hybrid.generate(tokens(3, 9), past_key_values=hybrid(tokens(2, 5)).past_key_values, **GREEDY)
    # A beam's states are those of the beams when the search ended, not of the sequences it returns.
    options = dict(GREEDY, return_dict_in_generate=True, num_beams=3, num_return_sequences=3)
    beams = hybrid.generate(document, **options)
    with pytest.raises(ValueError, match="not the first 37 of input_ids"):
        hybrid.generate(beams.sequences.flip(0), past_key_values=beams.past_key_values, **GREEDY)


def test_what_generate_cannot_do_says_so(hybrid):
    ids = tokens(1, 6)
    with pytest.raises(TypeError, match="past_key_values is a DynamicCache, expected the ModelState"):
        hybrid.generate(ids, past_key_values=DynamicCache(), **GREEDY)
    with pytest.raises(TypeError, match="past_key_values is a DynamicCache, expected the ModelState"):
        hybrid(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation='static' is for attention caches"):
        hybrid.generate(ids, cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match="use_cache=False, but a state to go on from is given"):
        hybrid.generate(ids, use_cache=False, past_key_values=hybrid(ids[:, :3]).past_key_values, **GREEDY)
    with pytest.raises(ValueError, match="prefill_chunk_size needs use_cache=True"):
        hybrid.generate(ids, use_cache=False, prefill_chunk_size=2, **GREEDY)
    # Both would cut the state back to an earlier token.
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        hybrid.generate(ids, prompt_lookup_num_tokens=3, **GREEDY)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        hybrid.generate(ids, assistant_model=build("mamba2"), **GREEDY)
    llama = LlamaConfig(vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="an assistant rejects tokens, and this one's state cannot be cut back"):
        LlamaForCausalLM(llama).generate(ids, assistant_model=build("mamba2"), max_new_tokens=4)
    with pytest.raises(ValueError, match="not used by the model.*colour"):
        hybrid.generate(ids, colour="blue", **GREEDY)


def test_states_as_values(hybrid):
    state = hybrid(tokens(3, 5)).past_key_values
    assert state.rows == 3
    assert ModelState().rows is None
    assert torch.equal(state.repeat(2).fingerprint, state.fingerprint.repeat_interleave(2))
    moved = state.to("cpu")
    assert moved.length == 5
    assert torch.equal(moved.fingerprint, state.fingerprint)
    assert state.as_prefix().length == 0
    embedded = hybrid(inputs_embeds=hybrid.get_input_embeddings()(tokens(3, 5))).past_key_values
    assert embedded.fingerprint is None
    assert hybrid(tokens(3, 2), past_key_values=embedded).past_key_values.fingerprint is None


def test_fingerprints_are_of_the_text_and_not_of_how_it_is_cut():
    ids = tokens(2, 300)
    whole = fingerprint(ids)
    for size in (1, 7, 299):
        cut = None
        for part in ids.split(size, 1):
            cut = fingerprint(part, cut)
        assert torch.equal(cut, whole)
    # The polynomial in Python's integers.
    value = 0
    for token in ids[0].tolist():
        value = (value * 6364136223846793005 + token + 1) % 2**64
    assert whole[0].item() % 2**64 == value
    changed = ids.clone()
    changed[0, 17] += 1
    assert (fingerprint(changed) != whole).tolist() == [True, False]
    assert fingerprint(tokens(1, 3) * 0) != fingerprint(tokens(1, 4) * 0)
