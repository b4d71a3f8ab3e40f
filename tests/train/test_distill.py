"""Distillation of a pipeline at tiny size."""

import json

import pytest
import torch
from safetensors.torch import load_file

from vgen import VideoGenPipeline

from .scripts import TINY, UNET, encode, launch, logged, train_vdm, trained_alike

OPTIONS = {
    "--batch_size": 4, "--max_steps": 4, "--sample_every": 4, "--num_levels": 8, "--num_inference_steps": 2,
    "--num_score_prompts": 2, "--guidance_scale": 3.0, "--learning_rate": 0.01, "--lr_schedule": "constant",
}  # fmt: skip
FORCED = {
    "--method": "self_forcing", "--critic_steps": 1, "--windows": '{"start": 1}',
    "--known": '{"none": 1, "leading": 1}', "--groups": '{"full": 1, "causal": 1}',
    "--rollout": '{"chunk_size": 1, "window": 1, "sink": 0}',
}  # fmt: skip


def distill(latents, teacher, output, check=True, **options):
    settings = {"--init": teacher, "--latents_dir": latents, "--output_dir": output}
    return launch("train/distill.py", check=check, **settings | TINY | OPTIONS | options)


@pytest.fixture(scope="module")
def teacher(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    options = {"--known": '{"none": 1, "leading": 1}', "--groups": '{"full": 1, "causal": 1}'}
    train_vdm(runs, folder, **options)
    return folder / "pipeline"


def test_a_student_makes_videos_and_rollouts_in_few_steps_without_guidance(runs, teacher, tmp_path):
    known = {"--known": '{"none": 1, "leading": 1}', "--groups": '{"full": 1, "causal": 1}'}
    done = distill(runs[2], teacher, tmp_path / "run", **known)
    assert f"next: vgen rollout PROMPT --model {tmp_path}/run/pipeline" in done.stdout
    pipe = VideoGenPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert pipe.scheduler.config.stochastic_sampling and pipe.config.guidance_scale == 1.0
    assert pipe.config.num_inference_steps == 2 and pipe.config.sigmas == [1.0, 0.5]
    seen = []
    pipe.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((len(kwargs["hidden_states"]), kwargs["timestep"].max().item())),
        with_kwargs=True,
    )
    first = pipe("a red circle moves right", generator=torch.Generator().manual_seed(0)).frames
    assert seen == [(1, 1000.0), (1, 500.0)]
    again = pipe("a red circle moves right", generator=torch.Generator().manual_seed(0)).frames
    assert (first == again).all()
    rollout = pipe.rollout("a red circle moves right", num_frames=9, chunk_size=1, window=1, sink=0)
    assert sum(len(chunk) for chunk in rollout) == 9
    before, after = (
        load_file(path / "transformer/diffusion_pytorch_model.safetensors")
        for path in (teacher, tmp_path / "run/pipeline")
    )
    assert any((before[name] != after[name]).any() for name in before)
    distill(runs[2], teacher, tmp_path / "half", **known | {"--max_steps": 2})
    distill(runs[2], teacher, tmp_path / "half", **known)  # resumes
    assert trained_alike(tmp_path / "half", tmp_path / "run")


