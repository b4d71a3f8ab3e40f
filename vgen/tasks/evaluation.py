"""Measuring a checkpoint on a suite: every number beside those of simple ways, with intervals, in one file.

A run writes `clips/*.json`, one file a batch of clips, which a run that was stopped does not make again; then
`results.json`, in which every clip has its values, and `report.html`.
"""

from __future__ import annotations

import json
import platform
from base64 import b64encode
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from einops import rearrange
from PIL import Image
from torch import Tensor

from vgen.hub import find_packaged
from vgen.io.atomic import write_text
from vgen.io.fingerprint import weights_digest
from vgen.io.pixels import to_uint8
from vgen.metrics.frechet import FeatureNetwork, Protocol, ScriptedFeatures, distances
from vgen.metrics.reference import LPIPS
from vgen.metrics.report import FORMAT, check_installed, make_report
from vgen.metrics.suites import (
    Samples,
    Suite,
    SuiteConfig,
    check_suite,
    combine,
    copy_last,
    curves,
    flow_interpolation,
    hold_keyframes,
    keyframes_of,
    linear_blend,
    open_suite,
    score_pairs,
    score_time,
)
from vgen.metrics.temporal import drift_slopes, seam_ratio, start_end_difference, statistics
from vgen.models.convlstm import ConvLSTMPredictor
from vgen.pipeline import VideoGenPipeline
from vgen.processes import this_process
from vgen.sampling.known_frames import check_tasks
from vgen.sampling.options import RolloutOptions
from vgen.tasks.jobs import Job, ModelConfig, is_done, load_pipeline, read_manifest, run_jobs, run_settings

logger = logging.get_logger(__name__)

TASKS = ("reconstruction", "prediction", "interpolation", "generation", "rollout")
OURS = "the model"
TRUE, CEILING = "true clips", "the VAE, of true clips"
PAIRED = ("reconstruction", "prediction", "interpolation")
"""Tasks whose videos have a true one to be compared with."""
FEATURED = ("prediction", "generation")
"""Tasks whose videos have a distribution to be compared with."""
STRIP = 9
"""Frames of a picture."""
CONVLSTM = "vgen/shapes-64-convlstm"
CONVLSTM_CLIPS = {"suite": "shapes", "height": 64, "width": 64, "frame_rate": 8.0}
"""The packaged ConvLSTM, and the clips that it was trained on."""


@dataclass(kw_only=True)
class EvaluationConfig(ModelConfig, SuiteConfig):
    """What is measured."""

    tasks: list[str] | None = None
    """Some of `reconstruction`, `prediction`, `interpolation`, `generation` (from captions) and `rollout` (long videos
    from captions); by default all but the last that model and suite allow."""
    prompted: bool = False
    """Whether predictions and interpolations are told the captions."""
    num_samples: int = 1
    """Predictions of each clip; of several, their mean and the best one are measured too."""
    rollout_frames: int = 128
    """Of a long video."""
    convlstm: str | None = None
    """Packaged checkpoint, folder or Hub id of a ConvLSTM that predicts beside the model (`train/train_convlstm.py`);
    by default the packaged one for clips like those it was trained on, `none` for none."""
    lpips: bool = False
    """Whether LPIPS is measured, by the package of that name."""
    features: str | None = None
    """Folder or Hub id of a video model of transformers, for distances between distributions."""
    torchscript: Path | None = None
    """An I3D network in TorchScript instead."""
    trust_torchscript: bool = False
    """Says that the program in it may run."""
    count_known_frames: bool = False
    """Whether distances between predictions take clips from their first frame on, given ones included; else their last
    frames."""
    num_feature_frames: int | None = None
    """Frames that distances are taken of, for networks that take any number; `None` takes all that count."""
    batch_size: int = 10
    """Clips at once, and of one file."""
    num_strips: int = 4
    """Clips that the report shows."""


