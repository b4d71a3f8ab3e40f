"""How near the distribution of made clips is to that of real ones, with the protocol that makes numbers comparable."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils import logging
from einops import rearrange
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from vgen.io.fingerprint import weights_digest
from vgen.metrics.temporal import check_clip

logger = logging.get_logger(__name__)


class FeatureNetwork(nn.Module):
    """A video model of transformers (VideoMAE, TimeSformer, ViViT, V-JEPA 2, ...) as features of clips.

    A clip's feature is the mean over its tokens in the last layer. Frames are resized as bilinear interpolation with
    antialiasing does, the whole frame to the model's size, and their values are brought to what the model's processor
    config says.

    Args:
        source: Folder or Hub id.

    Raises:
        ValueError: It is no model of videos.
    """

    resize = "bilinear, antialiased"

    def __init__(self, source: str | Path):
        super().__init__()
        from transformers import AutoModel

        self.name = str(source)
        self.network = AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True).eval()
        config = self.network.config
        self.num_frames = getattr(config, "num_frames", getattr(config, "frames_per_clip", None))
        self.image_size = getattr(config, "image_size", getattr(config, "crop_size", None))
        if self.num_frames is None or self.image_size is None:
            raise ValueError(f"{source} holds a {type(self.network).__name__}, which is no model of videos")
        told = _read_processor(source)
        mean, std = (told["image_mean"], told["image_std"]) if told["do_normalize"] else (0.0, 1.0)
        self.mean, self.std = ([float(x) for x in torch.tensor(one).expand(3)] for one in (mean, std))
        self.scale, self.offset = 255 * told["rescale_factor"], float(told["offset"])

    @property
    def digest(self) -> str:
        """Of the weights."""
        return weights_digest(self.network)

    @property
    def values(self) -> str:
        """How pixels in [0, 1] become what the network sees."""
        mean, std = (" ".join(f"{x:.4g}" for x in one) for one in (self.mean, self.std))
        return f"times {self.scale:.4g} less {self.offset:g}, mean {mean}, deviation {std}"

    @torch.no_grad()
    def forward(self, clip: Tensor) -> Tensor:
        """Features `(b, d)` of clips `(b, 3, f, h, w)` in [-1, 1].

        Raises:
            ValueError: They have another number of frames than the model takes.
        """
        check_clip(clip, 1)
        if clip.shape[2] != self.num_frames:
            raise ValueError(f"clips of {clip.shape[2]} frames, but {self.name} takes {self.num_frames}")
        size = self.image_size if isinstance(self.image_size, (tuple, list)) else (self.image_size, self.image_size)
        frames = rearrange(clip.float() / 2 + 0.5, "b c f h w -> (b f) c h w")
        frames = F.interpolate(frames, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)
        mean, std = (frames.new_tensor(one)[:, None, None] for one in (self.mean, self.std))
        frames = frames * self.scale - self.offset
        pixels = rearrange((frames - mean) / std, "(b f) c h w -> b f c h w", b=len(clip))
        return self.network(**{self.network.main_input_name: pixels}).last_hidden_state.mean(1)


def _read_processor(source: str | Path) -> dict[str, Any]:
    """What a model's processor does with values; with a warning, what most do, where it is not told."""
    from transformers import ImageProcessingMixin
    from transformers.video_processing_utils import BaseVideoProcessor

    usual = {"image_mean": 0.5, "image_std": 0.5, "do_normalize": True, "rescale_factor": 1 / 255, "offset": False}
    for read in (BaseVideoProcessor.get_video_processor_dict, ImageProcessingMixin.get_image_processor_dict):
        try:
            told, _ = read(source)
        except OSError:
            continue
        return usual | {name: told[name] for name in usual if told.get(name) is not None}
    logger.warning(f"{source} has no config of its processor: values are taken with mean and deviation 0.5")
    return usual