def test_the_loss_falls(runs, teacher, tmp_path):
    distill(runs[2], teacher, tmp_path, **{"--max_steps": 40, "--sample_every": 99})
    losses = [value for _, value in logged(tmp_path, "loss")]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_a_unet_and_stored_embeddings_and_a_public_model_by_lora(runs, wan_folder, tmp_path):
    unet = train_vdm(runs, tmp_path / "unet", **UNET)
    assert unet.returncode == 0
    two = {"--max_steps": 2, "--sample_every": 9}
    for name, method in (("consistent", {}), ("forced", FORCED)):
        distill(runs[2], tmp_path / "unet/pipeline", tmp_path / name, **two | method)
        assert VideoGenPipeline.from_pretrained(tmp_path / name / "pipeline").config.num_inference_steps == 2
    options = {"--vae": wan_folder, "--num_captions": 1, "--text_encoder": wan_folder, "--max_sequence_length": 512}
    encode(tmp_path, tmp_path / "latents", **options)
    lora = two | {"--train_only": "lora", "--lora_rank": 2}
    distill(tmp_path / "latents", wan_folder, tmp_path / "causal", **two | FORCED | {"--method": "consistency"})
    full = {"--groups": '{"full": 1}'}
    for name, init, method in (("lora", wan_folder, full), ("forced-lora", tmp_path / "causal/pipeline", FORCED)):
        done = distill(tmp_path / "latents", init, tmp_path / name, **lora | method)
        assert f"--model {init} --lora {tmp_path}/{name}/lora" in done.stdout
        pipe = VideoGenPipeline.from_pretrained(init)
        pipe.load_lora_weights(tmp_path / name / "lora")
        weights = [weight for name, weight in pipe.transformer.named_parameters() if "lora_B" in name]
        assert weights and any(weight.any() for weight in weights)


def test_a_student_learns_from_its_own_rollouts(runs, teacher, tmp_path):
    options = FORCED | {"--teacher": teacher}
    distill(runs[2], teacher, tmp_path / "run", **options)
    pipe = VideoGenPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert pipe.scheduler.config.stochastic_sampling and pipe.config.sigmas == [1.0, 0.5]
    assert pipe.config.rollout_defaults == {"chunk_size": 1, "window": 1, "sink": 0}
    before, after = (
        load_file(path / "transformer/diffusion_pytorch_model.safetensors")
        for path in (teacher, tmp_path / "run/pipeline")
    )
    assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)
    distill(runs[2], teacher, tmp_path / "half", **options | {"--max_steps": 2})
    distill(runs[2], teacher, tmp_path / "half", **options)  # resumes
    assert trained_alike(tmp_path / "half", tmp_path / "run")
    assert {name for name in ("student", "critic") if logged(tmp_path / "run", name)} == {"student", "critic"}


def test_a_student_learns_the_future_of_its_own_rollouts(runs, teacher, tmp_path):
    options = FORCED | {"--rollout_loss": "regression", "--max_steps": 40, "--sample_every": 99}
    distill(runs[2], teacher, tmp_path, **options)
    losses = [value for _, value in logged(tmp_path, "student")]
    assert len(losses) == 40 and sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--num_inference_steps": 9}, "num_inference_steps must be at most num_levels=8, got 9"),
        ({"--num_inference_steps": 0}, "num_inference_steps must be"),
        ({"--ema_decay": 0}, "distillation needs ema_decay above 0"),
        ({"--guidance_scale": 0.5}, "guidance_scale must be"),
        ({"--init": "nowhere"}, "no model 'nowhere'"),
        ({"--method": "self_forcing", "--windows": '{"anywhere": 1}'}, "set windows={start: 1}"),
        (FORCED | {"--rollout": "{}"}, "has no default of window: set rollout={window: ...}"),
        ({"--teacher": "vgen/shapes-64"}, "the teacher vgen/shapes-64 has another vae than the student"),
        ({"--teacher": "vgen/shapes-64-unet"}, "has a UNet3D, and the student a SpacetimeTransformer"),
        ({"--known": '{"keyframes": 1}'}, "known={'keyframes': 1.0} needs a model with keyframe_slots"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(runs, teacher, tmp_path, options, message):
    rejected = distill(runs[2], teacher, tmp_path / "run", check=False, **options)
    assert rejected.returncode != 0 and message in rejected.stderr.strip().splitlines()[-1], rejected.stderr


def test_another_vae_is_named(runs, teacher, tmp_path):
    latents = tmp_path / "latents"
    encode(runs[0], latents)
    settings = json.loads((latents / "settings.json").read_text())
    (latents / "settings.json").write_text(json.dumps(settings | {"vae_sha256": "0"}))
    rejected = distill(latents, teacher, tmp_path / "run", check=False)
    assert "were encoded with another VAE" in rejected.stderr
