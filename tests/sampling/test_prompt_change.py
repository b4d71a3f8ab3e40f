"""A change of the prompt: what is kept of the frames before it, and that nothing else changes."""

import pytest
import torch

from vgen import load_rollout
from vgen.temporal.state import TemporalState

from ..test_pipeline import PROMPT, seeded
from ..test_unet_pipeline import build as build_unet
from .test_rollout import OTHER, build, frames_of

METHODS = ("recompute", "redraw", "cut")


@pytest.fixture
def pipe(randomize):
    return build(randomize)


def after_chunks(rollout, count):
    for _ in range(count):
        next(rollout)
    return rollout


@pytest.mark.parametrize("method", METHODS)
def test_without_a_change_nothing_depends_on_it(pipe, method):
    expected = frames_of(pipe.rollout(PROMPT, num_frames=17, generator=seeded()))
    options = {"prompt_change": method, "prompt_change_strength": 0.3, "num_frames": 17}
    same = frames_of(pipe.rollout({0: PROMPT, 9: PROMPT}, generator=seeded(), **options))
    assert (same == expected).all()
    changed = frames_of(pipe.rollout({0: PROMPT, 9: OTHER}, generator=seeded(), **options))
    assert (changed[:9] == expected[:9]).all() and (changed[9:] != expected[9:]).any()


def test_redraw_is_sdedit_of_the_last_frame_which_begins_the_cache(pipe):
    options = {"num_inference_steps": 5, "guidance_scale": 2.0, "history_noise": 0.1, "prompt_change_strength": 0.5}
    rollout = after_chunks(pipe.rollout({0: PROMPT, 9: OTHER}, generator=seeded(), **options), 3)
    (latents, *_), source = rollout.state.history[-1], rollout.state.generator.clone_state()
    next(rollout)

    embeds = torch.cat(pipe.encode_prompt(OTHER)[::-1])
    scheduler = pipe.scheduler
    scheduler.set_timesteps(5)
    noise = torch.randn(latents.shape, generator=source)
    x = scheduler.scale_noise(latents, scheduler.timesteps[2:3], noise)
    scheduler.set_begin_index(2)
    with torch.no_grad():
        for timestep in scheduler.timesteps[2:]:  # half of 5 steps, rounded up
            out = pipe.transformer(x.repeat(2, 1, 1, 1, 1), timestep.expand(2), embeds, frame_rate=8.0).sample
            negative, positive = out.chunk(2)
            x = scheduler.step(negative + 2.0 * (positive - negative), timestep, x, return_dict=False)[0]
    (redrawn, level, _), (chunk, *_) = rollout.state.history
    torch.testing.assert_close(redrawn, x, atol=1e-4, rtol=1e-4)
    assert level == 0.1

    state = TemporalState(2, 1)
    with torch.no_grad():
        for frame in (redrawn, chunk):
            rows = frame.repeat(2, 1, 1, 1, 1)
            pipe.transformer(rows, torch.full((2,), 100.0), embeds, frame_rate=8.0, state=state)
    for key, value in state._tensors.items():
        torch.testing.assert_close(rollout.state.denoiser.get(key), value, atol=1e-4, rtol=1e-4)


def test_a_cut_begins_a_new_video(pipe):
    rollout = after_chunks(pipe.rollout({0: PROMPT, 9: OTHER}, generator=seeded(), prompt_change="cut"), 3)
    new = pipe.rollout(OTHER, generator=rollout.state.generator.clone_state())
    chunks = [next(rollout) for _ in range(4)]
    assert [len(chunk) for chunk in chunks] == [1, 4, 4, 4]
    assert all((chunk == next(new)).all() for chunk in chunks)


def test_a_cut_drops_given_frames_that_fill_no_latent(pipe, video):
    rollout = pipe.rollout(PROMPT, video[:7], generator=seeded(), prompt_change="cut")
    new = pipe.rollout(OTHER, generator=seeded())
    assert torch.equal(rollout.step(prompt=OTHER), new.step())


