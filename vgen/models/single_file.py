"""Loads networks from single files: safetensors or GGUF, with the names of the original Wan or of diffusers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, GGUFQuantizationConfig
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES, FromOriginalModelMixin
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from torch import Tensor

from vgen.io.errors import loading, one_line
from vgen.io.records import read_json
from vgen.models.convert.files import Weights, unwrap
from vgen.models.convert.names import Network, from_original
from vgen.models.loading import PICKLED, check_finite, shorten

_HEAD_DIM = 128  # of all published Transformers of this family; the weights do not tell
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_INDEX = ".safetensors.index.json"
_WAN_VAE = inspect.signature(AutoencoderKLWan.__init__).parameters
# fmt: off
_LATENT_STATISTICS: dict[tuple[int, bool], tuple[Any, Any]] = {
    (16, False): (_WAN_VAE["latents_mean"].default, _WAN_VAE["latents_std"].default),
    (48, True): (
        [
            -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
            0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
            -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
            -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
        ],
        [
            0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
            0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
            0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
            0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
        ],
    ),
}
# fmt: on
"""Mean and standard deviation of each latent channel of the public VAEs of Wan 2.1 and 2.2, which are not among their
weights, by number of channels and `is_residual`.

Sources: diffusers' `AutoencoderKLWan`; Wan2.2, `wan/modules/vae2_2.py`.
"""


def load_single_file(network_class: Any, source: Any, weights: Weights | None = None, **kwargs: Any) -> Any:
    """Loads a `CausalVideoVAE` or a `SpacetimeTransformer` from one file; see their `from_single_file`.

    Args:
        network_class: The class.
        source: The file, or its weights.
        weights: The weights, if the file was read already.
        kwargs: Arguments of `from_single_file`.
    """
    if isinstance(source, dict):
        source, weights = "the given weights", source
    name = f"{network_class.__name__} in {source}"
    weights = with_our_names(network_class, read_single_file(source) if weights is None else weights, name)
    config, subfolder = kwargs.pop("config", None), kwargs.pop("subfolder", None)
    if config is None:
        config = config_of(network_class, weights, name)
    elif not isinstance(config, dict):
        config = network_class.load_config(config, subfolder=subfolder)
    with init_empty_weights():
        network = network_class.from_config(config)
    check_weights(weights, network.state_dict(), name)
    dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", None))
    if any(hasattr(value, "quant_type") for value in weights.values()):
        kwargs.setdefault("quantization_config", GGUFQuantizationConfig(compute_dtype=dtype or torch.float32))
    if kwargs.get("quantization_config") is not None:
        load = FromOriginalModelMixin.from_single_file.__func__  # type: ignore[attr-defined]
        network = load(network_class, weights, original_config=config, dtype=dtype, **kwargs)
    else:
        weights = cast(weights, dtype or _stored(weights), network._keep_in_fp32_modules or ())
        network.load_state_dict(weights, assign=True)
    check_finite(network, name)
    return network.eval().to(kwargs.get("device"))


def read_single_file(source: str | Path) -> Weights:
    """Reads the weights of a `.safetensors` or `.gguf` file, of those in an index, or of a link to the Hub.

    Raises:
        ValueError: The file is pickled, malformed, or does not exist.
    """
    if str(source).endswith(PICKLED):
        raise ValueError(f"{source} is pickled, and pickles can run code: `vgen convert` makes safe files of it")
    if "://" not in str(source) and not Path(source).is_file():
        raise ValueError(f"there is no file {source}")
    if str(source).endswith(_INDEX):
        with loading(source):
            files = sorted(set(read_json(Path(source))["weight_map"].values()))
        parts = [read_single_file(Path(source).with_name(name)) for name in files]
        return {name: weight for part in parts for name, weight in part.items()}
    try:
        with loading(source):
            return dict(load_single_file_checkpoint(str(source)))
    except OSError as error:
        raise ValueError(f"{source} is malformed or not available: {one_line(str(error))}") from error


def with_our_names(network_class: Any, weights: Weights, name: str) -> Weights:
    """Weights with the names of diffusers, which are ours: without wrappers, and converted from the original names.

    Raises:
        ValueError: They cannot be converted.
    """
    return from_original(_NETWORKS[network_class.__name__], unwrap(weights, name))


def config_of(network_class: Any, weights: Weights, name: str, head_dim: int = _HEAD_DIM) -> dict[str, Any]:
    """The sizes of a network, from the shapes of its weights.

    Args:
        network_class: The class.
        weights: The weights, with our names.
        name: What they are, for errors.
        head_dim: Channels of a head of a Transformer, which no weight shows.

    Raises:
        ValueError: A weight that shows a size is missing, or the sizes are none of this family.
    """
    return SINGLE_FILE_LOADABLE_CLASSES[network_class.__name__]["config_of_weights"](weights, name, head_dim)


def _stored(weights: Weights) -> torch.dtype:
    dtypes = {value.dtype for value in weights.values()}
    return torch.bfloat16 if dtypes & {*_FLOAT8} else max(dtypes, key=lambda dtype: dtype.itemsize)


def cast(weights: Weights, dtype: torch.dtype, kept: Collection[str]) -> Weights:
    """Weights in a data type, except those of modules that stay in float32, as `from_pretrained` keeps them."""
    half = dtype in (torch.float16, torch.bfloat16)
    return {
        key: value.to(torch.float32 if half and any(name in key.split(".") for name in kept) else dtype)
        for key, value in weights.items()
    }


def check_weights(weights: Weights, expected: Weights, name: str) -> None:
    """Checks that weights are those of a network.

    Args:
        weights: The weights.
        expected: The network's own, for names and shapes.
        name: What they are, for the error.

    Raises:
        ValueError: Some are missing, unexpected, or of another shape. The error names them.
    """
    problems = {
        "missing": sorted(expected.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - expected.keys()),
        "of another shape": [
            f"{key} {_shape(weights[key])} instead of {tuple(expected[key].shape)}"
            for key in sorted(expected.keys() & weights.keys())
            if _shape(weights[key]) != tuple(expected[key].shape)
        ],
    }
    details = "; ".join(f"{kind}: {shorten(keys)}" for kind, keys in problems.items() if keys)
    if any(key.endswith(("scale_weight", "weight_scale", "scaled_fp8")) for key in problems["unexpected"]):
        details += " (float8 weights with scales are not supported)"
    if details:
        raise ValueError(f"the weights of {name} do not match the network: {details}")


def _shape(weight: Tensor) -> tuple[int, ...]:
    return tuple(getattr(weight, "quant_shape", weight.shape))  # GGUF stores blocks of bytes


def _required_shape(weights: Weights, name: str, key: str) -> tuple[int, ...]:
    if key not in weights:
        raise ValueError(f"the weights of {name} do not match the network: missing: {key}")
    return _shape(weights[key])


def _transformer_config(weights: Weights, name: str, head_dim: int) -> dict[str, Any]:
    """The config of a Transformer, from the shapes of its weights."""
    shape = partial(_required_shape, weights, name)
    inner, in_channels, *patch_size = shape("patch_embedding.weight")
    if inner % head_dim:
        raise ValueError(
            f"{name} has {inner} channels, no multiple of {head_dim}: pass config, a folder or a dictionary"
        )
    return {
        "patch_size": patch_size,
        "num_attention_heads": inner // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "out_channels": shape("proj_out.weight")[0] // math.prod(patch_size),
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight")[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight")[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight")[0],
        "num_layers": 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks.")),
        "cross_attn_norm": "blocks.0.norm2.weight" in weights,
        **({"inject_sample_info": True} if "fps_embedding.weight" in weights else {}),
        **_image_config(weights),
    }


def _image_config(weights: Weights) -> dict[str, int]:
    """The sizes of what a Transformer does with image tokens."""
    places = {
        "image_dim": ("condition_embedder.image_embedder.norm1.weight", 0),
        "added_kv_proj_dim": ("blocks.0.attn2.add_k_proj.weight", 1),
        "pos_embed_seq_len": ("condition_embedder.image_embedder.pos_embed", 1),
    }
    return {name: _shape(weights[key])[axis] for name, (key, axis) in places.items() if key in weights}


def _vae_config(weights: Weights, name: str, _: int) -> dict[str, Any]:
    """The config of a VAE, from the shapes of its weights; what they do not tell is as in Wan 2.1 or 2.2."""
    shape = partial(_required_shape, weights, name)
    base_dim, in_channels = shape("encoder.conv_in.weight")[:2]
    z_dim = shape("post_quant_conv.weight")[0]
    is_residual = "encoder.down_blocks.0.resnets.0.conv1.weight" in weights
    mean, std = _LATENT_STATISTICS.get((z_dim, is_residual), (None, None))
    return {
        "base_dim": base_dim,
        "decoder_base_dim": shape("decoder.conv_out.weight")[1],
        "z_dim": z_dim,
        "in_channels": in_channels,
        "out_channels": shape("decoder.conv_out.weight")[0],
        "patch_size": None if in_channels == 3 else math.isqrt(in_channels // 3),
        "is_residual": is_residual,
        "latents_mean": mean,
        "latents_std": std,
    }


def _given(original_config: dict[str, Any], checkpoint: Any) -> dict[str, Any]:
    return original_config


def _unchanged(checkpoint: Weights, **kwargs: Any) -> Weights:
    return checkpoint


_NETWORKS: dict[str, Network] = {"SpacetimeTransformer": "transformer", "CausalVideoVAE": "vae"}
# diffusers looks up its converters by the name of the class; it gets weights that have our names already
SINGLE_FILE_LOADABLE_CLASSES |= {
    name: {"checkpoint_mapping_fn": _unchanged, "config_mapping_fn": _given, "config_of_weights": sizes}
    for name, sizes in (("SpacetimeTransformer", _transformer_config), ("CausalVideoVAE", _vae_config))
}
