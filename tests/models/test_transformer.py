import math
import re
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from einops import rearrange
from torch import Tensor, nn

import vgen.temporal.attention
from vgen.models.transformer import SpacetimeTransformer
from vgen.temporal.state import TemporalState

ATTENTIONS = ["joint", "divided"]


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(t: int = 4, batch: int = 2, height: int = 4, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    levels = 1000 * torch.rand(batch, t, generator=torch.Generator().manual_seed(3))
    return draw(batch, 3, t, height, width), levels, draw(batch, 5, 5, seed=2)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


# The slow reference: frame after frame, with lists of everything since the start; no masks, ring buffers or tables.


def rotated(x: Tensor, frame: int, rows: int, columns: int) -> Tensor:
    """Turns tokens `(b, p, h, d)` of one frame, as complex numbers."""
    d = x.shape[-1]
    side = 2 * (d // 6)
    places = torch.tensor([(frame, row, column) for row in range(rows) for column in range(columns)]).double()
    angles = [
        places[:, axis, None] / 10000 ** (torch.arange(0, dim, 2).double() / dim)
        for axis, dim in enumerate((d - 2 * side, side, side))
    ]
    turns = torch.exp(1j * torch.cat(angles, dim=1))[:, None]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)


def project(attn: nn.Module, x: Tensor, source: Tensor) -> list[Tensor]:
    parts = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
    return [part.unflatten(-1, (attn.heads, -1)) for part in parts]


def softmax_sum(query: Tensor, key: Tensor, value: Tensor, where: str) -> Tensor:
    scores = torch.einsum(f"{where} -> bqhk", query.double(), key.double()) / math.sqrt(query.shape[-1])
    over_keys = where.split(",")[1].strip()
    return torch.einsum(f"bqhk, {over_keys} -> bqhd", scores.softmax(-1), value.double()).float()


class SlowStream:
    """Replays a stream and keeps the keys and values of all its frames; picks the remembered ones at each call."""

    def __init__(self, network: SpacetimeTransformer, window: int = 1, sink: int = 0):
        self.network, self.window, self.sink = network, window, sink
        self.pasts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in network.blocks]

    @torch.no_grad()
    def __call__(self, latents: Tensor, levels: Tensor, prompt: Tensor, groups=None, keep: bool = False) -> Tensor:
        network = self.network
        p_t, p_h, p_w = network.config.patch_size
        x = network.patch_embedding(latents)
        n, self.rows, self.columns = x.shape[2:]
        groups = groups or [0] * n
        x = rearrange(x, "b d n h w -> b n (h w) d")
        temb, modulation = network.condition_embedder(levels, torch.float32, None)
        prompt = network.condition_embedder.text_embedder(prompt)
        for block, past in zip(network.blocks, self.pasts, strict=True):
            kept = past[: self.sink] + past[self.sink :][-self.window :]
            table = (block.scale_shift_table[:, None] + modulation)[:, :, :, None]
            shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.unbind(2)
            over_time = block.attn_time if block.divided else block.attn1
            normed = self.normalized(x) * (1 + scale) + shift
            out, new = self.over_time(over_time, normed, kept, groups, block.divided)
            x = x + gate * out
            if block.divided:
                x = x + gate * self.over_space(block.attn1, self.normalized(x) * (1 + scale) + shift)
            query, key, value = project(block.attn2, block.norm2(x).flatten(1, 2), prompt)
            seen = softmax_sum(query, key, value, "bqhd, bkhd").flatten(2)
            x = x + block.attn2.to_out[0](seen).unflatten(1, (n, -1))
            x = x + ffn_gate * block.ffn(self.normalized(x) * (1 + ffn_scale) + ffn_shift)
            if keep:
                past += new
        shift, scale = (network.scale_shift_table[:, None] + temb[:, :, None]).unsqueeze(3).unbind(2)
        x = network.proj_out(self.normalized(x) * (1 + scale) + shift)
        x = x.unflatten(2, (self.rows, self.columns)).unflatten(-1, (p_t, p_h, p_w, -1))
        return rearrange(x, "b n h w i j k c -> b c (n i) (h j) (w k)")

    def normalized(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.network.config.eps)

    def turn(self, x: Tensor, frame: int) -> Tensor:
        return rotated(x, frame, self.rows, self.columns)

    def over_time(self, attn, x: Tensor, kept: list, groups: list[int], divided: bool) -> tuple[Tensor, list]:
        query, key, value = project(attn, x, x)
        new = [(key[:, frame], value[:, frame]) for frame in range(x.shape[1])]
        frames = [(self.turn(key, position), value) for position, (key, value) in enumerate(kept + new)]
        out = []
        for i in range(x.shape[1]):
            visible = frames[: len(kept)] + [
                frame for frame, group in zip(frames[len(kept) :], groups, strict=True) if group <= groups[i]
            ]
            keys, values = (torch.stack(parts, dim=1) for parts in zip(*visible, strict=True))
            turned = self.turn(query[:, i], len(kept) + i)
            if divided:
                out.append(softmax_sum(turned, keys, values, "bqhd, bkqhd"))
            else:
                out.append(softmax_sum(turned, keys.flatten(1, 2), values.flatten(1, 2), "bqhd, bkhd"))
        return attn.to_out[0](torch.stack(out, dim=1).flatten(3)), new

    def over_space(self, attn, x: Tensor) -> Tensor:
        out = []
        for frame in x.unbind(1):
            query, key, value = project(attn, frame, frame)
            out.append(softmax_sum(self.turn(query, 0), self.turn(key, 0), value, "bqhd, bkhd"))
        return attn.to_out[0](torch.stack(out, dim=1).flatten(3))


