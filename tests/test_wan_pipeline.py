"""A folder of diffusers' WanPipeline, loaded by VideoGenPipeline, gives WanPipeline's videos."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from PIL import Image

from vgen.diffusion import change_scheduler
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.vae import CausalVideoVAE
from vgen.pipeline import VideoGenPipeline

PROMPT, NEGATIVE = "a red circle moves", "a blue square"
SETTINGS = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 3.0}


def load(folder):
    theirs, ours = WanPipeline.from_pretrained(folder, dtype=torch.float32), VideoGenPipeline.from_pretrained(folder)
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
    return theirs, ours


def test_the_same_noise_gives_the_same_video(wan_folder):
    theirs, ours = load(wan_folder)
    assert isinstance(ours.vae, CausalVideoVAE) and isinstance(ours.transformer, SpacetimeTransformer)
    noise = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    videos = [pipe(PROMPT, NEGATIVE, latents=noise, **SETTINGS).frames for pipe in (theirs, ours)]
    assert videos[0].std() > 0.05
    assert np.abs(videos[0] - videos[1]).max() < 1e-4


def test_the_video_is_decoded_as_a_stream(wan_folder):
    _, pipe = load(wan_folder)
    pipe.vae.frames_per_slice = 4
    generator = torch.Generator().manual_seed
    latents = pipe(PROMPT, generator=generator(1), output_type="latent", **SETTINGS).frames
    pieces = list(pipe.decode_stream(latents))
    assert [piece.shape[1] for piece in pieces] == [1, 4, 4]
    whole = pipe(PROMPT, generator=generator(1), **SETTINGS).frames
    assert np.abs(np.concatenate(pieces, axis=1) / 255 - whole).max() < 0.51 / 255 + 1e-5


def test_it_is_saved_as_ours(wan_folder, tmp_path):
    _, pipe = load(wan_folder)
    pipe.save_pretrained(tmp_path)
    again = VideoGenPipeline.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "VideoGenPipeline"
    weights = again.transformer.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in pipe.transformer.state_dict().items())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"_class_name": "WanVACEPipeline"}, "WanVACEPipeline"),
        ({"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline"),
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "transformer_2"),
        ({"boundary_ratio": 0.875}, "boundary_ratio"),
    ],
)
def test_other_layouts_are_rejected_by_name(wan_folder, tmp_path, change, named):
    index = json.loads((wan_folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=named):
        VideoGenPipeline.from_pretrained(tmp_path)


def noise_of(seed=0):
    return torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_positional_arguments_are_wan_pipelines(wan_folder):
    theirs, ours = load(wan_folder)
    videos = [pipe(PROMPT, NEGATIVE, 32, 32, 9, 3, 3.0, latents=noise_of()).frames for pipe in (theirs, ours)]
    assert np.abs(videos[0] - videos[1]).max() < 1e-4


def test_negative_embeddings_may_have_another_length(wan_folder):
    theirs, ours = load(wan_folder)
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(1, 7, 32, generator=generator), torch.randn(1, 4, 32, generator=generator)
    videos = [
        pipe(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], latents=noise_of(), **SETTINGS).frames
        for pipe in (theirs, ours)
    ]
    assert np.abs(videos[0] - videos[1]).max() < 1e-4
    with pytest.raises(ValueError, match="expected 1 negative_prompt_embeds, as prompts, got 2"):
        ours(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1].repeat(2, 1, 1), **SETTINGS)


@pytest.mark.parametrize("strength", [0.4, 0.8, 1.0])
@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
def test_a_video_is_changed_as_by_wans_video_to_video(wan_folder, strength, scheduler):
    _, ours = load(wan_folder)
    ours.scheduler = change_scheduler(ours.scheduler, scheduler)
    theirs = WanVideoToVideoPipeline.from_pretrained(wan_folder, scheduler=ours.scheduler)
    theirs.set_progress_bar_config(disable=True)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    video = [Image.fromarray(frame) for frame in pixels]
    settings = {"num_inference_steps": 5, "guidance_scale": 3.0, "strength": strength, "output_type": "latent"}

    def generator(seed):
        return torch.Generator().manual_seed(seed)

    expected = theirs(video, PROMPT, NEGATIVE, 32, 32, generator=generator(2), **settings).frames
    got = ours(PROMPT, NEGATIVE, video=video, generator=generator(2), **settings).frames
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    batch = ours([PROMPT] * 2, NEGATIVE, video=[video, video], generator=[generator(2), generator(3)], **settings)
    torch.testing.assert_close(batch.frames[:1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0.0}, "strength must be a finite number of at most 1 and above 0"),
        ({"strength": 0.1}, "strength times the number of steps must be at least 1, got 0.1 and 3"),
        ({"num_frames": 5}, "num_frames must be the length of the video, 9, got 5"),
        ({"height": 16}, "given frames must have the size of the video, 16x32"),
        ({"sigmas": [1.0, 0.5], "timesteps": [999.0]}, "pass timesteps or sigmas, not both"),
        ({"sigmas": []}, "sigmas must be a non-empty list of numbers"),
        ({"sigmas": [1.0, -1.0]}, "each of sigmas must be a finite number"),
    ],
)
def test_wrong_arguments_of_a_start_are_named(wan_folder, arguments, message):
    _, pipe = load(wan_folder)
    settings = {"num_inference_steps": 3, "video": torch.rand(9, 3, 32, 32)} | arguments
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe(PROMPT, **settings)


def test_custom_noise_levels_and_timesteps(wan_folder):
    _, pipe = load(wan_folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    settings = {**SETTINGS, "output_type": "latent", "latents": noise_of()}
    expected = pipe(PROMPT, **settings).frames
    pipe.scheduler.set_timesteps(SETTINGS["num_inference_steps"])
    levels = pipe.scheduler.sigmas[:-1].tolist()
    settings.pop("num_inference_steps")
    torch.testing.assert_close(pipe(PROMPT, sigmas=levels, **settings).frames, expected)
    timesteps = [1000 * level for level in levels]
    torch.testing.assert_close(pipe(PROMPT, timesteps=timesteps, **settings).frames, expected)
    assert not torch.equal(pipe(PROMPT, sigmas=levels[:2], **settings).frames, expected)
    pipe.scheduler = DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="DDIMScheduler takes no sigmas"):
        pipe(PROMPT, sigmas=levels, **settings)


def test_an_empty_prompt_is_unconditional(wan_folder):
    theirs, ours = load(wan_folder)
    videos = [pipe("", NEGATIVE, latents=noise_of(), **SETTINGS).frames for pipe in (theirs, ours)]
    assert np.abs(videos[0] - videos[1]).max() < 1e-4


def test_the_running_call_has_its_attention_kwargs(wan_folder):
    _, pipe = load(wan_folder)
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(pipe.attention_kwargs)
        return {}

    pipe(PROMPT, attention_kwargs={"scale": 0.5}, callback_on_step_end=callback, latents=noise_of(), **SETTINGS)
    assert seen == [{"scale": 0.5}] * 3 == [pipe.attention_kwargs] * 3
    pipe(PROMPT, latents=noise_of(), **SETTINGS)
    assert pipe.attention_kwargs is None


def test_components_of_diffusers_are_converted_and_share_their_weights(wan_folder):
    theirs, _ = load(wan_folder)
    ours = VideoGenPipeline.from_pipe(theirs)
    direct = VideoGenPipeline(**theirs.components)
    for pipe in (ours, direct):
        pipe.set_progress_bar_config(disable=True)
        assert type(pipe.vae) is CausalVideoVAE and type(pipe.transformer) is SpacetimeTransformer
        weights = pipe.transformer.state_dict()
        assert all(weights[name].data_ptr() == x.data_ptr() for name, x in theirs.transformer.state_dict().items())
        videos = [one(PROMPT, NEGATIVE, latents=noise_of(), **SETTINGS).frames for one in (theirs, pipe)]
        assert np.abs(videos[0] - videos[1]).max() < 1e-4
    assert ours.config.num_frames == 81
    again = VideoGenPipeline.from_pipe(ours, num_frames=17)
    assert again.config.num_frames == 17 and again.config.height == 480 and again.transformer is ours.transformer
    assert VideoGenPipeline.from_pipe(theirs, torch_dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def test_a_pipeline_becomes_wans(wan_folder):
    theirs, ours = load(wan_folder)
    back = ours.to_diffusers()
    back.set_progress_bar_config(disable=True)
    assert type(back) is WanPipeline and type(back.scheduler) is type(theirs.scheduler)
    videos = [pipe(PROMPT, NEGATIVE, latents=noise_of(), **SETTINGS).frames for pipe in (theirs, back)]
    assert np.abs(videos[0] - videos[1]).max() < 1e-5
    assert WanVideoToVideoPipeline.from_pipe(back).vae is back.vae


def test_pipelines_that_cannot_be_converted_are_named(wan_folder, stable_diffusion):
    theirs, _ = load(wan_folder)
    theirs.register_to_config(boundary_ratio=0.9)
    with pytest.raises(ValueError, match="boundary_ratio=0.9 needs transformer and transformer_2, got transformer"):
        VideoGenPipeline.from_pipe(theirs)
    with pytest.raises(ValueError, match="got StableDiffusionPipeline"):
        VideoGenPipeline.from_pipe(DiffusionPipeline.from_pretrained(stable_diffusion))
    inflated = VideoGenPipeline.from_stable_diffusion(stable_diffusion)
    with pytest.raises(ValueError, match="got AutoencoderKL and UNet3D"):
        inflated.to_diffusers()


def test_data_types_by_name_and_as_stored(wan_folder, tmp_path):
    _, pipe = load(wan_folder)
    pipe.transformer.to(torch.bfloat16)
    pipe.text_encoder.to(torch.float16)
    pipe.save_pretrained(tmp_path)
    auto = VideoGenPipeline.from_pretrained(tmp_path, dtype="auto")
    dtypes = [part.dtype for part in (auto.transformer, auto.text_encoder, auto.vae)]
    assert dtypes == [torch.bfloat16, torch.float16, torch.float32]
    pipe.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    again = VideoGenPipeline.from_pretrained(tmp_path, dtype="auto")
    assert [part.dtype for part in (again.transformer, again.text_encoder, again.vae)] == dtypes
    variant = VideoGenPipeline.from_pretrained(tmp_path, dtype="auto", variant="fp16")
    assert variant.transformer.dtype == variant.vae.dtype == torch.float16
    half = VideoGenPipeline.from_pretrained(tmp_path, torch_dtype="bfloat16")
    assert half.transformer.dtype == half.vae.dtype == half.text_encoder.dtype == torch.bfloat16
    assert VideoGenPipeline.from_pretrained(tmp_path).transformer.dtype == torch.float32
    for wrong in ("int8", "half precision"):
        with pytest.raises(ValueError, match="dtype must be 'auto' or a floating-point type"):
            VideoGenPipeline.from_pretrained(tmp_path, dtype=wrong)
