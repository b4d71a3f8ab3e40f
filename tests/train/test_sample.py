"""What the denoiser is trained on: windows, known frames, levels, losses between frames."""

import itertools
import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vgen.data.latents import LatentSet
from vgen.data.shapes import ShapesWorld, render
from vgen.data.video_io import write_video
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.vae import CausalVideoVAE
from vgen.sampling.known_frames import encode_known_frames, encode_slots
from vgen.temporal.grid import LatentGrid
from vgen.training.sample import (
    DenoiserSpec,
    SampleConfig,
    Source,
    check_stills,
    denoiser_temporal_loss,
    make_sample,
    record_frame_rates,
    supported_config,
)
from vgen.training.sources import masked_mean

from .scripts import encode, train_vae, train_vdm


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

    config = mixture_of(tmp_path / "latents", known={"leading": 1.0})
    for seed in range(10):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        sample = make_sample(short, spec(), config, "causal", 5, rng, generator)
        assert torch.equal(sample["real"], short.real)
        assert sample["groups"].tolist() == [0, 1, 5, 5, 5]
    train_vdm((vae_run, text_run, tmp_path / "latents"), tmp_path / "run", **{"--max_steps": 2, "--sample_every": 9})

    error = torch.ones(2, 3, 4, 2, 2)
    error[0, :, 2:], error[1, :, 0] = 100.0, 3.0
    assert masked_mean(error, torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]])).item() == (1 + 1.5) / 2
    train_vae(tmp_path / "vae", **options, **{"--max_steps": 3, "--sample_every": 9, "--matched_weight": 0.1})


def test_what_short_clips_do_not_support_is_left_out_there(latents_dir, long_latents):
    denoiser = SimpleNamespace(patch_size=(1, 2, 2))
    options = {"windows": {"start": 1.0, "sink": 1.0}, "known": {"none": 1.0, "both": 1.0}}
    settings = {"output_dir": latents_dir, "latents_dir": long_latents}
    config = SampleConfig(**settings, **options, window_lengths=[2, 5])
    short = supported_config(denoiser, config, LatentSet(latents_dir)).config
    assert (short.window_lengths, short.windows, short.known) == ([2], {"start": 1.0}, {"none": 1.0})
    long = supported_config(denoiser, config, LatentSet(long_latents)).config
    assert (long.window_lengths, long.windows, long.known) == ([2, 5], {"start": 1.0}, options["known"])
    config = SampleConfig(**settings, window_lengths=[5])
    with pytest.raises(ValueError, match="clips of 2 token frames support none"):
        supported_config(denoiser, config, LatentSet(latents_dir))


def test_the_frame_rates_of_all_clips_are_recorded(latents_dir, long_latents):
    denoiser = SpacetimeTransformer(num_attention_heads=1, attention_head_dim=12, num_layers=1, ffn_dim=8, text_dim=8)
    assert denoiser.config.trained_frame_rates is None
    for folders, expected in (([latents_dir], [8, 8]), ([latents_dir, long_latents], [4, 8]), ([latents_dir], [4, 8])):
        record_frame_rates(denoiser, [LatentSet(folder) for folder in folders])
        assert denoiser.config.trained_frame_rates == expected


@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_the_temporal_loss_counts_what_is_generated_and_follows_in_the_clip(vae_run, long_latents, space):
    config = mixture_of(long_latents, matched_weight=1.0, temporal_space=space)
    codec = CausalVideoVAE.from_pretrained(vae_run / "vae")
    data = LatentSet(long_latents)
    real = torch.stack([data[0].latents, data[1].latents]).float()
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    signal = torch.ones(2, 5)

    def loss(clean, signal=signal, known=0, adjacent=(1, 1, 1, 1), num_real=5):
        batch = {
            "latents": real,
            "generated": (torch.arange(5) >= known).expand(2, 5),
            "real": (torch.arange(5) < num_real).expand(2, 5),
            "adjacent": torch.tensor(adjacent).bool().expand(2, 4),
        }
        return denoiser_temporal_loss(config, codec, batch, clean, signal)

    assert (loss(real) < 1e-6).all() and (loss(noise) > 0.01).all()
    assert (loss(noise, known=5) < 1e-6).all()  # what is known is true
    assert (loss(noise, signal * 0.25) - 0.25 * loss(noise)).abs().max() < 1e-4
    if space == "latent":
        padded = torch.cat([real[:, :, :4], noise[:, :, 4:]], dim=2)
        assert (loss(padded, num_real=4) == 0).all() and (loss(padded) > 0.01).all()
        wrong = torch.cat([noise[:, :, :1], real[:, :, 1:]], dim=2)
        assert (loss(wrong, adjacent=(0, 1, 1, 1)) == 0).all() and (loss(wrong) > 0.01).all()


