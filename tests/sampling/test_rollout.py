"""Rollout: equal to full passes and to a slow replay, bounded, and right about what was given."""

import os
import subprocess

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor

from tests.warm import warm_python
from vgen import VideoGenPipeline, load_rollout
from vgen.io.pixels import to_clip
from vgen.models.denoiser import pack_keyframes
from vgen.sampling.known_frames import encode_clip, encode_slots
from vgen.sampling.rollout import is_saved, locked_rollout, saved_rollout
from vgen.temporal.state import TemporalState

from ..test_pipeline import PROMPT, make_pipeline, seeded

OTHER = "a blue square"


def build(randomize, **transformer):
    settings = {"tasks": ["text", "leading", "keyframes"], "chunk_size": 1, "window": 2, "sink": 1, "num_layers": 2}
    pipe = make_pipeline(**settings | transformer)
    randomize(pipe.transformer)
    if pipe.vae is not None:
        randomize(pipe.vae)
    return pipe


@pytest.fixture
def pipe(randomize):
    return build(randomize)


def frames_of(rollout):
    return np.concatenate(list(rollout), axis=-4)


def latents_of(rollout, monkeypatch):
    """All latents that a rollout finishes, and its pixels."""
    parts, denoise = [], rollout.sampler.denoise

    def listen(*args, **kwargs):
        parts.append(denoise(*args, **kwargs))
        return parts[-1]

    monkeypatch.setattr(rollout.sampler, "denoise", listen)
    pixels = frames_of(rollout)
    return torch.cat(parts, dim=2), pixels


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("given", [1, 5, 9])
def test_before_eviction_a_chunk_equals_a_full_pass_with_the_same_groups(
    randomize, video, monkeypatch, given, residual
):
    pipe = build(randomize, chunk_size=2, window=6, residual=residual)
    rollout = pipe.rollout(PROMPT, video[:given], num_frames=8, generator=seeded())
    latents, _ = latents_of(rollout, monkeypatch)
    known = (given - 1) // 4 + 1
    noise = torch.randn(1, 4, known + 2, *latents.shape[-2:])
    noise[:, :, known:] = torch.randn(latents.shape, generator=seeded())
    settings = {"frames": dict(enumerate(video[:given])), "num_frames": given + 8, "groups": "chunk"}
    whole = pipe(PROMPT, **settings, latents=noise, output_type="latent").frames
    torch.testing.assert_close(latents, whole[:, :, known:], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("chunk_size", "window", "sink", "given", "first"),
    [(1, 2, 1, 5, 1), (2, 3, 0, 0, 1), (2, 2, 2, 13, 1), (2, 2, 1, 0, 2), (1, 2, 0, 9, 3)],
)
def test_after_eviction_it_equals_a_replay_of_everything_before(
    randomize, video, monkeypatch, chunk_size, window, sink, given, first
):
    pipe = build(randomize, chunk_size=chunk_size, window=window, sink=sink)
    clip = video[:given] if given else None
    options = {"num_frames": 24, "guidance_scale": 2.0, "history_noise": 0.1, "first_chunk_size": first}
    rollout = pipe.rollout(PROMPT, clip, generator=seeded(), **options)
    latents, pixels = latents_of(rollout, monkeypatch)

    embeds = torch.cat(pipe.encode_prompt(PROMPT)[::-1])
    known = encode_clip(pipe.vae, to_clip(clip)[None]) if given else latents[:, :, :0]
    finished = [(frame, 0.0) for frame in known.split(1, dim=2) if given]
    noise_source, at = seeded(), 0
    while at < latents.shape[2]:
        length = chunk_size if finished else first
        noise = torch.randn(1, 4, length, *latents.shape[-2:], generator=noise_source)
        pipe.scheduler.set_timesteps(2)
        x = noise
        for timestep in pipe.scheduler.timesteps:
            state = TemporalState(window, sink)
            done = 0
            while done < len(finished):
                run = finished[done : done + (chunk_size if done else first)]
                if done < len(known[0, 0]) < done + len(run):
                    run = finished[done : len(known[0, 0])]
                piece = torch.cat([frame for frame, _ in run], dim=2).repeat(2, 1, 1, 1, 1)
                level = torch.tensor([1000 * level for _, level in run]).expand(2, -1)
                with torch.no_grad():
                    pipe.transformer(piece, level, embeds, frame_rate=8.0, state=state)
                done += len(run)
            with torch.no_grad():
                rows = x.repeat(2, 1, 1, 1, 1)
                out = pipe.transformer(rows, timestep.expand(2), embeds, frame_rate=8.0, state=state.frozen()).sample
            negative, positive = out.chunk(2)
            x = pipe.scheduler.step(negative + 2.0 * (positive - negative), timestep, x, return_dict=False)[0]
        torch.testing.assert_close(latents[:, :, at : at + length], x, atol=2e-4, rtol=0)
        finished += [(frame, 0.1) for frame in x.split(1, dim=2)]
        at += length

    with torch.no_grad():
        everything = pipe.vae.denormalize(torch.cat([known, latents], dim=2))
        expected = pipe.vae.decode(everything).sample[:, :, given:]
    expected = ((expected + 1) * 127.5).round().movedim(1, -1)[0, :24].numpy()
    assert abs(pixels.astype(float) - expected).max() <= 1


