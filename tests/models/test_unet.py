"""UNet3D: every frame as the 2D network gives it, time causal, streamed equal to offline."""

import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file, save_file

from vgen.models.unet import Context, UNet3D
from vgen.temporal.attention import FrameCache, make_groups, rotate
from vgen.temporal.state import TemporalState

from .test_transformer import check_half_precision

TINY = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 4,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 5, "attention_head_dim": 2,
}  # fmt: skip
LAYOUTS = {
    "1.5": {},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "2.1": {"attention_head_dim": (1, 2), "use_linear_projection": True, "upcast_attention": True},
    "deeper": {"block_out_channels": (8, 16, 16), "layers_per_block": 2, "transformer_layers_per_block": 2,
               "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
               "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")},
}  # fmt: skip


def make(randomize, seed=0, **config):
    return randomize(UNet3D(**TINY | {"temporal_head_dim": 8} | config), seed)


def inputs(b=2, n=5, size=8):
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(b, 3, n, size, size, generator=generator),
        torch.rand(b, n, generator=generator) * 1000,
        torch.randn(b, 4, 5, generator=generator),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_every_frame_of_a_freshly_inflated_network_equals_the_2d_network(randomize, layout):
    flat = randomize(UNet2DConditionModel(**TINY | LAYOUTS[layout]))
    beyond = {"temporal_head_dim": 8, "keyframe_slots": 4, "frame_rate_embedding": True, "non_local": True}
    video = UNet3D.from_unet2d(flat, **beyond).eval()
    latents, levels, prompt = inputs()
    frames = video(
        latents, levels, prompt, frame_rate=8.0, keyframes=torch.randn(2, 16, 5, 8, 8), groups="causal"
    ).sample
    for index in range(5):
        expected = flat(latents[:, :, index], levels[:, index], prompt).sample
        torch.testing.assert_close(frames[:, :, index], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_masked_prompts_equal_those_of_the_2d_network(randomize):
    flat = randomize(UNet2DConditionModel(**TINY))
    latents, levels, prompt = inputs(n=3)
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]])
    video = UNet3D.from_unet2d(flat, temporal_head_dim=8)
    out = video(latents, levels, prompt, encoder_attention_mask=mask).sample
    for index in range(3):
        expected = flat(latents[:, :, index], levels[:, index], prompt, encoder_attention_mask=mask.bool()).sample
        torch.testing.assert_close(out[:, :, index], expected, atol=1e-5, rtol=0)
    scalar = video(latents, 500, prompt).sample
    torch.testing.assert_close(scalar, video(latents, torch.full((2,), 500.0), prompt).sample, atol=0, rtol=0)
    with pytest.raises(ValueError, match="one prompt for each of 2 videos, got 3"):
        video(latents, levels, prompt[[0, 1, 1]])


def test_mismatched_2d_weights_raise_errors_that_name_the_keys(randomize, tmp_path):
    flat = randomize(UNet2DConditionModel(**TINY))
    flat.save_pretrained(tmp_path / "unet")
    inflated = UNet3D.from_unet2d(tmp_path, subfolder="unet")
    assert torch.equal(inflated.conv_in.weight, flat.conv_in.weight)
    path = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({name: weight for name, weight in weights.items() if name != "conv_in.bias"}, path)
    with pytest.raises(ValueError, match="missing keys: .*conv_in.bias"):
        UNet3D.from_unet2d(tmp_path / "unet")
    save_file(weights | {"conv_more.bias": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="unexpected keys: .*conv_more.bias"):
        UNet3D.from_unet2d(str(tmp_path / "unet"))
    flat.conv_more = torch.nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="unexpected .*conv_more"):
        UNet3D.from_unet2d(flat)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type must be None, got 'timestep'"),
        (
            {"addition_embed_type": "text", "addition_embed_type_num_heads": 1},
            "addition_embed_type must be None, got 'text'",
        ),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 8,
            },
            "addition_embed_type must be None, got 'text_time'",
        ),  # SDXL
        ({"transformer_layers_per_block": (1, 2)}, "transformer_layers_per_block must be a single integer"),
    ],
)
def test_unsupported_layouts_raise_errors_that_name_the_setting(config, message):
    with pytest.raises(ValueError, match=message):
        UNet3D.from_unet2d(UNet2DConditionModel(**TINY | config))


