"""Training samples of a denoiser: a window of an encoded clip, its known frames, noise levels and conditioning.

A sample depends only on the seed, the optimizer step and its index in the batch. Axes: `b` batch, `c` channels,
`t h w` latent frames, rows and columns, `n` token frames.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vgen.checks import check_choice, check_integer, check_number, check_weights
from vgen.data.clips import warn_once
from vgen.data.latents import EncodedClip, LatentSet, epoch_order
from vgen.diffusion import Prediction
from vgen.io.fingerprint import encoder_digest, weights_digest
from vgen.io.records import read_json
from vgen.models.denoiser import pack_keyframes
from vgen.models.image_vae import PerFrameVAE
from vgen.models.prompts import tokenize
from vgen.models.vae import CausalVideoVAE
from vgen.temporal.actions import pack_actions
from vgen.temporal.attention import GroupMode, make_groups
from vgen.temporal.flow import Motion, measure_motion
from vgen.temporal.grid import LatentGrid
from vgen.training.mixture import (
    KeyframeKind,
    KnownKind,
    WindowKind,
    draw_keyframes,
    draw_num_leading,
    draw_window,
    least_known,
)
from vgen.training.noise_levels import LevelDistribution, LevelKind, draw_levels
from vgen.training.run import RunConfig, generators
from vgen.training.temporal_loss import TemporalLossConfig, temporal_loss

CONDITIONING_KEYS = (
    "input_ids", "prompt_mask", "prompt_embeds", "frame_rate", "keyframes", "num_leading", "conv_context", "gap_index",
    "groups", "gap_order", "num_gaps", "condition", "image_embeds", "actions",
)  # fmt: skip


ChoiceT = TypeVar("ChoiceT", bound=str)


@dataclass(kw_only=True)
class SampleConfig(RunConfig, TemporalLossConfig):
    """Settings of a denoiser's training samples."""

    latents_dir: Path
    """Folder with latents, written by `pipelines/encode_latents.py`."""
    max_sequence_length: int = 32
    """Length in tokens that prompts are padded or truncated to."""
    groups: dict[GroupMode, float] = field(default_factory=lambda: {"full": 0.5, "chunk": 0.25, "causal": 0.25})
    """Probability weights of the attention modes, drawn for each step. In `full`, the leading known frames form a
    group of their own."""
    windows: dict[WindowKind, float] = field(default_factory=lambda: {"start": 1.0})
    """Probability weights of the part of a clip that a sample is: its `start`, a later part (`anywhere`), or the
    attention sink followed by a later part (`sink`)."""
    window_lengths: list[int] = field(default_factory=list)
    """Lengths of samples in token frames, drawn for each step; an empty list means whole clips."""
    known: dict[KnownKind, float] = field(default_factory=lambda: {"none": 1.0})
    """Probability weights of the known frames of a sample: `none`, `leading`, `keyframes` or `both`."""
    num_leading: list[int] = field(default_factory=list)
    """Numbers of leading known token frames, drawn for each sample that has any; an empty list allows all numbers."""
    keyframes: dict[KeyframeKind, float] = field(
        default_factory=lambda: {"every": 1.0, "last": 1.0, "any": 1.0, "next": 1.0}
    )
    """Probability weights of the choice of keyframes: `every` n-th frame, the `last` frame, `any` random frames, or
    the ones `next` to the leading known frames."""
    corrupted: float = 0.5
    """Probability that noise is added to the leading known frames, at an independent level for each frame."""
    corrupted_level: float = 1 / 3
    """Highest noise level of such frames."""
    levels: dict[LevelKind, float] = field(default_factory=lambda: {"shared": 1.0})
    """Probability weights of the noise levels of a sample: one for all frames (`shared`), one per `group`, or one per
    frame (`independent`)."""
    prediction: Prediction = "flow"
    """What the denoiser predicts: `flow` (velocity of flow matching), `v_prediction` or `epsilon`."""
    level_distribution: LevelDistribution = "logit_normal"
    """How noise levels of flow matching are drawn: `logit_normal`, or `uniform` before the shift."""
    level_mean: float = 0.0
    """Mean of the logit of a noise level."""
    level_std: float = 1.0
    """Standard deviation of the logit of a noise level."""
    level_shift: float = 1.0
    """Timestep shift of flow matching, in training and at inference; values above 1 favor high noise levels."""
    level_range: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """Lowest and highest noise level of samples; the distribution is limited to this range."""
    temporal_space: Literal["latent", "pixel"] = "latent"
    """Space in which the temporal loss compares the estimated clean clip: `latent`, or `pixel`, which decodes it."""
    text_dropout: float = 0.1
    """Probability that the caption is replaced by the empty prompt."""
    frame_rate_dropout: float = 0.1
    """Probability that a sample has no frame-rate conditioning."""
    action_dropout: float = 0.1
    """Probability that the actions of a sample are unknown, for guidance and for videos without actions."""

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: A setting is out of range or unknown.
        """
        super().check()
        self.check_temporal_loss()
        check_weights("groups", self.groups, GroupMode)
        check_weights("windows", self.windows, WindowKind)
        check_weights("known", self.known, KnownKind)
        check_weights("keyframes", self.keyframes, KeyframeKind)
        check_weights("levels", self.levels, LevelKind)
        for number in self.num_leading:
            check_integer("each of num_leading", number, minimum=1)
        if len(self.level_range) != 2:
            raise ValueError(f"level_range must be two noise levels, got {self.level_range}")
        check_number("the lower end of level_range", self.level_range[0], minimum=0, below=1)
        check_number("the upper end of level_range", self.level_range[1], above=self.level_range[0], maximum=1)
        for name in ("text_dropout", "frame_rate_dropout", "action_dropout", "corrupted", "corrupted_level"):
            check_number(name, getattr(self, name), minimum=0, maximum=1)
        check_choice("level_distribution", self.level_distribution, LevelDistribution)


class Source(NamedTuple):
    """Encoded clips, with settings that these clips support."""

    data: LatentSet
    config: SampleConfig


@dataclass(frozen=True)
class DenoiserSpec:
    """The properties of a denoiser that samples depend on."""

    patch_frames: int
    """Latent frames per token frame."""
    chunk_size: int
    """Token frames per chunk in attention mode `chunk`."""
    sink: int
    """Token frames of the attention sink, which a rollout never evicts."""
    keyframe_slots: int
    """Number of pixel frames per latent that can be keyframes; 0 if keyframes are not supported."""
    conv_history: int = 0
    """Number of latents before a gap that temporal convolutions need as context."""
    has_condition: bool = False
    """Whether it makes videos from images, which are extra channels of its input."""
    has_image_embeds: bool = False
    """Whether it also attends to tokens of these images."""
    action_dim: int = 0
    """Channels of the action of one pixel frame; 0 for a denoiser without actions."""
    action_frames: int = 1
    """Pixel frames per token frame, whose actions are taken together."""
    leading_is_group: bool = True
    """Whether leading known frames are an attention group of their own. In Wan 2.2 TI2V-5B they are not."""

    @classmethod
    def of(cls, denoiser: Any, expand_timesteps: bool = False) -> DenoiserSpec:
        """Reads the spec from a denoiser of this package.

        Args:
            denoiser: The denoiser.
            expand_timesteps: The setting of its pipeline.
        """
        config = denoiser.config
        return cls(
            denoiser.patch_size[0],
            config.chunk_size,
            config.sink,
            config.keyframe_slots,
            conv_history=getattr(denoiser, "conv_history", 0),
            has_condition=denoiser.condition_channels > 0,
            has_image_embeds=config.get("image_dim") is not None,
            action_dim=config.action_dim,
            action_frames=config.action_frames,
            leading_is_group=not expand_timesteps,
        )


def record_tasks(denoiser: Any, config: SampleConfig, data: LatentSet, expand_timesteps: bool = False) -> Source:
    """Adds the trained tasks and group modes to a denoiser's config, and resolves empty `window_lengths`.

    Args:
        denoiser: The denoiser.
        config: Settings of the run.
        data: The clips.
        expand_timesteps: The setting of the pipeline. Such pipelines take a first frame, and continue no videos.

    Raises:
        ValueError: The clips are too short; or keyframes are wanted, but the model has no keyframe slots or the data
            has no latents of single frames.
    """
    network = denoiser.config
    whole = data.num_latents // denoiser.patch_size[0]
    lengths = config.window_lengths or [whole]
    used = {kind for kind, weight in config.known.items() if weight > 0}
    if used & {"keyframes", "both"} and not (data.has_frames and network.keyframe_slots):
        raise ValueError(
            f"known={config.known} needs a model with keyframe_slots (got keyframe_slots={network.keyframe_slots}) "
            "and latents of single frames, which pipelines/encode_latents.py --keyframes true writes"
        )
    if used - {"none"} and min(lengths) < 2:
        raise ValueError(
            f"window_lengths must be at least 2 with known frames, got {lengths} with known={config.known}"
        )
    kinds = [kind for kind, weight in config.windows.items() if weight > 0]
    for kind, length in itertools.product(kinds, lengths):
        draw_window(kind, length, whole, network.sink, random.Random(0))
    trained = ["leading"] if used & {"leading", "both"} or set(kinds) - {"start"} else []
    trained = [] if expand_timesteps else trained
    trained += ["keyframes"] if used & {"keyframes", "both"} else []
    modes = [mode for mode, weight in config.groups.items() if weight > 0]
    denoiser.register_to_config(
        tasks=list(dict.fromkeys([*network.tasks, *trained])),
        group_modes=list(dict.fromkeys([*network.group_modes, *modes])),
        trained_token_frames=max(*lengths, network.trained_token_frames or 0),
    )
    return Source(data, replace(config, window_lengths=lengths))


def _encoding_settings(source: Source) -> dict[str, Any]:
    """The settings that `encode_latents.py` stored with the clips; empty if there are none."""
    path = source.config.latents_dir / "settings.json"
    return read_json(path) if path.is_file() else {}


def check_stills(denoiser: Any, sources: Sequence[Source]) -> None:
    """Checks that single frames were encoded as the denoiser expects its keyframes.

    Raises:
        ValueError: They were not.
    """
    wanted = denoiser.config.still_keyframes
    for source in sources:
        folder, settings = source.config.latents_dir, _encoding_settings(source)
        stored = settings.get("still_keyframes", False) if settings else wanted
        if source.data.has_frames and denoiser.config.keyframe_slots and stored != wanted:
            raise ValueError(
                f"the keyframes in {folder} were encoded with still_keyframes={stored}, and the denoiser has "
                f"still_keyframes={wanted}: encode the clips again, or change the setting in model"
            )


def check_actions(denoiser: Any, sources: Sequence[Source]) -> None:
    """Checks that clips have the actions that a denoiser takes.

    Raises:
        ValueError: All clips are without, or those of a source do not fit the denoiser.
    """
    network = denoiser.config
    acted = [source for source in sources if source.data.action_dim]
    if network.action_dim and not acted:
        folders = ", ".join(str(source.config.latents_dir) for source in sources)
        raise ValueError(f"action_dim={network.action_dim} needs actions, and the clips in {folders} have none")
    for source in acted:
        frames, latents = source.data.num_frames, source.data.num_latents
        unit = denoiser.patch_size[0] * ((frames - 1) // (latents - 1) if latents > 1 else 1)
        needed, found = (source.data.action_dim, unit), (network.action_dim, network.action_frames)
        setting = f"model={{action_dim: {needed[0]}, action_frames: {needed[1]}}}"
        if not network.action_dim:
            warn_once(f"the actions in {source.config.latents_dir} are not used: the denoiser takes none ({setting})")
        elif found != needed:
            raise ValueError(
                f"the actions in {source.config.latents_dir} need {setting}, got action_dim={found[0]} and "
                f"action_frames={found[1]}"
            )


def record_frame_rates(denoiser: Any, data: Sequence[LatentSet]) -> None:
    """Adds the frame rates of all clips to the range of trained frame rates in a denoiser's config."""
    rates = torch.cat([one.frame_rates for one in data])
    known = [rates.min().item(), rates.max().item(), *(denoiser.config.trained_frame_rates or ())]
    denoiser.register_to_config(trained_frame_rates=[min(known), max(known)])


