"""What users of diffusers do with a pipeline: swap schedulers and guiders, choose files and precision, offload."""

import copy
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoencoderKL,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.hooks import LayerSkipConfig
from safetensors.torch import load_file, save_file

from vgen.models.loading import check_finite
from vgen.pipeline import VideoGenPipeline
from vgen.sampling.conditions import Conditions, Guidance

from .models.test_diffusers_features import ONE_LEVEL
from .test_pipeline import PROMPT, make_pipeline, seeded
from .test_unet_pipeline import build as build_unet_pipeline

DENOISERS = ["transformer", "unet"]


@pytest.fixture(params=DENOISERS)
def make(request, randomize):
    """Makes pipelines with either denoiser, with the same weights every time."""
    return make_pipeline if request.param == "transformer" else partial(build_unet_pipeline, randomize)


@pytest.fixture
def pipe(make):
    return make()


def denoiser_name(pipe):
    return pipe.denoiser_name


def latents(pipe, **arguments):
    return pipe(PROMPT, generator=seeded(), output_type="latent", **arguments).frames


def assert_same(loaded, pipe):
    """Weights are bit-identical; videos are equal up to rounding, which depends on the alignment of weights."""
    for name in (denoiser_name(pipe), "vae", "text_encoder"):
        weights = getattr(loaded, name).state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in getattr(pipe, name).state_dict().items())
    torch.testing.assert_close(latents(loaded), latents(pipe), atol=1e-5, rtol=0)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = {
    "Euler": lambda: FlowMatchEulerDiscreteScheduler(),
    "Heun": lambda: FlowMatchHeunDiscreteScheduler(),
    "UniPC": lambda: UniPCMultistepScheduler(**FLOW),
    "DPM-Solver++": lambda: DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **FLOW),
}


def test_every_flow_scheduler_goes_to_the_same_video(pipe):
    """All solve one differential equation; with small steps they agree, which a wrong level or sign would not."""
    exact = latents(pipe, num_inference_steps=40, guidance_scale=1.0)
    for name, make_scheduler in SCHEDULERS.items():
        pipe.scheduler = make_scheduler()
        noise = latents(pipe, num_inference_steps=1, guidance_scale=1.0)
        close = latents(pipe, num_inference_steps=30, guidance_scale=1.0)
        error, coarse = ((one - exact).norm() / exact.norm() for one in (close, noise))
        assert error < 0.02 and error < coarse / 2, name


FLOW_CONFIG = FlowMatchEulerDiscreteScheduler(shift=3.0).config
MISMATCHED = {
    "UniPC without flow settings": lambda: UniPCMultistepScheduler.from_config(FLOW_CONFIG),
    "DPM-Solver++ without flow settings": lambda: DPMSolverMultistepScheduler.from_config(FLOW_CONFIG),
    "DDIM from flow": lambda: DDIMScheduler.from_config(FLOW_CONFIG),
    "UniPC without flow sigmas": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction"),
    "UniPC with flow sigmas only": lambda: UniPCMultistepScheduler(use_flow_sigmas=True),
    "DDIM of flow": lambda: DDIMScheduler.from_config(UniPCMultistepScheduler(**FLOW).config),
    "Euler ancestral from flow": lambda: EulerAncestralDiscreteScheduler.from_config(FLOW_CONFIG),
    "flow from DDIM": lambda: FlowMatchEulerDiscreteScheduler.from_config(
        DDIMScheduler(prediction_type="epsilon").config
    ),
}


@pytest.mark.parametrize("name", MISMATCHED)
def test_a_scheduler_that_does_not_fit_the_prediction_is_an_error_that_names_it(name):
    pipe = make_pipeline(tasks=["text", "leading"], window=2)
    pipe.scheduler = MISMATCHED[name]()
    with pytest.raises(ValueError, match=type(pipe.scheduler).__name__):
        latents(pipe)
    with pytest.raises(ValueError, match=type(pipe.scheduler).__name__):
        pipe.rollout(PROMPT)


