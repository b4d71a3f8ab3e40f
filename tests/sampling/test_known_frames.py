"""Known frames: where they go, what a denoiser gets of them, and that they come back."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from vgen.io.pixels import to_pixels
from vgen.sampling.known_frames import encode_known_frames, lay_out
from vgen.temporal.grid import LatentGrid

from ..test_pipeline import PROMPT, make_pipeline, seeded
from .test_rollout import build


@pytest.mark.parametrize(("s", "p_t"), [(4, 1), (4, 2), (2, 1), (1, 1), (1, 2), (1, 3)])
def test_every_given_frame_is_used_exactly_once(s, p_t):
    num_frames = 1 + s * (4 * p_t - 1)
    random = np.random.default_rng(0)
    for share, _ in itertools.product((0.1, 0.5, 0.9), range(30)):
        given = {index for index in range(num_frames) if random.random() < share}
        run = next((index for index in range(num_frames) if index not in given), num_frames)
        whole = [n for n in range(5) if (1 + s * (n * p_t - 1) if n else 0) <= run]
        if run == num_frames or (run and not whole[-1]):
            with pytest.raises(ValueError, match="nothing is left" if run == num_frames else "frame 0"):
                lay_out(given, num_frames, LatentGrid(s, p_t))
            continue
        placement = lay_out(given, num_frames, LatentGrid(s, p_t))
        assert placement.num_leading == whole[-1] * p_t
        assert placement.leading_frames == (1 + s * (placement.num_leading - 1) if placement.num_leading else 0)
        assert set(placement.slots) == {index for index in given if index >= placement.leading_frames}
        for index, (latent, slot) in placement.slots.items():
            assert s * (latent - 1) + 1 + slot == index and 0 <= slot < s and latent >= placement.num_leading


def test_indices_out_of_range_are_named():
    for index in (-1, 9):
        with pytest.raises(ValueError, match="index from 0 to 8"):
            lay_out({0, index}, 9, LatentGrid())


def test_leading_latents_are_those_of_the_whole_clip_and_slots_hold_single_frames(make_vae):
    vae = make_vae()
    clip = torch.rand(2, 3, 9, 16, 16) * 2 - 1
    known = encode_known_frames({i: clip[:, :, i] for i in (0, 1, 2, 3, 4, 5, 8)}, 9, LatentGrid(4), vae)
    latents = vae.normalize(vae.encode(clip).latent_dist.mode())
    torch.testing.assert_close(known.leading, latents[:, :, :2], atol=1e-5, rtol=0)
    slots = known.keyframes.unflatten(1, (4, -1))
    filled = [
        (slot, latent) for slot, latent in itertools.product(range(4), range(3)) if slots[:, slot, :, latent].any()
    ]
    assert filled == [(0, 2), (3, 2)]
    for index, slot in ((5, 0), (8, 3)):
        alone = vae.normalize(vae.encode(clip[:, :, index : index + 1]).latent_dist.mode())[:, :, 0]
        torch.testing.assert_close(slots[:, slot, :-1, 2], alone, atol=1e-5, rtol=0)
        assert (slots[:, slot, -1, 2] == 1).all()


def test_a_still_keyframe_is_the_last_latent_of_a_clip_that_repeats_it(make_vae):
    vae = make_vae()
    clip = torch.rand(2, 3, 9, 16, 16) * 2 - 1
    known = encode_known_frames({i: clip[:, :, i] for i in (0, 3, 8)}, 9, LatentGrid(4), vae, still=True)
    slots = known.keyframes.unflatten(1, (4, -1))
    for index, latent, slot in ((3, 1, 2), (8, 2, 3)):
        still = clip[:, :, [index] * 5]
        expected = vae.normalize(vae.encode(still).latent_dist.mode())[:, :, 1]
        torch.testing.assert_close(slots[:, slot, :-1, latent], expected, atol=1e-5, rtol=0)


def test_images_of_every_kind_are_the_same_pixels():
    array = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).movedim(-1, 0)
    for image in (array, Image.fromarray(array), array / np.float32(255), tensor, tensor / 255):
        torch.testing.assert_close(to_pixels(image), tensor / 127.5 - 1)
    with pytest.raises(ValueError, match="expected an image .*, got shape"):
        to_pixels(array[0])
    with pytest.raises(ValueError, match="must be uint8 or floats in .0, 1., got values from"):
        to_pixels(array.astype(np.float32))


TASKS = {"tasks": ["text", "leading", "keyframes"]}


@pytest.fixture
def pipe(randomize):
    return build(randomize)


def generate(pipe, indices, video, output_type="np", **arguments):
    frames = {index: video[index] for index in indices}
    return pipe(PROMPT, frames=frames, generator=seeded(), output_type=output_type, **arguments).frames


@pytest.mark.parametrize("indices", [(0,), (0, 1, 2, 3, 4), (8,), (0, 8), (3, 6), (0, 1, 2), tuple(range(8))])
@pytest.mark.parametrize("groups", ["full", "causal", "chunk"])
def test_known_frames_come_back_and_the_rest_follows_from_them(pipe, video, indices, groups):
    frames = generate(pipe, indices, video, groups=groups)[0]
    assert np.array_equal((frames[list(indices)] * 255).round().astype(np.uint8), video[list(indices)])
    others = [index for index in range(9) if index not in indices]
    for index in indices:
        changed = video.copy()
        changed[index] = 255 - changed[index]
        assert abs(generate(pipe, indices, changed, groups=groups)[0][others] - frames[others]).max() > 1e-4


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_leading_latents_stay_exact_and_have_the_clean_timestep(pipe, video, scheduler, monkeypatch):
    import diffusers

    if scheduler.startswith("Uni"):
        pipe.scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    recorded, forward = [], pipe.transformer.forward

    def listen(*args, **kwargs):
        recorded.append((kwargs["timestep"], kwargs["groups"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", listen)
    latents = generate(pipe, range(5), video, output_type="latent", num_inference_steps=3)
    clip = torch.stack([to_pixels(frame) for frame in video[:5]], dim=1)[None]
    with torch.no_grad():
        expected = pipe.vae.normalize(pipe.vae.encode(clip).latent_dist.mode())
    assert torch.equal(latents[:, :, :2], expected)
    for timestep, groups in recorded:
        assert timestep.shape == (2, 3) and (timestep[:, :2] == 0).all() and (timestep[:, 2] > 0).all()
        assert list(groups) == [0, 0, 1]


def test_an_image_is_frame_0_and_batches_equal_singles(pipe, video):
    known = {8: video[1]}
    single = [
        pipe(PROMPT, image=image, frames=known, generator=seeded(i)).frames[0] for i, image in enumerate(video[:2])
    ]
    both = pipe([PROMPT, PROMPT], image=list(video[:2]), frames={8: video[1]}, generator=[seeded(0), seeded(1)]).frames
    assert abs(both - np.stack(single)).max() < 1e-4
    alone = pipe(PROMPT, frames={0: video[0], 8: video[1]}, generator=seeded(0)).frames[0]
    assert np.array_equal(alone, single[0])
    twice = pipe(PROMPT, image=video[0], num_videos_per_prompt=2, generator=[seeded(0), seeded(1)]).frames
    assert abs(twice[0] - pipe(PROMPT, image=video[0], generator=seeded(0)).frames[0]).max() < 1e-4


def test_pixels_are_known_without_a_vae(randomize, video):
    pipe = make_pipeline(vae=False, in_channels=3, out_channels=3, **TASKS | {"keyframe_slots": 1})
    randomize(pipe.transformer)
    frames = generate(pipe, (0, 1, 5), video)[0]
    assert np.array_equal((frames[[0, 1, 5]] * 255).round().astype(np.uint8), video[[0, 1, 5]])
    for index in (0, 1, 5):
        changed = video.copy()
        changed[index] = 255 - changed[index]
        assert abs(generate(pipe, (0, 1, 5), changed)[0][[2, 3, 4, 6]] - frames[[2, 3, 4, 6]]).max() > 1e-4


def test_known_frames_without_a_prompt_are_rejected(pipe, video):
    with pytest.raises(ValueError, match="either prompt or prompt_embeds"):
        pipe(image=video[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": {9: 0}}, "index from 0 to 8, got 9"),
        ({"frames": {"0": 0}}, "a frame index in frames must be an integer.*, got '0'"),
        ({"frames": {}}, "frames must be a non-empty dict"),
        ({"image": 0, "frames": {0: 1}}, "given twice"),
        ({"image": [0, 1]}, "expected 1 or 1 images of frame 0 for 1 prompts, got 2"),
        ({"frames": dict.fromkeys(range(9), 0)}, "nothing is left"),
        ({"image": 0, "height": 32}, "must have the size of the video, 32x16, got 16x16"),
        ({"image": "a.png"}, "expected an image .*, got str"),
    ],
)
def test_invalid_known_frames_are_rejected(pipe, video, arguments, message):
    def fill(value):
        if isinstance(value, list):
            return [fill(one) for one in value]
        return video[value] if isinstance(value, int) else value

    if "image" in arguments:
        arguments = arguments | {"image": fill(arguments["image"])}
    if "frames" in arguments:
        arguments = arguments | {"frames": {index: fill(value) for index, value in arguments["frames"].items()}}
    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, **arguments)


def test_frames_of_different_sizes_are_rejected(pipe, video):
    with pytest.raises(ValueError, match="must have the size of the video, 16x16, got 8x8"):
        pipe(PROMPT, frames={0: video[0], 4: video[1, :8, :8]})
    with pytest.raises(ValueError, match="different sizes: 16x16, 8x8"):
        pipe([PROMPT, PROMPT], image=[video[0], video[1, :8, :8]])


@pytest.mark.parametrize(
    ("tasks", "indices", "needed"), [(["text"], (0,), "leading"), (["text", "leading"], (3,), "keyframes")]
)
def test_a_checkpoint_that_was_not_trained_for_it_is_an_error(video, tasks, indices, needed):
    with pytest.raises(ValueError, match=f"trained for {needed}; this one was trained for {', '.join(tasks)}"):
        generate(make_pipeline(tasks=tasks), indices, video)
