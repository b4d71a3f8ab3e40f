"""Options of rollouts and interpolations: their defaults, checks and JSON, for Python, the command line and jobs.

An option is a field. It reaches `VideoGenPipeline.rollout`, `vgen rollout`, `pipelines/rollout.py`, a checkpoint's
`rollout_defaults` and saved rollouts from this module only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields, replace
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal, get_type_hints

from docstring_parser import parse_from_object
from typing_extensions import Self

from vgen.checks import check_choice, check_integer, check_number, check_type
from vgen.temporal.grid import Positions

PromptChange = Literal["recompute", "redraw", "cut"]
"""What happens to the frames in the KV cache when the prompt of a rollout changes."""
Context = Literal["cached", "recomputed", "reencoded"]
"""What a chunk of a rollout attends to before it."""


@dataclass(kw_only=True)
class DenoisingOptions:
    """Options of everything that denoises; `None` uses the checkpoint's default."""

    num_inference_steps: int | None = None
    """Number of denoising steps; in rollouts and interpolations, for each chunk or window."""
    guidance_scale: float | None = None
    """Weight of classifier-free guidance. Values up to 1 turn it off; without a prompt it is off by default."""


@dataclass(kw_only=True)
class SamplingOptions(DenoisingOptions):
    """Options that rollouts and interpolations share; `None` uses the checkpoint's default."""

    negative_prompt: str | None = None
    """Prompt to steer away from; requires guidance."""
    frame_rate: float | None = None
    """Frames per second of the content: of the new frames in a rollout, of the given frames in an interpolation."""

    def __post_init__(self) -> None:
        for name in self.names():  # NumPy scalars are not JSON-serializable
            value = getattr(self, name)
            if isinstance(value, Real) and not isinstance(value, (int, float)):
                setattr(self, name, int(value) if isinstance(value, Integral) else float(value))

    @classmethod
    def names(cls) -> list[str]:
        """Names of all options."""
        return [field.name for field in fields(cls)]

    @classmethod
    def of(cls, source: Any) -> Self:
        """The options among the attributes of an object, such as the configuration of a job."""
        return cls(**{name: getattr(source, name) for name in cls.names()})

    @classmethod
    def from_json(cls, record: Mapping[str, Any], name: str = "options") -> Self:
        """Options by name.

        Raises:
            ValueError: A name is not that of an option.
        """
        unknown = sorted(set(record) - set(cls.names()))
        if unknown:
            raise ValueError(f"{name} must be some of {', '.join(cls.names())}, got {', '.join(unknown)}")
        return cls(**record)

    def to_json(self) -> dict[str, Any]:
        """All options by name, as a JSON-serializable dictionary."""
        return asdict(self)

    def given(self) -> dict[str, Any]:
        """The options that are not `None`."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def updated(self, **options: Any) -> Self:
        """A copy with some options set.

        Raises:
            TypeError: A name is not that of an option.
        """
        unknown = sorted(set(options) - set(self.names()))
        if unknown:
            raise TypeError(f"unexpected arguments {', '.join(unknown)}: options are {', '.join(self.names())}")
        return replace(self, **{name: value for name, value in options.items() if value is not None})

    def check(self, resolved: bool = True) -> None:
        """Checks all options.

        Args:
            resolved: Whether every option must have a value; otherwise those that are `None` are not checked.

        Raises:
            ValueError: An option has the wrong type or is out of range.
        """
        for name, check in self._checks().items():
            value = getattr(self, name)
            if resolved or value is not None:
                check(name, value)
        if self.negative_prompt is not None:
            check_type("negative_prompt", self.negative_prompt, str, "a string")

    def _checks(self) -> dict[str, Callable[[str, Any], None]]:
        return {
            "num_inference_steps": partial(check_integer, minimum=1),
            "guidance_scale": check_number,
            "frame_rate": partial(check_number, above=0),
        }

    def _filled(self, defaults: Mapping[str, Any], prompted: bool) -> Self:
        unguided = {} if prompted else {"guidance_scale": 1.0}
        known = {name: value for name, value in defaults.items() if name in self.names()}
        return replace(self, **(known | unguided | self.given()))


@dataclass(kw_only=True)
class RolloutOptions(SamplingOptions):
    """Options of `VideoGenPipeline.rollout` and `predict`; `None` uses the checkpoint's default for rollouts."""

    chunk_size: int | None = None
    """Number of token frames that are generated at once."""
    first_chunk_size: int | None = None
    """Number of token frames of the first chunk of a new video; 1 by default."""
    window: int | None = None
    """Number of recent token frames in the KV cache."""
    sink: int | None = None
    """Number of token frames from the start of the video that stay in the KV cache."""
    positions: Positions | None = None
    """What the time positions in attention are counted from: the oldest frame in the KV cache (`relative`), so that
    they never exceed those of training, or the start of the video (`absolute`). They differ only with a sink."""
    context: Context | None = None
    """What a chunk attends to before it. `cached`: keys and values as each frame left them in the KV cache, which also
    depend on older frames. `recomputed`: those that are computed before each chunk from the latents of the window
    alone. `reencoded`: the same, but the first latent of the window is its decoded frame, encoded again as the first
    frame of a video."""
    first_chunk_sigmas: list[float] | None = None
    """Noise levels of the steps of the first chunk; an empty list means those of the others."""
    history_noise: float | None = None
    """Noise level that the denoiser is conditioned on when generated frames are written to the KV cache, from 0 to
    below 1; no noise is added."""
    history_guidance_scale: float | None = None
    """Weight of history guidance, which contrasts the history with a noisier copy of it. 1 turns it off; any other
    value doubles the cost."""
    keyframe_interval: int | None = None
    """If 2 or more, coarse to fine: only every N-th frame is rolled out, at a lower frame rate, and the others are
    interpolated, so the KV cache covers a longer time span."""
    prompt_change: PromptChange | None = None
    """What happens to the KV cache when the prompt changes. `recompute`: it is computed again with the new prompt.
    `redraw`: the last token frame is redrawn for the new prompt, and only this frame is kept, so the video continues
    from it. `cut`: nothing is kept, and a new scene begins."""
    prompt_change_strength: float | None = None
    """With `redraw`, the share of the denoising steps that redraw the frame, above 0 and up to 1, rounded up to whole
    steps. More follow the prompt better; fewer keep more of the frame."""

    def resolve(self, pipeline: Mapping[str, Any], denoiser: Mapping[str, Any], *, prompted: bool) -> RolloutOptions:
        """The same options with every default filled in, and checked.

        Args:
            pipeline: Config of the pipeline; its `rollout_defaults` take precedence over its other defaults.
            denoiser: Config of the denoiser.
            prompted: Whether there is a prompt; without one, guidance is off by default.

        Raises:
            ValueError: An option has the wrong type, is out of range, or exceeds what the denoiser was trained for.
        """
        options = self.filled(pipeline, denoiser, prompted=prompted)
        options.check()
        options.check_denoiser(denoiser)
        return options

    def filled(self, pipeline: Mapping[str, Any], denoiser: Mapping[str, Any], *, prompted: bool) -> RolloutOptions:
        """The same options with every default filled in, unchecked; arguments as in `resolve`."""
        own = {
            "first_chunk_size": 1,
            "positions": "relative",
            "context": "cached",
            "first_chunk_sigmas": [],
            "history_noise": 0.0,
            "history_guidance_scale": 1.0,
            "keyframe_interval": 1,
            "prompt_change": "redraw",
            "prompt_change_strength": 0.7,
        }
        return self._filled({**own, **denoiser, **pipeline, **pipeline["rollout_defaults"]}, prompted)

    def check(self, resolved: bool = True) -> None:
        """Checks all options, as `SamplingOptions.check` does."""
        super().check(resolved)
        if self.prompt_change == "cut" and (self.keyframe_interval or 1) > 1:
            raise ValueError(
                f"prompt_change='cut' needs keyframe_interval=1, got {self.keyframe_interval}: coarse to fine "
                "interpolates across the change"
            )

    def _checks(self) -> dict[str, Callable[[str, Any], None]]:
        return super()._checks() | {
            "chunk_size": partial(check_integer, minimum=1),
            "first_chunk_size": partial(check_integer, minimum=1),
            "window": partial(check_integer, minimum=1),
            "sink": partial(check_integer, minimum=0),
            "positions": partial(check_choice, choices=Positions),
            "context": partial(check_choice, choices=Context),
            "first_chunk_sigmas": _check_sigmas,
            "keyframe_interval": partial(check_integer, minimum=1),
            "history_noise": partial(check_number, minimum=0, below=1),
            "history_guidance_scale": check_number,
            "prompt_change": partial(check_choice, choices=PromptChange),
            "prompt_change_strength": partial(check_number, above=0, maximum=1),
        }

    def check_denoiser(self, denoiser: Mapping[str, Any]) -> None:
        """Checks that a denoiser was trained for chunks of this size and a context of this length.

        Raises:
            ValueError: The denoiser was not trained for these options.
        """
        assert self.sink is not None and self.window is not None and self.chunk_size is not None
        modes, limit = denoiser["group_modes"], denoiser["trained_token_frames"]
        if "chunk" not in modes and not ("causal" in modes and self.chunk_size == 1):
            raise ValueError(
                f"a rollout with chunk_size={self.chunk_size} needs a checkpoint trained with groups chunk (or causal "
                f"for chunk_size=1); this one was trained with {', '.join(modes)}"
            )
        assert self.first_chunk_size is not None
        if limit is not None and self.first_chunk_size > limit:
            raise ValueError(
                f"first_chunk_size must be at most {limit} token frames, as in training, got {self.first_chunk_size}"
            )
        total = self.sink + self.window + self.chunk_size
        if limit is not None and total > limit:
            raise ValueError(
                f"sink + window + chunk_size must be at most {limit} token frames, as in training; got "
                f"{self.sink} + {self.window} + {self.chunk_size} = {total}"
            )


