"""Properties of VideoGenPipeline on tiny random weights."""

import inspect
import io
import json
import re
import shutil
import subprocess
from base64 import b64decode
from contextlib import contextmanager

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image

from tests.warm import warm_python
from vgen import InterpolationOptions, RolloutOptions, load_rollout
from vgen.data.shapes import ShapesWorld, render
from vgen.hub import find_checkpoint
from vgen.io.pixels import to_frames
from vgen.models.image_vae import load_vae
from vgen.models.prompts import load_text_encoder, make_text_encoder, make_word_tokenizer, tokenize
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.vae import CausalVideoVAE
from vgen.pipeline import VideoGenPipeline
from vgen.training.objective import Objective, PromptedDenoiser, denoising_loss

PROMPT = "a red circle moves right"
WORDS = ["a", "blue", "circle", "left", "moves", "red", "right", "square", "up"]


def make_pipeline(vae=True, seed=0, **transformer):
    torch.manual_seed(seed)
    tokenizer = make_word_tokenizer(WORDS, 8)
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 16, "ffn_dim": 32,
        "in_channels": 4, "out_channels": 4, "patch_size": (1, 2, 2), "num_layers": 1, "keyframe_slots": 4,
        "group_modes": ["full", "causal", "chunk"], "frame_rate_embedding": True,
    }  # fmt: skip
    pipe = VideoGenPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=CausalVideoVAE(base_dim=8, z_dim=4, dim_mult=[1, 1, 1], temperal_downsample=[True, True], num_res_blocks=1)
        if vae
        else None,
        transformer=SpacetimeTransformer(**settings | transformer),
        text_encoder=make_text_encoder(len(tokenizer), 32, 1).eval(),
        tokenizer=tokenizer,
        height=16,
        width=16,
        num_frames=9,
        frame_rate=8.0,
        num_inference_steps=2,
        guidance_scale=3.0,
        max_sequence_length=8,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    return make_pipeline()


@contextmanager
def propagated_logs():
    """Lets pytest see the warnings of diffusers' loggers."""
    diffusers.utils.logging.enable_propagation()
    yield
    diffusers.utils.logging.disable_propagation()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_video_has_the_default_size_and_values_from_zero_to_one(pipe):
    frames = pipe(PROMPT, generator=seeded()).frames
    assert frames.shape == (1, 9, 16, 16, 3)
    assert 0 <= frames.min() < frames.max() <= 1


def test_a_seed_gives_the_same_video_every_time(pipe):
    first, again, other = (pipe(PROMPT, generator=seeded(seed)).frames for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-3)


def test_a_list_of_prompts_equals_the_single_prompts(pipe):
    prompts = [PROMPT, "a blue square moves up"]
    together = pipe(prompts, generator=[seeded(0), seeded(1)]).frames
    for index, prompt in enumerate(prompts):
        alone = pipe(prompt, generator=seeded(index)).frames[0]
        assert np.allclose(together[index], alone, atol=1e-5)


def test_videos_of_one_prompt_differ_and_each_follows_its_generator(pipe):
    frames = pipe(PROMPT, num_videos_per_prompt=2, generator=[seeded(0), seeded(1)]).frames
    assert not np.allclose(frames[0], frames[1], atol=1e-3)
    assert np.allclose(frames[1], pipe(PROMPT, generator=seeded(1)).frames[0], atol=1e-5)


def test_output_types_agree(pipe):
    array = pipe(PROMPT, generator=seeded()).frames
    tensor = pipe(PROMPT, generator=seeded(), output_type="pt").frames
    images = pipe(PROMPT, generator=seeded(), output_type="pil").frames
    latents = pipe(PROMPT, generator=seeded(), output_type="latent").frames
    assert np.allclose(tensor.movedim(2, -1).numpy(), array, atol=1e-6)
    assert len(images[0]) == 9 and np.allclose(np.asarray(images[0][3]) / 255, array[0, 3], atol=0.51 / 255)
    assert latents.shape == (1, 4, 3, 4, 4)
    stream = np.concatenate(list(pipe.decode_stream(latents)), axis=1)
    assert np.allclose(stream / 255, array, atol=0.51 / 255)
    assert np.array_equal(pipe(PROMPT, generator=seeded(), return_dict=False)[0], array)


