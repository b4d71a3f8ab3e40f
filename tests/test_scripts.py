"""The training scripts, run as a user runs them, at tiny size."""

import gzip
import inspect
import io
import itertools
import json
import os
import random
import re
import runpy
import shutil
import struct
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import webdataset
import yaml
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from diffusers.configuration_utils import FrozenDict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from vgen.data.captions import parse_caption
from vgen.data.clips import draw_frame_rates
from vgen.data.latents import LatentSet
from vgen.data.shapes import ShapesWorld, render
from vgen.data.video_io import read_video, write_video
from vgen.models.convlstm import ConvLSTMPredictor
from vgen.models.prompts import embed, load_text_encoder, tokenize
from vgen.models.vae import CausalVideoVAE
from vgen.pipeline import VideoGenPipeline
from vgen.sampling.known_frames import encode_known_frames
from vgen.temporal.flow import measure_motion
from vgen.training.run import RunConfig

ROOT = Path(__file__).parents[1]
VAE = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True, True],
    "patch_size": 2, "in_channels": 12, "out_channels": 12,
}  # fmt: skip
DENOISER = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "freq_dim": 16,
    "ffn_dim": 32, "num_layers": 1, "group_modes": ["full", "causal"], "keyframe_slots": 4,
}  # fmt: skip
UNET = {
    "--denoiser": "unet", "--groups": '{"full": 1, "causal": 1}', "--model": json.dumps({
        "in_channels": 4, "out_channels": 4, "block_out_channels": [8, 16], "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "norm_num_groups": 4, "attention_head_dim": 2,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "temporal_head_dim": 8,
        "group_modes": ["full", "causal"], "sink": 1,
    }),
}  # fmt: skip
TINY = {"--mixed_precision": "no", "--compile": "false", "--warmup_steps": 1, "--log_every": 1, "--save_every": 2}


ON_CPUS = ("--cpu", "--num_machines=1", "--mixed_precision=no")


def launch(script, *arguments, check=True, processes=1, fresh=False, accelerate=ON_CPUS, **options):
    """Runs a script as `accelerate launch` would; one that need not be fresh here, since starting takes seconds."""
    words = [str(word) for pair in options.items() for word in pair]
    command = [str(ROOT / script), *map(str, arguments), *words]
    if processes > 1 or fresh or accelerate is not ON_CPUS:
        done = launch_processes(command, processes, accelerate)
    else:
        done = launch_here(command)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def launch_processes(command, processes, accelerate):
    on_cpus = accelerate is ON_CPUS
    if on_cpus and processes > 1:  # --cpu would start one
        accelerate = ["--config_file=train/accelerate/ddp.yaml", "--mixed_precision=no"]
    launcher = ["-m", "accelerate.commands.launch", *accelerate]
    command = [sys.executable, *launcher, "--num_processes", str(processes), "--main_process_port=0", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true"} if on_cpus else {}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False, timeout=600)


def launch_here(command):
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, "argv", command)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.chdir(ROOT)
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        except Exception:
            traceback.print_exc()
            code = 1
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
    return SimpleNamespace(returncode=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())


def train_vae(output_dir, check=True, processes=1, fresh=False, script=("train/train_vae.py",), **options):
    settings = {
        "--output_dir": output_dir, "--model": json.dumps(VAE), "--height": 16, "--width": 16, "--num_frames": 5,
        "--image_steps": 2, "--image_batch_size": 4, "--batch_size": 4, "--max_steps": 4, "--sample_every": 4,
        "--num_score_clips": 8, "--num_calibration_clips": 8,
    }  # fmt: skip
    return launch(*script, check=check, processes=processes, fresh=fresh, **settings | TINY | options)


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    train_vae(folder)
    return folder


def encode(vae_run, output_dir, check=True, processes=1, **options):
    settings = {
        "--vae": vae_run / "vae", "--output_dir": output_dir, "--height": 16, "--width": 16, "--num_frames": 5,
        "--batch_size": 4, "--shard_size": 8, "--num_clips": 12,
    }  # fmt: skip
    settings = {name: value for name, value in (settings | options).items() if value is not None}
    return launch("pipelines/encode_latents.py", check=check, processes=processes, **settings)


@pytest.fixture(scope="module")
def latents_dir(vae_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    encode(vae_run, folder)
    return folder


def train_text_encoder(output_dir, **options):
    settings = {
        "--output_dir": output_dir, "--dim": 32, "--num_layers": 1, "--batch_size": 4, "--max_steps": 4,
        "--sample_every": 4, "--num_score_captions": 8,
    }  # fmt: skip
    return launch("train/train_text_encoder.py", **settings | TINY | options)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    train_text_encoder(folder)
    return folder


def train_vdm(runs, output_dir, check=True, processes=1, fresh=False, script=("train/train_vdm.py",), **options):
    vae_run, text_run, latents_dir = runs
    defaults = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 1, "guidance_scale": 2.0}
    settings = {
        "--output_dir": output_dir, "--vae": vae_run / "vae", "--text_encoder": text_run,
        "--latents_dir": latents_dir, "--model": json.dumps(DENOISER), "--batch_size": 4, "--max_steps": 4,
        "--sample_every": 4, "--num_score_prompts": 2, "--defaults": json.dumps(defaults),
    }  # fmt: skip
    return launch(*script, check=check, processes=processes, fresh=fresh, **settings | TINY | options)


@pytest.fixture(scope="module")
def runs(vae_run, text_run, latents_dir):
    return vae_run, text_run, latents_dir


def logged(folder, name):
    """What a run told of something: `(step, value)`."""
    return [(event.step, event.value) for event in EventAccumulator(str(folder / "logs")).Reload().Scalars(name)]


def trained_alike(one, other, checkpoint="checkpoint-4"):
    """Whether two runs have the same weights, to the bit."""
    weights, others = (load_file(run / checkpoint / "model.safetensors") for run in (one, other))
    assert weights.keys() == others.keys()
    return all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_trained_vae_loads_with_the_statistics_of_its_latents(vae_run):
    vae = CausalVideoVAE.from_pretrained(vae_run / "vae")
    assert all(std > 0 and std != 1 for std in vae.config.latents_std)
    frames, _ = read_video(vae_run / "samples.mp4")
    assert frames.shape == (5, 32, 8 * 16, 3)
    assert (vae_run / "config.yaml").is_file()


