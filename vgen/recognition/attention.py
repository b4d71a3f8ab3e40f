"""Transformers over space and time: divided, joint and factorised attention, and shifted windows (Video Swin)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from vgen.checks import check_choice
from vgen.recognition.network import ClipNetwork, RecognizerOutput
from vgen.temporal.attention import SpacetimeAttention
from vgen.temporal.state import History

AttentionKind = Literal["divided", "joint", "factorized"]
"""Attention over time and then over space in each block, over both at once, or over space in the first blocks and
over time in the last."""
Size = tuple[int, int, int]


def mlp(dim: int, hidden: int) -> nn.Sequential:
    """Two linear layers with GELU between them."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class Attend(nn.Module):
    """Self-attention with a layer norm before it and a residual.

    Args:
        dim: Features.
        heads: Number of heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = SpacetimeAttention(dim, heads, dim // heads)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps `(b, n, d)` to the same shape; `mask` is bool `(b, n)` over keys."""
        bias = None
        if mask is not None:
            bias = tokens.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)[:, None, None]
        return tokens + self.attention(self.norm(tokens), attention_mask=bias)


class Block(nn.Module):
    """Attention over time, over space, or over both, then an MLP, each with a residual.

    Args:
        kinds: Axes of attention, in order: `time`, `space` or `joint`.
        dim: Features.
        heads: Number of heads.
        mlp_ratio: Features of the MLP relative to `dim`.
    """

    def __init__(self, kinds: Sequence[str], dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.kinds = tuple(kinds)
        self.attend = nn.ModuleList(Attend(dim, heads) for _ in kinds)
        self.norm = nn.LayerNorm(dim)
        self.mlp = mlp(dim, round(mlp_ratio * dim))

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Maps `(b, n, p, d)`, `n` frames of `p` tokens, to the same shape; `mask` is bool `(b, n)`."""
        b, n, p, _ = tokens.shape
        for kind, attend in zip(self.kinds, self.attend, strict=True):
            if kind == "space":
                tokens = attend(tokens.flatten(0, 1)).unflatten(0, (b, n))
            elif kind == "time":
                rows = None if mask is None else repeat(mask, "b n -> (b p) n", p=p)
                mixed = attend(rearrange(tokens, "b n p d -> (b p) n d"), rows)
                tokens = rearrange(mixed, "(b p) n d -> b n p d", b=b)
            else:
                row = None if mask is None else repeat(mask, "b n -> b (n p)", p=p)
                tokens = attend(tokens.flatten(1, 2), row).unflatten(1, (n, p))
        return tokens + self.mlp(self.norm(tokens))


class AttentionPool(nn.Module):
    """Weighted mean of tokens, with weights from a learned query.

    Args:
        dim: Features.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, 1)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Maps `(b, n, p, d)` to features `(b, d)` and weights `(b, n, p)`."""
        tokens = self.norm(tokens)
        scores = self.query(tokens).squeeze(-1)
        if mask is not None:
            scores = scores.masked_fill(~mask[..., None], -torch.inf)
        weights = scores.flatten(1).softmax(-1).view_as(scores)
        return (tokens * weights[..., None]).sum((1, 2)), weights


class SpacetimeNetwork(ClipNetwork):
    """A Transformer over patches of frames. A clip may have fewer or more frames, and a mask hides padding.

    Its output has the weights of each patch in the features, for a picture of what it attends to over time.

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip. Positions in time are interpolated for other lengths.
        image_size: Height and width of the frames, the only size.
        attention: `divided`, `joint` or `factorized`.
        patch_size: Side of the patches.
        patch_frames: Frames of a patch.
        dim: Features.
        depth: Number of blocks.
        temporal_depth: Number of blocks over time with `factorized`, after `depth` blocks over space.
        heads: Number of heads.
        mlp_ratio: Features of the MLPs relative to `dim`.

    Source: Divided and joint: Is space-time attention all you need for video understanding? (TimeSformer), arXiv
        2102.05095. Factorized: ViViT, arXiv 2103.15691, model 2.
    """

    takes_mask = fixed_size = True

    def __init__(
        self,
        num_classes: int,
        num_frames: int,
        image_size: int,
        attention: AttentionKind = "divided",
        patch_size: int = 8,
        patch_frames: int = 1,
        dim: int = 128,
        depth: int = 4,
        temporal_depth: int = 2,
        heads: int = 4,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        check_choice("attention", attention, AttentionKind)
        if image_size % patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size={patch_size}, got {image_size}")
        self.min_frames, self.patch_frames = patch_frames, patch_frames
        self.is_factorized = attention == "factorized"
        patch = (patch_frames, patch_size, patch_size)
        self.patches = nn.Conv3d(3, dim, patch, patch)
        # as large as the features of patches: with 0.02, as in ViT, a network hardly learns any order from scratch
        self.in_space = nn.Parameter(torch.randn((image_size // patch_size) ** 2, dim))
        self.in_time = nn.Parameter(torch.randn(num_frames // patch_frames, dim))
        block = partial(Block, dim=dim, heads=heads, mlp_ratio=mlp_ratio)
        kinds = {"divided": ("time", "space"), "joint": ("joint",), "factorized": ("space",)}[attention]
        self.blocks = nn.ModuleList(block(kinds) for _ in range(depth))
        self.over_time = nn.ModuleList(block(["time"]) for _ in range(temporal_depth if self.is_factorized else 0))
        self.pool = AttentionPool(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        patches = self.patches(clip)
        n, rows, columns = patches.shape[2:]
        tokens = rearrange(patches, "b d n h w -> b n (h w) d") + self.in_space + self._positions(n)[:, None]
        if mask is not None:  # a patch is real if its first frame is
            mask = mask[:, : n * self.patch_frames : self.patch_frames]
        for block in self.blocks:
            tokens = block(tokens, mask)
        if self.is_factorized:
            tokens = tokens.mean(2, keepdim=True)
            rows = columns = 1
        for block in self.over_time:
            tokens = block(tokens, mask)
        features, weights = self.pool(tokens, mask)
        attention = rearrange(weights, "b n (h w) -> b n h w", h=rows, w=columns)
        return RecognizerOutput(logits=self.head(features), features=features, attention=attention)

    def _positions(self, num_tokens: int) -> Tensor:
        return F.interpolate(self.in_time.T[None], num_tokens, mode="linear")[0].T


class WindowAttention(nn.Module):
    """Attention within windows, with a learned bias for each relative position.

    Args:
        dim: Features.
        heads: Number of heads.
        window: Frames, height and width of the windows in tokens.
    """

    def __init__(self, dim: int, heads: int, window: Size) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.biases = nn.Parameter(torch.empty(math.prod(2 * size - 1 for size in window), heads).normal_(std=0.02))

    def forward(self, tokens: Tensor, size: Size, mask: Tensor | None) -> Tensor:
        """Maps windows `(w, n, d)` of `size`, at most `window`, to the same shape; `mask` is bool `(w, n, n)`."""
        query, key, value = rearrange(self.to_qkv(tokens), "w n (k h d) -> k w h n d", k=3, h=self.heads)
        bias = self.biases[self._relative(size).to(tokens.device)]
        bias = rearrange(bias, "q k h -> 1 h q k").to(query)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None], -torch.inf)
        mixed = F.scaled_dot_product_attention(query, key, value, bias)
        return self.to_out(rearrange(mixed, "w h n d -> w n (h d)"))

    def _relative(self, size: Size) -> Tensor:
        """Index of the bias of each pair of positions in a window."""
        grid = torch.stack(torch.meshgrid(*(torch.arange(one) for one in size), indexing="ij")).flatten(1)
        offsets = grid[:, :, None] - grid[:, None]  # (3, n, n)
        index = torch.zeros_like(offsets[0])
        for offset, length in zip(offsets, self.window, strict=True):
            index = index * (2 * length - 1) + offset + length - 1
        return index


class SwinBlock(nn.Module):
    """Attention within windows, shifted by half a window in every second block, then an MLP.

    Args:
        dim: Features.
        heads: Number of heads.
        window: See `WindowAttention`.
        shifted: Whether windows are shifted along the axes that are longer than a window.
        mlp_ratio: Features of the MLP relative to `dim`.
    """

    def __init__(self, dim: int, heads: int, window: Size, shifted: bool, mlp_ratio: float) -> None:
        super().__init__()
        self.window, self.shifted = window, shifted
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, heads, window)
        self.mlp = mlp(dim, round(mlp_ratio * dim))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(b, f, h, w, d)` to the same shape."""
        x = x + self._attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        shape: Size = x.shape[1:4]  # type: ignore[assignment]
        size: Size = tuple(min(one, most) for one, most in zip(shape, self.window, strict=True))  # type: ignore[assignment]
        shift = [most // 2 if self.shifted and one > most else 0 for one, most in zip(shape, self.window, strict=True)]
        missing = [-one % unit for one, unit in zip(shape, size, strict=True)]
        x = F.pad(x, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))
        padded: Size = x.shape[1:4]  # type: ignore[assignment]
        mask = self._mask(padded, size, shift).to(x.device) if any(shift) else None
        x = x.roll([-one for one in shift], (1, 2, 3))
        parts = {"t": size[0], "y": size[1], "x": size[2]}
        windows = rearrange(x, "b (f t) (h y) (w x) d -> (b f h w) (t y x) d", **parts)
        if mask is not None:
            mask = mask.repeat(len(x), 1, 1)
        windows = self.attention(windows, size, mask)
        counts = {name: one // unit for name, one, unit in zip("fhw", padded, size, strict=True)}
        x = rearrange(windows, "(b f h w) (t y x) d -> b (f t) (h y) (w x) d", **parts, **counts)
        return x.roll(shift, (1, 2, 3))[:, : shape[0], : shape[1], : shape[2]]

    @staticmethod
    def _mask(shape: Size, size: Size, shift: Sequence[int]) -> Tensor:
        """Whether two positions of a window were neighbors before the shift, `(windows, n, n)`."""
        regions = torch.zeros(shape, dtype=torch.long)
        for axis, (length, unit, step) in enumerate(zip(shape, size, shift, strict=True)):
            region = torch.zeros(length, dtype=torch.long)
            if step:
                region[length - unit : length - step], region[length - step :] = 1, 2
            regions = regions * 3 + region.view([-1 if one == axis else 1 for one in range(3)])
        parts = {"t": size[0], "y": size[1], "x": size[2]}
        windows = rearrange(regions, "(f t) (h y) (w x) -> (f h w) (t y x)", **parts)
        return windows[:, :, None] == windows[:, None]


class PatchMerging(nn.Module):
    """Halves height and width, and doubles the features.

    Args:
        dim: Features of the input.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduce = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(b, f, h, w, d)` to `(b, f, h / 2, w / 2, 2 d)`; odd sides are padded."""
        x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return self.reduce(self.norm(rearrange(x, "b f (h y) (w x) d -> b f h w (x y d)", y=2, x=2)))


class SwinNetwork(ClipNetwork):
    """A Transformer with attention in shifted windows of space and time.

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip; 32 in the paper.
        image_size: Height and width of the frames; 224 in the paper.
        patch_size: Frames, height and width of the patches.
        dim: Features of the first stage; the next ones have twice as many.
        depths: Number of blocks of each stage.
        heads: Number of heads of each stage.
        window: Frames, height and width of the windows in tokens.
        mlp_ratio: Features of the MLPs relative to their input.

    Source: Video Swin Transformer, arXiv 2106.13230, without stochastic depth; 28.2 million parameters with the
        default sizes (Swin-T) and 400 classes. Where a clip is smaller than a window, positions keep their distances;
        the published code then counts them along the rows of the full window.
    """

    def __init__(
        self,
        num_classes: int,
        num_frames: int = 32,
        image_size: int = 224,
        patch_size: Size = (2, 4, 4),
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: Size = (8, 7, 7),
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        patch_size, window = tuple(patch_size), tuple(window)  # type: ignore[assignment]
        self.min_frames, self.min_size = patch_size[0], max(patch_size[1:])
        self.patches = nn.Conv3d(3, dim, patch_size, patch_size)
        self.patch_norm = nn.LayerNorm(dim)
        stages, width = [], dim
        for index, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            blocks: list[nn.Module] = [
                SwinBlock(width, count, window, shifted=block % 2 == 1, mlp_ratio=mlp_ratio) for block in range(depth)
            ]
            if index < len(depths) - 1:
                blocks.append(PatchMerging(width))
                width *= 2
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        x = self.patch_norm(rearrange(self.patches(clip), "b d f h w -> b f h w d"))
        for stage in self.stages:
            x = stage(x)
        features = self.norm(x).mean((1, 2, 3))
        return RecognizerOutput(logits=self.head(features), features=features)