def test_frames_that_fill_no_latent_are_keyframes_of_the_first_chunk(pipe, video, monkeypatch):
    recorded, forward = [], pipe.transformer.forward

    def listen(*args, **kwargs):
        recorded.append(kwargs.get("keyframes"))
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", listen)
    pixels = frames_of(pipe.rollout(PROMPT, video[:7], num_frames=6, generator=seeded(), guidance_scale=1.0))
    assert pixels.shape == (6, 16, 16, 3)
    clip = to_clip(video[:7])[None]
    slots = encode_slots(pipe.vae, {(0, 0): clip[:, :, 5], (0, 1): clip[:, :, 6]})
    expected = pack_keyframes(slots, 1, 4, slots[0, 0])
    filled = [one for one in recorded if one is not None and one.any()]
    assert len(filled) == 2 and all(torch.allclose(one, expected, atol=1e-5) for one in filled)


@pytest.mark.parametrize("vae", [True, False])
def test_token_frames_of_two_latents_and_pixels_without_a_vae(randomize, video, vae):
    pixels = {} if vae else {"in_channels": 3, "out_channels": 3, "keyframe_slots": 1}
    pipe = build(randomize, vae=vae, patch_size=(2, 2, 2), **pixels)
    whole = frames_of(pipe.rollout(PROMPT, video, num_frames=12, generator=seeded()))
    assert whole.shape == (12, 16, 16, 3)
    begun = pipe.rollout(PROMPT, num_frames=9, generator=seeded())
    assert [len(chunk) for chunk in begun] == ([5, 4] if vae else [2, 2, 2, 2, 1])
    changed = video.copy()
    changed[-1] = 255 - changed[-1]
    assert not np.array_equal(frames_of(pipe.rollout(PROMPT, changed, num_frames=12, generator=seeded())), whole)


@pytest.mark.parametrize("num_frames", [1, 3, 4, 5, 11])
def test_any_number_of_new_frames_comes(pipe, num_frames):
    rollout = pipe.rollout(PROMPT, num_frames=num_frames, generator=seeded())
    assert len(frames_of(rollout)) == num_frames == rollout.frames_done
    assert np.array_equal(
        frames_of(pipe.rollout(PROMPT, num_frames=num_frames, generator=seeded())),
        frames_of(pipe.rollout(PROMPT, num_frames=20, generator=seeded()))[:num_frames],
    )


def test_batches_equal_singles(pipe, video):
    clips = [video[:5], video[4:9]]
    prompts = [PROMPT, OTHER]
    both = frames_of(pipe.rollout(prompts, clips, num_frames=9, generator=[seeded(0), seeded(1)]))
    for i in range(2):
        single = frames_of(pipe.rollout(prompts[i], clips[i], num_frames=9, generator=seeded(i)))
        assert abs(both[i].astype(int) - single).max() <= 1


