"""Evaluation of a checkpoint on a suite of clips, compared with simple baselines, with confidence intervals.

A run writes `clips/*.json`, one file per batch of clips, which a resumed run does not compute again. At the end it
writes `results.json`, with the values of every clip, and `report.html`.
"""

from __future__ import annotations

import json
import platform
from base64 import b64encode
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

import numpy as np
import torch
from diffusers.utils import logging
from einops import rearrange
from PIL import Image
from torch import Tensor

from vgen.checks import check_choices, check_integer
from vgen.hub import find_packaged
from vgen.io.atomic import write_text
from vgen.io.fingerprint import weights_digest
from vgen.io.pixels import from_pt, from_uint8, to_uint8
from vgen.io.records import read_json
from vgen.io.remote import as_path, replace_text
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
from vgen.recognition.features import RecognizerFeatures
from vgen.recognition.recognizer import is_recognizer
from vgen.sampling.known_frames import check_tasks
from vgen.sampling.options import RolloutOptions
from vgen.tasks.engine import Worker
from vgen.tasks.jobs import (
    Job,
    ModelConfig,
    is_done,
    job_worker,
    load_pipeline,
    read_manifest,
    run_jobs,
    run_settings,
)
from vgen.temporal.attention import widest_mode
from vgen.temporal.grid import LatentGrid

logger = logging.get_logger(__name__)

Features = FeatureNetwork | RecognizerFeatures | ScriptedFeatures
Task = Literal["reconstruction", "prediction", "interpolation", "generation", "rollout"]
TASKS: tuple[Task, ...] = get_args(Task)
MODEL = "the model"
"""Name of the evaluated checkpoint among the methods of the results."""
TRUE, UPPER_BOUND = "true clips", "VAE only"
"""Names of the true clips and of their reconstructions, the best that a latent model can reach."""
PAIRED = ("reconstruction", "prediction", "interpolation")
"""Tasks whose videos are compared with the true clip."""
FEATURED = ("prediction", "generation")
"""Tasks whose videos are compared with the true clips as distributions."""
STRIP = 9
"""Frames per strip of pictures."""
CONVLSTM, RECOGNIZER = "vgen/shapes-64-convlstm", "vgen/shapes-64-recognizer"
PACKAGED_CLIPS = {"suite": "shapes", "height": 64, "width": 64, "frame_rate": 8.0}
"""The packaged ConvLSTM baseline and recognizer, and settings of the clips that both were trained on."""
RECOGNIZED = ("reconstruction", "generation")
"""Tasks whose videos are compared with their captions."""


@dataclass(kw_only=True)
class EvaluationConfig(ModelConfig, SuiteConfig):
    """Settings of an evaluation."""

    tasks: list[Task] | None = None
    """Tasks to evaluate. `generation` and `rollout` generate clips and long videos from captions. By default all that
    model and suite support, except `rollout`."""
    prompted: bool = False
    """Whether predictions and interpolations are conditioned on the captions."""
    num_samples: int = 1
    """Number of predictions per clip; from 2 on, their mean and the best one are also scored."""
    rollout_frames: int = 128
    """Number of frames per rollout."""
    convlstm: str | None = None
    """ConvLSTM baseline for prediction (`train/train_convlstm.py`): a packaged checkpoint, a folder or a Hub id. By
    default the packaged one, if the clips are like those that it was trained on; `none` turns the baseline off."""
    recognizer: str | None = None
    """Recognizer (`train/train_recognizer.py`) that says whether videos show what was asked for: a packaged
    checkpoint, a folder or a Hub id. Its features are the default of `features`. By default the packaged one, if the
    clips are like those that it was trained on; `none` turns it off."""
    lpips: bool = False
    """Whether to compute LPIPS, which needs the package `lpips`."""
    features: str | None = None
    """Feature network of the distances between distributions: folder or Hub id of a video model of transformers, or of
    a recognizer (`train/train_recognizer.py`)."""
    torchscript: Path | None = None
    """Feature network as a TorchScript file, such as I3D, instead of `features`."""
    trust_torchscript: bool = False
    """Allows the code in the TorchScript file to run."""
    count_known_frames: bool = False
    """Whether the distances of predictions include the frames that the model was given. By default only new frames
    count."""
    num_feature_frames: int | None = None
    """Frames per clip for the distances, if the feature network accepts any number; all that count if not set."""
    batch_size: int = 10
    """Number of clips per batch and per file."""
    num_strips: int = 4
    """Number of clips that the report shows."""


