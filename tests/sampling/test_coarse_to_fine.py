"""Coarse to fine: a rollout of frames far apart, and between them what interpolation makes of these."""

import numpy as np
import pytest
import torch

from vgen import load_rollout
from vgen.io.pixels import to_clip, to_frames
from vgen.models.prompts import encode_texts
from vgen.sampling.rollout import Rollout

from ..test_pipeline import PROMPT, make_pipeline, seeded
from .test_rollout import OTHER, build, frames_of


@pytest.fixture
def pipe(randomize):
    return build(randomize, trained_token_frames=5)


@pytest.fixture
def coarse(monkeypatch):
    """Frames of the rollouts inside, as they come."""
    chunks, make = [], Rollout.step

    def listen(self, *args):
        chunk = make(self, *args)
        chunks.append(to_frames(chunk)[0])
        return chunk

    monkeypatch.setattr(Rollout, "step", listen)
    return chunks


def filled(pipe, given, factor, **settings):
    """Given frames and what lies between them, all as decoded, from 0 to 255 and not rounded."""
    fill = pipe.interpolator(
        factor, PROMPT, size=(16, 16), frame_rate=pipe.config.frame_rate / factor, keep_given=False, **settings
    )
    fill.take(to_clip(given)[None])
    pixels = torch.cat(list(iter(lambda: fill.next(last=True), None)), dim=2)[0]
    return (pixels.clamp(-1, 1) / 2 + 0.5).movedim(0, -1).numpy() * 255


@pytest.mark.parametrize(("stride", "num_frames"), [(2, 18), (4, 1), (4, 22), (7, 30)])
def test_it_is_a_rollout_at_a_lower_rate_and_its_interpolation(pipe, coarse, monkeypatch, stride, num_frames):
    monkeypatch.setattr("vgen.sampling.interpolation.draw_noise", lambda shape, *_: torch.zeros(shape))
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0}
    frames = frames_of(
        pipe.rollout(PROMPT, keyframe_interval=stride, num_frames=num_frames, generator=seeded(), **settings)
    )
    assert len(frames) == num_frames
    given = np.concatenate(coarse)
    rate = pipe.config.frame_rate / stride
    plain = pipe.rollout(PROMPT, num_frames=len(given), frame_rate=rate, generator=seeded(), **settings)
    assert np.array_equal(frames_of(plain), given)
    assert abs(filled(pipe, given, stride, **settings)[:num_frames] - frames).max() <= 0.5


def test_it_continues_after_the_last_given_frame(pipe, coarse, video, monkeypatch):
    monkeypatch.setattr("vgen.sampling.interpolation.draw_noise", lambda shape, *_: torch.zeros(shape))
    settings = {"keyframe_interval": 4, "num_frames": 10, "num_inference_steps": 2}
    frames = frames_of(pipe.rollout(PROMPT, video, generator=seeded(), **settings))
    assert len(frames) == 10
    given = np.concatenate([video[-1:], *coarse])
    assert abs(filled(pipe, given, 4, num_inference_steps=2)[1:11] - frames).max() <= 0.5
    for index, matters in ((11, False), (8, True), (12, True)):  # only every fourth given frame is seen
        changed = video.copy()
        changed[index] = 255 - changed[index]
        again = frames_of(pipe.rollout(PROMPT, changed, generator=seeded(), **settings))
        assert np.array_equal(again, frames) != matters


def test_it_is_bounded_and_continues_bit_for_bit_after_saving(pipe, tmp_path):
    schedule = {0: PROMPT, 20: OTHER}
    rollout = pipe.rollout(schedule, keyframe_interval=4, num_frames=90, num_inference_steps=1, generator=seeded())
    pieces, held = [], []
    while len(pieces) < 3:
        pieces.append(next(rollout))
    rollout.save(tmp_path / "saved")
    loaded = load_rollout(tmp_path / "saved", pipe)
    for piece in rollout:
        pieces.append(piece)
        held.append(len(rollout.fill.state.given) + len(rollout.fill.state.finished))
    assert np.array_equal(np.concatenate(list(loaded)), np.concatenate(pieces[3:]))
    assert sum(map(len, pieces)) == 90
    assert max(held[len(held) // 2 :]) <= max(held[: len(held) // 2])


def test_prompts_change_at_their_frame_and_may_be_omitted(pipe, tmp_path):
    settings = {"keyframe_interval": 4, "num_frames": 30, "num_inference_steps": 1}
    schedule = {9: OTHER, 12: "a green star", 0: None}  # 9 and 12 are due with the same coarse frame
    rollout = pipe.rollout(schedule, generator=seeded(), **settings)
    assert rollout.coarse.state.schedule.prompts == {0: None, 3: "a green star"}
    scales = [part.sampler.guidance.scale for part in (rollout.fill, rollout.coarse)]
    assert scales == [pipe.config.guidance_scale] * 2
    frames = [next(rollout)]
    rollout.save(tmp_path / "saved")
    frames += list(rollout)
    again = load_rollout(tmp_path / "saved", pipe)
    assert np.array_equal(np.concatenate(frames[1:]), np.concatenate(list(again)))


def test_a_batch_equals_singles(pipe, video):
    settings = {"keyframe_interval": 3, "num_frames": 7, "num_inference_steps": 2}
    clips = [video[:5], video[5:10]]
    for prompts in ([PROMPT, OTHER], None):
        both = frames_of(pipe.rollout(prompts, clips, generator=[seeded(0), seeded(1)], **settings))
        for index in range(2):
            prompt = prompts and prompts[index]
            single = frames_of(pipe.rollout(prompt, clips[index], generator=seeded(index), **settings))
            assert abs(both[index].astype(int) - single).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"keyframe_interval": 0}, "at least 1, got 0"), ({"keyframe_interval": 1.5}, "integer.*, got 1.5"),
     ({"num_frames": 0}, "num_frames must be an integer of at least 1"), ({"prompt": {}}, "must start at frame 0"),
     ({"prompt": {"0": PROMPT}}, "integer.*, got '0'"), ({"height": 12}, "height must be a multiple of 8"),
     ({"keyframe_interval": 40}, "must be at most 16")],
)  # fmt: skip
def test_invalid_arguments_are_rejected(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe.rollout(**{"prompt": PROMPT, "keyframe_interval": 2} | arguments)


def test_an_unsupported_checkpoint_is_an_error():
    with pytest.raises(ValueError, match="keyframes"):
        make_pipeline(tasks=["text", "leading"], window=2).rollout(PROMPT, keyframe_interval=2)


@pytest.mark.parametrize("pieces", range(1, 5))
def test_a_resumed_rollout_encodes_no_prompt_again(pipe, tmp_path, monkeypatch, pieces):
    calls, change = [], 0.0

    def encode(*args, **kwargs):
        calls.append(args[2])
        return encode_texts(*args, **kwargs) + change

    monkeypatch.setattr("vgen.pipeline.encode_texts", encode)
    schedule = {0: PROMPT, 10: OTHER, 26: PROMPT}
    rollout = pipe.rollout(schedule, keyframe_interval=2, num_frames=48, num_inference_steps=1, generator=seeded())
    for _ in range(pieces):
        next(rollout)
    rollout.save(tmp_path / "saved")
    calls.clear()
    change = 0.1  # embeddings that are computed again differ
    expected, expected_calls = np.concatenate(list(rollout)), calls.copy()
    calls.clear()
    assert np.array_equal(np.concatenate(list(load_rollout(tmp_path / "saved", pipe))), expected)
    assert calls == expected_calls