def check_conditions(denoiser: Any, sources: Sequence[Source], expand_timesteps: bool = False) -> None:
    """Checks that clips and settings have what a model that makes videos from images is trained with.

    Args:
        denoiser: The denoiser.
        sources: The training data.
        expand_timesteps: The setting of the pipeline.

    Raises:
        ValueError: The latents were encoded without the images, or in another way than the denoiser expects, or the
            settings do not allow images.
    """
    network, channels = denoiser.config, denoiser.condition_channels
    for source in sources:
        data, config = source
        windows = {kind for kind, weight in config.windows.items() if weight > 0}
        known = {kind for kind, weight in config.known.items() if weight > 0}
        if expand_timesteps and known != {"none"}:
            others = (known | windows) - {"none", "leading", "start"}
            if config.num_leading != [1] or config.corrupted or others:
                raise ValueError(
                    "this model is given a first frame without noise: set num_leading=[1], corrupted=0, only none and "
                    f"leading in known, and windows={{start: 1}}, got num_leading={config.num_leading}, "
                    f"corrupted={config.corrupted}, known={config.known}, windows={config.windows}"
                )
        if not channels:
            continue
        tokens, width = data.image_tokens
        if data.condition_channels != channels:
            found = f"{data.condition_channels} channels: pass --condition [0], or [0,-1]"
            needed = f"a condition of {channels} channels"
        elif width != (network.image_dim or width):
            needed, found = f"image tokens of {network.image_dim} channels", f"{width} channels: pass --image_encoder"
        elif tokens != (network.pos_embed_seq_len or tokens):
            needed, found = f"{network.pos_embed_seq_len} image tokens", f"{tokens}: pass --condition [0,-1]"
        else:
            needed = found = ""
        if needed:
            raise ValueError(
                f"this model makes videos from images and needs {needed}, but the latents in {config.latents_dir} "
                f"have {found} to pipelines/encode_latents.py"
            )
        whole = data.num_latents // denoiser.patch_size[0]
        has_last = -1 in _encoding_settings(source).get("condition", [])
        if known != {"none"} or windows != {"start"} or (has_last and set(config.window_lengths) != {whole}):
            raise ValueError(
                "this model makes videos from images: set known={none: 1}, windows={start: 1}, and window_lengths=[] "
                f"if the last frame is given too, got known={config.known}, windows={config.windows}, "
                f"window_lengths={config.window_lengths}"
            )