def evaluate(config: EvaluationConfig) -> dict[str, Any] | None:
    """Evaluates a checkpoint. The same call resumes an interrupted run.

    Returns:
        The contents of `results.json` in the main process; `None` in the others.

    Raises:
        ValueError: A setting is invalid, the checkpoint does not support a task, or all clips failed.
        ImportError: A library that a metric needs is not installed.
    """
    check_installed()
    folder = as_path(config.output_dir) / "clips"
    on_ray = config.engine == "ray"
    measure = open_measurement(config, torch.device("cpu") if on_ray else None)
    config, suite, settings = measure.config, measure.suite, measure.settings
    jobs = [
        Job(f"{first:06d}.json", {"first": first, "count": min(config.batch_size, len(suite) - first)})
        for first in range(0, len(suite), config.batch_size)
    ]
    run_jobs(jobs, config, folder, partial(load_worker, config if on_ray else measure, folder))
    process = this_process()
    if not process.is_main_process:
        return None
    lines = read_manifest(folder)
    done = [read_json(folder / job.name) for job in jobs if is_done(job, lines, folder)]
    if not done:
        reason = next(line["error"] for line in lines.values() if "error" in line)
        raise ValueError(f"all clips failed, the first one because of: {reason}")
    results = gather_results(config, done, settings, measure.features)
    results["missing"] = len(suite) - len(results["numbers"])
    strips = {
        f"{task}, clip {number}": rows
        for batch in done
        for number, tasks in batch["strips"].items()
        for task, rows in tasks.items()
    }
    replace_text(folder.parent / "results.json", json.dumps(results, indent=1))
    replace_text(folder.parent / "report.html", make_report(results, strips))
    return results


def open_measurement(config: EvaluationConfig, device: torch.device | None = None) -> Measurement:
    """Loads a checkpoint and opens a suite; by default on the device of this process.

    Raises:
        ValueError: As in `evaluate`.
    """
    pipe = load_pipeline(config, device)
    config = with_defaults(config, pipe)
    check_evaluation(config)
    return Measurement(config, pipe, open_suite(config))


def load_worker(opened: EvaluationConfig | Measurement, folder: Path) -> Worker:
    """What measures batches of clips and writes their files: with an open measurement, or with its own."""
    measure = opened if isinstance(opened, Measurement) else open_measurement(opened)

    def make(job: Job, path: Path) -> dict[str, Any]:
        first, count = job.inputs["first"], job.inputs["count"]
        batch = measure(measure.suite.samples(range(first, first + count)))
        write_text(path, json.dumps(batch))
        skipped = dict(measure.suite.skipped)
        return {"num_clips": len(batch["numbers"])} | ({"left_out": skipped} if skipped else {})

    return job_worker(make, folder, measure.settings)


