"""Training of the text encoder."""

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from vgen.data.captions import parse_caption
from vgen.data.shapes import ShapesWorld
from vgen.data.video_io import write_video
from vgen.models.prompts import known_words, make_word_tokenizer
from vgen.pipeline import VideoGenPipeline
from vgen.training.attributes import ATTRIBUTES, CaptionBatches
from vgen.training.masked_words import IGNORED, MaskedCaptions, correct_words, masked_word_loss

from .scripts import encode, logged, train_text_encoder, train_vdm


def test_captions_that_are_too_long_are_reported(text_run, tmp_path, caplog):
    tokenizer, world = AutoTokenizer.from_pretrained(text_run / "tokenizer"), ShapesWorld()
    with pytest.raises(ValueError, match=r"max_sequence_length=3 cuts \w+( and \w+)? from the caption '"):
        CaptionBatches(world, tokenizer, 50, 3)[0, slice(0, 50)]
    options = {"--max_sequence_length": 16, "--num_score_captions": 40, "--max_steps": 1, "--batch_size": 1}
    train_text_encoder(tmp_path, check=False, **options)
    assert any("of 40 captions have more than max_sequence_length=16 tokens" in text for text in caplog.messages)


def test_a_text_encoder_learns_the_attributes_of_its_captions(text_run):
    tokenizer = AutoTokenizer.from_pretrained(text_run / "tokenizer")
    world = ShapesWorld(seed=3)
    batch = CaptionBatches(world, tokenizer, 50, 32)[0, slice(0, 50)]
    input_ids, mask, targets = batch["input_ids"], batch["mask"], batch["targets"]
    for row in range(50):
        scene = parse_caption(world.caption(row))
        words = tokenizer.convert_ids_to_tokens(input_ids[row][mask[row].bool()])
        places = [place for place, values in enumerate(targets[row].tolist()) if values[0] >= 0]
        assert [words[place] for place in places] == [one.color for one in scene.objects]
        for place, one in zip(places, scene.objects, strict=True):
            legal = ATTRIBUTES.values()
            values = [names[number] for names, number in zip(legal, targets[row, place].tolist(), strict=True)]
            assert values == [
                one.color, one.shape, one.motion, one.size, one.speed, scene.background, len(scene.objects)
            ]  # fmt: skip


def test_an_automatic_precision_is_recorded_and_kept_by_a_resumed_run(tmp_path, monkeypatch, caplog):
    for steps, fast in ((2, "bf16"), (4, "no")):
        monkeypatch.setattr("vgen.training.run.fast_precision", lambda device, fast=fast: fast)
        options = {"--mixed_precision": "auto", "--max_steps": steps, "--lr_schedule": "constant"}
        done = train_text_encoder(tmp_path, **options)
        assert yaml.safe_load((tmp_path / "config.yaml").read_text())["mixed_precision"] == "bf16"
    assert "after 2 steps" in done.stdout
    expected = "the run keeps mixed_precision=bf16, with which it began; no is faster on this machine"
    assert caplog.messages.count(expected) == 1
    assert not any("not resumed exactly" in text and "mixed_precision" in text for text in caplog.messages)


def captioned_videos(folder, captions):
    """A folder with a short video for each caption, or without a caption for `None`."""
    folder.mkdir()
    for index, caption in enumerate(captions):
        frames = np.random.default_rng(index).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
        write_video(frames, folder / f"{index}.mp4", frame_rate=8)
        if caption is not None:
            (folder / f"{index}.txt").write_text(caption)
    return folder


