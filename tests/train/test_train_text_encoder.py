"""Training of the text encoder."""

import runpy

from transformers import AutoTokenizer

from vgen.data.captions import parse_caption
from vgen.data.shapes import ShapesWorld

from .scripts import ROOT


def test_a_text_encoder_is_taught_what_its_captions_say(text_run):
    script = runpy.run_path(str(ROOT / "train/train_text_encoder.py"))
    config = script["TextEncoderConfig"](output_dir=text_run)
    tokenizer = AutoTokenizer.from_pretrained(text_run / "tokenizer")
    world = ShapesWorld(seed=3)
    input_ids, mask, said = script["draw"](world, tokenizer, range(50), config)
    for row in range(50):
        scene = parse_caption(world.caption(row))
        words = tokenizer.convert_ids_to_tokens(input_ids[row][mask[row].bool()])
        places = [place for place, values in enumerate(said[row].tolist()) if values[0] >= 0]
        assert [words[place] for place in places] == [one.color for one in scene.objects]
        for place, one in zip(places, scene.objects, strict=True):
            legal = script["ATTRIBUTES"].values()
            values = [names[number] for names, number in zip(legal, said[row, place].tolist(), strict=True)]
            assert values == [
                one.color, one.shape, one.motion, one.size, one.speed, scene.background, len(scene.objects)
            ]  # fmt: skip
