"""Training of the denoiser with held-out clips, with early stopping, and without prompts."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vgen.data.latents import LatentSet
from vgen.data.video_io import write_video
from vgen.models.prompts import embed
from vgen.pipeline import VideoGenPipeline
from vgen.training.sample import DenoiserSpec, SampleConfig, Source, make_batch, plan_step

from .scripts import DENOISER, UNET, encode, launch, logged, train_vdm, trained_alike, vdm_settings

KNOWN = {
    "--known": json.dumps({"none": 1, "both": 1}), "--window_lengths": "[3]",
    "--windows": json.dumps({"start": 1, "anywhere": 1}), "--groups": json.dumps({"full": 1, "causal": 1}),
}  # fmt: skip


@pytest.fixture(scope="module")
def held_out(vae_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    encode(vae_run, folder, **{"--seed": 1, "--num_clips": 6, "--shard_size": 4})
    return folder


def direct_loss(pipe, folder, num_samples):
    """The loss of flow matching, sample by sample."""
    config = SampleConfig(output_dir=folder, latents_dir=folder, batch_size=8, seed=1, window_lengths=[2])
    config.groups = {"full": 0.5, "causal": 0.5}
    source, spec, losses = Source(LatentSet(folder), config), DenoiserSpec.of(pipe.transformer), []
    for step in range(-(-num_samples // 8)):
        plan = plan_step(config, [source], [1.0], step)
        batch = make_batch(source, spec, step, slice(0, 8), plan.mode, plan.length, pipe.tokenizer)
        with torch.no_grad():
            prompts = embed(pipe.text_encoder, batch["input_ids"], batch["prompt_mask"])
            for row in range(8):
                clean, noise, level = batch["latents"][row], batch["noise"][row], batch["levels"][row]
                noisy = clean + level[:, None, None] * (noise - clean)
                groups = batch["groups"] if isinstance(batch["groups"][0], int) else batch["groups"][row]
                made = pipe.transformer(
                    noisy[None], 1000 * level[None], prompts[row : row + 1], groups=groups,
                    frame_rate=batch["frame_rate"][row : row + 1],
                ).sample[0]  # fmt: skip
                losses.append((made - (noise - clean)).square().mean().item())
    return np.mean(losses[:num_samples])


def test_the_loss_on_held_out_clips_is_that_of_fixed_samples_and_does_not_disturb_training(runs, held_out, tmp_path):
    options = {"--groups": '{"full": 0.5, "causal": 0.5}', "--sample_every": 2, "--save_dtype": "float32"}
    with_scores = {"--held_out_latents": held_out, "--num_score_clips": 12}
    done = train_vdm(runs, tmp_path / "with", **options, **with_scores)
    pipe = VideoGenPipeline.from_pretrained(tmp_path / "with/pipeline")
    for name, folder in {"held_out_loss": held_out, "train_loss": runs[2]}.items():
        values = logged(tmp_path / "with", name)
        assert [step for step, _ in values] == [2, 4]
        assert values[1][1] == pytest.approx(direct_loss(pipe, folder, 12), rel=1e-4)
    assert "held_out_loss" in done.stdout and "adherence" not in done.stdout  # captions of the clips are shown
    assert (tmp_path / "with/samples.mp4").exists()
    train_vdm(runs, tmp_path / "without", **options | {"--sample_every": 9})
    assert trained_alike(tmp_path / "with", tmp_path / "without")


def test_a_run_ends_when_the_held_out_loss_no_longer_falls(runs, held_out, tmp_path):
    options = {
        "--held_out_latents": held_out, "--num_score_clips": 9, "--sample_every": 1, "--patience": 2,
        "--learning_rate": 0, "--max_steps": 9,
    }  # fmt: skip
    done = train_vdm(runs, tmp_path, **options)
    losses = logged(tmp_path, "held_out_loss")
    assert [step for step, _ in losses] == [1, 2, 3] and len({value for _, value in losses}) == 1
    assert "with the weights of step 1 (held_out_loss " in done.stdout.splitlines()[-1]
    rejected = train_vdm(runs, tmp_path / "no", check=False, **{"--patience": 2})
    assert rejected.returncode and "patience needs held_out_latents" in rejected.stderr


@pytest.mark.slow
def test_processes_that_share_the_scores_end_alike(runs, held_out, tmp_path):
    options = {
        "--held_out_latents": held_out, "--num_score_clips": 12, "--sample_every": 1, "--patience": 1,
        "--learning_rate": 0, "--max_steps": 6, "--sample_prompts": '["a red circle"]',
    }  # fmt: skip
    for processes, name in ((1, "one"), (2, "two")):
        done = train_vdm(runs, tmp_path / name, processes=processes, **options)
        assert "with the weights of step 1 (held_out_loss " in done.stdout.splitlines()[-1]
    for name in ("held_out_loss", "train_loss"):
        one, two = (logged(tmp_path / run, name) for run in ("one", "two"))
        assert [step for step, _ in one] == [1, 2]
        assert [value for _, value in two] == pytest.approx([value for _, value in one], rel=1e-5)


def silent_videos(folder):
    """Videos without captions."""
    folder.mkdir()
    for index in range(3):
        frames = np.random.default_rng(index).integers(0, 256, (17, 16, 16, 3), dtype=np.uint8)
        write_video(frames, folder / f"{index}.mp4", frame_rate=8)
    return folder


@pytest.mark.parametrize("network", ["transformer", "unet"])
def test_clips_without_captions_train_without_a_text_encoder(vae_run, network, tmp_path):
    videos = silent_videos(tmp_path / "videos")
    encode(
        vae_run, tmp_path / "latents",
        **{"--data": videos, "--num_frames": 17, "--keyframes": "true", "--num_clips": None},
    )  # fmt: skip
    model = DENOISER | {"sink": 1}
    options = KNOWN | {
        "--model": json.dumps(model),
        "--held_out_latents": tmp_path / "latents",
        "--num_score_clips": 4,
    }
    if network == "unet":
        model = json.loads(UNET["--model"]) | {"keyframe_slots": 4}
        options |= {"--denoiser": "unet", "--model": json.dumps(model)}
    settings = vdm_settings((vae_run, None, tmp_path / "latents"), tmp_path / "run", **options)
    del settings["--text_encoder"]
    done = launch("train/train_vdm.py", **settings)
    assert "next: vgen predict VIDEO --model" in done.stdout.splitlines()[-1]
    assert (tmp_path / "run/samples.mp4").exists()
    pipe = VideoGenPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert pipe.text_encoder is None and pipe.denoiser.config.tasks == ["leading", "keyframes"]
    image = torch.rand(3, 16, 16)
    assert pipe(frames={0: image}).frames.shape == (1, 5, 16, 16, 3)
    assert pipe.interpolate(torch.rand(3, 3, 16, 16), 4).frames.shape == (1, 9, 16, 16, 3)
    again = settings | {"--init": tmp_path / "run/pipeline", "--output_dir": tmp_path / "again", "--max_steps": 1}
    launch("train/train_vdm.py", **again | {"--sample_every": 1})
    saved = [load_file(path) for path in sorted((tmp_path / "again/pipeline").rglob("diffusion*.safetensors"))]
    assert len(saved) == 2


def test_clips_with_captions_need_a_text_encoder(vae_run, latents_dir, tmp_path):
    settings = vdm_settings((vae_run, None, latents_dir), tmp_path)
    del settings["--text_encoder"]
    done = launch("train/train_vdm.py", check=False, **settings)
    assert done.returncode and "have captions, so a text encoder is needed: pass text_encoder" in done.stderr
    done = launch("train/train_vdm.py", check=False, **settings, **{"--sample_prompts": '["a prompt"]'})
    assert done.returncode and "sample_prompts need a text encoder" in done.stderr
