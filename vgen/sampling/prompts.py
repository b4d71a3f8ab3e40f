"""Prompts of one or several videos: a string, a list, a schedule by frame, or `None`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

from vgen.checks import check_integer, check_type

Prompt = str | None | Sequence[str | None]
"""For one video or, as a sequence, for several; `None` is unconditional."""


def is_single(prompt: Any) -> bool:
    """Whether a prompt is for one video: a string, a schedule or `None`, but not a list."""
    return prompt is None or isinstance(prompt, (str, Mapping))


def has_prompt(prompt: Any) -> bool:
    """Whether there is a prompt to condition on; one string in a list or in a schedule is enough."""
    if isinstance(prompt, Mapping):
        prompt = list(prompt.values())
    return prompt is not None and (isinstance(prompt, str) or any(one is not None for one in prompt))


def fill_empty_prompts(prompt: Prompt, text: str) -> str | list[str]:
    """Replaces `None` in a prompt, or in a list of prompts, by a string."""
    if prompt is None or isinstance(prompt, str):
        return text if prompt is None else prompt
    return [text if one is None else one for one in prompt]


def check_prompts(prompt: Any, name: str = "prompt") -> None:
    """Checks a prompt or a list of prompts.

    Raises:
        ValueError: The prompt is neither a string nor a list of strings, or the list is empty.
    """
    if not isinstance(prompt, (str, list)):
        raise ValueError(f"{name} must be a string or a list of strings, got {type(prompt).__name__}")
    if isinstance(prompt, list) and not prompt:
        raise ValueError(f"{name} must not be an empty list")
    for one in [prompt] if isinstance(prompt, str) else prompt:
        if not isinstance(one, str):
            raise ValueError(f"{name} must be a string or a list of strings, got {one!r} in the list")


@dataclass
class PromptSchedule:
    """Prompts by the index of the new frame at which they start."""

    prompts: dict[int, Any]
    """Strings, or lists of strings for several videos. There is always one at frame 0."""

    @classmethod
    def of(cls, prompt: Prompt | Mapping[int, str]) -> PromptSchedule:
        """Converts the `prompt` argument of `VideoGenPipeline.rollout` to a schedule.

        Raises:
            ValueError: The prompt has a wrong type, or a mapping has no frame 0 or has keys that are not integers.
        """
        expected = "a string, a list of strings, a dict of strings by frame, or None"
        check_type("prompt", prompt, (str, list, Mapping, NoneType), expected)
        if not isinstance(prompt, Mapping):
            return cls({0: prompt})
        for frame in prompt:
            check_integer("a frame of a prompt schedule", frame, minimum=0)
        if 0 not in prompt:
            raise ValueError(f"a prompt schedule must start at frame 0, got frames {sorted(prompt)}")
        return cls(dict(sorted(prompt.items())))

    def due(self, frame: int) -> Any:
        """The prompt that applies to a new frame, with "" instead of `None`."""
        return fill_empty_prompts(self.prompts[max(begin for begin in self.prompts if begin <= frame)], "")

    def coarse(self, interval: int) -> PromptSchedule:
        """The schedule of every `interval`-th frame. Each prompt starts at the first such frame that it applies to."""
        return PromptSchedule({-(-frame // interval): prompt for frame, prompt in self.prompts.items()})
