"""Actions: which token frame takes which, and where they reach the denoiser."""

from functools import partial

import numpy as np
import pytest
import torch

from vgen import VideoGenPipeline, load_rollout
from vgen.temporal.actions import pack_actions, read_actions
from vgen.temporal.grid import LatentGrid

from ..test_pipeline import PROMPT, make_pipeline, seeded
from .test_rollout import OTHER, frames_of, latents_of


def build(randomize, **transformer):
    settings = {"tasks": ["text", "leading", "keyframes"], "chunk_size": 1, "window": 2, "sink": 1, "num_layers": 2}
    settings |= {"action_dim": 3, "action_frames": 4}
    pipe = make_pipeline(**settings | transformer)
    randomize(pipe.transformer)
    randomize(pipe.vae)
    return pipe


@pytest.fixture
def pipe(randomize):
    return build(randomize)


def some_actions(count, seed=0, videos=()):
    return torch.randn(*videos, count, 3, generator=seeded(seed))


@pytest.mark.parametrize(("compression", "patch"), [(4, 1), (4, 2), (1, 1), (1, 2)])
@pytest.mark.parametrize("started", [False, True])
def test_a_token_frame_takes_the_actions_of_its_pixel_frames(compression, patch, started):
    grid = LatentGrid(compression, patch)
    count = 3 * grid.unit if started else grid.num_frames(3 * patch)
    actions = some_actions(count, videos=(2,))
    packed = pack_actions(actions, grid, started)
    assert packed.shape == (2, 3, 3 * grid.unit)
    for token, row in enumerate(packed.unbind(1)):
        latents = range(token * patch, (token + 1) * patch)
        if started:
            frames = list(range(token * grid.unit, (token + 1) * grid.unit))
        else:  # latent 0 holds frame 0 alone, latent k frames s * (k - 1) + 1 to s * k
            frames = [
                f if f > 0 else None for k in latents for f in range(compression * (k - 1) + 1, compression * k + 1)
            ]
        if set(frames) <= {None}:
            assert row.isnan().all()
            continue
        expected = [torch.zeros(2, 3) if frame is None else actions[:, frame] for frame in frames]
        assert torch.equal(row, torch.cat(expected, dim=1))


@pytest.mark.parametrize("given", [1, 5, 9])
def test_a_rollout_equals_a_full_pass_with_the_same_actions(randomize, video, monkeypatch, given):
    pipe = build(randomize, chunk_size=2, window=6)
    actions = some_actions(given + 8)
    options = {"actions": actions[given:], "video_actions": actions[:given], "num_frames": 8, "generator": seeded()}
    latents, _ = latents_of(pipe.rollout(PROMPT, video[:given], **options), monkeypatch)
    known = (given - 1) // 4 + 1
    noise = torch.randn(1, 4, known + 2, *latents.shape[-2:])
    noise[:, :, known:] = torch.randn(latents.shape, generator=seeded())
    frames = dict(enumerate(video[:given]))
    whole = partial(pipe, PROMPT, frames=frames, num_frames=given + 8, groups="chunk", latents=noise)
    expected = whole(actions=actions, output_type="latent").frames[:, :, known:]
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)
    other = whole(actions=some_actions(given + 8, 1), output_type="latent").frames[:, :, known:]
    assert not torch.allclose(latents, other, atol=1e-2)


@pytest.mark.parametrize("given", [0, 3, 5])
def test_steps_take_the_actions_of_their_chunks(pipe, video, given):
    actions = some_actions(14)
    start = partial(pipe.rollout, PROMPT, video[:given] if given else None, num_frames=14)
    whole = start(actions=actions, generator=seeded())
    expected = []
    while not whole.is_done:
        expected.append(whole.step())
    for overlap in (False, True):
        rollout, done = start(generator=seeded(), overlap=overlap), 0
        for chunk in expected:
            count = rollout.chunk_frames
            assert count == chunk.shape[2]
            assert torch.equal(rollout.step(actions=actions[done : done + count].numpy()), chunk)
            done += count


def test_actions_of_a_step_replace_known_ones_and_keep_later_ones(pipe):
    actions, other = some_actions(14), some_actions(4, 1)
    rollout = pipe.rollout(PROMPT, num_frames=14, actions=actions, generator=seeded(), overlap=True)
    made = [rollout.step(), rollout.step(actions=other), rollout.step(), rollout.step()]
    actions[1:5] = other
    expected = pipe.rollout(PROMPT, num_frames=14, actions=actions, generator=seeded())
    assert torch.equal(torch.cat(made, dim=2), torch.cat([expected.step() for _ in range(4)], dim=2))


def test_without_actions_they_are_unknown_and_given_ones_of_one_video_are_its_own(pipe):
    unknown = frames_of(pipe.rollout([PROMPT, PROMPT], num_frames=9, generator=[seeded(0), seeded(0)]))
    assert (unknown[0] == unknown[1]).all()
    actions = some_actions(9, videos=(2,))
    both = frames_of(pipe.rollout([PROMPT, PROMPT], num_frames=9, actions=actions, generator=[seeded(0), seeded(0)]))
    assert (both[0] != both[1]).any() and (both != unknown).any()
    one = frames_of(pipe.rollout(PROMPT, num_frames=9, actions=actions[1], generator=seeded(0)))
    assert np.abs(one.astype(int) - both[1]).max() <= 1


