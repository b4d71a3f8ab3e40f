"""`Recognizer`: every video classifier behind one interface, and the registry of networks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForVideoClassification
from transformers.utils import cached_file

from vgen.checks import check_integer
from vgen.hub import locate
from vgen.io.records import read_json
from vgen.models.loading import StrictLoading, load_strictly
from vgen.recognition.attention import SpacetimeNetwork, SwinNetwork
from vgen.recognition.convolution import C3D, CausalCNN, InceptionNetwork, R2Plus1D
from vgen.recognition.fusion import EarlyFusion, LateFusion, SingleFrame, SlowFusion
from vgen.recognition.network import ClipNetwork, RecognizerOutput
from vgen.recognition.pretrained import (
    TRANSFORMERS,
    TorchvisionNetwork,
    TransformersNetwork,
    describe_transformers,
)
from vgen.recognition.recurrent import CNNRecurrent, ConvLSTMNetwork, RecurrentCNN, SpatialAttentionLSTM
from vgen.recognition.streams import FrameDifference, SegmentNetwork, SlowFastNetwork, TwoStreamNetwork
from vgen.temporal.state import TemporalState, network_identity

NETWORKS: dict[str, Callable[..., ClipNetwork]] = {
    "single_frame": SingleFrame,
    "late_fusion": LateFusion,
    "pooled": partial(LateFusion, pool="mean"),
    "early_fusion": EarlyFusion,
    "slow_fusion": SlowFusion,
    "c3d": C3D,
    "i3d": partial(InceptionNetwork, kernels="full"),
    "s3d": partial(InceptionNetwork, kernels="space_time"),
    "s3d_channels": partial(InceptionNetwork, kernels="channels"),
    "r2plus1d": R2Plus1D,
    "causal_cnn": CausalCNN,
    "cnn_lstm": partial(CNNRecurrent, cell="lstm"),
    "cnn_gru": partial(CNNRecurrent, cell="gru"),
    "convlstm": ConvLSTMNetwork,
    "st_lstm": SpatialAttentionLSTM,
    "recurrent_cnn": RecurrentCNN,
    "divided_attention": partial(SpacetimeNetwork, attention="divided"),
    "joint_attention": partial(SpacetimeNetwork, attention="joint"),
    "factorized_attention": partial(SpacetimeNetwork, attention="factorized"),
    "swin3d": SwinNetwork,
    "two_stream": TwoStreamNetwork,
    "tsn": SegmentNetwork,
    "slowfast": SlowFastNetwork,
    "frame_difference": FrameDifference,
    "torchvision": TorchvisionNetwork,
    **{name: partial(TransformersNetwork, model_type=name) for name in TRANSFORMERS},
}
"""Networks by name."""


class Recognizer(StrictLoading, ModelMixin, ConfigMixin):
    """A video classifier.

    Args:
        name: Name of the network in `NETWORKS`.
        num_classes: Number of classes.
        num_frames: Frames per clip.
        image_size: Height and width of the frames.
        sizes: Further arguments of the network.
        labels: Names of the classes; `None` numbers them.
        frame_rate: Frames per second of the training clips; `None` if unknown.
        multi_label: Whether a clip may have several labels, so that probabilities are sigmoids.

    Raises:
        ValueError: The name or a size is unknown, a number is out of range, or labels do not name all classes.
    """

    @register_to_config
    def __init__(
        self,
        name: str,
        num_classes: int,
        num_frames: int,
        image_size: int,
        sizes: Mapping[str, Any] | None = None,
        labels: Sequence[str] | None = None,
        frame_rate: float | None = None,
        multi_label: bool = False,
    ) -> None:
        super().__init__()
        for setting, value in (("num_classes", num_classes), ("num_frames", num_frames), ("image_size", image_size)):
            check_integer(setting, value, 1)
        if labels is not None and len(labels) != num_classes:
            raise ValueError(f"labels must name all {num_classes} classes, got {len(labels)}")
        make = network_of(name, sizes or {})
        self.network = make(num_classes=num_classes, num_frames=num_frames, image_size=image_size, **(sizes or {}))
        self._check(num_frames, (image_size, image_size))

    @classmethod
    def from_transformers(cls, source: str) -> Recognizer:
        """Loads a video classifier of transformers with its weights and labels.

        Args:
            source: A folder or Hub id of a model of one of the types in `TRANSFORMERS`.

        Raises:
            ValueError: It is another model, or the weights do not match its config.
        """
        config = AutoConfig.from_pretrained(source)
        if config.model_type not in TRANSFORMERS:
            raise ValueError(f"{source} must be one of {', '.join(TRANSFORMERS)}, got {config.model_type}")
        load = AutoModelForVideoClassification.from_pretrained
        public = load_strictly(load, "the classifier", source, dtype=torch.float32)
        about = describe_transformers(config, source)
        model = cls(config.model_type, labels=[config.id2label[index] for index in range(config.num_labels)], **about)
        network: Any = model.network
        network.head.load_state_dict(public.classifier.state_dict())
        public.classifier = nn.Identity()
        network.model.load_state_dict(public.state_dict())
        return model.eval()

    def forward(
        self,
        clip: Tensor,
        state: TemporalState | None = None,
        mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> RecognizerOutput | tuple[Any, ...]:
        """Classifies clips.

        Args:
            clip: `(b, 3, f, h, w)` in [-1, 1], or the next frames of a stream.
            state: Memory of a stream, for networks that run frame by frame; they give the scores of a whole clip.
            mask: bool `(b, f)`, false for padding at the end, for networks that take one.
            return_dict: Whether to return a `RecognizerOutput` instead of a tuple.

        Raises:
            ValueError: The clip has another shape than the network supports, or the network does not support streams
                or masks, or the state belongs to another network.
        """
        network = self.network
        if clip.ndim != 5 or clip.shape[1] != 3 or clip.shape[2] == 0:
            raise ValueError(f"clip must be (b, 3, f, h, w), got {tuple(clip.shape)}")
        if state is not None and not network.is_streamed:
            raise ValueError(f"{self.config.name} sees whole clips and cannot run over a stream")
        if mask is not None and not network.takes_mask:
            raise ValueError(f"{self.config.name} does not take a mask: pass clips without padding")
        self._check(clip.shape[2] if state is None else network.min_frames, tuple(clip.shape[3:]))
        history = None
        if state is not None:
            state.bind(self)
            history = state.history()
        output = network(clip, history, mask)
        if state is not None:
            assert history is not None
            state.commit(history)
        return output if return_dict else output.to_tuple()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities of the classes, of the same shape as the logits."""
        return logits.sigmoid() if self.config.multi_label else logits.softmax(-1)

    def seen(self, probabilities: Sequence[float], threshold: float = 0.5) -> dict[str, float]:
        """What a video shows: labels with their probabilities, the most probable first.

        Args:
            probabilities: Those of all classes.
            threshold: Least probability with `multi_label`. Otherwise the result is the most probable label.
        """
        ranked = sorted(zip(self.labels, probabilities, strict=True), key=lambda one: -one[1])
        return dict([one for one in ranked if one[1] >= threshold] if self.config.multi_label else ranked[:1])

    @property
    def labels(self) -> list[str]:
        """Names of the classes."""
        return list(self.config.labels or map(str, range(self.config.num_classes)))

    @property
    def state_identity(self) -> dict[str, str]:
        """Identity of this network for `TemporalState`."""
        return network_identity(self)

    def _check(self, num_frames: int, size: tuple[int, ...]) -> None:
        """Checks the length and size of clips."""
        name, network = self.config.name, self.network
        if network.fixed_length and num_frames != self.config.num_frames:
            raise ValueError(f"{name} takes clips of {self.config.num_frames} frames only, got {num_frames}")
        if num_frames < network.min_frames:
            raise ValueError(f"{name} needs at least {network.min_frames} frames, got {num_frames}")
        side = self.config.image_size
        if network.fixed_size and size != (side, side):
            raise ValueError(f"{name} takes frames of {side}x{side} only, got {size[0]}x{size[1]}")
        if min(size) < network.min_size:
            raise ValueError(f"{name} needs frames of at least {network.min_size} pixels per side, got {min(size)}")


