"""LoRA for both denoisers and their text encoders. A file in any public format is applied completely or not at all."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.utils import _get_model_file
from diffusers.utils.peft_utils import check_peft_version, scale_lora_layers
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor, nn

from vgen.io.records import read_json
from vgen.models.convert.names import original_name
from vgen.models.loading import PICKLED, shorten

PREFIXES = {
    "denoiser": (
        "", "transformer.", "unet.", "model.", "diffusion_model.", "model.diffusion_model.", "pipe.dit.", "dit.",
        "lora_unet_", "lora_transformer_", "lycoris_",
    ),
    "text_encoder": ("", "text_encoder.", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_"),
}  # fmt: skip
"""What precedes the name of a layer in LoRA files."""

_SUFFIXES = (
    (r"\.lora_A(\.[^.]+)?\.weight", "down"),
    (r"\.lora_B(\.[^.]+)?\.weight", "up"),
    (r"\.lora_B(\.[^.]+)?\.bias", "bias"),
    (r"(\.|_)lora(\.|_)down\.weight|\.lora_linear_layer\.down\.weight", "down"),
    (r"(\.|_)lora(\.|_)up\.weight|\.lora_linear_layer\.up\.weight", "up"),
    (r"\.alpha", "alpha"),
    (r"\.diff", "diff"),
    (r"\.diff_b", "diff_bias"),
)
Layer = tuple[str, str]
"""A component and the name of one of its layers."""


class LoraLoaderMixin(WanLoraLoaderMixin):
    """Loads, saves and fuses adapters as diffusers does, for a pipeline with a `transformer` or a `unet`."""

    _lora_loadable_modules = ["transformer", "transformer_2", "unet", "text_encoder"]
    text_encoder: Any

    @property
    def denoiser_name(self) -> str:
        """`transformer` or `unet`: the attribute with the denoiser. A pipeline has one of them at most."""
        return "unet" if hasattr(self, "unet") else "transformer"

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: Any, **kwargs: Any) -> Any:
        """Reads the weights of a LoRA as they are stored, from safetensors only.

        Args:
            pretrained_model_name_or_path_or_dict: Folder, file, Hub id, or a dictionary of weights.
            kwargs: Further arguments of diffusers' method, such as `weight_name`. With `return_lora_metadata=True`,
                `(weights, metadata)` is returned.

        Raises:
            ValueError: The weights are pickled.
        """
        source = pretrained_model_name_or_path_or_dict
        names = [kwargs.get("weight_name") or "", "" if isinstance(source, dict) else str(source)]
        if kwargs.get("use_safetensors", True) is not True or any(name.endswith(PICKLED) for name in names):
            raise ValueError("LoRA weights must be safetensors: other files are pickles, which can run code")
        options = ("weight_name", "local_files_only", "cache_dir", "force_download", "proxies", "token", "revision")
        weights, metadata = _fetch_state_dict(
            source,
            use_safetensors=True,
            allow_pickle=False,
            subfolder=kwargs.get("subfolder"),
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            **{name: kwargs.get(name) for name in options},
        )
        return (weights, metadata) if kwargs.get("return_lora_metadata") else weights

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        load_into_transformer_2: bool = False,
        **kwargs: Any,
    ) -> None:
        """Loads an adapter into the denoiser and the text encoder, whichever it has layers for.

        The formats of diffusers, peft, DiffSynth, kohya and musubi are supported, with the names of diffusers' layers
        or those of the original code of Wan, and differences of weights and biases (`.diff`, `.diff_b`).

        Args:
            pretrained_model_name_or_path_or_dict: Folder, file, Hub id, or a dictionary of weights.
            adapter_name: Name of the adapter; `None` numbers it.
            hotswap: Whether to replace the weights of the loaded adapter with this name.
            load_into_transformer_2: Whether the adapter is for the Transformer of low noise levels.
            kwargs: Further arguments of diffusers' method.

        Raises:
            ValueError: There is no such Transformer, the weights are pickled, NaN or infinite, or some of them do not
                fit the layers of this pipeline. The error lists their keys, and nothing is loaded.
        """
        check_peft_version(min_version="0.17.0")
        source, low_memory = pretrained_model_name_or_path_or_dict, kwargs.pop("low_cpu_mem_usage", True)
        weights, metadata = self.lora_state_dict(source, **kwargs | {"return_lora_metadata": True})
        peft = _peft_config(source, weights, kwargs)
        name = "transformer_2" if load_into_transformer_2 else self.denoiser_name
        if getattr(self, name, None) is None and load_into_transformer_2:
            raise ValueError("load_into_transformer_2 is for checkpoints with transformer_2, which this one has not")
        found = {one: getattr(self, one, None) for one in (name, "text_encoder")}
        networks: dict[str, Any] = {one: network for one, network in found.items() if network is not None}
        label = "the given weights" if isinstance(source, dict) else str(source)
        adapters = _fit(weights, metadata, peft, networks, label, one_scale=hotswap)
        if adapter_name is None:
            adapter_name = f"default_{max(len(getattr(one, 'peft_config', {})) for one in networks.values())}"
        for component in adapters:
            taken = adapter_name in getattr(networks[component], "peft_config", {})
            if taken != hotswap:
                state = "no" if hotswap else "already an"
                raise ValueError(f"{component} has {state} adapter {adapter_name!r}: choose another adapter_name")
        if hotswap and "text_encoder" in adapters:
            raise ValueError("hotswap is not supported for text encoders: unload the adapter and load the other one")
        if "text_encoder" in adapters:
            self._add_to_text_encoder(self.text_encoder, *adapters["text_encoder"], adapter_name, low_memory, self)
        if name in adapters:
            layers, config = adapters[name]
            if hotswap:  # peft compares this pattern with that of the loaded adapter, but does not use it
                config["alpha_pattern"] = networks[name].peft_config[adapter_name].alpha_pattern
            networks[name].load_lora_adapter(
                layers,
                prefix=None,
                hotswap=hotswap,
                adapter_name=adapter_name,
                metadata=config,
                _pipeline=self,
                low_cpu_mem_usage=low_memory,
            )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        transformer_lora_layers: dict[str, Tensor] | None = None,
        unet_lora_layers: dict[str, Tensor] | None = None,
        text_encoder_lora_layers: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves the layers of an adapter, from `peft.get_peft_model_state_dict`, for `load_lora_weights`.

        Args:
            save_directory: Folder to write to.
            transformer_lora_layers: Layers of the Transformer.
            unet_lora_layers: Layers of the U-Net.
            text_encoder_lora_layers: Layers of the text encoder.
            kwargs: Further arguments of diffusers' method, such as `weight_name`, and the configuration of each
                component's adapter, such as `transformer_lora_adapter_metadata`.

        Raises:
            ValueError: No layers are given.
        """
        given = {
            "transformer": transformer_lora_layers,
            "unet": unet_lora_layers,
            "text_encoder": text_encoder_lora_layers,
        }
        metadata = {name: kwargs.pop(f"{name}_lora_adapter_metadata", None) for name in given}
        layers = {name: one for name, one in given.items() if one}
        if not layers:
            raise ValueError(f"pass at least one of {', '.join(f'{name}_lora_layers' for name in given)}")
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers=layers,
            lora_metadata={name: metadata[name] for name in layers},
            **kwargs,
        )

    def fuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Merges the adapters into the weights of denoiser and text encoder, or of the given components."""
        super().fuse_lora(components or self._with_adapters, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Reverts `fuse_lora`."""
        super().unfuse_lora(components or self._with_adapters, **kwargs)

    @classmethod
    def load_lora_into_text_encoder(
        cls,
        state_dict: dict[str, Tensor],
        network_alphas: dict[str, float] | None,
        text_encoder: Any,
        prefix: str | None = None,
        lora_scale: float = 1.0,
        adapter_name: str | None = None,
        _pipeline: Any = None,
        low_cpu_mem_usage: bool = False,
        hotswap: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Loads the layers of a text encoder, with the arguments of diffusers' method.

        Args:
            state_dict: Weights of an adapter; only those of the text encoder are used.
            network_alphas: Alphas by key, in addition to those in `state_dict`.
            text_encoder: The text encoder.
            prefix: What the keys of its weights begin with; `text_encoder` by default.
            lora_scale: Multiplies the adapter.
            adapter_name: Name of the adapter; `None` numbers it.
            low_cpu_mem_usage: Whether not to initialize the layers before.
            hotswap: Not supported.
            metadata: Configuration of the adapter in diffusers' format.

        Raises:
            ValueError: There are no such weights, or some do not fit the text encoder. The error lists their keys.
        """
        if hotswap:
            raise ValueError("hotswap is not supported for text encoders: unload the adapter and load the other one")
        prefix = f"{prefix or 'text_encoder'}."
        alphas = {key: torch.tensor(float(alpha)) for key, alpha in (network_alphas or {}).items()}
        weights = {
            key.removeprefix(prefix): one for key, one in (state_dict | alphas).items() if key.startswith(prefix)
        }
        networks = {"text_encoder": text_encoder}
        adapter = _fit(weights, metadata, None, networks, "the given weights", one_scale=False)["text_encoder"]
        name = adapter_name or f"default_{len(getattr(text_encoder, 'peft_config', {}))}"
        cls._add_to_text_encoder(text_encoder, *adapter, name, low_cpu_mem_usage, _pipeline)
        if lora_scale != 1:
            scale_lora_layers(text_encoder, lora_scale)

    @classmethod
    def _add_to_text_encoder(
        cls,
        network: Any,
        layers: dict[str, Tensor],
        config: dict[str, Any],
        adapter_name: str,
        low_memory: bool,
        pipeline: Any,
    ) -> None:
        """Adds an adapter to a text encoder, as diffusers' networks do on their own."""
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

        options = {"low_cpu_mem_usage": low_memory}
        by_model, by_layer, by_group = cls._optionally_disable_offloading(pipeline)
        inject_adapter_in_model(LoraConfig(**config), network, adapter_name, state_dict=layers, **options)
        set_peft_model_state_dict(network, layers, adapter_name, **options)
        network._hf_peft_config_loaded = True
        network.to(device=network.device, dtype=network.dtype)
        if by_model:
            pipeline.enable_model_cpu_offload()
        elif by_layer:
            pipeline.enable_sequential_cpu_offload()
        elif by_group:
            _maybe_remove_and_reapply_group_offloading(network)

    @property
    def _with_adapters(self) -> list[str]:
        return [name for name in self._lora_loadable_modules if getattr(self, name, None) is not None]


def _on_networks(method: Callable) -> Callable:
    """A LoRA method that works on compiled networks, which diffusers does not recognize."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = self._lora_loadable_modules
        compiled = {name: vars(self)[name] for name in names if is_compiled_module(vars(self).get(name))}
        vars(self).update({name: network._orig_mod for name, network in compiled.items()})
        try:
            return method(self, *args, **kwargs)
        finally:
            vars(self).update(compiled)

    return call


for _name in (
    "load_lora_weights", "unload_lora_weights", "fuse_lora", "unfuse_lora", "set_adapters", "delete_adapters",
    "enable_lora", "disable_lora", "get_active_adapters", "get_list_adapters", "set_lora_device",
    "enable_lora_hotswap",
):  # fmt: skip
    setattr(LoraLoaderMixin, _name, _on_networks(getattr(LoraLoaderMixin, _name)))


def _fit(
    weights: dict[str, Tensor], metadata: Any, peft: Any, networks: dict[str, Any], source: str, one_scale: bool
) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """Converts the weights of a LoRA to peft's format.

    Args:
        weights: The weights as they are stored.
        metadata: Configurations of the adapters in diffusers' format, `{"transformer.r": 4, ...}`, or `None`.
        peft: Configuration of the adapter in peft's format, or `None`.
        networks: Networks by name of the component.
        source: Where the weights come from, for errors.
        one_scale: Whether to multiply the weights by their scales: peft's hotswap has one scale for all layers.

    Returns:
        For each component with layers in the file, weights by key and the arguments of a `LoraConfig`.

    Raises:
        ValueError: Some weights do not fit. The error lists them.
    """
    layers_of = {name: _layer_names(name, network) for name, network in networks.items()}
    parts: dict[Layer, dict[str, Tensor]] = defaultdict(dict)
    keys: dict[Layer, list[str]] = defaultdict(list)
    unused = []
    for key, weight in weights.items():
        if not weight.float().isfinite().all():
            raise ValueError(f"{key} of {source} is NaN or infinite: nothing was loaded")
        name, part = _split(key)
        if part.startswith("diff") and not weight.any():
            continue  # extracted files have differences of all layers, most of them zero
        layer = next(filter(None, (_find(name, one, names) for one, names in layers_of.items())), None)
        if layer is None or part in parts[layer] or not part:
            unused.append(key)
        else:
            parts[layer][part] = weight
            keys[layer].append(key)
    adapters: dict[str, dict[str, tuple[Tensor, Tensor, Tensor | None, float]]] = defaultdict(dict)
    for (component, name), found in parts.items():
        config = peft or _config_of(metadata, component)
        adapter = _adapter(networks[component].get_submodule(name), found, config, name) if found else None
        if adapter is None:
            unused += keys[component, name]
        else:
            adapters[component][name] = adapter
    if unused or not adapters:
        kind = "U-Net" if "unet" in networks else "Transformer"
        raise ValueError(
            f"expected LoRA weights for a {kind} or its text encoder, but {len(unused)} of {len(weights)} keys of "
            f"{source} do not fit their layers, so nothing was loaded: {shorten(sorted(unused))}"
        )
    return {component: _to_peft(found, one_scale) for component, found in adapters.items()}


def merge_lora(weights: dict[str, Tensor], lora: str | Path | dict[str, Tensor], network: nn.Module) -> None:
    """Adds a LoRA to the weights of a Transformer, in place.

    Args:
        weights: Weights by name; those with an adapter are replaced.
        lora: The LoRA: a safetensors file, or weights, in any format of `load_lora_weights`.
        network: The Transformer, for the names and shapes of its layers; it may be on the meta device.

    Raises:
        ValueError: Some of its weights do not fit. The error lists them.
    """
    found, metadata = LoraLoaderMixin.lora_state_dict(lora, return_lora_metadata=True)
    source = "the given LoRA" if isinstance(lora, dict) else str(lora)
    layers, config = _fit(found, metadata, None, {"transformer": network}, source, one_scale=True)["transformer"]
    for name in config["target_modules"]:
        weight = weights[f"{name}.weight"]
        down, up = (layers[f"{name}.lora_{part}.weight"].float().flatten(1) for part in "AB")
        weights[f"{name}.weight"] = (weight.float() + (up @ down).view_as(weight)).to(weight.dtype)
        if config["lora_bias"]:
            bias = weights[f"{name}.bias"]
            weights[f"{name}.bias"] = (bias.float() + layers[f"{name}.lora_B.bias"].float()).to(bias.dtype)


def lora_to_original(file: str | Path) -> dict[str, Tensor]:
    """The weights of a LoRA for a Transformer with the original names of Wan, as ComfyUI reads them.

    Args:
        file: A safetensors file with diffusers' names, as `train_vdm.py` and `save_lora_weights` write it.

    Raises:
        ValueError: It is malformed or has other names. The error lists them.
    """
    weights, metadata = LoraLoaderMixin.lora_state_dict(file, return_lora_metadata=True)
    config = _config_of(metadata, "transformer")
    found, unknown = {}, []
    for key, weight in weights.items():
        key = key.removeprefix("transformer.")
        layer, part = _split(key)
        original = original_name(layer)
        if (original == layer and layer != "patch_embedding") or not part:
            unknown.append(key)
        if part == "up" and config is not None:  # in the matrix, because some programs read no alpha of some layers
            alpha, rank = _match(config.alpha_pattern, layer, config.lora_alpha), weight.shape[1]
            weight = (weight.float() * alpha / (math.sqrt(rank) if config.use_rslora else rank)).to(weight.dtype)
        found[f"diffusion_model.{original}{key.removeprefix(layer)}"] = weight
    if unknown:
        raise ValueError(
            f"{file} must be a LoRA for a Transformer with diffusers' names, got {shorten(sorted(unknown))}"
        )
    return found


def _split(key: str) -> tuple[str, str]:
    """Splits the key of a weight into the name of the layer and the part of the adapter; "" if it is none."""
    key = key.replace("base_model.model.", "").replace(".processor.", ".")
    for suffix, part in _SUFFIXES:
        match = re.fullmatch(rf"(.+?)({suffix})", key)
        if match:
            return match[1], part
    return key, ""


def _layer_names(component: str, network: Any) -> dict[str, str]:
    """Names of the layers of a network, by the names that they have in LoRA files."""
    names: dict[str, str] = {}
    for name, module in network.named_modules():
        if ".lora_" in name or name.endswith("base_layer") or getattr(module, "weight", None) is None:
            continue
        known = {name}
        if component.startswith("transformer"):
            known.add(original_name(name))
        elif component == "unet":
            known.add(re.sub(r"\.to_out\.0$", ".to_out", name))
        else:
            known |= {f"text_model.{name}", name.removeprefix("text_model.")}
            attention = {one for one in known if re.search(r"\.(q|k|v|out)_proj$", one)}
            known |= {re.sub(r"\.(q|k|v|out)_proj$", r".to_\1", one) for one in attention}
        names |= {alias: name for one in known for alias in (one, one.replace(".", "_"))}
    return names


def _find(name: str, component: str, names: dict[str, str]) -> Layer | None:
    prefixes = PREFIXES["text_encoder" if component == "text_encoder" else "denoiser"]
    for prefix in prefixes:
        if name.startswith(prefix) and name.removeprefix(prefix) in names:
            return component, names[name.removeprefix(prefix)]
    return None


def _adapter(
    module: Any, parts: dict[str, Tensor], config: Any, name: str
) -> tuple[Tensor, Tensor, Tensor | None, float] | None:
    """The matrices A and B, the bias, and the scale of a layer's adapter; `None` if they do not fit the layer."""
    module = getattr(module, "base_layer", module)
    if isinstance(module, nn.Linear):
        inputs, outputs, kernel = module.in_features, module.out_features, ()
    elif type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and module.groups == 1:  # subclasses pad on their own
        inputs, outputs, kernel = module.in_channels, module.out_channels, tuple(module.kernel_size)
    else:
        return None
    size, ones = inputs * math.prod(kernel), (1,) * len(kernel)
    down, up, diff = parts.get("down"), parts.get("up"), parts.get("diff")
    scale = 1.0
    if (down is None) != (up is None) or (down is not None and diff is not None):
        return None
    if down is None or up is None:
        if "alpha" in parts or "bias" in parts:
            return None
        if diff is None:  # a difference of the bias only
            down, up = torch.zeros(1, size), torch.zeros(outputs, 1)
        elif diff.shape[0] != outputs or diff.numel() != outputs * size:
            return None
        elif outputs <= size:
            down, up = diff.flatten(1), torch.eye(outputs, dtype=diff.dtype)
        else:
            down, up = torch.eye(size, dtype=diff.dtype), diff.flatten(1)
    else:
        rank = down.shape[0]
        alpha = parts["alpha"].item() if "alpha" in parts else rank
        scale = alpha / rank
        if config is not None and "alpha" not in parts:
            alpha = _match(config.alpha_pattern, name, config.lora_alpha)
            scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    rank = down.shape[0]
    if down.numel() != rank * size or up.numel() != outputs * rank or up.shape[0] != outputs:
        return None
    bias = parts.get("bias")
    if "diff_bias" in parts:
        bias = parts["diff_bias"].float() / scale if bias is None and scale else None
    if ("bias" in parts or "diff_bias" in parts) and (bias is None or bias.shape != (outputs,)):
        return None
    return down.reshape(rank, inputs, *kernel), up.reshape(outputs, rank, *ones), bias, scale


def _to_peft(
    adapters: dict[str, tuple[Tensor, Tensor, Tensor | None, float]], one_scale: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights by key, and the arguments of a `LoraConfig`, of the adapters of a component's layers."""
    has_bias = any(bias is not None for _, _, bias, _ in adapters.values())
    layers: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for name, (down, up, bias, scale) in adapters.items():
        if one_scale:
            up, bias, scale = up.float() * scale, None if bias is None else bias.float() * scale, 1.0
        layers |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        if has_bias:
            layers[f"{name}.lora_B.bias"] = up.new_zeros(len(up)) if bias is None else bias.to(up.dtype)
        ranks[f"^{re.escape(name)}"] = len(down)
        alphas[f"^{re.escape(name)}"] = scale * len(down)
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return layers, {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": list(adapters),
        "lora_bias": has_bias,
    }


def _match(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the name of a layer, as in peft."""
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name)), default)


def _config_of(metadata: dict[str, Any] | None, component: str) -> Any:
    """The `LoraConfig` of a component in diffusers' metadata; `None` if there is none."""
    from peft import LoraConfig

    prefix = f"{component}."
    options = {key.removeprefix(prefix): value for key, value in (metadata or {}).items() if key.startswith(prefix)}
    return LoraConfig(**options) if options else None


def _peft_config(source: Any, weights: dict[str, Tensor], options: dict[str, Any]) -> Any:
    """The `LoraConfig` that peft saves as `adapter_config.json` next to the weights; `None` if there is none."""
    if isinstance(source, dict) or not all(key.startswith("base_model.model.") for key in weights):
        return None
    from peft import LoraConfig

    folder = str(Path(source).parent if Path(source).is_file() else source)
    hub = ("subfolder", "local_files_only", "cache_dir", "force_download", "proxies", "token", "revision")
    try:
        path = _get_model_file(folder, weights_name="adapter_config.json", **{name: options.get(name) for name in hub})
    except OSError:
        return None
    settings = read_json(Path(path))
    names = {"r", "lora_alpha", "alpha_pattern", "use_rslora"}
    return LoraConfig(**{name: value for name, value in settings.items() if name in names})