def test_several_videos_need_no_prompts(pipe, video):
    clips, sources = [video[:5], video[4:9]], [seeded(0), seeded(1)]
    both = pipe.predict(clips, 6, generator=sources).frames
    assert np.array_equal(pipe.predict(np.stack(clips), 6, generator=[seeded(0), seeded(1)]).frames, both)
    prompted = pipe.predict(clips, 6, [None, OTHER], generator=[seeded(0), seeded(1)], guidance_scale=1.0).frames
    for i, prompt in ((0, None), (1, OTHER)):
        images = [image for image in clips[i]]
        assert abs(pipe.predict(images, 6, generator=seeded(i)).frames[0] - both[i]).max() <= 1.01 / 255
        alone = pipe.predict(images, 6, prompt, generator=seeded(i), guidance_scale=1.0).frames
        assert abs(alone[0] - prompted[i]).max() <= 1.01 / 255
    assert abs(prompted[1] - both[1]).max() > 2 / 255
    rollouts = [pipe.rollout(prompt, clips) for prompt in (None, [None, None], [None, OTHER])]
    assert [rollout.sampler.guidance.scale for rollout in rollouts] == [1.0, 1.0, pipe.config.guidance_scale]


def sizes_of(state):
    return state.denoiser.num_bytes, state.decoder.num_bytes, len(state.history)


def test_nothing_grows_and_other_calls_do_not_disturb(pipe):
    quiet = pipe.rollout(PROMPT, generator=seeded(), guidance_scale=2.0)
    expected = [next(quiet) for _ in range(15)]
    rollout = pipe.rollout(PROMPT, generator=seeded(), guidance_scale=2.0)
    sizes = set()
    for chunk in range(15):
        assert np.array_equal(next(rollout), expected[chunk])
        assert not any(latents.requires_grad for latents, *_ in rollout.state.history)
        pipe(OTHER, guidance_scale=1.0, num_inference_steps=3)
        if chunk >= 5:
            sizes.add(sizes_of(rollout.state))
    assert len(sizes) == 1


@pytest.mark.slow
def test_nothing_grows_over_a_thousand_chunks(randomize):
    rollout = build(randomize, num_layers=1).rollout(PROMPT, generator=seeded(), num_inference_steps=1)
    sizes = set()
    for chunk in range(1000):
        next(rollout)
        if chunk >= 5:
            sizes.add(sizes_of(rollout.state))
    assert len(sizes) == 1 and rollout.frames_done == 1 + 4 * 999


def test_a_new_prompt_recomputes_what_is_remembered_from_the_clean_latents(pipe):
    recompute = {"prompt_change": "recompute"}
    rollout = pipe.rollout({0: PROMPT, 9: OTHER}, num_frames=17, generator=seeded(), **recompute)
    same = frames_of(pipe.rollout(PROMPT, num_frames=17, generator=seeded()))
    pixels = frames_of(rollout)
    assert np.array_equal(pixels[:9], same[:9]) and not np.array_equal(pixels[9:13], same[9:13])
    late = frames_of(pipe.rollout({0: PROMPT, 6: OTHER}, num_frames=17, generator=seeded(), **recompute))
    assert np.array_equal(late, pixels)  # chunks begin at 0, 1, 5 and 9
    # the sink alone, then what the window holds, as if the video had just begun
    state = TemporalState(2, 1)
    embeds = torch.cat(pipe.encode_prompt(OTHER)[::-1])
    rollout = pipe.rollout({0: PROMPT, 17: OTHER}, generator=seeded(), **recompute)
    for _ in range(5):
        next(rollout)
    history = list(rollout.state.history)
    next(rollout)
    with torch.no_grad():
        for latents, level, _ in history:
            pipe.transformer(
                latents.repeat(2, 1, 1, 1, 1), torch.full((2,), level), embeds, frame_rate=8.0, state=state
            )
        latents = rollout.state.history[-1][0]
        level = torch.zeros(2)
        pipe.transformer(latents.repeat(2, 1, 1, 1, 1), level, embeds, frame_rate=8.0, state=state)
    for key, value in state._tensors.items():
        torch.testing.assert_close(rollout.state.denoiser.get(key), value, atol=1e-4, rtol=1e-4)


def test_without_a_prompt_it_continues_without_guidance(pipe, video):
    pixels = frames_of(pipe.rollout(None, video[:5], num_frames=4, generator=seeded()))
    assert pixels.shape == (4, 16, 16, 3)
    halfway = frames_of(pipe.rollout({0: None, 8: PROMPT}, video[:5], num_frames=9, generator=seeded()))
    assert halfway.shape == (9, 16, 16, 3)
    state = pipe.rollout(None, video[:5]).state
    assert state.negative_prompt_embeds is None
    assert torch.equal(state.prompt_embeds, pipe.encode_prompt([""], do_classifier_free_guidance=False)[0])


