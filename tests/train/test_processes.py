"""Training by several processes."""

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.warm import warm_python
from vgen.data.video_io import read_video

from .scripts import ON_CPUS, ROOT, UNET, launch_processes, logged, train_vae, train_vdm


@pytest.mark.slow
def test_two_processes_give_the_same_weights_as_one(vae_run, text_run, latents_dir, tmp_path):
    train_vae(tmp_path / "vae", processes=2, cold=True)
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
        scores = [tag for tag in alone.Tags()["scalars"] if tag.startswith(("adherence", "psnr", "readable"))]
        assert scores and all(logged.Scalars(tag)[0].step == alone.Scalars(tag)[0].step for tag in scores)
        for tag in {"psnr", "readable"} & set(scores):  # the processes divide the clips
            assert logged.Scalars(tag)[0].value == pytest.approx(alone.Scalars(tag)[0].value, abs=0.01)
        samples, expected_samples = (read_video(path / "samples.mp4")[0] for path in (tmp_path / run, expected))
        assert samples.shape == expected_samples.shape and abs(samples.astype(int) - expected_samples).mean() < 2


def test_processes_that_are_not_connected_are_rejected(runs, tmp_path):
    one_of_two = ["--cpu", "--num_machines=1", "--mixed_precision=no"]
    done = train_vdm(runs, tmp_path, processes=2, check=False, accelerate=one_of_two)
    assert done.returncode != 0 and "starts one process, whatever --num_processes says" in done.stderr


DROPOUT = """
import sys
from pathlib import Path
import torch
from accelerate.utils import gather
from torch import nn
from vgen.training.run import Run, RunConfig, start

config = RunConfig(output_dir=Path(sys.argv[1]), max_steps=1, seed=3, ema_decay=0.0)
accelerator = start(config)
run = Run(config, accelerator, nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5)))
for _ in run.steps():
    for _ in run.parts(2):
        out = run.network(torch.ones(1, 8))
        run.backward(out.mean())
    run.update()
masks, weights = gather(out == 0), gather(run.network.module[0].weight[None])
assert torch.equal(weights[0], weights[1]) and not torch.equal(masks[0], masks[1])
run.end(lambda _: None)
"""


def test_processes_have_the_same_weights_and_dropout_of_their_own(tmp_path):
    (tmp_path / "dropout.py").write_text(DROPOUT)
    done = launch_processes(warm_python(), [str(tmp_path / "dropout.py"), str(tmp_path / "run")], 2, ON_CPUS)
    assert done.returncode == 0, done.stderr[-3000:]


