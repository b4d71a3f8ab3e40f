"""Adapters for the video classifiers of transformers and torchvision, with random or public weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForVideoClassification

from vgen.models.processor import read_processor
from vgen.recognition.network import ClipNetwork, RecognizerOutput
from vgen.temporal.state import History

TRANSFORMERS = ("timesformer", "vivit", "videomae", "vjepa2")
"""Model types of transformers."""
_NAMES = {"vjepa2": {"num_frames": "frames_per_clip", "image_size": "crop_size"}}
_INPUTS = {"vjepa2": "pixel_values_videos"}


_NOT_SIZES = (
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "model_type",
    "num_labels",
    "problem_type",
    "transformers_version",
)


def describe_transformers(config: Any, source: str) -> dict[str, Any]:
    """Arguments of a `Recognizer` for a model of transformers.

    Args:
        config: Its config.
        source: Its folder or Hub id, whose processor has the mean and deviation of pixels.
    """
    names = _NAMES.get(config.model_type, {})
    shape = {name: names.get(name, name) for name in ("num_frames", "image_size")}
    ignored = (*_NOT_SIZES, *shape.values())
    sizes: dict[str, Any] = {"config": {k: v for k, v in config.to_diff_dict().items() if k not in ignored}}
    processor = read_processor(source)
    mean, std = (processor["image_mean"], processor["image_std"]) if processor["do_normalize"] else (0.0, 1.0)
    scale = 255 * processor["rescale_factor"]  # of pixels in [0, 1], which are then moved by the offset
    sizes["mean"] = [(float(value) + processor["offset"]) / scale for value in torch.tensor(mean).expand(3)]
    sizes["std"] = [float(value) / scale for value in torch.tensor(std).expand(3)]
    about = {name: getattr(config, theirs) for name, theirs in shape.items()}
    return about | {"num_classes": config.num_labels, "sizes": sizes}


class Normalize(nn.Module):
    """Converts pixels from [-1, 1] to the mean and deviation that a public model was trained with.

    Args:
        mean: Means of red, green and blue in [0, 1].
        std: Standard deviations in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(list(values)).view(3, 1, 1, 1), persistent=False)

    def forward(self, clip: Tensor) -> Tensor:
        """Maps `(b, 3, f, h, w)` in [-1, 1] to the same shape."""
        return ((clip + 1) / 2 - self.mean.to(clip)) / self.std.to(clip)


class TransformersNetwork(ClipNetwork):
    """A video classifier of transformers.

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip, the only length.
        image_size: Height and width of the frames, the only size.
        model_type: `timesformer`, `vivit`, `videomae` or `vjepa2`.
        config: Further settings of the model's config class in transformers.
        mean: Means of red, green and blue in [0, 1] that the weights expect.
        std: Standard deviations in [0, 1] that the weights expect.

    Source: Is space-time attention all you need for video understanding? (TimeSformer), arXiv 2102.05095; ViViT, arXiv
        2103.15691; VideoMAE, arXiv 2203.12602; V-JEPA 2, arXiv 2506.09985.
    """

    fixed_length = fixed_size = True

    def __init__(
        self,
        num_classes: int,
        num_frames: int,
        image_size: int,
        model_type: str = "timesformer",
        config: Mapping[str, Any] | None = None,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        names = _NAMES.get(model_type, {})
        shape = {"num_frames": num_frames, "image_size": image_size}
        settings = dict(config or {}) | {names.get(name, name): size for name, size in shape.items()}
        settings["num_labels"] = num_classes
        self.input_name = _INPUTS.get(model_type, "pixel_values")
        self.normalize = Normalize(mean, std)
        self.model = AutoModelForVideoClassification.from_config(AutoConfig.for_model(model_type, **settings))
        self.head = self.model.classifier
        self.model.classifier = nn.Identity()

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        features = self.model(**{self.input_name: self.normalize(clip).transpose(1, 2)}).logits
        return RecognizerOutput(logits=self.head(features), features=features)


class TorchvisionNetwork(ClipNetwork):
    """A video classifier of torchvision, which must be installed in a build that matches torch.

    Args:
        num_classes: Number of classes.
        num_frames: Frames per clip.
        image_size: Height and width of the frames.
        model: Name in `torchvision.models.video`, such as `r3d_18`, `mc3_18`, `mvit_v2_s` or `swin3d_t`.
        weights: Name of public weights, such as `DEFAULT`, whose classes must be as many; `None` for random ones.
        mean: Means of red, green and blue in [0, 1] that the weights expect.
        std: Standard deviations in [0, 1] that the weights expect.

    Raises:
        ImportError: torchvision cannot be imported.
        ValueError: torchvision has no such video model.
    """

    def __init__(
        self,
        num_classes: int,
        num_frames: int,
        image_size: int,
        model: str = "r3d_18",
        weights: str | None = None,
        mean: Sequence[float] = (0.43216, 0.394666, 0.37645),
        std: Sequence[float] = (0.22803, 0.22145, 0.216989),
    ) -> None:
        super().__init__()
        try:
            from torchvision.models import get_model, list_models, video
        except (ImportError, RuntimeError) as error:  # a build for another torch breaks on import
            raise ImportError(f"torchvision models need a torchvision that matches this torch ({error})") from error
        if model not in (known := list_models(module=video)):
            raise ValueError(f"torchvision has no video model {model!r}; it has {', '.join(known)}")
        self.normalize = Normalize(mean, std)
        self.model = get_model(model, weights=weights, num_classes=num_classes)
        path, self.head = [one for one in self.model.named_modules() if isinstance(one[1], nn.Linear | nn.Conv3d)][-1]
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, nn.Identity())

    def forward(self, clip: Tensor, history: History | None = None, mask: Tensor | None = None) -> RecognizerOutput:
        """See `ClipNetwork.forward`."""
        features = self.model(self.normalize(clip))
        if isinstance(self.head, nn.Conv3d):  # it came before the mean, which does not matter
            features = features.view(*features.shape, 1, 1, 1)
        logits = self.head(features).flatten(1)
        return RecognizerOutput(logits=logits, features=features.flatten(1))
