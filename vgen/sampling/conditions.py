"""What a prediction depends on besides the noisy latents: conditions and guidance, passed as arguments.

Axes: `b` videos, `l` tokens of a prompt, `d` channels, `t h w` latent frames, rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.guiders import BaseGuidance
from torch import Tensor

from vgen.sampling.options import SamplingOptions


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How predictions are guided."""

    scale: float = 1.0
    """Weight of classifier-free guidance. Values up to 1 turn it off."""
    guider: BaseGuidance | None = None
    """One of diffusers' guiders instead of classifier-free guidance with `scale`."""
    history_scale: float = 1.0
    """Weight of history guidance; off at 1."""
    low_noise_scale: float | None = None
    """Weight of classifier-free guidance for the expert of low noise levels; `None` is `scale`."""

    @classmethod
    def of(cls, options: SamplingOptions, guider: BaseGuidance | None = None) -> Guidance:
        """The guidance of resolved options."""
        assert options.guidance_scale is not None
        history_scale = getattr(options, "history_guidance_scale", 1.0)
        return cls(scale=options.guidance_scale, guider=guider, history_scale=history_scale)

    @property
    def needs_negative(self) -> bool:
        """Whether negative prompts are needed."""
        return self.guider is not None or max(self.scale, self.low_noise_scale or 0.0) > 1

    @property
    def uses_weak_history(self) -> bool:
        """Whether a noisier copy of the history is needed."""
        return self.history_scale != 1


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the denoiser is conditioned on, for all videos of a batch."""

    prompt_embeds: Tensor
    """`(b, l, d)`."""
    negative_prompt_embeds: Tensor | None = None
    """`(b, l, d)`; needed for guidance."""
    frame_rate: float | None = None
    """Pixel frames per second; `None` for denoisers without a frame rate embedding."""
    actions: Tensor | None = None
    """Actions of the token frames `(b, n, k)`, NaN where they are unknown; `None` if all are."""
    keyframes: Tensor | None = None
    """Keyframe slots `(b, s * (c + 1), t, h, w)`."""
    condition: Tensor | None = None
    """Mask and latents of the known frames `(b, s + c, t, h, w)`, for networks with extra channels for them."""
    image_embeds: Tensor | None = None
    """Tokens of known frames from an image encoder `(b, k, d)`."""
    groups: str | Sequence[int] = "full"
    """Frame groups, see `vgen.temporal.attention.make_groups`."""
    attention_kwargs: dict[str, Any] | None = None
    """Passed to the attention processors; `{"scale": ...}` scales LoRA layers."""

    def without_keyframes(self) -> Conditions:
        """The same, for chunks that have no keyframes and for those that are already clean."""
        return replace(self, keyframes=None)

    def for_denoiser(self) -> dict[str, Any]:
        """Keyword arguments of a denoiser, except for the prompt."""
        inputs = {
            "frame_rate": self.frame_rate,
            "keyframes": self.keyframes,
            "groups": self.groups,
            "attention_kwargs": self.attention_kwargs,
        }
        optional = {name: getattr(self, name) for name in ("actions", "condition", "image_embeds")}
        return inputs | {name: value for name, value in optional.items() if value is not None}

    def doubled(self) -> Conditions:
        """Negative prompts with unknown actions, and the prompts with the actions, in one batch `(2b, l, d)`."""
        assert self.negative_prompt_embeds is not None
        given = {name: getattr(self, name) for name in ("keyframes", "condition", "image_embeds")}
        both: dict[str, Any] = {name: None if one is None else torch.cat([one, one]) for name, one in given.items()}
        if self.actions is not None:
            both["actions"] = torch.cat([torch.full_like(self.actions, torch.nan), self.actions])
        prompts = torch.cat([self.negative_prompt_embeds, self.prompt_embeds])
        return replace(self, prompt_embeds=prompts, negative_prompt_embeds=None, **both)
