"""Image to video of Wan equals diffusers' WanImageToVideoPipeline, in the layouts of its public checkpoints."""

import re

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from typer.testing import CliRunner

from vgen import SpacetimeTransformer, VideoGenPipeline
from vgen.cli import app
from vgen.data.video_io import read_video

PROMPT, NEGATIVE = "a red circle moves", "blue"
SETTINGS = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 3.0}
LAYOUTS = ("2.1", "2.1-first-last", "2.2")


def load(folder):
    both = WanImageToVideoPipeline.from_pretrained(folder), VideoGenPipeline.from_pretrained(folder)
    for pipe in both:
        pipe.set_progress_bar_config(disable=True)
    return both


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels.repeat(8, 0).repeat(8, 1))


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("output_type", ["latent", "np", "pt", "pil"])
def test_a_video_from_an_image_equals_that_of_diffusers(image_folders, layout, output_type):
    theirs, ours = load(image_folders[layout])
    both = {"last_image": picture(1)} if "last" in layout else {}
    settings = SETTINGS | {"output_type": output_type}
    expected = theirs(picture(0), PROMPT, NEGATIVE, **both, **settings, generator=seeds(0)[0]).frames
    given = {"frames": {0: picture(0), -1: picture(1)}} if both else {"image": picture(0)}
    got = ours(PROMPT, NEGATIVE, **given, **settings, generator=seeds(0)[0]).frames
    if output_type == "pil":
        pairs = zip(expected[0], got[0], strict=True)
        assert max(np.abs(np.asarray(a, float) - np.asarray(b, float)).max() for a, b in pairs) <= 1
    else:
        torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_videos_of_a_batch_equal_single_ones(image_folders, layout):
    _, pipe = load(image_folders[layout])
    settings = SETTINGS | {"output_type": "latent"}

    def given(*numbers):
        first, last = [picture(number) for number in numbers], [picture(10 + number) for number in numbers]
        return {"frames": {0: first, 8: last}} if "last" in layout else {"image": first}

    prompts = [PROMPT, "a blue square"]
    batch = pipe(prompts, NEGATIVE, **given(0, 1), **settings, generator=seeds(3, 4)).frames
    for index, prompt in enumerate(prompts):
        alone = pipe([prompt], NEGATIVE, **given(index), **settings, generator=seeds(3 + index)).frames
        torch.testing.assert_close(batch[index : index + 1], alone, atol=1e-4, rtol=1e-4)
    pair = pipe([PROMPT], NEGATIVE, **given(0), **settings, generator=seeds(3, 5), num_videos_per_prompt=2).frames
    torch.testing.assert_close(pair[:1], batch[:1], atol=1e-4, rtol=1e-4)