def test_denoising_equals_an_euler_loop_written_out(pipe):
    noise = torch.randn(1, 4, 3, 4, 4, generator=seeded())
    latents = pipe(PROMPT, latents=noise, output_type="latent").frames
    positive, negative = pipe.encode_prompt(PROMPT)
    expected, levels = noise, [1.0, 1 / 1000, 0.0]  # FlowMatchEulerDiscreteScheduler's linear levels for two steps
    with torch.no_grad():
        for level, following in zip(levels[:-1], levels[1:], strict=True):
            timesteps = torch.tensor([1000 * level])
            v_pos, v_neg = (
                pipe.transformer(expected, timesteps, e, frame_rate=8.0).sample for e in (positive, negative)
            )
            expected = expected + (following - level) * (v_neg + 3.0 * (v_pos - v_neg))
    assert torch.allclose(latents, expected, atol=1e-5)


def test_prompt_embeddings_replace_prompts(pipe):
    positive, negative = pipe.encode_prompt(PROMPT, "a blue square")
    by_text = pipe(PROMPT, "a blue square", generator=seeded()).frames
    by_embeds = pipe(prompt_embeds=positive, negative_prompt_embeds=negative, generator=seeded()).frames
    assert np.allclose(by_text, by_embeds, atol=1e-6)
    assert not np.allclose(by_text, pipe(PROMPT, generator=seeded()).frames, atol=1e-3)


def test_prompt_embeddings_may_have_any_length(pipe):
    positive, _ = pipe.encode_prompt(PROMPT, max_sequence_length=12)
    assert positive.shape[1] == 12 and np.isfinite(pipe(prompt_embeds=positive).frames).all()


def test_noise_is_scaled_and_drawn_as_the_scheduler_requires(pipe):
    pipe.scheduler = EulerAncestralDiscreteScheduler()
    videos = [pipe(PROMPT, generator=seeded(seed), num_inference_steps=3).frames for seed in (0, 0, 1)]
    assert np.array_equal(videos[0], videos[1]) and not np.allclose(videos[0], videos[2], atol=1e-3)
    inputs = []
    pipe.transformer.register_forward_pre_hook(
        lambda network, args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
    )
    pipe(PROMPT, generator=seeded(), num_inference_steps=3, guidance_scale=1.0)
    scheduler = EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(3)
    noise = torch.randn(inputs[0].shape, generator=seeded()) * scheduler.init_noise_sigma
    assert scheduler.init_noise_sigma > 1
    assert torch.equal(inputs[0], scheduler.scale_model_input(noise, scheduler.timesteps[0]))


def test_guidance_of_one_ignores_the_negative_prompt(pipe):
    plain = pipe(PROMPT, guidance_scale=1.0, generator=seeded()).frames
    with_negative = pipe(PROMPT, "a blue square", guidance_scale=1.0, generator=seeded()).frames
    assert np.array_equal(plain, with_negative)