def test_a_run_tells_its_losses_and_how_fast_it_trains(vae_run):
    for name in ("l1", "kl", "grad_norm", "lr"):
        told = logged(vae_run, name)
        assert [step for step, _ in told] == [1, 2, 3, 4] and all(value > 0 for _, value in told[:-1])
    assert logged(vae_run, "lr")[-1][1] == 0  # for the step that does not come
    clips, tokens, share = (
        [value for _, value in logged(vae_run, f"throughput/{name}")]
        for name in ("clips_per_second", "tokens_per_second", "flops_utilisation")
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


def test_images_come_first_and_then_among_the_clips():
    script = runpy.run_path(str(ROOT / "train/train_vae.py"))
    config = script["VAEConfig"](output_dir="any", image_steps=10, image_share=0.3, image_batch_size=8, batch_size=2)
    batches = [script["batch_of"](config, step) for step in range(1010)]
    assert all(frames == 1 for _, frames in batches[:10])
    assert 250 < sum(frames == 1 for _, frames in batches[10:]) < 350
    for length, size in ((1, 8), (config.num_frames, 2)):
        numbers = [number for indices, frames in batches if frames == length for number in indices]
        assert len(numbers) == len(set(numbers)) == size * sum(frames == length for _, frames in batches)


def test_every_second_step_shows_clips_that_begin_late():
    script = runpy.run_path(str(ROOT / "train/train_vae.py"))
    never, late = (script["VAEConfig"](output_dir="any", latest_moment=latest) for latest in (0.0, 34.0))
    assert all(script["moment_of"](never, step, False) == 0 for step in range(200))
    moments = [script["moment_of"](late, step, False) for step in range(200)]
    assert set(moments[::2]) == {0.0}
    assert len(set(moments[1::2])) == 100 and 0 < min(moments[1::2]) < 4 and 30 < max(moments) < 34
    for wrong, data in ((-1.0, None), (4.0, "videos")):
        with pytest.raises(ValueError, match="latest_moment"):
            script["VAEConfig"](output_dir="any", latest_moment=wrong, data=data).check()


def test_each_clip_of_a_vae_has_one_of_the_frame_rates(tmp_path):
    script = runpy.run_path(str(ROOT / "train/train_vae.py"))
    settings = {"output_dir": "any", "height": 16, "width": 16, "num_frames": 5, "image_share": 0.1}
    config = script["VAEConfig"](**settings, frame_rates=[8.0, 2.0])
    numbers, cpu, size = range(7, 39), torch.device("cpu"), {"num_frames": 5, "height": 16, "width": 16}
    rates = draw_frame_rates(config.frame_rates, config.seed, numbers)
    assert 8 < rates.count(2.0) < 24 and rates[5:9] == draw_frame_rates(config.frame_rates, 0, range(12, 16))
    source = script["World"](config, "train", config.frame_rates)
    scenes = [source.world.scene(index) for index in numbers]
    clips, _ = source.draw(numbers, cpu, 5, 3.0)
    assert torch.equal(clips, render(scenes, **size, frame_rate=torch.tensor(rates), start=3.0))
    usual, _ = script["World"](config, "train").draw(numbers, cpu, 5)  # as scores are taken
    assert torch.equal(usual, render(scenes, **size))

    frames = np.repeat(np.arange(0, 240, 8, dtype=np.uint8), 16 * 16 * 3).reshape(30, 16, 16, 3)
    write_video(frames, tmp_path / "video.mp4", frame_rate=8.0)
    videos = script["Videos"](config, str(tmp_path))
    clips, _ = videos.draw(numbers, cpu, 5)
    steps = clips.mean(dim=(1, 3, 4)).diff(dim=1).mean(dim=1) * 127.5  # the file's are 8
    assert [round(step / 8) for step in steps.tolist()] == [8 / rate for rate in rates]
    assert videos.draw(numbers, cpu, 1)[0].shape == (32, 3, 1, 16, 16)
    with pytest.raises(ValueError, match="frame_rates"):
        script["VAEConfig"](**settings, frame_rates=[8.0, 0.0]).check()


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
    refused = train_vae(tmp_path / "other", check=False, **{"--freeze_encoder": "true"})
    assert refused.returncode != 0 and "--init" in refused.stderr


def test_accumulation_gives_the_same_weights_as_one_batch(vae_run, tmp_path):
    train_vae(tmp_path, **{"--gradient_accumulation_steps": 2})
    weights, expected = (load_file(run / "checkpoint-2/ema.safetensors") for run in (tmp_path, vae_run))
    moved = max((weights[name] - expected[name]).abs().max().item() for name in expected)
    assert moved < 1e-4


def test_two_processes_give_the_same_weights_as_one(vae_run, text_run, latents_dir, tmp_path):
    train_vae(tmp_path / "vae", processes=2)
    train_vdm((vae_run, text_run, latents_dir), tmp_path / "two", processes=2)
    train_vdm((vae_run, text_run, latents_dir), tmp_path / "one")
    for run, expected in (("vae", vae_run), ("two", tmp_path / "one")):
        assert (tmp_path / run / "checkpoint-4/random_states_1.pkl").is_file()
        weights, wanted = (load_file(path / "checkpoint-2/ema.safetensors") for path in (tmp_path / run, expected))
        assert max((weights[name] - wanted[name]).abs().max().item() for name in wanted) < 1e-4
        logged, alone = (EventAccumulator(str(path / "logs")).Reload() for path in (tmp_path / run, expected))
        for name in ("l1", "kl") if run == "vae" else ("loss",):
            values = [[event.value for event in events.Scalars(name)[:2]] for events in (logged, alone)]
            assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_processes_that_do_not_know_of_one_another_are_refused(runs, tmp_path):
    one_of_two = ["--cpu", "--num_machines=1", "--mixed_precision=no"]
    done = train_vdm(runs, tmp_path, processes=2, check=False, accelerate=one_of_two)
    assert done.returncode != 0 and "starts one process, whatever --num_processes says" in done.stderr


@pytest.mark.gpu
def test_sharding_by_accelerate_trains_and_gives_a_pipeline(runs, tmp_path):
    options = {"--optimizer": "adamw", "--ema_decay": 0, "--save_every": 2}
    launcher = ["--config_file=train/accelerate/fsdp2.yaml", "--mixed_precision=no"]
    count = torch.cuda.device_count()
    train_vdm(runs, tmp_path / "cpu", **options)
    train_vdm(runs, tmp_path / "fsdp", processes=count, accelerate=launcher, **options | {"--max_steps": 2})
    train_vdm(runs, tmp_path / "fsdp", processes=count, accelerate=launcher, **options)  # resumes
    file = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    one, sharded = (load_file(tmp_path / name / file) for name in ("cpu", "fsdp"))
    # single weights whose gradient is almost zero may go either way in AdamW's first steps, by 1e-3 each
    assert max((one[key] - sharded[key]).abs().mean().item() for key in one) < 1e-4


DESCENT = """
import runpy, sys
import torch
from torch.optim.lr_scheduler import LambdaLR
from vgen.training import run

def descent(config, network):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    return [optimizer], [LambdaLR(optimizer, lambda step: 1.0)]

def update(self, whole=run.Run.update):
    if self.step == 0 and self.accelerator.is_main_process:
        network = self.accelerator.unwrap_model(self.network)
        gradients = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
        torch.save(gradients, self.config.output_dir / "gradients.pt")
    whole(self)

run.make_optimizers, run.Run.update = descent, update
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("network", ["vae", "vdm"])
def test_two_processes_have_the_gradients_of_one_that_accumulates(runs, tmp_path, network):
    (tmp_path / "descent.py").write_text(DESCENT)
    script = (tmp_path / "descent.py", ROOT / f"train/train_{network}.py")
    options = {"--max_steps": 5, "--ema_decay": 0, "--max_grad_norm": 1e6}
    found = []
    for name, processes in (("one", 1), ("two", 2)):
        options["--gradient_accumulation_steps"] = 3 - processes
        how = {"processes": processes, "fresh": True, "script": script}
        if network == "vae":  # on clips, with a loss between their frames
            train_vae(tmp_path / name, **how, **options | {"--image_steps": 0, "--difference_weight": 0.5})
        else:
            train_vdm(runs, tmp_path / name, **how, **options)
        weights = load_file(tmp_path / name / "checkpoint-5/model.safetensors")
        found.append((torch.load(tmp_path / name / "gradients.pt"), weights))
    (alone, weights_alone), (together, weights_together) = found
    largest = max(gradient.abs().max() for gradient in alone.values())
    assert largest > 1e-3 and alone.keys() == together.keys()
    assert all((alone[name] - together[name]).abs().max() < 1e-5 * largest for name in alone)
    for name, weight in weights_alone.items():
        torch.testing.assert_close(weights_together[name], weight, rtol=1e-5, atol=1e-5)


def test_latents_are_normalised_and_the_same_command_goes_on(vae_run, latents_dir):
    paths = sorted(latents_dir.glob("*.safetensors"))
    assert [path.name for path in paths] == ["00000000-00000008.safetensors", "00000008-00000012.safetensors"]
    latents = torch.cat([load_file(path)["latents"] for path in paths]).float()
    assert latents.shape == (12, 4, 2, 2, 2)
    before = paths[0].stat().st_mtime_ns
    paths[1].unlink()
    encode(vae_run, latents_dir)
    assert paths[0].stat().st_mtime_ns == before
    again = torch.cat([load_file(path)["latents"] for path in paths]).float()
    assert torch.equal(latents, again)
    refused = encode(vae_run, latents_dir, check=False, **{"--seed": 1})
    assert refused.returncode != 0 and "another seed" in refused.stderr


def test_a_trained_pipeline_generates(runs, tmp_path):
    train_vdm(runs, tmp_path)
    pipe = VideoGenPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe("a red circle moves right").frames.shape == (1, 5, 16, 16, 3)
    assert pipe.config.num_inference_steps == 1
    weights = load_file(tmp_path / "pipeline/transformer/diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}


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
    assert pipe.transformer is None and pipe("a red circle moves right").frames.shape == (1, 5, 16, 16, 3)
    moved = [name for name, weight in pipe.unet.named_parameters() if name.endswith("conv.weight") and weight.any()]
    assert len([name for name in moved if "temporal" in name]) == 2 + 2 + 4  # they start as zeros
    refused = train_vdm(runs, tmp_path / "other", check=False, **{"--denoiser": "cnn"})
    assert refused.returncode != 0 and "one of transformer, unet" in refused.stderr


def test_an_inflated_image_pipeline_trains_as_a_video_model(vae_run, text_run, stable_diffusion, tmp_path):
    start = VideoGenPipeline.from_stable_diffusion(stable_diffusion, num_frames=4, group_modes=["full", "causal"])
    start.save_pretrained(tmp_path / "start")
    options = {"--height": 32, "--width": 32, "--num_frames": 4}
    encode(tmp_path / "start", tmp_path / "latents", **options)
    options = {
        "--init": tmp_path / "start", "--prediction": "epsilon", "--snr_gamma": 5, "--train_only": "temporal",
        "--max_sequence_length": 16, "--save_dtype": "float32", "--ema_decay": 0,
    }  # fmt: skip
    runs = (tmp_path / "start", text_run, tmp_path / "latents")  # the text encoder is that of --init
    train_vdm(runs, tmp_path / "run", **options)
    pipe = VideoGenPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert isinstance(pipe.scheduler, DDIMScheduler) and pipe.scheduler.config.prediction_type == "epsilon"
    before, after = start.unet.state_dict(), pipe.unet.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("temporal" in name for name in moved)
    assert pipe("a dog", num_inference_steps=2).frames.shape == (1, 4, 32, 32, 3)
    refused = train_vdm(runs, tmp_path / "other", check=False, **options | {"--prediction": "flow"})
    assert refused.returncode != 0 and "prediction=flow, but the pipeline" in refused.stderr
    refused = train_vdm(runs, tmp_path / "other", check=False, **options | {"--zero_terminal_snr": "true"})
    assert refused.returncode != 0 and "zero_terminal_snr=True, but the pipeline" in refused.stderr

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
    refused = launch("train/train_vdm.py", check=False, **TINY | options | {"--train_text_encoder": "true"})
    assert refused.returncode != 0 and "train_only=lora" in refused.stderr


def test_all_of_a_public_pipeline_is_fine_tuned(wan_folder, tmp_path):
    encode(tmp_path, tmp_path / "latents", **{"--vae": wan_folder, "--num_captions": 1})
    options = {
        "--init": wan_folder, "--latents_dir": tmp_path / "latents", "--output_dir": tmp_path / "run",
        "--level_shift": 3.0, "--max_sequence_length": 512, "--frame_rate": 16.0, "--batch_size": 4, "--max_steps": 3,
        "--sample_every": 9, "--optimizer": "adamw",
    }  # fmt: skip
    launch("train/train_vdm.py", **TINY | options)
    before, after = (VideoGenPipeline.from_pretrained(path) for path in (wan_folder, tmp_path / "run/pipeline"))
    old, new = before.transformer.state_dict(), after.transformer.state_dict()
    moved = {name.split(".")[0] for name in old if (old[name].float() - new[name].float()).abs().max() > 1e-4}
    assert {"patch_embedding", "blocks", "proj_out"} <= moved


@pytest.mark.parametrize("attention", ["joint", "divided"])
def test_layers_for_time_alone_are_trained_where_there_are_some(runs, tmp_path, attention):
    options = {"--train_only": "temporal", "--model": json.dumps(DENOISER | {"attention": attention})}
    done = train_vdm(runs, tmp_path / "temporal", check=False, **options)
    if attention == "joint":
        assert done.returncode != 0 and "attention=divided have: train all of it, or train_only=lora" in done.stderr
        return
    assert done.returncode == 0
    train_vdm(runs, tmp_path / "none", **options | {"--learning_rate": 0.0})
    weights, before = (load_file(tmp_path / run / "checkpoint-4/model.safetensors") for run in ("temporal", "none"))
    moved = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert moved and all("attn_time" in name for name in moved)


@pytest.mark.parametrize("learning_rate", [0.0, 1e-3])
def test_a_public_vae_is_trained_on(wan_folder, tmp_path, learning_rate):
    options = {"--image_steps": 0, "--max_steps": 3, "--sample_every": 9, "--learning_rate": learning_rate}
    train_vae(tmp_path, **{"--init": wan_folder} | options)
    weights = CausalVideoVAE.from_pretrained(tmp_path / "vae").state_dict()
    before = load_file(wan_folder / "vae/diffusion_pytorch_model.safetensors")
    assert set(weights) == set(before)
    assert all(torch.equal(weights[name], before[name]) for name in before) == (learning_rate == 0)


def test_a_folder_of_videos_is_encoded_and_trained_on(vae_run, text_run, tmp_path, caplog):
    videos = tmp_path / "videos"
    videos.mkdir()
    for index in range(3):
        frames = np.random.default_rng(index).integers(0, 256, (12, 24, 32, 3), dtype=np.uint8)
        write_video(frames, videos / f"{index}.mp4", frame_rate=8.0)
        (videos / f"{index}.txt").write_text(f"a red circle\nnumber {index}")
    (videos / "broken.mp4").write_bytes((videos / "0.mp4").read_bytes()[:900])
    options = {"--data": videos, "--frame_rates": "[8.0, 4.0]"}
    train_vae(tmp_path / "vae", **options, **{"--init": vae_run / "vae"})
    assert read_video(tmp_path / "vae/samples.mp4")[0].shape == (5, 32, 8 * 16, 3)
    latents = tmp_path / "latents"
    encode(tmp_path / "vae", latents, **options, **{"--num_clips": None})
    assert sum("left out, " in message and "broken.mp4" in message for message in caplog.messages) == 1
    done = encode(tmp_path / "vae", tmp_path / "fresh", processes=2, **options, **{"--num_clips": None})
    assert "left out, 1 by now: " in done.stderr and "broken.mp4" in done.stderr
    assert json.loads((tmp_path / "fresh/settings.json").read_text()) == json.loads(
        (latents / "settings.json").read_text()
    )
    data, shared = LatentSet(tmp_path / "latents"), LatentSet(tmp_path / "fresh")
    torch.testing.assert_close(shared.latents, data.latents, atol=1e-2, rtol=0)  # half precision
    assert shared.captions == data.captions and torch.equal(shared.frame_rates, data.frame_rates)
    assert data.latents.shape == (9, 4, 2, 2, 2)  # two of 5 frames at 8 frames per second, one at 4, of each
    assert sorted(data.frame_rates.tolist()) == [4.0] * 3 + [8.0] * 6
    assert sorted(data.captions)[0] == ["a red circle", "number 0"]
    options = {"--sample_prompts": '["a red circle", "number 2"]', "--sample_every": 2, "--max_steps": 2}
    train_vdm((tmp_path / "vae", text_run, tmp_path / "latents"), tmp_path / "run", **options)
    assert read_video(tmp_path / "run/samples.mp4")[0].shape == (5, 16, 2 * 16, 3)


KILLED = """
import os, runpy, signal, sys
from vgen.training import run

def update(self, whole=run.Run.update):
    if self.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    whole(self)

run.Run.update = update
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("kind", ["folder", "dataset"])
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
    told = re.search(
        r"step 1 is not finite; it was that of 2 token frames of clips ([\d, ]+) in (\S+)", stopped.stderr
    )
    assert told and Path(told[2].rstrip(".")) == tmp_path / "latents"
    numbers = [int(number) for number in told[1].split(", ")]
    assert len(set(numbers)) == 4 and max(numbers) < count
    stopped = train_vae(tmp_path / "vae", check=False, **{"--kl_weight": 1e39})
    assert stopped.returncode != 0 and not (tmp_path / "vae/vae").exists()
    assert "step 1 is not finite; it was that of scenes 0 to 3 of ShapesWorld(seed=0)" in stopped.stderr


def test_a_killed_run_on_latents_ends_with_the_weights_of_an_uninterrupted_one(runs, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    train_vdm(runs, tmp_path / "whole", fresh=True)
    script = (tmp_path / "killed.py", ROOT / "train/train_vdm.py")
    killed = train_vdm(runs, tmp_path / "again", check=False, fresh=True, script=script)
    assert killed.returncode != 0 and not (tmp_path / "again/pipeline").exists()
    again = train_vdm(runs, tmp_path / "again", fresh=True)
    assert "after 2 steps" in again.stdout and "does not go on exactly" not in again.stderr
    assert trained_alike(tmp_path / "again", tmp_path / "whole")
    assert logged(tmp_path / "again", "loss") == logged(tmp_path / "whole", "loss")
    assert [step for step, _ in logged(tmp_path / "again", "loss")] == [1, 2, 3, 4]


def test_a_video_more_is_told_to_a_run_that_goes_on(tmp_path, caplog):
    frames = np.random.default_rng(0).integers(0, 256, (12, 24, 32, 3), dtype=np.uint8)
    (tmp_path / "videos").mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_video(frames, tmp_path / "videos" / name, frame_rate=8.0)
    options = {"--data": tmp_path / "videos", "--frame_rates": "[8.0, 4.0]", "--image_steps": 0, "--sample_every": 9}
    train_vae(tmp_path / "run", **options)
    train_vae(tmp_path / "run", **options)
    assert "does not go on exactly" not in caplog.text
    write_video(frames, tmp_path / "videos" / "c.mp4", frame_rate=8.0)
    train_vae(tmp_path / "run", **options)
    assert "does not go on exactly: data_sha256" in caplog.text


def test_latents_of_another_vae_are_refused(vae_run, text_run, latents_dir, tmp_path):
    train_vae(tmp_path / "other", **{"--seed": 1})
    train_vae(tmp_path / "decoder", **{"--init": vae_run / "vae", "--freeze_encoder": "true", "--image_steps": 0})
    once = {"--max_steps": 1, "--save_every": 1, "--sample_every": 9}
    refused = train_vdm((tmp_path / "other", text_run, latents_dir), tmp_path / "no", check=False, **once)
    assert refused.returncode != 0 and "were encoded by another VAE" in refused.stderr
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
    assert data.has_embeddings and not plain.has_embeddings and torch.equal(data.latents, plain.latents)
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
    refused = train_vdm(folders, tmp_path / "no", check=False)
    assert refused.returncode != 0 and "embedded with another text_encoder_sha256" in refused.stderr


def test_a_stream_is_encoded_shard_by_shard_and_goes_on(vae_run, tmp_path, caplog):
    for index in range(5):
        frames = np.full((12, 16, 16, 3), 40 * index, dtype=np.uint8)
        write_video(frames, tmp_path / f"{index}.mp4", frame_rate=8.0)
    with webdataset.TarWriter(str(tmp_path / "all.tar")) as tar:
        for index in range(5):
            content = (tmp_path / f"{index}.mp4").read_bytes() if index != 2 else b"no video"
            tar.write({"__key__": str(index), "mp4": content, "txt": f"number {index}"})
    options = {"--data": f"shards:{tmp_path}/all.tar", "--shard_size": 3, "--num_clips": 100}
    latents = tmp_path / "latents"
    encode(vae_run, latents, **options)
    assert [message.split(": ")[1] for message in caplog.messages if "left out" in message] == ["2.mp4"]
    paths = sorted(latents.glob("*.safetensors"))
    # two clips of 5 frames a video; a shard ends with a whole video
    assert [path.stem.split("-", 4)[4] for path in paths] == ["00000000-00000002", "00000002-00000005"]
    captions = [["number 0"]] * 2 + [["number 1"]] * 2 + [["number 3"]] * 2 + [["number 4"]] * 2
    whole = LatentSet(latents)
    assert whole.captions == captions
    paths[1].unlink()
    encode(vae_run, latents, **options)
    assert sorted(latents.glob("*.safetensors")) == paths and torch.equal(LatentSet(latents).latents, whole.latents)
    encode(vae_run, tmp_path / "few", **options | {"--num_clips": 3})
    assert LatentSet(tmp_path / "few").captions == captions[:3]
    train_vae(tmp_path / "vae", **{"--data": options["--data"], "--image_steps": 0, "--max_steps": 2})


def test_videos_go_to_buckets_of_their_shape_and_are_augmented(vae_run, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, (length, height, width) in {"wide": (12, 16, 32), "tall": (6, 40, 20), "long": (20, 16, 32)}.items():
        frames = np.random.default_rng(0).integers(0, 256, (length, height, width, 3), dtype=np.uint8)
        write_video(frames, videos / f"{name}.mp4", frame_rate=8.0)
        (videos / f"{name}.txt").write_text(name)
    options = {"--data": videos, "--buckets": '["5x16x32", "17x16x32", "5x32x16", "5x16x16"]'}
    done = encode(vae_run, tmp_path / "latents", **options)
    assert "5x16x16: no video is nearest to it" in done.stdout
    found = {path.name: LatentSet(path) for path in (tmp_path / "latents").iterdir()}
    shapes = {name: (data.captions, tuple(data.latents.shape[1:])) for name, data in found.items()}
    assert shapes == {
        "5x16x32": ([["wide"]] * 2, (4, 2, 2, 4)),
        "17x16x32": ([["long"]], (4, 5, 2, 4)),
        "5x32x16": ([["tall"]], (4, 2, 4, 2)),
    }
    augmented = {"--augment": '{"flip": 0.5, "brightness": 0.3}', "--repeats": 3, "--num_clips": 100}
    encode(vae_run, tmp_path / "more", **{"--data": videos, **augmented})
    more = LatentSet(tmp_path / "more")
    assert len(more) == 3 * (2 + 1 + 4)
    of_tall = [more.latents[index] for index, captions in enumerate(more.captions) if captions == ["tall"]]
    assert len(of_tall) == 3 and not torch.equal(of_tall[0], of_tall[1])


def test_padded_frames_carry_no_loss_and_are_seen_by_none(vae_run, text_run, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for index, length in enumerate((7, 17)):
        frames = np.random.default_rng(index).integers(0, 256, (length, 16, 16, 3), dtype=np.uint8)
        write_video(frames, videos / f"{length}.mp4", frame_rate=8.0)
        (videos / f"{length}.txt").write_text(str(length))
    options = {"--data": videos, "--num_frames": 17, "--short": "pad"}
    encode(vae_run, tmp_path / "latents", **options)
    data = LatentSet(tmp_path / "latents")
    short, whole = (data[data.captions.index([text])] for text in ("7", "17"))
    assert short.real.tolist() == [True, True, False, False, False] and whole.real.all()

    draw_row, config = mixture_of(text_run, tmp_path / "latents", known={"leading": 1.0})
    network = FrozenDict(patch_size=(1, 2, 2), sink=1, chunk_size=2, keyframe_slots=4, conv_history=0)
    for seed in range(10):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        row = draw_row(short, network, config, "causal", 5, rng, generator)
        assert torch.equal(row["real"], short.real)
        assert row["groups"].tolist() == [0, 1, 5, 5, 5]
    train_vdm((vae_run, text_run, tmp_path / "latents"), tmp_path / "run", **{"--max_steps": 2, "--sample_every": 9})

    over_frames = runpy.run_path(str(ROOT / "train/train_vae.py"))["over_frames"]
    error = torch.ones(2, 3, 4, 2, 2)
    error[0, :, 2:], error[1, :, 0] = 100.0, 3.0
    assert over_frames(error, torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]])).item() == (1 + 1.5) / 2
    train_vae(tmp_path / "vae", **options, **{"--max_steps": 3, "--sample_every": 9, "--matched_weight": 0.1})


def test_moving_digits_are_encoded_and_trained_on(vae_run, tmp_path):
    digits = np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, *digits.shape) + digits.tobytes()))
    size = {"--data": path, "--height": 64, "--width": 64}
    encode(vae_run, tmp_path / "latents", **size, **{"--num_clips": 5})
    data = LatentSet(tmp_path / "latents")
    assert data.latents.shape == (5, 4, 2, 8, 8) and data.captions == [[""]] * 5
    train_vae(tmp_path / "vae", **size, **{"--max_steps": 3, "--sample_every": 9, "--num_calibration_clips": 2})
    refused = train_vae(tmp_path / "no", check=False, **{"--data": path})
    assert refused.returncode != 0 and "Moving MNIST is 64x64" in refused.stderr