def test_two_experts_take_the_first_and_the_last_frame(image_folders):
    theirs, ours = load(image_folders["2.2"])
    settings = SETTINGS | {"output_type": "latent", "guidance_scale_2": 2.0}
    expected = theirs(picture(0), PROMPT, NEGATIVE, last_image=picture(1), **settings, generator=seeds(0)[0]).frames
    got = ours(PROMPT, NEGATIVE, frames={0: picture(0), -1: picture(1)}, **settings, generator=seeds(0)[0]).frames
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pipeline_survives_saving_and_conversion(image_folders, tmp_path, layout):
    theirs, ours = load(image_folders[layout])
    ours.save_pretrained(tmp_path)
    given = {"frames": {0: picture(0), 8: picture(1)}} if "last" in layout else {"image": picture(0)}
    settings = SETTINGS | {"output_type": "latent"}
    expected = ours(PROMPT, NEGATIVE, **given, **settings, generator=seeds(0)[0]).frames
    back = ours.to_diffusers()
    assert type(back) is WanImageToVideoPipeline
    for pipe in (
        VideoGenPipeline.from_pretrained(tmp_path),
        VideoGenPipeline.from_pipe(theirs),
        VideoGenPipeline.from_pipe(back),
    ):
        pipe.set_progress_bar_config(disable=True)
        got = pipe(PROMPT, NEGATIVE, **given, **settings, generator=seeds(0)[0]).frames
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("layout", "given", "message"),
    [
        ("2.1", {}, "this checkpoint makes videos from images: pass image, got the frames none"),
        ("2.1", {"frames": {0: 0, 8: 1}}, "pass image, got the frames [0, 8]"),
        ("2.1-first-last", {"image": 0}, "pass frames={0: first, -1: last}, got the frames [0]"),
        ("2.2", {}, "pass image, or frames={0: first, -1: last}, got 0 of 9 frames"),
        ("2.2", {"frames": {9: 0}}, "a known frame must have an index from 0 to 8, got 9"),
        ("2.2", {"frames": {-10: 0}}, "a known frame must have an index from 0 to 8, got -1"),
        ("2.2", {"frames": {8: 0, -1: 1}}, "a frame is given twice: of 9 frames, [-1, 8] are the same"),
    ],
)
def test_frames_that_a_checkpoint_cannot_use_are_named(image_folders, layout, given, message):
    _, pipe = load(image_folders[layout])
    images = {"image": picture(given["image"])} if "image" in given else {}
    if "frames" in given:
        images["frames"] = {index: picture(number) for index, number in given["frames"].items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe(PROMPT, **images, **SETTINGS)


def test_missing_parts_and_inputs_are_named(image_folders, wan_folder):
    _, pipe = load(image_folders["2.1"])
    pipe.image_encoder = None
    with pytest.raises(ValueError, match="needs its image_encoder and image_processor"):
        pipe(PROMPT, image=picture(0), **SETTINGS)
    with pytest.raises(ValueError, match="trained for leading"):
        pipe.predict([picture(0)], prompt=PROMPT)
    plain = VideoGenPipeline.from_pretrained(wan_folder)
    with pytest.raises(ValueError, match="this needs a checkpoint trained for leading; this one was trained for text"):
        plain(PROMPT, image=picture(0), **SETTINGS)
    latents, prompt = torch.zeros(1, 4, 1, 4, 4), torch.zeros(1, 2, 32)
    for given, message in (
        ({}, "condition must have 8 channels, got 0"),
        ({"condition": latents}, "condition must have 8 channels, got 4"),
        ({"condition": latents.repeat(1, 2, 1, 1, 1)}, "image_embeds must be given for a network with image_dim=8"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.transformer(latents, torch.tensor(1.0), prompt, **given)


@pytest.mark.parametrize("given", [False, True])
def test_the_small_model_takes_a_prompt_or_an_image_as_in_diffusers(first_frame_folder, tmp_path, given):
    theirs, ours = (
        WanPipeline.from_pretrained(first_frame_folder),
        VideoGenPipeline.from_pretrained(first_frame_folder),
    )
    if given:
        theirs = WanImageToVideoPipeline(
            **theirs.components, image_encoder=None, image_processor=None, expand_timesteps=True
        )
    ours.save_pretrained(tmp_path)
    for one in (ours, VideoGenPipeline.from_pretrained(tmp_path), VideoGenPipeline.from_pipe(theirs)):
        results = []
        for pipe in (theirs, one):
            pipe.set_progress_bar_config(disable=True)
            results.append(
                [
                    pipe(
                        **({"image": picture(0)} if given else {}),
                        prompt=PROMPT,
                        negative_prompt=NEGATIVE,
                        **SETTINGS,
                        generator=seeds(0)[0],
                        output_type=kind,
                    ).frames
                    for kind in ("latent", "np")
                ]
            )
        torch.testing.assert_close(results[1][0], results[0][0], atol=1e-4, rtol=1e-4)
        start = 1 if given else 0  # the given frame is returned unchanged here
        np.testing.assert_allclose(results[1][1][:, start:], results[0][1][:, start:], atol=1e-4)
    if given:
        assert np.abs(results[1][1][0, 0] - np.asarray(picture(0)) / 255).max() < 1e-6
        with pytest.raises(ValueError, match="takes the first frame only: pass image, got the frames \\[0, 8\\]"):
            ours(PROMPT, frames={0: picture(0), -1: picture(1)}, **SETTINGS)
    back = ours.to_diffusers()
    assert type(back) is WanPipeline and back.config.expand_timesteps and back.vae.config.is_residual


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@torch.no_grad()
def test_a_network_equals_that_of_diffusers_and_reuses_its_prompts(image_folders, layout):
    from vgen.temporal.attention import PromptCache

    theirs = WanTransformer3DModel.from_pretrained(image_folders[layout] / "transformer")
    ours = SpacetimeTransformer.from_pretrained(image_folders[layout] / "transformer")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 3, 4, 4, generator=generator)
    condition = torch.randn(2, 8, 3, 4, 4, generator=generator)
    prompt, levels = torch.randn(2, 512, 32, generator=generator), torch.tensor([900.0, 300.0])
    images = torch.randn(2, 10 if "last" in layout else 5, 8, generator=generator)
    expected = theirs(torch.cat([latents, condition], 1), levels, prompt, images.reshape(-1, 5, 8), return_dict=False)[
        0
    ]
    cache = PromptCache()
    for _ in range(2):
        got = ours(latents, levels, prompt, condition=condition, image_embeds=images, prompt_cache=cache).sample
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_command_takes_a_first_and_a_last_image(image_folders, tmp_path):
    for index in (0, 1):
        picture(index).save(tmp_path / f"{index}.png")
    picture(2).resize((16, 16)).save(tmp_path / "small.png")
    _, pipe = load(image_folders["2.1-first-last"])
    pipe.register_to_config(**SETTINGS)
    pipe.save_pretrained(tmp_path / "pipe")

    def invoke(*words):
        words = ["animate", tmp_path / "0.png", PROMPT, "--model", tmp_path / "pipe", "--scale", 1, *words]
        return CliRunner().invoke(app, [*map(str, words), "-o", str(tmp_path / "frames"), "--overwrite"])

    done = invoke("--last-image", tmp_path / "1.png")
    assert done.exit_code == 0, done.output
    frames = {0: picture(0), -1: picture(1)}
    expected = pipe(PROMPT, frames=frames, generator=seeds(0)[0]).frames[0]
    got = read_video(tmp_path / "frames")[0] / 255
    assert got.shape == expected.shape and np.abs(got - expected).mean() < 0.03
    for words, message in (
        ((), "pass frames={0: first, -1: last}, got the frames [0]"),
        (("--last-image", tmp_path / "none.png"), "no such file"),
        (("--last-image", tmp_path / "small.png"), "must have the same size, got"),
    ):
        done = invoke(*words)
        assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output