class Measurement:
    """Runs and scores the tasks on batches of clips.

    Args:
        config: The settings, with defaults filled in.
        pipe: The checkpoint.
        suite: The clips.

    Raises:
        ValueError: The checkpoint or the suite does not support a task, or clips are too short for the features.
    """

    def __init__(self, config: EvaluationConfig, pipe: VideoGenPipeline, suite: Suite):
        self.config, self.pipe, self.suite = config, pipe, suite
        self.tasks = list(TASKS[:-1] if config.tasks is None else config.tasks)
        if config.tasks is None:
            supported = set(pipe.denoiser.config.tasks)
            self.tasks = [task for task in self.tasks if self._required_tasks(task) <= supported]
            if pipe.video_vae is None:
                self.tasks.remove("reconstruction")
            if (not suite.captioned or pipe.text_encoder is None) and "generation" in self.tasks:
                self.tasks.remove("generation")
        self._check()
        self.lpips = LPIPS().to(pipe.device) if config.lpips else None
        self.convlstm = open_convlstm(config, pipe.device) if "prediction" in self.tasks else None
        self.features = open_features(config, pipe.device)
        self.recognizer = open_recognizer(config, self.suite, self.features)
        if self.features is not None:
            self._check_lengths(self.features)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that all batches of a folder must have in common."""
        settings = run_settings(self.config, self.pipe, "batch_size")
        return settings | {"seed": self.config.seed, "tasks": self.tasks} | self.digests | {"format": FORMAT}

    @property
    def digests(self) -> dict[str, str]:
        """Hashes of the clips and of the networks outside the pipeline."""
        digests = {} if self.suite.digest is None else {"clips_sha256": self.suite.digest}
        digests |= {} if self.convlstm is None else {"convlstm_sha256": weights_digest(self.convlstm)}
        digests |= {} if self.recognizer is None else {"recognizer_sha256": self.recognizer.digest}
        return digests if self.features is None else digests | {"features_sha256": self.features.digest}

    def _required_tasks(self, task: str) -> set[str]:
        """The training tasks that a checkpoint needs for a task of the evaluation."""
        both = {"leading", "keyframes"}
        given = {"leading"} if self.pipe.grid.is_valid(self.config.given) else both
        return {"prediction": given, "interpolation": both, "rollout": {"leading"}}.get(task, set())

    def _check(self) -> None:
        """Raises early for settings that would fail in every batch."""
        config, pipe = self.config, self.pipe
        size = (config.height, config.width)
        for task in self.tasks:
            check_tasks(pipe.denoiser.config, pipe.grid, self._required_tasks(task))
        if "reconstruction" in self.tasks and pipe.video_vae is None:
            raise ValueError("the task reconstruction needs a pipeline with a VAE")
        steps = config.num_inference_steps or pipe.config.num_inference_steps
        if {"generation", "rollout"} & set(self.tasks):
            if not self.suite.captioned:
                raise ValueError("the tasks generation and rollout need a suite in which every clip has a caption")
            frames = config.num_frames if "generation" in self.tasks else pipe.grid.first
            mode = widest_mode(pipe.denoiser.config.group_modes)
            pipe.check_inputs(["a video"], None, *size, frames, config.frame_rate, steps, groups=mode)
        if "interpolation" in self.tasks:
            rate = config.frame_rate / config.factor  # of the frames that are given
            pipe.interpolator(config.factor, size=size, frame_rate=rate, num_inference_steps=steps)
        if "rollout" in self.tasks:  # two chunks are needed for a seam
            check_integer("rollout_frames", config.rollout_frames, self._chunk_frames + 2)
        if config.features or config.torchscript:
            if not set(FEATURED) & set(self.tasks):
                raise ValueError(f"distances between distributions need one of the tasks {', '.join(FEATURED)}")
            if len(self.suite) < 2:
                raise ValueError(f"distances between distributions need at least 2 clips, got {len(self.suite)}")
        if config.prompted and not self.suite.captioned:
            raise ValueError("prompted=True needs a suite in which every clip has a caption")

    @property
    def _chunk_frames(self) -> int:
        """Pixel frames per chunk of a rollout."""
        options = RolloutOptions().resolve(self.pipe.config, self.pipe.denoiser.config, prompted=True)
        assert options.chunk_size is not None
        return self.pipe.grid.unit * options.chunk_size

    def _check_lengths(self, network: Features) -> None:
        """Raises if clips have fewer new frames than the feature network needs."""
        for task in [task for task in FEATURED if task in self.tasks]:
            needed, available = feature_frames(self.config, network, task), countable_frames(self.config, task)
            if available < needed:
                raise ValueError(
                    f"num_frames must be at least {self.config.num_frames + needed - available}, because "
                    f"{network.name} needs {needed} frames that count in the task {task}, got {self.config.num_frames}"
                )

    @torch.no_grad()
    def __call__(self, samples: Samples) -> dict[str, Any]:
        """Runs all tasks on a batch of clips.

        Returns:
            Values by task, method and metric, one per clip; also the clips' numbers, curves, features and strips.
        """
        results: dict[str, Any] = {"numbers": samples.numbers, "frames": {}}
        results |= {name: {} for name in ("tasks", "curves", "features", "strips")}
        decoded = self._reconstruct(samples)
        for task in self.tasks:
            methods, counted = getattr(self, f"_{task}")(samples)
            if task != "rollout" and decoded is not None:
                methods[UPPER_BOUND] = decoded
            if task in PAIRED:
                methods[TRUE] = samples.clips
            methods = {name: clips[:, :, : next(iter(methods.values())).shape[2]] for name, clips in methods.items()}
            values: dict[str, Any] = {}
            for name, clips in methods.items():
                values[name] = tolist(self._values(task, name, clips, samples, counted))
                if task in PAIRED and name != TRUE:
                    results["frames"][task] = counted
                    true = samples.clips[:, :, : clips.shape[2]]
                    results["curves"].setdefault(task, {})[name] = tolist(curves(clips, true, counted))
                if self.features is not None and task in FEATURED:
                    results["features"].setdefault(task, {})[name] = self._features_of(task, clips)
            results["tasks"][task] = values
            self._draw(results["strips"], task, samples, methods)
        return results

    def _values(
        self, task: str, method: str, clips: Tensor, samples: Samples, counted: list[int]
    ) -> dict[str, Tensor]:
        """Scores the clips of one method for a task, `(b,)` for each metric."""
        if task == "rollout":
            slopes = {f"{name} drift": value for name, value in drift_slopes(clips).items()}
            ends = {f"{name}, end from start": value for name, value in start_end_difference(clips).items()}
            if self._chunk_frames == 1 or self.pipe.denoiser.patch_size[0] > 1:
                return slopes | ends  # every frame is a seam, or the first chunk has another length
            s = self.pipe.vae_scale_factor_temporal
            # a still video has no seams (NaN), and one that moves only at seams has an infinite ratio
            seams = seam_ratio(clips, self._chunk_frames // s, s).nan_to_num(1.0, posinf=100.0)
            return slopes | ends | {"seam ratio": seams}
        values = {}
        if method == TRUE and task in PAIRED:
            values = {"sharpness": statistics(clips[:, :, counted])["sharpness"].mean(1)}
        elif task in PAIRED:
            values = score_pairs(clips, samples.clips[:, :, : clips.shape[2]], counted, self.lpips)
        values |= score_time(clips)
        if task in RECOGNIZED:
            each = [self.suite.correct(number, clip) for number, clip in zip(samples.numbers, clips, strict=True)]
            values |= {name: torch.tensor([one[name] for one in each]) for name in each[0]}
            if self.recognizer is not None:
                seen = self.recognizer.labels_of(clips.to(self.pipe.device))
                asked = map(self.suite.labels, samples.numbers)
                several = self.recognizer.network.config.multi_label
                right = [a == b if several else a <= b for a, b in zip(seen, asked, strict=True)]
                values["recognized"] = torch.tensor(right, dtype=torch.float32)
        return values

    def _reconstruction(self, samples: Samples) -> tuple[dict[str, Tensor], list[int]]:
        return {}, list(range(self.config.num_frames))

    def _prediction(self, samples: Samples) -> tuple[dict[str, Tensor], list[int]]:
        config, given = self.config, self.config.given
        counted = list(range(given, config.num_frames))
        known = samples.clips[:, :, :given]
        predictions = torch.stack(
            [
                torch.cat([known, self._predict(samples, self._generators(samples, draw))], dim=2)
                for draw in range(config.num_samples)
            ]
        )
        methods = {MODEL: predictions[0]}
        if config.num_samples > 1:
            methods |= {f"{MODEL}, {name}": one for name, one in combine(predictions, samples.clips, counted).items()}
        if self.convlstm is not None:
            new = self.convlstm.predict(known.to(self.convlstm.device), config.num_frames - given)
            methods["ConvLSTM"] = torch.cat([known, new.clamp(-1, 1).cpu()], dim=2)
        methods["copy of the last frame"] = copy_last(samples.clips, given)
        return methods, counted

    def _interpolation(self, samples: Samples) -> tuple[dict[str, Tensor], list[int]]:
        keyframes = keyframes_of(self.config)
        counted = [index for index in range(keyframes[-1]) if index not in keyframes]
        methods = {
            MODEL: self._interpolate(samples),
            "copy of the last keyframe": hold_keyframes(samples.clips, keyframes),
            "linear blend": linear_blend(samples.clips, keyframes),
            "optical flow (DIS)": flow_interpolation(samples.clips, keyframes),
        }
        return methods, counted

    def _generation(self, samples: Samples) -> tuple[dict[str, Tensor], list[int]]:
        config = self.config
        frames = self.pipe(
            self._captions(samples), num_frames=config.num_frames, height=config.height, width=config.width,
            num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale,
            frame_rate=config.frame_rate, generator=self._generators(samples), output_type="pt",
            groups=widest_mode(self.pipe.denoiser.config.group_modes),
        ).frames  # fmt: skip
        return {MODEL: from_pt(frames.cpu()), TRUE: samples.clips}, []

    def _rollout(self, samples: Samples) -> tuple[dict[str, Tensor], list[int]]:
        config = self.config
        chunks = self.pipe.rollout(
            self._captions(samples), num_frames=config.rollout_frames, height=config.height, width=config.width,
            num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale,
            frame_rate=config.frame_rate, generator=self._generators(samples),
        )  # fmt: skip
        frames = torch.from_numpy(np.concatenate(list(chunks), axis=1))
        methods = {MODEL: from_uint8(frames).movedim(-1, 1)}
        true = self.suite.long(samples.numbers, config.rollout_frames)
        return methods if true is None else methods | {TRUE: true}, []

    def _predict(self, samples: Samples, generators: list[torch.Generator]) -> Tensor:
        """Predicts the frames after the given ones, `(b, 3, f, h, w)`."""
        given, count = range(self.config.given), self.config.num_frames - self.config.given
        options = {"num_frames": count, "frame_rate": self.config.frame_rate}
        frames = self._from_known(self.pipe.predict, samples, given, generators, **options)
        return from_pt(frames.cpu())

    def _interpolate(self, samples: Samples) -> Tensor:
        """Interpolates clips from every N-th frame."""
        config, generators = self.config, self._generators(samples)
        options = {"factor": config.factor, "frame_rate": config.frame_rate / config.factor}
        frames = self._from_known(self.pipe.interpolate, samples, keyframes_of(config), generators, **options)
        return from_pt(frames.cpu())

    def _from_known(
        self, call: Callable, samples: Samples, known: Iterable[int], generators: list[torch.Generator], **options: Any
    ) -> Tensor:
        """Calls a method of the pipeline with some frames of each clip; returns `(b, f, 3, h, w)` in [0, 1]."""
        frames = rearrange(samples.clips[:, :, list(known)], "b c f h w -> b f h w c")
        given = list(to_uint8(frames).numpy())
        options |= {"num_inference_steps": self.config.num_inference_steps, "output_type": "pt"}
        if self.config.prompted:
            options |= {"prompt": self._captions(samples), "guidance_scale": self.config.guidance_scale}
        return call(given, generator=generators, **options).frames

    def _captions(self, samples: Samples) -> list[str]:
        missing = [number for number, text in zip(samples.numbers, samples.captions, strict=True) if text is None]
        if missing:
            raise ValueError(f"the task needs captions, which these clips do not have: {missing}")
        return [text for text in samples.captions if text is not None]

    def _generators(self, samples: Samples, draw: int = 0) -> list[torch.Generator]:
        """One generator per clip, seeded by its number, so that results do not depend on the batches."""
        seeds = [(self.config.seed * 1009 + draw) * 1_000_003 + number for number in samples.numbers]
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def _reconstruct(self, samples: Samples) -> Tensor | None:
        """Encodes and decodes the clips, padded with their last frame to a valid length; `None` without a VAE."""
        vae = self.pipe.video_vae
        if vae is None:
            return None
        clips, count = samples.clips.to(self.pipe.device, vae.dtype), self.config.num_frames
        grid = LatentGrid(vae.temporal_compression_ratio)
        padding = grid.num_frames(grid.latents_for(count)) - count
        clips = torch.cat([clips, *[clips[:, :, -1:]] * padding], dim=2)
        return vae.decode(vae.encode(clips).latent_dist.mode()).sample[:, :, :count].float().cpu()

    def _features_of(self, task: str, clips: Tensor) -> list[list[float]]:
        """Features of the frames that count in the distances."""
        assert self.features is not None
        count = feature_frames(self.config, self.features, task)
        last = task == "prediction" and not self.config.count_known_frames
        part = clips[:, :, -count:] if last else clips[:, :, :count]
        return self.features(part.to(self.pipe.device)).double().cpu().tolist()

    def _draw(self, strips: dict[str, Any], task: str, samples: Samples, methods: dict[str, Tensor]) -> None:
        """Adds strips of pictures of the suite's first clips, one per method."""
        for row, number in enumerate(samples.numbers):
            if number < self.config.num_strips:
                strips.setdefault(str(number), {})[task] = {
                    name: draw_strip(clips[row]) for name, clips in methods.items()
                }