def supported_config(denoiser: Any, config: SampleConfig, data: LatentSet) -> Source:
    """Removes the window lengths, windows and known frames that some clips do not support from the settings.

    Raises:
        ValueError: The clips support none of them.
    """
    whole = data.num_latents // denoiser.patch_size[0]
    lengths = [length for length in config.window_lengths if length <= whole]
    # a window with a gap needs a clip that is at least one token frame longer
    windows = {
        kind: weight for kind, weight in config.windows.items() if kind != "sink" or max(lengths, default=0) < whole
    }
    known = {kind: weight for kind, weight in config.known.items() if data.has_frames or kind in ("none", "leading")}
    if not lengths or not sum(windows.values()) or not sum(known.values()):
        raise ValueError(
            f"clips of {whole} token frames support none of window_lengths={config.window_lengths}, "
            f"windows={config.windows}, known={config.known}"
        )
    return Source(data, replace(config, window_lengths=lengths, windows=windows, known=known))


def check_encoders(sources: Sequence[Source], vae: Any, text_encoder: Any | None, max_sequence_length: int) -> None:
    """Checks that latents and caption embeddings were made with the pipeline's VAE and text encoder.

    Args:
        sources: The training data.
        vae: The pipeline's VAE.
        text_encoder: The pipeline's text encoder; `None` if no caption embeddings are used.
        max_sequence_length: The pipeline's prompt length in tokens.

    Raises:
        ValueError: The VAE's encoder or latent statistics differ from those of the pipeline, or the text encoder or
            prompt length do.
    """
    digest = encoder_digest(vae)
    text: dict[str, Any] = {}
    if text_encoder is not None:
        text = {"max_sequence_length": max_sequence_length, "text_encoder_sha256": weights_digest(text_encoder)}
    for source in sources:
        folder, settings = source.config.latents_dir, _encoding_settings(source)
        if settings.get("vae_sha256", digest) != digest:
            raise ValueError(
                f"the latents in {folder} were encoded with another VAE than this pipeline's: encode them again, or "
                "pass the VAE that encoded them with --vae"
            )
        wrong = [name for name, value in text.items() if settings.get(name) != value]
        if wrong:
            raise ValueError(
                f"the captions in {folder} were embedded with another {', '.join(wrong)} than this pipeline's: "
                "encode the clips again with its text encoder, or without --text_encoder"
            )