@pytest.mark.parametrize("given", ["assigned", "loaded"])
def test_a_scheduler_of_another_prediction_type_is_warned_of(given, monkeypatch, tmp_path):
    pipe, logged = make_pipeline(), []
    monkeypatch.setattr("vgen.pipeline.logger.warning", logged.append)
    if given == "assigned":
        pipe.scheduler = DDIMScheduler()
    else:
        pipe.save_pretrained(tmp_path)
        pipe = VideoGenPipeline.from_pretrained(tmp_path, scheduler=DDIMScheduler())
    latents(pipe)
    assert len(logged) == 1 and "DDIMScheduler" in logged[0] and "'epsilon'" in logged[0] and "'flow'" in logged[0]
    pipe.scheduler = UniPCMultistepScheduler.from_config(FLOW_CONFIG, **FLOW)
    latents(pipe)
    assert len(logged) == 1


def test_a_swapped_scheduler_is_saved(pipe, tmp_path):
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, **FLOW)
    pipe.save_pretrained(tmp_path)
    assert isinstance(VideoGenPipeline.from_pretrained(tmp_path).scheduler, UniPCMultistepScheduler)


def test_the_guider_of_classifier_free_guidance_equals_the_built_in(pipe):
    expected = latents(pipe, guidance_scale=3.0)
    assert torch.allclose(latents(pipe, guider=ClassifierFreeGuidance(guidance_scale=3.0)), expected, atol=1e-5)
    assert torch.equal(latents(pipe, guidance_scale=3.0), expected)


STRENGTH = [("scale", 100.0), ("start", 0.0), ("stop", 1.0)]
SKIP = {"guidance_scale": 3.0} | {f"skip_layer_guidance_{name}": value for name, value in STRENGTH}
PERTURB = {"guidance_scale": 3.0} | {f"perturbed_guidance_{name}": value for name, value in STRENGTH}
SCORES = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
GUIDERS = {
    "zero-star": lambda blocks: ClassifierFreeZeroStarGuidance(guidance_scale=3.0, zero_init_steps=0),
    "projected": lambda blocks: AdaptiveProjectedGuidance(guidance_scale=3.0, eta=0.0),
    "skip layer": lambda blocks: SkipLayerGuidance(**SKIP, skip_layer_config=LayerSkipConfig(**blocks)),
    "skip attention": lambda blocks: SkipLayerGuidance(
        **SKIP, skip_layer_config=LayerSkipConfig(**blocks, skip_ff=False)
    ),
    "perturbed": lambda blocks: PerturbedAttentionGuidance(
        **PERTURB, perturbed_guidance_config=LayerSkipConfig(**blocks, **SCORES)
    ),
}
BLOCKS = {
    "transformer": {"indices": [1], "fqn": "blocks"},
    "unet": {"indices": [0], "fqn": "up_blocks.1.attentions.1.transformer_blocks"},
}


@pytest.mark.parametrize("name", GUIDERS)
@pytest.mark.parametrize("denoiser", DENOISERS)
def test_other_guiders_change_the_guidance_of_their_call_only(name, denoiser, randomize):
    pipe = build_unet_pipeline(randomize) if denoiser == "unet" else make_pipeline(num_layers=3)
    randomize(pipe.denoiser)
    plain = latents(pipe)
    guided = latents(pipe, guider=GUIDERS[name](BLOCKS[denoiser]))
    assert torch.isfinite(guided).all() and not torch.allclose(guided, plain, atol=1e-4)
    assert torch.equal(latents(pipe), plain)


