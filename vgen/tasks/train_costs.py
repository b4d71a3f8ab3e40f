"""Memory, time and disk that the stages of `vgen train` take."""

from __future__ import annotations

import bisect
import math
from functools import cached_property, partial

import torch
from transformers import AutoModelForTextEncoding

from vgen.checks import check_integer
from vgen.tasks.train_commands import default_setting
from vgen.tasks.train_setup import Setup, text_config
from vgen.tasks.train_stages import (
    EVALUATED,
    EVALUATIONS,
    LEAST_BETWEEN,
    LEAST_STEPS,
    MOST_HELD_OUT,
    NUM_SAMPLES,
)
from vgen.training.needs import COPIES_OF_TRAINED, ClipShape, Step, denoiser_step, encoding_memory, vae_step
from vgen.training.throughput import BACKWARD

ENCODING_SHARE = 0.1
"""Fraction of the time in which clips are encoded."""
MOST_REPEATS = 32
"""Most augmented copies of a clip that are encoded."""
CHECKPOINTS = 12
"""Bytes of checkpoints and results relative to those of the weights in float32."""
MARGIN = 1.5
"""Size of the copies of videos relative to the training clips, which leaves room for random crops."""
_COMPILATION, _PAUSE = 100.0, 2.0
"""Seconds that it takes to compile a network, and to save a checkpoint."""
_LEAST_OVERHEAD, _MOST_OVERHEAD = 10.0, 45.0
"""Bounds of the seconds that a script takes to start and to save its result."""


