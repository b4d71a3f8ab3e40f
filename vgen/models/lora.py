"""LoRA for both denoisers: Wan's format for the Transformer, Stable Diffusion's format for the U-Net."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.loaders import StableDiffusionLoraLoaderMixin, WanLoraLoaderMixin
from torch import Tensor

from vgen.models.loading import PICKLED


class LoraLoaderMixin(WanLoraLoaderMixin):
    """Loads, saves and fuses adapters as diffusers does, for a pipeline with a `transformer` or a `unet`."""

    _lora_loadable_modules = ["transformer", "unet", "text_encoder"]
    unet: Any

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: Any, **kwargs: Any) -> Any:
        """Reads LoRA weights for `load_lora_weights`, from safetensors only.

        If `unet_config`, the config of a U-Net, is given, it reads Stable Diffusion's formats and returns
        `(weights, alphas, metadata)`.

        Raises:
            ValueError: The weights are pickled.
        """
        source = pretrained_model_name_or_path_or_dict
        names = [kwargs.get("weight_name") or "", "" if isinstance(source, dict) else str(source)]
        if kwargs.setdefault("use_safetensors", True) is not True or any(name.endswith(PICKLED) for name in names):
            raise ValueError("LoRA weights must be safetensors: other files are pickles, which can run code")
        if kwargs.get("unet_config") is not None:
            return StableDiffusionLoraLoaderMixin.lora_state_dict(source, **kwargs)
        return super().lora_state_dict(source, **kwargs)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Loads an adapter into the denoiser, and into the text encoder if it has layers for it.

        Args:
            pretrained_model_name_or_path_or_dict: Folder, file, Hub id, or a dictionary of weights.
            adapter_name: Name of the adapter; `None` numbers it.
            hotswap: Whether to replace the weights of the loaded adapter with this name.
            kwargs: Further arguments of diffusers' method.

        Raises:
            ValueError: The weights are not a LoRA, are pickled, or have no layers for this denoiser.
        """
        if self.unet is None:
            super().load_lora_weights(pretrained_model_name_or_path_or_dict, adapter_name, hotswap, **kwargs)
            return
        kwargs |= {"unet_config": self.unet.config, "return_lora_metadata": True}
        weights, alphas, metadata = self.lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        if not any(name.startswith("unet.") and "lora" in name for name in weights):
            raise ValueError(f"expected LoRA weights for a U-Net, got {sorted(weights)[:3]}")
        options = {"adapter_name": adapter_name, "metadata": metadata, "_pipeline": self, "hotswap": hotswap}
        StableDiffusionLoraLoaderMixin.load_lora_into_unet(weights, alphas, self.unet, **options)
        if any(name.startswith("text_encoder.") for name in weights):
            StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(weights, alphas, self.text_encoder, **options)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        transformer_lora_layers: dict[str, Tensor] | None = None,
        unet_lora_layers: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves the layers of an adapter, from `peft.get_peft_model_state_dict`, for `load_lora_weights`.

        Raises:
            ValueError: No layers are given.
        """
        if unet_lora_layers:
            StableDiffusionLoraLoaderMixin.save_lora_weights(save_directory, unet_lora_layers, **kwargs)
            return
        super().save_lora_weights(save_directory, transformer_lora_layers, **kwargs)

    def fuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Merges the adapters into the weights of denoiser and text encoder, or of the given components."""
        super().fuse_lora(components or self._with_adapters, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Reverts `fuse_lora`."""
        super().unfuse_lora(components or self._with_adapters, **kwargs)

    @property
    def _with_adapters(self) -> list[str]:
        return ["transformer" if self.unet is None else "unet", "text_encoder"]