@pytest.mark.parametrize(
    "guider",
    [
        SkipLayerGuidance(
            guidance_scale=3.0,
            skip_layer_config=LayerSkipConfig(indices=[1], fqn="blocks"),
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=1.0,
        ),
        SkipLayerGuidance(
            guidance_scale=3.0,
            skip_layer_config=LayerSkipConfig(indices=[1], fqn="blocks", skip_ff=False),
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=1.0,
        ),
        PerturbedAttentionGuidance(
            guidance_scale=3.0,
            perturbed_guidance_layers=[1],
            perturbed_guidance_start=0.0,
            perturbed_guidance_stop=1.0,
        ),
    ],
    ids=["skip layer", "skip attention", "perturbed"],
)
def test_guiders_that_perturb_blocks_use_their_own_scale(guider, randomize):
    pipe = make_pipeline(num_layers=3)
    randomize(pipe.transformer)
    plain, guided = latents(pipe), latents(pipe, guider=guider)
    assert torch.isfinite(guided).all() and not torch.allclose(guided, plain, atol=1e-4)
    assert torch.equal(latents(pipe), plain)


def test_diffusers_own_class_loads_a_folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again, VideoGenPipeline)
    assert_same(again, pipe)


def test_a_variant_is_loaded_by_its_name_and_a_missing_one_is_named(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert_same(VideoGenPipeline.from_pretrained(tmp_path, variant="fp16"), pipe)
    with pytest.raises(ValueError, match="bf16"):
        VideoGenPipeline.from_pretrained(tmp_path, variant="bf16")
    with pytest.raises(OSError, match=r"no file named \S+\.safetensors"):
        VideoGenPipeline.from_pretrained(tmp_path)


def test_every_component_has_its_own_precision_where_requested(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    precisions = {denoiser_name(pipe): torch.bfloat16, "default": torch.float32}
    again = VideoGenPipeline.from_pretrained(tmp_path, dtype=precisions)
    again.set_progress_bar_config(disable=True)
    assert again.denoiser.dtype == torch.bfloat16
    assert again.vae.dtype == again.text_encoder.dtype == torch.float32
    expected = pipe(PROMPT, generator=seeded()).frames
    assert 0 < abs(again(PROMPT, generator=seeded()).frames - expected).mean() < 0.02
    assert VideoGenPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16).vae.dtype == torch.bfloat16


def edit_weights(folder, edit):
    path = next(folder.glob("*.safetensors"))
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_a_variant_of_some_components_only_is_an_error_that_names_the_others(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    pipe.vae.save_pretrained(tmp_path / "vae", variant="fp16")
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").unlink()
    denoiser = pipe.denoiser_name
    with pytest.raises(ValueError, match=rf"variant='fp16' for text_encoder, {denoiser}"):
        VideoGenPipeline.from_pretrained(tmp_path, variant="fp16")
    given = {"text_encoder": pipe.text_encoder, denoiser: pipe.denoiser}
    assert_same(VideoGenPipeline.from_pretrained(tmp_path, variant="fp16", **given), pipe)


@pytest.mark.parametrize("component", ["text_encoder", "vae", "denoiser"])
@pytest.mark.parametrize("damage", ["missing", "unexpected", "nan", "inf"])
def test_weights_that_are_missing_or_unexpected_or_not_finite_are_an_error(pipe, tmp_path, component, damage):
    def edit(weights):
        key = next(key for key in weights if key.endswith("weight") and weights[key].ndim > 1 and "embed" not in key)
        if damage == "missing":
            del weights[key]
        elif damage == "unexpected":
            weights["extra"] = torch.ones(1)
        else:
            weights[key].view(-1)[-1] = float(damage)

    pipe.save_pretrained(tmp_path)
    component = component.replace("denoiser", pipe.denoiser_name)
    edit_weights(tmp_path / component, edit)
    named = {"missing": "missing keys: ", "unexpected": "unexpected keys: extra"}.get(damage, "is NaN or infinite")
    with pytest.raises(ValueError, match=named):
        VideoGenPipeline.from_pretrained(tmp_path)


def test_an_image_vae_with_weights_that_are_missing_or_not_finite_is_an_error(tmp_path, monkeypatch):
    pipe = make_pipeline()
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=4)
    VideoGenPipeline(**pipe.components | {"vae": vae}).save_pretrained(tmp_path)
    assert torch.equal(
        VideoGenPipeline.from_pretrained(tmp_path).vae.decoder.conv_out.weight, vae.decoder.conv_out.weight
    )
    devices, load = [], AutoencoderKL.from_pretrained
    monkeypatch.setattr(
        AutoencoderKL, "from_pretrained", lambda *args, **kw: devices.append(kw.get("device_map")) or load(*args, **kw)
    )
    VideoGenPipeline.from_pretrained(tmp_path)
    assert sorted(map(str, devices)) == ["None", "meta"]  # its weights are read once
    edit_weights(tmp_path / "vae", lambda weights: weights["decoder.conv_out.bias"].fill_(float("nan")))
    with pytest.raises(ValueError, match=r"decoder.conv_out.bias of AutoencoderKL .* is NaN"):
        VideoGenPipeline.from_pretrained(tmp_path)
    edit_weights(tmp_path / "vae", lambda weights: weights.pop("decoder.conv_out.bias"))
    with pytest.raises(ValueError, match=r"missing keys: decoder.conv_out.bias"):
        VideoGenPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_weights_of_any_floating_type_are_checked(kind):
    dtype = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}[kind]
    network = torch.nn.Linear(3, 3)
    network.weight = torch.nn.Parameter(torch.eye(3).to(dtype), requires_grad=False)
    check_finite(network, "network")
    network.weight.data = torch.full((3, 3), float("nan")).to(dtype)
    with pytest.raises(ValueError, match="weight of network"):
        check_finite(network, "network")