def evaluate(config: EvaluationConfig) -> dict[str, Any] | None:
    """Measures a checkpoint; the same call goes on where an interrupted one stopped.

    Returns:
        The results, as `results.json` has them; `None` in processes that do not gather.

    Raises:
        ValueError: A setting cannot work, the checkpoint cannot do a task, or no clip could be measured.
        ImportError: A library that a metric needs is not installed.
    """
    check_installed()
    pipe = load_pipeline(config)
    config = with_defaults(config, pipe)
    check_evaluation(config)
    suite = open_suite(config)
    measure = Measurement(config, pipe, suite)
    jobs = [
        Job(f"{first:06d}.json", {"first": first, "count": min(config.batch_size, len(suite) - first)})
        for first in range(0, len(suite), config.batch_size)
    ]

    def make(job: Job, path: Path) -> dict[str, Any]:
        first, count = job.inputs["first"], job.inputs["count"]
        found = measure(suite.samples(range(first, first + count)))
        write_text(path, json.dumps(found))
        return {"num_clips": len(found["numbers"])} | ({"left_out": dict(suite.skipped)} if suite.skipped else {})

    settings = run_settings(config, pipe, "batch_size") | {"seed": config.seed, "tasks": measure.tasks}
    settings |= measure.digests
    folder = config.output_dir / "clips"
    run_jobs(jobs, folder, settings, make)
    process = this_process()
    if not process.is_main_process:
        return None
    lines = read_manifest(folder)
    done = [json.loads((folder / job.name).read_text()) for job in jobs if is_done(job, lines, folder)]
    if not done:
        reason = next(line["error"] for line in lines.values() if "error" in line)
        raise ValueError(f"no clip could be measured: {reason}")
    results = gather_results(config, done, settings, measure.features)
    results["missing"] = len(suite) - len(results["numbers"])
    strips = {
        f"{task}, clip {number}": rows
        for batch in done
        for number, shown in batch["strips"].items()
        for task, rows in shown.items()
    }
    write_text(config.output_dir / "results.json", json.dumps(results, indent=1))
    write_text(config.output_dir / "report.html", make_report(results, strips))
    return results


