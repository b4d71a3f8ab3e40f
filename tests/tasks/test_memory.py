"""The memory of a checkpoint. The oracle is what PyTorch's allocator counts on the CPU."""

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch.profiler import ProfilerActivity, profile
from transformers import UMT5Config, UMT5EncoderModel
from typer.testing import CliRunner

from tests.fixtures import make_word_tokenizer
from vgen import CausalVideoVAE, VideoGenPipeline
from vgen.cli import app
from vgen.tasks.memory import describe_memory, report_memory

SIZE, FRAMES = (64, 96), 13


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline in the layout of Wan 2.1, large enough that its tensors outweigh what is not counted."""
    torch.manual_seed(0)
    tokenizer = make_word_tokenizer(["a", "red", "circle"], 16)
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, is_encoder_decoder=False
    )
    path = tmp_path_factory.mktemp("memory")
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(config),
        vae=AutoencoderKLWan(base_dim=16, z_dim=8, latents_mean=[0.0] * 8, latents_std=[1.0] * 8),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=WanTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=24,
            in_channels=8,
            out_channels=8,
            text_dim=64,
            freq_dim=32,
            ffn_dim=384,
            num_layers=3,
        ),
    ).save_pretrained(path)
    return path  # fmt: skip


def peak(run):
    """The most bytes that the allocator gave out at once during a call."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        run()
    total = most = 0
    events = [event for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


@torch.no_grad()
def test_activations_of_the_residual_vae_are_those_of_the_allocator(folder, tmp_path):
    pipe = VideoGenPipeline.from_pretrained(folder)
    pipe.vae = CausalVideoVAE(
        base_dim=16, z_dim=8, is_residual=True, patch_size=2, in_channels=12, out_channels=12, decoder_base_dim=32
    ).eval()
    pipe.save_pretrained(tmp_path)
    pipe.vae.frames_per_slice = 32
    latents = torch.zeros(1, 8, 4, 8, 12)
    measured = peak(lambda: pipe.vae.decode(latents).sample.float())
    report = report_memory(tmp_path, FRAMES, (128, 192))
    assert report.parts["vae"].activations == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_of_the_allocator(folder, dtype):
    report = report_memory(folder, FRAMES, SIZE, dtype)
    pipe = VideoGenPipeline.from_pretrained(folder, dtype=dtype)
    pipe.vae.frames_per_slice = 32
    runs = {
        "text_encoder": lambda: pipe.text_encoder(torch.ones(1, 512, dtype=torch.long)),
        "transformer": lambda: pipe.transformer(
            torch.zeros(2, 8, 4, 8, 12, dtype=dtype), torch.tensor([5.0, 5.0]), torch.zeros(2, 512, 64, dtype=dtype)
        ),
        "vae": lambda: pipe.vae.decode(torch.zeros(1, 8, 4, 8, 12, dtype=dtype)).sample.float(),
    }
    assert report.parts.keys() == runs.keys()
    for name, run in runs.items():
        run()  # what is allocated once
        if name == "vae" and dtype == torch.bfloat16:
            continue  # convolutions of CPUs make copies in float32
        assert report.parts[name].activations == pytest.approx(peak(run), rel=0.15), name
        weights = sum(weight.numel() * dtype.itemsize for weight in getattr(pipe, name).parameters())
        assert report.parts[name].weights == weights


def test_sums_follow_from_the_parts(folder):
    report = report_memory(folder, FRAMES, SIZE)
    parts = report.parts.values()
    assert report.resident == sum(part.weights for part in parts) + max(part.activations for part in parts)
    assert report.model_offloading == max(part.weights + part.activations for part in parts)
    assert report.group_offloading < report.model_offloading < report.resident
    assert 0 < report.float8_storage < report.parts["transformer"].weights / 2
    larger = report_memory(folder, FRAMES, (128, 192)).parts
    assert larger["vae"].activations > 3 * report.parts["vae"].activations
    assert larger["vae"].weights == report.parts["vae"].weights
    tiled = report_memory(folder, FRAMES, (512, 768))
    assert tiled.tiled < tiled.parts["vae"].activations / 2
    assert tiled.smallest < tiled.group_offloading


def test_rollouts_need_a_cache_and_no_more_for_longer_videos(folder, tmp_path):
    pipe = VideoGenPipeline.from_pretrained(folder)
    pipe.transformer.register_to_config(
        tasks=["text", "leading"], group_modes=["chunk"], chunk_size=2, window=4, sink=1, trained_token_frames=7
    )
    pipe.save_pretrained(tmp_path)
    short, long = report_memory(tmp_path, 33, SIZE), report_memory(tmp_path, 65, SIZE)
    # 3 layers of keys and values, 2 prompts, 5 frames of 4x6 tokens, 96 channels in float32
    assert short.cache == 3 * 2 * 2 * 5 * 24 * 96 * 4
    assert long.resident == short.resident and long.cache == short.cache
    assert any("past frames" in row[0] for row in describe_memory(short))


def test_the_command_prints_a_table_or_one_line(folder):
    def invoke(*words):
        return CliRunner().invoke(app, ["info", *map(str, words)])

    done = invoke(folder, "--num-frames", FRAMES, "--size", "64x96", "--dtype", "bfloat16")
    assert done.exit_code == 0 and "one block at a time" in done.output and "transformer" in done.output
    for words, message in (
        (("--size", "64"), "--size must have the form HEIGHTxWIDTH"),
        (("--num-frames", 12), "num_frames must be 4*k + 1, got 12 (nearest: 13)"),
        (("--dtype", "int8"), "dtype must be"),
    ):
        done = invoke(folder, *words)
        assert done.exit_code == 2 and message in done.output, done.output
    assert invoke("vgen/shapes-64-unet", "--num-frames", 17).exit_code == 0