def test_components_keep_the_defaults_of_the_checkpoint(make):
    pipe = make()
    pipe.register_to_config(height=24, frame_rate=7.0, rollout_defaults={"window": 3})
    again = VideoGenPipeline(**pipe.components)
    assert again.defaults == pipe.defaults and again.config.height == 24
    assert again.config.rollout_defaults == {"window": 3} and again.denoiser is pipe.denoiser
    changed = VideoGenPipeline(**pipe.components, height=32)
    assert (changed.config.height, changed.config.frame_rate) == (32, 7.0)
    assert VideoGenPipeline(**pipe.components).defaults == pipe.defaults
    other = {denoiser_name(pipe): copy.deepcopy(pipe.denoiser)}
    assert VideoGenPipeline(**pipe.components | other).config.height == 480


def test_a_video_longer_than_the_training_clips_is_warned_of(monkeypatch):
    pipe = make_pipeline(trained_token_frames=3)
    logged = []
    monkeypatch.setattr("vgen.pipeline.logger.warning", logged.append)
    assert latents(pipe, num_frames=9).shape[2] == 3 and not logged
    assert latents(pipe, num_frames=13).shape[2] == 4
    assert len(logged) == 1 and "num_frames=13" in logged[0] and "9 frames (3 token frames)" in logged[0]


def test_a_cut_prompt_is_warned_of_with_what_was_cut(make, monkeypatch):
    pipe, logged = make(), []
    monkeypatch.setattr("vgen.models.prompts.logger.warning", logged.append)
    pipe.encode_prompt(PROMPT + " a red square", PROMPT + " a blue square", max_sequence_length=8)
    assert [text.split("cut: ")[1] for text in logged] == ["'square'", "'square'"]