@pytest.mark.parametrize("patch_size", [(1, 2, 2), (2, 2, 1), (1, 1, 1)])
@pytest.mark.parametrize("head_dim, cross_attn_norm", [(12, True), (16, False)])
@torch.no_grad()
def test_same_weights_as_diffusers_wan_transformer(make_transformer, randomize, patch_size, head_dim, cross_attn_norm):
    ours = make_transformer(patch_size=patch_size, attention_head_dim=head_dim, cross_attn_norm=cross_attn_norm)
    config = {key: value for key, value in ours.config.items() if not key.startswith("_")}
    names = WanTransformer3DModel.__init__.__wrapped__.__code__.co_varnames
    wan = randomize(WanTransformer3DModel(**{key: value for key, value in config.items() if key in names}), seed=5)
    ours.load_state_dict(wan.state_dict())
    latents, levels, prompt = inputs()
    close(ours(latents, levels[:, 0], prompt).sample, wan(latents, levels[:, 0], prompt).sample)

    levels = levels[:, : 4 // patch_size[0]]
    tokens = (4 // patch_size[1]) * (6 // patch_size[2])
    close(ours(latents, levels, prompt).sample, wan(latents, levels.repeat_interleave(tokens, 1), prompt).sample)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("groups", [[0, 0, 0, 0], [0, 1, 2, 3], [0, 1, 1, 2], [2, 0, 1, 0]])
@torch.no_grad()
def test_full_pass_equals_explicit_attention_frame_by_frame(make_transformer, attention, groups):
    network = make_transformer(attention=attention)
    latents, levels, prompt = inputs()
    close(network(latents, levels, prompt, groups=groups).sample, SlowStream(network)(latents, levels, prompt, groups))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("mode, numbers", [("causal", [0, 1, 2, 3, 4]), ("chunk", [0, 1, 1, 2, 2])])
@torch.no_grad()
def test_no_output_depends_on_later_groups(make_transformer, attention, mode, numbers):
    network = make_transformer(attention=attention, chunk_size=2)
    latents, levels, prompt = inputs(t=5)
    before = network(latents, levels, prompt, groups=mode).sample
    assert torch.equal(network(latents, levels, prompt, groups=numbers).sample, before)
    for frame in range(5):
        changed, other_levels = latents.clone(), levels.clone()
        changed[:, :, frame] += 1
        other_levels[:, frame] = 5.0
        after = network(changed, other_levels, prompt, groups=mode).sample
        for k in range(5):
            same = torch.equal(after[:, :, k], before[:, :, k])
            assert same == (numbers[k] < numbers[frame])


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_groups_of_each_sample_equal_single_samples(make_transformer, attention):
    network = make_transformer(attention=attention)
    latents, levels, prompt = inputs()
    groups = torch.tensor([[0, 1, 2, 3], [1, 0, 0, 1]])
    both = network(latents, levels, prompt, groups=groups).sample
    for row in range(2):
        part = slice(row, row + 1)
        close(both[part], network(latents[part], levels[part], prompt[part], groups=groups[row]).sample)
    assert not torch.allclose(both, network(latents, levels, prompt).sample, atol=1e-3)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("mode", ["full", "causal"])
@pytest.mark.parametrize("chunks", [[1, 2, 2], [3, 1], [1, 1, 1, 3]])
@torch.no_grad()
def test_before_eviction_a_stream_equals_the_full_pass(make_transformer, attention, mode, chunks):
    network = make_transformer(attention=attention)
    n = sum(chunks)
    latents, levels, prompt = inputs(t=n)
    levels[:, : n - chunks[-1]] = 0
    groups = list(range(n)) if mode == "causal" else sum(([i] * size for i, size in enumerate(chunks)), [])
    whole = network(latents, levels, prompt, groups=groups).sample

    state = TemporalState(window=n)
    begin = 0
    for size in chunks[:-1]:
        part = slice(begin, begin + size)
        out = network(latents[:, :, part], levels[:, part], prompt, groups=mode, state=state).sample
        close(out, whole[:, :, part])
        begin += size
    out = network(latents[:, :, begin:], levels[:, begin:], prompt, groups=mode, state=state.frozen()).sample
    close(out, whole[:, :, begin:])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    "window, sink, chunks",
    [
        (2, 0, [1] * 6),
        (3, 1, [1] * 7),
        (2, 1, [2] * 5),
        (1, 0, [3] * 3),  # a chunk longer than the window
        (2, 2, [3] * 4),
        (3, 1, [1, 5, 2, 4]),
        (1, 3, [2, 2, 2, 2]),
    ],
)
@torch.no_grad()
def test_after_eviction_a_stream_equals_a_replay_in_plain_lists(make_transformer, attention, window, sink, chunks):
    network = make_transformer(attention=attention)
    clean, levels, prompt = inputs(t=sum(chunks))
    noisy = draw(*clean.shape, seed=7)
    state, slow = TemporalState(window, sink), SlowStream(network, window, sink)
    for index, end in enumerate(accumulate(chunks)):
        part = slice(end - chunks[index], end)
        groups = list(range(chunks[index])) if index % 2 else [0] * chunks[index]
        expected = slow(noisy[:, :, part], levels[:, part], prompt, groups)
        piece = noisy[:, :, part], levels[:, part], prompt
        close(network(*piece, groups=groups, state=state.frozen()).sample, expected)

        zeros = torch.zeros_like(levels[:, part])
        expected = slow(clean[:, :, part], zeros, prompt, groups, keep=True)
        close(network(clean[:, :, part], zeros, prompt, groups=groups, state=state).sample, expected)
        assert state.num_frames == min(end, window + sink)


@torch.no_grad()
def test_stream_of_patches_longer_than_a_latent_equals_the_replay(make_transformer):
    network = make_transformer(patch_size=(2, 2, 2))
    clean, _, prompt = inputs(t=10)
    state, slow, zeros = TemporalState(2, 1), SlowStream(network, 2, 1), torch.zeros(2, 1)
    for piece in clean.split(2, dim=2):
        expected = slow(piece, zeros, prompt, keep=True)
        close(network(piece, zeros[:, 0], prompt, state=state).sample, expected)
    assert state.num_frames == 3


@torch.no_grad()
def test_memory_and_positions_of_an_endless_stream_are_bounded(make_transformer):
    tiny = {"num_attention_heads": 1, "attention_head_dim": 6, "num_layers": 1, "in_channels": 1, "out_channels": 1}
    network = make_transformer(patch_size=(1, 1, 1), ffn_dim=4, freq_dim=4, window=12, sink=3, **tiny)
    window, sink, chunk, total = 12, 3, 10, 10_000
    latents, zeros = draw(1, 1, total, 1, 1), torch.zeros(1)
    largest = []
    network.rope.register_forward_pre_hook(lambda module, args: largest.append(args[0].amax()))
    state, sizes = TemporalState(), set()
    for begin in range(0, total, chunk):
        out = network(latents[:, :, begin : begin + chunk], zeros, None, state=state).sample
        assert state.num_frames <= sink + window
        sizes.add(state.num_bytes)
    assert len(sizes) == 1
    assert torch.stack(largest).max() == sink + window + chunk - 1
    assert out.isfinite().all()

    # the keys of a single layer do not depend on the past, so the cached frames alone give the same continuation
    short = TemporalState()
    network(latents[:, :, :sink], zeros, None, state=short)
    network(latents[:, :, -window:], zeros, None, state=short)
    piece = draw(1, 1, chunk, 1, 1, seed=9)
    expected = network(piece, zeros, None, state=short.frozen()).sample
    close(network(piece, zeros, None, state=state.frozen()).sample, expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_frozen_view_leaves_the_state_unchanged(make_transformer, attention):
    network = make_transformer(attention=attention, window=3)
    latents, levels, prompt = inputs()
    state = TemporalState()
    network(latents, levels, prompt, state=state)
    copies, count = {key: tensor.clone() for key, tensor in state._tensors.items()}, state.num_frames
    for _ in range(2):
        network(latents, levels, prompt, state=state.frozen())
    assert state.num_frames == count and copies.keys() == state._tensors.keys()
    assert all(torch.equal(state.get(key), tensor) for key, tensor in copies.items())


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("written", [2, 5])
@torch.no_grad()
def test_frozen_view_keeps_what_the_state_held(make_transformer, attention, written):
    network = make_transformer(attention=attention, window=3, sink=1)
    latents, levels, prompt = inputs(t=11)
    pieces = [(latents[:, :, [frame]], levels[:, [frame]], prompt) for frame in range(11)]
    state = TemporalState()
    for piece in pieces[:written]:
        network(*piece, state=state)
    view = state.frozen()
    before = network(*pieces[written], state=view).sample
    for piece in pieces[written:]:  # in the end nothing but the sink is left of what the view holds
        network(*piece, state=state)
        assert torch.equal(network(*pieces[written], state=view).sample, before)


@torch.no_grad()
def test_frozen_view_of_a_fresh_state_equals_no_state(make_transformer):
    network = make_transformer(window=3, sink=1)
    latents, levels, prompt = inputs()
    state = TemporalState()
    close(network(latents, levels, prompt, state=state.frozen()).sample, network(latents, levels, prompt).sample)
    assert state.identity is None and state.num_bytes == 0


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("written", [2, 7])
@torch.no_grad()
def test_stream_resumed_from_a_file_continues_identically(make_transformer, tmp_path, attention, written):
    network = make_transformer(attention=attention, window=3, sink=1)
    latents, levels, prompt = inputs(t=written + 4)
    state = TemporalState()
    for frame in range(written):
        part = slice(frame, frame + 1)
        network(latents[:, :, part], levels[:, part], prompt, state=state)
    state.save(tmp_path / "state.safetensors")
    loaded = TemporalState.load(tmp_path / "state.safetensors")
    for begin in range(written, written + 4, 2):
        piece = latents[:, :, begin : begin + 2], levels[:, begin : begin + 2], prompt
        assert torch.equal(network(*piece, state=loaded).sample, network(*piece, state=state).sample)


@torch.no_grad()
def test_guidance_rows_in_one_state_equal_states_of_their_own(make_transformer):
    network = make_transformer(window=3)
    latents, levels, prompt = inputs()
    together, separate = TemporalState(), [TemporalState(), TemporalState()]
    for frame in range(4):
        part = slice(frame, frame + 1)
        both = network(latents[:, :, part], levels[:, part], prompt, state=together).sample
        for row, state in enumerate(separate):
            one = slice(row, row + 1)
            close(both[one], network(latents[one, :, part], levels[one, part], prompt[one], state=state).sample)


@torch.no_grad()
def test_failed_call_leaves_the_state_unchanged(make_transformer):
    network = make_transformer(window=3)
    latents, levels, prompt = inputs()
    state = TemporalState()
    network(latents, levels, prompt, state=state)
    copies, count = {key: tensor.clone() for key, tensor in state._tensors.items()}, state.num_frames
    handle = network.blocks[1].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        network(latents, levels, prompt, state=state)
    handle.remove()
    assert state.num_frames == count
    assert all(torch.equal(state.get(key), tensor) for key, tensor in copies.items())


def test_state_of_another_network_raises(make_transformer, make_vae):
    latents, levels, prompt = inputs()
    state = TemporalState()
    with torch.no_grad():
        make_vae().encode(draw(1, 3, 1, 8, 8), state)
        with pytest.raises(ValueError, match="belongs to CausalVideoVAE .* cannot be used with SpacetimeTransformer"):
            make_transformer(window=3)(latents, levels, prompt, state=state)


@pytest.mark.parametrize("shape", [(2, 3, 1, 4, 4), (1, 3, 1, 4, 8)])
def test_slice_of_another_batch_or_size_raises(make_transformer, shape):
    network, state = make_transformer(), TemporalState(window=2)
    level = torch.tensor([300.0])
    with torch.no_grad():
        network(torch.randn(1, 3, 1, 4, 4), level, None, state=state)
        with pytest.raises(ValueError, match="does not continue this stream"):
            network(torch.randn(shape), level.expand(shape[0]), None, state=state)


def test_state_without_a_window_raises(make_transformer):
    latents, levels, prompt = inputs()
    with torch.no_grad(), pytest.raises(ValueError, match="needs a window"):
        make_transformer()(latents, levels, prompt, state=TemporalState())


@torch.no_grad()
def test_more_frames_than_trained_raise_with_a_state(make_transformer):
    network = make_transformer(trained_token_frames=6, window=2, sink=1)
    latents, levels, prompt = inputs()
    state = TemporalState()
    network(latents, levels, prompt, state=state)
    with pytest.raises(ValueError, match=r"must be at most 6, as in training, got 3 \+ 4: pass at most 3 at once"):
        network(latents, levels, prompt, state=state)
    assert state.num_frames == 3
    network(latents[:, :, :3], levels[:, :3], prompt, state=state)


@torch.no_grad()
def test_no_keyframes_equal_zero_keyframes(make_transformer):
    network = make_transformer(keyframe_slots=2)
    latents, levels, prompt = inputs()
    zeros = torch.zeros(2, 8, 4, 4, 6)
    without = network(latents, levels, prompt).sample
    close(network(latents, levels, prompt, keyframes=zeros).sample, without)
    given = network(latents, levels, prompt, keyframes=draw(*zeros.shape)).sample
    assert (given - without).abs().max() > 1e-2


@torch.no_grad()
def test_keyframes_without_slots_raise(make_transformer):
    latents, levels, prompt = inputs()
    with pytest.raises(ValueError, match="keyframe_slots=0"):
        make_transformer()(latents, levels, prompt, keyframes=torch.zeros(2, 8, 4, 4, 6))


@torch.no_grad()
def test_fresh_keyframe_and_frame_rate_embeddings_change_nothing(make_transformer):
    plain = make_transformer()
    fresh = SpacetimeTransformer(**{**plain.config, "keyframe_slots": 2, "frame_rate_embedding": True}).eval()
    missing = fresh.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all(key.startswith(("keyframe_embedding", "frame_rate_embedder")) for key in missing) and missing
    latents, levels, prompt = inputs()
    out = fresh(latents, levels, prompt, keyframes=draw(2, 8, 4, 4, 6), frame_rate=12.0).sample
    assert torch.equal(out, plain(latents, levels, prompt).sample)


@torch.no_grad()
def test_frame_rate_may_differ_by_sample_and_nan_is_unconditional(make_transformer):
    network = make_transformer(frame_rate_embedding=True)
    latents, levels, prompt = inputs()
    without = network(latents, levels, prompt).sample
    mixed = network(latents, levels, prompt, frame_rate=torch.tensor([float("nan"), 8.0])).sample
    close(mixed[:1], without[:1])
    close(mixed[1:], network(latents, levels, prompt, frame_rate=8.0).sample[1:])
    assert (mixed[1:] - without[1:]).abs().max() > 1e-2
    assert not torch.allclose(network(latents, levels, prompt, frame_rate=9.0).sample[1:], mixed[1:], atol=1e-3)
    close(network(latents, levels[:, 0], prompt, frame_rate=8).sample[0], network(
        latents, levels[:, :1].expand(2, 4), prompt, frame_rate=torch.tensor([8.0, 8.0])
    ).sample[0])  # fmt: skip


@torch.no_grad()
def test_no_prompt_skips_cross_attention(make_transformer):
    network = make_transformer()
    latents, levels, prompt = inputs()
    without = network(latents, levels, None).sample
    assert not torch.allclose(network(latents, levels, prompt).sample, without, atol=1e-2)
    for block in network.blocks:
        block.attn2.to_out[0].weight.zero_()
        block.attn2.to_out[0].bias.zero_()
    close(network(latents, levels, prompt).sample, without)


@torch.no_grad()
def test_masked_prompt_tokens_equal_prompts_without_them(make_transformer):
    network = make_transformer()
    latents, levels, prompt = inputs()
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 1, 0]])
    out = network(latents, levels, prompt, encoder_attention_mask=mask).sample
    for row in range(2):
        one = slice(row, row + 1)
        close(out[one], network(latents[one], levels[one], prompt[one][:, mask[row] == 1]).sample)
    close(
        network(latents, levels, prompt, encoder_attention_mask=torch.ones(2, 5)).sample,
        network(latents, levels, prompt).sample,
    )


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_backend_without_masks_gives_the_same_output(make_transformer, monkeypatch, attention):
    network = make_transformer(attention=attention, chunk_size=2, window=2)
    latents, levels, prompt = inputs()
    state = TemporalState()
    network(latents, levels, prompt, state=state)
    options = [{"groups": mode, "state": kept} for mode in ("causal", "chunk") for kept in (None, state.frozen())]
    masked = [network(latents, levels, prompt, **option).sample for option in options]
    monkeypatch.setattr(vgen.temporal.attention, "_MASKLESS_BACKENDS", ("native",))
    for option, expected in zip(options, masked, strict=True):
        close(network(latents, levels, prompt, **option).sample, expected)
    with pytest.raises(ValueError, match="does not support attention masks"):
        network(latents, levels, prompt, groups=torch.tensor([[0, 1, 2, 3], [1, 0, 0, 1]]))


