"""Public weights to ours and back: every number stays; those of 2D networks are inflated over time."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from einops import repeat
from torch import Tensor, nn

from vgen.temporal.conv import CausalConv3d

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


def inflate_kernel(weight: Tensor, length: int, causal: bool) -> Tensor:
    """A 2D kernel `(o, i, h, w)` as a 3D one `(o, i, length, h, w)` that answers a still video as the 2D one an image.

    It is repeated over time and divided by the length; a causal one is all in its last tap, so that this holds for the
    first frames too, which zeros precede.

    Source: Quo vadis, action recognition? (I3D), arXiv 1705.07750.
    """
    if causal:
        return nn.functional.pad(weight[:, :, None], (0, 0, 0, 0, length - 1, 0))
    return repeat(weight, "o i h w -> o i t h w", t=length) / length


def load_inflated(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads a 2D network's weights into a 3D one with the same parameter names, in place.

    Kernels are inflated, those of `CausalConv3d` causally; all else, such as norms, may differ by axes of length 1.

    Args:
        network: A CNN or VAE over `(b, c, f, h, w)`.
        weights: The state dict of its 2D counterpart.

    Raises:
        ValueError: Names or shapes do not match; they are named.
    """
    causal = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, CausalConv3d)}
    target = network.state_dict()
    inflated, misfits = {}, sorted(set(target) ^ set(weights))
    for name in set(target) & set(weights):
        weight, shape = weights[name], target[name].shape
        if len(shape) == 5 and weight.ndim == 4:
            weight = inflate_kernel(weight, shape[2], name in causal)
        elif [size for size in weight.shape if size > 1] == [size for size in shape if size > 1]:
            weight = weight.reshape(shape)
        if weight.shape != shape:
            misfits.append(name)
        inflated[name] = weight
    if misfits:
        raise ValueError(f"these weights do not fit {type(network).__name__}: {misfits[:8]} ({len(misfits)} in all)")
    network.load_state_dict(inflated)