def test_what_short_clips_do_not_serve_is_left_out_there(text_run, latents_dir, long_latents):
    script = runpy.run_path(str(ROOT / "train/train_vdm.py"))
    pipe = SimpleNamespace(denoiser=SimpleNamespace(patch_size=(1, 2, 2)))
    options = {"windows": {"start": 1.0, "sink": 1.0}, "known": {"none": 1.0, "both": 1.0}}
    settings = {"output_dir": latents_dir, "vae": "", "text_encoder": "", "latents_dir": long_latents}
    config = script["VDMConfig"](**settings, **options, window_lengths=[2, 5])
    short = script["restrict"](pipe, config, LatentSet(latents_dir)).config
    assert (short.window_lengths, short.windows, short.known) == ([2], {"start": 1.0}, {"none": 1.0})
    long = script["restrict"](pipe, config, LatentSet(long_latents)).config
    assert (long.window_lengths, long.windows, long.known) == ([2, 5], {"start": 1.0}, options["known"])
    config = script["VDMConfig"](**settings, window_lengths=[5])
    with pytest.raises(ValueError, match="clips of 2 token frames serve none"):
        script["restrict"](pipe, config, LatentSet(latents_dir))


@pytest.fixture(scope="module")
def long_latents(vae_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    options = {"--num_frames": 17, "--keyframes": "true", "--frame_rates": "[4.0, 8.0]", "--flow": "dis"}
    encode(vae_run, folder, **options)
    return folder


def test_long_clips_are_encoded_with_their_rates_and_single_frames(vae_run, long_latents):
    data = LatentSet(long_latents)
    assert data.latents.shape == (12, 4, 5, 2, 2) and data.frames.shape == (12, 16, 4, 2, 2)
    assert set(data.frame_rates.tolist()) == {4, 8}
    vae, world = CausalVideoVAE.from_pretrained(vae_run / "vae"), ShapesWorld()
    for index in range(4):
        size = {"num_frames": 17, "height": 16, "width": 16, "frame_rate": data[index].frame_rate}
        clip = render([world.scene(index)], **size)
        alone = vae.normalize(vae.encode(clip[:, :, 7:8]).latent_dist.mode())[0, :, 0]
        torch.testing.assert_close(data[index].frames[6].float(), alone, atol=0.1, rtol=0)  # bf16
        flow, seen = measure_motion(clip[:, :, ::4]).scaled_down(8)
        torch.testing.assert_close(data[index].motion.float(), torch.cat([flow, seen], 1)[0], atol=1e-2, rtol=0)


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
        refused = train_vdm((vae_run, text_run, short), tmp_path / "no", check=False, **options)
        assert refused.returncode != 0 and "encode_latents.py --flow dis" in refused.stderr


@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_the_temporal_loss_counts_what_is_generated_and_follows_in_the_clip(vae_run, text_run, long_latents, space):
    script = runpy.run_path(str(ROOT / "train/train_vdm.py"))
    _, config = mixture_of(text_run, long_latents, matched_weight=1.0, temporal_space=space)
    pipe = SimpleNamespace(codec=CausalVideoVAE.from_pretrained(vae_run / "vae"))
    real = LatentSet(long_latents).latents[:2].float()
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    signal = torch.ones(2, 5)

    def loss(clean, signal=signal, known=0, adjacent=(1, 1, 1, 1), num_real=5):
        batch = {
            "latents": real,
            "generated": (torch.arange(5) >= known).expand(2, 5),
            "real": (torch.arange(5) < num_real).expand(2, 5),
            "adjacent": torch.tensor(adjacent).bool().expand(2, 4),
        }
        return script["between_frames"](config, pipe, batch, clean, signal)

    assert (loss(real) < 1e-6).all() and (loss(noise) > 0.01).all()
    assert (loss(noise, known=5) < 1e-6).all()  # what is known is true
    assert (loss(noise, signal * 0.25) - 0.25 * loss(noise)).abs().max() < 1e-4
    if space == "latent":
        padded = torch.cat([real[:, :, :4], noise[:, :, 4:]], dim=2)
        assert (loss(padded, num_real=4) == 0).all() and (loss(padded) > 0.01).all()
        wrong = torch.cat([noise[:, :, :1], real[:, :, 1:]], dim=2)
        assert (loss(wrong, adjacent=(0, 1, 1, 1)) == 0).all() and (loss(wrong) > 0.01).all()


def test_the_temporal_loss_follows_the_motion_from_each_frame_to_the_next(text_run, long_latents):
    script = runpy.run_path(str(ROOT / "train/train_vdm.py"))
    _, config = mixture_of(text_run, long_latents, warping_weight=1.0)
    picture = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    steps = (1, 2, 3)  # to the right, each
    clip = torch.stack([picture.roll(sum(steps[:t]), -1)[..., 6:] for t in range(4)], dim=2)
    motion = torch.zeros(1, 3, 3, 8, 10)
    for pair, step in enumerate(steps):
        motion[:, 0, pair] = step
        motion[:, 2, pair, :, : 10 - step] = 1

    def loss(motion):
        batch = {"latents": clip, "generated": torch.ones(1, 4).bool(), "real": torch.ones(1, 4).bool()}
        batch |= {"adjacent": torch.ones(1, 3).bool(), "motion": motion}
        return script["between_frames"](config, None, batch, clip, torch.ones(1, 4)).item()

    assert loss(motion) < 1e-5
    back = torch.cat([-motion[:, :2], motion[:, 2:]], dim=1)
    assert loss(motion.flip(2)) > 0.5 and loss(back) > 0.5


def test_motion_goes_with_the_latents_of_a_window(text_run, long_latents):
    options = {"windows": {"start": 1.0, "sink": 1.0, "anywhere": 1.0}, "known": {"leading": 1.0}}
    later = 0
    for clip, row in rows(text_run, long_latents, length=3, warping_weight=1.0, **options):
        frames = [clip.latents[:, place].float() for place in range(5)]
        places = [next(i for i in range(5) if torch.equal(frames[i], one)) for one in row["latents"].unbind(1)]
        for pair, (place, following) in enumerate(itertools.pairwise(places)):
            assert row["adjacent"][pair] == (following == place + 1)
            if row["adjacent"][pair]:
                assert torch.equal(row["motion"][:, pair], clip.motion[:, place].float())
                later += places[0] > 0
    assert later > 5


def test_a_vae_trains_against_a_discriminator(tmp_path):
    options = {"--gan_weight": 0.1, "--gan_start": 3, "--max_steps": 5, "--sample_every": 9}
    train_vae(tmp_path / "once", **options)
    events = EventAccumulator(str(tmp_path / "once/logs")).Reload().Scalars("discriminator")
    assert [event.step for event in events] == [4, 5]  # after two steps of single images and one without it
    assert (tmp_path / "once/vae/config.json").is_file()
    train_vae(tmp_path / "again", **options)
    assert trained_alike(tmp_path / "again", tmp_path / "once", "checkpoint-5")
    train_vae(tmp_path / "more", **options | {"--gan_weight": 0.2})
    found, expected = (load_file(tmp_path / name / "checkpoint-5/model.safetensors") for name in ("more", "once"))
    judged = {name for name in found if name.startswith("discriminator.")}
    assert judged and any(not torch.equal(found[name], expected[name]) for name in found.keys() - judged)


def test_a_vae_trains_with_lpips(vae_run, tmp_path, monkeypatch):
    class Difference(torch.nn.Module):
        """In the place of VGG's, which is not here."""

        def __init__(self, net, verbose):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, made, true):
            return self.scale * (made - true).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", None)
    refused = train_vae(tmp_path / "refused", check=False, **{"--lpips_weight": 2.0})
    assert refused.returncode and "pip install vgen[lpips]" in refused.stderr
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Difference))
    train_vae(tmp_path / "run", **{"--lpips_weight": 2.0})
    events = EventAccumulator(str(tmp_path / "run/logs")).Reload()
    found, expected = ([event.value for event in events.Scalars(name)] for name in ("lpips", "l1"))
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == 4
    assert not trained_alike(tmp_path / "run", vae_run)