def test_the_temporal_loss_follows_the_motion_from_each_frame_to_the_next(long_latents):
    config = mixture_of(long_latents, warping_weight=1.0)
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
        return denoiser_temporal_loss(config, None, batch, clip, torch.ones(1, 4)).item()

    assert loss(motion) < 1e-5
    back = torch.cat([-motion[:, :2], motion[:, 2:]], dim=1)
    assert loss(motion.flip(2)) > 0.5 and loss(back) > 0.5


def test_motion_goes_with_the_latents_of_a_window(long_latents):
    options = {"windows": {"start": 1.0, "sink": 1.0, "anywhere": 1.0}, "known": {"leading": 1.0}}
    later = 0
    for clip, sample in samples(long_latents, length=3, warping_weight=1.0, **options):
        frames = [clip.latents[:, place].float() for place in range(5)]
        places = [next(i for i in range(5) if torch.equal(frames[i], one)) for one in sample["latents"].unbind(1)]
        for pair, (place, following) in enumerate(itertools.pairwise(places)):
            assert sample["adjacent"][pair] == (following == place + 1)
            if sample["adjacent"][pair]:
                assert torch.equal(sample["motion"][:, pair], clip.motion[:, place].float())
                later += places[0] > 0
    assert later > 5


def mixture_of(latents_dir, **options):
    config = SampleConfig(output_dir=latents_dir, latents_dir=latents_dir, **options)
    config.check()
    return config


def spec(conv_history=0):
    return DenoiserSpec(patch_frames=1, sink=1, chunk_size=2, keyframe_slots=4, conv_history=conv_history)


def samples(latents_dir, mode="full", length=5, count=60, conv_history=0, **options):
    config, clip = mixture_of(latents_dir, **options), LatentSet(latents_dir)[3]
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        yield clip, make_sample(clip, spec(conv_history), config, mode, length, random.Random(seed), generator)


def test_a_sample_is_what_the_pipeline_gives_the_denoiser(vae_run, long_latents):
    vae, world = CausalVideoVAE.from_pretrained(vae_run / "vae"), ShapesWorld()
    known = {"leading": 1.0, "keyframes": 1.0, "both": 1.0}
    filled = 0
    for clip, sample in samples(long_latents, known=known, corrupted=0.0):
        pixels = render([world.scene(3)], num_frames=17, height=16, width=16, frame_rate=clip.frame_rate)
        num_leading = int((~sample["generated"]).sum())
        slots = sample["keyframes"].unflatten(0, (4, -1))
        masks = [(k, j) for k in range(5) for j in range(4) if slots[j, -1, k, 0, 0]]
        given = {4 * (k - 1) + 1 + j for k, j in masks} | set(range(4 * num_leading - 3 if num_leading else 0))
        expected = encode_known_frames({i: pixels[:, :, i] for i in given}, 17, LatentGrid(4), vae)
        assert given and expected.layout.num_leading >= num_leading
        if expected.layout.num_leading == num_leading and expected.keyframes is not None:
            torch.testing.assert_close(sample["keyframes"], expected.keyframes[0], atol=0.1, rtol=0)
            filled += 1
        if num_leading:
            torch.testing.assert_close(
                sample["latents"][:, :num_leading], expected.leading[0][:, :num_leading], atol=0.1, rtol=0
            )
        assert (sample["levels"][:num_leading] == 0).all() and (sample["levels"][num_leading:] > 0).all()
        assert sample["groups"].tolist() == [int(frame >= num_leading) for frame in range(5)]
    assert filled > 20


