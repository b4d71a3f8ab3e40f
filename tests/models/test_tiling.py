import pytest
import torch
from diffusers import AutoencoderKLWan

from vgen.models.tiling import Tiling, run_tiled
from vgen.models.vae import CausalVideoVAE
from vgen.temporal.state import TemporalState

TILES = (16, 24, 8, 16)  # height, width, and their strides, in pixels


@pytest.fixture
def networks(randomize):
    config = {
        "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True, True],
        "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "scale_factor_spatial": 4,
    }  # fmt: skip
    theirs = randomize(AutoencoderKLWan(**config)).eval()
    return theirs, CausalVideoVAE.from_diffusers(theirs)


@torch.no_grad()
def test_tiled_results_equal_diffusers(networks):
    theirs, ours = networks
    for network in networks:
        network.enable_tiling(*TILES)
    torch.manual_seed(0)
    clip = torch.rand(2, 3, 5, 40, 36) * 2 - 1
    latents = torch.randn(2, 4, 2, 10, 9)
    expected = theirs.encode(clip).latent_dist.parameters
    moments = ours.encode(clip).latent_dist.parameters
    assert moments.shape == expected.shape
    # diffusers rounds the overlap of its encoder to its own unit; here both are 4 pixels to the latent
    assert torch.allclose(moments, expected, atol=1e-4)
    assert torch.allclose(ours.decode(latents).sample, theirs.decode(latents).sample, atol=1e-4)


@torch.no_grad()
def test_streamed_tiles_equal_tiles_in_one_pass(networks):
    vae = networks[1]
    vae.enable_tiling(*TILES)
    torch.manual_seed(0)
    clip, latents = torch.rand(1, 3, 10, 40, 36) * 2 - 1, torch.randn(1, 4, 4, 10, 9)
    state = TemporalState()
    moments = torch.cat([vae.encode(piece, state).latent_dist.parameters for piece in clip.split(3, dim=2)], dim=2)
    assert torch.allclose(moments, vae.encode(clip[:, :, :9]).latent_dist.parameters, atol=1e-5)
    assert torch.equal(state.pending, clip[:, :, 9:])
    state = TemporalState()
    pieces = [vae.decode(piece, state).sample for piece in latents.split([1, 2, 1], dim=2)]
    assert torch.allclose(torch.cat(pieces, dim=2), vae.decode(latents).sample, atol=1e-5)


@torch.no_grad()
def test_a_frame_within_one_tile_is_not_tiled(networks):
    vae = networks[1]
    clip = torch.rand(1, 3, 5, 16, 24) * 2 - 1
    expected = vae.encode(clip).latent_dist.parameters
    vae.enable_tiling(*TILES)
    assert torch.equal(vae.encode(clip).latent_dist.parameters, expected)


@torch.no_grad()
def test_slices_equal_the_batch_also_streamed(networks):
    vae = networks[1]
    torch.manual_seed(0)
    clip, latents = torch.rand(3, 3, 5, 8, 8) * 2 - 1, torch.randn(3, 4, 2, 2, 2)
    encoded, decoded = vae.encode(clip).latent_dist.parameters, vae.decode(latents).sample
    vae.enable_slicing()
    assert torch.allclose(vae.encode(clip).latent_dist.parameters, encoded, atol=1e-5)
    assert torch.allclose(vae.decode(latents).sample, decoded, atol=1e-5)
    state = TemporalState()
    pieces = [vae.decode(piece, state).sample for piece in latents.split(1, dim=2)]
    assert torch.allclose(torch.cat(pieces, dim=2), decoded, atol=1e-5)


def test_tiles_of_a_linear_map_that_agree_on_overlaps_give_the_map_of_the_whole():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3, 13, 11)
    out = run_tiled(lambda tile, _: 2 * tile, x, Tiling(height=6, width=5, stride_height=4, stride_width=3), 1, 1)
    assert torch.allclose(out, 2 * x, atol=1e-6)


@pytest.mark.parametrize("tiles", [(16, 16, 20, 8), (15, 16, 8, 8), (16, 16, 8, 6)])
def test_tiles_with_gaps_or_not_aligned_with_latents_raise(networks, tiles):
    with pytest.raises(ValueError, match="must be (multiples of|an integer from)"):
        networks[1].enable_tiling(*tiles)
