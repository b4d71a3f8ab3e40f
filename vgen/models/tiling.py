"""Processing of large frames in overlapping tiles, blended as in diffusers' autoencoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.checks import check_integer


@dataclass
class Tiling:
    """Sizes of tiles and distances between them, in pixels."""

    height: int = 256
    width: int = 256
    stride_height: int = 192
    stride_width: int = 192

    def check(self, unit: int) -> None:
        """Checks that tiles cover the frame and are aligned with latents.

        Args:
            unit: Height and width in pixels of one latent.

        Raises:
            ValueError: A size or stride is not a positive multiple of `unit`, or a stride exceeds its size.
        """
        for name, side, stride in (
            ("height", self.height, self.stride_height),
            ("width", self.width, self.stride_width),
        ):
            check_integer(f"tile {name}", side, unit)
            check_integer(f"tile stride in {name}", stride, unit, side)
            if side % unit or stride % unit:
                raise ValueError(
                    f"tile {name} and its stride must be multiples of {unit}, got {side} and {stride} "
                    f"(nearest: {round(side / unit) * unit} and {max(unit, round(stride / unit) * unit)})"
                )


def run_tiled(run: Callable[[Tensor, str], Tensor], x: Tensor, tiling: Tiling, in_unit: int, out_unit: int) -> Tensor:
    """Runs a network on tiles of `x` and blends overlapping results with linear ramps.

    Args:
        run: Maps a tile and its name to a result tile. The name identifies the tile's branch of a state.
        x: `(b, c, n, h, w)`.
        tiling: Sizes of tiles in pixels.
        in_unit: Pixels per row or column of `x`.
        out_unit: Pixels per row or column of the result.

    Returns:
        The result `(b, c', n', h', w')` for the whole frame.
    """
    height, width = x.shape[-2:]
    tile = (tiling.height // in_unit, tiling.width // in_unit)
    step = (tiling.stride_height // in_unit, tiling.stride_width // in_unit)
    kept = (tiling.stride_height // out_unit, tiling.stride_width // out_unit)
    overlap = (tiling.height // out_unit - kept[0], tiling.width // out_unit - kept[1])
    rows: list[list[Tensor]] = []
    finished = []
    for top in range(0, height, step[0]):
        row: list[Tensor] = []
        for left in range(0, width, step[1]):
            part = run(x[..., top : top + tile[0], left : left + tile[1]], f"tile {top},{left}")
            if rows:
                part = _blend(rows[-1][len(row)], part, overlap[0], dim=-2)
            if row:
                part = _blend(row[-1], part, overlap[1], dim=-1)
            row.append(part)
        rows = [row]
        finished.append(torch.cat([part[..., : kept[0], : kept[1]] for part in row], dim=-1))
    size = (height * in_unit // out_unit, width * in_unit // out_unit)
    return torch.cat(finished, dim=-2)[..., : size[0], : size[1]]


def _blend(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """Blends the end of `before` into the start of `after` over `extent` rows or columns along `dim`."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    if extent == 0:
        return after
    ramp = torch.arange(extent, device=after.device, dtype=after.dtype) / extent
    ramp = ramp[:, None] if dim == -2 else ramp
    end, start = before.narrow(dim, before.shape[dim] - extent, extent), after.narrow(dim, 0, extent)
    rest = after.narrow(dim, extent, after.shape[dim] - extent)
    return torch.cat([end * (1 - ramp) + start * ramp, rest], dim=dim)
