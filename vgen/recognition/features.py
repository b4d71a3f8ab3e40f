"""What a recognizer of one's own domain says about clips: labels, and features for distances between distributions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgen.io.fingerprint import weights_digest
from vgen.recognition.recognizer import load_recognizer


class RecognizerFeatures(nn.Module):
    """What a recognizer classifies: the input of its last layer.

    Frames are resized to the recognizer's size, bilinearly with antialiasing.

    Args:
        source: Folder or Hub id of the recognizer.

    Raises:
        ValueError: It is not a recognizer.
    """

    resize = "bilinear, antialiased"
    values = "from -1 to 1"

    def __init__(self, source: str) -> None:
        super().__init__()
        self.name = source
        self.network = load_recognizer(source)
        config = self.network.config
        self.num_frames: int | None = config.num_frames if self.network.network.fixed_length else None
        """The only number of frames that it takes; `None` if it takes others."""

    @property
    def digest(self) -> str:
        """Hash of the weights."""
        return weights_digest(self.network)

    def forward(self, clip: Tensor) -> Tensor:
        """Computes features `(b, d)` of clips `(b, 3, f, h, w)` in [-1, 1].

        Raises:
            ValueError: The recognizer does not take clips of this length.
        """
        return self._classify(clip).features

    def labels_of(self, clip: Tensor) -> list[set[str]]:
        """What it sees in clips; see `Recognizer.seen`.

        Raises:
            ValueError: As in `forward`.
        """
        probabilities = self.network.probabilities(self._classify(clip).logits)
        return [set(self.network.seen(row)) for row in probabilities.tolist()]

    @torch.no_grad()
    def _classify(self, clip: Tensor) -> Any:
        size = (self.network.config.image_size,) * 2
        if clip.shape[-2:] != size:
            frames = clip.transpose(1, 2).flatten(0, 1)
            frames = F.interpolate(frames, size=size, mode="bilinear", antialias=True, align_corners=False)
            clip = frames.unflatten(0, (len(clip), -1)).transpose(1, 2)
        return self.network(clip.float())
