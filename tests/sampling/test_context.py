"""What a chunk attends to: the KV cache as it was left, or computed again from the latents of the window."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchLCMScheduler

from tests.test_pipeline import make_pipeline
from vgen import load_rollout

PROMPT = "a red circle moves right"
CHUNKS = {"chunk_size": 3, "first_chunk_size": 3, "window": 3, "sink": 0, "guidance_scale": 1.0}


@pytest.fixture
def pipe(randomize):
    pipe = make_pipeline(num_layers=2, tasks=["text", "leading"])
    randomize(pipe.transformer)
    randomize(pipe.vae, seed=1)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Evaluations:
    """The denoising evaluations of a rollout: the network's inputs and outputs."""

    def __init__(self, network):
        self.network, self.found = network, []
        network.register_forward_hook(self.keep, with_kwargs=True)

    def keep(self, _, args, kwargs, output):
        if kwargs.get("state") is not None and not kwargs["state"].writable:
            self.found.append((kwargs, output[0]))

    def check(self, context):
        """Compares them with one forward pass over the context and the chunk, in which chunks attend to older ones."""
        found, self.found = self.found, []
        assert found
        for inputs, output in found:
            noisy = inputs["hidden_states"]
            b, num_known, n = len(noisy), context.shape[2], noisy.shape[2]
            levels = inputs["timestep"].reshape(b, -1).expand(b, n)
            others = {name: inputs[name] for name in ("encoder_hidden_states", "frame_rate")}
            expected = self.network(
                torch.cat([context, noisy], dim=2),
                torch.cat([levels.new_zeros(b, num_known), levels], dim=1),
                groups=[index // 3 for index in range(num_known + n)],
                return_dict=False,
                **others,
            )[0][:, :, num_known:]
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [3, 6])
@pytest.mark.parametrize("context", ["recomputed", "reencoded"])
@torch.no_grad()
def test_a_chunk_attends_to_the_window_as_if_the_video_began_there(pipe, context, window):
    evaluations = Evaluations(pipe.transformer)
    rollout = pipe.rollout(PROMPT, generator=seeded(), context=context, **CHUNKS | {"window": window})
    latents, pixels = torch.zeros(1, 4, 0, 4, 4), torch.zeros(1, 3, 0, 16, 16)
    for _ in range(5):
        known = latents[:, :, -window:]
        if context == "reencoded" and latents.shape[2] > window:
            first = pixels[:, :, -(1 + 4 * (window - 1))].unsqueeze(2)  # the frame of the window's first latent
            again = pipe.vae.normalize(pipe.vae.encode(first).latent_dist.mode())
            assert (again - known[:, :, :1]).abs().max() > 0.01
            known = torch.cat([again, known[:, :, 1:]], dim=2)
        pixels = torch.cat([pixels, rollout.step()], dim=2)
        evaluations.check(known)
        latents = torch.cat([latents, *(one for one, *_ in rollout.state.history[-3:])], dim=2)


def frames_of(rollout):
    return np.concatenate(list(rollout))


def test_all_contexts_agree_until_frames_leave_the_window(pipe):
    videos = [
        frames_of(pipe.rollout(PROMPT, num_frames=45, generator=seeded(), context=context, **CHUNKS))
        for context in ("cached", "recomputed", "reencoded")
    ]
    cached, recomputed, reencoded = (video.astype(int) for video in videos)
    assert abs(cached - recomputed)[:21].max() <= 1 < abs(cached - recomputed)[21:].max()
    assert abs(recomputed - reencoded)[:21].max() <= 1 < abs(recomputed - reencoded)[21:].max()


@pytest.mark.parametrize("context", ["recomputed", "reencoded"])
def test_such_a_rollout_is_saved_forked_and_follows_its_prompts(pipe, tmp_path, context):
    options = {"generator": seeded(), "context": context, "prompt_change": "recompute"} | CHUNKS
    rollout = pipe.rollout({0: PROMPT, 33: "a blue square"}, num_frames=57, **options)
    begun = [next(rollout) for _ in range(3)]
    rollout.save(tmp_path / "saved")
    again, fork = load_rollout(tmp_path / "saved", pipe), rollout.fork()
    rest = frames_of(rollout)
    assert np.array_equal(frames_of(again), rest) and np.array_equal(frames_of(fork), rest)
    assert len(np.concatenate(begun)) + len(rest) == 57
    plain = frames_of(pipe.rollout(PROMPT, num_frames=57, **options | {"generator": seeded()}))
    assert np.array_equal(plain[:33], np.concatenate([*begun, rest])[:33]) and not np.array_equal(plain[33:], rest)


@pytest.mark.parametrize("prompt_change", ["cut", "redraw"])
def test_a_changed_prompt_forgets_decoded_frames_too(pipe, prompt_change):
    options = {"generator": seeded(), "context": "reencoded", "prompt_change": prompt_change} | CHUNKS
    rollout = pipe.rollout({0: PROMPT, 33: "a blue square"}, num_frames=69, **options)
    assert len(frames_of(rollout)) == 69
    rollout = pipe.rollout({0: PROMPT, 33: "a blue square"}, **options | {"generator": seeded()})
    for _ in range(4):
        rollout.step()
    assert rollout.state.recent.shape[2] <= 12  # those of the chunk after the change


def test_the_first_chunk_may_have_steps_of_its_own(pipe):
    pipe.scheduler = FlowMatchLCMScheduler(shift=5.0)
    pipe.register_to_config(sigmas=[1.0])
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["timestep"].max().item()), with_kwargs=True
    )
    first = [1.0, 0.75, 0.5, 0.25]
    rollout = pipe.rollout(PROMPT, generator=seeded(), first_chunk_sigmas=first, num_inference_steps=1, **CHUNKS)
    for expected in ([1000.0, 937.5, 833.3333, 625.0, 0.0], [1000.0, 0.0], [1000.0, 0.0]):
        seen.clear()
        rollout.step()  # the last evaluation writes to the cache
        assert seen == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "none"}, "context must be one of 'cached', 'recomputed', 'reencoded', got 'none'"),
        ({"first_chunk_sigmas": 0.5}, "first_chunk_sigmas must be a list of noise levels, got"),
        (
            {"first_chunk_sigmas": [1.5]},
            "each of first_chunk_sigmas must be a finite number of at most 1 and above 0, got 1.5",
        ),
    ],
)
def test_wrong_options_are_named(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe.rollout(PROMPT, **CHUNKS | options)