def check_motion(config: SampleConfig, sources: Sequence[Source]) -> None:
    """Checks that the latents support the temporal loss.

    Raises:
        ValueError: The latents were encoded without motion; or the loss compares pixels, but not all windows begin
            with their clip, so that they cannot be decoded.
    """
    if config.temporal_space == "latent":
        if config.warping_weight and not all(source.data.has_motion for source in sources):
            raise ValueError(
                "warping_weight needs latents with motion, which pipelines/encode_latents.py --flow dis writes"
            )
    elif {kind for kind, weight in config.windows.items() if weight > 0} != {"start"}:
        raise ValueError(
            "temporal_space=pixel decodes windows, which must all be at the start of their clip: windows must contain "
            f"only start, got {config.windows}"
        )


class StepPlan(NamedTuple):
    """What all samples of a step have in common."""

    mode: str
    """Attention mode."""
    source: int
    """Index of the source of the clips."""
    length: int
    """Length of the windows in token frames."""


def plan_step(config: SampleConfig, sources: Sequence[Source], shares: Sequence[float], step: int) -> StepPlan:
    """Draws what all samples of a step have in common."""
    rng = random.Random(config.seed * 1_000_003 + step)
    mode = choose(config.groups, rng)
    source = rng.choices(range(len(sources)), shares)[0]
    return StepPlan(mode, source, rng.choice(sources[source].config.window_lengths))


