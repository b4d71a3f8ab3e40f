"""Denoising ahead in a second thread changes when a chunk is made, and nothing else."""

import threading

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from vgen import load_rollout

from ..test_pipeline import PROMPT, seeded
from .test_rollout import OTHER, build, frames_of


@pytest.fixture
def pipe(randomize):
    pipe = build(randomize, trained_token_frames=5)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.5, stochastic_sampling=True)
    return pipe


def both(pipe, *arguments, seeds=(0,), **options):
    """The same rollout without and with a second thread."""
    for overlap in (False, True):
        generators = [seeded(seed) for seed in seeds]
        generator = generators if len(seeds) > 1 else generators[0]
        yield pipe.rollout(*arguments, generator=generator, overlap=overlap, **options)


def thread_of_each_chunk(rollout, monkeypatch):
    """Collects the threads in which chunks are denoised."""
    threads, denoise = [], rollout.sampler.denoise

    def listen(*arguments, **options):
        threads.append(threading.current_thread())
        return denoise(*arguments, **options)

    monkeypatch.setattr(rollout.sampler, "denoise", listen)
    return threads


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_frames": 11},
        {"history_noise": 0.1, "history_guidance_scale": 1.5},
        {"first_chunk_sigmas": [1.0, 0.9, 0.5]},
        {"context": "reencoded", "sink": 0},
    ],
)
def test_the_video_is_the_same(pipe, options):
    one, other = both(pipe, PROMPT, **{"num_frames": 20} | options)
    assert (frames_of(one) == frames_of(other)).all()


@pytest.mark.parametrize("given", [4, 5, 6])
def test_given_frames_are_continued_alike(pipe, video, given):
    one, other = both(pipe, PROMPT, video[:given], num_frames=14)
    assert (frames_of(one) == frames_of(other)).all()


def test_batches_and_their_generators_too(pipe):
    one, other = both(pipe, [PROMPT, OTHER], num_frames=14, seeds=(1, 2))
    assert (frames_of(one) == frames_of(other)).all()


@pytest.mark.parametrize("vae", [True, False])
def test_token_frames_of_two_latents(randomize, vae):
    pipe = build(randomize, patch_size=[2, 2, 2])
    if not vae:
        pipe.register_modules(vae=None)
    one, other = both(pipe, PROMPT, num_frames=20)
    assert (frames_of(one) == frames_of(other)).all()


@pytest.mark.parametrize("method", ["recompute", "redraw", "cut"])
def test_scheduled_and_spontaneous_prompts_take_effect_at_once(pipe, method):
    options = {"num_frames": 14, "prompt_change": method, "output_type": "pt"}
    scheduled, ahead = both(pipe, {0: PROMPT, 5: OTHER}, **options)
    expected = torch.cat([scheduled.step() for _ in range(4)], dim=2)
    assert torch.equal(torch.cat([ahead.step() for _ in range(4)], dim=2), expected)
    _, told = both(pipe, PROMPT, **options)
    assert torch.equal(torch.cat([told.step(prompt) for prompt in (None, None, OTHER, None)], dim=2), expected)


def test_forks_and_saved_rollouts_continue_as_without_it(pipe, tmp_path):
    one, other = both(pipe, PROMPT, num_frames=22)
    for _ in range(2):
        next(one), next(other)
    fork = other.fork()
    next(fork)
    other.save(tmp_path / "saved")
    loaded = load_rollout(tmp_path / "saved", pipe, overlap=True)
    expected = frames_of(one)
    assert (frames_of(other) == expected).all() and (frames_of(loaded) == expected).all()
    assert (frames_of(fork) == expected[len(expected) - 13 :]).all()


def test_settling_before_a_change_of_the_weights_leaves_nothing_of_the_old_ones(pipe):
    videos = []
    for rollout in both(pipe, PROMPT, num_frames=14):
        first = next(rollout)
        rollout.settle()
        weights = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
        for weight in pipe.transformer.parameters():
            weight.data.mul_(0.9)
        videos.append((first, frames_of(rollout)))
        pipe.transformer.load_state_dict(weights)
    assert (videos[0][1] == videos[1][1]).all()


def test_a_chunk_is_decoded_while_the_next_one_is_denoised(pipe, monkeypatch):
    _, rollout = both(pipe, PROMPT, num_frames=14)
    threads, decode = thread_of_each_chunk(rollout, monkeypatch), rollout.sampler.decode
    denoised = threading.Event()
    hook = pipe.transformer.register_forward_hook(
        lambda *_: denoised.set() if threading.current_thread() is not threading.main_thread() else None
    )

    def wait_and_decode(*arguments):
        assert rollout.is_done or denoised.wait(60)
        denoised.clear()
        return decode(*arguments)

    monkeypatch.setattr(rollout.sampler, "decode", wait_and_decode)
    frames_of(rollout)
    hook.remove()
    main = threading.main_thread()
    assert threads[0] is main and len(threads) > 2 and main not in threads[1:]


def test_an_interrupt_between_two_chunks_ends_neither(pipe):
    one, other = both(pipe, PROMPT, num_frames=14)
    began, interrupted = threading.Event(), threading.Event()
    next(one)

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            began.set()
            assert interrupted.wait(60)

    hook = pipe.transformer.register_forward_hook(wait)
    next(other)
    assert began.wait(60)
    pipe._interrupt = True
    interrupted.set()
    assert (frames_of(other) == frames_of(one)).all()
    hook.remove()


def test_callbacks_and_autocast_stay_in_their_thread(pipe, monkeypatch):
    _, rollout = both(pipe, PROMPT, num_frames=9, callback_on_step_end=lambda *_: {})
    threads = thread_of_each_chunk(rollout, monkeypatch)
    frames_of(rollout)
    _, rollout = both(pipe, PROMPT, num_frames=9)
    threads += thread_of_each_chunk(rollout, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        frames_of(rollout)
    assert set(threads) == {threading.main_thread()}


def test_inference_mode_reaches_the_second_thread(pipe):
    one, other = both(pipe, PROMPT, num_frames=14)
    with torch.inference_mode():
        assert (frames_of(one) == frames_of(other)).all()


def test_an_error_in_the_second_thread_is_raised_by_the_next_chunk(pipe, monkeypatch):
    _, rollout = both(pipe, PROMPT, num_frames=14)

    def fail(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(rollout.sampler, "remember", fail)
    next(rollout)
    with pytest.raises(MemoryError, match="no room"):
        next(rollout)


def test_auto_means_on_a_cpu_with_idle_cores(pipe, monkeypatch, tmp_path):
    for idle in (True, False):
        monkeypatch.setattr("vgen.pipeline.has_idle_cores", lambda idle=idle: idle)
        rollout = pipe.rollout(PROMPT, num_frames=9, overlap="auto")
        assert rollout.overlap is idle
        rollout.save(tmp_path / "saved")
        assert load_rollout(tmp_path / "saved", pipe, overlap="auto").overlap is idle
    with pytest.raises(ValueError, match="overlap must be one of False, True, 'auto', got 1"):
        pipe.rollout(PROMPT, overlap=1)