def test_redrawing_from_pure_noise_keeps_nothing(pipe):
    rollout = after_chunks(pipe.rollout({0: PROMPT, 9: OTHER}, generator=seeded(), prompt_change_strength=1.0), 3)
    new = pipe.rollout(OTHER, generator=rollout.state.generator.clone_state())
    next(rollout)
    next(new)
    torch.testing.assert_close(rollout.state.history[0][0], new.state.history[0][0], atol=1e-5, rtol=1e-5)


def test_only_the_videos_whose_prompt_changes_are_redrawn(pipe):
    rollout = pipe.rollout([PROMPT, OTHER], generator=[seeded(0), seeded(1)])
    after_chunks(rollout, 3)
    kept, *_ = rollout.state.history[-1]
    single = after_chunks(pipe.rollout(OTHER, generator=seeded(1)), 3)
    both, alone = rollout.step(prompt=[PROMPT, "a green star"]), single.step(prompt="a green star")
    redrawn, *_ = rollout.state.history[0]
    assert torch.equal(redrawn[0], kept[0]) and not torch.allclose(redrawn[1], kept[1], atol=1e-2)
    torch.testing.assert_close(both[1:], alone, atol=1e-3, rtol=0)


def test_a_cut_of_some_videos_of_a_batch_is_an_error_that_changes_nothing(pipe):
    rollout = pipe.rollout([PROMPT, OTHER], generator=seeded(), prompt_change="cut")
    same = after_chunks(pipe.rollout([PROMPT, OTHER], generator=seeded()), 2)
    after_chunks(rollout, 2)
    with pytest.raises(ValueError, match="prompts of all videos must change at the same time"):
        rollout.step(prompt=[PROMPT, "a green star"])
    assert (next(rollout) == next(same)).all()


@pytest.mark.parametrize(
    ("method", "interval"), [("recompute", 1), ("redraw", 1), ("cut", 1), ("recompute", 2), ("redraw", 2)]
)
def test_a_rollout_saved_around_a_change_continues_bit_for_bit(pipe, tmp_path, method, interval):
    options = {"prompt_change": method, "num_frames": 17, "keyframe_interval": interval, "num_inference_steps": 2}
    rollout = pipe.rollout({0: PROMPT, 5: OTHER}, generator=seeded(), **options)
    chunks = []
    while not rollout.is_done:
        rollout.save(tmp_path / str(len(chunks)))
        chunks.append(next(rollout))
    for index in range(len(chunks)):
        rest = frames_of(load_rollout(tmp_path / str(index), pipe))
        assert (rest == torch.cat([torch.from_numpy(chunk) for chunk in chunks[index:]]).numpy()).all()


def test_an_interrupt_during_redrawing_reaches_the_chunk(pipe, monkeypatch):
    rollout = after_chunks(pipe.rollout({0: PROMPT, 5: OTHER}, generator=seeded(), num_inference_steps=4), 2)
    calls, forward = [], pipe.transformer.forward

    def interrupting(*args, **kwargs):
        calls.append(kwargs.get("state"))
        pipe._interrupt = True
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", interrupting)
    next(rollout)
    # one step of redrawing, its frame written, no step of the chunk, its frame written
    assert len(calls) == 3 and calls[0] is None


def test_nothing_grows_over_changes(randomize):
    unet = build_unet(randomize)
    for pipe in (build(randomize), unet):
        rollout = pipe.rollout(PROMPT, generator=seeded(), num_inference_steps=1)
        sizes = []
        for prompt in (OTHER, PROMPT):
            rollout.step(prompt=prompt)
            after_chunks(rollout, 8)
            sizes.append((rollout.state.denoiser.num_bytes, len(rollout.state.history)))
        assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_change": "ignore"}, "prompt_change must be one of 'recompute', 'redraw', 'cut', got 'ignore'"),
        (
            {"prompt_change_strength": 0},
            "prompt_change_strength must be .* at most 1 and above 0, got 0",
        ),
        ({"prompt_change": "cut", "keyframe_interval": 2}, "prompt_change='cut' needs keyframe_interval=1, got 2"),
    ],
)
def test_invalid_options_are_rejected(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe.rollout(PROMPT, **options)