class ScriptedFeatures(nn.Module):
    """An I3D network in TorchScript, as it goes round for the Frechet video distance, as features of clips.

    It is called as `network(pixels, rescale=True, resize=True, return_features=True)` with pixels in [0, 255].

    Args:
        path: Of the file. It is a program that runs with your rights: take it from where you trust.
        trusted: Must be true.

    Raises:
        ValueError: It was not said to be trusted.
    """

    resize = values = "by the network"
    num_frames = None

    def __init__(self, path: str | Path, trusted: bool = False):
        super().__init__()
        if not trusted:
            raise ValueError(f"{path} is a program: say that you trust it (trusted=True, --trust_torchscript true)")
        self.name = str(path)
        self.digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.network = torch.jit.load(str(path)).eval()

    @torch.no_grad()
    def forward(self, clip: Tensor) -> Tensor:
        """Features `(b, d)` of clips `(b, 3, f, h, w)` in [-1, 1]."""
        check_clip(clip, 1)
        return self.network((clip.float() + 1) * 127.5, rescale=True, resize=True, return_features=True)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a distance between distributions depends on beside the videos."""

    num_clips: int
    num_frames: int
    """Of a clip."""
    stride: int
    """From one frame of a clip to the next in its video."""
    height: int
    """Pixels, before the network's own resizing."""
    width: int
    known_frames_counted: bool
    """Whether frames that were given stand in the clips."""
    resize: str
    """How frames came to the network's size."""
    values: str
    """How their values came to what the network takes."""
    feature_network: str
    """Digest of its weights."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A distance with what it means."""

    name: str
    value: float
    low: float
    """Of the 95% confidence interval."""
    high: float
    protocol: Protocol

    def __str__(self) -> str:
        told = ", ".join(f"{key} {value}" for key, value in asdict(self.protocol).items())
        return f"{self.name} {self.value:.3f} [{self.low:.3f}, {self.high:.3f}] ({told})"

    @classmethod
    def read(cls, record: dict[str, Any]) -> Distance:
        """From what `dataclasses.asdict` made of one."""
        return cls(**(record | {"protocol": Protocol(**record["protocol"])}))

    def minus(self, other: Distance) -> tuple[float, float, float]:
        """The difference to another distance of the same kind, and its 95% confidence interval.

        The interval follows from those of the two, as if they were independent (Zou and Donner 2008).

        Raises:
            ValueError: Their protocols differ; what does is named.
        """
        mine, theirs = asdict(self.protocol), asdict(other.protocol)
        wrong = [f"{key} {mine[key]} and {theirs[key]}" for key in mine if mine[key] != theirs[key]]
        if self.name != other.name:
            wrong.insert(0, f"{self.name} and {other.name}")
        if wrong:
            raise ValueError(f"these numbers cannot be compared: {', '.join(wrong)}")
        value = self.value - other.value
        low = value - math.hypot(self.value - self.low, other.high - other.value)
        return value, low, value + math.hypot(self.high - self.value, other.value - other.low)


def extract(network: Callable[[Tensor], Tensor], clips: Iterable[Tensor]) -> Tensor:
    """Features `(n, d)` of batches of clips, in double precision on the CPU."""
    return torch.cat([network(batch).double().cpu() for batch in clips])


def frechet_distance(real: Tensor, made: Tensor) -> float:
    """The Frechet distance of Gaussians through features `(n, d)` of real and of made clips.

    Raises:
        ValueError: Shapes do not fit, or there are fewer than 2 clips.

    Source: GANs trained by a two time-scale update rule, arXiv 1706.08500; for videos: arXiv 1812.01717.
    """
    _check_features(real, made)
    identity = nn.Identity()
    identity.num_features = real.shape[1]  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(made.double(), real=False)
    return metric.compute().item()


def kernel_distance(real: Tensor, made: Tensor) -> float:
    """The squared maximum mean discrepancy, unbiased, with the kernel `(x y / d + 1)^3`; it may be below 0.

    Of a larger set, the first ones are taken, as many as the smaller has.

    Raises:
        ValueError: Shapes do not fit, or there are fewer than 2 clips.

    Source: Demystifying MMD GANs, arXiv 1801.01401.
    """
    _check_features(real, made)
    count = min(len(real), len(made))
    return poly_mmd(real[:count].double(), made[:count].double(), degree=3, gamma=None, coef=1.0).item()


DISTANCES = {"FVD": frechet_distance, "KVD": kernel_distance}


def distances(
    real: Tensor, made: Tensor, protocol: Protocol, num_resamples: int = 200, seed: int = 0
) -> dict[str, Distance]:
    """All distances with confidence intervals, by drawing the made clips anew with replacement (bootstrap).

    Args:
        real: Features `(n, d)`.
        made: Features `(n, d)`.
        protocol: That made them.
        num_resamples: Draws for the interval.
        seed: Of them.

    Raises:
        ValueError: Shapes do not fit, there are fewer than 2 clips, or the protocol tells another number of them.
    """
    _check_features(real, made)
    if len(made) != protocol.num_clips:
        raise ValueError(f"{len(made)} made clips, but the protocol says num_clips={protocol.num_clips}")
    fewest = min(real, made, key=len)
    if len(fewest) <= real.shape[1]:
        rank = int(torch.linalg.matrix_rank((fewest - fewest.mean(0)).double()))
        logger.warning(
            f"{len(fewest)} clips for features of {real.shape[1]} dimensions: their covariance has rank {rank} only, "
            "and the Frechet distance depends on the number of clips"
        )
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(len(made), (len(made),), generator=generator) for _ in range(num_resamples)]
    found = {}
    for name, function in DISTANCES.items():
        value = function(real, made)
        drawn = torch.tensor([function(real, made[draw]) for draw in draws], dtype=torch.float64)
        # drawing with replacement makes sets less varied than they are: the interval is about the value itself
        deviation = drawn - drawn.mean() if num_resamples else torch.zeros(1, dtype=torch.float64)
        low, high = torch.quantile(deviation, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        found[name] = Distance(name=name, value=value, low=value + low, high=value + high, protocol=protocol)
    return found


def _check_features(real: Tensor, made: Tensor) -> None:
    if real.ndim != 2 or made.ndim != 2 or real.shape[1] != made.shape[1]:
        raise ValueError(f"features must be (n, d) with equal d, not {tuple(real.shape)} and {tuple(made.shape)}")
    if min(len(real), len(made)) < 2:
        raise ValueError(f"{len(real)} real and {len(made)} made clips: at least 2 of each are needed")
    for name, features in (("real", real), ("made", made)):
        if not torch.isfinite(features).all():
            raise ValueError(f"the features of {name} clips are not finite")