def test_a_prediction_is_a_rollout_gathered(pipe, video):
    expected = frames_of(pipe.rollout(PROMPT, video[:6], num_frames=7, generator=seeded()))
    frames = pipe.predict(video[:6], 7, PROMPT, generator=seeded()).frames
    assert frames.shape == (1, 7, 16, 16, 3)
    assert np.array_equal((frames[0] * 255).round().astype(np.uint8), expected)
    images = pipe.predict(video[:6], 7, PROMPT, generator=seeded(), output_type="pil", return_dict=False)[0]
    assert np.array_equal(np.stack([np.array(image) for image in images[0]]), expected)
    batch = pipe.predict([video[:5], video[5:10]], 3, [PROMPT, OTHER], output_type="pt").frames
    assert batch.shape == (2, 3, 3, 16, 16)
    assert pipe.predict(video[:5], 3).frames.shape == (1, 3, 16, 16, 3)
    for arguments, message in (({"output_type": "latent"}, "output_type"), ({"video": None}, "needs a video")):
        with pytest.raises(ValueError, match=message):
            pipe.predict(**{"video": video} | arguments)


@pytest.mark.parametrize(("given", "chunk_size"), [(1, 1), (4, 1), (13, 2), (12, 3)])
def test_given_frames_may_come_one_by_one(randomize, video, given, chunk_size):
    pipe = build(randomize, chunk_size=chunk_size, window=3)
    settings = {"num_frames": 5, "num_inference_steps": 2}
    expected = frames_of(pipe.rollout(PROMPT, video[:given], generator=seeded(), **settings))
    assert np.array_equal(
        frames_of(pipe.rollout(PROMPT, iter(video[:given]), generator=seeded(), **settings)), expected
    )


def test_half_precision(pipe, video):
    pipe.to(torch.bfloat16)
    settings = {"num_inference_steps": 2, "generator": seeded()}
    decoded = []  # frames are bytes, in which no number is infinite
    pipe.vae.decoder.register_forward_hook(lambda _, inputs, output: decoded.append((inputs[0], output)))
    for frames in (
        frames_of(pipe.rollout(PROMPT, video[:7], num_frames=6, output_type="np", **settings)),
        frames_of(pipe.rollout(PROMPT, video[:7], num_frames=6, keyframe_interval=2, output_type="np", **settings)),
        pipe.interpolate(video[:3], 3, PROMPT, **settings).frames[0],
        pipe(PROMPT, frames={0: video[0], 6: video[1]}, **settings).frames[0],
    ):
        assert frames.dtype == np.float32 and len(frames) >= 6 and np.isfinite(frames).all() and frames.std() > 0
    assert len(decoded) >= 4 and all(part.isfinite().all() for pair in decoded for part in pair)


def test_every_given_frame_matters(pipe, video):
    settings = {"num_frames": 4, "num_inference_steps": 1}
    for given in (2, 3, 4, 5, 10):
        expected = frames_of(pipe.rollout(PROMPT, video[:given], generator=seeded(), **settings))
        for index in range(given):
            changed = video[:given].copy()
            changed[index] = 255 - changed[index]
            result = frames_of(pipe.rollout(PROMPT, changed, generator=seeded(), **settings))
            assert not np.array_equal(result, expected), (given, index)


def test_history_guidance_steers_away_from_a_noisy_history(pipe, video, monkeypatch):
    settings = {"num_frames": 8, "num_inference_steps": 1, "guidance_scale": 2.0}
    results, predictions = {}, []

    def listen(network, args, kwargs, output):
        negative, positive = output[0].chunk(2)
        predictions.append((negative + 2.0 * (positive - negative), kwargs["timestep"][0]))

    pipe.transformer.register_forward_hook(listen, with_kwargs=True)
    for scale in (1.0, 1.5, 3.0):
        predictions.clear()
        rollout = pipe.rollout(PROMPT, video[:5], history_guidance_scale=scale, generator=seeded(), **settings)
        (latents,), results[scale] = denoised(rollout, monkeypatch), rollout
        levels = [time.tolist() for _, time in predictions]
        if scale == 1:
            assert levels == [[0], [0], 1000, [0]]  # two frames written, one step, its frame written
            continue
        third = pytest.approx([1000 / 3])
        assert levels == [[0], third, [0], third, 1000, 1000, [0], third]
        clean, weak = (prediction for prediction, _ in predictions[-4:-2])
        assert not torch.allclose(clean, weak, atol=1e-3)
        noise = randn_tensor(latents.shape, after_draws(latents.shape, 2))
        torch.testing.assert_close(latents, noise - (weak + scale * (clean - weak)))
    assert results[1.5].state.denoiser.num_bytes == 2 * results[1.0].state.denoiser.num_bytes