def check_evaluation(config: EvaluationConfig) -> None:
    """Checks settings that do not depend on the checkpoint, after defaults have been filled in.

    Raises:
        ValueError: A setting is unknown or out of range.
    """
    check_suite(config)
    if config.tasks is not None:
        check_choices("tasks", config.tasks, Task)
    check_integer("num_samples", config.num_samples, 1)
    check_integer("batch_size", config.batch_size, 1)
    if config.features and config.torchscript:
        raise ValueError("features and torchscript cannot be used together: set only one of them")
    if config.num_feature_frames is not None:
        check_integer("num_feature_frames", config.num_feature_frames, 1)


def with_defaults(config: EvaluationConfig, pipe: VideoGenPipeline) -> EvaluationConfig:
    """Fills in the checkpoint's defaults for settings that are 0, and the packaged networks where they apply."""
    names = ("num_frames", "height", "width", "frame_rate")
    config = replace(config, **{name: getattr(config, name) or pipe.config[name] for name in names})
    if all(getattr(config, name) == one for name, one in PACKAGED_CLIPS.items()):
        config = replace(config, convlstm=config.convlstm or CONVLSTM)
        if config.tasks is None or set(config.tasks) & set(RECOGNIZED):
            config = replace(config, recognizer=config.recognizer or RECOGNIZER)
    if is_set(config.recognizer) and not (config.features or config.torchscript) and config.num_clips > 1:
        features = set(FEATURED) & set(config.tasks or FEATURED)
        config = replace(config, features=config.recognizer if features else None)
    return config