class Measurement:
    """What is measured of one checkpoint on one suite.

    Args:
        config: The settings.
        pipe: The checkpoint.
        suite: The clips.

    Raises:
        ValueError: The checkpoint cannot do a task that was asked for, or clips are too short for the features.
    """

    def __init__(self, config: EvaluationConfig, pipe: VideoGenPipeline, suite: Suite):
        self.config, self.pipe, self.suite = config, pipe, suite
        self.tasks = list(TASKS[:-1] if config.tasks is None else config.tasks)
        if config.tasks is None:
            able = set(pipe.denoiser.config.tasks)
            self.tasks = [task for task in self.tasks if self._needs(task) <= able]
            if pipe.video_vae is None:
                self.tasks.remove("reconstruction")
            if (not suite.captioned or pipe.text_encoder is None) and "generation" in self.tasks:
                self.tasks.remove("generation")
        self._check()
        self.lpips = LPIPS().to(pipe.device) if config.lpips else None
        self.convlstm = open_convlstm(config, pipe.device) if "prediction" in self.tasks else None
        self.features = open_features(config, pipe.device)
        if self.features is not None:
            self._check_lengths(self.features)

    @property
    def digests(self) -> dict[str, str]:
        """Of the clips, and of the networks beside the pipeline's."""
        found = {} if self.suite.digest is None else {"clips_sha256": self.suite.digest}
        found |= {} if self.convlstm is None else {"convlstm_sha256": weights_digest(self.convlstm)}
        return found if self.features is None else found | {"features_sha256": self.features.digest}

    def _needs(self, task: str) -> set[str]:
        """What a checkpoint must have been trained for."""
        both = {"leading", "keyframes"}
        given = {"leading"} if self.pipe.grid.is_valid(self.config.given) else both
        return {"prediction": given, "interpolation": both, "rollout": {"leading"}}.get(task, set())

    def _check(self) -> None:
        """Refuses early what would fail clip by clip."""
        config, pipe = self.config, self.pipe
        size = (config.height, config.width)
        for task in self.tasks:
            check_tasks(pipe.denoiser.config, pipe.grid, self._needs(task))
        if "reconstruction" in self.tasks and pipe.video_vae is None:
            raise ValueError("a pipeline without a VAE reconstructs nothing: leave out the task")
        steps = config.num_inference_steps or pipe.config.num_inference_steps
        if {"generation", "rollout"} & set(self.tasks):
            if not self.suite.captioned:
                raise ValueError("generation and rollout need clips that all have captions")
            frames = config.num_frames if "generation" in self.tasks else pipe.grid.first
            pipe.check_inputs(["a video"], None, *size, frames, config.frame_rate, steps)
        if "interpolation" in self.tasks:
            pipe.interpolator(config.factor, size=size, frame_rate=config.frame_rate, num_inference_steps=steps)
        least = self._seam_unit + 2
        if "rollout" in self.tasks and config.rollout_frames < least:
            raise ValueError(f"rollout_frames={config.rollout_frames}: give {least} or more, which have a seam")
        if config.features or config.torchscript:
            if not set(FEATURED) & set(self.tasks):
                raise ValueError(f"distances between distributions need one of the tasks {', '.join(FEATURED)}")
            if len(self.suite) < 2:
                raise ValueError("distances between distributions need 2 clips or more")
        if config.prompted and not self.suite.captioned:
            raise ValueError("prompted=True needs clips that all have captions")

    @property
    def _seam_unit(self) -> int:
        """Frames of a chunk."""
        options = RolloutOptions().resolve(self.pipe.config, self.pipe.denoiser.config, prompted=True)
        assert options.chunk_size is not None
        return self.pipe.grid.compression * options.chunk_size

    def _check_lengths(self, network: FeatureNetwork | ScriptedFeatures) -> None:
        """Refuses clips that are too short for the features of a task."""
        for task in [task for task in FEATURED if task in self.tasks]:
            count, shown = feature_frames(self.config, network, task), shown_frames(self.config, task)
            if shown < count:
                raise ValueError(
                    f"{network.name} takes {count} frames, and {shown} are not given: make num_frames at least "
                    f"{self.config.num_frames + count - shown}"
                )

    @torch.no_grad()
    def __call__(self, samples: Samples) -> dict[str, Any]:
        """The values of each task, way and metric for these clips, in their order."""
        found: dict[str, Any] = {"numbers": samples.numbers, "frames": {}}
        found |= {name: {} for name in ("tasks", "curves", "features", "strips")}
        decoded = self._reconstruct(samples)
        for task in self.tasks:
            ways, counted = getattr(self, f"_{task}")(samples)
            if task != "rollout" and decoded is not None:
                ways["the VAE" if task == "reconstruction" else CEILING] = decoded
            if task in PAIRED:
                ways[TRUE] = samples.clips
            ways = {name: clips[:, :, : next(iter(ways.values())).shape[2]] for name, clips in ways.items()}
            values: dict[str, Any] = {}
            for name, clips in ways.items():
                values[name] = tolist(self._values(task, name, clips, samples, counted))
                if task in PAIRED and name != TRUE:
                    found["frames"][task] = counted
                    true = samples.clips[:, :, : clips.shape[2]]
                    found["curves"].setdefault(task, {})[name] = tolist(curves(clips, true, counted))
                if self.features is not None and task in FEATURED:
                    found["features"].setdefault(task, {})[name] = self._features_of(task, clips)
            found["tasks"][task] = values
            self._draw(found["strips"], task, samples, ways)
        return found

    def _values(self, task: str, way: str, clips: Tensor, samples: Samples, counted: list[int]) -> dict[str, Tensor]:
        """Of one way to do a task, `(b,)` for each metric."""
        if task == "rollout":
            slopes = {f"{name} drift": value for name, value in drift_slopes(clips).items()}
            ends = {f"{name}, end from start": value for name, value in start_end_difference(clips).items()}
            if self._seam_unit == 1 or self.pipe.denoiser.patch_size[0] > 1:
                return slopes | ends  # all borders of frames are seams, or the first chunk has another length
            s = self.pipe.vae_scale_factor_temporal
            # at rest there are no seams; and one that moves at seams only has a ratio beyond all others
            seams = seam_ratio(clips, self._seam_unit // s, s).nan_to_num(1.0, posinf=100.0)
            return slopes | ends | {"seam ratio": seams}
        found = {}
        if way == TRUE and task in PAIRED:
            found = {"sharpness": statistics(clips[:, :, counted])["sharpness"].mean(1)}
        elif task in PAIRED:
            found = score_pairs(clips, samples.clips[:, :, : clips.shape[2]], counted, self.lpips)
        found |= score_time(clips)
        if task in ("reconstruction", "generation"):
            each = [self.suite.right(number, clip) for number, clip in zip(samples.numbers, clips, strict=True)]
            found |= {name: torch.tensor([one[name] for one in each]) for name in each[0]}
        return found

    def _reconstruction(self, samples: Samples) -> tuple[dict[str, Tensor], list[int]]:
        return {}, list(range(self.config.num_frames))

    def _prediction(self, samples: Samples) -> tuple[dict[str, Tensor], list[int]]:
        config, given = self.config, self.config.given
        counted = list(range(given, config.num_frames))
        known = samples.clips[:, :, :given]
        drawn = torch.stack(
            [
                torch.cat([known, self._predict(samples, self._generators(samples, draw))], dim=2)
                for draw in range(config.num_samples)
            ]
        )
        ways = {OURS: drawn[0]}
        if config.num_samples > 1:
            ways |= {f"{OURS}, {name}": one for name, one in combine(drawn, samples.clips, counted).items()}
        if self.convlstm is not None:
            new = self.convlstm.predict(known.to(self.convlstm.device), config.num_frames - given)
            ways["ConvLSTM"] = torch.cat([known, new.clamp(-1, 1).cpu()], dim=2)
        ways["copy of the last frame"] = copy_last(samples.clips, given)
        return ways, counted

    def _interpolation(self, samples: Samples) -> tuple[dict[str, Tensor], list[int]]:
        keyframes = keyframes_of(self.config)
        counted = [index for index in range(keyframes[-1]) if index not in keyframes]
        ways = {
            OURS: self._interpolate(samples),
            "copy of the last keyframe": hold_keyframes(samples.clips, keyframes),
            "linear blend": linear_blend(samples.clips, keyframes),
            "optical flow (DIS)": flow_interpolation(samples.clips, keyframes),
        }
        return ways, counted

    def _generation(self, samples: Samples) -> tuple[dict[str, Tensor], list[int]]:
        config = self.config
        frames = self.pipe(
            self._captions(samples), num_frames=config.num_frames, height=config.height, width=config.width,
            num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale,
            frame_rate=config.frame_rate, generator=self._generators(samples), output_type="pt",
        ).frames  # fmt: skip
        return {OURS: from_frames(frames), TRUE: samples.clips}, []

    def _rollout(self, samples: Samples) -> tuple[dict[str, Tensor], list[int]]:
        config = self.config
        chunks = self.pipe.rollout(
            self._captions(samples), num_frames=config.rollout_frames, height=config.height, width=config.width,
            num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale,
            frame_rate=config.frame_rate, generator=self._generators(samples),
        )  # fmt: skip
        frames = torch.from_numpy(np.concatenate(list(chunks), axis=1))
        ways = {OURS: rearrange(frames, "b f h w c -> b c f h w").float() / 127.5 - 1}
        true = self.suite.long(samples.numbers, config.rollout_frames)
        return ways if true is None else ways | {TRUE: true}, []

    def _predict(self, samples: Samples, generators: list[torch.Generator]) -> Tensor:
        """New frames behind the given ones, of each clip."""
        given, count = range(self.config.given), self.config.num_frames - self.config.given
        options = {"num_frames": count, "frame_rate": self.config.frame_rate}
        return from_frames(self._from_known(self.pipe.predict, samples, given, generators, **options))

    def _interpolate(self, samples: Samples) -> Tensor:
        """Clips from every so many'th frame."""
        config, generators = self.config, self._generators(samples)
        options = {"factor": config.factor, "frame_rate": config.frame_rate / config.factor}
        return from_frames(
            self._from_known(self.pipe.interpolate, samples, keyframes_of(config), generators, **options)
        )

    def _from_known(
        self, call: Callable, samples: Samples, known: Iterable[int], generators: list[torch.Generator], **options: Any
    ) -> Tensor:
        """Frames `(b, f, 3, h, w)` in [0, 1] that the pipeline makes of these ones of each clip."""
        frames = rearrange(samples.clips[:, :, list(known)], "b c f h w -> b f h w c")
        given = list(to_uint8(frames).numpy())
        options |= {"num_inference_steps": self.config.num_inference_steps, "output_type": "pt"}
        if self.config.prompted:
            options |= {"prompt": self._captions(samples), "guidance_scale": self.config.guidance_scale}
        return call(given, generator=generators, **options).frames

    def _captions(self, samples: Samples) -> list[str]:
        missing = [number for number, text in zip(samples.numbers, samples.captions, strict=True) if text is None]
        if missing:
            raise ValueError(f"clips {missing} have no caption, which this task needs")
        return [text for text in samples.captions if text is not None]

    def _generators(self, samples: Samples, draw: int = 0) -> list[torch.Generator]:
        """A source of noise for each clip, by its number alone."""
        seeds = [(self.config.seed * 1009 + draw) * 1_000_003 + number for number in samples.numbers]
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def _reconstruct(self, samples: Samples) -> Tensor | None:
        """The clips, encoded and decoded; where their length cannot be, with the last frame repeated for that."""
        codec = self.pipe.video_vae
        if codec is None:
            return None
        clips, count = samples.clips.to(self.pipe.device, codec.dtype), self.config.num_frames
        missing = (1 - count) % codec.temporal_compression_ratio
        clips = torch.cat([clips, *[clips[:, :, -1:]] * missing], dim=2)
        return codec.decode(codec.encode(clips).latent_dist.mode()).sample[:, :, :count].float().cpu()

    def _features_of(self, task: str, clips: Tensor) -> list[list[float]]:
        """Of the frames that distances are taken of."""
        assert self.features is not None
        count = feature_frames(self.config, self.features, task)
        last = task == "prediction" and not self.config.count_known_frames
        part = clips[:, :, -count:] if last else clips[:, :, :count]
        return self.features(part.to(self.pipe.device)).double().cpu().tolist()

    def _draw(self, strips: dict[str, Any], task: str, samples: Samples, ways: dict[str, Tensor]) -> None:
        """Pictures of the first clips of the suite, one row a way."""
        for row, number in enumerate(samples.numbers):
            if number < self.config.num_strips:
                shown = {name: draw_strip(clips[row]) for name, clips in ways.items()}
                strips.setdefault(str(number), {})[task] = shown


def check_evaluation(config: EvaluationConfig) -> None:
    """Refuses what cannot work.

    Raises:
        ValueError: A setting is unknown or out of range.
    """
    check_suite(config)
    if set(config.tasks or ()) - set(TASKS):
        raise ValueError(f"tasks={config.tasks} must be some of {', '.join(TASKS)}")
    if min(config.num_samples, config.batch_size) < 1:
        raise ValueError(f"num_samples={config.num_samples}, batch_size={config.batch_size} must be at least 1")
    if config.features and config.torchscript:
        raise ValueError("give features or torchscript, not both")
    if config.num_feature_frames is not None and config.num_feature_frames < 1:
        raise ValueError(f"num_feature_frames={config.num_feature_frames} must be at least 1")


def with_defaults(config: EvaluationConfig, pipe: VideoGenPipeline) -> EvaluationConfig:
    """The settings with the checkpoint's defaults where they are 0."""
    names = ("num_frames", "height", "width", "frame_rate")
    config = replace(config, **{name: getattr(config, name) or pipe.config[name] for name in names})
    known = config.convlstm is None and all(getattr(config, name) == one for name, one in CONVLSTM_CLIPS.items())
    return replace(config, convlstm=CONVLSTM) if known else config


def gather_results(
    config: EvaluationConfig, batches: list[dict[str, Any]], settings: dict[str, Any], network: Any
) -> dict[str, Any]:
    """One record of all batches of clips."""
    results: dict[str, Any] = {
        "format": FORMAT,
        "model": config.model,
        "made_with": settings["model"],
        "suite": {one.name: getattr(config, one.name) for one in fields(SuiteConfig)},
        "settings": {name: value for name, value in settings.items() if name != "model"},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "diffusers")},
        "numbers": [number for batch in batches for number in batch["numbers"]],
        "tasks": join([batch["tasks"] for batch in batches]),
        "frames": batches[0]["frames"],
        "curves": average(join([batch["curves"] for batch in batches])),
        "distances": {},
    }
    features = join([batch["features"] for batch in batches])
    for task, ways in features.items():
        real = torch.tensor(ways.pop(TRUE), dtype=torch.float64)
        if len(real) < 2:
            logger.warning(f"{task}: one clip only could be measured, too few for distances between distributions")
            continue
        protocol = Protocol(
            num_clips=len(real),
            num_frames=feature_frames(config, network, task),
            stride=1,
            height=config.height,
            width=config.width,
            known_frames_counted=config.count_known_frames or task == "generation",
            resize=network.resize,
            values=network.values,
            feature_network=network.digest,
        )
        for way, made in ways.items():
            measured = distances(real, torch.tensor(made, dtype=torch.float64), protocol)
            told = {name: asdict(one) for name, one in measured.items()}
            results["distances"].setdefault(task, {})[way] = told
    return json.loads(json.dumps(results, default=str))


