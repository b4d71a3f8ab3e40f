"""Actions from files through latents, samples and both denoisers to rollouts."""

import json
import random

import numpy as np
import pytest
import torch

from tests.test_pipeline import seeded
from vgen import VideoGenPipeline
from vgen.data.latents import LatentSet
from vgen.data.video_io import write_video
from vgen.temporal.actions import pack_actions
from vgen.temporal.grid import LatentGrid
from vgen.training.objective import PromptedDenoiser
from vgen.training.sample import DenoiserSpec, SampleConfig, Source, conditioning, make_batch, make_sample

from .scripts import DENOISER, UNET, encode, launch, train_vdm

GRID = LatentGrid(4)
ACTIONS = {"action_dim": 2, "action_frames": 4}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Videos in which the brightness of each frame is its action; one has no actions."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(4):
        levels = np.random.default_rng(number).permutation(20) * 12
        frames = np.broadcast_to(levels[:, None, None, None], (20, 16, 16, 3)).astype(np.uint8)
        write_video(frames, folder / f"{number}.mp4", frame_rate=8.0)
        (folder / f"{number}.txt").write_text(f"a red circle\nnumber {number}")
        if number:
            np.savez(folder / f"{number}.npz", actions=np.stack([levels, -levels], axis=1) / 100)
    return folder