def is_set(network: str | None) -> TypeGuard[str]:
    """Whether a setting names a network."""
    return network not in (None, "none")


def gather_results(
    config: EvaluationConfig, batches: list[dict[str, Any]], settings: dict[str, Any], network: Any
) -> dict[str, Any]:
    """Combines the batches into the contents of `results.json`."""
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
    results["agreement"] = agreement(results["tasks"])
    features = join([batch["features"] for batch in batches])
    for task, methods in features.items():
        real = torch.tensor(methods.pop(TRUE), dtype=torch.float64)
        if len(real) < 2:
            logger.warning(f"{task}: distances between distributions need at least 2 clips, got {len(real)}")
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
        for method, generated in methods.items():
            measured = distances(real, torch.tensor(generated, dtype=torch.float64), protocol)
            values = {name: asdict(distance) for name, distance in measured.items()}
            results["distances"].setdefault(task, {})[method] = values
    return json.loads(json.dumps(results, default=str))


def open_convlstm(config: EvaluationConfig, device: torch.device) -> ConvLSTMPredictor | None:
    """Loads the ConvLSTM baseline; `None` without one."""
    if not is_set(config.convlstm):
        return None
    return ConvLSTMPredictor.from_pretrained(find_packaged(config.convlstm) or config.convlstm).eval().to(device)


