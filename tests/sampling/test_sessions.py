"""Rollouts and calls share weights and nothing else: in threads, after forks, step by step."""

import sys
import threading
import time

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.guiders import ClassifierFreeGuidance, SkipLayerGuidance

from vgen import RolloutOptions, load_rollout

from ..test_pipeline import PROMPT, seeded
from .test_rollout import OTHER, build, frames_of


@pytest.fixture
def pipe(randomize):
    return build(randomize, trained_token_frames=5)


def interleaved(pipe, jobs):
    """Results of jobs in threads that take turns after every evaluation of the denoiser."""
    turn, results, errors = threading.Condition(), [None] * len(jobs), []
    waiting, current = set(range(len(jobs))), [0]

    def pass_on(index):
        with turn:
            later = sorted(waiting, key=lambda other: (other <= index, other))
            current[0] = later[0] if later else index
            turn.notify_all()
            turn.wait_for(lambda: current[0] == index or index not in waiting, timeout=60)

    numbers = {}
    hook = pipe.transformer.register_forward_hook(lambda *_: pending.add(threading.get_ident()))
    pending = set()

    def on_step(pipe, step, timestep, tensors):
        pass_on(numbers[threading.get_ident()])
        return {}

    def run(index):
        numbers[threading.get_ident()] = index
        with turn:
            turn.wait_for(lambda: current[0] == index, timeout=60)
        try:
            results[index] = jobs[index](on_step)
        except Exception as error:
            errors.append(error)
        with turn:
            waiting.discard(index)
            current[0] = min(waiting, default=-1)
            turn.notify_all()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert not errors, errors
    assert len(pending) == len(jobs)
    return results


def call(pipe, seed, **arguments):
    return lambda on_step: pipe(PROMPT, generator=seeded(seed), callback_on_step_end=on_step, **arguments).frames


def roll(pipe, seed, **arguments):
    return lambda on_step: frames_of(
        pipe.rollout(PROMPT, num_frames=9, generator=seeded(seed), callback_on_step_end=on_step, **arguments)
    )


def nothing(*_):
    return {}


@pytest.mark.parametrize("make", [call, roll])
def test_two_threads_give_the_same_results_as_separate_calls(pipe, make):
    jobs = [
        make(pipe, 0, num_inference_steps=3, guidance_scale=4.0),
        make(pipe, 1, num_inference_steps=5, guidance_scale=1.0),
        make(pipe, 2, num_inference_steps=4, guider=ClassifierFreeGuidance(guidance_scale=2.0)),
    ]
    expected = [job(nothing) for job in jobs]
    for result, alone in zip(interleaved(pipe, jobs), expected, strict=True):
        assert np.array_equal(result, alone)


def test_an_interrupted_call_does_not_stop_another(pipe):
    def stop(on_step):
        def stopping(pipe, step, timestep, tensors):
            pipe._interrupt = step == 1
            return on_step(pipe, step, timestep, tensors)

        settings = {"num_inference_steps": 5, "output_type": "latent"}
        return pipe(PROMPT, generator=seeded(1), callback_on_step_end=stopping, **settings).frames

    jobs = [call(pipe, 0, num_inference_steps=5), stop]
    expected = [job(nothing) for job in jobs]
    result, stopped = interleaved(pipe, jobs)
    assert np.array_equal(result, expected[0]) and torch.equal(stopped, expected[1])


def test_threads_that_run_freely_share_a_step_cache(pipe, monkeypatch):
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    disable = pipe.transformer.disable_cache
    monkeypatch.setattr(pipe.transformer, "disable_cache", lambda: (disable(), time.sleep(0.05)))  # others may begin
    jobs = [lambda seed=seed: frames_of(pipe.rollout(PROMPT, num_frames=9, generator=seeded(seed))) for seed in (0, 1)]
    expected, results = [job() for job in jobs], [None, None]

    def run(index):
        results[index] = jobs[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(one, alone) for one, alone in zip(results, expected, strict=True))


@pytest.mark.parametrize("interval", [1, 2])
def test_iterating_is_a_loop_over_steps(pipe, interval):
    settings = {"num_frames": 11, "keyframe_interval": interval}
    expected = frames_of(pipe.rollout(PROMPT, generator=seeded(), **settings))
    rollout, chunks = pipe.rollout(PROMPT, generator=seeded(), **settings), []
    while not rollout.is_done:
        chunk = rollout.step()
        assert chunk.shape[:2] == (1, 3) and chunk.shape[3:] == (16, 16) and chunk.device == pipe.device
        chunks.append(chunk)
    clip = torch.cat(chunks, dim=2).clamp(-1, 1)
    assert abs((clip[0].movedim(0, -1).numpy() + 1) * 127.5 - expected).max() <= 0.501
    with pytest.raises(ValueError, match="all num_frames=11 new frames have been generated"):
        rollout.step()
    with pytest.raises(StopIteration):
        next(rollout)


