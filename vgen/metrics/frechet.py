"""Distances between the distributions of real and generated clips, with the protocol that makes them comparable."""

from __future__ import annotations

import math
import warnings
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

from vgen.checks import check_integer
from vgen.io.fingerprint import file_digest, weights_digest
from vgen.io.pixels import to_byte_range
from vgen.metrics.temporal import check_clip
from vgen.models.processor import read_processor

logger = logging.get_logger(__name__)


class FeatureNetwork(nn.Module):
    """Features of clips from a video model of transformers (VideoMAE, TimeSformer, ViViT, V-JEPA 2, ...).

    The feature of a clip is the mean of its tokens in the last layer. Whole frames are resized to the model's input
    size, bilinearly with antialiasing, and their values are normalized as the model's processor config says.

    Args:
        source: Folder or Hub id of the model.

    Raises:
        ValueError: The model is not a video model.
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
            raise ValueError(f"{source} must be a video model, got {type(self.network).__name__}")
        processor = read_processor(source)
        mean, std = (processor["image_mean"], processor["image_std"]) if processor["do_normalize"] else (0.0, 1.0)
        self.mean, self.std = ([float(x) for x in torch.tensor(values).expand(3)] for values in (mean, std))
        self.scale, self.offset = 255 * processor["rescale_factor"], float(processor["offset"])

    @property
    def digest(self) -> str:
        """Hash of the weights."""
        return weights_digest(self.network)

    @property
    def values(self) -> str:
        """How pixels in [0, 1] are normalized for the network, in words."""
        mean, std = (" ".join(f"{x:.4g}" for x in values) for values in (self.mean, self.std))
        return f"times {self.scale:.4g} less {self.offset:g}, mean {mean}, deviation {std}"

    @torch.no_grad()
    def forward(self, clip: Tensor) -> Tensor:
        """Computes features `(b, d)` of clips `(b, 3, f, h, w)` in [-1, 1].

        Raises:
            ValueError: The number of frames is not that of the model's input.
        """
        check_clip(clip, 1)
        if clip.shape[2] != self.num_frames:
            raise ValueError(f"{self.name} needs clips of {self.num_frames} frames, got {clip.shape[2]}")
        size = self.image_size if isinstance(self.image_size, (tuple, list)) else (self.image_size, self.image_size)
        frames = rearrange(clip.float() / 2 + 0.5, "b c f h w -> (b f) c h w")
        frames = F.interpolate(frames, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)
        mean, std = (frames.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        frames = frames * self.scale - self.offset
        pixels = rearrange((frames - mean) / std, "(b f) c h w -> b f c h w", b=len(clip))
        return self.network(**{self.network.main_input_name: pixels}).last_hidden_state.mean(1)


class ScriptedFeatures(nn.Module):
    """Features of clips from an I3D network in TorchScript, as published for the Frechet video distance.

    The network is called as `network(pixels, rescale=True, resize=True, return_features=True)` with pixels in
    [0, 255].

    Args:
        path: TorchScript file. It is a program that runs with the user's permissions, so its source must be trusted.
        trusted: Must be true, to confirm that the file is trusted.

    Raises:
        ValueError: `trusted` is false.
    """

    resize = values = "by the network"
    num_frames = None

    def __init__(self, path: str | Path, trusted: bool = False):
        super().__init__()
        if not trusted:
            raise ValueError(
                f"{path} is a program: confirm that you trust it with trusted=True (--trust_torchscript true)"
            )
        self.name = str(path)
        self.digest = file_digest(Path(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.network = torch.jit.load(str(path)).eval()

    @torch.no_grad()
    def forward(self, clip: Tensor) -> Tensor:
        """Computes features `(b, d)` of clips `(b, 3, f, h, w)` in [-1, 1]."""
        check_clip(clip, 1)
        return self.network(to_byte_range(clip), rescale=True, resize=True, return_features=True)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Settings, apart from the videos, that a distance between distributions depends on."""

    num_clips: int
    """Number of generated clips."""
    num_frames: int
    """Frames per clip."""
    stride: int
    """Distance in the video between consecutive frames of a clip."""
    height: int
    """Height in pixels, before the network resizes frames."""
    width: int
    """Width in pixels, before the network resizes frames."""
    known_frames_counted: bool
    """Whether the clips include the frames that the model was given."""
    resize: str
    """How frames were resized to the network's input size."""
    values: str
    """How pixel values were normalized."""
    feature_network: str
    """Hash of the weights of the feature network."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A distance with its confidence interval and its protocol."""

    name: str
    value: float
    low: float
    """Lower bound of the 95% confidence interval."""
    high: float
    """Upper bound of the 95% confidence interval."""
    protocol: Protocol

    def __str__(self) -> str:
        settings = ", ".join(f"{key} {value}" for key, value in asdict(self.protocol).items())
        return f"{self.name} {self.value:.3f} [{self.low:.3f}, {self.high:.3f}] ({settings})"

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Distance:
        """Reads a distance that `dataclasses.asdict` turned into a dictionary."""
        return cls(**(record | {"protocol": Protocol(**record["protocol"])}))

    def minus(self, other: Distance) -> tuple[float, float, float]:
        """Returns the difference to another distance, and the bounds of its 95% confidence interval.

        The interval follows from those of the two distances, assuming that they are independent (Zou and Donner 2008).

        Raises:
            ValueError: The names or the protocols differ. The error lists the differences.
        """
        first, second = asdict(self.protocol), asdict(other.protocol)
        wrong = [f"{key} {first[key]} and {second[key]}" for key in first if first[key] != second[key]]
        if self.name != other.name:
            wrong.insert(0, f"{self.name} and {other.name}")
        if wrong:
            raise ValueError(f"these distances cannot be compared, because they differ in {', '.join(wrong)}")
        value = self.value - other.value
        low = value - math.hypot(self.value - self.low, other.high - other.value)
        return value, low, value + math.hypot(self.high - self.value, other.value - other.low)


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Computes the Frechet distance between Gaussians that are fitted to two sets of features.

    Args:
        real: Features of real clips, `(n, d)`.
        generated: Features of generated clips, `(m, d)`.

    Raises:
        ValueError: The shapes do not match, there are fewer than 2 clips in a set, or features are not finite.

    Source: GANs trained by a two time-scale update rule, arXiv 1706.08500; for videos: arXiv 1812.01717.
    """
    _check_features(real, generated)
    identity = nn.Identity()
    identity.num_features = real.shape[1]  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return metric.compute().item()


def kernel_distance(real: Tensor, generated: Tensor) -> float:
    """Computes the squared maximum mean discrepancy with the kernel `(x y / d + 1)^3`.

    The estimator is unbiased, so it can be negative. The larger set is truncated to the size of the smaller one.
    Arguments and errors are those of `frechet_distance`.

    Source: Demystifying MMD GANs, arXiv 1801.01401.
    """
    _check_features(real, generated)
    count = min(len(real), len(generated))
    return poly_mmd(real[:count].double(), generated[:count].double(), degree=3, gamma=None, coef=1.0).item()


DISTANCES = {"FVD": frechet_distance, "KVD": kernel_distance}


def distances(
    real: Tensor, generated: Tensor, protocol: Protocol, num_resamples: int = 200, seed: int = 0
) -> dict[str, Distance]:
    """Computes all distances with confidence intervals, by resampling the generated clips (bootstrap).

    Args:
        real: Features of real clips, `(n, d)`.
        generated: Features of generated clips, `(m, d)`.
        protocol: Settings that the features were computed with.
        num_resamples: Number of bootstrap samples; 0 gives intervals of width 0.
        seed: Seed of the resampling.

    Returns:
        The distances by name.

    Raises:
        ValueError: As in `frechet_distance`, or `m` is not `protocol.num_clips`.
    """
    _check_features(real, generated)
    check_integer("num_resamples", num_resamples, 0)
    if len(generated) != protocol.num_clips:
        raise ValueError(f"expected num_clips={protocol.num_clips} generated clips, got {len(generated)}")
    smaller = min(real, generated, key=len)
    if len(smaller) <= real.shape[1]:
        rank = int(torch.linalg.matrix_rank((smaller - smaller.mean(0)).double()))
        logger.warning(
            f"{len(smaller)} clips are few for features of {real.shape[1]} dimensions: their covariance has rank "
            f"{rank}, so the Frechet distance depends on the number of clips"
        )
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(len(generated), (len(generated),), generator=generator) for _ in range(num_resamples)]
    results = {}
    for name, function in DISTANCES.items():
        value = function(real, generated)
        drawn = torch.tensor([function(real, generated[draw]) for draw in draws], dtype=torch.float64)
        # resampling biases the distance, so only the deviations from the mean of the resamples are used
        deviation = drawn - drawn.mean() if num_resamples else torch.zeros(1, dtype=torch.float64)
        low, high = torch.quantile(deviation, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        results[name] = Distance(name=name, value=value, low=value + low, high=value + high, protocol=protocol)
    return results


def _check_features(real: Tensor, generated: Tensor) -> None:
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        shapes = f"{tuple(real.shape)} and {tuple(generated.shape)}"
        raise ValueError(f"features must be (n, d) with equal d, got {shapes}")
    if min(len(real), len(generated)) < 2:
        raise ValueError(
            f"expected at least 2 clips of each kind, got {len(real)} real and {len(generated)} generated"
        )
    for name, features in (("real", real), ("generated", generated)):
        if not torch.isfinite(features).all():
            raise ValueError(f"the features of {name} clips are not finite")
