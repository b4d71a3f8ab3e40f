import math

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed
from einops import rearrange
from torch import Tensor

import vgen.temporal.attention
from vgen.temporal.attention import (
    DispatchedAttnProcessor,
    FrameCache,
    PromptCache,
    RotaryPositions,
    SpacetimeAttention,
    attention_mask,
    group_ids,
    group_mask,
    make_groups,
    rotate,
)
from vgen.temporal.state import TemporalState

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_attention(attn: SpacetimeAttention, x: Tensor, source: Tensor, visible: Tensor | None = None) -> Tensor:
    """Attention without positions, written out; `visible` is `(n, m)`."""
    query, key, value = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
    query, key, value = (rearrange(part, "b n (h d) -> b h n d", h=attn.heads) for part in (query, key, value))
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return attn.to_out[0](rearrange(scores.softmax(-1) @ value, "b h n d -> b n (h d)"))


@pytest.mark.parametrize(
    "mode, num_leading, chunk_size, expected",
    [
        ("full", 0, 1, [1, 1, 1, 1, 1, 1, 1]),
        ("full", 3, 1, [0, 0, 0, 1, 1, 1, 1]),
        ("full", 7, 1, [0, 0, 0, 0, 0, 0, 0]),
        ("causal", 3, 2, [0, 1, 2, 3, 4, 5, 6]),
        ("chunk", 0, 1, [0, 1, 2, 3, 4, 5, 6]),
        ("chunk", 0, 2, [0, 1, 1, 2, 2, 3, 3]),
        ("chunk", 1, 3, [0, 1, 1, 1, 2, 2, 2]),
        ("chunk", 2, 3, [0, 1, 2, 2, 2, 3, 3]),
        ("chunk", 4, 2, [0, 1, 1, 2, 3, 3, 4]),
        ("chunk", 7, 4, [0, 1, 1, 1, 1, 2, 2]),
    ],
)
def test_group_modes(mode, num_leading, chunk_size, expected):
    assert make_groups(mode, 7, num_leading, chunk_size) == expected


def test_an_unknown_group_mode_is_an_error_that_lists_the_modes():
    with pytest.raises(ValueError, match="groups must be one of 'full', 'causal', 'chunk', got 'block'"):
        make_groups("block", 3)


def test_groups_that_hide_nothing_need_no_mask():
    assert group_ids("full", 4, 1) is None
    assert group_ids([2, 2, 2, 2], 4, 1) is None
    assert group_ids([[2, 2, 2], [0, 0, 0]], 3, 1) is None
    assert attention_mask(None, True, torch.zeros(1), num_cached=3) is None


@pytest.mark.parametrize(
    "groups",
    [
        [0, 1],
        [0, 0],
        [[0, 0, 0]],
        [[0] * 4, [0] * 3],
        [[[0]] * 4],
        [],
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(1, 1, 4),
    ],
)
def test_groups_of_another_shape_are_an_error(groups):
    with pytest.raises(ValueError, match=r"groups must have shape \(4,\) or \(batch, 4\)"):
        group_ids(groups, 4, 1)


def test_equal_groups_of_all_samples_are_one_row():
    assert group_ids([[0, 1], [0, 1]], 2, 1) == ((0, 1),)
    assert group_ids([[0, 1], [0, 0]], 2, 1) == ((0, 1), (0, 0))


def visible_keys(row: list[int], num_cached: int, num_isolated: int, tokens: int) -> Tensor:
    """Which token sees which key, from the definition of groups."""
    n = len(row) + num_isolated
    frames = torch.zeros(n, num_cached + n, dtype=torch.bool)
    for i in range(n):
        for j in range(-num_cached, n):
            context = i >= len(row) or j >= len(row)
            frames[i, num_cached + j] = i == j if context else j < 0 or row[j] <= row[i]
    return frames.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