@pytest.mark.parametrize(
    "device_map", ["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "balanced"))]
)
def test_a_device_map_places_components(pipe, tmp_path, device_map):
    pipe.save_pretrained(tmp_path)
    again = VideoGenPipeline.from_pretrained(tmp_path, device_map=device_map)
    again.set_progress_bar_config(disable=True)
    assert again.hf_device_map
    assert again.denoiser.device.type == again.vae.device.type == ("cpu" if device_map == "cpu" else "cuda")
    assert torch.allclose(latents(again).cpu(), latents(pipe), atol=1e-3 if device_map != "cpu" else 1e-5)


@pytest.mark.gpu
def test_on_another_device_the_video_is_the_same(pipe):
    expected = pipe(PROMPT, generator=seeded()).frames
    frames = pipe.to("cuda")(PROMPT, generator=seeded()).frames
    assert pipe.device.type == "cuda" and abs(frames - expected).max() < 1e-2


def test_components_may_be_omitted_or_given(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    bare = VideoGenPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None, vae=pipe.vae)
    assert bare.text_encoder is None and bare.vae is pipe.vae
    shared = VideoGenPipeline.from_pretrained(tmp_path, **{denoiser_name(pipe): pipe.denoiser})
    assert shared.denoiser is pipe.denoiser
    shared.set_progress_bar_config(disable=True)
    bare.set_progress_bar_config(disable=True)
    positive, negative = pipe.encode_prompt(PROMPT)
    embeds = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    frames = bare(**embeds, generator=seeded(), output_type="latent").frames
    assert torch.allclose(frames, latents(shared), atol=1e-5)
    bare.save_pretrained(tmp_path / "bare")
    again = VideoGenPipeline.from_pretrained(tmp_path / "bare")
    again.set_progress_bar_config(disable=True)
    assert again.text_encoder is None and again.tokenizer is None
    assert torch.allclose(again(**embeds, generator=seeded(), output_type="latent").frames, frames, atol=1e-5)


def test_without_a_denoiser_prompts_are_encoded_and_nothing_else(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    text = VideoGenPipeline.from_pretrained(tmp_path, vae=None, **{denoiser_name(pipe): None})
    for actual, expected in zip(text.encode_prompt(PROMPT), pipe.encode_prompt(PROMPT), strict=True):
        assert torch.allclose(actual, expected, atol=1e-6)
    for call in (text, text.rollout, text.interpolator):
        with pytest.raises(ValueError, match="no denoiser"):
            call(prompt=PROMPT, **({"size": (16, 16)} if call == text.interpolator else {}))


def test_prompts_are_encoded_without_a_scheduler(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    none = {"scheduler": None, "vae": None, denoiser_name(pipe): None}
    text = VideoGenPipeline(**pipe.components | none, max_sequence_length=8)
    loaded = VideoGenPipeline.from_pretrained(tmp_path, **none)
    for one in (text, loaded):
        for actual, expected in zip(one.encode_prompt(PROMPT), pipe.encode_prompt(PROMPT), strict=True):
            assert torch.allclose(actual, expected, atol=1e-6)


def test_a_scheduler_may_be_given_later(pipe, monkeypatch):
    logged, expected = [], latents(pipe)
    monkeypatch.setattr("vgen.pipeline.logger.warning", logged.append)
    late = VideoGenPipeline(**pipe.components | {"scheduler": None})
    late.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="no scheduler"):
        latents(late)
    late.scheduler = pipe.scheduler
    assert torch.equal(latents(late), expected) and not logged


@pytest.mark.parametrize("parallel", [False, True])
def test_sharded_weights_load(pipe, tmp_path, monkeypatch, parallel):
    monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", parallel)
    pipe.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list((tmp_path / denoiser_name(pipe)).glob("*.safetensors"))) > 1
    assert_same(VideoGenPipeline.from_pretrained(tmp_path), pipe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_close(pipe, dtype):
    exact = pipe(PROMPT, generator=seeded()).frames
    frames = pipe.to(dtype)(PROMPT, generator=seeded()).frames
    assert pipe.denoiser.dtype == pipe.vae.dtype == dtype
    assert abs(frames - exact).mean() < 0.02


def test_prompts_are_encoded_separately(pipe):
    positive, negative = pipe.encode_prompt([PROMPT, "a blue square"], num_videos_per_prompt=2)
    assert positive.shape == negative.shape == (4, 8, 32)
    assert torch.equal(positive[0], positive[1]) and not torch.equal(positive[1], positive[2])


TASKS = {"tasks": ["text", "leading", "keyframes"], "window": 2, "sink": 1, "trained_token_frames": 5}


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading_gives_the_same_video_stream_and_rollout(make, kind, tmp_path, nothing_is_left):
    exact, pipe = make(**TASKS), make(**TASKS)
    expected = latents(exact)
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    options |= {"onload_device": torch.device("cpu"), "offload_to_disk_path": str(tmp_path)}
    # by leaf, diffusers saves weights that two modules share when they have gone already
    pipe.enable_group_offload(offload_type=kind, exclude_modules=["text_encoder"], **options)
    assert torch.allclose(latents(pipe), expected, atol=1e-5)
    assert all(weight.isnan().all() for weight in pipe.denoiser.parameters())
    assert_streams_equal(pipe, exact, expected)
    assert_long_videos_equal(pipe, exact)


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_weights_that_come_layer_by_layer_give_the_same_video_stream_and_rollout(make, tmp_path, where):
    """What `enable_sequential_cpu_offload` does of each component; itself it refuses to without a GPU."""
    exact, pipe = make(**TASKS), make(**TASKS)
    expected = latents(exact)
    for name in (denoiser_name(pipe), "vae"):
        if where == "disk":
            disk_offload(getattr(pipe, name), tmp_path / name, execution_device=torch.device("cpu"))
        else:
            cpu_offload(getattr(pipe, name), torch.device("cpu"), offload_buffers=True)
        assert all(weight.is_meta for weight in getattr(pipe, name).parameters())
    assert torch.allclose(latents(pipe), expected, atol=1e-5)
    assert_streams_equal(pipe, exact, expected)
    assert_long_videos_equal(pipe, exact)


@pytest.mark.slow
def test_compilation_by_blocks_gives_the_same_video_and_rollout(make):
    small = {} if make is make_pipeline else ONE_LEVEL  # each level is compiled anew
    exact, pipe = make(**TASKS, **small), make(**TASKS, **small)
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        pipe.denoiser.compile_repeated_blocks(fullgraph=True, backend="eager")
        assert torch.allclose(latents(pipe), latents(exact), atol=1e-4)
        assert_long_videos_equal(pipe, exact)


def test_casting_by_layers_is_close_in_videos_and_rollouts(make):
    exact, pipe = make(**TASKS), make(**TASKS)
    pipe.denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    error = (latents(pipe) - latents(exact)).norm() / latents(exact).norm()
    assert 0 < error < 0.1
    assert_long_videos_equal(pipe, exact, atol=0.2)


def assert_streams_equal(pipe, exact, latents):
    for theirs, ours in zip(exact.decode_stream(latents), pipe.decode_stream(latents), strict=True):
        assert abs(theirs.astype(int) - ours).max() <= 1


def assert_long_videos_equal(pipe, exact, atol=1e-2):
    """Rolled out, predicted and interpolated."""
    clip = torch.rand(5, 3, 16, 16, generator=seeded())
    for make in (
        lambda pipe: np.concatenate(list(pipe.rollout(PROMPT, num_frames=16, generator=seeded()))) / 255,
        lambda pipe: pipe.predict(clip, 8, generator=seeded()).frames,
        lambda pipe: pipe.interpolate(clip, 2, generator=seeded()).frames,
    ):
        assert abs(make(pipe) - make(exact)).max() < atol


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_to_the_cpu_gives_the_same_video_and_stream(make, method):
    known, exact = {"image": torch.rand(3, 16, 16)}, make(**TASKS).to("cuda")
    expected = latents(exact, **known)
    pipe = make(**TASKS)
    getattr(pipe, method)()
    assert torch.allclose(latents(pipe, **known), expected, atol=1e-3)
    assert_streams_equal(pipe, exact, expected)
    assert_long_videos_equal(pipe, exact)


def test_tiling_and_slicing_of_the_vae_are_reached_from_the_pipeline(pipe):
    expected = pipe(PROMPT, num_videos_per_prompt=2, generator=seeded()).frames
    pipe.vae.enable_slicing()
    assert abs(pipe(PROMPT, num_videos_per_prompt=2, generator=seeded()).frames - expected).max() < 1e-5
    pipe.vae.enable_tiling(8, 8, 4, 4)
    tiled = pipe(PROMPT, num_videos_per_prompt=2, generator=seeded()).frames
    assert tiled.shape == expected.shape and abs(tiled - expected).max() > 1e-3


def test_a_callback_can_change_the_guidance(pipe, randomize):
    randomize(pipe.denoiser)

    def stop_guiding(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0
        return {}

    weak = latents(pipe, guidance_scale=9.0, num_inference_steps=4, callback_on_step_end=stop_guiding)
    assert pipe.guidance_scale == 1.0
    assert not torch.allclose(weak, latents(pipe, guidance_scale=9.0, num_inference_steps=4), atol=1e-2)
    assert pipe.guidance_scale == 9.0
    with pytest.raises(ValueError, match="not both"):
        latents(pipe, guidance_scale=9.0, guider=ClassifierFreeGuidance())


def test_a_callback_can_replace_the_prompt_embeddings(pipe, randomize):
    randomize(pipe.denoiser)
    names = ["prompt_embeds", "negative_prompt_embeds"]
    original, other = pipe.encode_prompt(PROMPT), pipe.encode_prompt("a blue square", "left")

    def replace(pipe, step, timestep, tensors):
        assert list(tensors) == names
        return dict(zip(names, other, strict=True))

    noise = torch.randn(1, 4, 3, 4, 4, generator=seeded())
    settings = {"num_inference_steps": 2, "latents": noise}
    plain = latents(pipe, **settings)
    replaced = latents(pipe, callback_on_step_end=replace, callback_on_step_end_tensor_inputs=names, **settings)
    pipe.scheduler.set_timesteps(2)
    sampler = pipe.sampler(Guidance(scale=pipe.config.guidance_scale))
    with torch.no_grad():
        for timestep, embeds in zip(pipe.scheduler.timesteps, (original, other), strict=True):
            conditions = Conditions(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], frame_rate=8.0)
            prediction = sampler.predict(noise, timestep, conditions)
            noise = pipe.scheduler.step(prediction, timestep, noise, return_dict=False)[0]
    assert (replaced - noise).abs().max() < 1e-5 and (replaced - plain).abs().max() > 1e-4


def test_diffusers_callbacks_get_the_tensors_that_they_name(pipe):
    steps = []

    class Stop(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            assert set(callback_kwargs) == {"latents"} and not pipeline.interrupt
            steps.append(step_index)
            pipeline._interrupt = step_index == 1
            return {"latents": torch.zeros_like(callback_kwargs["latents"])}

    videos = [
        latents(pipe, num_inference_steps=4, callback_on_step_end=callback)
        for callback in (Stop(), MultiPipelineCallbacks([Stop()]))
    ]
    assert steps == [0, 1, 0, 1] and not any(video.any() for video in videos)


def test_xformers_without_cuda_is_one_clear_error(pipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = latents(pipe)
    with pytest.raises(RuntimeError, match=r"CUDA.*pip install vgen\[xformers\]"):
        pipe.enable_xformers_memory_efficient_attention()
    pipe.disable_xformers_memory_efficient_attention()
    assert torch.equal(latents(pipe), expected)


def test_pushing_uploads_every_component(pipe, hub):
    pipe.push_to_hub("someone/something")
    files = hub["someone/something"]
    assert json.loads(files["model_index.json"])["_class_name"] == "VideoGenPipeline"
    assert {"vae", denoiser_name(pipe), "text_encoder", "tokenizer", "scheduler"} <= {
        Path(name).parts[0] for name in files
    }