def test_a_vae_trains_with_a_temporal_loss(vae_run, tmp_path):
    train_vae(tmp_path, **{"--warping_weight": 0.5, "--matched_weight": 0.5, "--sample_every": 9})
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    values = [event.value for event in events.Scalars("temporal")]
    assert values[:2] == [0, 0] and all(value > 0 for value in values[2:])  # two steps of single images come first
    assert not trained_alike(tmp_path, vae_run)


def mixture_of(text_run, latents_dir, **options):
    script = runpy.run_path(str(ROOT / "train/train_vdm.py"))
    config = script["VDMConfig"](
        output_dir=latents_dir, vae="any", text_encoder=str(text_run), latents_dir=latents_dir, **options
    )
    config.check()
    return script["draw_row"], config


def rows(text_run, latents_dir, mode="full", length=5, count=60, conv_history=0, **options):
    draw_row, config = mixture_of(text_run, latents_dir, **options)
    network = FrozenDict(patch_size=(1, 2, 2), sink=1, chunk_size=2, keyframe_slots=4, conv_history=conv_history)
    clip = LatentSet(latents_dir)[3]
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        yield clip, draw_row(clip, network, config, mode, length, random.Random(seed), generator)


def test_a_sample_is_what_the_pipeline_gives_the_denoiser(vae_run, text_run, long_latents):
    vae, world = CausalVideoVAE.from_pretrained(vae_run / "vae"), ShapesWorld()
    known = {"leading": 1.0, "keyframes": 1.0, "both": 1.0}
    filled = 0
    for clip, row in rows(text_run, long_latents, known=known, corrupted=0.0):
        pixels = render([world.scene(3)], num_frames=17, height=16, width=16, frame_rate=clip.frame_rate)
        num_leading = int((~row["generated"]).sum())
        slots = row["keyframes"].unflatten(0, (4, -1))
        masks = [(k, j) for k in range(5) for j in range(4) if slots[j, -1, k, 0, 0]]
        given = {4 * (k - 1) + 1 + j for k, j in masks} | set(range(4 * num_leading - 3 if num_leading else 0))
        expected = encode_known_frames({i: pixels[:, :, i] for i in given}, 17, vae, compression=4)
        assert given and expected.placement.num_leading >= num_leading
        if expected.placement.num_leading == num_leading and expected.keyframes is not None:
            torch.testing.assert_close(row["keyframes"], expected.keyframes[0], atol=0.1, rtol=0)
            filled += 1
        if num_leading:
            torch.testing.assert_close(
                row["latents"][:, :num_leading], expected.leading[0][:, :num_leading], atol=0.1, rtol=0
            )
        assert (row["levels"][:num_leading] == 0).all() and (row["levels"][num_leading:] > 0).all()
        assert row["groups"].tolist() == [int(frame >= num_leading) for frame in range(5)]
    assert filled > 20


