"""Interpolation: given frames stay, windows join, and every window knows where it is going."""

import numpy as np
import pytest
import torch

from vgen.io.pixels import to_clip, to_frames
from vgen.sampling.interpolation import next_window
from vgen.sampling.known_frames import encode_clip
from vgen.sampling.sampler import Sampler

from ..test_pipeline import PROMPT, make_pipeline, seeded
from .test_rollout import OTHER, build


@pytest.fixture
def pipe(randomize):
    return build(randomize, trained_token_frames=5)


@pytest.mark.parametrize("factor", [2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("count", [2, 5])
def test_given_frames_stay_and_the_others_follow_from_them(pipe, video, factor, count):
    frames = pipe.interpolate(video[:count], factor, PROMPT, generator=seeded()).frames[0]
    assert frames.shape == (factor * (count - 1) + 1, 16, 16, 3)
    assert np.array_equal((frames[::factor] * 255).round().astype(np.uint8), video[:count])
    for index in range(count):
        changed = video[:count].copy()
        changed[index] = 255 - changed[index]
        again = pipe.interpolate(changed, factor, PROMPT, generator=seeded()).frames[0]
        near = [
            i
            for i in range(max(0, factor * index - factor + 1), min(len(frames), factor * index + factor))
            if i % factor
        ]
        assert abs(again[near] - frames[near]).max() > 1e-4


@pytest.mark.parametrize("limit", [5, 9])
@pytest.mark.parametrize("sink", [0, 1])
@pytest.mark.parametrize("factor", [2, 4, 7, 16])
def test_windows_generate_every_latent_once_within_the_trained_length(limit, sink, factor):
    num_latents = 1 + -(-factor * 40 // 4)
    has_known = [any((4 * (k - 1) + 1 + j) % factor == 0 for j in range(4)) or k == 0 for k in range(num_latents)]
    generated = [0]
    while len(generated) < num_latents:
        seen, new = next_window(len(generated), num_latents, lambda latent: has_known[latent], limit, sink)
        assert set(seen) <= set(generated) and generated[-1] in seen and len(seen) + len(new) <= limit
        assert has_known[new[-1]] or new[-1] == num_latents - 1
        generated += new
    assert generated == list(range(num_latents))


def test_a_single_window_is_the_pipelines_own_call(pipe, video):
    frames = {0: video[0], 8: video[1], 16: video[2]}
    settings = {"num_frames": 17, "frame_rate": 64.0, "generator": seeded()}
    expected = pipe(PROMPT, frames=frames, **settings).frames[0]
    result = pipe.interpolate(video[:3], 8, PROMPT, generator=seeded()).frames[0]
    assert abs(result - expected).max() < 1e-4


def test_windows_continue_from_finished_latents_and_are_decoded_as_one_stream(pipe, video, monkeypatch):
    windows_seen, denoise = [], Sampler.denoise

    def listen(self, *args, known, **kwargs):
        out = denoise(self, *args, known=known, **kwargs)
        windows_seen.append((known.leading, out[:, :, known.layout.num_leading :]))
        return out

    monkeypatch.setattr(Sampler, "denoise", listen)
    frames = pipe.interpolate(video[:6], 8, PROMPT, generator=seeded(), num_inference_steps=2).frames[0]
    with torch.no_grad():  # with gradients, PyTorch uses other kernels
        finished = encode_clip(pipe.vae, to_clip(video[:1])[None])
    for leading, generated in windows_seen:
        assert torch.equal(leading[:, :, -1], finished[:, :, -1])
        assert torch.equal(leading[:, :, 0], finished[:, :, 0])
        finished = torch.cat([finished, generated], dim=2)
    assert len(windows_seen) > 1
    with torch.no_grad():
        whole = pipe.vae.decode(pipe.vae.denormalize(finished)).sample[0].movedim(0, -1)[: len(frames)]
    others = [index for index in range(len(frames)) if index % 8]
    assert abs(frames[others] - (whole / 2 + 0.5).numpy()[others]).max() < 1e-4


@pytest.mark.parametrize("factor", [3, 8])
def test_given_frames_can_be_decoded_with_the_others(pipe, video, monkeypatch, factor):
    latents, decode = [], Sampler.decode
    monkeypatch.setattr(Sampler, "decode", lambda *args: latents.append(args[1]) or decode(*args))
    given, results = to_clip(video[:6])[None], []
    for keep_given in (True, False):
        latents.clear()
        make = pipe.interpolator(factor, PROMPT, size=(16, 16), generator=seeded(), keep_given=keep_given)
        results.append(torch.cat(list(make.stream([given])), dim=2))
    kept, decoded = results
    assert torch.equal(kept[:, :, ::factor], given)
    others = [index for index in range(kept.shape[2]) if index % factor]
    assert torch.equal(kept[:, :, others], decoded[:, :, others])
    with torch.no_grad():
        whole = pipe.vae.decode(pipe.vae.denormalize(torch.cat(latents, dim=2))).sample[:, :, : decoded.shape[2]]
    assert abs(whole - decoded).max() < 1e-4
    assert abs(decoded - kept)[:, :, ::factor].amax((0, 1, 3, 4)).min() > 0.01


@pytest.mark.parametrize("factor", [3, 8])
def test_frames_that_come_one_after_another_give_the_same_video_in_bounded_memory(pipe, video, factor):
    settings = {"num_inference_steps": 2, "frame_rate": 8.0}
    frames = np.concatenate([video, video[::-1]] * 2)
    expected = pipe.interpolate(frames, factor, PROMPT, generator=seeded(), **settings).frames[0]
    make = pipe.interpolator(factor, PROMPT, size=(16, 16), generator=seeded(), **settings)
    clip, pieces, held = to_clip(frames)[None], [], []
    for piece in make.stream(clip.split(1, dim=2)):
        pieces.append(piece)
        held.append(len(make.state.given) + len(make.state.finished))
    assert abs(to_frames(torch.cat(pieces, dim=2))[0] / 255 - expected).max() < 1 / 255
    assert len(held) > 8 and max(held[len(held) // 2 :]) <= max(held[: len(held) // 2])


def test_batches_equal_singles_and_a_prompt_may_be_omitted(pipe, video):
    clips = [video[:3], video[3:6]]
    for prompts in ([PROMPT, OTHER], None, [None, OTHER]):
        both = pipe.interpolate(clips, 4, prompts, generator=[seeded(0), seeded(1)], guidance_scale=2.0).frames
        for index in range(2):
            prompt = prompts and prompts[index]
            single = pipe.interpolate(clips[index], 4, prompt, generator=seeded(index), guidance_scale=2.0).frames[0]
            assert abs(both[index] - single).max() < 1e-4
    assert pipe.interpolate(list(video[:2]), 4, output_type="pt").frames.shape == (1, 5, 3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 1}, "factor must be an integer of at least 2, got 1"),
        ({"factor": 2.5}, "factor must be an integer.*, got 2.5"),
        ({"factor": 40}, "factor must be at most 16 for this checkpoint"),
        ({"video": np.zeros((1, 16, 16, 3), np.uint8)}, "at least 2 frames"),
        ({"video": []}, "no frames"),
        ({"video": [np.zeros((16, 16, 3), np.uint8), np.zeros((8, 16, 3), np.uint8)]}, "different sizes"),
        ({"video": np.zeros((2, 12, 16, 3), np.uint8)}, "height must be a multiple of 8, got 12"),
        ({"output_type": "latent"}, "output_type"),
    ],
)
def test_invalid_arguments_are_rejected(pipe, video, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe.interpolate(**{"video": video} | arguments)


def test_an_unsupported_checkpoint_is_an_error(video):
    with pytest.raises(ValueError, match="trained for keyframes and leading"):
        make_pipeline().interpolate(video)
    with pytest.raises(ValueError, match="runs of 5 frames"):
        make_pipeline(tasks=["leading", "keyframes"], patch_size=(2, 2, 2)).interpolate(video)