def choose(weights: Mapping[ChoiceT, float], rng: random.Random) -> ChoiceT:
    """Draws one of the names with probabilities proportional to the weights."""
    return rng.choices(list(weights), list(weights.values()))[0]


def clip_of(source: Source, sample: int) -> int:
    """The index of the clip that a sample is taken from; samples are counted over all epochs of the run."""
    epoch, place = divmod(sample, len(source.data))
    return int(_order(len(source.data), source.config.seed, epoch)[place])


_order = lru_cache(maxsize=8)(epoch_order)


class DenoiserBatches(Dataset):
    """A denoiser's training batches on the CPU, indexed by step and part of the batch.

    Args:
        config: Settings of the run.
        sources: Encoded clips, each with settings that they support.
        shares: Probability of each source, drawn for each step.
        spec: Properties of the denoiser.
        tokenizer: Tokenizer of the text encoder; `None` uses the caption embeddings that are stored with the clips, if
            there are any.
    """

    def __init__(
        self,
        config: SampleConfig,
        sources: Sequence[Source],
        shares: Sequence[float],
        spec: DenoiserSpec,
        tokenizer: Any | None,
    ):
        self.config, self.sources, self.shares, self.spec = config, list(sources), list(shares), spec
        self.tokenizer = tokenizer

    def plan(self, step: int) -> StepPlan:
        """See `plan_step`."""
        return plan_step(self.config, self.sources, self.shares, step)

    def __getitem__(self, key: tuple[int, slice]) -> dict[str, Any]:
        """The samples of a step whose indices in the batch are in a slice; see `make_batch`."""
        step, part = key
        plan = self.plan(step)
        return make_batch(self.sources[plan.source], self.spec, step, part, plan.mode, plan.length, self.tokenizer)

    def name(self, step: int) -> str:
        """Describes a step's clips by number and folder."""
        plan = self.plan(step)
        source, first = self.sources[plan.source], step * self.config.batch_size
        clips = [str(clip_of(source, sample)) for sample in range(first, first + self.config.batch_size)]
        return f"{plan.length} token frames of clips {', '.join(clips)} in {source.config.latents_dir}"