def network_of(name: str, sizes: Mapping[str, Any]) -> Callable[..., ClipNetwork]:
    """The network of a name.

    Raises:
        ValueError: The name is unknown, or the network has no such size.
    """
    if name not in NETWORKS:
        near = get_close_matches(str(name), NETWORKS, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise ValueError(f"unknown recognizer {name!r}{hint}; available: {', '.join(NETWORKS)}")
    make = NETWORKS[name]
    taken = make.keywords if isinstance(make, partial) else {}
    parameters = inspect.signature(make.func if isinstance(make, partial) else make).parameters
    known = set(parameters) - {"num_classes", "num_frames", "image_size", "cnn", *taken}
    known |= {"channels", "grid"} if "cnn" in parameters else set()
    unknown = sorted(set(sizes) - set(known))
    if unknown:
        raise ValueError(f"{name} has no size {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return make


def create_recognizer(name: str, num_classes: int, num_frames: int, image_size: int, **sizes: Any) -> Recognizer:
    """Creates a video classifier with random weights.

    Args:
        name: Name of the network: `c3d`, `cnn_lstm`, `divided_attention` and so on; see `NETWORKS`.
        num_classes: Number of classes.
        num_frames: Frames per clip.
        image_size: Height and width of the frames.
        sizes: Further arguments of the network, such as `width` or `depth`, and those of `Recognizer`: `labels`,
            `frame_rate` and `multi_label`.

    Raises:
        ValueError: The name or a size is unknown, or a number is out of range.
    """
    about = {key: sizes.pop(key) for key in ("labels", "frame_rate", "multi_label") if key in sizes}
    return Recognizer(name, num_classes, num_frames, image_size, sizes, **about)


def load_recognizer(source: str) -> Recognizer:
    """Loads a video classifier that `Recognizer.save_pretrained` wrote, or one of transformers.

    Args:
        source: A folder or Hub id.

    Raises:
        ValueError: There is no such folder, it is neither, or the weights do not match the config.
    """
    folder, config = _config_of(source)
    if config is None:
        if not Path(folder).is_dir():
            raise ValueError(f"no recognizer {source!r}: no such folder, and the Hub has none or cannot be reached")
        inside = Path(source) / "recognizer"
        advice = f": did you mean {inside}?" if inside.is_dir() else ": it has no config.json"
        raise ValueError(f"{source} is not a recognizer{advice}")
    if "model_type" in config:
        return Recognizer.from_transformers(folder)
    if config.get("_class_name") != Recognizer.__name__:
        raise ValueError(f"{source} is not a recognizer, but a {config.get('_class_name')}")
    return Recognizer.from_pretrained(folder).eval()


def is_recognizer(source: str) -> bool:
    """Whether a folder or Hub id is what `Recognizer.save_pretrained` wrote.

    Raises:
        ValueError: There is no such folder.
    """
    config = _config_of(source)[1]
    return config is not None and config.get("_class_name") == Recognizer.__name__


def _config_of(source: str) -> tuple[str, dict[str, Any] | None]:
    """The folder or Hub id, and its `config.json`, if it has one."""
    folder = str(locate(source))
    path = cached_file(folder, "config.json", _raise_exceptions_for_missing_entries=False)
    return folder, None if path is None else read_json(Path(path))