def test_settings_of_the_2d_network_cannot_be_overridden():
    with pytest.raises(ValueError, match="cannot be overridden: attention_head_dim, norm_num_groups"):
        UNet3D.from_unet2d(UNet2DConditionModel(**TINY), norm_num_groups=2, attention_head_dim=4, window=3)


@pytest.mark.parametrize("non_local", [False, True])
@pytest.mark.parametrize("groups", ["causal", [0, 1, 1, 2, 2], "full"])
@torch.no_grad()
def test_groups_decide_which_frames_affect_which(randomize, groups, non_local):
    network = make(randomize, non_local=non_local)
    latents, levels, prompt = inputs()
    numbers = make_groups(groups, 5) if isinstance(groups, str) else groups
    out = network(latents, levels, prompt, groups=groups).sample
    for index in range(5):
        changed = latents.clone()
        changed[:, :, index] += 1
        moved = (network(changed, levels, prompt, groups=groups).sample - out).abs().amax((0, 1, 3, 4)) > 1e-6
        # attention reaches frames of the same or later groups, convolutions reach later frames
        sees = [numbers[index] <= numbers[other] or index <= other for other in range(5)]
        assert moved.tolist() == sees


def zero_last_layers(network, *names):
    """Zeroes the weights of temporal layers by name."""
    for name, weight in network.named_parameters():
        if any(part in name for part in names):
            weight.data.zero_()