def test_half_of_the_known_beginnings_are_noised_each_frame_at_its_own_level(text_run, long_latents):
    noised = []
    for _, row in rows(text_run, long_latents, known={"leading": 1.0}, levels={"independent": 1.0}, count=200):
        history = row["levels"][~row["generated"]]
        noised.append(bool(history.any()))
        assert (history < 1 / 3).all() and (len(history.unique()) == len(history) or not noised[-1])
        assert len(row["levels"][row["generated"]].unique()) == row["generated"].sum()
    assert 70 < sum(noised) < 130


def test_windows_behind_a_gap_begin_with_the_sink_and_know_what_a_rollout_knows(text_run, long_latents):
    seen = set()
    for clip, row in rows(text_run, long_latents, length=3, windows={"sink": 1.0}):
        first = next(i for i in range(2, 4) if torch.equal(row["latents"][:, 1], clip.latents[:, i].float()))
        assert torch.equal(row["latents"][:, [0, 2]], clip.latents[:, [0, first + 1]].float())
        assert row["generated"].tolist() == [False, False, True]
        seen.add(first)
    assert seen == {2, 3}


def test_convolutions_get_the_latents_before_what_follows_a_gap(text_run, long_latents):
    windows, seen = {"start": 1.0, "sink": 1.0}, set()
    for clip, row in rows(text_run, long_latents, length=3, windows=windows, conv_history=2):
        later = next(i for i in range(1, 4) if torch.equal(row["latents"][:, 1], clip.latents[:, i].float()))
        assert row["gap_index"] == (3 if later == 1 else 1)
        if later > 1:
            assert torch.equal(row["conv_context"], clip.latents[:, later - 2 : later].float())
        seen.add(later)
    assert seen == {1, 2, 3}
    _, row = next(rows(text_run, long_latents, length=3, windows={"start": 1.0}, conv_history=2))
    assert "conv_context" not in row


