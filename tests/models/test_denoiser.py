"""Filled keyframe slots, and networks that predict the difference from a linear estimate."""

from __future__ import annotations

import pytest
import torch

from vgen.models.denoiser import VARIANCE_AROUND_KNOWN, estimate_linearly, fill_keyframes, pack_keyframes
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.unet import UNet3D
from vgen.training.objective import PromptedDenoiser


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def fill_one(slots, latents, num_leading, num_slots, previous):
    """The definition, for one video: slots `(s * (c + 1), t, h, w)` and latents `(c, t, h, w)`."""
    c, t = latents.shape[:2]
    images = slots.view(num_slots, c + 1, *slots.shape[1:]).clone()
    known = {} if previous is None else {-1: previous}
    if num_leading:
        known = {num_leading * num_slots - 1: latents[:, num_leading - 1]}
    places = range(num_leading * num_slots, t * num_slots)
    for k in places:
        if images[k % num_slots, c, k // num_slots, 0, 0]:
            known[k] = images[k % num_slots, :c, k // num_slots].clone()
    for place in places:
        before = max((k for k in known if k <= place), default=None)
        after = min((k for k in known if k >= place), default=None)
        if before is None and after is None:
            continue
        before, after = (after if before is None else before), (before if after is None else after)
        share = (place - before) / max(after - before, 1)
        images[place % num_slots, :c, place // num_slots] = (1 - share) * known[before] + share * known[after]
    return images.flatten(0, 1)


@pytest.mark.parametrize("num_slots", [1, 2, 4])
def test_slots_are_filled_with_the_linear_blend_of_the_nearest_known_frames(num_slots):
    draw = seeded(num_slots)
    b, c, t, h, w = 24, 3, 5, 2, 2
    latents, previous = (torch.randn(*shape, generator=draw) for shape in ((b, c, t, h, w), (b, c, h, w)))
    num_leading = torch.randint(0, t, (b,), generator=draw)
    shares = torch.tensor([0.0, 0.1, 0.5, 1.0]).repeat(b // 4)
    mask = torch.rand(b, num_slots, 1, t, 1, 1, generator=draw) < shares[:, None, None, None, None, None]
    mask = mask & (torch.arange(t)[:, None, None] >= num_leading[:, None, None, None, None, None])
    images = torch.randn(b, num_slots, c, t, h, w, generator=draw)
    slots = (mask * torch.cat([images, torch.ones(b, num_slots, 1, t, h, w)], dim=2)).flatten(1, 2)
    for last in (None, previous):
        filled = fill_keyframes(slots, latents, num_leading, num_slots, last)
        for index in range(b):
            own = None if last is None else last[index]
            expected = fill_one(slots[index], latents[index], int(num_leading[index]), num_slots, own)
            torch.testing.assert_close(filled[index], expected)


def test_without_keyframes_the_last_known_frame_is_repeated():
    latents = torch.randn(2, 3, 4, 2, 2, generator=seeded())
    filled = fill_keyframes(None, latents, 2, 2).view(2, 2, 4, 4, 2, 2)
    assert not filled[:, :, :, :2].any() and not filled[:, :, 3].any()
    for slot in range(2):
        for latent in (2, 3):
            assert torch.equal(filled[:, slot, :3, latent], latents[:, :, 1])
    assert not fill_keyframes(None, latents, 0, 2).any()


def test_linear_estimate_is_the_conditional_mean_of_gaussian_latents():
    b, c, t = 1, 3, 4
    levels = torch.tensor([[1.0, 0.7, 0.2, 0.01]])
    shape = (b, c, t, 2, 2)
    noisy, known = torch.randn(shape, generator=seeded()), torch.randn(shape, generator=seeded(1))
    level = levels[:, None, :, None, None]
    for num_slots, variance, mean in ((0, 1.0, torch.zeros(shape)), (2, VARIANCE_AROUND_KNOWN, known)):
        # x and noise are independent, and the noisy latent is (1 - l) * x + l * noise
        covariance = (1 - level) * variance
        clean = mean + covariance / ((1 - level) ** 2 * variance + level**2) * (noisy - (1 - level) * mean)
        expected = (noisy - clean) / level
        slots = None
        if num_slots:
            slots = torch.cat([known, torch.zeros(b, 1, t, 2, 2)], dim=1).repeat(1, num_slots, 1, 1, 1)
        estimate = estimate_linearly(noisy, 1000 * levels, slots)
        torch.testing.assert_close(estimate, expected, rtol=1e-4, atol=1e-4)


TRANSFORMER = {
    "in_channels": 3, "out_channels": 3, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 16,
    "num_layers": 1, "text_dim": 8, "freq_dim": 16, "patch_size": (1, 2, 2),
}  # fmt: skip
UNET = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "temporal_head_dim": 8, "attention_head_dim": 1, "cross_attention_dim": 8,
}  # fmt: skip
NETWORKS = {"transformer": (SpacetimeTransformer, TRANSFORMER), "unet": (UNet3D, UNET)}


def make_residual(kind):
    torch.manual_seed(0)
    make, settings = NETWORKS[kind]
    return make(**settings, residual=True, keyframe_slots=2).eval()


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_fresh_residual_network_gives_the_linear_estimate(kind):
    network = make_residual(kind)
    noisy, levels = torch.randn(2, 3, 4, 4, 4), torch.tensor([[0.0, 300.0, 700.0, 1000.0]] * 2)
    slots = pack_keyframes({(2, 1): torch.randn(2, 3, 4, 4)}, 4, 2, noisy[:, :, 0])
    slots = fill_keyframes(slots, noisy, 1, 2)
    with torch.no_grad():
        out = network(noisy, levels, None, keyframes=slots).sample
        torch.testing.assert_close(out, estimate_linearly(noisy, levels, slots))
        half = network.bfloat16()(noisy.bfloat16(), levels, None, keyframes=slots.bfloat16()).sample
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), out, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", NETWORKS)
def test_training_fills_the_slots_of_each_video(kind):
    network = make_residual(kind)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    latents, levels, leading = torch.randn(2, 3, 4, 4, 4), torch.rand(2, 4) * 1000, torch.tensor([1, 3])
    slots = pack_keyframes({(3, 1): torch.randn(2, 3, 4, 4)}, 4, 2, latents[:, :, 0])
    model = PromptedDenoiser(network, None)
    with torch.no_grad():
        for own in (slots, None):
            filled = torch.cat(
                [
                    fill_keyframes(None if own is None else own[[index]], latents[[index]], int(leading[index]), 2)
                    for index in range(2)
                ]
            )
            expected = network(latents, levels, None, keyframes=filled).sample
            given = {} if own is None else {"keyframes": own}
            torch.testing.assert_close(model(latents, levels, num_leading=leading, **given), expected)
