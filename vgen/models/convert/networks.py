"""Networks with the weights of others: of diffusers without loss, and of 2D networks inflated to 3D."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from einops import repeat
from torch import Tensor, nn

from vgen.temporal.conv import CausalConv3d

NetworkT = TypeVar("NetworkT", bound=nn.Module)


def with_same_weights(
    source: Any, target_class: type[NetworkT], dropped: tuple[str, ...] = (), shared: bool = False
) -> NetworkT:
    """Builds a `target_class` with the config, weights, dtype, device and training mode of `source`.

    Args:
        source: A diffusers model.
        target_class: A class with the same names of parameters and config entries for the layers that both have.
        dropped: Prefixes of parameters of the source that are left out.
        shared: Whether both networks share the memory of their weights.

    Raises:
        ValueError: Parameters are unexpected or missing. The error names them.
    """
    accepted = inspect.signature(target_class.__init__).parameters
    config = {
        name: list(value) if isinstance(value, tuple) else value  # as in a saved config
        for name, value in source.config.items()
        if name in accepted
    }
    target: Any = target_class(**config)
    weights = {
        name: value.detach() if shared else value.detach().clone()
        for name, value in source.state_dict().items()
        if not name.startswith(dropped)
    }
    missing, unexpected = target.load_state_dict(weights, strict=False, assign=True)
    if missing or unexpected:
        raise ValueError(
            f"the weights of {type(source).__name__} do not match {target_class.__name__}: "
            f"missing {sorted(missing)[:8]}, unexpected {sorted(unexpected)[:8]}"
        )
    return target.train(source.training)


def refuse_nonzero(network: nn.Module, part: str, reason: str) -> None:
    """Raises if weights whose names start with `part` are not zero.

    Raises:
        ValueError: A weight is not zero.
    """
    if any(value.any() for name, value in network.named_parameters() if name.startswith(part)):
        raise ValueError(f"{part} of {type(network).__name__} cannot be converted: {reason}")


_SKYREELS = "SkyReelsV2DiffusionForcingPipeline"
WAN_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", _SKYREELS)
"""Pipelines of diffusers whose folders load."""


def defaults_of(pipeline: str) -> dict[str, Any]:
    """The defaults of a pipeline class of diffusers that differ from those of `WanPipeline`."""
    if pipeline != _SKYREELS:
        return {}
    return {"height": 544, "width": 960, "num_frames": 97, "frame_rate": 24.0, "guidance_scale": 6.0}


def from_wan_index(index: dict[str, Any]) -> dict[str, Any]:
    """Converts the `model_index.json` of a Wan pipeline of diffusers to that of a `VideoGenPipeline`.

    The other files of the folder need no change.

    Raises:
        ValueError: As in `check_wan`.
    """
    check_wan(index)
    ours = {name: index[name] for name in ("_diffusers_version", "scheduler", "text_encoder", "tokenizer")}
    ours["vae"] = ["vgen.models.vae", "CausalVideoVAE"]
    ours["transformer"] = ["vgen.models.transformer", "SpacetimeTransformer"]
    if index.get("boundary_ratio") is not None:
        ours |= {"transformer_2": ours["transformer"], "boundary_ratio": index["boundary_ratio"]}
    more = ("image_encoder", "image_processor", "expand_timesteps")
    ours |= {name: index[name] for name in more if index.get(name) not in (None, False)}
    return {"_class_name": "VideoGenPipeline", **ours, **defaults_of(str(index.get("_class_name")))}


def check_wan(config: Mapping[str, Any]) -> None:
    """Checks that the config of a Wan pipeline has one Transformer, or two and the boundary between them.

    Raises:
        ValueError: One is missing. The error names it.
    """
    experts = [name for name in ("transformer", "transformer_2") if (config.get(name) or [None])[0] is not None]
    expected = ["transformer"] if config.get("boundary_ratio") is None else ["transformer", "transformer_2"]
    if experts != expected:
        raise ValueError(
            f"unsupported Wan pipeline: boundary_ratio={config.get('boundary_ratio')} needs {' and '.join(expected)}, "
            f"got {' and '.join(experts) or 'none'}"
        )


def inflate_kernel(weight: Tensor, length: int, causal: bool) -> Tensor:
    """Inflates a 2D kernel `(o, i, h, w)` to a 3D one `(o, i, length, h, w)` with the same output for still videos.

    The kernel is repeated over time and divided by the length. A causal kernel has only its last tap instead, so that
    the property also holds for the first frames, which zeros precede.

    Source: Quo vadis, action recognition? (I3D), arXiv 1705.07750.
    """
    if causal:
        return nn.functional.pad(weight[:, :, None], (0, 0, 0, 0, length - 1, 0))
    return repeat(weight, "o i h w -> o i t h w", t=length) / length


def load_inflated(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads the weights of a 2D network, in place, into a 3D network with the same parameter names.

    Kernels are inflated, causally for `CausalConv3d`. The shapes of other weights, such as those of norms, may differ
    in axes of length 1.

    Args:
        network: A CNN or VAE for clips `(b, c, f, h, w)`.
        weights: The state dict of its 2D counterpart.

    Raises:
        ValueError: Names or shapes do not match. The error names the parameters.
    """
    causal = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, CausalConv3d)}
    target = network.state_dict()
    inflated, mismatched = {}, sorted(set(target) ^ set(weights))
    for name in set(target) & set(weights):
        weight, shape = weights[name], target[name].shape
        if len(shape) == 5 and weight.ndim == 4:
            weight = inflate_kernel(weight, shape[2], name in causal)
        elif [size for size in weight.shape if size > 1] == [size for size in shape if size > 1]:
            weight = weight.reshape(shape)
        if weight.shape != shape:
            mismatched.append(name)
        inflated[name] = weight
    if mismatched:
        raise ValueError(
            f"the weights do not match {type(network).__name__}: {mismatched[:8]} ({len(mismatched)} in total)"
        )
    network.load_state_dict(inflated)
