"""Training of the text encoder."""

import pytest
import yaml
from transformers import AutoTokenizer

from vgen.data.captions import parse_caption
from vgen.data.shapes import ShapesWorld
from vgen.training.attributes import ATTRIBUTES, CaptionBatches

from .scripts import train_text_encoder


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
