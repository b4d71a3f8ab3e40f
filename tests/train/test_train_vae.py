"""Training of the VAE."""

import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vgen.data.video_io import read_video, write_video
from vgen.models.tiny_vae import load_tiny_vae
from vgen.models.vae import CausalVideoVAE

from .scripts import KILLED, ROOT, logged, train_vae, trained_alike


def test_a_trained_vae_loads_with_the_statistics_of_its_latents(vae_run):
    vae = CausalVideoVAE.from_pretrained(vae_run / "vae")
    assert all(std > 0 and std != 1 for std in vae.config.latents_std)
    assert 5 < vae.config.training_psnr < 40 and "shapes" in vae.config.training_data
    frames, _ = read_video(vae_run / "samples.mp4")
    assert frames.shape == (5, 32, 8 * 16, 3)
    assert (vae_run / "config.yaml").is_file()


def test_a_run_logs_its_losses_and_its_throughput(vae_run):
    for name in ("l1", "kl", "grad_norm", "lr"):
        losses = logged(vae_run, name)
        assert [step for step, _ in losses] == [1, 2, 3, 4] and all(value > 0 for _, value in losses[:-1])
    assert logged(vae_run, "lr")[-1][1] == 0  # for the step that does not come
    clips, tokens, share = (
        [value for _, value in logged(vae_run, f"throughput/{name}")]
        for name in ("clips_per_second", "tokens_per_second", "flops_utilization")
    )
    # four images of 2 x 2 latent pixels, then four clips of two times as many
    assert [b / a for a, b in zip(clips, tokens, strict=True)] == pytest.approx([4, 4, 8, 8])
    assert all(0 < value < 1 for value in share) and len(share) == 4


def test_the_result_has_the_averaged_weights(vae_run):
    result = load_file(vae_run / "vae/diffusion_pytorch_model.safetensors")
    averaged, last = (load_file(vae_run / "checkpoint-4" / f"{name}.safetensors") for name in ("ema", "model"))
    assert result.keys() == last.keys()
    assert all(torch.equal(result[name], averaged[name]) for name in averaged)
    assert not all(torch.equal(result[name], last[name]) for name in last)


def test_a_run_ends_when_the_score_no_longer_improves(tmp_path):
    options = {"--patience": 2, "--sample_every": 1, "--learning_rate": 0, "--max_steps": 9, "--num_score_clips": 8}
    done = train_vae(tmp_path, **options)
    assert [step for step, _ in logged(tmp_path, "psnr")] == [1, 2, 3, 4, 5]
    assert "the run ends: no better psnr in 2 evaluations" in done.stdout
    # the first two steps train on images only
    assert "with the weights of step 3 (psnr " in done.stdout.splitlines()[-1]