def test_known_frames_are_trained_and_then_served(vae_run, text_run, long_latents, tmp_path):
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
    image = torch.rand(3, 16, 16)
    video = pipe("a red circle moves right", frames={0: image, 3: image}, output_type="pt").frames[0]
    torch.testing.assert_close(video[3], image)
    assert pipe.transformer.keyframe_embedding.weight.any()


def test_known_frames_without_their_latents_are_refused(runs, tmp_path):
    done = train_vdm(runs, tmp_path, check=False, **{"--known": json.dumps({"keyframes": 1})})
    assert done.returncode != 0 and "--keyframes true" in done.stderr
    done = train_vdm(runs, tmp_path, check=False, **{"--windows": json.dumps({"sink": 1}), "--window_lengths": "[2]"})
    assert done.returncode != 0 and "does not fit clips of 2" in done.stderr


def test_the_text_encoder_is_trained_along_only_where_asked(runs, tmp_path):
    before = load_file(runs[1] / "text_encoder/model.safetensors")
    moved = []
    for train in ("false", "true"):
        train_vdm(runs, tmp_path / train, **{"--train_text_encoder": train, "--save_dtype": "float32"})
        after = load_file(tmp_path / train / "pipeline/text_encoder/model.safetensors")
        moved.append(max((after[name] - before[name]).abs().max().item() for name in before))
    assert moved[0] == 0 < moved[1]


