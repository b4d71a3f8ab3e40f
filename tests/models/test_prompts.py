from types import SimpleNamespace

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from vgen.models.prompts import (
    CutCaptions,
    embed,
    known_words,
    load_text_encoder,
    make_text_encoder,
    make_word_tokenizer,
    tokenize,
    unknown_words,
    warn_truncated,
    warn_unknown_words,
)

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


@pytest.fixture
def warnings(monkeypatch):
    logged = []
    monkeypatch.setattr("vgen.models.prompts.logger.warning", logged.append)
    return logged


def test_the_warning_of_unknown_words_is_short_and_has_the_three_nearest_known_words(warnings):
    tokenizer = make_word_tokenizer([*(f"word{index}" for index in range(500)), "circle", "circles", "cycle"], 8)
    warn_unknown_words(tokenizer, ["a circl", "x" * 1000])
    assert len(warnings) == 1 and len(warnings[0]) < 250 and "not trained with: a, circl, xxx" in warnings[0]
    assert warnings[0].split("known words: ")[1].count(",") == 2 and "circle" in warnings[0].split("known words: ")[1]
    warnings.clear()
    warn_unknown_words(tokenizer, ["circle"])
    assert not warnings


@pytest.mark.parametrize("missing", ["normalizer", "pre_tokenizer"])
def test_a_tokenizer_without_a_part_has_unknown_words(tokenizer, missing):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "red": 1}, unk_token="<unk>"))
    if missing == "normalizer":
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")
    assert unknown_words(whole, "red") == [] and unknown_words(whole, "blue") == ["blue"]


def test_the_end_that_is_cut_from_a_prompt_is_reported(tokenizer, warnings):
    warn_truncated(tokenizer, ["a red circle moves right, A Purple Circle", "a red circle"], 6)
    assert len(warnings) == 1 and "max_sequence_length=6" in warnings[0] and "10 tokens" in warnings[0]
    assert warnings[0].endswith("the end is cut: ', A Purple Circle'")


def test_cut_captions_are_counted_and_the_longest_is_shown(tokenizer, warnings):
    cut = CutCaptions(tokenizer, 6)
    cut.add(["a red circle", "", " "] * 2000)
    cut.warn()
    assert not warnings
    cut.add(["a red circle moves right, A Purple Circle", "a circle, a circle, a circle", "a red circle moves right"])
    cut.warn()
    cut.warn()
    assert warnings == [
        "2 of 2003 captions have more than max_sequence_length=6 tokens, and their ends are cut; of the longest, with "
        "10 tokens, this is cut: ', A Purple Circle'"
    ]
    cut.add([" ".join(["a red circle moves right"] * 100)])
    cut.warn()
    assert len(warnings) == 2 and warnings[1].startswith("3 of 2004") and warnings[1].endswith("...")
    assert "501 tokens" in warnings[1] and len(warnings[1]) < 400


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_cut_end_continues_what_other_tokenizers_keep(kind, warnings):
    letters = "abcdefghij"
    if kind == "bpe":
        backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters + "<>")}, []))
    else:
        backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581", -1.0), *((c, -2.0) for c in letters)], 0))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    template = processors.TemplateProcessing(single="< $A >", special_tokens=[("<", 10), (">", 11)])
    backend.post_processor = template if kind == "bpe" else backend.post_processor
    whole = PreTrainedTokenizerFast(tokenizer_object=backend)
    warn_truncated(whole, [letters], 6)
    assert warnings[0].endswith("'efghij'" if kind == "bpe" else "'fghij'")  # < abcd > or _abcde
    warnings.clear()
    warn_truncated(whole, [letters[:4]], 6)
    assert not warnings


def save_text_encoder(folder, edit):
    """A UMT5 encoder in the format of public checkpoints, whose weights are edited."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    UMT5EncoderModel(UMT5Config(**sizes, is_encoder_decoder=False)).save_pretrained(folder / "text_encoder")
    path = folder / "text_encoder/model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})
    return weights


WEIGHT = "encoder.block.1.layer.1.DenseReluDense.wo.weight"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda weights: weights.pop(WEIGHT), f"missing keys: {WEIGHT}"),
        (lambda weights: weights.update(extra=torch.ones(1)), "unexpected keys: extra"),
        (lambda weights: weights.pop("shared.weight"), "missing keys: "),
        (lambda weights: weights[WEIGHT].fill_(float("inf")), f"{WEIGHT} of .* is NaN or infinite"),
    ],
)
def test_a_text_encoder_is_loaded_strictly(tmp_path, edit, named):
    save_text_encoder(tmp_path, edit)
    with pytest.raises(ValueError, match=named):
        load_text_encoder(tmp_path)


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_tied_embeddings_load_under_either_name(tmp_path, name):
    def rename(weights):
        embeddings = weights.pop("shared.weight")
        names = ["shared.weight", "encoder.embed_tokens.weight"] if name == "both" else [name]
        weights.update({one: embeddings.clone() for one in names})

    weights = save_text_encoder(tmp_path, rename)
    loaded = load_text_encoder(tmp_path)
    assert torch.equal(
        loaded.get_input_embeddings().weight,
        next(weights[key] for key in weights if "block" not in key and weights[key].shape == (20, 32)),
    )
    assert loaded.shared.weight is loaded.encoder.embed_tokens.weight


@pytest.mark.parametrize("fixed", [False, True])
def test_a_saved_tokenizer_does_not_depend_on_earlier_calls(tmp_path, fixed):
    tokenizer = make_word_tokenizer(["red", "blue"], 8)
    if fixed:
        tokenizer.backend_tokenizer.enable_truncation(5)
        tokenizer.backend_tokenizer.enable_padding(length=5, pad_id=1)
    tokenizer.save_pretrained(tmp_path / "before")
    tokenize(tokenizer, ["red blue"], 8)
    warn_truncated(tokenizer, ["red blue"], 2)
    tokenizer.save_pretrained(tmp_path / "after")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "before" / name).read_text() == (tmp_path / "after" / name).read_text()
