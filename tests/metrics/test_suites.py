import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser

from vgen.data.clips import Sampling, stack_clips
from vgen.data.shapes import ShapesWorld, render
from vgen.data.sources import open_clips
from vgen.data.video_io import write_video
from vgen.metrics.suites import (
    SuiteConfig,
    combine,
    copy_last,
    curves,
    flow_interpolation,
    hold_keyframes,
    linear_blend,
    open_suite,
    quantize,
    score_pairs,
    score_time,
)

WORLD = {"num_frames": 17, "height": 64, "width": 64, "frame_rate": 8.0}


@pytest.fixture
def clips():
    return render([ShapesWorld(seed=1).scene(index) for index in range(2)], num_frames=9)


@pytest.fixture
def digits(tmp_path):
    path = tmp_path / "digits-idx3-ubyte.gz"
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(">IIII", 0x803, *images.shape) + images.tobytes())
    return path


def test_baselines_keep_the_given_frames_and_equal_their_formulas(clips):
    copied, blended = copy_last(clips, 3), linear_blend(clips, [0, 4, 8])
    assert torch.equal(copied[:, :, :3], clips[:, :, :3])
    assert all(torch.equal(copied[:, :, index], clips[:, :, 2]) for index in range(3, 9))
    assert torch.equal(blended[:, :, ::4], quantize(clips[:, :, ::4]))
    held = hold_keyframes(clips, [0, 4, 8])
    assert all(torch.equal(held[:, :, index], quantize(clips[:, :, index // 4 * 4])) for index in range(9))
    torch.testing.assert_close(blended[:, :, 1], 0.75 * clips[:, :, 0] + 0.25 * clips[:, :, 4], atol=1 / 127, rtol=0)
    assert linear_blend(clips, [0, 3, 6]).shape[2] == 7  # frames after the last keyframe are dropped


def test_flow_follows_motion_better_than_a_blend():
    generator = torch.Generator().manual_seed(0)
    canvas = torch.nn.functional.interpolate(
        torch.rand(1, 3, 12, 12, generator=generator) * 2 - 1, size=96, mode="bicubic"
    )
    clip = torch.stack([canvas.clamp(-1, 1)[..., 16:80, 16 - k : 80 - k] for k in range(5)], dim=2)
    scores = [
        score_pairs(method(clip, [0, 4]), clip, [1, 2, 3])["psnr"].item()
        for method in (linear_blend, flow_interpolation)
    ]
    assert scores[1] > scores[0] + 6


def test_scores_are_per_clip_and_identical_frames_count_as_a_hundred(clips):
    generated = clips.clone()
    generated[1] = (generated[1] + 0.2).clamp(-1, 1)
    actual = score_pairs(generated, clips, [4, 5])
    assert {name: value.shape for name, value in actual.items()} == dict.fromkeys(
        ["psnr", "ssim", "mse", "mae", "sharpness"], (2,)
    )
    assert actual["psnr"][0] == 100 and actual["mse"][0] == 0 and actual["ssim"][0] == pytest.approx(1)
    mse = ((generated[1, :, 4:6] - clips[1, :, 4:6]) / 2).square().mean()
    assert actual["mse"][1] == pytest.approx(mse.item()) and actual["psnr"][1] == pytest.approx(
        -10 * mse.log10().item()
    )
    frames = curves(generated, clips, [4, 5])
    assert frames["psnr"].shape == (2, 2) and frames["ssim"][1].mean() < frames["ssim"][0].mean()
    assert set(score_time(generated)) == {"warping error", "flicker", "motion"}


def test_several_samples_give_their_mean_and_the_best_of_each_clip(clips):
    far, near = (clips + 0.5).clamp(-1, 1), (clips + 0.01).clamp(-1, 1)
    samples = torch.stack([far, near])
    samples[:, 1] = samples[:, 1].flip(0)
    actual = combine(samples, clips, [4, 5])
    torch.testing.assert_close(actual["mean of 2"], samples.mean(0))
    torch.testing.assert_close(actual["best of 2"], near)


def test_shapes_are_the_same_each_time_and_checked(clips):
    suite = open_suite(SuiteConfig(**WORLD, num_clips=3))
    samples = suite.samples(range(1, 3))
    assert len(suite) == 3 and samples.numbers == [1, 2] and samples.clips.shape == (2, 3, 17, 64, 64)
    assert torch.equal(samples.clips, open_suite(SuiteConfig(**WORLD, num_clips=3)).samples(range(1, 3)).clips)
    assert suite.correct(1, samples.clips[0]) == {"correct": 1.0}
    assert suite.correct(1, samples.clips[1]) == {"correct": 0.0}


def test_a_folder_gives_windows_and_their_captions(tmp_path):
    for index in range(3):
        frames = np.random.default_rng(index).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
        write_video(frames, tmp_path / f"{index}.mp4", frame_rate=8)
    (tmp_path / "0.txt").write_text("noise")
    settings = {
        "suite": "folder",
        "data": str(tmp_path),
        "num_frames": 5,
        "height": 32,
        "width": 32,
        "frame_rate": 8.0,
    }
    settings |= {"given": 1}
    suite = open_suite(SuiteConfig(**settings))
    assert len(suite) == 6 and len(open_suite(SuiteConfig(**settings, num_clips=2))) == 2
    samples = suite.samples(range(6))
    assert samples.clips.shape == (6, 3, 5, 32, 32) and samples.captions.count("noise") == 2
    assert suite.correct(0, samples.clips[0]) == {} and not suite.captioned
    overlapping = open_suite(SuiteConfig(**settings, hop=2))
    clips = overlapping.samples(range(len(overlapping))).clips
    # each video has windows at frames 0, 2, 4 and 6, of which those at 0 and 2 share three frames
    assert len(clips) == 12
    shared = sum(torch.equal(a[:, 2:], b[:, :3]) for a in clips for b in clips)
    assert shared == 9


def test_digits_bounce(digits):
    settings = WORLD | {"suite": "moving-mnist", "data": str(digits), "num_frames": 21, "given": 10}
    samples = open_suite(SuiteConfig(**settings, num_clips=4)).samples(range(2, 4))
    assert samples.clips.shape == (2, 3, 21, 64, 64) and samples.captions == [None, None]
    trained = stack_clips([open_clips(str(digits), Sampling(num_frames=21), 64, 64).sample(2)], torch.device("cpu"))[0]
    assert not torch.equal(samples.clips[0], trained[0])  # other trajectories than those of training's default seed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suite": "shape"}, "suite must be one of 'shapes', 'folder', 'moving-mnist', got 'shape'"),
        ({"suite": "folder"}, "data must be set for suite='folder', got None"),
        ({"data": "somewhere"}, "data must be None for suite='shapes', got 'somewhere'"),
        ({"given": 17}, "given must be an integer from 1 to 16, got 17"),
        ({"factor": 1}, "factor must be an integer from 2 to 16, got 1"),
        ({"factor": 17}, "factor must be an integer from 2 to 16, got 17"),
        ({"factor": 2.0}, "factor must be an integer from 2 to 16, got 2.0"),
        ({"num_frames": 2, "given": 1, "factor": 2}, "num_frames must be an integer of at least 3, got 2"),
        ({"num_clips": 0}, "num_clips must be an integer of at least 1, got 0"),
        ({"height": 0}, "height must be an integer of at least 1, got 0"),
        ({"width": 64.0}, "width must be an integer of at least 1, got 64.0"),
        ({"hop": 2}, "hop must be None for suite='shapes', got 2"),
        ({"hop": 0}, "hop must be an integer of at least 1, got 0"),
        ({"frame_rate": 0.0}, "frame_rate must be positive, got 0.0"),
        ({"frame_rate": float("nan")}, "frame_rate must be a finite number, got nan"),
    ],
)
def test_invalid_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        open_suite(SuiteConfig(**WORLD | settings))


@dataclass(kw_only=True)
class ModelConfig:
    """The first base class of a configuration, as that of an evaluation has."""

    output_dir: Path = Path()


@dataclass(kw_only=True)
class ConfigWithTwoBases(ModelConfig, SuiteConfig):
    """The settings of a suite come from the second base class."""


def test_command_lines_check_the_suite_of_configs_that_inherit_it():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ConfigWithTwoBases)
    assert "Unvalidated" not in parser.format_help()
    assert parser.parse_args(["--suite", "folder"]).suite == "folder"
    with pytest.raises(ArgumentError, match="suite"):
        parser.parse_args(["--suite", "shape"])


def test_data_of_another_suite_raises(digits):
    with pytest.raises(ValueError, match="does not match suite='folder'"):
        open_suite(SuiteConfig(**WORLD, suite="folder", data=str(digits)))


@pytest.mark.parametrize("other", [torch.zeros(2, 3, 8, 64, 64), torch.full((2, 3, 9, 64, 64), float("nan"))])
def test_clips_that_cannot_be_compared_raise(clips, other):
    with pytest.raises(ValueError, match="the same shape|not finite"):
        score_pairs(other, clips, [4])