def open_features(config: EvaluationConfig, device: torch.device) -> Features | None:
    """Loads the feature network of the distances; `None` without one.

    Raises:
        ValueError: The network needs another number of frames than `num_feature_frames`, or cannot be loaded.
    """
    network: Features
    if config.torchscript is not None:
        network = ScriptedFeatures(config.torchscript, trusted=config.trust_torchscript)
    elif config.features is not None:
        own = is_recognizer(config.features)
        network = RecognizerFeatures(config.features) if own else FeatureNetwork(config.features)
    else:
        return None
    if config.num_feature_frames and network.num_frames not in (None, config.num_feature_frames):
        raise ValueError(
            f"num_feature_frames must be {network.num_frames} for {network.name}, got {config.num_feature_frames}"
        )
    return network.to(device)


def open_recognizer(config: EvaluationConfig, suite: Suite, features: Features | None) -> RecognizerFeatures | None:
    """The recognizer that judges videos, which may be the feature network; `None` without one.

    Raises:
        ValueError: It is not a recognizer, or does not know the labels of the suite.
    """
    if not is_set(config.recognizer):
        return None
    shared = isinstance(features, RecognizerFeatures) and features.name == config.recognizer
    network: Any = features if shared else RecognizerFeatures(config.recognizer)
    unknown = sorted(set().union(*map(suite.labels, range(len(suite)))) - set(network.network.labels))
    if unknown:
        raise ValueError(f"{config.recognizer} does not know the label {unknown[0]!r} of the suite {config.suite}")
    return network


