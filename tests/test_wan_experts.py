import json

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file

from vgen import VideoGenPipeline

PROMPT, NEGATIVE = "a red circle moves", "blue"
SETTINGS = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 3.0}


@pytest.fixture
def pipes(experts_folder):
    """The pipelines of diffusers and of this package."""
    both = WanPipeline.from_pretrained(experts_folder), VideoGenPipeline.from_pretrained(experts_folder)
    for pipe in both:
        pipe.set_progress_bar_config(disable=True)
    return both


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.mark.parametrize("scale", [None, 1.0, 5.0])
def test_videos_equal_those_of_diffusers(pipes, scale):
    latents = [
        pipe(PROMPT, NEGATIVE, **SETTINGS, guidance_scale_2=scale, generator=seeds(0)[0], output_type="latent").frames
        for pipe in pipes
    ]
    torch.testing.assert_close(latents[1], latents[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_batches_and_output_types_equal_those_of_diffusers(pipes, output_type):
    theirs, ours = (
        pipe([PROMPT, "a blue square"], [NEGATIVE] * 2, **SETTINGS, generator=seeds(1, 2), output_type=output_type)
        for pipe in pipes
    )
    if output_type == "pil":
        pairs = zip(sum(theirs.frames, []), sum(ours.frames, []), strict=True)
        assert max(np.abs(np.asarray(a, float) - np.asarray(b, float)).max() for a, b in pairs) <= 1
    else:
        np.testing.assert_allclose(np.asarray(ours.frames), np.asarray(theirs.frames), atol=1e-4)


def test_each_network_is_used_on_its_side_of_the_boundary(pipes):
    _, pipe = pipes
    used = {"transformer": [], "transformer_2": []}
    for name, levels in used.items():
        network = getattr(pipe, name)
        network.register_forward_pre_hook(
            lambda _, args, kwargs, levels=levels: levels.append(kwargs["timestep"].flatten()[0].item()),
            with_kwargs=True,
        )
    pipe(PROMPT, **SETTINGS, output_type="latent")
    assert min(used["transformer"]) >= 800 > max(used["transformer_2"])
    assert len(used["transformer"]) + len(used["transformer_2"]) == SETTINGS["num_inference_steps"]
    pipe.register_to_config(boundary_ratio=0.0)  # the second one is never used
    used["transformer_2"].clear()
    pipe(PROMPT, **SETTINGS, output_type="latent")
    assert not used["transformer_2"]


def test_offloading_takes_one_network_away_when_the_other_one_comes(pipes):
    _, pipe = pipes
    pipe.enable_model_cpu_offload(device="cpu")  # nothing moves there, but the hooks are those of a GPU
    before = [one._hf_hook.prev_module_hook.model for one in (pipe.transformer, pipe.transformer_2, pipe.vae)]
    assert before == [pipe.text_encoder, pipe.transformer, pipe.transformer_2]


@pytest.mark.gpu
def test_offloading_keeps_one_of_the_two_on_the_gpu(pipes):
    _, pipe = pipes
    expected = pipe(PROMPT, **SETTINGS, generator=seeds(0)[0], output_type="latent").frames
    pipe.enable_model_cpu_offload()
    seen, networks = [], {"transformer": pipe.transformer, "transformer_2": pipe.transformer_2}
    for network in networks.values():
        # at its first layer, after the hook of accelerate has moved the network
        network.patch_embedding.register_forward_pre_hook(
            lambda *_: seen.append([name for name, one in networks.items() if one.device.type == "cuda"])
        )
    got = pipe(PROMPT, **SETTINGS, generator=seeds(0)[0], output_type="latent").frames
    assert all(len(names) == 1 for names in seen) and {names[0] for names in seen} == networks.keys()
    torch.testing.assert_close(got.cpu(), expected, atol=1e-3, rtol=1e-3)


def test_a_pipeline_survives_saving_and_conversion(pipes, tmp_path):
    theirs, ours = pipes
    ours.save_pretrained(tmp_path)
    settings = SETTINGS | {"generator": None, "output_type": "latent"}
    expected = ours(PROMPT, NEGATIVE, **settings | {"generator": seeds(3)[0]}).frames
    for pipe in (VideoGenPipeline.from_pretrained(tmp_path), VideoGenPipeline.from_pipe(theirs), ours.to_diffusers()):
        pipe.set_progress_bar_config(disable=True)
        got = pipe(PROMPT, NEGATIVE, **settings | {"generator": seeds(3)[0]}).frames
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    marks = ours.fingerprint()
    assert marks["low-noise denoiser"] != marks["denoiser"]


def test_a_default_weight_for_the_second_network_gives_way_to_one_weight_for_both(pipes):
    _, pipe = pipes
    pipe.register_to_config(guidance_scale=3.0, guidance_scale_2=6.0)
    settings = {name: value for name, value in SETTINGS.items() if name != "guidance_scale"}

    def latents(**weights):
        return pipe(PROMPT, NEGATIVE, **settings, **weights, generator=seeds(0)[0], output_type="latent").frames

    torch.testing.assert_close(latents(), latents(guidance_scale=3.0, guidance_scale_2=6.0))
    torch.testing.assert_close(latents(guidance_scale=3.0), latents(guidance_scale=3.0, guidance_scale_2=3.0))
    assert not torch.equal(latents(), latents(guidance_scale=3.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boundary_ratio": None}, "boundary_ratio=None needs transformer, got transformer and transformer_2"),
        ({"transformer_2": [None, None]}, "boundary_ratio=0.8 needs transformer and transformer_2, got transformer"),
        ({"transformer": [None, None]}, "boundary_ratio=0.8 needs transformer and transformer_2, got transformer_2"),
    ],
)
def test_half_a_pair_is_named(experts_folder, tmp_path, change, message):
    index = json.loads((experts_folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=message):
        VideoGenPipeline.from_pretrained(tmp_path)


def test_what_a_pair_cannot_do_is_named(pipes, wan_folder):
    _, pipe = pipes
    parts = pipe.components
    with pytest.raises(ValueError, match="transformer_2 needs boundary_ratio"):
        VideoGenPipeline(**parts | {"transformer": None})
    with pytest.raises(ValueError, match="boundary_ratio must be a finite number"):
        VideoGenPipeline(**parts, boundary_ratio=2.0)
    pipe.transformer.register_to_config(tasks=["text", "leading"])
    with pytest.raises(ValueError, match="makes single clips only"):
        pipe.rollout(PROMPT)
    with pytest.raises(ValueError, match="transformer_2 must have the config of transformer; see tasks"):
        VideoGenPipeline(**parts)
    single = VideoGenPipeline.from_pretrained(wan_folder)
    with pytest.raises(ValueError, match="guidance_scale_2 is for checkpoints with transformer_2"):
        single(PROMPT, **SETTINGS, guidance_scale_2=2.0)


def test_each_network_takes_adapters_of_its_own(pipes, tmp_path):
    theirs, ours = pipes
    shape = ours.transformer.state_dict()["blocks.0.attn1.to_q.weight"].shape
    for index, name in enumerate(("high", "low")):
        generator = torch.Generator().manual_seed(index)
        layers = {
            "transformer.blocks.0.attn1.to_q.lora_A.weight": torch.randn(2, shape[1], generator=generator),
            "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.randn(shape[0], 2, generator=generator),
        }
        save_file(layers, tmp_path / f"{name}.safetensors")

    def latents(pipe):
        return pipe(PROMPT, NEGATIVE, **SETTINGS, generator=seeds(0)[0], output_type="latent").frames

    before = latents(ours)
    for pipe in pipes:
        pipe.load_lora_weights(tmp_path / "high.safetensors", adapter_name="high")
    torch.testing.assert_close(latents(ours), latents(theirs), atol=1e-4, rtol=1e-4)
    high = latents(ours)
    for pipe in pipes:
        pipe.load_lora_weights(tmp_path / "low.safetensors", adapter_name="low", load_into_transformer_2=True)
    torch.testing.assert_close(latents(ours), latents(theirs), atol=1e-4, rtol=1e-4)
    assert min((high - before).abs().max(), (latents(ours) - high).abs().max()) > 1e-3
    ours.fuse_lora()
    torch.testing.assert_close(latents(ours), latents(theirs), atol=1e-4, rtol=1e-4)
    ours.unfuse_lora()
    ours.unload_lora_weights()
    torch.testing.assert_close(latents(ours), before, atol=1e-4, rtol=1e-4)


def test_adapters_for_a_network_that_is_not_there_are_named(wan_folder):
    pipe = VideoGenPipeline.from_pretrained(wan_folder)
    with pytest.raises(ValueError, match="load_into_transformer_2 is for checkpoints with transformer_2"):
        pipe.load_lora_weights({}, load_into_transformer_2=True)


def test_a_default_negative_prompt_is_used_where_none_is_given(wan_folder):
    pipe = VideoGenPipeline.from_pretrained(wan_folder)
    pipe.set_progress_bar_config(disable=True)

    def latents(negative=None):
        return pipe(PROMPT, negative, **SETTINGS, generator=seeds(0)[0], output_type="latent").frames

    plain, steered = latents(), latents(NEGATIVE)
    pipe.register_to_config(negative_prompt=NEGATIVE)
    assert torch.equal(latents(), steered) and torch.equal(latents(""), plain) and not torch.equal(plain, steered)