def test_a_convlstm_trains_and_a_model_is_evaluated_by_two_processes(runs, tmp_path):
    settings = {
        "--output_dir": tmp_path / "run", "--model": '{"channels": [4]}', "--height": 16, "--width": 16,
        "--num_frames": 5, "--given": 1, "--batch_size": 4, "--max_steps": 4, "--sample_every": 4,
        "--num_score_clips": 4,
    }  # fmt: skip
    launch("train/train_convlstm.py", **settings | TINY)
    assert EventAccumulator(str(tmp_path / "run/logs")).Reload().Scalars("psnr")[-1].value > 0
    train_vdm(runs, tmp_path / "vdm")
    settings = {
        "--model": tmp_path / "vdm/pipeline", "--output_dir": tmp_path / "out", "--tasks": '["reconstruction"]',
        "--num_clips": 3, "--batch_size": 1, "--given": 1, "--factor": 2,
    }  # fmt: skip
    launch("pipelines/evaluate.py", processes=2, **settings)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["numbers"] == [0, 1, 2] and results["missing"] == 0
    given = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    network = ConvLSTMPredictor.from_pretrained(tmp_path / "run/convlstm")  # from half precision
    assert network.dtype == torch.float32 and network.predict(given, 2).shape == (1, 3, 2, 16, 16)