@pytest.mark.parametrize("interval", [1, 2])
def test_a_step_takes_a_prompt_as_a_schedule_does(pipe, interval):
    settings = {"keyframe_interval": interval, "num_inference_steps": 2}
    rollout, chunks = pipe.rollout(PROMPT, generator=seeded(), **settings), []
    for _ in range(2):
        chunks.append(rollout.step())
    begin = rollout.frames_done
    chunks.append(rollout.step(OTHER))
    chunks.append(rollout.step())
    if interval == 1:
        scheduled = pipe.rollout({0: PROMPT, begin: OTHER}, generator=seeded(), **settings)
        for chunk in chunks:
            assert torch.equal(scheduled.step(), chunk)
    plain = pipe.rollout(PROMPT, generator=seeded(), **settings)
    same = [torch.equal(plain.step(), chunk) for chunk in chunks]
    assert same[:2] == [True, True] and not same[2] and not same[3]
    with pytest.raises(ValueError, match="prompt must be a string, as at the beginning"):
        rollout.step([OTHER])
    with pytest.raises(ValueError, match="actions must be None"):
        rollout.step(actions=torch.zeros(1))


@pytest.mark.parametrize("interval", [1, 2])
def test_forks_continue_as_the_original_without_forks(pipe, interval):
    settings = {"keyframe_interval": interval, "num_inference_steps": 2}
    alone = pipe.rollout(PROMPT, generator=seeded(), **settings)
    expected = [alone.step() for _ in range(6)]
    rollout = pipe.rollout(PROMPT, generator=seeded(), **settings)
    assert all(torch.equal(rollout.step(), expected[index]) for index in range(2))
    fork = rollout.fork()
    other = fork.fork()
    changed = other.step(OTHER)
    assert not torch.equal(changed, expected[2])
    for index in range(2, 6):
        assert torch.equal(rollout.step(), expected[index])
        other.step()
    for index in range(2, 6):
        assert torch.equal(fork.step(), expected[index])