@torch.no_grad()
def test_after_a_gap_only_convolutions_see_their_context(randomize):
    network = make(randomize, non_local=True)
    latents, levels, prompt = inputs()
    context, gap = torch.randn(2, 3, 2, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([2, 5])

    def run(**options):
        return network(latents, levels, prompt, groups="causal", **options).sample

    plain, out = run(), run(conv_context=context, gap_index=gap)
    torch.testing.assert_close(out[1], plain[1], atol=1e-5, rtol=0)  # it has no gap
    torch.testing.assert_close(out[0, :, :2], plain[0, :, :2], atol=1e-5, rtol=0)
    changed = run(conv_context=context + 1, gap_index=gap) - out
    assert (
        changed[1].abs().max() < 1e-5
        and (changed[0].abs().amax((0, 2, 3)) > 1e-4).tolist() == [False] * 2 + [True] * 3
    )
    zero_last_layers(network, "temporal_convs", "temporal_conv.")
    torch.testing.assert_close(run(conv_context=context, gap_index=gap), run(), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="cannot be used with a state"):
        run(conv_context=context, gap_index=gap, state=TemporalState(window=2, sink=1))


@torch.no_grad()
def test_the_convolution_after_a_gap_equals_that_of_the_whole_clip(randomize):
    network = make(randomize)
    zero_last_layers(network, "temporal_attentions", "temporal_attention.")
    convolutions = [name for name, _ in network.named_modules() if name.endswith(".conv") and "temporal" in name]
    zero_last_layers(network, *convolutions[1:])
    latents, levels, prompt = inputs(n=7)
    levels[:, 2:4] = 0
    kept = [0, 4, 5, 6]
    gap = {"conv_context": latents[:, :, 2:4], "gap_index": torch.tensor([1, 1])}
    out = network(latents[:, :, kept], levels[:, kept], prompt, **gap).sample
    whole = network(latents[:, :, 2:], levels[:, 2:], prompt).sample
    torch.testing.assert_close(out[:, :, 1:], whole[:, :, 2:], atol=1e-5, rtol=0)
    without = network(latents[:, :, kept], levels[:, kept], prompt).sample
    assert not torch.allclose(without[:, :, 1:], whole[:, :, 2:], atol=1e-3)


@torch.no_grad()
def test_shared_levels_equal_levels_for_each_frame(randomize):
    network = make(randomize, frame_rate_embedding=True)
    latents, levels, prompt = inputs()
    shared = network(latents, levels[:, 0], prompt, frame_rate=8.0).sample
    each = network(latents, levels[:, :1].expand(2, 5), prompt, frame_rate=torch.tensor([8.0, 8.0])).sample
    torch.testing.assert_close(shared, each, atol=1e-5, rtol=0)
    assert not torch.allclose(shared, network(latents, levels[:, 0], prompt, frame_rate=2.0).sample, atol=1e-4)
    assert not torch.allclose(network(latents, levels, None).sample, network(latents, levels, prompt).sample)


@torch.no_grad()
def test_the_non_local_block_mixes_positions_across_frames(randomize):
    network = make(randomize, non_local=True)
    block = network.temporal_non_local
    seen = {}
    block.register_forward_hook(lambda module, args, out: seen.update(context=args[1], x=args[0], out=out))
    latents, levels, prompt = inputs(b=1, n=3)
    for groups in ("full", "causal"):
        network(latents, levels, prompt, groups=groups)
        changed, before = seen["x"].clone(), seen["out"]
        changed[1, 0, 0, 0] += 1  # one place of the second frame
        moved = (block(changed, seen["context"]) - before).abs().amax(1) > 1e-7  # (frame, row, column)
        frames = [1, 2] if groups == "causal" else [0, 1, 2]
        assert moved[frames].all() and moved.flatten(1).any(1).tolist() == [index in frames for index in range(3)]


@pytest.mark.parametrize("non_local", [False, True])
@torch.no_grad()
def test_streamed_equals_offline(randomize, splits, non_local):
    network = make(randomize, window=9, non_local=non_local)
    latents, levels, prompt = inputs()
    expected = network(latents, levels, prompt, groups="causal").sample
    for pieces in splits(5):
        state, outs = TemporalState(), []
        parts = zip(latents.split(pieces, dim=2), levels.split(pieces, dim=1), strict=True)
        for part, level in parts:
            frozen = network(part, level, prompt, groups="causal", state=state.frozen()).sample
            outs.append(network(part, level, prompt, groups="causal", state=state).sample)
            assert torch.equal(frozen, outs[-1])
        torch.testing.assert_close(torch.cat(outs, dim=2), expected, atol=1e-5, rtol=0)


class PlainLists:
    """A FrameCache of plain lists that evict the oldest frame after the sink."""

    def __init__(self, state):
        self.state, self.layers, self.num_frames = state, {}, 0

    def next_positions(self, num_frames, device):
        return torch.arange(self.num_frames, self.num_frames + num_frames)

    def rotary(self, rope, rows, columns, device):
        return rope(torch.arange(self.num_frames), rows, columns)

    def mask_empty(self, mask, *_):
        return mask

    def read(self, key, batch_size, num_tokens, rotary):
        if not self.num_frames:
            return None
        keys, values = (torch.stack([frame[index] for frame in self.layers[key]], dim=1) for index in (0, 1))
        angles = [part.repeat_interleave(keys[0, :, :, 0, 0].numel() // len(part), 0) for part in rotary]
        return rotate(keys.flatten(1, 2), angles).view_as(keys), values

    def write(self, layers):
        for key, (keys, values) in layers.items():
            frames = self.layers.setdefault(key, [])
            frames += zip(keys.unbind(1), values.unbind(1), strict=True)
            while len(frames) > self.state.sink + self.state.window:
                del frames[self.state.sink]
        self.num_frames = len(frames)


@pytest.mark.parametrize("non_local", [False, True])
@pytest.mark.parametrize(("window", "sink", "chunks"), [(2, 0, [1] * 5), (3, 1, [1, 2, 2, 2]), (1, 2, [3, 1, 2])])
@torch.no_grad()
def test_after_eviction_a_stream_equals_a_replay_in_plain_lists(
    randomize, monkeypatch, window, sink, chunks, non_local
):
    network = make(randomize, non_local=non_local)
    clean, levels, prompt = inputs(n=sum(chunks))
    noisy, zeros, state = torch.randn_like(clean), torch.zeros_like(levels), TemporalState(window, sink)
    parts = [slice(end - size, end) for size, end in zip(chunks, itertools.accumulate(chunks), strict=True)]
    for index, part in enumerate(parts):
        piece = noisy[:, :, part], levels[:, part], prompt
        actual = network(*piece, state=state.frozen()).sample
        network(clean[:, :, part], zeros[:, part], prompt, state=state)
        with monkeypatch.context() as patch:
            fresh = TemporalState(window, sink)
            fresh.bind(network)
            lists = PlainLists(fresh)
            patch.setattr(FrameCache, "open", lambda *_: lists)  # noqa: B023
            for before in parts[:index]:
                network(clean[:, :, before], zeros[:, before], prompt, state=fresh)
            expected = network(*piece, state=fresh).sample
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_checkpointing_gives_the_same_gradients(randomize, counting_checkpoint):
    network = make(randomize).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            network.enable_gradient_checkpointing(counting_checkpoint)
        network.zero_grad()
        network(*inputs(), groups="causal").sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    blocks = sum(isinstance(module, ResnetBlock2D) for module in network.modules())
    assert counting_checkpoint.count == blocks > 5
    assert len(gradients[0]) == len(gradients[1]) > 50
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_network_survives_saving_and_loading(randomize, tmp_path):
    network = make(randomize, keyframe_slots=4, window=2)
    network.save_pretrained(tmp_path)
    loaded = UNet3D.from_pretrained(tmp_path)
    assert loaded.state_identity == network.state_identity
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in network.state_dict().items())
    with pytest.raises(ValueError, match=r"multiples of 2, got \(7, 7\) \(nearest: \(8, 8\)\)"):
        network(*inputs(size=7))
    with pytest.raises(ValueError, match="timestep must be a number or have shape"):
        network(inputs()[0], torch.zeros(2, 3), inputs()[2])


@torch.no_grad()
def test_the_latents_are_called_sample_and_one_timestep_applies_to_all(make_unet):
    network = make_unet()
    latents, prompt = torch.randn(2, 3, 3, 4, 4), torch.randn(2, 6, 5)
    expected = network(latents, torch.full((2,), 300.0), prompt).sample
    for timestep in (300.0, torch.tensor(300.0), torch.tensor([300.0])):
        assert torch.equal(network(sample=latents, timestep=timestep, encoder_hidden_states=prompt).sample, expected)
    assert torch.equal(network(hidden_states=latents, timestep=300.0, encoder_hidden_states=prompt).sample, expected)
    with pytest.raises(ValueError, match="pass the latents as sample"):
        network(timestep=300.0, encoder_hidden_states=prompt)


def test_half_precision_gives_finite_numbers_close_to_full(make_unet):
    network = make_unet(window=3, keyframe_slots=1, frame_rate_embedding=True, non_local=True)
    keyframes = torch.randn(2, 4, 5, 8, 8, generator=torch.Generator().manual_seed(1))
    check_half_precision(network, *inputs(), keyframes)


def test_the_context_follows_its_stages_to_another_device():
    tensors = {name: torch.zeros(2) for name in ("temb", "prompt", "positions")}
    rotary = torch.zeros(2), torch.ones(2)
    context = Context(
        **tensors, prompt_mask=None, prompt_cache=None, num_frames=2, num_context=0, rotary_emb=rotary, groups=None
    )
    assert context.to(torch.device("cpu")) is context
    moved = context.to(torch.device("meta"))
    assert all(getattr(moved, name).is_meta for name in tensors) and all(part.is_meta for part in moved.rotary_emb)
    assert moved.written is context.written and moved.num_frames == 2 and moved.groups is None