def make_batch(
    source: Source, spec: DenoiserSpec, step: int, part: slice, mode: str, length: int, tokenizer: Any | None
) -> dict[str, Any]:
    """Makes a part of a step's batch.

    Args:
        source: The clips.
        spec: Properties of the denoiser.
        step: Index of the optimizer step, from 0.
        part: Indices in the batch.
        mode: Attention mode.
        length: Length of the windows in token frames.
        tokenizer: Tokenizer of the text encoder; `None` uses the caption embeddings that are stored with the clips, if
            there are any.

    Returns:
        The stacked outputs of `make_sample`, and the prompts, if any: `input_ids` and `prompt_mask` `(b, l)`, or
        `prompt_embeds` `(b, l, d)`. `groups` is a list, so that attention needs no mask: one row if it is the same for
        all samples, else one row each. Batches with `gap_index` also have `gap_order`, a permutation that puts samples
        with a gap first, and `num_gaps`, the number of samples with a gap; if their `groups` differ, it is a tensor.
    """
    data, config = source
    first = step * config.batch_size
    rows: list[dict[str, Tensor]] = []
    prompts: list[str] = []
    for index, generator in zip(range(part.start, part.stop), generators(config.seed, step, part), strict=True):
        rng = random.Random(torch.randint(2**62, (), generator=generator).item())
        number = clip_of(source, first + index)
        clip = data[number]
        caption = None if rng.random() < config.text_dropout else rng.randrange(len(clip.captions))
        row = make_sample(clip, spec, config, mode, length, rng, generator)
        if tokenizer is None and data.has_embeddings:
            row["prompt_embeds"] = data.embedding(number, caption).float()
        elif tokenizer is not None:
            prompts.append("" if caption is None else clip.captions[caption])
        rows.append(row)
    batch: dict[str, Any] = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if tokenizer is not None:
        batch["input_ids"], batch["prompt_mask"] = tokenize(tokenizer, prompts, config.max_sequence_length)
    groups = batch["groups"]
    if (groups == groups[0]).all():
        batch["groups"] = groups[0].tolist()
    elif "gap_index" not in batch:  # `gap_order` permutes tensors only
        batch["groups"] = groups.tolist()
    if "gap_index" in batch:
        has_gap = batch["gap_index"] < batch["latents"].shape[2]
        batch["gap_order"] = (~has_gap).int().argsort(stable=True)
        batch["num_gaps"] = int(has_gap.sum())
    return batch


