"""Clips of training, drawn or decoded, whoever does it."""

from functools import partial

import numpy as np
import pytest
import torch

from tests.fixtures import write_tar
from vgen.data.clips import Sampling
from vgen.data.shapes import ShapesWorld, render, vocabulary
from vgen.data.video_io import write_video
from vgen.models.prompts import make_word_tokenizer
from vgen.training.attributes import ATTRIBUTES, CaptionBatches, attribute_loss
from vgen.training.feed import Feed
from vgen.training.sources import (
    ClipBatches,
    ClipConfig,
    ShapesSource,
    VideoSource,
    consecutive_clips,
    open_source,
    plan_clips,
)

from .test_feed import run_of, same

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("warm_workers")


@pytest.fixture
def videos(tmp_path):
    """Three videos of noise."""
    for index in range(3):
        frames = np.random.default_rng(index).integers(0, 256, (12, 24, 32, 3), dtype=np.uint8)
        write_video(frames, tmp_path / f"{index}.mp4", frame_rate=8.0)
    return tmp_path


@pytest.mark.parametrize("kind", ["shapes", "videos"])
def test_clips_do_not_depend_on_the_workers(videos, kind):
    options = {"data": str(videos), "augment": {"flip": 0.5, "brightness": 0.3}} if kind == "videos" else {}
    drawn = []
    for count in (0, 1):
        config = ClipConfig(
            output_dir=videos, batch_size=2, max_steps=6, image_steps=1, image_share=0.3, image_batch_size=3,
            num_frames=5, height=16, width=16, frame_rates=[8.0, 4.0], num_workers=count, **options,
        )  # fmt: skip
        source = open_source(config)
        batches = ClipBatches(source, partial(plan_clips, config))
        drawn.append(list(Feed(run_of(config), batches, batches.size)))
    assert all(same(one, other) for one, other in zip(*drawn, strict=True)) and len(drawn[0]) == 6
    for step, batch in enumerate(drawn[1]):
        indices, num_frames, start = plan_clips(config, step)
        clips, real = source.clips(batch, CPU)
        expected = source.draw(indices, CPU, num_frames, start)
        assert torch.equal(clips, expected[0]) and torch.equal(real, expected[1])
        assert clips.shape == (len(indices), 3, num_frames, 16, 16)


def test_scenes_are_drawn_where_the_training_is():
    """The feed brings scenes, and no pixels."""
    source = ShapesSource("train", 16, 16, seed=2)
    batch = source.batch(range(3, 5), 5, start=1.5)
    assert not any(torch.is_tensor(value) and value.numel() > 2 for value in batch.values())
    world = ShapesWorld(split="train", seed=2)
    expected = render([world.scene(3), world.scene(4)], num_frames=5, height=16, width=16, start=1.5)
    assert torch.equal(source.clips(batch, CPU)[0], expected)


def test_videos_are_decoded_by_workers(videos, monkeypatch):
    source = VideoSource(str(videos), [Sampling(num_frames=5)], 16, 16)
    batches = ClipBatches(source, partial(consecutive_clips, 2, 5))
    config = ClipConfig(output_dir=videos, batch_size=2, max_steps=3, num_workers=1)
    monkeypatch.setattr("vgen.data.clips.iter_video", lambda *_, **__: pytest.fail("decoded in the step"))
    assert len(list(Feed(run_of(config), batches))) == 3


def test_workers_divide_a_stream(videos):
    contents = [(videos / f"{index}.mp4").read_bytes() for index in range(3)]
    for shard in range(2):
        write_tar(videos / f"{shard}.tar", {f"{shard}{index}.mp4": content for index, content in enumerate(contents)})
    source = VideoSource(f"shards:{videos}/{{0..1}}.tar", [Sampling(num_frames=12)], 8, 8)
    assert source.is_stream and source.max_workers == 2
    batches = ClipBatches(source, partial(consecutive_clips, 1, 12))
    config = ClipConfig(output_dir=videos, batch_size=1, max_steps=6, num_workers=4)
    frames = [batch["frames"] for batch in Feed(run_of(config), batches)]
    drawn = [round(one.float().mean().item(), 3) for one in frames]
    # two workers in turn, each with the three videos of its own shard
    assert len(set(drawn[::2])) == 3 and set(drawn[::2]) == set(drawn[1::2])


def test_captions_are_tokenized_by_the_feed(tmp_path):
    tokenizer = make_word_tokenizer(vocabulary(), 32)
    batches = CaptionBatches(ShapesWorld(seed=1), tokenizer, 4, 32)
    drawn = [
        list(Feed(run_of(ClipConfig(output_dir=tmp_path, batch_size=4, max_steps=3, num_workers=count)), batches))
        for count in (0, 1)
    ]
    assert all(map(same, *drawn)) and same(drawn[0][2], batches.draw(range(8, 12)))


def test_the_attribute_loss_counts_mentioned_attributes_only():
    batch = CaptionBatches(ShapesWorld(), make_word_tokenizer(vocabulary(), 32), 4, 32)[0, slice(0, 4)]
    targets = batch["targets"]
    one_hot = [
        torch.nn.functional.one_hot(targets[..., i].clamp_min(0), len(values)).float() * 100
        for i, values in enumerate(ATTRIBUTES.values())
    ]
    assert attribute_loss(one_hot, targets) < 1e-6
    even = [torch.zeros_like(one) for one in one_hot]
    objects = (targets[..., 0] >= 0).sum()
    expected = objects * np.mean([np.log(len(values)) for values in ATTRIBUTES.values()])
    torch.testing.assert_close(attribute_loss(even, targets).double(), expected.double())