def denoised(rollout, monkeypatch):
    """The latents of the next chunk."""
    parts, denoise = [], rollout.sampler.denoise
    monkeypatch.setattr(rollout.sampler, "denoise", lambda *a, **k: parts.append(denoise(*a, **k)) or parts[-1])
    rollout.step()
    return parts


def after_draws(shape, count):
    """A seeded generator that has drawn some tensors of a shape."""
    generator = seeded()
    for _ in range(count):
        randn_tensor(shape, generator)
    return generator


def test_step_caches_stay_off_where_the_state_is_written(pipe):
    from diffusers import FirstBlockCacheConfig

    expected = frames_of(pipe.rollout(PROMPT, num_frames=9, generator=seeded()))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=-1.0))
    assert np.array_equal(frames_of(pipe.rollout(PROMPT, num_frames=9, generator=seeded())), expected)


CONTINUE = """
import sys
import numpy as np
from vgen import VideoGenPipeline, load_rollout
pipe = VideoGenPipeline.from_pretrained(sys.argv[1])
rollout = load_rollout(sys.argv[2], pipe)
np.save(sys.argv[3], np.concatenate(list(rollout), axis=-4))
"""


@pytest.mark.parametrize("batch", [False, True])
def test_a_saved_rollout_continues_bit_for_bit_in_a_new_process(pipe, video, tmp_path, batch):
    arguments = {"prompt": {0: PROMPT, 12: OTHER}, "video": video[:7], "generator": seeded()}
    if batch:
        arguments = {
            "prompt": [PROMPT, OTHER], "video": [video[:5], video[5:10]], "generator": [seeded(0), seeded(1)]
        }  # fmt: skip
    rollout = pipe.rollout(num_frames=25, history_noise=0.1, **arguments)
    pipe.save_pretrained(tmp_path / "pipe")
    pieces = []
    for index in range(3):  # at once, behind the given frames, behind new ones
        rollout.save(tmp_path / f"saved {index}")
        pieces.append(next(rollout))
    pieces.append(frames_of(rollout))
    for index in (0, 2):
        folders = tmp_path / "pipe", tmp_path / f"saved {index}"
        command = [warm_python(), "-c", CONTINUE, *folders, tmp_path / "rest.npy"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        assert np.array_equal(np.load(tmp_path / "rest.npy"), np.concatenate(pieces[index:], axis=-4))


def test_a_rollout_whose_replacement_was_interrupted_is_restored(pipe, tmp_path):
    rollout = pipe.rollout(PROMPT, generator=seeded())
    next(rollout)
    rollout.save(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / ".saved.old")
    (tmp_path / "saved.partial").mkdir()
    loaded = load_rollout(tmp_path / "saved", pipe)
    assert np.array_equal(next(loaded), next(rollout))


def test_a_rollout_is_saved_over_an_older_one_and_loaded_with_the_same_weights_only(pipe, randomize, tmp_path):
    rollout = pipe.rollout(PROMPT, num_frames=9, generator=seeded())
    for _ in range(2):
        next(rollout)
        rollout.save(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    (tmp_path / "precious").mkdir()
    with pytest.raises(ValueError, match="is not a saved rollout"):
        rollout.save(tmp_path / "precious")
    assert load_rollout(tmp_path / "saved", pipe).frames_done == rollout.frames_done == 5
    other = build(randomize)
    with torch.no_grad():
        other.transformer.proj_out.bias += 1
    with pytest.raises(ValueError, match="different denoiser than"):
        load_rollout(tmp_path / "saved", other)
    calibrated = build(randomize)
    calibrated.vae.calibrate(torch.randn(2, 4, 2, 2, 2))
    with pytest.raises(ValueError, match="different vae than"):
        load_rollout(tmp_path / "saved", calibrated)
    pipe.scheduler = type(pipe.scheduler)(shift=3.0)
    with pytest.raises(ValueError, match="different scheduler than"):
        load_rollout(tmp_path / "saved", pipe)
    with pytest.raises(ValueError, match="is not a saved rollout"):
        load_rollout(tmp_path, pipe)


def test_a_checkpoint_may_have_defaults_for_rollouts(randomize, video, tmp_path):
    own = {
        "guidance_scale": 1.5, "chunk_size": 2, "window": 3, "sink": 2, "history_noise": 0.25,
        "history_guidance_scale": 1.25, "num_inference_steps": 3,
    }  # fmt: skip
    pipe = build(randomize)
    expected = frames_of(pipe.rollout(PROMPT, num_frames=17, generator=seeded(), **own))
    clip = pipe(PROMPT, generator=seeded()).frames
    unconditional = pipe.predict(video[:5], 8, generator=seeded(), **own | {"guidance_scale": 1.0}).frames
    pipe.register_to_config(rollout_defaults=own)
    pipe.save_pretrained(tmp_path)
    loaded = VideoGenPipeline.from_pretrained(tmp_path)
    assert np.array_equal(frames_of(loaded.rollout(PROMPT, num_frames=17, generator=seeded())), expected)
    assert np.array_equal(loaded(PROMPT, generator=seeded()).frames, clip)
    assert np.array_equal(loaded.predict(video[:5], 8, generator=seeded()).frames, unconditional)
    plain = {"guidance_scale": 3.0, "chunk_size": 1, "window": 2, "sink": 1, "history_noise": 0.0,
             "history_guidance_scale": 1.0, "num_inference_steps": 2}  # fmt: skip
    expected = frames_of(build(randomize).rollout(PROMPT, num_frames=17, generator=seeded()))
    assert np.array_equal(frames_of(loaded.rollout(PROMPT, num_frames=17, generator=seeded(), **plain)), expected)


def test_unknown_rollout_defaults_are_rejected(pipe):
    with pytest.raises(ValueError, match="rollout_defaults must be some of num_inference_steps, .*, got stride"):
        VideoGenPipeline(pipe.scheduler, transformer=pipe.transformer, rollout_defaults={"stride": 2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames must be an integer of at least 1, got 0"),
        ({"num_frames": 2.0}, "num_frames must be an integer.*, got 2.0"),
        ({"generator": [seeded(), seeded()]}, "expected one generator or 1, one per video, got 2"),
        ({"prompt": {4: PROMPT}}, "must start at frame 0"),
        ({"prompt": {0: PROMPT, "8": OTHER}}, "a frame of a prompt schedule must be an integer.*, got '8'"),
        ({"prompt": (PROMPT, OTHER)}, "prompt must be a string, a list of strings, .*, got \\('a red"),
        (
            {"prompt_embeds": torch.zeros(1, 8, 32), "negative_prompt_embeds": torch.zeros(1, 3, 32)},
            "must have the shape",
        ),
        ({"window": 0}, "window must be an integer of at least 1, got 0"),
        ({"window": 1.5}, "window must be an integer.*, got 1.5"),
        ({"guidance_scale": "3"}, "guidance_scale must be a finite number.*, got '3'"),
        ({"history_noise": float("nan")}, "history_noise must be a finite number.*, got nan"),
        ({"history_noise": 1.0}, "history_noise must be a finite number of at least 0 and below 1, got 1.0"),
        ({"keyframe_interval": 0}, "keyframe_interval must be an integer of at least 1, got 0"),
        ({"max_sequence_length": 0}, "max_sequence_length must be an integer of at least 1, got 0"),
        ({"attention_kwargs": {"sale": 1.0}}, "attention_kwargs must be one of 'scale', got 'sale'"),
        ({"output_type": "latent"}, "output_type must be one of 'uint8', 'np', 'pil', 'pt', got 'latent'"),
        ({"history_guidance_scale": 2.0, "scheduler": DDIMScheduler()}, "flow-matching scheduler, got DDIM"),
        ({"video": []}, "no frames"),
        ({"video": iter([])}, "no frames"),
        ({"video": iter([np.zeros((8, 8, 3), np.uint8), np.zeros((16, 8, 3), np.uint8)])}, "different sizes: 8x8"),
        ({"video": 3}, "expected a video .*, got int"),
        ({"prompt": [PROMPT, OTHER], "video": [np.zeros((5, 16, 16, 3), np.uint8)]}, "got 1 videos for 2 prompts"),
        ({"video": [np.zeros((5, 16, 16, 3), np.uint8)] * 2}, "got 2 videos for 1 prompt"),
        ({"video": np.zeros((5, 16, 16, 3), np.uint8), "height": 32}, "must have the size 32x16, got 16x16"),
        ({"video": np.zeros((5, 12, 16, 3), np.uint8)}, "height must be a multiple of 8, got 12"),
        ({"video": [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 16, 3), np.uint8)]}, "different sizes: 8x16, 8x8"),
    ],
)
def test_invalid_arguments_are_rejected(pipe, arguments, message):
    arguments = dict(arguments)
    pipe.scheduler = arguments.pop("scheduler", pipe.scheduler)
    with pytest.raises(ValueError, match=message):
        pipe.rollout(**{"prompt": PROMPT} | arguments)