def test_a_text_encoder_is_taught_what_its_captions_say(text_run):
    script = runpy.run_path(str(ROOT / "train/train_text_encoder.py"))
    config = script["TextEncoderConfig"](output_dir=text_run)
    tokenizer = AutoTokenizer.from_pretrained(text_run / "tokenizer")
    world = ShapesWorld(seed=3)
    input_ids, mask, said = script["draw"](world, tokenizer, range(50), config)
    for row in range(50):
        scene = parse_caption(world.caption(row))
        words = tokenizer.convert_ids_to_tokens(input_ids[row][mask[row].bool()])
        places = [place for place, values in enumerate(said[row].tolist()) if values[0] >= 0]
        assert [words[place] for place in places] == [one.color for one in scene.objects]
        for place, one in zip(places, scene.objects, strict=True):
            legal = script["ATTRIBUTES"].values()
            values = [names[number] for names, number in zip(legal, said[row, place].tolist(), strict=True)]
            assert values == [
                one.color, one.shape, one.motion, one.size, one.speed, scene.background, len(scene.objects)
            ]  # fmt: skip


def test_a_pipeline_to_start_from_must_agree_with_the_settings(runs, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    train_vdm(runs, first)
    refused = train_vdm(runs, second, check=False, **{"--init": first / "pipeline", "--level_shift": 3})
    assert refused.returncode != 0 and "level_shift=3.0, but the pipeline" in refused.stderr
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


def test_dry_run_prints_the_resolved_settings_and_does_nothing(tmp_path):
    recipe = "train/recipes/shapes-64.yaml"
    done = launch("train/train_vdm.py", "--dry_run", "--config", recipe, **{"--output_dir": tmp_path / "run"})
    assert "num_layers: 8" in done.stdout and f"output_dir: {tmp_path / 'run'}" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_example_goes_from_one_video_to_a_model_that_continues_it(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (100, 48, 64, 3), dtype=np.uint8)
    write_video(frames, tmp_path / "video.mp4", frame_rate=8.0)
    few = ["--vae-steps=2", "--steps=2", "--caption=noise"]
    command = [sys.executable, "examples/train_your_own.py", tmp_path / "video.mp4", tmp_path / "own", *few]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "after: " in done.stdout and "the VAE alone: " in done.stdout and (tmp_path / "own/strip.png").is_file()


@pytest.mark.parametrize("strategy", ["FSDP", "DEEPSPEED"])
def test_a_strategy_that_is_not_in_force_is_refused(tmp_path, monkeypatch, strategy):
    monkeypatch.setenv(f"ACCELERATE_USE_{strategy}", "true")
    refused = train_vae(tmp_path, check=False)
    assert refused.returncode != 0 and not list(tmp_path.glob("checkpoint-*"))
    assert f"{strategy} was asked for" in refused.stderr or "deepspeed" in refused.stderr.lower()


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "train/recipes").glob("*.yaml")))
def test_recipes_are_settings_of_their_scripts(name):
    kind = next((kind for kind in ("vae", "text", "convlstm") if kind in name), "vdm")
    values = runpy.run_path(str(ROOT / f"train/train_{'text_encoder' if kind == 'text' else kind}.py")).values()
    classes = [value for value in values if isinstance(value, type) and issubclass(value, RunConfig)]
    given = yaml.safe_load((ROOT / "train/recipes" / name).read_text())
    assert any(set(given) <= {field.name for field in fields(config)} for config in classes)
    model = given.get("model", {})
    if name.startswith("moving-mnist") and "window" in model:
        assert model["sink"] + model["window"] + model["chunk_size"] <= model["trained_token_frames"]


@pytest.mark.parametrize("path", sorted((ROOT / "train/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_of_accelerate_are_what_it_knows(path):
    config = load_config_from_file(str(path))  # unknown keys raise
    kinds = {"ddp": "MULTI_GPU", "several_machines": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type.name == kinds.get(path.stem, "DEEPSPEED")
    assert config.num_processes % config.num_machines == 0
    known = set(inspect.signature(FullyShardedDataParallelPlugin).parameters)
    assert {name.removeprefix("fsdp_") for name in config.fsdp_config} <= known | {
        "version",
        "transformer_layer_cls_to_wrap",
    }
    if config.deepspeed_config:
        launched = {"deepspeed_hostfile", "deepspeed_multinode_launcher", "deepspeed_config_file"}
        renamed = {"offload_optimizer_device", "offload_param_device", "gradient_accumulation_steps", "zero_stage"}
        fields = set(inspect.signature(DeepSpeedPlugin).parameters)
        assert set(config.deepspeed_config) <= fields | launched | renamed
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
        assert path.stem[-1] == "2" or config.deepspeed_config["zero3_save_16bit_model"]


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path):
    done = train_vae(tmp_path, check=False, **{"--gradient_accumulation_steps": 3})
    assert done.returncode != 0 and "a batch of 4 cannot be shared" in done.stderr and "such as 3" in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--batch_size", 0, "batch_size=0"),
        ("--sample_every", 0, "sample_every=0"),
        ("--max_stepz", 3, "max_stepz"),
        ("--ema_decay", 1, "ema_decay=1"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, option, value, message):
    done = train_vae(tmp_path / "run", check=False, **{option: value})
    assert done.returncode != 0 and message in done.stderr