def test_a_rollout_takes_embeddings(pipe):
    with torch.no_grad():  # PyTorch attends with another kernel where it needs gradients
        positive, negative = pipe.encode_prompt(PROMPT)
    settings = {"num_frames": 9, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    expected = frames_of(pipe.rollout(PROMPT, num_frames=9, generator=seeded()))
    assert np.array_equal(frames_of(pipe.rollout(generator=seeded(), **settings)), expected)
    both = settings | {"prompt_embeds": positive.repeat(2, 1, 1), "negative_prompt_embeds": negative.repeat(2, 1, 1)}
    rows = frames_of(pipe.rollout(generator=[seeded(), seeded(1)], **both))
    assert rows.shape == (2, *expected.shape) and abs(rows[0].astype(int) - expected).max() <= 1
    changed = pipe.rollout(generator=seeded(), **settings | {"num_frames": None})
    scheduled = pipe.rollout({0: PROMPT, 1: OTHER}, generator=seeded())
    torch.testing.assert_close(changed.step(), scheduled.step(), atol=1e-5, rtol=0)
    torch.testing.assert_close(changed.step(OTHER), scheduled.step(), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="either prompt or prompt_embeds"):
        pipe.rollout({0: PROMPT}, prompt_embeds=positive).step()


@pytest.mark.parametrize("history_guidance_scale", [1.0, 1.5])
def test_a_guider_of_the_same_weight_is_classifier_free_guidance(pipe, history_guidance_scale):
    settings = {"num_frames": 13, "history_guidance_scale": history_guidance_scale}
    expected = pipe.rollout(PROMPT, generator=seeded(), guidance_scale=3.0, output_type="np", **settings)
    guider = ClassifierFreeGuidance(guidance_scale=3.0)
    guided = pipe.rollout(PROMPT, generator=seeded(), guider=guider, output_type="np", **settings)
    assert abs(frames_of(guided) - frames_of(expected)).max() < 1e-4
    with pytest.raises(ValueError, match="guidance_scale or guider, not both"):
        pipe.rollout(PROMPT, guider=guider, guidance_scale=2.0)


def test_a_guider_that_skips_layers_rolls_out_and_is_resumed(pipe, tmp_path):
    from diffusers.hooks import LayerSkipConfig

    config = LayerSkipConfig(indices=[0], fqn="blocks")
    guider = SkipLayerGuidance(
        2.0, skip_layer_config=config, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1
    )
    plain = frames_of(pipe.rollout(PROMPT, num_frames=9, generator=seeded(), guidance_scale=2.0))
    rollout = pipe.rollout(PROMPT, num_frames=9, generator=seeded(), guider=guider)
    chunks = [next(rollout), next(rollout)]
    rollout.save(tmp_path / "saved")
    chunks.append(next(rollout))
    assert not np.array_equal(np.concatenate(chunks), plain)
    assert np.array_equal(next(load_rollout(tmp_path / "saved", pipe, guider=guider)), chunks[2])


def test_output_types_are_those_of_diffusers(pipe):
    settings = {"num_frames": 5, "num_inference_steps": 1}
    expected = frames_of(pipe.rollout(PROMPT, generator=seeded(), **settings))
    arrays = frames_of(pipe.rollout(PROMPT, generator=seeded(), output_type="np", **settings))
    assert arrays.dtype == np.float32 and np.array_equal((arrays * 255).round().astype(np.uint8), expected)
    tensors = torch.cat(list(pipe.rollout(PROMPT, generator=seeded(), output_type="pt", **settings)))
    assert np.array_equal(tensors.movedim(1, -1).numpy(), arrays)
    images = [
        image for chunk in pipe.rollout(PROMPT, generator=seeded(), output_type="pil", **settings) for image in chunk
    ]
    assert np.array_equal(np.stack(images), expected)


def test_callbacks_see_every_step_of_every_chunk(pipe):
    seen = []

    def listen(pipeline, step, timestep, tensors):
        seen.append((step, tensors["latents"].shape[2], pipeline.num_timesteps, pipeline.current_timestep == timestep))
        return {}

    chunks = pipe.rollout(
        PROMPT, num_frames=9, generator=seeded(), num_inference_steps=2, callback_on_step_end=listen, chunk_size=2
    )
    frames_of(chunks)
    assert seen == [(0, 1, 2, True), (1, 1, 2, True), (0, 2, 2, True), (1, 2, 2, True)]


def test_an_interruption_ends_the_chunk_and_not_the_ones_after(pipe):
    steps = []

    def stop_at_first(pipeline, step, timestep, tensors):
        steps.append(step)
        pipeline._interrupt = len(steps) == 1
        return {}

    rollout = pipe.rollout(PROMPT, generator=seeded(), num_inference_steps=3, callback_on_step_end=stop_at_first)
    rollout.step()
    rollout.step()
    assert steps == [0, 0, 1, 2]


def test_options_come_in_one_object_or_one_by_one(pipe):
    options = RolloutOptions(num_inference_steps=1, window=1, guidance_scale=2.0)
    expected = frames_of(pipe.rollout(PROMPT, num_frames=13, generator=seeded(), options=options))
    single = pipe.rollout(PROMPT, num_frames=13, generator=seeded(), **options.given())
    assert np.array_equal(frames_of(single), expected)
    overridden = pipe.rollout(PROMPT, options=options, window=2, guidance_scale=1.0).state.options
    assert (overridden.window, overridden.guidance_scale, overridden.num_inference_steps) == (2, 1.0, 1)
    with pytest.raises(TypeError, match="unexpected arguments stride: options are .*keyframe_interval"):
        pipe.rollout(PROMPT, stride=2)


def test_an_interrupt_reaches_all_calls_while_other_threads_begin_theirs(pipe):
    done, sampler, interval = threading.Event(), pipe.sampler(), sys.getswitchinterval()

    def begin():
        while not done.is_set():
            pipe.sampler()

    threads = [threading.Thread(target=begin) for _ in range(2)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for _ in range(100_000):
            pipe._interrupt = True
    finally:
        sys.setswitchinterval(interval)
        done.set()
        for thread in threads:
            thread.join()
    assert sampler.interrupt


def test_an_interrupt_reaches_forks(pipe):
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        if len(steps) == 2:
            thread = threading.Thread(target=lambda: setattr(pipe, "_interrupt", True))  # not of this call
            thread.start()
            thread.join()
        return {}

    rollout = pipe.rollout(PROMPT, num_frames=9, num_inference_steps=4, callback_on_step_end=stop, generator=seeded())
    rollout.fork().step()
    assert steps == [0, 1]
    rollout.step()
    assert steps[2:] == [0, 1, 2, 3]


def test_an_interrupt_while_prompts_are_encoded_is_kept(pipe, monkeypatch):
    encode, steps = pipe.encode_prompt, []

    def interrupted(*arguments, **named):
        pipe._interrupt = True
        return encode(*arguments, **named)

    monkeypatch.setattr(pipe, "encode_prompt", interrupted)
    pipe(PROMPT, num_inference_steps=4, callback_on_step_end=lambda *_: steps.append(1) or {})
    assert not steps


def test_guidance_changed_by_a_callback_lasts_one_chunk(pipe):
    def cut(pipe, step, timestep, tensors):
        scales.append(pipe.guidance_scale)
        if step == 1:
            pipe._guidance_scale = 1.0
        return {}

    options = {"num_inference_steps": 4, "num_frames": 9}
    results = {}
    for name, callback, scale in (("cut", cut, 3.0), ("guided", None, 3.0), ("unguided", None, 1.0)):
        scales = []
        make = pipe.rollout(PROMPT, callback_on_step_end=callback, guidance_scale=scale, generator=seeded(), **options)
        results[name] = [make.step() for _ in range(3)]
        assert scales == ([3.0, 3.0, 1.0, 1.0] * 3 if callback else [])
    for index in range(3):
        assert not torch.equal(results["cut"][index], results["guided"][index])
        assert not torch.equal(results["cut"][index], results["unguided"][index])