def test_masked_words_are_the_targets_and_differ_by_sample():
    captions = [f"one two three four five {word} seven eight nine ten" for word in ("six", "sechs")]
    words = sorted({word for caption in captions for word in caption.split()})
    tokenizer = make_word_tokenizer(words, 16)
    batches = MaskedCaptions(captions, tokenizer, 8, 16, seed=0)
    batch, again = batches.draw(range(400)), batches[1, slice(0, 8)]
    ids, targets = batch["input_ids"], batch["targets"]
    for name in batch:
        assert torch.equal(batch[name][8:16], again[name])
    masked = targets != IGNORED
    assert torch.equal(masked, ids == tokenizer.unk_token_id)
    whole = torch.where(masked, targets, ids)
    texts = {" ".join(tokenizer.convert_ids_to_tokens(row[:10])) for row in whole}
    assert texts == set(captions)
    counts = masked.sum(1)
    assert counts.min() == 2 and counts.max() == 3  # 15 to 30% of ten words, rounded
    assert (masked.float().mean(0)[:10] > 0.1).all() and not masked[:, 10:].any()

    logits = torch.randn(400, 16, len(tokenizer), generator=torch.Generator().manual_seed(0))
    errors = [
        torch.stack([-row[i].log_softmax(-1)[target[i]] for i in range(16) if target[i] != IGNORED]).mean()
        for row, target in zip(logits, targets, strict=True)
    ]
    torch.testing.assert_close(masked_word_loss(logits, targets), sum(errors))
    logits.scatter_(2, targets.clamp_min(0)[..., None], 100.0)
    assert correct_words(logits, targets)["accuracy"].all()


def test_a_text_encoder_learns_the_captions_of_videos_and_a_denoiser_uses_it(vae_run, tmp_path):
    captions = ["A cat runs left.", "a dog runs right", "A DOG sleeps, left", None, "a cat sleeps"]
    videos = captioned_videos(tmp_path / "videos", captions)
    options = {
        "--data": videos, "--max_steps": 60, "--learning_rate": 0.002, "--sample_every": 60, "--save_every": 60,
        "--batch_size": 8, "--dim": 128, "--num_layers": 2, "--num_score_captions": 100,
    }  # fmt: skip
    train_text_encoder(tmp_path / "text", **options)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text/tokenizer")
    assert known_words(tokenizer) == [",", "a", "cat", "dog", "left", "right", "runs", "sleeps"]
    assert logged(tmp_path / "text", "accuracy")[-1][1] > 0.95  # the other words of a caption decide
    encode(vae_run, tmp_path / "latents", **{"--data": videos, "--num_clips": None})
    runs = vae_run, tmp_path / "text", tmp_path / "latents"
    options = {"--held_out_latents": tmp_path / "latents", "--num_score_clips": 4}
    train_vdm(runs, tmp_path / "run", **{"--train_text_encoder": "true"} | options)
    pipe = VideoGenPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert known_words(pipe.tokenizer) == known_words(tokenizer)
    assert pipe("a cat runs right").frames.shape == (1, 5, 16, 16, 3)


def test_one_caption_for_all_videos_is_enough(tmp_path):
    videos = captioned_videos(tmp_path / "videos", ["smoke", "smoke", "", None])
    train_text_encoder(tmp_path / "text", **{"--data": videos, "--max_steps": 1})
    assert known_words(AutoTokenizer.from_pretrained(tmp_path / "text/tokenizer")) == ["smoke"]


def test_videos_without_captions_need_no_text_encoder(tmp_path):
    videos = captioned_videos(tmp_path / "videos", [None, "", "..."])
    done = train_text_encoder(tmp_path / "text", check=False, **{"--data": videos})
    assert done.returncode and "have no captions, so no text encoder is needed" in done.stderr


def test_a_limited_vocabulary_has_the_most_frequent_words(tmp_path):
    videos = captioned_videos(tmp_path / "videos", ["a cat", "a dog", "a cat"])
    done = train_text_encoder(tmp_path / "text", **{"--data": videos, "--max_words": 2, "--max_steps": 1})
    assert known_words(AutoTokenizer.from_pretrained(tmp_path / "text/tokenizer")) == ["a", "cat"]
    assert "the vocabulary has the 2 most frequent of 3 words" in done.stdout