@torch.no_grad()
def test_attention_backend_can_be_set(make_transformer):
    network = make_transformer()
    latents, levels, prompt = inputs()
    expected = network(latents, levels, prompt, groups="causal").sample
    network.set_attention_backend("_native_math")
    assert network.blocks[0].attn1.processor._attention_backend == "_native_math"
    network.set_attention_backend("native")  # diffusers makes the last choice global
    close(network(latents, levels, prompt, groups="causal").sample, expected)


def test_sizes_that_patches_do_not_divide_raise_with_the_nearest(make_transformer):
    network = make_transformer(patch_size=(2, 2, 2))
    for t, height, width, nearest in [(3, 4, 6, (4, 4, 6)), (4, 5, 6, (4, 4, 6)), (4, 4, 3, (4, 4, 4))]:
        latents, levels, prompt = inputs(t, 2, height, width)
        message = f"patch size (2, 2, 2), got {(t, height, width)} (nearest: {nearest})"
        with pytest.raises(ValueError, match=re.escape(message)):
            network(latents, levels[:, 0], prompt)


def test_timesteps_of_another_shape_raise(make_transformer):
    latents, levels, prompt = inputs()
    for timestep in (levels[:, :3], levels[:1], levels[0]):
        with pytest.raises(ValueError, match=r"must be a number or have shape \(2,\) or \(2, 4\), got "):
            make_transformer()(latents, timestep, prompt)


