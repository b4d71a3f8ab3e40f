"""Training of the denoiser."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer
from typer.testing import CliRunner

from vgen.cli import app
from vgen.data.latents import LatentSet
from vgen.data.video_io import read_video
from vgen.models.prompts import embed, load_text_encoder, tokenize
from vgen.pipeline import VideoGenPipeline

from .scripts import (
    DENOISER,
    KILLED,
    ROOT,
    TINY,
    UNET,
    encode,
    latents_of,
    launch,
    logged,
    train_text_encoder,
    train_vae,
    train_vdm,
    trained_alike,
)


def test_a_trained_pipeline_generates(runs, tmp_path):
    train_vdm(runs, tmp_path)
    pipe = VideoGenPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe("a red circle moves right").frames.shape == (1, 5, 16, 16, 3)
    assert pipe.config.num_inference_steps == 1
    weights = load_file(tmp_path / "pipeline/transformer/diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}


def test_a_denoiser_without_full_attention_is_scored_as_it_was_trained(runs, tmp_path):
    model = DENOISER | {"group_modes": ["chunk"], "chunk_size": 1, "window": 2, "trained_token_frames": 5}
    options = {"--groups": '{"chunk": 1}', "--model": json.dumps(model), "--max_steps": 1, "--sample_every": 1}
    train_vdm(runs, tmp_path, **options)
    assert (tmp_path / "pipeline").is_dir()


def test_a_unet_trains_too_and_from_two_folders(runs, long_latents, tmp_path):
    options = UNET.copy()
    windows = {"--windows": json.dumps({"start": 1, "sink": 1}), "--window_lengths": "[3]"}
    train_vdm((*runs[:2], long_latents), tmp_path / "windows", **options | windows)
    options["--more_latents"] = json.dumps({str(long_latents): 0.5})
    options |= {"--prediction": "v_prediction", "--scheduler": "unipc", "--zero_terminal_snr": "true"}
    train_vdm(runs, tmp_path, **options)
    pipe = VideoGenPipeline.from_pretrained(tmp_path / "pipeline")
    assert isinstance(pipe.scheduler, UniPCMultistepScheduler) and pipe.scheduler.config.rescale_betas_zero_snr
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert not hasattr(pipe, "transformer") and pipe("a red circle moves right").frames.shape == (1, 5, 16, 16, 3)
    moved = [name for name, weight in pipe.unet.named_parameters() if name.endswith("conv.weight") and weight.any()]
    assert len([name for name in moved if "temporal" in name]) == 2 + 2 + 4  # they start as zeros
    rejected = train_vdm(runs, tmp_path / "other", check=False, **{"--denoiser": "cnn"})
    assert rejected.returncode != 0 and "Literal['transformer', 'unet']" in rejected.stderr


@pytest.mark.slow
def test_an_inflated_image_pipeline_trains_as_a_video_model(vae_run, text_run, stable_diffusion, tmp_path):
    start = VideoGenPipeline.from_stable_diffusion(stable_diffusion, num_frames=4, group_modes=["full", "causal"])
    start.save_pretrained(tmp_path / "start")
    options = {"--height": 32, "--width": 32, "--num_frames": 4}
    encode(tmp_path / "start", tmp_path / "latents", **options)
    options = {
        "--init": tmp_path / "start", "--prediction": "epsilon", "--snr_gamma": 5, "--train_only": "temporal",
        "--max_sequence_length": 77, "--save_dtype": "float32", "--ema_decay": 0,
    }  # fmt: skip
    runs = (tmp_path / "start", text_run, tmp_path / "latents")  # the text encoder is that of --init
    train_vdm(runs, tmp_path / "run", **options)
    pipe = VideoGenPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert isinstance(pipe.scheduler, DDIMScheduler) and pipe.scheduler.config.prediction_type == "epsilon"
    before, after = start.unet.state_dict(), pipe.unet.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("temporal" in name for name in moved)
    assert pipe("a dog", num_inference_steps=2).frames.shape == (1, 4, 32, 32, 3)
    rejected = train_vdm(runs, tmp_path / "other", check=False, **options | {"--prediction": "v_prediction"})
    assert rejected.returncode != 0 and "prediction=v_prediction, but the pipeline" in rejected.stderr
    rejected = train_vdm(runs, tmp_path / "other", check=False, **options | {"--zero_terminal_snr": "true"})
    assert rejected.returncode != 0 and "zero_terminal_snr=True, but the pipeline" in rejected.stderr

    train_vdm(runs, tmp_path / "adapter", **options | {"--train_only": "lora", "--lora_rank": 2, "--max_steps": 2})
    plain = pipe("a dog", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).frames
    pipe.load_lora_weights(tmp_path / "adapter/lora")
    adapted = pipe("a dog", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).frames
    assert pipe.get_list_adapters() and not np.array_equal(adapted, plain)


def test_a_public_pipeline_is_fine_tuned_by_lora(wan_folder, tmp_path):
    encode(tmp_path, tmp_path / "latents", **{"--vae": wan_folder, "--num_captions": 1})
    options = {
        "--init": wan_folder, "--latents_dir": tmp_path / "latents", "--output_dir": tmp_path / "run",
        "--train_only": "lora", "--lora_rank": 2, "--lora_alpha": 4, "--level_shift": 3.0, "--learning_rate": 0.01,
        "--max_sequence_length": 512, "--frame_rate": 16.0, "--batch_size": 4, "--max_steps": 2, "--sample_every": 9,
    }  # fmt: skip
    launch("train/train_vdm.py", **TINY | options)
    pipe = VideoGenPipeline.from_pretrained(wan_folder)
    pipe.set_progress_bar_config(disable=True)
    settings = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}

    def latents():
        return pipe("a red circle", generator=torch.Generator().manual_seed(0), **settings).frames

    plain = latents()
    pipe.load_lora_weights(tmp_path / "run/lora")
    assert (latents() - plain).abs().max() > 1e-4
    assert pipe.transformer.peft_config["default_0"].lora_alpha == 4
    pipe.unload_lora_weights()
    assert torch.equal(latents(), plain)  # the adapter is all that was trained
    assert not (tmp_path / "run/pipeline").exists()
    words = ["generate", "a red circle", "--model", wan_folder, "--steps", 2, "--num-frames", 5]
    for name, more in {"plain": [], "adapted": ["--lora", tmp_path / "run/lora"]}.items():
        arguments = [*words, "--height", 32, "--width", 32, *more, "-o", tmp_path / name]
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
    assert not np.array_equal(read_video(tmp_path / "plain")[0], read_video(tmp_path / "adapted")[0])
    rejected = launch("train/train_vdm.py", check=False, **TINY | options | {"--train_text_encoder": "true"})
    assert rejected.returncode != 0 and "train_only=lora" in rejected.stderr


def test_all_of_a_public_pipeline_is_fine_tuned(wan_folder, tmp_path):
    encode(tmp_path, tmp_path / "latents", **{"--vae": wan_folder, "--num_captions": 1})
    options = {
        "--init": wan_folder, "--latents_dir": tmp_path / "latents", "--output_dir": tmp_path / "run",
        "--batch_size": 4, "--max_steps": 3, "--sample_every": 9, "--optimizer": "adamw",
    }  # fmt: skip
    done = launch("train/train_vdm.py", **TINY | options)
    assert f"settings of {wan_folder}: level_shift=3.0, max_sequence_length=512, frame_rate=16.0" in done.stdout
    before, after = (VideoGenPipeline.from_pretrained(path) for path in (wan_folder, tmp_path / "run/pipeline"))
    old, new = before.transformer.state_dict(), after.transformer.state_dict()
    moved = {name.split(".")[0] for name in old if (old[name].float() - new[name].float()).abs().max() > 1e-4}
    assert {"patch_embedding", "blocks", "proj_out"} <= moved


@pytest.mark.parametrize("attention", ["joint", "divided"])
def test_only_temporal_layers_are_trained_where_there_are_some(runs, tmp_path, attention):
    options = {"--train_only": "temporal", "--model": json.dumps(DENOISER | {"attention": attention})}
    done = train_vdm(runs, tmp_path / "temporal", check=False, **options)
    if attention == "joint":
        assert done.returncode != 0 and "attention=divided have: use train_only=all or train_only=lora" in done.stderr
        return
    assert done.returncode == 0
    train_vdm(runs, tmp_path / "none", **options | {"--learning_rate": 0.0})
    weights, before = (load_file(tmp_path / run / "checkpoint-4/model.safetensors") for run in ("temporal", "none"))
    moved = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert moved and all("attn_time" in name for name in moved)


def test_a_loss_that_is_not_finite_names_the_clips(vae_run, text_run, latents_dir, tmp_path):
    shutil.copytree(latents_dir, tmp_path / "latents")
    count = 0
    for path in sorted((tmp_path / "latents").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        tensors["latents"] = tensors["latents"] * float("nan")
        count += len(tensors["latents"])
        save_file(tensors, path, metadata)
    assert count == len(LatentSet(latents_dir))
    stopped = train_vdm((vae_run, text_run, tmp_path / "latents"), tmp_path / "vdm", check=False)
    assert stopped.returncode != 0 and not (tmp_path / "vdm/pipeline").exists()
    message = re.search(r"step 1 is not finite; its batch: 2 token frames of clips ([\d, ]+) in (\S+)", stopped.stderr)
    assert message and Path(message[2].rstrip(".")) == tmp_path / "latents"
    numbers = [int(number) for number in message[1].split(", ")]
    assert len(set(numbers)) == 4 and max(numbers) < count
    stopped = train_vae(tmp_path / "vae", check=False, **{"--kl_weight": 1e39})
    assert stopped.returncode != 0 and not (tmp_path / "vae/vae").exists()
    assert "step 1 is not finite; its batch: scenes 0 to 3 of ShapesWorld(seed=0)" in stopped.stderr


def test_a_killed_run_on_latents_ends_with_the_weights_of_an_uninterrupted_one(runs, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    train_vdm(runs, tmp_path / "whole", fresh=True)
    script = (tmp_path / "killed.py", ROOT / "train/train_vdm.py")
    killed = train_vdm(runs, tmp_path / "again", check=False, fresh=True, script=script)
    assert killed.returncode != 0 and not (tmp_path / "again/pipeline").exists()
    again = train_vdm(runs, tmp_path / "again", fresh=True)
    assert "after 2 steps" in again.stdout and "is not resumed exactly" not in again.stderr
    assert trained_alike(tmp_path / "again", tmp_path / "whole")
    assert logged(tmp_path / "again", "loss") == logged(tmp_path / "whole", "loss")
    assert [step for step, _ in logged(tmp_path / "again", "loss")] == [1, 2, 3, 4]


def test_latents_of_another_vae_are_rejected(vae_run, text_run, latents_dir, tmp_path):
    train_vae(tmp_path / "other", **{"--seed": 1})
    train_vae(tmp_path / "decoder", **{"--init": vae_run / "vae", "--freeze_encoder": "true", "--image_steps": 0})
    once = {"--max_steps": 1, "--save_every": 1, "--sample_every": 9}
    rejected = train_vdm((tmp_path / "other", text_run, latents_dir), tmp_path / "no", check=False, **once)
    assert rejected.returncode != 0 and "were encoded with another VAE" in rejected.stderr
    train_vdm((tmp_path / "decoder", text_run, latents_dir), tmp_path / "yes", **once)
    # --vae takes the place of the VAE of --init, and its half precision is no other VAE
    train_vdm((vae_run, text_run, latents_dir), tmp_path / "again", **once, **{"--init": tmp_path / "yes/pipeline"})
    swapped, given = (
        load_file(path / "diffusion_pytorch_model.safetensors")["decoder.conv_out.weight"].float()
        for path in (tmp_path / "again/pipeline/vae", vae_run / "vae")
    )
    torch.testing.assert_close(swapped, given, atol=1e-3, rtol=0)


def test_captions_are_embedded_once_for_a_text_encoder_that_stays(vae_run, text_run, latents_dir, tmp_path):
    encode(vae_run, tmp_path / "latents", **{"--text_encoder": text_run, "--max_sequence_length": 32})
    data, plain = LatentSet(tmp_path / "latents"), LatentSet(latents_dir)
    assert data.has_embeddings and not plain.has_embeddings and torch.equal(latents_of(data), latents_of(plain))
    encoder, tokenizer = load_text_encoder(str(text_run)), AutoTokenizer.from_pretrained(text_run / "tokenizer")
    for index, caption in ((0, 0), (7, 2), (9, 3), (11, None)):
        text = "" if caption is None else data.captions[index][caption]
        expected = embed(encoder, *tokenize(tokenizer, [text], 32))[0]
        torch.testing.assert_close(data.embedding(index, caption).float(), expected, atol=2e-3, rtol=0)

    losses = []
    for name, folder in (("embedded", tmp_path / "latents"), ("plain", latents_dir)):
        train_vdm((vae_run, text_run, folder), tmp_path / name, **{"--text_dropout": 0.5, "--sample_every": 9})
        events = EventAccumulator(str(tmp_path / name / "logs")).Reload().Scalars("loss")
        losses.append([event.value for event in events])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert VideoGenPipeline.from_pretrained(tmp_path / "embedded/pipeline").text_encoder is not None

    train_text_encoder(tmp_path / "other", **{"--seed": 1})
    folders = vae_run, tmp_path / "other", tmp_path / "latents"
    rejected = train_vdm(folders, tmp_path / "no", check=False)
    assert rejected.returncode != 0 and "embedded with another text_encoder_sha256" in rejected.stderr


@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_a_temporal_loss_is_trained_with_and_judges_the_estimate(vae_run, text_run, long_latents, tmp_path, space):
    weights = {"difference_weight": 0.5, "warping_weight": 0.5, "matched_weight": 0.5}
    options = {f"--{name}": value for name, value in weights.items()} | {"--temporal_space": space}
    runs = vae_run, text_run, long_latents
    train_vdm(runs, tmp_path / "run", **options, **{"--max_steps": 2, "--sample_every": 9})
    events = EventAccumulator(str(tmp_path / "run/logs")).Reload()
    assert all(event.value > 0 for event in events.Scalars("temporal")) and len(events.Scalars("temporal")) == 2
    train_vdm(runs, tmp_path / "without", **{"--max_steps": 2, "--sample_every": 9})
    assert not trained_alike(tmp_path / "run", tmp_path / "without", "checkpoint-2")
    if space == "latent":
        short = encode(vae_run, tmp_path / "short") and tmp_path / "short"
        rejected = train_vdm((vae_run, text_run, short), tmp_path / "no", check=False, **options)
        assert rejected.returncode != 0 and "encode_latents.py --flow dis" in rejected.stderr


def test_known_frames_are_trained_and_then_used(vae_run, text_run, long_latents, tmp_path):
    options = {
        "--known": json.dumps({"none": 1, "both": 1}), "--window_lengths": "[3, 4]",
        "--windows": json.dumps({"start": 1, "anywhere": 1, "sink": 1}),
        "--groups": json.dumps({"full": 1, "causal": 1}),
        "--model": json.dumps(DENOISER | {"sink": 1}),
    }  # fmt: skip
    train_vdm((vae_run, text_run, long_latents), tmp_path, **options)
    pipe = VideoGenPipeline.from_pretrained(tmp_path / "pipeline")
    config = pipe.transformer.config
    assert config.tasks == ["text", "leading", "keyframes"] and config.trained_token_frames == 4
    assert config.trained_frame_rates == [4.0, 8.0]
    image = torch.rand(3, 16, 16)
    video = pipe("a red circle moves right", frames={0: image, 3: image}, output_type="pt").frames[0]
    torch.testing.assert_close(video[3], image)
    assert pipe.transformer.keyframe_embedding.weight.any()


def test_known_frames_without_their_latents_are_rejected(runs, tmp_path):
    done = train_vdm(runs, tmp_path, check=False, **{"--known": json.dumps({"keyframes": 1})})
    assert done.returncode != 0 and "--keyframes true" in done.stderr
    done = train_vdm(runs, tmp_path, check=False, **{"--windows": json.dumps({"sink": 1}), "--window_lengths": "[2]"})
    assert done.returncode != 0 and "does not fit clips of 2" in done.stderr


def test_the_text_encoder_is_trained_only_where_requested(runs, tmp_path):
    before = load_file(runs[1] / "text_encoder/model.safetensors")
    moved = []
    for train in ("false", "true"):
        train_vdm(runs, tmp_path / train, **{"--train_text_encoder": train, "--save_dtype": "float32"})
        after = load_file(tmp_path / train / "pipeline/text_encoder/model.safetensors")
        moved.append(max((after[name] - before[name]).abs().max().item() for name in before))
    assert moved[0] == 0 < moved[1]


def test_a_pipeline_to_start_from_must_agree_with_the_settings(runs, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    train_vdm(runs, first)
    rejected = train_vdm(runs, second, check=False, **{"--init": first / "pipeline", "--level_shift": 3})
    assert rejected.returncode != 0 and "level_shift=3.0, but the pipeline" in rejected.stderr
    train_vdm(runs, second, **{"--init": first / "pipeline", "--learning_rate": 0})
    before, after = (
        load_file(run / "pipeline/transformer/diffusion_pytorch_model.safetensors") for run in (first, second)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("network", [{}, UNET | {"--muon_kernels": "true"}], ids=["transformer", "unet"])
def test_a_run_with_muon_resumes_exactly(runs, network, tmp_path):
    options = {"--optimizer": "muon", "--lr_schedule": "constant"} | network
    for folder, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        train_vdm(runs, tmp_path / folder, **options | {"--max_steps": steps})
    parts, whole = (load_file(tmp_path / f"{folder}/checkpoint-4/model.safetensors") for folder in ("parts", "whole"))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