def test_an_unsupported_checkpoint_is_an_error(randomize, video):
    with pytest.raises(ValueError, match="trained for leading; this one was trained for text"):
        build(randomize, tasks=["text"]).rollout(PROMPT)
    only = build(randomize, tasks=["text", "leading"])
    assert len(next(only.rollout(PROMPT, video[:5]))) == 4
    with pytest.raises(ValueError, match="trained for keyframes"):
        only.rollout(PROMPT, video[:6])
    with pytest.raises(ValueError, match="chunk_size=2 needs a checkpoint trained with groups chunk"):
        build(randomize, group_modes=["full", "causal"]).rollout(PROMPT, chunk_size=2)
    with pytest.raises(ValueError, match="window must be an integer.*, got None"):
        build(randomize, window=None).rollout(PROMPT)
    with pytest.raises(ValueError, match="must be at most 3 token frames, as in training; got 1 . 2 . 1 = 4"):
        build(randomize, trained_token_frames=3).rollout(PROMPT)


@pytest.mark.parametrize("interval", [1, 2])
def test_a_damaged_rollout_is_an_error_that_names_the_file(pipe, tmp_path, interval):
    rollout = pipe.rollout(PROMPT, num_frames=9, num_inference_steps=1, keyframe_interval=interval)
    next(rollout)
    folder = tmp_path / "saved"
    rollout.save(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) >= 4
    for path in files:
        content = path.read_bytes()
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for damaged in (b"", content[:middle], changed, b"[" * 100_000, b"{}", b"null", b"\xff\xfe", None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"{folder}.*({path.name}|is not|of this version)") as info:
                load_rollout(folder, pipe)
            assert "\n" not in str(info.value)
            path.write_bytes(content)
    load_rollout(folder, pipe)