@pytest.mark.parametrize("overlap", [False, True])
def test_saved_rollouts_and_forks_keep_their_actions(pipe, video, tmp_path, overlap):
    options = {"actions": some_actions(17), "video_actions": some_actions(6, 1), "num_frames": 17}
    rollout = pipe.rollout({0: PROMPT, 12: OTHER}, video[:6], generator=seeded(), prompt_change="recompute", **options)
    expected = frames_of(rollout)
    rollout = pipe.rollout(
        {0: PROMPT, 12: OTHER}, video[:6], generator=seeded(), prompt_change="recompute", overlap=overlap, **options
    )
    first = next(rollout)
    rollout.save(tmp_path / "saved")
    for one in (rollout.fork(), load_rollout(tmp_path / "saved", pipe, overlap=overlap), rollout):
        assert (np.concatenate([first, frames_of(one)]) == expected).all()


def test_the_history_gives_the_cache_again_with_its_actions(pipe):
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "prompt_change": "recompute"}
    rollout = pipe.rollout(PROMPT, actions=some_actions(21), generator=seeded(), **options)
    for _ in range(3):
        rollout.step()
    cached = {key: value.clone() for key, value in rollout.state.denoiser._tensors.items()}
    history = list(rollout.state.history)
    rollout.state.denoiser = type(rollout.state.denoiser)(2, 1)
    rollout.state.history = []
    rollout._remember(history)
    for key, value in rollout.state.denoiser._tensors.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, cached[key], atol=1e-4, rtol=1e-4)


def test_a_cut_also_drops_the_actions_of_given_frames(pipe, video):
    actions = some_actions(9)
    rollout = pipe.rollout(PROMPT, video[:6], video_actions=some_actions(6, 1), actions=actions, prompt_change="cut")
    rollout.step(prompt=OTHER)
    assert torch.equal(rollout.state.actions, actions[None, 1:])


def test_guidance_steers_from_unknown_to_known_actions_also_without_prompts(randomize):
    pipe = build(randomize, tasks=["leading"])
    pipe = VideoGenPipeline(**pipe.components | {"text_encoder": None, "tokenizer": None}, **pipe.defaults)
    assert pipe.is_unprompted
    call = partial(pipe, num_inference_steps=1, output_type="latent")
    known, unknown, guided = (
        call(actions=actions, guidance_scale=scale, generator=seeded()).frames
        for actions, scale in ((some_actions(9), 1.0), (None, 1.0), (some_actions(9), 3.0))
    )
    torch.testing.assert_close(guided, unknown + 3 * (known - unknown), atol=1e-3, rtol=1e-3)
    rollout = partial(pipe.rollout, num_frames=9, num_inference_steps=1)
    one, other = (rollout(guidance_scale=scale, generator=seeded()) for scale in (1.0, 3.0))
    assert np.abs(frames_of(one).astype(int) - frames_of(other)).max() <= 1  # nothing to steer towards
    one, other = (rollout(actions=some_actions(9), guidance_scale=scale, generator=seeded()) for scale in (1.0, 3.0))
    assert (frames_of(one) != frames_of(other)).any()


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((8, 3)), r"actions must have shape \(9, 3\), got \(8, 3\)"),
        (np.zeros((9, 2)), r"actions must have shape \(9, 3\), got \(9, 2\)"),
        (np.zeros((2, 9, 3)), r"actions must have shape \(9, 3\) or \(1, 9, 3\), got \(2, 9, 3\)"),
        (np.full((9, 3), np.nan), "actions must be finite numbers, got NaN or infinity"),
        (["left"] * 9, "actions must be an array of numbers, got list"),
    ],
)
def test_invalid_actions_are_rejected(pipe, actions, message):
    for make in (pipe, pipe.rollout):
        with pytest.raises(ValueError, match=message):
            make(PROMPT, num_frames=9, actions=actions)


def test_other_checkpoints_take_no_actions(randomize, pipe, video):
    plain = build(randomize, action_dim=0)
    for make in (plain, plain.rollout):
        with pytest.raises(ValueError, match="actions must be None: this checkpoint was trained without actions"):
            make(PROMPT, num_frames=9, actions=np.zeros((9, 3)))
    with pytest.raises(ValueError, match="this checkpoint was trained without actions"):
        plain.rollout(PROMPT).step(actions=np.zeros((1, 3)))
    with pytest.raises(ValueError, match="video_actions must be those of all 5 given frames, got 4"):
        pipe.rollout(PROMPT, video[:5], video_actions=np.zeros((4, 3)))
    with pytest.raises(ValueError, match="must be None with a keyframe interval"):
        pipe.rollout(PROMPT, actions=np.zeros((9, 3)), keyframe_interval=4)


def test_a_single_channel_needs_no_axis():
    assert torch.equal(read_actions([1, 2], 1, 2, 2), torch.tensor([[[1.0], [2.0]]] * 2))
