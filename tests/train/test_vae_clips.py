"""What a VAE is trained on."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vgen.data.clips import draw_frame_rates
from vgen.data.shapes import ShapesWorld, render
from vgen.data.video_io import write_video
from vgen.training.sources import ClipConfig, batch_of, open_fresh_source, open_source, start_time


def test_images_come_first_and_then_among_the_clips():
    config = ClipConfig(output_dir="any", image_steps=10, image_share=0.3, image_batch_size=8, batch_size=2)
    batches = [batch_of(config, step) for step in range(1010)]
    assert all(frames == 1 for _, frames in batches[:10])
    assert 250 < sum(frames == 1 for _, frames in batches[10:]) < 350
    for length, size in ((1, 8), (config.num_frames, 2)):
        numbers = [number for indices, frames in batches if frames == length for number in indices]
        assert len(numbers) == len(set(numbers)) == size * sum(frames == length for _, frames in batches)


def test_every_second_step_shows_clips_that_begin_late():
    never, late = (ClipConfig(output_dir="any", latest_moment=latest) for latest in (0.0, 34.0))
    assert all(start_time(never, step, False) == 0 for step in range(200))
    moments = [start_time(late, step, False) for step in range(200)]
    assert set(moments[::2]) == {0.0}
    assert len(set(moments[1::2])) == 100 and 0 < min(moments[1::2]) < 4 and 30 < max(moments) < 34
    for wrong, data in ((-1.0, None), (4.0, "videos")):
        with pytest.raises(ValueError, match="latest_moment"):
            ClipConfig(output_dir="any", latest_moment=wrong, data=data).check()


def test_each_clip_of_a_vae_has_one_of_the_frame_rates(tmp_path):
    settings = {"output_dir": "any", "height": 16, "width": 16, "num_frames": 5, "image_share": 0.1}
    config = ClipConfig(**settings, frame_rates=[8.0, 2.0])
    numbers, cpu, size = range(7, 39), torch.device("cpu"), {"num_frames": 5, "height": 16, "width": 16}
    rates = draw_frame_rates(config.frame_rates, config.seed, numbers)
    assert 8 < rates.count(2.0) < 24 and rates[5:9] == draw_frame_rates(config.frame_rates, 0, range(12, 16))
    source = open_source(config)
    scenes = [source.world.scene(index) for index in numbers]
    clips, _ = source.draw(numbers, cpu, 5, 3.0)
    assert torch.equal(clips, render(scenes, **size, frame_rate=torch.tensor(rates), start=3.0))
    fresh = open_fresh_source(config)  # scores are taken at 8 frames per second
    scenes = [ShapesWorld(split="all", seed=1).scene(index) for index in numbers]
    assert torch.equal(fresh.draw(numbers, cpu, 5)[0], render(scenes, **size))

    frames = np.repeat(np.arange(0, 240, 8, dtype=np.uint8), 16 * 16 * 3).reshape(30, 16, 16, 3)
    write_video(frames, tmp_path / "video.mp4", frame_rate=8.0)
    videos = open_source(replace(config, data=str(tmp_path)))
    clips, _ = videos.draw(numbers, cpu, 5)
    steps = clips.mean(dim=(1, 3, 4)).diff(dim=1).mean(dim=1) * 127.5  # the file's are 8
    assert [round(step / 8) for step in steps.tolist()] == [8 / rate for rate in rates]
    assert videos.draw(numbers, cpu, 1)[0].shape == (32, 3, 1, 16, 16)
    with pytest.raises(ValueError, match="frame_rates"):
        ClipConfig(**settings, frame_rates=[8.0, 0.0]).check()
