from types import SimpleNamespace

import pytest
import torch
from diffusers import WanPipeline
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5EncoderModel

from vgen.models.prompts import embed, known_words, make_text_encoder, make_word_tokenizer, tokenize, unknown_words

WORDS = ["a", "red", "circle", "moves", "right", ","]
PROMPTS = ["a red circle moves right", "", "A Red circle, a circle.", "a purple circle"]


@pytest.fixture
def tokenizer():
    return make_word_tokenizer(WORDS, max_length=8)


@pytest.fixture
def text_encoder():
    return make_text_encoder(len(WORDS) + 3, dim=32, num_layers=2).eval()


def test_case_and_punctuation_of_words_do_not_change_their_ids(tokenizer):
    ids, mask = tokenize(tokenizer, PROMPTS, 8)
    a, red, circle, moves, right, comma = range(3, 9)
    assert ids.tolist() == [
        [a, red, circle, moves, right, 1, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0],
        [a, red, circle, comma, a, circle, 1, 0],
        [a, 2, circle, 1, 0, 0, 0, 0],
    ]
    assert torch.equal(mask, (ids != 0).long())


def test_a_long_prompt_is_truncated_and_keeps_its_end_token(tokenizer):
    ids, mask = tokenize(tokenizer, ["a " * 20], 8)
    assert ids.tolist() == [[3] * 7 + [1]] and mask.sum() == 8


def test_saved_tokenizer_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for ours, theirs in zip(tokenize(tokenizer, PROMPTS, 8), tokenize(loaded, PROMPTS, 8), strict=True):
        assert torch.equal(ours, theirs)
    assert loaded.model_max_length == 8
    assert unknown_words(loaded, "a purple circle") == ["purple"]


def test_unknown_words_are_named_once_and_in_order(tokenizer):
    assert unknown_words(tokenizer, "A purple, green circle: purple!") == ["purple", "green"]
    assert unknown_words(tokenizer, "") == []
    assert unknown_words(tokenizer, "a RED circle, moves right.") == []


def test_known_words_are_sorted_and_without_special_tokens(tokenizer):
    assert known_words(tokenizer) == sorted(WORDS)


def test_other_tokenizers_have_no_known_or_unknown_words(tokenizer):
    assert known_words(SimpleNamespace()) == []
    assert unknown_words(SimpleNamespace(), "anything") == []


@torch.no_grad()
def test_embeddings_equal_those_of_wan_pipeline(tokenizer, text_encoder):
    pipeline = SimpleNamespace(tokenizer=tokenizer, text_encoder=text_encoder, _execution_device=torch.device("cpu"))
    expected = WanPipeline._get_t5_prompt_embeds(pipeline, PROMPTS, max_sequence_length=8, dtype=torch.float32)
    torch.testing.assert_close(embed(text_encoder, *tokenize(tokenizer, PROMPTS, 8)), expected)


@torch.no_grad()
def test_embeddings_are_zero_after_the_prompt_and_only_there(tokenizer, text_encoder):
    ids, mask = tokenize(tokenizer, PROMPTS, 8)
    embeddings = embed(text_encoder, ids, mask)
    assert embeddings.shape == (4, 8, 32)
    assert torch.equal(embeddings.abs().amax(-1) > 0, mask.bool())


@torch.no_grad()
def test_padding_changes_nothing(tokenizer, text_encoder):
    short = embed(text_encoder, *tokenize(tokenizer, PROMPTS[:1], 6))
    long = embed(text_encoder, *tokenize(tokenizer, PROMPTS[:1], 8))
    torch.testing.assert_close(long[:, :6], short, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_clip_embeddings_after_the_prompt_are_kept():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=20, max_position_embeddings=8, **sizes)).eval()
    ids, mask = torch.tensor([[1, 5, 2, 2]]), torch.tensor([[1, 1, 1, 0]])
    embeddings = embed(encoder, ids, mask)
    assert torch.equal(embeddings, encoder(ids)[0])
    assert embeddings[0, 3].abs().max() > 0


def test_the_text_encoder_depends_on_its_seed_and_not_on_the_global_generator(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, same, other = (make_text_encoder(9, 32, 1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.shared.weight, other.shared.weight)
    first.save_pretrained(tmp_path)
    loaded = T5EncoderModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), loaded.parameters(), strict=True))