@dataclass(kw_only=True)
class InterpolationOptions(SamplingOptions):
    """Options of `VideoGenPipeline.interpolate`; `None` uses the checkpoint's default."""

    factor: int = 2
    """N: the given frames become every N-th frame of the result."""

    def resolve(self, pipeline: Mapping[str, Any], *, prompted: bool) -> InterpolationOptions:
        """The same options with every default filled in, and checked.

        Args:
            pipeline: Config of the pipeline.
            prompted: Whether there is a prompt; without one, guidance is off by default.

        Raises:
            ValueError: An option has the wrong type or is out of range.
        """
        options = self._filled(pipeline, prompted)
        options.check()
        return options

    def _checks(self) -> dict[str, Callable[[str, Any], None]]:
        return super()._checks() | {"factor": partial(check_integer, minimum=2)}


def _check_sigmas(name: str, value: Any) -> None:
    check_type(name, value, list, "a list of noise levels")
    for sigma in value:
        check_number(f"each of {name}", sigma, above=0, maximum=1)


def parameters_of(options: type) -> list[inspect.Parameter]:
    """A keyword parameter for each field of a dataclass, with its type and default."""
    hints = get_type_hints(options)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default_of(field),
            annotation=hints[field.name],
        )
        for field in fields(options)
    ]


def _default_of(field: Field) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default


def help_of(options: type) -> dict[str, str]:
    """The documentation of each field of a dataclass."""
    found: dict[str, str] = {}
    for part in reversed(options.__mro__[:-1]):
        for one in parse_from_object(part).params:
            found[one.arg_name] = " ".join((one.description or "").split())
    return {field.name: found[field.name] for field in fields(options)}


def accepts(options: type[SamplingOptions], *, without: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """A decorator for functions with `**options`: their signature, as `help` shows it, names every option."""

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        taken = {one.name for one in own} | set(without)
        added = [one for one in parameters_of(options) if one.name not in taken]
        function.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        return function

    return decorate