@torch.no_grad()
def test_one_timestep_applies_to_all_samples(make_transformer):
    network = make_transformer()
    latents, _, prompt = inputs()
    expected = network(latents, torch.full((2, 4), 300.0), prompt).sample
    for timestep in (torch.tensor(300.0), torch.full((2,), 300.0), torch.tensor([300, 300]), torch.tensor([300.0])):
        close(network(latents, timestep, prompt).sample, expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gradient_checkpointing_gives_the_same_gradients(make_transformer, attention, counting_checkpoint):
    gradients = []
    for checkpointed in (False, True):
        network = make_transformer(attention=attention, keyframe_slots=1, frame_rate_embedding=True).train()
        if checkpointed:
            network.enable_gradient_checkpointing(counting_checkpoint)
        latents, levels, prompt = inputs()
        options = {"keyframes": draw(2, 4, 4, 4, 6), "frame_rate": 8.0, "groups": "causal"}
        network(latents, levels, prompt, **options).sample.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert counting_checkpoint.count == len(network.blocks)
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_writable_state_under_gradient_checkpointing_raises(make_transformer):
    network = make_transformer(window=3)
    network.enable_gradient_checkpointing()
    latents, levels, prompt = inputs()
    state = TemporalState()
    with pytest.raises(ValueError, match="would be written twice"):
        network(latents, levels, prompt, state=state)
    with torch.no_grad():
        network(latents, levels, prompt, state=state)
    network(latents, levels, prompt, state=state.frozen()).sample.sum().backward()
    assert network.patch_embedding.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "config, message",
    [
        ({"image_dim": 8}, "image_dim=8 needs added_kv_proj_dim=24, got None"),
        ({"added_kv_proj_dim": 8}, "image_dim=None needs added_kv_proj_dim=None, got 8"),
        ({"pos_embed_seq_len": 8}, "pos_embed_seq_len=8 needs image_dim"),
        ({"in_channels": 5, "keyframe_slots": 4}, "keyframe_slots and residual are for networks without a condition"),
        ({"qk_norm": "layer_norm"}, "qk_norm must be 'rms_norm_across_heads', got 'layer_norm'"),
        ({"in_channels": 2}, "out_channels must be at most in_channels=2"),
        ({"tasks": ("text", "video")}, "tasks must be one of 'text', 'leading', 'keyframes', got 'video'"),
        ({"attention": "axial"}, "attention must be one of 'joint', 'divided', got 'axial'"),
    ],
)
def test_unsupported_layouts_raise_errors_that_name_the_setting(make_transformer, config, message):
    with pytest.raises(ValueError, match=message):
        make_transformer(**config)


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_saved_network_loads_exactly_and_takes_over_a_stream(make_transformer, tmp_path, attention):
    network = make_transformer(attention=attention, window=3, sink=1, keyframe_slots=4, frame_rate_embedding=True)
    network.save_pretrained(tmp_path)
    loaded = SpacetimeTransformer.from_pretrained(tmp_path).eval()
    assert dict(loaded.config)["window"] == 3 and loaded.config.keyframe_slots == 4
    assert all(torch.equal(weight, loaded.state_dict()[key]) for key, weight in network.state_dict().items())
    latents, levels, prompt = inputs()
    state = TemporalState()
    assert torch.equal(loaded(latents, levels, prompt).sample, network(latents, levels, prompt, state=state).sample)
    expected = network(latents, levels, prompt, state=state.frozen()).sample
    assert torch.equal(loaded(latents, levels, prompt, state=state.frozen()).sample, expected)


@torch.no_grad()
def check_half_precision(network, latents, levels, prompt, keyframes):
    full = network(latents, levels, prompt, groups="causal", keyframes=keyframes, frame_rate=8.0).sample
    network.bfloat16()
    half_inputs = latents.bfloat16(), levels, prompt.bfloat16()
    options = {"groups": "causal", "keyframes": keyframes.bfloat16(), "frame_rate": 8.0}
    half = network(*half_inputs, **options).sample
    assert half.dtype == torch.bfloat16
    assert (half - full).abs().mean() < 0.1 * full.abs().mean()
    state = TemporalState()
    for _ in range(2):
        assert network(*half_inputs, **options, state=state).sample.isfinite().all()


def test_half_precision_gives_finite_numbers_close_to_full(make_transformer):
    network = make_transformer(window=3, keyframe_slots=1, frame_rate_embedding=True)
    check_half_precision(network, *inputs(), draw(2, 4, 4, 4, 6))


@torch.no_grad()
def test_output_may_be_a_tuple(make_transformer):
    network = make_transformer()
    latents, levels, prompt = inputs()
    (out,) = network(latents, levels, prompt, return_dict=False)
    assert torch.equal(out, network(latents, levels, prompt).sample)
