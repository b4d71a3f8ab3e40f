"""The tiny autoencoder: equal to recorded results of the public TAEHV code, streamed, and as the decoder of rollouts.

The weights are made from seeds. The file has what that code computes with them: frames in [0, 1], and latents.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.test_pipeline import PROMPT, make_pipeline, seeded
from vgen import TemporalState, TinyVideoVAE, VideoGenPipeline, load_rollout
from vgen.cli import app
from vgen.data.shapes import ShapesWorld, render
from vgen.data.video_io import read_video
from vgen.metrics.reference import psnr
from vgen.models.tiny_vae import load_tiny_vae

LAYOUTS = {"taew2_1": (16, 1), "taew2_2": (48, 2)}
"""Channels of the latents, and side of a patch."""


@pytest.fixture(scope="module")
def recorded():
    return load_file(Path(__file__).with_name("taehv.safetensors"))


def weights_of(name):
    """The weights of a public layout; there are twice as many as needed for the first step in time."""
    channels, patch_size = LAYOUTS[name]
    with torch.device("meta"):
        shapes = {key: one.shape for key, one in TinyVideoVAE(channels, patch_size).state_dict().items()}
    shapes["decoder.7.conv.weight"] = (512, 256, 1, 1)
    weights = {}
    for index, (key, shape) in enumerate(sorted(shapes.items())):
        scale = (0.7 / torch.Size(shape[1:]).numel()) ** 0.5 if len(shape) > 1 else 0.2
        weights[key] = torch.randn(shape, generator=torch.Generator().manual_seed(index)) * scale
    return weights


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, tmp_path_factory):
    """The name of a layout, and the network loaded from a file with the public names."""
    path = tmp_path_factory.mktemp("tiny") / f"{request.param}.safetensors"
    save_file(weights_of(request.param), path)
    return request.param, TinyVideoVAE.from_single_file(path)


@torch.no_grad()
def test_it_equals_the_public_code(layout, recorded):
    name, network = layout
    frames = network.decode(recorded[f"{name}.latents"]).sample
    expected = recorded[f"{name}.frames"]
    assert expected.std() > 0.05 and expected.shape[2] == 9
    torch.testing.assert_close((frames + 1) / 2, expected, atol=1e-5, rtol=0.0)
    encoded = network.encode(expected * 2 - 1)
    torch.testing.assert_close(encoded, recorded[f"{name}.encoded"], atol=1e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("split", [[1, 1, 1], [2, 1], [1, 2]])
def test_any_split_of_a_stream_gives_the_same_frames(layout, recorded, split):
    name, network = layout
    latents, state = recorded[f"{name}.latents"], TemporalState()
    whole = network.decode(latents).sample
    for parts in (
        [network.decode(part, state).sample for part in latents.split(split, dim=2)],
        list(network.decode_stream(latents)),
    ):
        torch.testing.assert_close(torch.cat(parts, dim=2), whole, atol=1e-5, rtol=0.0)


def test_it_is_saved_and_loaded_and_normalizes_only_if_it_has_a_mean(tmp_path):
    sizes = {"latent_channels": 2, "encoder_channels": 4, "decoder_channels": [4, 4, 4, 4]}
    network = TinyVideoVAE(**sizes, latents_mean=[1.0, 2.0], latents_std=[2.0, 4.0])
    network.save_pretrained(tmp_path)
    loaded = TinyVideoVAE.from_pretrained(tmp_path)
    latents = torch.ones(1, 2, 1, 2, 2)
    assert loaded.denormalize(latents)[0, :, 0, 0, 0].tolist() == [3.0, 6.0]
    assert TinyVideoVAE(**sizes).denormalize(latents) is latents
    assert all(torch.equal(one, loaded.state_dict()[name]) for name, one in network.state_dict().items())


def test_a_rollout_is_decoded_by_it_and_continues_after_it_was_saved(video, tmp_path):
    pipe = make_pipeline(tasks=["text", "leading"], chunk_size=1, window=2, sink=1)
    sizes = {"latent_channels": 4, "encoder_channels": 4, "decoder_channels": [4, 4, 4]}
    sizes |= {"encoder_time": [True, True], "decoder_time": [True, True]}
    tiny = TinyVideoVAE(**sizes).eval()
    options = {"height": 16, "width": 16, "num_frames": 13}
    rollout = pipe.rollout(PROMPT, generator=seeded(), decoder=tiny, **options)
    frames = [rollout.step(), rollout.step()]
    rollout.save(tmp_path / "saved")
    again = load_rollout(tmp_path / "saved", pipe, decoder=tiny)
    frames += [rollout.step(), rollout.step()]
    assert [one.shape[2] for one in frames] == [1, 4, 4, 4]
    assert torch.equal(again.step(), frames[2]) and torch.equal(again.fork().step(), frames[3])
    exact = pipe.rollout(PROMPT, generator=seeded(), **options)
    assert (exact.step() - frames[0]).abs().max() > 0.01
    with pytest.raises(ValueError, match="decoder must be for latents of 4 channels, 4 frames and 4x4 pixels, got 5"):
        pipe.rollout(PROMPT, decoder=TinyVideoVAE(**sizes | {"latent_channels": 5}), **options)
    with pytest.raises(ValueError, match="belongs to TinyVideoVAE"):
        load_rollout(tmp_path / "saved", pipe).step()


def test_a_decoder_alone_is_a_file_a_folder_or_part_of_a_checkpoint(tmp_path):
    tiny = TinyVideoVAE(latent_channels=4, encoder_channels=None, decoder_channels=[4, 4, 4, 4]).eval()
    assert not any(name.startswith("encoder") for name in tiny.state_dict())
    with pytest.raises(ValueError, match="a decoder alone"):
        tiny.encode(torch.zeros(1, 3, 1, 8, 8))
    tiny.save_pretrained(tmp_path / "own")
    tiny.save_pretrained(tmp_path / "checkpoint/tiny_decoder")
    latents = torch.randn(1, 4, 2, 2, 2)
    for source in (tmp_path / "own", tmp_path / "checkpoint"):
        loaded = load_tiny_vae(source)
        assert torch.equal(loaded(latents).sample, tiny(latents).sample) and not loaded.training
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no tiny decoder: train one with .*--distill"):
        load_tiny_vae(tmp_path / "empty")
    with pytest.raises(ValueError, match="no model 'nowhere'"):
        load_tiny_vae("nowhere")


@torch.no_grad()
def test_the_shipped_decoder_shows_what_the_vae_would():
    pipe, tiny = VideoGenPipeline.from_pretrained("vgen/shapes-64"), load_tiny_vae("vgen/shapes-64")
    world = ShapesWorld(split="all", seed=5)
    clip = render([world.scene(index) for index in range(4)])
    latents = pipe.vae.encode(clip).latent_dist.mode()
    shown = tiny.decode(pipe.vae.normalize(latents)).sample
    assert (
        psnr(shown, clip).mean() > 30 and psnr(pipe.vae.decode(latents).sample, clip).mean() > psnr(shown, clip).mean()
    )


def test_files_of_other_networks_are_refused(tmp_path):
    weights = weights_of("taew2_1")
    for name, change, message in (
        ("a", {"decoder.3.conv.0.weight": None}, "missing: decoder.3.conv.0.weight"),
        ("b", {"decoder.1.weight": None}, "missing: decoder.1.weight"),
        ("c", {"decoder.30.weight": torch.zeros(1)}, "unexpected: decoder.30.weight"),
    ):
        changed = {key: one for key, one in (weights | change).items() if one is not None}
        save_file(changed, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=message):
            TinyVideoVAE.from_single_file(tmp_path / f"{name}.safetensors")


def test_the_command_decodes_a_rollout_with_it(wan_folder, tmp_path):
    pipe = VideoGenPipeline.from_pretrained(wan_folder)
    pipe.transformer.register_to_config(tasks=["text", "leading"], group_modes=["causal"], window=2, chunk_size=1)
    pipe.register_to_config(height=32, width=32, num_inference_steps=1, guidance_scale=1.0)
    pipe.save_pretrained(tmp_path / "pipe")
    tiny = TinyVideoVAE(latent_channels=4, encoder_channels=4, decoder_channels=[4, 4, 4, 4]).eval()
    save_file(tiny.state_dict(), tmp_path / "tiny.safetensors")

    def invoke(*more):
        words = ["rollout", "a red circle", "--model", tmp_path / "pipe", "--num-frames", 5, "--scale", 1, *more]
        return CliRunner().invoke(app, [*map(str, words), "-o", str(tmp_path / "frames"), "--overwrite"])

    done = invoke("--decoder", tmp_path / "tiny.safetensors")
    assert done.exit_code == 0, done.output
    rollout = pipe.rollout("a red circle", num_frames=5, generator=torch.Generator().manual_seed(0), decoder=tiny)
    np.testing.assert_array_equal(read_video(tmp_path / "frames")[0], np.concatenate(list(rollout)))
    tiny_frames = read_video(tmp_path / "frames")[0]
    assert invoke().exit_code == 0
    assert (read_video(tmp_path / "frames")[0] != tiny_frames).any()
    for file, message in (("none.safetensors", "there is no file"), ("pipe/model_index.json", "malformed")):
        done = invoke("--decoder", tmp_path / file)
        assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output