FSDP2 = ("--config_file=train/accelerate/fsdp2.yaml", "--mixed_precision=no")
PIPELINE = "pipeline/transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="PyTorch shards on the accelerator")
@pytest.mark.parametrize("network", ["transformer", "unet"])
def test_a_sharded_run_resumes_with_another_number_of_processes(runs, tmp_path, network):
    options = {"--lr_schedule": "constant", "--save_dtype": "float32"}
    how = {"fresh": True, "accelerate": FSDP2}
    if network == "transformer":
        counts = 2, 1
        options["--train_text_encoder"] = "true"
    else:
        counts = 1, 2
        options |= UNET | {"--train_only": "temporal"}
        how["accelerate"] += ("--fsdp_transformer_layer_cls_to_wrap=BasicTransformerBlock,ResnetBlock2D",)
    for steps, processes in zip((2, 4), counts, strict=True):
        done = train_vdm(runs, tmp_path / "run", processes=processes, **how, **options | {"--max_steps": steps})
    assert "after 2 steps" in done.stdout
    for name in ("sharded", "ema"):
        files = list((tmp_path / "run/checkpoint-2" / name).iterdir())
        assert len(files) == counts[0] and all(path.suffix == ".safetensors" for path in files)
    train_vdm(runs, tmp_path / "whole", **options)
    losses, expected = ([value for _, value in logged(tmp_path / name, "loss")] for name in ("run", "whole"))
    assert len(losses) == 4 and losses == pytest.approx(expected, rel=1e-4)
    for file in (f"{network}/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        weights, wanted = (load_file(tmp_path / name / "pipeline" / file) for name in ("run", "whole"))
        assert weights.keys() == wanted.keys()
        # single weights whose gradient is almost zero may go either way in AdamW's first steps, by 1e-3 each
        assert max((weights[name] - wanted[name]).abs().mean().item() for name in wanted) < 1e-5
    done = train_vdm(runs, tmp_path / "run", check=False, **options | {"--max_steps": 5})
    assert done.returncode != 0 and "was written with FSDP and is resumed with it only" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="DeepSpeed uses the accelerator")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_as_one_process_and_resumes(runs, tmp_path, stage):
    pytest.importorskip("deepspeed")
    options = {"--ema_decay": 0, "--lr_schedule": "constant", "--save_dtype": "float32"}
    launcher = [f"--config_file=train/accelerate/deepspeed_zero{stage}.yaml", "--mixed_precision=no"]
    for steps in (2, 4):
        how = {"processes": 2, "cold": True, "accelerate": launcher}
        done = train_vdm(runs, tmp_path / "run", **how, **options | {"--max_steps": steps})
    assert "after 2 steps" in done.stdout
    train_vdm(runs, tmp_path / "whole", **options)
    losses, expected = ([value for _, value in logged(tmp_path / name, "loss")] for name in ("run", "whole"))
    assert losses == pytest.approx(expected, rel=1e-3)
    weights, wanted = (load_file(tmp_path / name / PIPELINE) for name in ("run", "whole"))
    assert weights.keys() == wanted.keys()
    assert max((weights[name] - wanted[name]).abs().mean().item() for name in wanted) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_sharding_by_accelerate_trains_and_gives_a_pipeline(runs, tmp_path, strategy):
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    options = {"--optimizer": "adamw", "--ema_decay": 0, "--lr_schedule": "constant"}
    launcher = [f"--config_file=train/accelerate/{strategy}.yaml", "--mixed_precision=no"]
    count = max(number for number in (1, 2, 4) if number <= torch.cuda.device_count())  # divides the batch
    train_vdm(runs, tmp_path / "cpu", **options)
    sharded = {"processes": count, "fresh": True, "accelerate": launcher}
    train_vdm(runs, tmp_path / "sharded", **sharded, **options | {"--max_steps": 2})
    train_vdm(runs, tmp_path / "sharded", **sharded, **options)
    one, sharded = (load_file(tmp_path / name / PIPELINE) for name in ("cpu", "sharded"))
    # single weights whose gradient is almost zero may go either way in AdamW's first steps, by 1e-3 each
    assert max((one[key] - sharded[key]).abs().mean().item() for key in one) < 1e-4


@pytest.mark.gpu
def test_a_sharded_run_on_gpus_resumes_with_another_number_of_processes(runs, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    options = {"--lr_schedule": "constant", "--save_dtype": "float32"}
    train_vdm(runs, tmp_path / "whole", processes=2, accelerate=FSDP2, **options)
    train_vdm(runs, tmp_path / "again", processes=2, accelerate=FSDP2, **options | {"--max_steps": 2})
    train_vdm(runs, tmp_path / "again", fresh=True, accelerate=FSDP2, **options)
    losses, expected = ([value for _, value in logged(tmp_path / name, "loss")] for name in ("again", "whole"))
    assert losses == pytest.approx(expected, rel=1e-3)


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
@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one_that_accumulates(runs, tmp_path, network):
    (tmp_path / "descent.py").write_text(DESCENT)
    script = (tmp_path / "descent.py", ROOT / f"train/train_{network}.py")
    options = {"--max_steps": 5, "--ema_decay": 0, "--max_grad_norm": 1e6}
    outcomes = []
    for name, processes in (("one", 1), ("two", 2)):
        options["--gradient_accumulation_steps"] = 3 - processes
        how = {"processes": processes, "fresh": True, "script": script}
        if network == "vae":  # on clips, with a loss between their frames
            train_vae(tmp_path / name, **how, **options | {"--image_steps": 0, "--difference_weight": 0.5})
        else:
            train_vdm(runs, tmp_path / name, **how, **options)
        weights = load_file(tmp_path / name / "checkpoint-5/model.safetensors")
        outcomes.append((torch.load(tmp_path / name / "gradients.pt"), weights))
    (alone, weights_alone), (together, weights_together) = outcomes
    largest = max(gradient.abs().max() for gradient in alone.values())
    assert largest > 1e-3 and alone.keys() == together.keys()
    assert all((alone[name] - together[name]).abs().max() < 1e-5 * largest for name in alone)
    for name, weight in weights_alone.items():
        torch.testing.assert_close(weights_together[name], weight, rtol=1e-5, atol=1e-5)
