"""The pipeline with the 3D U-Net: every task, as with the Transformer."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

from vgen.data.shapes import ShapesWorld
from vgen.hub import find_packaged
from vgen.io.fingerprint import weights_digest
from vgen.metrics.prompt import adherence
from vgen.models.unet import UNet3D
from vgen.pipeline import VideoGenPipeline, load_rollout

from .sampling.test_rollout import OTHER, frames_of, latents_of
from .test_pipeline import PROMPT, make_pipeline, seeded


def build(randomize, **config):
    tiny = {
        "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 4,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 32, "attention_head_dim": 2,
        "temporal_head_dim": 8, "keyframe_slots": 4, "group_modes": ["full", "causal", "chunk"],
        "frame_rate_embedding": True, "tasks": ["text", "leading", "keyframes"], "chunk_size": 1, "window": 2,
        "sink": 1,
    }  # fmt: skip
    parts = make_pipeline().components
    pipe = VideoGenPipeline(
        **parts | {"transformer": None, "unet": randomize(UNet3D(**tiny | config))},
        height=16, width=16, num_frames=9, frame_rate=8.0, num_inference_steps=2, guidance_scale=3.0,
        max_sequence_length=8,
    )  # fmt: skip
    randomize(pipe.vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(randomize):
    return build(randomize)


def test_it_generates_and_is_saved_and_loaded(pipe, tmp_path):
    frames = pipe(PROMPT, generator=seeded()).frames[0]
    assert frames.shape == (9, 16, 16, 3) and frames.std() > 0
    pipe.save_pretrained(tmp_path)
    for loaded in (VideoGenPipeline.from_pretrained(tmp_path), DiffusionPipeline.from_pretrained(tmp_path)):
        assert not hasattr(loaded, "transformer") and isinstance(loaded.denoiser, UNet3D)
        loaded.set_progress_bar_config(disable=True)
        assert np.array_equal(loaded(PROMPT, generator=seeded()).frames[0], frames)
    with pytest.raises(ValueError, match="one denoiser"):
        VideoGenPipeline(**pipe.components | {"transformer": make_pipeline().transformer})


def test_batches_equal_singles_and_output_types_agree(pipe):
    both = pipe([PROMPT, OTHER], generator=[seeded(0), seeded(1)], output_type="pt").frames
    for index, prompt in enumerate((PROMPT, OTHER)):
        array = pipe(prompt, generator=seeded(index)).frames
        assert abs(both[index].movedim(1, -1).numpy() - array[0]).max() < 1e-4
        assert np.array_equal(pipe(prompt, generator=seeded(index), return_dict=False)[0], array)
        images = pipe(prompt, generator=seeded(index), output_type="pil").frames[0]
        assert abs(np.stack([np.array(image) for image in images]) / 255 - array[0]).max() < 1 / 255
    twice = pipe(PROMPT, num_videos_per_prompt=2, generator=[seeded(0), seeded(1)], output_type="pt").frames
    assert (twice[0] - both[0]).abs().max() < 1e-4 and (twice[1] - both[0]).abs().max() > 1e-3


@pytest.mark.parametrize("indices", [(0,), (0, 1, 2, 3, 4), (0, 8), (3, 6)])
@pytest.mark.parametrize("groups", ["full", "causal"])
def test_known_frames_come_back_and_the_rest_follows_from_them(pipe, video, indices, groups):
    def generate(video):
        known = {index: video[index] for index in indices}
        return pipe(PROMPT, frames=known, groups=groups, generator=seeded()).frames[0]

    frames = generate(video)
    assert np.array_equal((frames[list(indices)] * 255).round().astype(np.uint8), video[list(indices)])
    others = [index for index in range(9) if index not in indices]
    for index in indices:
        changed = video.copy()
        changed[index] = 255 - changed[index]
        assert abs(generate(changed)[others] - frames[others]).max() > 1e-4


def test_interpolation_and_coarse_to_fine(randomize, video):
    pipe = build(randomize, trained_token_frames=5)
    frames = pipe.interpolate(video[:4], 7, PROMPT, generator=seeded()).frames[0]
    assert np.array_equal((frames[::7] * 255).round().astype(np.uint8), video[:4])
    assert len(frames_of(pipe.rollout(PROMPT, keyframe_interval=4, num_frames=22, generator=seeded()))) == 22


@pytest.mark.parametrize("given", [1, 5, 9])
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_before_eviction_a_chunk_equals_a_full_pass_with_the_same_groups(
    randomize, video, monkeypatch, given, chunk_size
):
    pipe = build(randomize, chunk_size=chunk_size, window=6)
    rollout = pipe.rollout(PROMPT, video[:given], num_frames=4 * chunk_size, generator=seeded(), guidance_scale=1.0)
    latents, _ = latents_of(rollout, monkeypatch)
    known = (given - 1) // 4 + 1
    history = rollout.state.history[:known]
    clean = torch.cat([frame for frame, *_ in history], dim=2)
    whole = pipe(
        PROMPT, frames=dict(enumerate(video[:given])), num_frames=given + 4 * chunk_size, groups="chunk",
        latents=torch.cat([torch.zeros_like(clean), noise_like(pipe, latents)], dim=2), output_type="latent",
        guidance_scale=1.0,
    ).frames  # fmt: skip
    torch.testing.assert_close(whole[:, :, known:], latents, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("chunk_size", "window"), [(1, 2), (2, 2), (3, 3)])
def test_after_a_gap_convolutions_continue_as_in_the_stream_when_all_is_recomputed(randomize, chunk_size, window):
    pipe = build(randomize, chunk_size=chunk_size, window=window)
    for name, weight in pipe.unet.named_parameters():
        first_conv = name.startswith("down_blocks.0.temporal_convs.0.")
        last_attention = name.startswith("up_blocks.1.temporal_attentions.1.")
        if ".attn2.to_out" in name or ("temporal" in name and not (first_conv or last_attention)):
            weight.data.zero_()  # no prompt, and of time one convolution and, after it, one attention
    expected = frames_of(pipe.rollout(PROMPT, num_frames=60, generator=seeded()))
    changing = {"prompt": {0: PROMPT, 25: OTHER, 49: PROMPT}, "num_frames": 60, "prompt_change": "recompute"}
    again = frames_of(pipe.rollout(generator=seeded(), **changing))
    assert abs(again - expected).max() < 1e-4
    pipe.unet.conv_history = 0
    without = frames_of(pipe.rollout(generator=seeded(), **changing))
    assert abs(without - expected).max() > 1e-3


def noise_like(pipe, latents):
    generator = seeded()
    return torch.randn(latents.shape, generator=generator)


def test_nothing_grows_and_a_saved_rollout_continues(pipe, tmp_path):
    rollout = pipe.rollout({0: PROMPT, 60: OTHER}, generator=seeded())
    sizes = set()
    for chunk in range(16):
        next(rollout)
        if chunk >= 5:
            sizes.add((rollout.state.denoiser.num_bytes, rollout.state.decoder.num_bytes))
    assert len(sizes) == 1
    rollout.save(tmp_path / "saved")
    loaded = load_rollout(tmp_path / "saved", pipe)
    for _ in range(3):
        assert np.array_equal(next(loaded), next(rollout))


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler]
)
def test_frames_of_an_inflated_pipeline_are_stable_diffusions_under_equal_noise(stable_diffusion, scheduler):
    images = StableDiffusionPipeline.from_pretrained(stable_diffusion, safety_checker=None)
    videos = VideoGenPipeline.from_stable_diffusion(stable_diffusion)
    for pipe in (images, videos):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    check_frames(images, videos)


def test_an_inflated_pipeline_may_have_the_layout_of_2_1(stable_diffusion, tmp_path):
    images = StableDiffusionPipeline.from_pretrained(stable_diffusion, safety_checker=None)
    layout = {"attention_head_dim": (1, 2), "use_linear_projection": True, "upcast_attention": True}
    torch.manual_seed(1)
    images.unet = UNet2DConditionModel.from_config(images.unet.config, **layout)
    images.scheduler = DDIMScheduler.from_config(images.scheduler.config, prediction_type="v_prediction")
    images.save_pretrained(tmp_path)
    videos = VideoGenPipeline.from_stable_diffusion(tmp_path)
    assert videos.scheduler.config.prediction_type == "v_prediction" and videos.config.height == 32
    check_frames(images, videos)


def test_size_settings_of_an_image_pipeline_are_kept_or_reported_missing(stable_diffusion):
    images = StableDiffusionPipeline.from_pretrained(stable_diffusion, safety_checker=None)
    images.unet.register_to_config(sample_size=(16, 24))
    videos = VideoGenPipeline.from_stable_diffusion(images)
    assert (videos.config.height, videos.config.width) == (32, 48)
    images.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="sample_size=None"):
        VideoGenPipeline.from_stable_diffusion(images)


def check_frames(images, videos):
    for pipe in (images, videos):
        pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 3, 16, 16, generator=seeded())
    settings = {"num_inference_steps": 4, "guidance_scale": 5.0, "negative_prompt": "dark"}
    video = videos(PROMPT, num_frames=3, latents=noise, **settings).frames[0]
    for index in range(3):
        image = images(PROMPT, latents=noise[:, :, index], output_type="np", **settings).images[0]
        assert abs(video[index] - image).max() < 1e-4


def test_an_inflated_pipeline_saves_streams_and_rejects_other_layouts(randomize, stable_diffusion, tmp_path, video):
    pipe = VideoGenPipeline.from_stable_diffusion(
        stable_diffusion, num_frames=4, tasks=["text", "leading", "keyframes"], keyframe_slots=1, window=2,
        group_modes=["full", "causal", "chunk"], temporal_head_dim=8,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "video")
    loaded = VideoGenPipeline.from_pretrained(tmp_path / "video")
    loaded.set_progress_bar_config(disable=True)
    frames = pipe(PROMPT, generator=seeded(), num_inference_steps=2).frames[0]
    assert np.array_equal(frames, loaded(PROMPT, generator=seeded(), num_inference_steps=2).frames[0])
    assert frames.shape == (4, 32, 32, 3)
    latents = pipe(PROMPT, generator=seeded(), num_inference_steps=2, output_type="latent").frames
    streamed = np.concatenate(list(pipe.decode_stream(latents)), axis=1)[0]
    assert abs(streamed / 255 - frames).max() < 1 / 255
    known = np.repeat(np.repeat(video, 2, axis=1), 2, axis=2)
    rolled = frames_of(loaded.rollout(PROMPT, known[:3], num_frames=5, num_inference_steps=2))
    assert rolled.shape == (5, 32, 32, 3)
    keyed = pipe(PROMPT, frames={2: known[0]}, generator=seeded(), num_inference_steps=2).frames[0]
    assert abs(keyed[2] - known[0] / 255).max() < 1e-6
    assert np.array_equal(keyed[1], frames[1])  # what it has beyond the 2D network starts as nothing
    randomize(pipe.unet)
    keyed, other = (
        pipe(PROMPT, frames={2: one}, generator=seeded(), num_inference_steps=2).frames[0] for one in known[:2]
    )
    assert not np.array_equal(keyed[1], other[1])
    with pytest.raises(ValueError, match="contains a VideoGenPipeline"):
        VideoGenPipeline.from_stable_diffusion(tmp_path / "video")


@pytest.mark.slow
def test_the_shipped_one_has_the_transformers_latents_and_follows_prompts():
    folder = find_packaged("vgen/shapes-64-unet")
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 20e6
    pipe, other = (VideoGenPipeline.from_pretrained(name) for name in ("vgen/shapes-64-unet", "vgen/shapes-64"))
    assert isinstance(pipe.denoiser, UNet3D) and weights_digest(pipe.vae) == weights_digest(other.vae)
    pipe.set_progress_bar_config(disable=True)
    world = ShapesWorld(split="train", num_objects=(1,), seed=123)
    captions = [world.caption(number) for number in range(8)]
    generators = [torch.Generator().manual_seed(number) for number in range(8)]
    generated = pipe(captions, num_inference_steps=10, generator=generators, output_type="pt").frames
    clips = [2 * video.movedim(1, 0) - 1 for video in generated]
    assert adherence(clips, [world.scene(number) for number in range(8)])["correct"] >= 0.75


def test_a_pipeline_has_only_the_attribute_of_its_denoiser(randomize, tmp_path):
    unet, transformer = build(randomize), make_pipeline()
    assert hasattr(unet, "unet") and not hasattr(unet, "transformer") and unet.components["transformer"] is None
    assert hasattr(transformer, "transformer") and not hasattr(transformer, "unet")
    with pytest.raises(AttributeError, match="this pipeline has no transformer"):
        _ = unet.transformer
    unet.unet, network = None, unet.unet
    assert not hasattr(unet, "unet")
    unet.unet = network
    unet.save_pretrained(tmp_path)
    assert type(VideoGenPipeline.from_pretrained(tmp_path).unet) is UNet3D
