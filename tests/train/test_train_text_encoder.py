"""Training of the text encoder."""

from transformers import AutoTokenizer

from vgen.data.captions import parse_caption
from vgen.data.shapes import ShapesWorld
from vgen.training.attributes import ATTRIBUTES, CaptionBatches


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