SAVE = """
import sys, time
from pathlib import Path
from vgen.sampling.rollout import saved_rollout

for index in range(30):
    with saved_rollout(Path(sys.argv[1])) as partial:
        for name in ("a", "b"):
            (partial / name).write_text(f"{sys.argv[2]} {index}")
        (partial / "rollout.json").write_text("{}")
"""


def test_concurrent_savers_and_readers_of_a_rollout_wait_for_each_other(tmp_path):
    folder = tmp_path / "saved"
    savers = [subprocess.Popen([warm_python(), "-c", SAVE, str(folder), name]) for name in ("one", "two")]
    while any(saver.poll() is None for saver in savers):
        with locked_rollout(folder, read_only=True):
            if is_saved(folder):
                assert (folder / "a").read_text() == (folder / "b").read_text()
    assert [saver.returncode for saver in savers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_rollout_that_stays_locked_is_an_error_that_names_the_holder(tmp_path, monkeypatch):
    monkeypatch.setattr("vgen.sampling.rollout.LOCK_WAIT", 0.2)
    with locked_rollout(tmp_path / "saved"):
        message = f"{tmp_path / 'saved'} is in use by process {os.getpid()} on "
        with pytest.raises(ValueError, match=message), saved_rollout(tmp_path / "saved"):
            pass