class Costs:
    """What the stages take.

    Args:
        setup: What the plan is made from.
        measured: Seconds per optimizer step of `vae` and `denoiser`; by default they are measured when needed.
    """

    def __init__(self, setup: Setup, measured: dict[str, float] | None = None):
        self.setup, self.measured = setup, measured
        self.overhead = min(max(2 * setup.machine.started_in, _LEAST_OVERHEAD), _MOST_OVERHEAD)
        """Seconds that a script takes to start, which is about what this program took, and to save its result."""
        self.device = torch.device(setup.machine.device)

    @cached_property
    def steps(self) -> dict[str, Step]:
        """Optimizer steps of `vae` and `denoiser`."""
        return {"vae": self.vae_step(), "denoiser": self.denoiser_step()}

    @cached_property
    def needs(self) -> dict[str, dict[str, float]]:
        """Bytes of `memory` and of `weights` of the stages that train a large network."""
        return {
            stage: self.needs_of(stage, step) for stage, step in self.steps.items() if self.setup.is_trained(stage)
        }

    @cached_property
    def per_step(self) -> dict[str, float]:
        """Seconds per optimizer step of `vae` and `denoiser`."""
        return self.measured or {
            stage: step.seconds(self.device, self.precision(stage)) * self.parts(stage)
            for stage, step in self.steps.items()
        }

    def vae_step(self) -> Step:
        """A step of the VAE."""
        checkpointing = bool(self.setup.wanted("vae", "gradient_checkpointing"))
        names = ("height", "width", "num_frames")
        whole = {name: getattr(self.setup.clip, name) for name in names}
        clip = ClipShape(**{name: min(self.setup.wanted("vae", name) or size, size) for name, size in whole.items()})
        return vae_step(self.setup.codec.model, clip, self.part_size("vae"), checkpointing)

    def denoiser_step(self) -> Step:
        """A step of the denoiser."""
        kind = "transformer" if self.setup.pipe is None else self.setup.pipe["denoiser"]
        kind = kind if self.setup.pipe is not None else self.setup.wanted("denoiser", "denoiser") or kind
        text = (self.setup.text_length, self.setup.text_dim)
        compression = (self.setup.codec.time, self.setup.codec.space)
        checkpointing = bool(self.setup.wanted("denoiser", "gradient_checkpointing"))
        size = self.part_size("denoiser")
        return denoiser_step(kind, self.setup.denoiser_model, self.setup.clip, compression, size, text, checkpointing)

    def needs_of(self, stage: str, step: Step) -> dict[str, float]:
        """Bytes of memory and of weights of a step."""
        needs = step.needs(self.precision(stage))
        if stage == "denoiser" and self.setup.options.train_only == "lora":  # no gradients and moments of the weights
            needs["memory"] -= COPIES_OF_TRAINED * needs["weights"]
        return needs

    def precision(self, stage: str) -> str:
        """The precision of a stage's forward pass."""
        wanted = self.setup.wanted(stage, "mixed_precision") or "auto"
        return self.setup.machine.precision if wanted == "auto" else wanted

    def parts(self, stage: str) -> int:
        """Forward passes per optimizer step of each process."""
        return self.setup.wanted(stage, "gradient_accumulation_steps") or 1

    def part_size(self, stage: str) -> int:
        """Clips per forward pass."""
        return max(1, self.setup.wanted(stage, "batch_size") // (self.parts(stage) * self.setup.preset["processes"]))

    @cached_property
    def memory(self) -> dict[str, float]:
        """Calculated bytes of memory of the stages with large networks."""
        return {stage: needs["memory"] for stage, needs in self.needs.items()} | {"latents": self.latents_memory()}

    def latents_memory(self) -> float:
        """Bytes of memory of the VAE and of a pretrained text encoder, which encode clips and captions."""
        setup = self.setup
        default = default_setting("pipelines/encode_latents.py", "batch_size")
        batch_size = setup.wanted("latents", "batch_size") or default
        text = None
        if setup.pretrained_text is not None:
            text = partial(AutoModelForTextEncoding.from_config, text_config(setup.pretrained_text))
        return encoding_memory(
            setup.codec.model, setup.clip, batch_size, self.precision("latents"), text, setup.text_length
        )

    @property
    def disk(self) -> float:
        """Estimated bytes that the run will write: copies of the videos, latents and checkpoints."""
        clip, codec = self.setup.clip, self.setup.codec
        pixels = clip.height * clip.width
        latents = codec.channels * clip.num_frames * pixels * 2 * (1 + 1 / codec.time) / codec.space**2
        needed = {"data": 0.25 * MARGIN**2 * pixels * self.setup.videos.num_frames}
        needed |= {"latents": (self.encoded + MOST_HELD_OUT) * latents}
        needed |= {stage: CHECKPOINTS * needs["weights"] for stage, needs in self.needs.items()}
        return sum(size for stage, size in needed.items() if stage not in self.setup.record)

    @property
    def spent(self) -> float:
        """Seconds that the run has taken so far."""
        return sum(entry["seconds"] for entry in self.setup.record.values())

    def share_time(self, available: float) -> dict[str, int]:
        """Numbers of optimizer steps of the stages that have not begun.

        Raises:
            ValueError: A new run does not have the time for a few.
        """
        setup = self.setup
        shares = {"vae": setup.preset["vae_share"], "denoiser": 1 - setup.preset["vae_share"]}
        shares = {
            stage: share for stage, share in shares.items() if setup.is_trained(stage) and stage not in setup.record
        }
        counts: dict[str, int] = {}
        for stage in shares:
            if (count := setup.changes.get(stage, {}).get("max_steps")) is not None:
                check_integer(f"--set {stage}.max_steps", count, 1)
                counts[stage] = count
                available -= self.training_seconds(stage, count)
        shares = {stage: share for stage, share in shares.items() if stage not in counts}
        missing = 0.0
        for stage, share in shares.items():
            part = share / sum(shares.values())
            missing = max(missing, self.training_seconds(stage, LEAST_STEPS) / part - available)
            most = range(setup.preset[stage]["max_steps"] + 1)
            steps = bisect.bisect_right(most, available * part, key=partial(self.training_seconds, stage)) - 1
            counts[stage] = max(LEAST_STEPS, steps)
        if missing and not setup.record:
            needed = setup.limit + missing / (1 - ENCODING_SHARE)  # a part of more time goes to the latents
            raise ValueError(
                f"{setup.limit / 60:g} minutes are not enough on this machine, as fast as it is now: pass --minutes "
                f"{math.ceil(needed / 60) + 1} or more, and much more for a good model, or make clips smaller: --set "
                "clip.height=32 --set clip.width=32"
            )
        return counts

    def training_seconds(self, stage: str, steps: int) -> float:
        """Estimated time of a stage that trains, with its evaluations."""
        evaluations = min(EVALUATIONS, steps // LEAST_BETWEEN)
        batch = self.setup.wanted(stage, "batch_size")
        passes = EVALUATED / batch  # of the VAE
        if stage == "denoiser":  # losses on two sets of clips, and sample videos
            passes = (2 * EVALUATED + 4 * self.setup.num_inference_steps) / batch
        fixed = self.overhead + evaluations * _PAUSE + (_COMPILATION if self.setup.wanted(stage, "compile") else 0.0)
        return fixed + self.per_step[stage] * (steps + evaluations * passes / (1 + BACKWARD))

    def other_seconds(self) -> dict[str, float]:
        """Estimated time of the stages that do not train a large network."""
        denoising = self.per_step["denoiser"] / self.setup.wanted("denoiser", "batch_size") / (1 + BACKWARD)
        coding = 2 * self.encoding
        video = denoising * self.setup.num_inference_steps + coding
        num_clips = self.setup.wanted("evaluation", "num_clips") or EVALUATED
        num_samples = self.setup.wanted("evaluation", "num_samples") or NUM_SAMPLES
        evaluation = 2 * self.overhead + num_clips * (num_samples + 3) * video
        if self.setup.compares_one_step:
            evaluation += self.overhead + num_clips * (num_samples + 1) * (denoising + coding)
        return {
            "data": self.overhead + self.setup.videos.num_frames / self.setup.videos.decoded_per_second,
            "latents": 2 * self.overhead + self.encodings * self.encoding * self.encoded,
            **({"text": 2 * self.overhead} if self.setup.trains_text else {}),
            "evaluation": evaluation,
            "report": self.overhead + 8 * video,
        }

    @property
    def encodings(self) -> int:
        """How often the VAE encodes a clip: once whole, and its frames alone or as stills."""
        stills = self.setup.denoiser_model.get("still_keyframes")
        return 2 + self.setup.codec.time if stills else 2

    @property
    def encoding(self) -> float:
        """Seconds in which the VAE encodes or decodes a clip."""
        whole = self.setup.clip.num_frames
        frames = whole / min(self.setup.wanted("vae", "num_frames") or whole, whole)
        return frames * self.per_step["vae"] / self.setup.wanted("vae", "batch_size") / (1 + BACKWARD) / 2

    @property
    def encoded(self) -> int:
        """Number of training clips that are encoded."""
        hop, repeats = self.hop_and_repeats
        return self.setup.videos.num_clips(self.setup.clip, self.setup.frame_rate, hop) * repeats

    @property
    def hop_and_repeats(self) -> tuple[int, int]:
        """Frames between encoded clips, and copies of each with another augmentation, for `target_clips` in all.

        Those of `--set` take precedence.
        """
        hop, repeats = self._hop_and_repeats
        changes = self.setup.changes_of("latents")
        return changes.get("hop") or hop, changes.get("repeats") or repeats

    @property
    def _hop_and_repeats(self) -> tuple[int, int]:
        most = self.setup.videos.num_clips(self.setup.clip, self.setup.frame_rate, 1)
        if self.setup.videos.is_stream or not most:
            return self.setup.clip.num_frames, 1
        affordable = round(ENCODING_SHARE * self.setup.limit / (self.encodings * self.encoding))
        wanted = max(1, min(self.setup.preset["target_clips"], affordable))
        return max(1, most // wanted), max(1, min(MOST_REPEATS, wanted // most))