def test_an_interrupted_run_equals_an_uninterrupted_one(vae_run, tmp_path):
    # the same command with an earlier end would decay the learning rate earlier, so the end comes as a crash
    done = train_vae(tmp_path, check=False, **{"--sample_every": 3, "--num_score_clips": -1})
    assert done.returncode != 0 and [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    again = train_vae(tmp_path)
    assert "after 2 steps" in again.stdout
    weights, expected = (load_file(run / "vae/diffusion_pytorch_model.safetensors") for run in (tmp_path, vae_run))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_frozen_encoder_keeps_latents_and_their_statistics(vae_run, tmp_path):
    train_vae(tmp_path, **{"--init": vae_run / "vae", "--freeze_encoder": "true", "--image_steps": 0})
    weights, before = (load_file(run / "vae/diffusion_pytorch_model.safetensors") for run in (tmp_path, vae_run))
    kept = {name for name in before if torch.equal(weights[name], before[name])}
    assert {name for name in before if name.startswith(("encoder.", "quant_conv."))} == kept
    after, first = (CausalVideoVAE.from_pretrained(run / "vae") for run in (tmp_path, vae_run))
    assert after.config.latents_mean == first.config.latents_mean
    rejected = train_vae(tmp_path / "other", check=False, **{"--freeze_encoder": "true"})
    assert rejected.returncode != 0 and "--init" in rejected.stderr


def test_accumulation_gives_the_same_weights_as_one_batch(vae_run, tmp_path):
    train_vae(tmp_path, **{"--gradient_accumulation_steps": 2})
    weights, expected = (load_file(run / "checkpoint-2/ema.safetensors") for run in (tmp_path, vae_run))
    moved = max((weights[name] - expected[name]).abs().max().item() for name in expected)
    assert moved < 1e-4


def test_a_tiny_decoder_learns_to_decode_the_latents_of_a_vae(vae_run, tmp_path):
    options = {"--distill": vae_run / "vae", "--model": '{"decoder_channels": [16, 16, 16]}', "--max_steps": 30}
    options |= {"--learning_rate": 0.01, "--lr_schedule": "constant", "--sample_every": 15, "--save_every": 15}
    done = train_vae(tmp_path / "run", **options)
    assert f"next: vgen rollout PROMPT --decoder {tmp_path}/run/decoder" in done.stdout
    psnr = [value for _, value in logged(tmp_path / "run", "psnr")]
    assert len(psnr) == 2 and psnr[1] > psnr[0]
    tiny, vae = load_tiny_vae(tmp_path / "run/decoder"), CausalVideoVAE.from_pretrained(vae_run / "vae")
    clip = 2 * torch.rand(1, 3, 5, 16, 16) - 1
    latents = vae.encode(clip).latent_dist.mode()
    assert tiny.decode(vae.normalize(latents)).sample.shape == clip.shape
    train_vae(tmp_path / "half", **options | {"--max_steps": 15})
    train_vae(tmp_path / "half", **options)  # resumes
    assert trained_alike(tmp_path / "half", tmp_path / "run", "checkpoint-30")
    rejected = train_vae(tmp_path / "gan", check=False, **options | {"--gan_weight": 0.1})
    assert rejected.returncode != 0 and "distill trains a decoder by its error alone" in rejected.stderr


@pytest.mark.parametrize("learning_rate", [0.0, 1e-3])
def test_a_public_vae_is_trained_on(wan_folder, tmp_path, learning_rate):
    options = {"--image_steps": 0, "--max_steps": 3, "--sample_every": 9, "--learning_rate": learning_rate}
    train_vae(tmp_path, **{"--init": wan_folder} | options)
    weights = CausalVideoVAE.from_pretrained(tmp_path / "vae").state_dict()
    before = load_file(wan_folder / "vae/diffusion_pytorch_model.safetensors")
    assert set(weights) == set(before)
    assert all(torch.equal(weights[name], before[name]) for name in before) == (learning_rate == 0)


@pytest.mark.parametrize("kind", ["folder", pytest.param("dataset", marks=pytest.mark.slow)])
def test_a_killed_run_on_videos_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, kind):
    videos = tmp_path / "videos"
    videos.mkdir()
    for index in range(4):
        frames = np.random.default_rng(index).integers(0, 256, (12, 24, 32, 3), dtype=np.uint8)
        write_video(frames, videos / f"{index}.mp4", frame_rate=8.0)
    data = str(videos)
    if kind == "dataset":
        rows = {"video": [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(videos.iterdir())]}
        features = datasets.Features({"video": datasets.Video(decode=False)})
        (tmp_path / "table").mkdir()
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "table/train.parquet")
        data = f"hf:{tmp_path}/table"
    (tmp_path / "killed.py").write_text(KILLED)
    options = {"--data": data, "--frame_rates": "[8.0, 4.0]", "--image_share": 0.3, "--augment": '{"flip": 0.5}'}
    train_vae(tmp_path / "whole", fresh=True, **options)  # with as many threads as the others
    script = (tmp_path / "killed.py", ROOT / "train/train_vae.py")
    killed = train_vae(tmp_path / "again", check=False, fresh=True, script=script, **options)
    assert killed.returncode != 0 and not (tmp_path / "again/vae").exists()
    assert "after 2 steps" in train_vae(tmp_path / "again", fresh=True, **options).stdout
    weights, expected = (
        load_file(tmp_path / run / "vae/diffusion_pytorch_model.safetensors") for run in ("again", "whole")
    )
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_run_that_resumes_warns_about_an_added_video(tmp_path, caplog):
    frames = np.random.default_rng(0).integers(0, 256, (12, 24, 32, 3), dtype=np.uint8)
    (tmp_path / "videos").mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_video(frames, tmp_path / "videos" / name, frame_rate=8.0)
    options = {"--data": tmp_path / "videos", "--frame_rates": "[8.0, 4.0]", "--image_steps": 0, "--sample_every": 9}
    train_vae(tmp_path / "run", **options)
    train_vae(tmp_path / "run", **options)
    assert "is not resumed exactly" not in caplog.text
    write_video(frames, tmp_path / "videos" / "c.mp4", frame_rate=8.0)
    train_vae(tmp_path / "run", **options)
    assert "is not resumed exactly: data_sha256" in caplog.text