def open_convlstm(config: EvaluationConfig, device: torch.device) -> ConvLSTMPredictor | None:
    """The recurrent network that predicts beside the model, if there is one."""
    if config.convlstm in (None, "none"):
        return None
    return ConvLSTMPredictor.from_pretrained(find_packaged(config.convlstm) or config.convlstm).eval().to(device)


def open_features(config: EvaluationConfig, device: torch.device) -> FeatureNetwork | ScriptedFeatures | None:
    """The network whose features distances are taken of, if one is given.

    Raises:
        ValueError: It takes another number of frames than was asked for, or as the networks say.
    """
    network: FeatureNetwork | ScriptedFeatures
    if config.torchscript is not None:
        network = ScriptedFeatures(config.torchscript, trusted=config.trust_torchscript)
    elif config.features is not None:
        network = FeatureNetwork(config.features)
    else:
        return None
    if config.num_feature_frames and network.num_frames not in (None, config.num_feature_frames):
        raise ValueError(
            f"num_feature_frames={config.num_feature_frames}, but {network.name} takes {network.num_frames}"
        )
    return network.to(device)


def shown_frames(config: EvaluationConfig, task: str) -> int:
    """Frames of a clip that distances can be taken of: without those that were given, unless these count."""
    return config.num_frames - (config.given if task == "prediction" and not config.count_known_frames else 0)