def test_half_of_the_known_beginnings_are_noised_each_frame_at_its_own_level(long_latents):
    noised = []
    for _, sample in samples(long_latents, known={"leading": 1.0}, levels={"independent": 1.0}, count=200):
        history = sample["levels"][~sample["generated"]]
        noised.append(bool(history.any()))
        assert (history < 1 / 3).all() and (len(history.unique()) == len(history) or not noised[-1])
        assert len(sample["levels"][sample["generated"]].unique()) == sample["generated"].sum()
    assert 70 < sum(noised) < 130


def test_windows_after_a_gap_begin_with_the_sink_and_have_the_context_of_a_rollout(long_latents):
    seen = set()
    for clip, sample in samples(long_latents, length=3, windows={"sink": 1.0}):
        first = next(i for i in range(2, 4) if torch.equal(sample["latents"][:, 1], clip.latents[:, i].float()))
        assert torch.equal(sample["latents"][:, [0, 2]], clip.latents[:, [0, first + 1]].float())
        assert sample["generated"].tolist() == [False, False, True]
        seen.add(first)
    assert seen == {2, 3}


def test_convolutions_get_the_latents_before_what_follows_a_gap(long_latents):
    windows, seen = {"start": 1.0, "sink": 1.0}, set()
    for clip, sample in samples(long_latents, length=3, windows=windows, conv_history=2):
        later = next(i for i in range(1, 4) if torch.equal(sample["latents"][:, 1], clip.latents[:, i].float()))
        assert sample["gap_index"] == (3 if later == 1 else 1)
        if later > 1:
            assert torch.equal(sample["conv_context"], clip.latents[:, later - 2 : later].float())
        seen.add(later)
    assert seen == {1, 2, 3}
    _, sample = next(samples(long_latents, length=3, windows={"start": 1.0}, conv_history=2))
    assert "conv_context" not in sample


@pytest.mark.parametrize("stored", [False, True])
def test_single_frames_must_be_encoded_as_the_denoiser_expects_them(long_latents, tmp_path, stored):
    folder = tmp_path / "latents"
    shutil.copytree(long_latents, folder)
    settings = json.loads((folder / "settings.json").read_text()) | {"still_keyframes": stored}
    (folder / "settings.json").write_text(json.dumps(settings))
    config = mixture_of(folder)
    source = Source(LatentSet(folder), config)
    denoiser = SimpleNamespace(config=SimpleNamespace(still_keyframes=stored, keyframe_slots=4))
    check_stills(denoiser, [source])
    denoiser.config.still_keyframes = not stored
    with pytest.raises(ValueError, match=f"still_keyframes={stored}, and the denoiser has .*={not stored}"):
        check_stills(denoiser, [source])
    denoiser.config.keyframe_slots = 0  # no keyframes are used
    check_stills(denoiser, [source])


def test_frames_encoded_as_stills_are_what_the_pipeline_gives_the_denoiser(vae_run, tmp_path):
    encode(vae_run, tmp_path, **{"--num_frames": 9, "--keyframes": "true", "--still_keyframes": "true"})
    vae, clip = CausalVideoVAE.from_pretrained(vae_run / "vae"), LatentSet(tmp_path)[3]
    pixels = render([ShapesWorld().scene(3)], num_frames=9, height=16, width=16, frame_rate=clip.frame_rate)
    slots = encode_slots(vae, {(0, index): pixels[:, :, index] for index in range(1, 9)}, still=True)
    expected = torch.cat(list(slots.values()))
    torch.testing.assert_close(clip.frames.float(), expected, atol=0.1, rtol=0)
    alone = torch.cat(list(encode_slots(vae, {(0, index): pixels[:, :, index] for index in range(1, 9)}).values()))
    assert (expected - alone).abs().max() > 0.3