def test_a_vae_trains_against_a_discriminator(tmp_path):
    options = {"--gan_weight": 0.1, "--gan_start": 3, "--max_steps": 5, "--sample_every": 9}
    train_vae(tmp_path / "once", **options)
    events = EventAccumulator(str(tmp_path / "once/logs")).Reload().Scalars("discriminator")
    assert [event.step for event in events] == [4, 5]  # after two steps of single images and one without it
    assert (tmp_path / "once/vae/config.json").is_file()
    train_vae(tmp_path / "again", **options)
    assert trained_alike(tmp_path / "again", tmp_path / "once", "checkpoint-5")
    train_vae(tmp_path / "more", **options | {"--gan_weight": 0.2})
    actual, expected = (load_file(tmp_path / name / "checkpoint-5/model.safetensors") for name in ("more", "once"))
    judged = {name for name in actual if name.startswith("discriminator.")}
    assert judged and any(not torch.equal(actual[name], expected[name]) for name in actual.keys() - judged)


def test_a_vae_trains_with_lpips(vae_run, tmp_path, monkeypatch):
    class Difference(torch.nn.Module):
        """In the place of VGG's, which is not here."""

        def __init__(self, net, verbose):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, generated, true):
            return self.scale * (generated - true).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", None)
    rejected = train_vae(tmp_path / "refused", check=False, **{"--lpips_weight": 2.0})
    assert rejected.returncode and "pip install vgen[lpips]" in rejected.stderr
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Difference))
    train_vae(tmp_path / "run", **{"--lpips_weight": 2.0})
    events = EventAccumulator(str(tmp_path / "run/logs")).Reload()
    actual, expected = ([event.value for event in events.Scalars(name)] for name in ("lpips", "l1"))
    assert actual == pytest.approx(expected, rel=1e-5) and len(actual) == 4
    assert not trained_alike(tmp_path / "run", vae_run)


def test_a_vae_trains_with_a_temporal_loss(vae_run, tmp_path):
    train_vae(tmp_path, **{"--warping_weight": 0.5, "--matched_weight": 0.5, "--sample_every": 9})
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    values = [event.value for event in events.Scalars("temporal")]
    assert values[:2] == [0, 0] and all(value > 0 for value in values[2:])  # two steps of single images come first
    assert not trained_alike(tmp_path, vae_run)


@pytest.mark.parametrize("strategy", ["FSDP", "DEEPSPEED"])
def test_a_strategy_that_is_not_active_is_rejected(tmp_path, monkeypatch, strategy):
    monkeypatch.setenv(f"ACCELERATE_USE_{strategy}", "true")
    rejected = train_vae(tmp_path, check=False)
    assert rejected.returncode != 0 and not list(tmp_path.glob("checkpoint-*"))
    assert f"{strategy} was requested" in rejected.stderr or "deepspeed" in rejected.stderr.lower()


def test_a_batch_that_does_not_divide_is_rejected(tmp_path):
    done = train_vae(tmp_path, check=False, **{"--gradient_accumulation_steps": 3})
    assert done.returncode != 0 and "must be a multiple of 3" in done.stderr and "got 4 (nearest: 3)" in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--batch_size", 0, "batch_size must be at least 1, got 0"),
        ("--sample_every", 0, "sample_every must be at least 1, got 0"),
        ("--max_stepz", 3, "max_stepz"),
        ("--ema_decay", 1, "ema_decay must be in [0, 1), got 1"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, option, value, message):
    done = train_vae(tmp_path / "run", check=False, **{option: value})
    assert done.returncode != 0 and message in done.stderr


def test_a_run_goes_on_without_logs_and_samples(tmp_path, caplog):
    (tmp_path / "logs").write_text("in the way")
    (tmp_path / "samples.mp4").mkdir()
    train_vae(tmp_path, **{"--max_steps": 2, "--sample_every": 1})
    assert (tmp_path / "vae/config.json").is_file() and (tmp_path / "checkpoint-2").is_dir()
    for name, place in (("logs", tmp_path / "logs"), ("samples", tmp_path / "samples.mp4")):
        assert any(f"training goes on without {name}" in text and str(place) in text for text in caplog.messages)