@pytest.mark.parametrize("row", [[0, 1, 2, 3], [0, 1, 1, 2], [2, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
@pytest.mark.parametrize("num_cached, num_isolated, tokens", [(0, 0, 1), (2, 0, 3), (0, 2, 3)])
def test_runs_and_masks_show_the_same_keys(row, num_cached, num_isolated, tokens):
    expected = visible_keys(row, num_cached, num_isolated, tokens)
    like, options = torch.zeros(1), {"num_cached": num_cached, "num_isolated": num_isolated, "tokens": tokens}
    hidden = torch.zeros(expected.shape).masked_fill(~expected, float("-inf"))
    for ids in ((tuple(row),), torch.tensor(row), torch.tensor([row])):
        assert torch.equal(attention_mask(ids, True, like, **options)[0, 0], hidden)
    (runs,) = attention_mask((tuple(row),), False, like, **options)
    actual = torch.zeros(expected.shape, dtype=torch.int64)
    for queries, keys in runs:
        for begin, end in queries:
            for first, last in keys:
                actual[begin:end, first:last] += 1
    assert torch.equal(actual, expected.long())


def test_long_sequences_get_runs_and_short_ones_a_mask():
    ids, like, limit = ((0, 1),), torch.zeros(1), vgen.temporal.attention.LONGEST_MASKED
    assert isinstance(attention_mask(ids, True, like, tokens=limit // 2), Tensor)
    assert isinstance(attention_mask(ids, True, like, tokens=limit // 2 + 1), tuple)
    assert isinstance(attention_mask(ids, True, like, num_cached=2, tokens=limit // 3), tuple)


def test_masks_of_several_samples_have_their_rows():
    rows = ((0, 1, 1), (0, 0, 0), (0, 1, 1), (2, 1, 0))
    mask = attention_mask(rows, True, torch.zeros(1), num_cached=1)
    assert torch.equal(mask, group_mask(torch.tensor(rows), 1, torch.float32))


@pytest.mark.parametrize("num_cached", [0, 2])
def test_frames_attend_to_earlier_groups_and_to_all_cached_frames(num_cached):
    groups = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 2]])
    mask = group_mask(groups, num_cached, torch.float64)
    assert mask.shape == (2, 1, 4, num_cached + 4) and mask.dtype == torch.float64
    for sample in range(2):
        for i in range(4):
            for j in range(num_cached + 4):
                seen = j < num_cached or groups[sample, j - num_cached] <= groups[sample, i]
                assert mask[sample, 0, i, j] == (0 if seen else float("-inf"))


@pytest.mark.parametrize("head_dim", [6, 12, 16, 64, 128])
def test_rotary_positions_equal_those_of_diffusers(head_dim):
    cos, sin = RotaryPositions(head_dim)(torch.arange(5), 3, 2)
    wan_cos, wan_sin = WanRotaryPosEmbed(head_dim, (1, 2, 2), 32)(torch.zeros(1, 1, 5, 6, 4))
    torch.testing.assert_close(cos.repeat_interleave(2, dim=-1), wan_cos[0, :, 0].float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(sin.repeat_interleave(2, dim=-1), wan_sin[0, :, 0].float(), atol=1e-6, rtol=0)


def test_products_of_rotated_vectors_depend_on_distance_only():
    rope, query, key = RotaryPositions(12), draw(1, 6, 1, 12, seed=2), draw(1, 6, 1, 12, seed=3)
    products = []
    for shift in (0, 5, 17):
        turned_query = rotate(query, rope(torch.tensor([3 + shift]), 2, 3))
        turned_key = rotate(key, rope(torch.tensor([1 + shift]), 2, 3))
        products.append(turned_query[0, :, 0] @ turned_key[0, :, 0].T)
    torch.testing.assert_close(products[1], products[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(products[2], products[0], atol=1e-5, rtol=1e-5)
    other = rotate(query, rope(torch.tensor([4]), 2, 3))[0, :, 0] @ key[0, :, 0].T
    assert not torch.allclose(other, products[0], atol=1e-2)


def test_attention_equals_that_of_diffusers(randomize):
    ours, wan = SpacetimeAttention(24, 2, 12, 1e-5), WanAttention(24, 2, 12, 1e-5, processor=WanAttnProcessor())
    ours.load_state_dict(randomize(wan).state_dict())
    x = draw(2, 6, 24)
    rotary = RotaryPositions(12)(torch.arange(1), 2, 3)
    doubled = tuple(part.repeat_interleave(2, dim=-1)[None, :, None] for part in rotary)
    torch.testing.assert_close(ours(x, rotary_emb=rotary), wan(x, rotary_emb=doubled), atol=1e-5, rtol=1e-5)


def test_attention_with_a_mask_equals_softmax_over_visible_keys(randomize):
    attn = randomize(SpacetimeAttention(24, 2, 12))
    x, groups = draw(2, 5, 24), torch.tensor([0, 1, 1, 3, 2])
    visible = groups[None, :] <= groups[:, None]
    out = attn(x, attention_mask=group_mask(groups, 0, torch.float32))
    torch.testing.assert_close(out, plain_attention(attn, x, x, visible), atol=1e-5, rtol=1e-5)


def test_cross_attention_equals_softmax_over_the_prompt(randomize):
    attn = randomize(SpacetimeAttention(24, 2, 12, is_cross_attention=True))
    x, prompt = draw(2, 5, 24), draw(2, 3, 24, seed=2)
    torch.testing.assert_close(attn(x, prompt), plain_attention(attn, x, prompt), atol=1e-5, rtol=1e-5)


def test_a_frozen_state_rotates_cached_keys_once(randomize, monkeypatch):
    attn, rope = randomize(SpacetimeAttention(24, 2, 12)), RotaryPositions(12)
    x = draw(2, 10, 24)
    whole = attn(x, rotary_emb=rope(torch.arange(5), 2, 1), attention_mask=_causal_tokens(5, 2))
    _, *pair = attn(x[:, :6], rotary_emb=rope(torch.arange(3), 2, 1), return_key_value=True)
    state, rotated = TemporalState(window=3), []
    FrameCache(state).write({"a": tuple(part.unflatten(1, (3, 2)) for part in pair)})
    count = lambda *args: rotated.append(args[0].shape[1]) or rotate(*args)  # noqa: E731
    monkeypatch.setattr(vgen.temporal.attention, "rotate", count)
    frozen = state.frozen()
    for one in (frozen, frozen, state):
        cache = FrameCache(one)
        key, value = cache.read("a", 2, 2, cache.rotary(rope, 2, 1, CPU))
        past = key.flatten(1, 2), value.flatten(1, 2)
        mask = torch.nn.functional.pad(_causal_tokens(2, 2), (6, 0))
        out = attn(x[:, 6:], rotary_emb=rope(torch.tensor([3, 4]), 2, 1), attention_mask=mask, cache=past)
        torch.testing.assert_close(out, whole[:, 6:], atol=1e-5, rtol=1e-5)
    assert rotated.count(6) == 2  # once for the frozen state, once for the writable one


@pytest.mark.parametrize("longest_masked", [2, 512])
def test_a_padded_cache_gives_the_same_as_one_that_grows(randomize, monkeypatch, longest_masked):
    monkeypatch.setattr(vgen.temporal.attention, "LONGEST_MASKED", longest_masked)
    attn, rope, window, sink = randomize(SpacetimeAttention(24, 2, 12)), RotaryPositions(12), 2, 1
    state = TemporalState(window, sink)
    for index in range(6):
        x, outs = draw(1, 4, 24, seed=index), []
        for padded in (False, True):
            cache = FrameCache(state, padded=padded)
            past = cache.read("a", 1, 2, cache.rotary(rope, 2, 1, CPU))
            past = past and (past[0].flatten(1, 2), past[1].flatten(1, 2))
            mask = attention_mask(((0, 1),), True, x, num_cached=cache.num_frames, tokens=2)
            mask = cache.mask_empty(mask, 2, 2, x)
            assert index == 0 or past[0].shape[1] == 2 * (3 if padded else min(3, 2 * index))
            rotary = rope(cache.next_positions(2, CPU), 2, 1)
            out, *pair = attn(x, rotary_emb=rotary, attention_mask=mask, cache=past, return_key_value=True)
            outs.append(out)
        torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=1e-5)
        FrameCache(state).write({"a": tuple(part.unflatten(1, (2, 2)) for part in pair)})


def test_a_prompt_is_projected_once_until_it_or_its_values_change(randomize):
    attn = randomize(SpacetimeAttention(24, 2, 12, is_cross_attention=True)).requires_grad_(False)
    x, prompt, cache, calls = draw(2, 5, 24), draw(2, 3, 24, seed=2), PromptCache(), []
    attn.to_k.register_forward_hook(lambda *_: calls.append(1))

    def check(prompt, expected_calls):
        cache.start(prompt)
        out = attn(x, prompt, prompt_cache=cache)
        assert len(calls) == expected_calls
        torch.testing.assert_close(out, plain_attention(attn, x, prompt), atol=1e-5, rtol=1e-5)
        del calls[:]

    with torch.no_grad():
        check(prompt, 1)
        check(prompt, 0)
        check(prompt.clone(), 1)
        check(prompt, 1)
        prompt.mul_(2)
        check(prompt, 1)
        cache.clear()
        check(prompt, 1)
    check(prompt, 1)  # training computes it


def _causal_tokens(frames: int, tokens: int) -> Tensor:
    mask = group_mask(torch.arange(frames), 0, torch.float32)
    return mask.repeat_interleave(tokens, dim=2).repeat_interleave(tokens, dim=3)


@pytest.mark.parametrize(
    "groups",
    [[[0, 1, 2, 3, 4]], [[0, 1, 1, 2, 2]], [[1, 0, 2, 0, 1]], [[0, 0, 0, 0, 1]], [[0, 1, 2, 2, 2], [1, 0, 0, 0, 0]]],
)
@pytest.mark.parametrize("num_cached", [0, 3])
def test_runs_give_the_same_as_a_mask(randomize, monkeypatch, groups, num_cached):
    attn = randomize(SpacetimeAttention(24, 2, 12))
    x, rope = draw(2, 10, 24), RotaryPositions(12)
    options = {"rotary_emb": rope(torch.arange(3, 8), 2, 1)}
    if num_cached:
        options["cache"] = (draw(2, 6, 2, 12, seed=2), draw(2, 6, 2, 12, seed=3))
    ids = tuple(map(tuple, groups))
    mask, runs = (attention_mask(ids, takes, x, num_cached=num_cached, tokens=2) for takes in (True, False))
    masks = []
    dispatch = attn.processor._dispatch
    monkeypatch.setattr(attn.processor, "_dispatch", lambda *args: masks.append(args[3]) or dispatch(*args))
    outs, gradients = [], []
    for one in (mask, runs):
        attn.zero_grad()
        outs.append(attn(x, attention_mask=one, **options))
        outs[-1].square().sum().backward()
        gradients.append([p.grad.clone() for p in attn.parameters()])
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)
    assert masks[0] is mask and masks[1:] == [None] * sum(len(set(row)) for row in groups)


@pytest.mark.parametrize(
    ("dtype", "autocast", "trains", "keys", "chosen", "expected"),
    [
        (torch.bfloat16, False, True, 128, None, "_native_math"),
        (torch.float32, True, True, 5, None, "_native_math"),
        (torch.float32, False, True, 5, None, None),
        (torch.bfloat16, False, True, 129, None, None),
        (torch.bfloat16, False, False, 5, None, None),
        (torch.bfloat16, False, True, 5, "native", "native"),
    ],
)
def test_short_rows_in_half_precision_are_trained_with_the_math_backend_on_cpus(
    monkeypatch, dtype, autocast, trains, keys, chosen, expected
):
    backends, dispatch = [], vgen.temporal.attention.dispatch_attention_fn

    def counted(*args, backend, **options):
        backends.append(backend)
        return dispatch(*args, backend=backend, **options)

    monkeypatch.setattr(vgen.temporal.attention, "dispatch_attention_fn", counted)
    processor = DispatchedAttnProcessor()
    processor._attention_backend = chosen
    exact = [draw(2, n, 4, 16, seed=n).to(dtype).double().requires_grad_() for n in (7, keys, keys)]
    given = [x.detach().to(dtype).requires_grad_(trains) for x in exact]
    mask = torch.zeros(1, 1, 7, keys)
    mask[..., 3:, 0] = -torch.inf
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = processor.attend(*given, mask.to(dtype))
    scores = torch.einsum("bnhd,bmhd->bhnm", *exact[:2]) / 16**0.5 + mask
    reference = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), exact[2])
    torch.testing.assert_close(out.double(), reference, atol=2e-2, rtol=2e-2)
    assert backends == [expected]
    if trains:
        out.float().square().sum().backward()
        reference.square().sum().backward()
        for one, other in zip(given, exact, strict=True):
            torch.testing.assert_close(one.grad.double(), other.grad, atol=5e-2, rtol=5e-2)


def test_a_backend_without_masks_rejects_masks_by_name(randomize, monkeypatch):
    attn = randomize(SpacetimeAttention(24, 2, 12))
    monkeypatch.setattr(vgen.temporal.attention, "_MASKLESS_BACKENDS", ("native",))
    mask = attention_mask(torch.tensor([[0, 1], [1, 0]]), False, torch.zeros(1))
    with pytest.raises(ValueError, match="attention backend 'native' does not support attention masks"):
        attn(draw(2, 2, 24), attention_mask=mask)
    with pytest.raises(ValueError, match="attention backend 'native' does not support attention masks"):
        attn(draw(1, 2, 24), draw(1, 3, 24), attention_mask=torch.zeros(1, 1, 1, 3))


@pytest.mark.parametrize("window, sink", [(1, 0), (3, 0), (2, 1), (3, 2), (4, 4)])
@pytest.mark.parametrize("chunks", [[1] * 12, [2] * 6, [5, 5, 5], [1, 3, 2, 4, 1, 1], [12]])
def test_ring_buffer_holds_the_first_and_the_latest_frames_in_order(window, sink, chunks):
    state, seen = TemporalState(window, sink), []
    for chunk in chunks:
        new = torch.arange(len(seen), len(seen) + chunk, dtype=torch.float32).view(1, chunk, 1, 1, 1)
        FrameCache(state).write({"a": (new, -new), "b": (new + 100, new)})
        seen += new.flatten().tolist()
        kept = seen[:sink] + seen[sink:][-window:]

        cache = FrameCache(state)
        order = cache.positions(CPU).argsort()
        assert cache.positions(CPU)[order].tolist() == list(range(len(kept)))
        keys, values = cache.read("a", 1, 1)
        assert keys[0, order, 0, 0, 0].tolist() == kept
        assert (-values)[0, order, 0, 0, 0].tolist() == kept
        assert (cache.read("b", 1, 1)[0] - 100)[0, order, 0, 0, 0].tolist() == kept
        assert state.num_frames == len(kept) <= sink + window


def test_cache_is_empty_before_the_first_frame():
    cache = FrameCache(TemporalState(window=2))
    assert cache.num_frames == 0 and cache.read("a", 1, 1) is None and cache.positions(CPU).tolist() == []


def test_cache_needs_a_window():
    with pytest.raises(ValueError, match="needs a window"):
        FrameCache(TemporalState())
