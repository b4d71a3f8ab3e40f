import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn

from vgen.models.convert.networks import inflate_kernel, load_inflated
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.vae import CausalVideoVAE
from vgen.temporal.conv import CausalConv3d

VAE = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [True, True],
    "scale_factor_spatial": 4, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0],
}  # fmt: skip
TRANSFORMER = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("theirs", "ours", "config"),
    [(AutoencoderKLWan, CausalVideoVAE, VAE), (WanTransformer3DModel, SpacetimeTransformer, TRANSFORMER)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(theirs, ours, config, dtype):
    torch.manual_seed(0)
    source = theirs(**config).to(dtype).eval()
    back = ours.from_diffusers(source).to_diffusers()
    assert not back.training
    expected, weights = source.state_dict(), back.state_dict()
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert {name: back.config[name] for name in config} == {name: source.config[name] for name in config}
    assert all(weights[name].dtype == expected[name].dtype for name in expected)


def test_layers_that_diffusers_lacks_are_dropped_if_zero_and_raise_otherwise():
    network = SpacetimeTransformer(**TRANSFORMER, keyframe_slots=4, frame_rate_embedding=True)
    assert isinstance(network.to_diffusers(), WanTransformer3DModel)
    for part in (network.keyframe_embedding.weight, network.frame_rate_embedder.embedder.linear_2.weight):
        part.data.fill_(1)
        with pytest.raises(ValueError, match="cannot be converted"):
            network.to_diffusers()
        part.data.zero_()
    for setting in ({"attention": "divided"}, {"residual": True}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            SpacetimeTransformer(**TRANSFORMER, **setting).to_diffusers()


def test_unsupported_layouts_raise_errors_that_name_the_setting():
    with pytest.raises(ValueError, match="temporal compression of 4 only"):
        CausalVideoVAE(**VAE | {"temperal_downsample": [False, True]}).to_diffusers()


def image_network(conv, norm):
    return nn.Sequential(conv(3, 4, 3, padding=1), norm(2, 4), nn.SiLU(), conv(4, 5, 3, padding=1))


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_an_inflated_network_maps_a_still_video_as_the_2d_network_its_image(randomize, causal):
    image = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    flat = randomize(image_network(nn.Conv2d, nn.GroupNorm))

    def conv(*args, padding):
        if causal:
            return CausalConv3d(*args, padding=padding)
        return nn.Conv3d(*args, padding=(0, padding, padding))

    network = image_network(conv, nn.GroupNorm)
    load_inflated(network, flat.state_dict())
    video = network(image[:, :, None].expand(-1, -1, 7, -1, -1))
    # without padding in time, two frames are lost to each kernel; the norm's statistics are those of equal frames
    assert video.shape[2] == (7 if causal else 3)
    for frame in video.unbind(2):
        torch.testing.assert_close(frame, flat(image), atol=1e-5, rtol=0)


def test_mismatched_2d_weights_raise_errors_that_name_them():
    flat = image_network(nn.Conv2d, nn.GroupNorm).state_dict()
    network = image_network(nn.Conv3d, nn.GroupNorm)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    for change, name in (
        ({"4.weight": torch.zeros(1)}, "4.weight"),
        ({"3.weight": torch.zeros(5, 3, 3, 3)}, "3.weight"),
    ):
        with pytest.raises(ValueError, match=rf"do not match Sequential: \['{name}'\] \(1 in total\)"):
            load_inflated(network, flat | change)
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    # norms of other ranks fit where nothing but axes of length 1 differ
    assert inflate_kernel(torch.ones(1, 1, 3, 3), 4, causal=False).sum() == 9


def test_networks_with_default_settings_convert():
    assert CausalVideoVAE(base_dim=8).to_diffusers().config.dim_mult == [1, 2, 4, 4]