def feature_frames(config: EvaluationConfig, network: FeatureNetwork | ScriptedFeatures, task: str) -> int:
    """Frames of a clip that distances are taken of."""
    return network.num_frames or config.num_feature_frames or shown_frames(config, task)


def from_frames(frames: Tensor) -> Tensor:
    """Clips from what the pipeline gives as `pt`."""
    return rearrange(frames.float().cpu() * 2 - 1, "b f c h w -> b c f h w")


def draw_strip(clip: Tensor) -> str:
    """Some frames of a clip `(3, f, h, w)` side by side, as a PNG in base64."""
    places = np.linspace(0, clip.shape[1] - 1, min(STRIP, clip.shape[1])).round().astype(int)
    row = rearrange(clip[:, places], "c f h w -> h (f w) c")
    file = BytesIO()
    Image.fromarray(row.add(1).mul(127.5).round().clamp(0, 255).byte().numpy()).save(file, "png")
    return b64encode(file.getvalue()).decode()


def tolist(values: dict[str, Tensor]) -> dict[str, list]:
    """For JSON."""
    return {name: np.vectorize(lambda x: float(f"{x:.6g}"))(one.numpy()).tolist() for name, one in values.items()}


def join(parts: list[Any]) -> Any:
    """Nested dictionaries whose lists follow one another."""
    if isinstance(parts[0], dict):
        return {name: join([part[name] for part in parts]) for name in parts[0]}
    return [value for part in parts for value in part]


def average(curves: Any) -> Any:
    """Nested dictionaries whose tables `(b, f)` become their means over clips."""
    if isinstance(curves, dict):
        return {name: average(one) for name, one in curves.items()}
    return np.mean(curves, axis=0).round(6).tolist()
