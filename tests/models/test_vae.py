import random
from functools import partial
from unittest import mock

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from vgen.models import vae as vae_module
from vgen.models.vae import CausalVideoVAE, ChannelNorm, patchify, unpatchify
from vgen.temporal.state import TemporalState

LAYOUTS = {
    "single level": {"dim_mult": [1], "temperal_downsample": []},
    "s = 1": {"dim_mult": [1, 2], "temperal_downsample": [False]},
    "s = 2": {"dim_mult": [1, 2], "temperal_downsample": [True]},
    "two stages": {"dim_mult": [1, 2, 2], "temperal_downsample": [True, True], "num_res_blocks": 2},
    "as Wan 2.1": {"dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]},
    "stages apart": {"dim_mult": [1, 1, 2, 2], "temperal_downsample": [True, False, True]},
    "wider decoder": {"dim_mult": [1, 2, 2], "temperal_downsample": [True, True], "decoder_base_dim": 6},
    "patches": {
        "dim_mult": [1, 2, 2],
        "temperal_downsample": [True, True],
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
    },
    "residual": {
        "dim_mult": [1, 2, 4, 4],
        "temperal_downsample": [False, True, True],
        "decoder_base_dim": 6,
        "is_residual": True,
    },
}
TINY = {"base_dim": 4, "z_dim": 3, "num_res_blocks": 1}


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_clip(vae: CausalVideoVAE, frames: int, batch: int = 2) -> Tensor:
    side = vae.spatial_compression_ratio
    return draw(batch, 3, frames, 2 * side, 3 * side).tanh()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def moments(vae: CausalVideoVAE, clip: Tensor, state: TemporalState | None = None) -> Tensor:
    return vae.encode(clip, state).latent_dist.parameters


def stream_encode(vae: CausalVideoVAE, clip: Tensor, pieces: list[int], state: TemporalState | None = None) -> Tensor:
    state = TemporalState() if state is None else state
    return torch.cat([moments(vae, piece, state) for piece in clip.split(pieces, dim=2)], dim=2)


def stream_decode(vae: CausalVideoVAE, latents: Tensor, pieces: list[int]) -> Tensor:
    state = TemporalState()
    out = [vae.decode(piece, state, clamp=False).sample for piece in latents.split(pieces, dim=2)]
    return torch.cat(out, dim=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_same_weights_as_diffusers_wan_vae(randomize, layout):
    config = {**TINY, **LAYOUTS[layout]}
    wan = randomize(AutoencoderKLWan(**config, latents_mean=[0.0] * 3, latents_std=[1.0] * 3))
    vae = CausalVideoVAE(**config).eval()
    vae.load_state_dict(wan.state_dict())
    for key, weight in vae.state_dict().items():
        assert torch.equal(weight, wan.state_dict()[key])

    clip = draw_clip(vae, 13)
    expected = wan.encode(clip).latent_dist.parameters
    torch.testing.assert_close(moments(vae, clip), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(stream_encode(vae, clip, [4, 3, 6]), expected, atol=1e-4, rtol=1e-4)

    latents = draw(2, 3, 4, 2, 3)
    with mock.patch.object(torch, "clamp", lambda x, **limits: x):  # diffusers' decoder always clamps
        expected = wan.decode(latents).sample
    torch.testing.assert_close(vae.decode(latents, clamp=False).sample, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(stream_decode(vae, latents, [2, 1, 1]), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vae.decode(latents).sample, expected.clamp(-1, 1), atol=1e-4, rtol=1e-4)


def test_compression_follows_from_the_layers(make_vae):
    sizes = {name: make_vae(**layout) for name, layout in LAYOUTS.items()}
    ratios = {name: (vae.temporal_compression_ratio, vae.spatial_compression_ratio) for name, vae in sizes.items()}
    assert ratios["as Wan 2.1"] == (4, 8) and ratios["patches"] == (4, 8) and ratios["single level"] == (1, 1)
    assert sizes["patches"].config.scale_factor_temporal == 4 and sizes["patches"].config.scale_factor_spatial == 8


def test_patchify_moves_pixel_squares_into_channels_and_back():
    clip = draw(2, 3, 2, 4, 6)
    assert torch.equal(unpatchify(patchify(clip, 2), 2), clip)
    assert torch.equal(patchify(clip, None), clip)


@torch.no_grad()
def test_a_frame_changes_no_latent_before_its_own(make_vae):
    vae = make_vae()
    clip = draw_clip(vae, 9, batch=1)
    before = moments(vae, clip)
    for frame in range(9):
        changed = clip.clone()
        changed[:, :, frame] += 0.5
        latent = (frame + 3) // 4
        after = moments(vae, changed)
        assert torch.equal(after[:, :, :latent], before[:, :, :latent])
        assert not torch.equal(after[:, :, latent], before[:, :, latent])


@torch.no_grad()
def test_a_latent_changes_no_frame_before_its_own(make_vae):
    vae = make_vae()
    latents = draw(1, 3, 4, 2, 3)
    before = vae.decode(latents, clamp=False).sample
    for latent in range(4):
        changed = latents.clone()
        changed[:, :, latent] += 0.5
        frame = max(0, 4 * latent - 3)
        after = vae.decode(changed, clamp=False).sample
        assert torch.equal(after[:, :, :frame], before[:, :, :frame])
        assert not torch.equal(after[:, :, frame], before[:, :, frame])


@pytest.mark.parametrize("layout", ["two stages", "patches", "s = 2", "s = 1"])
@torch.no_grad()
def test_streamed_encoding_equals_offline_for_any_split(make_vae, layout):
    vae = make_vae(**LAYOUTS[layout])
    clip = draw_clip(vae, 13)
    offline = moments(vae, clip)
    rng = random.Random(0)
    cuts = [sorted(rng.sample(range(1, 13), rng.randint(1, 6))) for _ in range(6)]
    splits = [[b - a for a, b in zip([0, *cut], [*cut, 13], strict=True)] for cut in cuts]
    splits += [[size] * (13 // size) + [13 % size] * (13 % size > 0) for size in (1, 2, 3, 4, 5, 6, 8, 12, 13)]
    for pieces in [*splits, [0, 2, 0, 11, 0]]:
        close(stream_encode(vae, clip, pieces), offline)


@pytest.mark.parametrize("layout", ["two stages", "patches", "s = 2", "s = 1"])
@torch.no_grad()
def test_streamed_decoding_equals_offline_for_every_split(make_vae, splits, layout):
    vae = make_vae(**LAYOUTS[layout])
    latents = draw(2, 3, 5, 2, 3)
    offline = vae.decode(latents, clamp=False).sample
    for pieces in splits(5):
        close(stream_decode(vae, latents, pieces), offline)


@torch.no_grad()
def test_frames_that_complete_no_latent_are_buffered_as_pixels(make_vae):
    vae, state = make_vae(), TemporalState()
    clip = draw_clip(vae, 12)
    assert state.pending is None
    done = 0
    for size, latents, waiting in [(1, 1, 0), (2, 0, 2), (1, 0, 3), (2, 1, 1), (4, 1, 1), (2, 0, 3)]:
        out = moments(vae, clip[:, :, done : done + size], state)
        done += size
        assert out.shape == (2, 6, latents, 2, 3)
        assert torch.equal(state.pending, clip[:, :, done - waiting : done])


@torch.no_grad()
def test_a_slice_that_completes_no_latent_gives_an_empty_distribution(make_vae):
    vae, state = make_vae(), TemporalState()
    moments(vae, draw_clip(vae, 1), state)
    distribution = vae.encode(draw_clip(vae, 2), state).latent_dist
    assert distribution.mode().shape == distribution.sample().shape == (2, 3, 0, 2, 3)


@torch.no_grad()
def test_an_empty_slice_of_latents_decodes_to_no_frames(make_vae):
    vae, state = make_vae(), TemporalState()
    latents = draw(1, 3, 3, 2, 3)
    offline = vae.decode(latents).sample
    frames = [vae.decode(piece, state).sample for piece in latents.split([0, 2, 0, 1], dim=2)]
    assert [piece.shape[2] for piece in frames] == [0, 5, 0, 4]
    close(torch.cat(frames, dim=2), offline)


@torch.no_grad()
def test_encode_and_decode_may_share_a_state(make_vae):
    vae, state = make_vae(), TemporalState()
    clip = draw_clip(vae, 9)
    offline = vae.encode(clip).latent_dist.mode()
    offline_clip = vae.decode(offline, clamp=False).sample
    frames = []
    for piece in clip.split([1, 4, 4], dim=2):
        latents = vae.encode(piece, state).latent_dist.mode()
        frames.append(vae.decode(latents, state, clamp=False).sample)
    close(torch.cat(frames, dim=2), offline_clip)


@torch.no_grad()
def test_frozen_state_is_read_and_not_written(make_vae, tmp_path):
    vae, state = make_vae(), TemporalState()
    clip = draw_clip(vae, 9)
    moments(vae, clip[:, :, :3], state)
    copies = {key: tensor.clone() for key, tensor in state._tensors.items()}
    first, second = (moments(vae, clip[:, :, 3:], state.frozen()) for _ in range(2))
    assert torch.equal(first, second)
    assert copies.keys() == state._tensors.keys()
    assert all(torch.equal(state.get(key), tensor) for key, tensor in copies.items())
    assert torch.equal(moments(vae, clip[:, :, 3:], state), first)


@torch.no_grad()
def test_stream_resumed_from_a_file_continues_identically(make_vae, tmp_path):
    vae, state = make_vae(), TemporalState()
    clip, latents = draw_clip(vae, 14), draw(2, 3, 5, 2, 3)
    moments(vae, clip[:, :, :7], state)
    vae.decode(latents[:, :, :2], state)
    state.save(tmp_path / "state.safetensors")
    loaded = TemporalState.load(tmp_path / "state.safetensors")
    assert torch.equal(moments(vae, clip[:, :, 7:], loaded), moments(vae, clip[:, :, 7:], state))
    assert torch.equal(vae.decode(latents[:, :, 2:], loaded).sample, vae.decode(latents[:, :, 2:], state).sample)


@torch.no_grad()
def test_a_long_video_is_decoded_in_bounded_slices_that_equal_one_pass(make_vae):
    vae = make_vae()
    latents = draw(1, 3, 11, 2, 3)
    whole = vae.decode(latents, clamp=False).sample
    sizes = []
    vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[2]))
    vae.frames_per_slice = 8
    close(vae.decode(latents, clamp=False).sample, whole)
    assert sizes == [2, 2, 2, 2, 2, 1]
    assert vae.decode(latents).sample.abs().max() <= 1


@torch.no_grad()
@pytest.mark.parametrize("frames, sizes", [(41, [5, 8, 8, 8, 8, 4]), (5, [5]), (1, [1]), (9, [5, 4])])
def test_a_long_video_is_encoded_in_bounded_slices_that_equal_one_pass(make_vae, frames, sizes):
    vae = make_vae()
    clip = draw_clip(vae, frames)
    whole, seen = vae.encode(clip).latent_dist.parameters, []
    vae.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[2]))
    vae.frames_per_slice = 8
    close(vae.encode(clip).latent_dist.parameters, whole)
    assert seen == sizes


@torch.no_grad()
def test_decode_stream_never_holds_more_than_a_slice(make_vae):
    vae, state = make_vae(), TemporalState()
    vae.frames_per_slice = 8
    latents = draw(1, 3, 11, 2, 3)
    pieces, bytes_held, worked = [], [], []
    vae.decoder.register_forward_pre_hook(lambda module, args: worked.append(args[0].shape[2]))
    for piece in vae.decode_stream(latents, state, clamp=False):
        pieces.append(piece)
        bytes_held.append(state.num_bytes)
        assert len(worked) == len(pieces)  # nothing is decoded in advance
    assert [piece.shape[2] for piece in pieces] == [5, 8, 8, 8, 8, 4]
    assert len(set(bytes_held[1:])) == 1
    vae.frames_per_slice = 1000
    close(torch.cat(pieces, dim=2), vae.decode(latents, clamp=False).sample)


@torch.no_grad()
def test_decode_stream_of_a_frozen_state_continues_it(make_vae):
    vae, state = make_vae(), TemporalState()
    vae.frames_per_slice = 4
    latents = draw(1, 3, 5, 2, 3)
    vae.decode(latents[:, :, :2], state)
    expected = vae.decode(latents[:, :, 2:], state.frozen(), clamp=False).sample
    streamed = torch.cat(list(vae.decode_stream(latents[:, :, 2:], state.frozen(), clamp=False)), dim=2)
    close(streamed, expected)


def test_long_encoding_under_autograd_has_gradients(make_vae):
    vae = make_vae()
    vae.frames_per_slice = 4
    clip = draw_clip(vae, 9).requires_grad_()
    vae.encode(clip).latent_dist.mean[:, :, -1].sum().backward()
    assert clip.grad.abs().amax((0, 1, 3, 4)).min() > 0


def test_long_decoding_under_autograd_has_gradients(make_vae):
    vae = make_vae()
    vae.frames_per_slice = 4
    latents = draw(1, 3, 3, 2, 3).requires_grad_()
    vae.decode(latents, clamp=False).sample[:, :, -1].sum().backward()
    assert latents.grad.abs().amax((0, 1, 3, 4)).min() > 0


@pytest.mark.parametrize("frames, nearest", [(2, 1), (4, 5), (6, 5), (12, 13)])
def test_wrong_frame_counts_name_the_nearest(make_vae, frames, nearest):
    vae = make_vae()
    with pytest.raises(ValueError, match=rf"must be 4\*k \+ 1, got {frames} \(nearest: {nearest}\)"):
        vae.encode(draw_clip(vae, frames))
    with pytest.raises(ValueError, match=f"nearest: {nearest}"):
        vae(draw_clip(vae, frames))


@pytest.mark.parametrize("state", [None, TemporalState()])
def test_wrong_sizes_name_the_nearest(make_vae, state):
    with pytest.raises(ValueError, match=r"multiples of 4, got \(11, 6\) \(nearest: \(12, 8\)\)"):
        make_vae().encode(draw(1, 3, 1, 11, 6), state)


def test_forward_checks_sizes_too(make_vae):
    with pytest.raises(ValueError, match=r"nearest: \(12, 8\)"):
        make_vae()(draw(1, 3, 1, 11, 6))


def test_unsupported_layouts_raise_errors_that_name_the_setting():
    for config, name in [
        ({"attn_scales": [1.0]}, "attn_scales"),
        ({"temperal_downsample": [True]}, "temperal_downsample"),
        ({"dim_mult": [1, 3, 2], "is_residual": True}, "is_residual needs channels that are multiples"),
        ({"scale_factor_temporal": 8}, "scale_factor_temporal must be 4.*got 8"),
        ({"scale_factor_spatial": 16}, "scale_factor_spatial must be 4.*got 16"),
    ]:
        with pytest.raises(ValueError, match=name):
            CausalVideoVAE(**{**TINY, "dim_mult": [1, 2, 2], "temperal_downsample": [True, True], **config})


def test_normalize_is_the_formula_of_wan(make_vae):
    vae = make_vae(latents_mean=[0.5, -1.0, 2.0], latents_std=[2.0, 0.5, 3.0])
    latents = draw(2, 3, 2, 4, 4)
    mean = torch.tensor([0.5, -1.0, 2.0]).view(1, 3, 1, 1, 1)
    std = torch.tensor([2.0, 0.5, 3.0]).view(1, 3, 1, 1, 1)
    close(vae.normalize(latents), (latents - mean) / std)
    close(vae.denormalize(vae.normalize(latents)), latents)
    assert vae.normalize(latents.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(make_vae().normalize(latents), latents)


def test_calibrated_latents_have_zero_mean_and_unit_deviation(make_vae):
    vae = make_vae()
    latents = 3 * draw(4, 3, 2, 6, 6) + torch.tensor([1.0, -2.0, 50.0]).view(3, 1, 1, 1)
    vae.calibrate(latents)
    normalized = vae.normalize(latents).transpose(0, 1).flatten(1)
    close(normalized.mean(1), torch.zeros(3))
    close(normalized.std(1), torch.ones(3))


@torch.no_grad()
def test_saved_vae_loads_exactly_with_its_statistics(make_vae, tmp_path):
    vae = make_vae(**LAYOUTS["patches"])
    clip = draw_clip(vae, 5)
    state = TemporalState()
    before = moments(vae, clip[:, :, :1], state)
    vae.calibrate(draw(2, 3, 2, 4, 4))
    vae.save_pretrained(tmp_path)
    loaded = CausalVideoVAE.from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == vae.state_dict().keys()
    assert all(torch.equal(weight, loaded.state_dict()[key]) for key, weight in vae.state_dict().items())
    latents = loaded.encode(clip).latent_dist.mode()
    assert torch.equal(latents, vae.encode(clip).latent_dist.mode())
    assert torch.equal(loaded.normalize(latents), vae.normalize(latents))
    assert not torch.equal(loaded.normalize(latents), latents)
    assert loaded.config.scale_factor_temporal == 4 and loaded.config.patch_size == 2
    close(torch.cat([before, moments(vae, clip[:, :, 1:], state)], dim=2), moments(loaded, clip))


@torch.no_grad()
def test_stream_continues_in_a_vae_that_was_saved_and_loaded(make_vae, tmp_path):
    vae, state = make_vae(), TemporalState()
    clip = draw_clip(vae, 9)
    vae.calibrate(draw(2, 3, 2, 4, 4))
    first = moments(vae, clip[:, :, :3], state)
    vae.save_pretrained(tmp_path)
    loaded = CausalVideoVAE.from_pretrained(tmp_path).eval()
    close(torch.cat([first, moments(loaded, clip[:, :, 3:], state)], dim=2), moments(vae, clip))


def test_state_of_another_config_raises(make_vae):
    state = TemporalState()
    with torch.no_grad():
        make_vae().encode(draw(1, 3, 1, 8, 8), state)
        for call in ("encode", "decode"):
            piece = draw(1, 3, 1, 8, 8)
            with pytest.raises(ValueError, match="belongs to CausalVideoVAE .* cannot be used with CausalVideoVAE"):
                getattr(make_vae(num_res_blocks=2), call)(piece, state)


@pytest.mark.parametrize("shape", [(2, 3, 4, 16, 16), (1, 3, 4, 16, 24)])
def test_slice_of_another_batch_or_size_raises(make_vae, shape):
    vae, state = make_vae(), TemporalState()
    with torch.no_grad():
        latents = vae.encode(torch.rand(1, 3, 1, 16, 16), state).latent_dist.mode()
        with pytest.raises(ValueError, match="does not continue this stream"):
            vae.encode(torch.rand(shape), state)
        vae.decode(latents, state)
        with pytest.raises(ValueError, match="does not continue this stream"):
            vae.decode(torch.rand(shape[0], 3, 1, 4, shape[-1] // 4 + (shape[0] == 1)), state)


@torch.no_grad()
def test_failed_slice_leaves_the_state_unchanged(make_vae):
    vae, state = make_vae(), TemporalState()
    clip = draw_clip(vae, 9)
    first = moments(vae, clip[:, :, :5], state)
    handle = vae.encoder.mid_block.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        moments(vae, clip[:, :, 5:], state)
    handle.remove()
    close(torch.cat([first, moments(vae, clip[:, :, 5:], state)], dim=2), moments(vae, clip))


def test_gradient_checkpointing_gives_the_same_gradients(make_vae, counting_checkpoint):
    gradients = []
    for checkpointed in (False, True):
        vae = make_vae().train()
        if checkpointed:
            vae.enable_gradient_checkpointing(counting_checkpoint)
        generator = torch.Generator().manual_seed(0)
        output = vae(draw_clip(vae, 5), sample_posterior=True, generator=generator)
        (output.sample.square().mean() + output.latent_dist.kl().mean()).backward()
        gradients.append({name: parameter.grad for name, parameter in vae.named_parameters()})
    assert counting_checkpoint.count == len(vae.encoder.down_blocks) + 1 + 1 + len(vae.decoder.up_blocks)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_writable_state_under_gradient_checkpointing_raises(make_vae):
    vae, state = make_vae(), TemporalState()
    vae.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="would be written twice"):
        vae.encode(draw_clip(vae, 1), state)
    with pytest.raises(ValueError, match="would be written twice"):
        vae.decode(draw(1, 3, 1, 2, 3), state)
    assert state.num_bytes == 0
    with torch.no_grad():
        vae.encode(draw_clip(vae, 1), state)
    vae.encode(draw_clip(vae, 4), state.frozen()).latent_dist.mode().sum().backward()


@torch.no_grad()
def test_forward_encodes_and_decodes(make_vae):
    vae = make_vae()
    clip = draw_clip(vae, 5)
    output = vae(sample=clip)
    close(output.latent_dist.parameters, moments(vae, clip))
    close(output.sample, vae.decode(output.latent_dist.mode(), clamp=False).sample)
    drawn = [vae(clip, True, generator=torch.Generator().manual_seed(seed)).sample for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(vae(clip, False, False)[0], output.sample)


@torch.no_grad()
@pytest.mark.parametrize("tiled", [False, True])
def test_methods_are_called_as_in_diffusers(make_vae, tiled):
    """With the same positional arguments and tile sizes, the results are those of `AutoencoderKLWan`."""
    ours = make_vae()
    theirs = ours.to_diffusers()
    clip = draw(1, 3, 5, 24, 32).tanh()
    latents = draw(1, 3, 2, 6, 8)
    for vae in (ours, theirs):
        vae.tile_sample_min_height = vae.tile_sample_min_width = 16
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = 8
        if tiled:
            vae.enable_tiling()
    assert ours.tiling.stride_width == ours.tile_sample_stride_width == 8
    results = []
    for vae in (ours, theirs):
        vae.clear_cache()
        (posterior,), (decoded,) = vae.encode(clip, False), vae.decode(latents, False)
        tiles = vae.tiled_encode(clip), vae.tiled_decode(latents, False)[0], vae.tiled_decode(latents).sample
        whole = vae(clip, False, True).sample.clamp(-1, 1)
        results.append((posterior.parameters, decoded, *tiles, whole))
    for mine, other in zip(*results, strict=True):
        close(mine, other)
    ours.tile_sample_stride_width = 20
    with pytest.raises(ValueError, match="tile stride in width"):
        ours.tiled_encode(clip)


@torch.no_grad()
@pytest.mark.parametrize("option", ["tiling", "slicing"])
def test_forward_respects_tiling_and_slicing(make_vae, option):
    vae = make_vae()
    clip = draw(2, 3, 5, 16, 24).tanh()
    before = vae(clip).sample
    if option == "tiling":
        vae.enable_tiling(8, 8, 4, 4)
        close(vae(clip).sample.clamp(-1, 1), vae.tiled_decode(vae.tiled_encode(clip).chunk(2, dim=1)[0]).sample)
        assert not torch.allclose(vae(clip).sample, before, atol=1e-4)
    else:
        vae.enable_slicing()
        rows = []
        handle = vae.encoder.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
        close(vae(clip).sample, before)
        handle.remove()
        assert rows == [1, 1]


@torch.no_grad()
def test_half_precision_gives_finite_numbers_close_to_full(make_vae):
    vae = make_vae()
    clip = draw_clip(vae, 9)
    full, full_clip = moments(vae, clip), vae.decode(draw(1, 3, 3, 2, 3)).sample
    vae = vae.bfloat16()
    half = moments(vae, clip.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
    assert (half - full).abs().mean() < 0.1 * full.abs().mean()
    half_clip = vae.decode(draw(1, 3, 3, 2, 3).bfloat16()).sample
    assert half_clip.dtype == torch.bfloat16
    assert (half_clip - full_clip).abs().mean() < 0.1 * full_clip.abs().mean()
    assert stream_encode(vae, clip.bfloat16(), [2, 7]).isfinite().all()
    output = vae(clip.bfloat16())
    assert output.sample.isfinite().all() and output.latent_dist.parameters.dtype == torch.float32


@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-5, 1e-2, 1.0, 100.0])
@torch.no_grad()
def test_the_norm_of_small_and_large_vectors_is_right_in_float16(size):
    x = (size * draw(1, 8, 2, 3, 3)).half()
    torch.testing.assert_close(ChannelNorm(8)(x), ChannelNorm(8)(x.float()).half(), atol=2e-3, rtol=2e-3)


@torch.no_grad()
def test_fresh_vae_is_an_image_autoencoder_that_repeats_frames():
    torch.manual_seed(0)
    config = {**TINY, "dim_mult": [1, 2, 2], "temperal_downsample": [True, True]}
    vae = CausalVideoVAE(**config).eval()
    still = draw(1, 3, 1, 8, 8).expand(-1, -1, 9, -1, -1)
    latents = vae.encode(still).latent_dist.mode()
    close(latents, latents[:, :, :1].expand_as(latents))
    frames = vae.decode(latents, clamp=False).sample
    close(frames, frames[:, :, :1].expand_as(frames))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_of_channels_has_the_values_and_gradients_of_pytorch(dtype):
    vectors = torch.randn(2, 40, 3, 4, 5).to(dtype)
    vectors[0, :, 0, 0, 0] = 0
    vectors[0, :, 0, 0, 1] *= 1000  # beyond the range of float16 when squared
    results = []
    oracle = partial(torch.linalg.vector_norm, dim=1, keepdim=True, dtype=torch.float32)
    for length in (vae_module._length, oracle):
        x = vectors.clone().requires_grad_()
        lengths = length(x)
        (lengths * torch.arange(5)).sum().backward()
        results.append((lengths.detach(), x.grad))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(*(lengths for lengths, _ in results))
    torch.testing.assert_close(*(gradient for _, gradient in results), **tolerance)