def test_a_callback_sees_every_step_and_can_replace_latents(pipe):
    seen = []

    def zero(pipeline, step, timestep, tensors):
        seen.append((step, set(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = pipe(PROMPT, callback_on_step_end=zero, output_type="latent").frames
    assert seen == [(0, {"latents"}), (1, {"latents"})]
    assert latents.abs().max() == 0


def test_a_callback_can_interrupt(pipe):
    steps = []

    def stop(pipeline, step, timestep, tensors):
        steps.append(step)
        pipeline._interrupt = True
        return {}

    pipe(PROMPT, callback_on_step_end=stop, num_inference_steps=4)
    assert steps == [0]


def test_causal_groups_keep_early_latents_from_late_noise(pipe):
    noise = torch.randn(1, 4, 3, 4, 4, generator=seeded())
    other = noise.clone()
    other[:, :, 2] += 1
    first, second = (
        pipe(PROMPT, latents=x, groups="causal", output_type="latent", guidance_scale=1.0).frames
        for x in (noise, other)
    )
    assert torch.equal(first[:, :, :2], second[:, :, :2])
    assert not torch.allclose(first[:, :, 2], second[:, :, 2], atol=1e-3)


def test_pixels_work_without_a_vae():
    pipe = make_pipeline(vae=False, in_channels=3, out_channels=3, patch_size=(2, 16, 16))
    frames = pipe(PROMPT, num_frames=4, height=32, width=16, generator=seeded()).frames
    assert frames.shape == (1, 4, 32, 16, 3)
    with pytest.raises(ValueError, match="got 5 .nearest: 4"):
        pipe(PROMPT, num_frames=5)


def test_pixels_train_without_a_vae():
    pipe = make_pipeline(vae=False, in_channels=3, out_channels=3, patch_size=(2, 16, 16))
    model, objective = PromptedDenoiser(pipe.transformer, pipe.text_encoder), Objective(pipe.scheduler)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    clips = torch.randn(1, 3, 1, 1, 1, generator=seeded()).expand(8, 3, 4, 16, 16)  # one color
    ids, mask = tokenize(pipe.tokenizer, [PROMPT] * 8, 8)
    losses = []
    for step in range(60):
        noise, levels = torch.randn(clips.shape, generator=seeded(step)), torch.rand(8, 2, generator=seeded(step))
        sample = objective(clips, noise, levels)
        loss = denoising_loss(model(sample.latents, sample.timestep, ids, mask), sample.target, sample.weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_saved_and_loaded_gives_the_same_video(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    video = pipe(PROMPT, generator=seeded()).frames
    loaded = VideoGenPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(loaded(PROMPT, generator=seeded()).frames, video)
    general = DiffusionPipeline.from_pretrained(str(tmp_path))
    assert type(general) is VideoGenPipeline


def test_names_in_a_saved_pipeline_are_a_file_format(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["vgen.models.vae", "CausalVideoVAE"]
    assert index["transformer"] == ["vgen.models.transformer", "SpacetimeTransformer"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert index["unet"] == [None, None]
    assert {key for key, value in index.items() if isinstance(value, list)} == {
        "vae", "transformer", "transformer_2", "unet", "text_encoder", "tokenizer", "scheduler", "image_encoder",
        "image_processor",
    }  # fmt: skip
    defaults = ("height", "width", "num_frames", "frame_rate", "num_inference_steps", "guidance_scale")
    assert [index[name] for name in defaults] == [16, 16, 9, 8.0, 2, 3.0]


def test_a_saved_pipeline_loads_in_a_fresh_process(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    code = f"from vgen import VideoGenPipeline; print(type(VideoGenPipeline.from_pretrained({str(tmp_path)!r}).vae))"
    done = subprocess.run([warm_python(), "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "CausalVideoVAE" in done.stdout, done.stderr


def test_half_precision_files_load_as_float32(pipe, tmp_path):
    pipe.to(torch.float16).save_pretrained(tmp_path)
    loaded = VideoGenPipeline.from_pretrained(tmp_path)
    assert {loaded.vae.dtype, loaded.transformer.dtype, loaded.text_encoder.dtype} == {torch.float32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 8}, r"num_frames must be 4\*k \+ 1, got 8 \(nearest: 9\)"),
        ({"num_frames": 0}, "num_frames must be .*, got 0 .nearest: 1"),
        ({"height": 20}, "height must be a multiple of 8, got 20 .nearest: (16|24)"),
        ({"width": 0}, "width must be a multiple of 8, got 0 .nearest: 8"),
        ({"prompt": None}, "either prompt or prompt_embeds"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1, got 0"),
        ({"groups": "sideways"}, "groups must be one of 'full', 'causal', 'chunk'"),
        ({"output_type": "mp4"}, "output_type must be one of 'np', 'pil', 'pt', 'latent', got 'mp4'"),
        ({"generator": [torch.Generator()] * 3}, "expected one generator or 1, one per video, got 3"),
        ({"latents": torch.zeros(1, 4, 2, 4, 4)}, r"latents must have shape \(1, 4, 3, 4, 4\)"),
        ({"negative_prompt": ["a", "a"]}, "expected 1 or 1 negative prompts for 1 prompts, got 2"),
        ({"prompt": []}, "empty list"),
        ({"frame_rate": 0}, "frame_rate must be a finite number above 0, got 0"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 8, 5)}, r"prompt_embeds must have shape \(b, l, 32\)"),
        ({"negative_prompt_embeds": torch.zeros(2, 3, 32)}, "expected 1 negative_prompt_embeds, as prompts, got 2"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
        ({"height": 64.0}, "height must be an integer.*, got 64.0"),
        ({"num_frames": 9.0}, "num_frames must be an integer.*, got 9.0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be an integer.*, got 2.5"),
        ({"num_inference_steps": True}, "num_inference_steps must be an integer.*, got True"),
        ({"guidance_scale": "3"}, "guidance_scale must be a finite number.*, got '3'"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number.*, got nan"),
        ({"frame_rate": float("inf")}, "frame_rate must be a finite number.*, got inf"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt must be an integer of at least 1, got 0"),
        ({"prompt": (PROMPT, PROMPT)}, "prompt must be a string or a list of strings, got tuple"),
        ({"prompt": 3}, "prompt must be a string or a list of strings, got int"),
        ({"negative_prompt": 3}, "negative_prompt must be a string or a list of strings, got 3"),
        ({"max_sequence_length": 0}, "max_sequence_length must be an integer of at least 1, got 0"),
        ({"attention_kwargs": {"sale": 1.0}}, "attention_kwargs must be one of 'scale', got 'sale'"),
        ({"attention_kwargs": {"scale": "1"}}, "must be a finite number.*, got '1'"),
    ],
)
def test_mistakes_are_rejected_with_the_nearest_valid_value(pipe, arguments, message):
    arguments = {"prompt": PROMPT} | arguments
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_unknown_words_warn_and_known_ones_do_not(pipe, caplog):
    with propagated_logs():
        pipe("a red Circle, moves right!")
        assert "not trained with" not in caplog.text
        pipe("a zebra moves")
        pipe("a sqare moves")
    assert "not trained with: zebra; the nearest known words: " in caplog.text
    assert "not trained with: sqare; the nearest known words: square" in caplog.text


@pytest.mark.parametrize("output_type", ["np", "pil", "pt"])
def test_notebooks_show_every_video_of_an_output(pipe, output_type):
    output = pipe([PROMPT, PROMPT], generator=seeded(), num_inference_steps=1, output_type=output_type)
    expected = pipe([PROMPT, PROMPT], generator=seeded(), num_inference_steps=1).frames
    contents = re.findall('<img src="data:image/webp;base64,([^"]*)" width="256" height="256"', output._repr_html_())
    assert len(contents) == 2
    for content, frames in zip(contents, expected, strict=True):
        with Image.open(io.BytesIO(b64decode(content))) as image:
            shown = []
            for index in range(image.n_frames):
                image.seek(index)
                image.load()
                shown += [np.asarray(image.convert("RGB"))] * (
                    image.info["duration"] // 125
                )  # equal frames are merged
            assert image.info["loop"] == 0
        assert np.array_equal(np.stack(shown), np.round(frames * 255))


def test_notebooks_show_no_latents(pipe):
    assert pipe(PROMPT, num_inference_steps=1, output_type="latent")._repr_html_() is None


@pytest.fixture
def shapes():
    pipe = VideoGenPipeline.from_pretrained("vgen/shapes-64")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", ["shapes", "noise", "photograph"])
def test_frames_unlike_the_training_data_give_one_warning(shapes, caplog, kind):
    """The photograph is a smooth one, which is the hardest to tell from plain shapes."""
    rng = np.random.default_rng(0)
    world = ShapesWorld(split="all", seed=5)
    clip = {
        "shapes": to_frames(render([world.scene(0)], num_frames=5))[0],
        "noise": rng.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8),
        "photograph": np.stack([np.asarray(Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize(
            (64, 64), Image.Resampling.BICUBIC))] * 5),
    }[kind]  # fmt: skip
    quick = {"num_inference_steps": 1, "generator": seeded()}
    uses = [
        lambda: shapes(PROMPT, image=clip[0], num_frames=5, **quick),
        lambda: shapes.predict(clip, num_frames=4, **quick),
        lambda: shapes.interpolate(clip, factor=2, **quick),
        lambda: shapes(PROMPT, num_frames=5, **quick),
    ]
    with propagated_logs():
        for use in uses:
            caplog.clear()
            use()
            warned = sum("`vgen train FOLDER` makes one for yours" in message for message in caplog.messages)
            assert warned == (kind != "shapes" and use is not uses[-1])
    if kind != "shapes":
        shapes.vae.register_to_config(training_psnr=None)
        caplog.clear()
        with propagated_logs():
            uses[0]()
        assert not caplog.messages


def test_sizes_outside_training_warn_once(caplog):
    pipe = make_pipeline(trained_token_frames=5)
    with propagated_logs():
        pipe(PROMPT, num_inference_steps=1)
        assert "often look wrong" not in caplog.text
        for _ in range(2):
            pipe(PROMPT, num_inference_steps=1, height=24, width=40)
    assert caplog.text.count("40x24 is not the size that this checkpoint makes by default, 16x16") == 1


def test_frame_rates_outside_training_warn_once(caplog):
    abilities = {"tasks": ["text", "leading", "keyframes"], "window": 2, "sink": 1}
    pipe = make_pipeline(trained_frame_rates=[4.0, 10.0], **abilities)
    clip = np.zeros((2, 16, 16, 3), np.uint8)
    quick = {"num_inference_steps": 1, "generator": seeded()}
    coarse = {"keyframe_interval": 4, "num_frames": 5, "window": 1, "sink": 0}
    uses = {
        "call": lambda pipe, rate: pipe(PROMPT, num_frames=5, frame_rate=rate, **quick),
        "predict": lambda pipe, rate: pipe.predict(clip, num_frames=4, frame_rate=rate, **quick),
        "interpolate": lambda pipe, rate: pipe.interpolate(clip, factor=2, frame_rate=rate / 2, **quick),
        "coarse": lambda pipe, rate: list(pipe.rollout(PROMPT, frame_rate=4 * rate, **coarse, **quick)),
    }

    def warned(use, rate, pipe=pipe):
        caplog.clear()
        with propagated_logs():
            uses[use](pipe, rate)
        return [message.split(" frames")[0] for message in caplog.messages if "often look wrong" in message]

    for number, use in enumerate(("call", "predict", "interpolate")):
        assert not any(warned(use, rate) for rate in (3.0, 8.0, 12.5))  # up to a quarter outside
        for rate in (2.9 - number / 10, 12.6 + number / 10):  # others each time, because a warning is given once
            assert warned(use, rate) == [f"{rate:g}"] and not warned(use, rate)
    assert not warned("coarse", 3.0) and warned("coarse", 2.0) == ["2"]
    assert not warned("call", 99.0, make_pipeline(**abilities))
    assert not warned("call", 99.0, make_pipeline(trained_frame_rates=[4, 4], frame_rate_embedding=False))


def test_a_missing_model_names_the_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("vgen/nothing", "nothing"):
        with pytest.raises(ValueError, match="neither a packaged checkpoint .* nor a folder in"):
            find_checkpoint(name)
    assert find_checkpoint("someone/model") == "someone/model"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="model_index.json"):
        find_checkpoint("empty")


@pytest.mark.parametrize("name", ["./nothing", "../nothing", "/nothing/here", "~/nothing", "runs/try/pipeline",
                                  "runs/mine", "nothing/", "other\\folder\\mine"])  # fmt: skip
def test_a_path_that_does_not_exist_is_a_missing_folder_and_no_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for load in (find_checkpoint, load_vae, load_text_encoder):
        with pytest.raises(ValueError, match=re.escape(f"no such folder: {name} (in {tmp_path}")):
            load(name)


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="model.safetensors is a file, expected the folder of a pipeline"):
        find_checkpoint(tmp_path / "model.safetensors")


def test_components_of_packaged_checkpoints_load_by_name():
    assert load_vae("vgen/shapes-64").config.z_dim == 8
    assert load_text_encoder("vgen/shapes-64").config.d_model == 128


def test_pickled_weights_are_rejected_by_name(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(pipe.transformer.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="diffusion_pytorch_model.bin.*pickle"):
        VideoGenPipeline.from_pretrained(tmp_path)


def test_a_config_that_does_not_match_its_weights_is_rejected_with_the_keys(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    for change, key in (({"num_layers": 2}, r"blocks\.1"), ({"keyframe_slots": 0}, "keyframe_embedding")):
        shutil.copytree(tmp_path / "pipe", tmp_path / "broken")
        path = tmp_path / "broken" / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=key):
            VideoGenPipeline.from_pretrained(tmp_path / "broken")
        shutil.rmtree(tmp_path / "broken")


VIDEO = np.zeros((5, 16, 16, 3), np.uint8)
CALLS = {
    "__call__": {"prompt": PROMPT},
    "rollout": {"prompt": PROMPT, "num_frames": 5},
    "predict": {"video": VIDEO, "num_frames": 4},
    "interpolate": {"video": VIDEO},
    "interpolator": {"prompt": PROMPT, "size": (16, 16)},
}


ALL_TASKS = {"tasks": ["text", "leading", "keyframes"], "window": 2, "sink": 1}

WRONG = {
    "object": object(),
    "bytes": b"a",
    "dict": {"0": 1},
    "tensor": torch.zeros(2, 2),
    "list": [object()],
    "1j": 1j,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("method", CALLS)
def test_an_argument_of_a_wrong_type_is_one_line_that_names_it(method, wrong):
    pipe = make_pipeline()
    call = getattr(pipe, method)
    for name, parameter in inspect.signature(call).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD or name in ("return_dict", "keep_given"):
            continue
        with pytest.raises(ValueError) as error:
            result = call(**CALLS[method] | {name: wrong})
            if method == "rollout":
                result.step()
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 250
        assert any(word in str(error.value) for word in (name, "frame", "image")), (name, str(error.value))


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("__call__", {"image": VIDEO[0], "height": 0}, "the size of the video, 0x16, got 16x16"),
        ("__call__", {"image": VIDEO[0], "height": "16"}, "height must be an integer, got '16'"),
        ("__call__", {"image": VIDEO[0], "prompt": 5}, "prompt must be"),
        ("rollout", {"video": VIDEO, "height": 0}, "the video must have the size 0x16, got 16x16"),
        ("rollout", {"video": VIDEO, "width": 16.0}, "width must be an integer, got 16.0"),
        ("interpolator", {"size": 16}, r"size must be \(height, width\), got 16"),
        ("interpolator", {"size": (16,)}, r"size must be \(height, width\)"),
    ],
)
def test_sizes_and_prompts_are_checked_before_they_are_used(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(make_pipeline(**ALL_TASKS), method)(**CALLS[method] | arguments)


@pytest.mark.parametrize("method", ["rollout", "interpolator"])
def test_a_guider_and_a_scale_in_options_are_rejected(method):
    options = (RolloutOptions if method == "rollout" else InterpolationOptions)(guidance_scale=3.0)
    with pytest.raises(ValueError, match="guidance_scale or guider, not both"):
        getattr(make_pipeline(**ALL_TASKS), method)(**CALLS[method], guider=ClassifierFreeGuidance(), options=options)


def test_a_rollout_with_numbers_of_numpy_is_saved(tmp_path):
    pipe = make_pipeline(**ALL_TASKS)
    options = {"num_frames": np.int64(5), "num_inference_steps": np.int64(1), "guidance_scale": np.float32(2)}
    rollout = pipe.rollout(PROMPT, attention_kwargs={"scale": np.float32(1)}, **options)
    rollout.step()
    rollout.save(tmp_path / "saved")
    assert np.array_equal(next(load_rollout(tmp_path / "saved", pipe)), next(rollout))


MALFORMED = {
    "model_index.json": [{"text_encoder": []}, {"scheduler": 3}, {"rollout_defaults": 3}, 3],
    "transformer/config.json": [{"patch_size": "x"}, {"text_dim": "x"}, {"num_attention_heads": None}, 3, None],
    "vae/config.json": [{"base_dim": 0}, {"base_dim": -1}, {"dim_mult": 0}, {"latents_mean": -1}, 3, None],
    "text_encoder/config.json": [{"d_kv": -1}, {"num_layers": True}, {"vocab_size": 10**9}, {"d_ff": None}, None],
    "scheduler/scheduler_config.json": [{"num_train_timesteps": 0}, {"num_train_timesteps": None}, 3, None],
    "tokenizer/tokenizer.json": [{"model": None}, {}, None],
    "tokenizer/tokenizer_config.json": [{"pad_token": True}, 3],
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_of_a_checkpoint_is_one_error(tmp_path, name):
    make_pipeline().save_pretrained(tmp_path)
    path = tmp_path / name
    content = path.read_text()
    changes = [
        json.dumps(json.loads(content) | one if isinstance(one, dict) and one else one) for one in MALFORMED[name]
    ]
    for text in ("", content[: len(content) // 2], "[" * 100_000, *changes):
        path.write_text(text)
        with pytest.raises((ValueError, OSError)):
            VideoGenPipeline.from_pretrained(tmp_path)


def test_a_checkpoint_without_full_attention_makes_its_videos_as_a_rollout(video):
    pipe = make_pipeline(tasks=["text", "leading"], group_modes=["chunk"], chunk_size=2, window=3, sink=1)
    options = {"height": 16, "width": 16, "guidance_scale": 2.0}
    made = pipe(PROMPT, num_frames=14, generator=seeded(), output_type="pt", **options).frames
    chunks = list(pipe.rollout(PROMPT, num_frames=14, generator=seeded(), output_type="pt", **options))
    assert torch.equal(made, torch.cat(chunks, dim=1 if chunks[0].ndim == 5 else 0).view_as(made))
    assert made.shape == (1, 14, 3, 16, 16)  # any length

    image, size = video[0], {"height": video.shape[1], "width": video.shape[2]}
    from_image = pipe(PROMPT, image=image, num_frames=6, generator=seeded(), output_type="pt", **size).frames
    later = pipe.predict(video[:1], 5, PROMPT, generator=seeded(), output_type="pt").frames
    torch.testing.assert_close(from_image[:, 1:], later, atol=0.003, rtol=0.0)  # predictions are rounded to uint8
    torch.testing.assert_close(from_image[0, 0], torch.from_numpy(image).movedim(-1, 0) / 255)

    two = pipe([PROMPT, "a blue square"], num_frames=5, num_videos_per_prompt=2, output_type="np", **options).frames
    assert two.shape == (4, 5, 16, 16, 3)
    for wrong, message in (
        ({"latents": torch.zeros(1, 4, 2, 2, 2)}, "takes no latents: pass groups"),
        ({"output_type": "latent"}, "takes no output_type='latent'"),
        ({"frames": {4: image[:16, :16]}}, "given frames must be the first ones, got"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(PROMPT, num_frames=9, height=16, width=16, **wrong)
    assert pipe(PROMPT, num_frames=9, groups="chunk", output_type="latent", **options).frames.shape[2] == 3