def countable_frames(config: EvaluationConfig, task: str) -> int:
    """Frames per clip that count in distances: all but the given ones, unless `count_known_frames` is set."""
    return config.num_frames - (config.given if task == "prediction" and not config.count_known_frames else 0)


def feature_frames(config: EvaluationConfig, network: Features, task: str) -> int:
    """Frames per clip that the feature network gets."""
    return network.num_frames or config.num_feature_frames or countable_frames(config, task)


def draw_strip(clip: Tensor) -> str:
    """Draws evenly spaced frames of a clip `(3, f, h, w)` side by side, as a PNG in base64."""
    indices = np.linspace(0, clip.shape[1] - 1, min(STRIP, clip.shape[1])).round().astype(int)
    row = rearrange(clip[:, indices], "c f h w -> h (f w) c")
    file = BytesIO()
    Image.fromarray(to_uint8(row).numpy()).save(file, "png")
    return b64encode(file.getvalue()).decode()


def agreement(tasks: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Share of videos on which a recognizer and the checker of ShapesWorld agree, by task and method."""
    return {
        task: {
            method: float(np.mean(np.equal(values["correct"], values["recognized"])))
            for method, values in methods.items()
            if {"correct", "recognized"} <= set(values)
        }
        for task, methods in tasks.items()
    }


def tolist(values: dict[str, Tensor]) -> dict[str, list]:
    """Converts tensors to lists with 6 significant digits, for JSON."""
    return {name: np.vectorize(lambda x: float(f"{x:.6g}"))(one.numpy()).tolist() for name, one in values.items()}


def join(parts: list[Any]) -> Any:
    """Concatenates the lists of nested dictionaries with the same keys."""
    if isinstance(parts[0], dict):
        return {name: join([part[name] for part in parts]) for name in parts[0]}
    return [value for part in parts for value in part]


def average(curves: Any) -> Any:
    """Averages tables `(b, f)` in nested dictionaries over the clips."""
    if isinstance(curves, dict):
        return {name: average(one) for name, one in curves.items()}
    return np.mean(curves, axis=0).round(6).tolist()
