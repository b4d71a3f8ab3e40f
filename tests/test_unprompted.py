"""Pipelines without a text encoder, for checkpoints that were trained without prompts."""

import copy

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from vgen.cli import app
from vgen.data.video_io import write_video
from vgen.pipeline import VideoGenPipeline, load_rollout

from .test_pipeline import make_pipeline, seeded
from .test_unet_pipeline import build

TASKS = {"tasks": ["leading", "keyframes"], "window": 4, "sink": 1, "chunk_size": 2}
CLIP = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)


def randomize(network):
    generator = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    return network


@pytest.fixture(scope="module", params=["transformer", "unet"])
def prompted(request):
    """A pipeline whose prompts have no effect, because the output layers of cross-attention are zero."""
    if request.param == "unet":
        pipe = build(randomize, **TASKS)
    else:
        pipe = make_pipeline(**TASKS)
        randomize(pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    for name, weight in pipe.denoiser.named_parameters():
        if "attn2.to_out" in name:
            weight.data.zero_()
    return pipe


@pytest.fixture(scope="module")
def pipe(prompted):
    parts = prompted.components | {"text_encoder": None, "tokenizer": None}
    pipe = VideoGenPipeline(**copy.deepcopy(parts), **prompted.defaults)
    for name, weight in pipe.denoiser.named_parameters():
        if "attn2" in name:
            weight.data.fill_(1e6)  # is never read
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_videos_are_those_of_a_pipeline_whose_prompts_have_no_effect(prompted, pipe):
    calls = {
        "predict": ((CLIP,), {"num_frames": 8}),
        "interpolate": ((CLIP[:3],), {"factor": 4}),
        "__call__": ((), {"image": CLIP[0]}),
    }
    for name, (positional, options) in calls.items():
        made = getattr(pipe, name)(*positional, generator=seeded(), **options).frames
        prompt = {"prompt": "a red circle", "guidance_scale": 1.0}
        expected = getattr(prompted, name)(*positional, generator=seeded(), **options, **prompt).frames
        assert np.isfinite(made).all() and np.ptp(made) > 0.1
        assert np.array_equal(made, expected), name
    assert pipe(num_videos_per_prompt=2, output_type="pt").frames.shape == (2, 9, 3, 16, 16)
    assert len(pipe(image=[CLIP[0], CLIP[1]]).frames) == 2
    assert len(pipe.predict([CLIP, CLIP[::-1]], 4).frames) == 2


def test_a_saved_pipeline_and_rollout_continue_alike(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = VideoGenPipeline.from_pretrained(tmp_path / "pipe")
    rollout = pipe.rollout(video=CLIP, num_frames=16, generator=seeded())
    rollout.step()
    rollout.save(tmp_path / "rollout")
    assert torch.equal(load_rollout(tmp_path / "rollout", loaded).step(), rollout.step())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a red circle"}, "trained without prompts"),
        ({"negative_prompt": "a red circle"}, "trained without prompts"),
        ({"prompt_embeds": torch.zeros(1, 8, 32)}, "trained without prompts"),
        ({"guidance_scale": 2.0}, "guidance_scale must be at most 1 .* trained without prompts, got 2.0"),
    ],
)
def test_prompts_and_guidance_are_rejected(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(**options)
    if "prompt_embeds" not in options:
        with pytest.raises(ValueError, match=message):
            pipe.predict(CLIP, 4, **options)
        with pytest.raises(ValueError, match=message):
            pipe.interpolate(CLIP[:3], **options)


def test_a_pipeline_whose_text_encoder_is_missing_needs_embeddings():
    parts = make_pipeline().components | {"text_encoder": None, "tokenizer": None}
    with pytest.raises(ValueError, match="pass either prompt or prompt_embeds"):
        VideoGenPipeline(**parts)()


def test_the_commands_work(tmp_path):
    whole = make_pipeline(**TASKS)
    parts = whole.components | {"text_encoder": None, "tokenizer": None}
    VideoGenPipeline(**parts, **whole.defaults).save_pretrained(tmp_path / "pipe")
    (tmp_path / "in").mkdir()
    write_video(CLIP.repeat(2, 1).repeat(2, 2), tmp_path / "in" / "clip.mp4", frame_rate=8)
    model, video = ["--model", tmp_path / "pipe"], tmp_path / "in" / "clip.mp4"
    lines = [
        ["predict", video, "--num-frames", 4, *model, "-o", tmp_path / "a.mp4"],
        ["interpolate", video, "--factor", 2, *model, "-o", tmp_path / "b.mp4"],
        ["info", tmp_path / "pipe"],
        ["models"],
        [
            "evaluate", tmp_path / "pipe", "--suite", "folder", "--data", tmp_path / "in", "--steps", 1,
            "-o", tmp_path / "scores",
        ],
    ]  # fmt: skip
    for words in lines:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, (words[0], done.output)
    assert all(task in done.output for task in ("reconstruction", "prediction", "interpolation"))
    done = CliRunner().invoke(app, ["generate", "a red circle", *map(str, model), "-o", str(tmp_path / "d.mp4")])
    assert done.exit_code and "trained without prompts" in done.output
