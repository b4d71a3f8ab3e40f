"""Public weights to ours and back: only names of classes change, every number stays."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from torch import nn

NetworkT = TypeVar("NetworkT", bound=nn.Module)


def with_same_weights(source: Any, target_class: type[NetworkT], dropped: tuple[str, ...] = ()) -> NetworkT:
    """A `target_class` with the config and weights of `source`, in its dtype, on its device and in its mode.

    Args:
        source: A diffusers model.
        target_class: A class with the same parameter names and config names, so far as both have the part.
        dropped: Prefixes of parameters that the target does not have.

    Raises:
        ValueError: Parameters are left over or missing; they are named.
    """
    accepted = inspect.signature(target_class.__init__).parameters
    config = {name: value for name, value in source.config.items() if name in accepted}
    target: Any = target_class(**config)
    weights = {
        name: value.detach().clone() for name, value in source.state_dict().items() if not name.startswith(dropped)
    }
    missing, unexpected = target.load_state_dict(weights, strict=False, assign=True)
    if missing or unexpected:
        raise ValueError(
            f"{type(source).__name__} does not fit {target_class.__name__}: "
            f"missing {sorted(missing)[:8]}, unexpected {sorted(unexpected)[:8]}"
        )
    return target.train(source.training)


def refuse_nonzero(network: nn.Module, part: str, reason: str) -> None:
    """Raises if weights under the name `part` do anything.

    Raises:
        ValueError: Names the part.
    """
    if any(value.any() for name, value in network.named_parameters() if name.startswith(part)):
        raise ValueError(f"{part} of {type(network).__name__} cannot be converted: {reason}")


def from_wan_index(index: dict[str, Any]) -> dict[str, Any]:
    """The `model_index.json` of a diffusers `WanPipeline` as that of a `VideoGenPipeline`: the files stay as they are.

    Raises:
        ValueError: It is a layout beyond Wan 2.1 text to video; the part is named.
    """
    for part in ("transformer_2", "boundary_ratio", "expand_timesteps"):
        value = index.get(part)
        if value not in (None, False) and value != [None, None]:
            raise ValueError(f"{part}={value} in this WanPipeline is a layout of Wan 2.2, which is not served")
    ours = {name: index[name] for name in ("_diffusers_version", "scheduler", "text_encoder", "tokenizer")}
    ours["vae"] = ["vgen.models.vae", "CausalVideoVAE"]
    ours["transformer"] = ["vgen.models.transformer", "SpacetimeTransformer"]
    return {"_class_name": "VideoGenPipeline", **ours}
