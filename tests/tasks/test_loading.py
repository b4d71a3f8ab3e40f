"""Options of loading: the same on the command line, in jobs and in Python."""

import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image
from typer.testing import CliRunner

from tests.test_lora import write_adapter
from tests.test_pipeline import make_pipeline
from tests.warm import warm_python
from vgen.cli import app
from vgen.data.video_io import read_video, video_info, write_video
from vgen.diffusion import change_scheduler, make_scheduler
from vgen.pipeline import VideoGenPipeline
from vgen.tasks.jobs import JobConfig, run_settings
from vgen.tasks.loading import LoadOptions, load_checkpoint, operations, parse_adapter
from vgen.training.throughput import count_flops

ROOT = Path(__file__).parents[2]
PROMPT = "a red circle moves right"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_pipeline(tasks=["text", "leading", "keyframes"], window=2, sink=1).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for seed, folder in enumerate(folders):
        write_adapter(folder, seed)
    return folders


@pytest.fixture
def inputs(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    (tmp_path / "clips").mkdir()
    write_video(frames, tmp_path / "clips" / "clip", frame_rate=8.0)
    Image.fromarray(frames[0]).save(tmp_path / "first.png")
    (tmp_path / "prompts.txt").write_text(PROMPT + "\n")
    return tmp_path


def run(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done


def test_adapters_are_loaded_with_their_weights(model, adapters):
    pipe = load_checkpoint(model, LoadOptions(lora=[f"{adapters[0]}:0.5", str(adapters[1])]), "cpu")
    own = VideoGenPipeline.from_pretrained(model)
    for name, folder in zip("ab", adapters, strict=True):
        own.load_lora_weights(folder, adapter_name=name)
    own.set_adapters(["a", "b"], [0.5, 1.0])
    call = dict(num_inference_steps=2, output_type="pt")
    assert torch.equal(
        pipe(PROMPT, generator=torch.manual_seed(0), **call).frames,
        own(PROMPT, generator=torch.manual_seed(0), **call).frames,
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a.safetensors", ("a.safetensors", 1.0)), ("a.safetensors:0.5", ("a.safetensors", 0.5)), ("c:d", ("c:d", 1.0)),
     ("a:-1", ("a", -1.0))],
)  # fmt: skip
def test_the_weight_of_an_adapter_follows_a_colon(text, expected):
    assert parse_adapter(text) == expected


def test_a_file_whose_name_ends_like_a_weight_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("style:2").touch()
    assert parse_adapter("style:2") == ("style:2", 1.0)


def test_another_scheduler_has_the_noise_levels_of_the_checkpoints():
    flow = make_scheduler("flow", shift=3.0)
    for name in ("dpmsolver++", "unipc"):
        changed = change_scheduler(flow, name)
        changed.set_timesteps(6)
        expected = FlowMatchEulerDiscreteScheduler(shift=3.0)
        expected.set_timesteps(sigmas=np.linspace(1, 1 / 1000, 7)[:-1])
        torch.testing.assert_close(changed.sigmas[:-1].float(), expected.sigmas[:-1], atol=2e-3, rtol=0)
    back = change_scheduler(change_scheduler(flow, "unipc"), "euler")
    assert type(back) is FlowMatchEulerDiscreteScheduler and back.config.shift == 3.0
    diffusion = make_scheduler("v_prediction", zero_terminal_snr=True)
    changed = change_scheduler(diffusion, "unipc")
    assert type(changed) is UniPCMultistepScheduler and changed.config.prediction_type == "v_prediction"
    assert torch.equal(changed.alphas_cumprod[:-1], diffusion.alphas_cumprod[:-1])


@pytest.mark.parametrize(("prediction", "name"), [("flow", "ddim"), ("v_prediction", "euler")])
def test_a_scheduler_for_another_kind_of_checkpoint_is_rejected(prediction, name):
    with pytest.raises(ValueError, match=f"scheduler must be .* got '{name}'"):
        change_scheduler(make_scheduler(prediction), name)


COMMANDS = {
    "generate": [PROMPT],
    "animate": ["first.png", PROMPT],
    "predict": ["clips/clip", "--num-frames", 4, "--prompt", PROMPT],
    "interpolate": ["clips/clip", "--prompt", PROMPT],
    "rollout": [PROMPT, "--num-frames", 5],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_generates_has_the_options(model, adapters, inputs, monkeypatch, command):
    monkeypatch.chdir(inputs)
    common = [*COMMANDS[command], "--model", model, "--steps", 2, "--guidance", 2]
    options = {
        "plain": [],
        "negative": ["--negative", "a blue square"],
        "scheduler": ["--scheduler", "unipc"],
        "dtype": ["--dtype", "bfloat16"],
        "adapter": ["--lora", adapters[0]],
        "half": ["--lora", f"{adapters[0]}:0.5"],
        "both": ["--lora", adapters[0], "--lora", adapters[1]],
    }
    for name, words in options.items():
        run(command, *common, *words, "-o", name)
    videos = {name: read_video(name)[0] for name in options}
    for first in videos:
        for second in videos:
            assert first == second or not np.array_equal(videos[first], videos[second]), (first, second)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_generates_writes_444(model, inputs, monkeypatch, command):
    monkeypatch.chdir(inputs)
    run(command, *COMMANDS[command], "--model", model, "--steps", 1, "--pixel-format", "yuv444p", "-o", "v.mp4")
    assert pixel_format(Path("v.mp4")) == "yuv444p"


def pixel_format(path):
    with av.open(str(path)) as container:
        return container.streams.video[0].pix_fmt


@pytest.mark.parametrize("name", ["vgen/shapes-64", "vgen/shapes-64-unet"])
def test_the_operations_of_a_forward_pass_are_those_that_pytorch_counts(name):
    pipe = load_checkpoint(name, LoadOptions(), "cpu")
    pipe.set_progress_bar_config(disable=True)
    counted = count_flops(
        lambda: pipe("a red circle moves right", num_inference_steps=1, output_type="latent", guidance_scale=2.0)
    )
    assert counted / 3 < operations(pipe, streams=False) < 3 * counted
    assert operations(pipe, streams=True) < operations(pipe, streams=False)


@pytest.mark.parametrize(("fast", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_dtype_auto_is_the_faster_one_and_recorded_in_jobs(model, monkeypatch, fast, dtype):
    monkeypatch.setattr("vgen.machine.fast_precision", lambda device: fast)
    config = JobConfig(output_dir="runs", model=model, dtype="auto")
    pipe = load_checkpoint(model, config, "cpu")
    assert pipe.dtype == pipe.vae.dtype == dtype
    assert run_settings(config, pipe)["dtype"] == str(dtype).removeprefix("torch.")


def test_a_compiled_denoiser_gives_the_same_video(model, adapters, inputs, monkeypatch):
    compiled = []
    original = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compiled.append(self) or original(self, backend="eager")
    )
    monkeypatch.chdir(inputs)
    for name, words in {"plain": [], "compiled": ["--compile"]}.items():
        run("generate", PROMPT, "--model", model, "--steps", 2, "--lora", adapters[0], *words, "-o", name)
    assert compiled
    plain, fast = (read_video(name)[0].astype(int) for name in ("plain", "compiled"))
    assert abs(plain - fast).max() <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora", "nosuch.safetensors"], "no such LoRA adapter: nosuch.safetensors"),
        (["--scheduler", "ddim"], "scheduler must be euler, dpmsolver++ or unipc for flow matching, got 'ddim'"),
    ],
)
def test_wrong_options_are_one_line(model, tmp_path, words, message):
    done = CliRunner().invoke(app, ["generate", PROMPT, "-o", str(tmp_path / "v"), "--model", model, *words])
    assert done.exit_code == 2 and done.stderr == f"vgen: {message}\n"


JOBS = {
    "text_to_video": ["--prompts", "prompts.txt"],
    "predict": ["--videos", "clips", "--num_frames", 4, "--prompt", PROMPT],
    "interpolate": ["--videos", "clips", "--prompt", PROMPT],
    "rollout": ["--prompts", "prompts.txt", "--num_frames", 5],
}


@pytest.mark.parametrize("job", JOBS)
def test_jobs_have_the_options_of_the_command(model, adapters, inputs, monkeypatch, job):
    monkeypatch.chdir(inputs)
    options = ["--lora", adapters[0], "--lora", f"{adapters[1]}:0.5", "--scheduler", "unipc", "--steps", 2]
    options += ["--guidance", 2, "--negative", "a blue square", "--dtype", "float32"]
    words = [*JOBS[job], "--model", model, "--output_dir", "out", "--seed", 0, *options, "--scale", 3]
    words += ["--pixel_format", "yuv444p"]
    command = [warm_python(), ROOT / "pipelines" / f"{job}.py", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    [video] = (
        path for path in Path("out").iterdir() if path.name[0] != "." and path.suffix not in (".json", ".jsonl")
    )
    info = video_info(video)
    assert pixel_format(video) == "yuv444p" and info.width == 48 and info.content_size == (16, 16)
    assert info.metadata["model"] == model and len(info.metadata["lora"]) == 2
    if job == "text_to_video":
        run(
            "generate", PROMPT, "--model", model, *options, "--pixel-format", "yuv444p", "--scale", 3, "-o", "same.mp4"
        )
        assert np.array_equal(read_video(video)[0], read_video("same.mp4")[0])