def conditioning(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that conditions the denoiser, as arguments of `PromptedDenoiser`."""
    return {name: batch[name] for name in CONDITIONING_KEYS if name in batch}


class Window(NamedTuple):
    """The token frames of a clip that a sample trains on."""

    kind: str
    frames: list[int]
    """Indices of token frames in the clip."""
    latents: Tensor
    """Indices of latent frames in the clip, `(t,)`."""


def make_sample(
    clip: EncodedClip,
    spec: DenoiserSpec,
    config: SampleConfig,
    mode: str,
    length: int,
    rng: random.Random,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Makes a sample: a window of a clip, its known frames, noise, and all conditioning except the prompt.

    Args:
        clip: The clip that the window is taken from.
        spec: Properties of the denoiser.
        config: Probabilities of the kinds of samples.
        mode: Attention mode.
        length: Length of the window in token frames.
        rng: Random numbers of this sample.
        generator: Random tensors of this sample, on the CPU.

    Returns:
        `latents` and `noise` `(c, t, h, w)`; `levels` `(n,)`, the noise level of each token frame; `groups` `(n,)`;
        `generated`, bool `(n,)`, false for leading known frames; `num_leading`, the number of their latents; `real`,
        bool `(n,)`, false for padding; `frame_rate`, NaN without frame-rate conditioning. Depending on the settings
        also `conv_context` and `gap_index` (see `UNet3D`), `adjacent` and `motion` for the temporal loss, `keyframes`
        (see `pack_keyframes`), and `condition`, `image_embeds` and `actions` (see `SpacetimeTransformer`).
    """
    p = spec.patch_frames
    kind = choose(config.windows, rng)
    frames = draw_window(kind, length, clip.latents.shape[1] // p, spec.sink, rng)
    window = Window(kind, frames, torch.tensor([frame * p + i for frame in frames for i in range(p)]))
    latents = clip.latents[:, window.latents].float()
    known = choose(config.known, rng)
    num_leading = draw_num_leading(known, length, least_known(kind, spec.sink), config.num_leading, rng)
    real = clip.real[window.latents].unflatten(0, (-1, p)).all(1)
    first_group = num_leading if spec.leading_is_group else 0
    groups = torch.tensor(make_groups(mode, length, first_group, spec.chunk_size))
    groups = torch.where(real, groups, groups.max() + 1)  # padding is a group that no real frame attends to
    sample = {
        "latents": latents,
        "levels": sample_levels(config, groups, num_leading, rng, generator),
        "noise": torch.randn(latents.shape, generator=generator),
        "groups": groups,
        "generated": torch.arange(length) >= num_leading,
        "num_leading": torch.tensor(num_leading * p),
        "real": real,
        "frame_rate": torch.tensor(float("nan") if rng.random() < config.frame_rate_dropout else clip.frame_rate),
    }
    if spec.has_condition:
        assert clip.condition is not None  # check_conditions
        sample["condition"] = clip.condition[:, window.latents].float()
    if spec.has_image_embeds:
        assert clip.image_embeds is not None
        sample["image_embeds"] = clip.image_embeds.float()
    frames_with_actions = window.frames
    if spec.conv_history and spec.sink and config.windows.get("sink"):
        sample |= gap_context(clip, window, spec)
        first = _first_after_gap(window, spec)
        frames_with_actions = [*window.frames, *range(first - spec.conv_history, first)]
    if spec.action_dim:
        sample["actions"] = sample_actions(clip, spec, config, rng)[frames_with_actions]
    if config.wants_temporal_loss:
        sample |= pairs_of(clip, window)
    if clip.frames is not None and spec.keyframe_slots:
        sample["keyframes"] = sample_keyframes(clip, window, spec, config, known, num_leading, latents, rng)
    return sample


def sample_levels(
    config: SampleConfig, groups: Tensor, num_leading: int, rng: random.Random, generator: torch.Generator
) -> Tensor:
    """Noise levels `(n,)`; leading known frames are clean, or each has an independent low noise level."""
    kind, length = choose(config.levels, rng), len(groups)
    between = config.level_range[0], config.level_range[1]
    if config.prediction == "flow":
        levels = draw_levels(
            kind, groups, generator, config.level_mean, config.level_std, config.level_shift,
            config.level_distribution, between,
        )  # fmt: skip
    else:
        levels = draw_levels(kind, groups, generator, distribution="uniform", between=between)
    history = torch.rand(length, generator=generator) * config.corrupted_level
    if rng.random() >= config.corrupted:
        history = torch.zeros(length)
    return torch.where(torch.arange(length) >= num_leading, levels, history)


def gap_context(clip: EncodedClip, window: Window, spec: DenoiserSpec) -> dict[str, Tensor]:
    """The latents before a window's gap, `conv_context` `(c, k, h, w)`, and the token frame after it, `gap_index`.

    For a window without a gap, these are the start of its clip and the window's length.
    """
    first = _first_after_gap(window, spec)
    gap_index = spec.sink if window.kind == "sink" else len(window.frames)
    return {
        "conv_context": clip.latents[:, first - spec.conv_history : first].float(),
        "gap_index": torch.tensor(gap_index),
    }


def _first_after_gap(window: Window, spec: DenoiserSpec) -> int:
    return window.frames[spec.sink] if window.kind == "sink" else spec.conv_history


def sample_actions(clip: EncodedClip, spec: DenoiserSpec, config: SampleConfig, rng: random.Random) -> Tensor:
    """Actions of all token frames of a clip `(n, k)`, NaN if they are unknown or dropped."""
    grid = LatentGrid(spec.action_frames // spec.patch_frames, spec.patch_frames)
    dropped = rng.random() < config.action_dropout
    if clip.actions is None or dropped:
        return torch.full((clip.latents.shape[1] // spec.patch_frames, grid.unit * spec.action_dim), torch.nan)
    return pack_actions(clip.actions[None], grid)[0]


def pairs_of(clip: EncodedClip, window: Window) -> dict[str, Tensor]:
    """Whether neighboring latents of the window are adjacent in the clip, `(t - 1,)`, and the motion between them."""
    pairs = {"adjacent": window.latents.diff() == 1}
    if clip.motion is not None:
        pairs["motion"] = clip.motion[:, window.latents[:-1].clamp_max(clip.motion.shape[1] - 1)].float()
    return pairs


def sample_keyframes(
    clip: EncodedClip,
    window: Window,
    spec: DenoiserSpec,
    config: SampleConfig,
    known: KnownKind,
    num_leading: int,
    latents: Tensor,
    rng: random.Random,
) -> Tensor:
    """Keyframe slots `(s * (c + 1), t, h, w)`, filled with the sample's known keyframes."""
    assert clip.frames is not None
    images: dict[tuple[int, int], Tensor] = {}
    if known in ("keyframes", "both"):
        grid, begin = LatentGrid(spec.keyframe_slots), max(num_leading * spec.patch_frames, 1)
        unknown = range(grid.num_frames(begin), grid.num_frames(len(window.latents)))
        for frame in draw_keyframes(choose(config.keyframes, rng), unknown, spec.keyframe_slots, rng):
            latent, slot = grid.slot(frame)
            in_clip = grid.frames_of(int(window.latents[latent]))[slot]
            images[latent, slot] = clip.frames[in_clip - 1][None].float()  # which begin with frame 1
    return pack_keyframes(images, len(window.latents), spec.keyframe_slots, latents[None, :, 0])[0]


def denoiser_temporal_loss(
    config: SampleConfig,
    codec: CausalVideoVAE | PerFrameVAE | None,
    batch: Mapping[str, Tensor],
    clean: Tensor,
    signal: Tensor,
) -> Tensor:
    """The temporal loss `(b,)` of an estimate of the clean clip; known frames are first replaced by the true ones.

    Args:
        config: Weights of the loss, and whether it compares latents or pixels.
        codec: VAE that decodes for a loss on pixels.
        batch: The batch; see `make_batch`.
        clean: The estimate of the clean latents, `(b, c, t, h, w)`.
        signal: Fraction of signal in each frame's variance, by which its loss is weighted, `(b, t)`; see
            `Objective.estimate`.
    """
    real = batch["latents"]
    k = real.shape[2] // batch["generated"].shape[1]
    generated, real_frames = (batch[name].repeat_interleave(k, dim=1) for name in ("generated", "real"))
    counted = generated & real_frames
    clean = torch.where(generated[:, None, :, None, None], clean, real)
    signal = torch.where(generated, signal, 1.0)
    motion = None
    if config.temporal_space == "pixel":
        assert codec is not None
        clean = codec.decode(codec.denormalize(clean), clamp=False).sample
        with torch.no_grad():
            real = codec.decode(codec.denormalize(real), clamp=False).sample
            motion = measure_motion(real, config.flow) if config.warping_weight else None
        s = codec.temporal_compression_ratio
        signal, counted, real_frames = (
            torch.cat([x[:, :1], x[:, 1:].repeat_interleave(s, 1)], 1) for x in (signal, counted, real_frames)
        )
        adjacent: Tensor | float = 1.0
    else:
        adjacent = batch["adjacent"]
        if config.warping_weight:
            motion = Motion(batch["motion"][:, :2], batch["motion"][:, 2:])
    real_pairs = real_frames[:, 1:] & real_frames[:, :-1]
    either = counted[:, 1:] | counted[:, :-1]
    weight = torch.minimum(signal[:, 1:], signal[:, :-1]) * (either & real_pairs) * adjacent
    return temporal_loss(config, clean, real, motion, weight)
