"""The training scripts, run as a user runs them, at tiny size."""

import io
import json
import os
import runpy
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.warm import warm_python

ROOT = Path(__file__).parents[2]

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

SAYS_WHAT_IS_NEXT = ("train/", "pipelines/encode_latents", "pipelines/prepare_videos")

ON_CPUS = ("--cpu", "--num_machines=1", "--mixed_precision=no")


def launch(script, *arguments, check=True, processes=1, fresh=False, cold=False, accelerate=ON_CPUS, **options):
    """Runs a script as `accelerate launch` would: here, in processes of their own (`fresh`), or in cold ones too."""
    command = command_of(script, *arguments, **options)
    if processes > 1 or fresh or cold or accelerate is not ON_CPUS:
        done = launch_processes(sys.executable if cold else warm_python(), command, processes, accelerate)
    else:
        done = launch_here(command)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    is_dry = "--dry_run" in (*arguments, *options)
    if check and str(script).startswith(SAYS_WHAT_IS_NEXT) and not is_dry:
        last = done.stdout.splitlines()[-1]
        assert last.startswith("stopped after ") or (last.startswith("wrote ") and "; next: " in last), done.stdout
    return done


def command_of(script, *arguments, **options):
    """The words of a script's command, without a launcher."""
    return [
        str(ROOT / script),
        *(str(word) for word in (*arguments, *(word for pair in options.items() for word in pair))),
    ]


def launch_processes(python, command, processes, accelerate):
    on_cpus = accelerate is ON_CPUS
    if on_cpus and processes > 1:  # --cpu would start one
        accelerate = ["--config_file=train/accelerate/ddp.yaml", "--mixed_precision=no"]
    launcher = ["-m", "accelerate.commands.launch", *accelerate]
    if on_cpus and python != warm_python():  # only what it starts
        python, launcher, command = warm_python(), [*launcher, "--no_python"], [python, *command]
    command = [python, *launcher, "--num_processes", str(processes), "--main_process_port=0", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true"} if on_cpus else {}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False, timeout=600)


def launch_here(command):
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests in this process
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


def train_vae(output_dir, check=True, script=("train/train_vae.py",), processes=1, fresh=False, cold=False, **options):
    settings = {
        "--output_dir": output_dir, "--model": json.dumps(VAE), "--height": 16, "--width": 16, "--num_frames": 5,
        "--image_steps": 2, "--image_batch_size": 4, "--batch_size": 4, "--max_steps": 4, "--sample_every": 4,
        "--num_score_clips": 16, "--num_calibration_clips": 8,
    }  # fmt: skip
    how = {"processes": processes, "fresh": fresh, "cold": cold}
    return launch(*script, check=check, **how, **settings | TINY | options)


def encode(vae_run, output_dir, check=True, processes=1, **options):
    settings = {
        "--vae": vae_run / "vae", "--output_dir": output_dir, "--height": 16, "--width": 16, "--num_frames": 5,
        "--batch_size": 4, "--shard_size": 8, "--num_clips": 12, "--mixed_precision": "no",
    }  # fmt: skip
    settings = {name: value for name, value in (settings | options).items() if value is not None}
    return launch("pipelines/encode_latents.py", check=check, processes=processes, **settings)


def train_text_encoder(output_dir, check=True, **options):
    settings = {
        "--output_dir": output_dir, "--dim": 32, "--num_layers": 1, "--batch_size": 4, "--max_steps": 4,
        "--sample_every": 4, "--num_score_captions": 8,
    }  # fmt: skip
    return launch("train/train_text_encoder.py", check=check, **settings | TINY | options)


def vdm_settings(runs, output_dir, **options):
    vae_run, text_run, latents_dir = runs
    defaults = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 1, "guidance_scale": 2.0}
    settings = {
        "--output_dir": output_dir, "--vae": vae_run / "vae", "--text_encoder": text_run,
        "--latents_dir": latents_dir, "--model": json.dumps(DENOISER), "--batch_size": 4, "--max_steps": 4,
        "--sample_every": 4, "--num_score_prompts": 2, "--defaults": json.dumps(defaults),
    }  # fmt: skip
    return settings | TINY | options


def train_vdm(runs, output_dir, check=True, processes=1, fresh=False, script=("train/train_vdm.py",), **options):
    named = {name: options.pop(name) for name in ("accelerate", "cold") if name in options}
    settings = vdm_settings(runs, output_dir, **options)
    return launch(*script, check=check, processes=processes, fresh=fresh, **named, **settings)


def logged(folder, name):
    """The values that a run logged under a tag: `(step, value)`."""
    return [(event.step, event.value) for event in EventAccumulator(str(folder / "logs")).Reload().Scalars(name)]


def trained_alike(one, other, checkpoint="checkpoint-4"):
    """Whether two runs have the same weights, to the bit."""
    weights, others = (load_file(run / checkpoint / "model.safetensors") for run in (one, other))
    assert weights.keys() == others.keys()
    return all(torch.equal(weights[name], others[name]) for name in weights)


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


def latents_of(data):
    """All of a `LatentSet`, in memory."""
    return torch.stack([clip.latents for clip in data])
