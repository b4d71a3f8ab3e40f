"""LoRA for pipelines with either denoiser: Wan's format for the Transformer, Stable Diffusion's for the U-Net."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.loaders import StableDiffusionLoraLoaderMixin, WanLoraLoaderMixin
from torch import Tensor

from vgen.models.loading import PICKLED


class LoraLoaderMixin(WanLoraLoaderMixin):
    """diffusers' methods for adapters, for a pipeline that has a `transformer` or a `unet`."""

    _lora_loadable_modules = ["transformer", "unet", "text_encoder"]
    unet: Any

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: Any, **kwargs: Any) -> Any:
        """Reads LoRA weights, from safetensors only; for `load_lora_weights`.

        With `unet_config`, a U-Net's config, it reads Stable Diffusion's formats and returns
        `(weights, alphas, metadata)`.

        Raises:
            ValueError: A pickle is asked for.
        """
        source = pretrained_model_name_or_path_or_dict
        named = [kwargs.get("weight_name") or "", "" if isinstance(source, dict) else str(source)]
        if kwargs.setdefault("use_safetensors", True) is not True or any(name.endswith(PICKLED) for name in named):
            raise ValueError("use_safetensors must stay True: other weights are pickles, which can run code")
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
        """Loads an adapter into the denoiser, and into the text encoder where it has layers for that.

        Args:
            pretrained_model_name_or_path_or_dict: Folder, file, Hub id or weights.
            adapter_name: To select it by; `None` numbers it.
            hotswap: Whether it takes the place of the loaded one of this name.
            kwargs: As diffusers' methods of this name take them.

        Raises:
            ValueError: It is no LoRA, is a pickle, or has no layers for this denoiser.
        """
        if self.unet is None:
            super().load_lora_weights(pretrained_model_name_or_path_or_dict, adapter_name, hotswap, **kwargs)
            return
        kwargs |= {"unet_config": self.unet.config, "return_lora_metadata": True}
        weights, alphas, metadata = self.lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        if not any(name.startswith("unet.") and "lora" in name for name in weights):
            raise ValueError(f"these weights hold no LoRA for a U-Net: {sorted(weights)[:3]}")
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
        """Saves an adapter's layers, as `peft.get_peft_model_state_dict` gives them, for `load_lora_weights`.

        Raises:
            ValueError: Neither denoiser's layers are given.
        """
        if unet_lora_layers:
            StableDiffusionLoraLoaderMixin.save_lora_weights(save_directory, unet_lora_layers, **kwargs)
            return
        super().save_lora_weights(save_directory, transformer_lora_layers, **kwargs)

    def fuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Adds the adapters to the weights of denoiser and text encoder, or of the named components."""
        super().fuse_lora(components or self._with_adapters, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Takes the adapters out of the weights again."""
        super().unfuse_lora(components or self._with_adapters, **kwargs)

    @property
    def _with_adapters(self) -> list[str]:
        return ["transformer" if self.unet is None else "unet", "text_encoder"]