@pytest.fixture(scope="module")
def acted_latents(vae_run, videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("acted")
    options = {"--num_frames": 17, "--num_clips": None, "--sampling": "random", "--repeats": 3, "--shard_size": 2}
    encode(vae_run, folder, **{"--data": videos, "--frame_rates": "[8.0]"} | options)
    return folder


def test_each_clip_is_stored_with_the_actions_of_its_frames(videos, acted_latents):
    data = LatentSet(acted_latents)
    assert data.action_dim == 2 and data.num_frames == 17 and len(data) == 12
    for clip in data:
        number = int(clip.captions[1].split()[-1])
        if not number:
            assert clip.actions.isnan().all()
            continue
        whole = torch.from_numpy(np.load(videos / f"{number}.npz")["actions"]).float()
        assert any(torch.equal(clip.actions, whole[begin : begin + 17]) for begin in range(4))


def settings(folder, **options):
    return SampleConfig(latents_dir=folder, output_dir=folder / "run", batch_size=8, window_lengths=[3], **options)


def spec(**options):
    return DenoiserSpec(**{"patch_frames": 1, "chunk_size": 1, "sink": 1, "keyframe_slots": 0} | ACTIONS | options)


@pytest.mark.parametrize("kind", ["start", "anywhere", "sink"])
@pytest.mark.parametrize("conv_history", [0, 2])
def test_a_window_has_the_actions_of_its_token_frames(acted_latents, kind, conv_history):
    clip = next(one for one in LatentSet(acted_latents) if not one.actions.isnan().any())
    config = settings(acted_latents, windows={kind: 1.0}, action_dropout=0.0)
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        sample = make_sample(clip, spec(conv_history=conv_history), config, "full", 3, random.Random(seed), generator)
        latents, actions = sample["latents"], sample["actions"]
        if conv_history and kind == "sink":
            latents = torch.cat([latents, sample["conv_context"]], dim=1)
        packed = pack_actions(clip.actions[None], GRID)[0]
        assert len(actions) == latents.shape[1]
        for frame, row in zip(latents.unbind(1), actions, strict=True):
            places = [index for index in range(5) if torch.equal(clip.latents[:, index].float(), frame)]
            assert any(torch.equal(packed[index].nan_to_num(7), row.nan_to_num(7)) for index in places)


def test_actions_are_dropped_as_often_as_asked(acted_latents):
    data = LatentSet(acted_latents)
    clip = next(one for one in data if not one.actions.isnan().any())
    config = settings(acted_latents, action_dropout=0.25)
    generator = torch.Generator().manual_seed(0)
    dropped = [
        make_sample(clip, spec(), config, "full", 3, random.Random(seed), generator)["actions"].isnan().all()
        for seed in range(400)
    ]
    assert 0.18 < sum(map(float, dropped)) / 400 < 0.32
    plain = make_sample(clip, spec(action_dim=0), config, "full", 3, random.Random(0), generator)
    assert "actions" not in plain


@pytest.mark.parametrize("windows", [{"start": 1.0}, {"start": 1.0, "sink": 1.0}])
def test_rows_without_a_gap_are_computed_as_without_a_context(acted_latents, make_unet, windows):
    network = make_unet(in_channels=4, out_channels=4, sink=1, cross_attention_dim=5, **ACTIONS).eval()
    config = settings(acted_latents, windows=windows, action_dropout=0.0)
    source = Source(LatentSet(acted_latents), config)
    batch = make_batch(source, DenoiserSpec.of(network), 0, slice(0, 8), "causal", 3, None)
    conditions = conditioning(batch)
    assert conditions["actions"].isfinite().any()
    model, timestep = PromptedDenoiser(network, None), batch["levels"] * 1000
    prompts = torch.randn(8, 5, 5, generator=torch.Generator().manual_seed(0))
    split = model(batch["noise"], timestep, prompt_embeds=prompts, **conditions)
    together = model(batch["noise"], timestep, prompt_embeds=prompts, **conditions | {"num_gaps": None})
    torch.testing.assert_close(split, together, atol=1e-4, rtol=0)


@pytest.mark.parametrize("denoiser", ["transformer", "unet"])
def test_both_denoisers_learn_from_actions_and_roll_out_with_them(
    vae_run, text_run, acted_latents, tmp_path, denoiser
):
    network = json.loads(UNET["--model"]) if denoiser == "unet" else DENOISER
    options = {"--denoiser": denoiser, "--model": json.dumps(network | ACTIONS | {"window": 1, "sink": 1})}
    options |= {
        "--known": '{"none": 1, "leading": 1}',
        "--window_lengths": "[3]",
        "--windows": '{"start": 1, "sink": 1}',
    }
    options |= {"--groups": '{"full": 1, "causal": 1}'}
    train_vdm((vae_run, text_run, acted_latents), tmp_path / "run", **options)
    pipe = VideoGenPipeline.from_pretrained(tmp_path / "run/pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert all(weight.any() for weight in pipe.denoiser.action_embedder.parameters())
    make = [
        lambda actions: pipe("a red circle", num_frames=9, actions=actions, generator=seeded()).frames,
        lambda actions: next(pipe.rollout("a red circle", num_frames=9, actions=actions, generator=seeded()).fork()),
    ]
    for one in make:
        assert np.isfinite(one(np.zeros((9, 2)))).all()
    assert not np.array_equal(make[0](np.zeros((9, 2))), make[0](np.full((9, 2), 50.0)))


def test_latents_without_actions_or_with_others_are_rejected(vae_run, text_run, latents_dir, acted_latents, tmp_path):
    model = {"--model": json.dumps(DENOISER | ACTIONS)}
    failed = train_vdm((vae_run, text_run, latents_dir), tmp_path / "a", check=False, **model)
    assert "action_dim=2 needs actions, and the clips in" in failed.stderr
    model = {"--model": json.dumps(DENOISER | {"action_dim": 3, "action_frames": 4})}
    failed = train_vdm((vae_run, text_run, acted_latents), tmp_path / "b", check=False, **model)
    assert "need model={action_dim: 2, action_frames: 4}, got action_dim=3 and action_frames=4" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_actions_of_different_widths_are_rejected(vae_run, videos, tmp_path):
    for path in videos.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    np.savez(tmp_path / "1.npz", actions=np.zeros((20, 3)))
    failed = encode(vae_run, tmp_path / "out", check=False, **{"--data": tmp_path, "--frame_rates": "[8.0]"})
    assert "all actions must have the same number of channels, got" in failed.stderr


def test_a_student_with_actions_is_distilled(vae_run, text_run, acted_latents, tmp_path):
    runs = vae_run, text_run, acted_latents
    options = {"--model": json.dumps(DENOISER | ACTIONS), "--groups": '{"chunk": 1}', "--window_lengths": "[3]"}
    train_vdm(runs, tmp_path / "teacher", **options)
    shared = {
        "--init": tmp_path / "teacher/pipeline", "--latents_dir": acted_latents, "--groups": '{"chunk": 1}',
        "--window_lengths": "[3]", "--batch_size": 4, "--max_steps": 2, "--sample_every": 9, "--compile": "false",
        "--mixed_precision": "no", "--warmup_steps": 1, "--num_score_prompts": 2,
    }  # fmt: skip
    launch("train/distill.py", **shared, **{"--output_dir": tmp_path / "student"})
    student = VideoGenPipeline.from_pretrained(tmp_path / "student/pipeline")
    assert student.denoiser.config.action_dim == 2
    forced = launch(
        "train/distill.py", check=False, **shared,
        **{"--output_dir": tmp_path / "forced", "--method": "self_forcing"},
    )  # fmt: skip
    assert "method=self_forcing does not support denoisers with actions" in forced.stderr
