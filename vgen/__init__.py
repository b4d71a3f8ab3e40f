"""Video diffusion that is causal in time: train, generate and stream video."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vgen.hub import extend_diffusers
from vgen.io.spinning import stop_spinning

if TYPE_CHECKING:
    from vgen.models.tiny_vae import TinyVideoVAE as TinyVideoVAE
    from vgen.models.transformer import SpacetimeTransformer as SpacetimeTransformer
    from vgen.models.unet import UNet3D as UNet3D
    from vgen.models.vae import CausalVideoVAE as CausalVideoVAE
    from vgen.pipeline import VideoGenPipeline as VideoGenPipeline
    from vgen.pipeline import load_rollout as load_rollout
    from vgen.recognition import Recognizer as Recognizer
    from vgen.recognition import create_recognizer as create_recognizer
    from vgen.sampling.options import InterpolationOptions as InterpolationOptions
    from vgen.sampling.options import RolloutOptions as RolloutOptions
    from vgen.sampling.rollout import Rollout as Rollout
    from vgen.temporal.state import TemporalState as TemporalState

__version__ = "0.1.0"

_HOMES = {
    "CausalVideoVAE": "vgen.models.vae",
    "InterpolationOptions": "vgen.sampling.options",
    "Recognizer": "vgen.recognition",
    "Rollout": "vgen.sampling.rollout",
    "RolloutOptions": "vgen.sampling.options",
    "SpacetimeTransformer": "vgen.models.transformer",
    "TemporalState": "vgen.temporal.state",
    "TinyVideoVAE": "vgen.models.tiny_vae",
    "UNet3D": "vgen.models.unet",
    "VideoGenPipeline": "vgen.pipeline",
    "create_recognizer": "vgen.recognition",
    "load_rollout": "vgen.pipeline",
}
__all__ = [*_HOMES, "__version__"]

if "torch" not in sys.modules:  # otherwise too late
    stop_spinning()
extend_diffusers(
    {name: _HOMES[name] for name in ("CausalVideoVAE", "SpacetimeTransformer", "UNet3D", "VideoGenPipeline")}
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vgen' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
