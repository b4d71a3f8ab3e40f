"""VideoGenPipeline: from prompts to videos, with diffusers' arguments and output types.

Axes: `b` videos, `c` channels, `f` pixel frames, `t h w` latent frames, rows and columns, `l` tokens of a prompt.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal
from weakref import WeakKeyDictionary

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DiffusionPipeline,
    FasterCacheConfig,
    SchedulerMixin,
    SkyReelsV2Transformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from diffusers.guiders import BaseGuidance
from diffusers.utils import BaseOutput, logging
from diffusers.video_processor import VideoProcessor
from torch import Tensor, nn
from transformers import BaseImageProcessor, CLIPVisionModel, PreTrainedModel, PreTrainedTokenizerBase

from vgen.checks import check_choice, check_integer, check_number, check_type, shown
from vgen.diffusion import check_scheduler, is_flow, prediction_type
from vgen.hub import find_checkpoint, not_found
from vgen.io.errors import loading
from vgen.io.fingerprint import fingerprint_components
from vgen.io.pixels import from_uint8, is_batch, size_text, stream_clips, to_clips, to_frames, to_uint8
from vgen.io.preview import animations_html
from vgen.io.records import read_json
from vgen.machine import has_idle_cores
from vgen.models.convert.networks import WAN_PIPELINES, check_wan, defaults_of, from_wan_index, with_same_weights
from vgen.models.image_encoder import embed_images
from vgen.models.image_vae import PerFrameVAE, as_video_vae
from vgen.models.inflate import inflate_stable_diffusion
from vgen.models.loading import (
    check_finite,
    check_no_adapters,
    check_not_pickled,
    check_variant,
    load_strictly,
    parse_dtype,
    stored_dtypes,
)
from vgen.models.locks import lock_of
from vgen.models.lora import LoraLoaderMixin
from vgen.models.prompts import check_text_encoder, encode_texts, warn_unknown_words
from vgen.models.tiny_vae import TinyVideoVAE
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.unet import UNet3D
from vgen.models.vae import CausalVideoVAE
from vgen.sampling.callbacks import TENSOR_INPUTS, Callback, RunningCallMixin, step_function, tensor_inputs_of
from vgen.sampling.coarse_to_fine import FORMAT as COARSE_TO_FINE
from vgen.sampling.coarse_to_fine import CoarseToFine, begin_coarse_to_fine, load_coarse_to_fine
from vgen.sampling.conditions import Conditions, Guidance
from vgen.sampling.interpolation import Interpolator, check_factor, max_latents
from vgen.sampling.known_frames import (
    KnownFrameLayout,
    KnownFrames,
    check_images,
    check_tasks,
    collect_given_frames,
    encode_clip,
    encode_condition,
    encode_known_frames,
    from_start,
    lay_out,
    warn_unlike_training,
)
from vgen.sampling.options import InterpolationOptions, RolloutOptions, accepts
from vgen.sampling.prompts import PromptSchedule, check_prompts, fill_empty_prompts, has_prompt, is_single
from vgen.sampling.rollout import FORMAT as ROLLOUT
from vgen.sampling.rollout import (
    FrameType,
    Hooks,
    Overlap,
    Rollout,
    RolloutState,
    locked_rollout,
    new_state,
    read_record,
)
from vgen.sampling.sampler import (
    Generators,
    LowNoise,
    Sampler,
    Start,
    check_generator,
    decode_latents,
    draw_generator,
    draw_noise,
    latent_shape,
    num_steps,
    storable,
)
from vgen.temporal.actions import pack_actions, read_actions
from vgen.temporal.attention import check_groups, make_groups
from vgen.temporal.grid import LatentGrid

logger = logging.get_logger(__name__)

_DEFAULTS: dict[str, Any] = {
    "height": 480, "width": 832, "num_frames": 81, "frame_rate": 16.0, "num_inference_steps": 50,
    "guidance_scale": 5.0, "max_sequence_length": 512, "rollout_defaults": {}, "sigmas": None,
    "boundary_ratio": None, "guidance_scale_2": None, "expand_timesteps": False, "negative_prompt": None,
}  # fmt: skip
_DEFAULTS_OF: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
"""The defaults of the pipeline that a denoiser was last taken from."""

_DENOISERS = ("transformer", "unet")
_COMPONENTS = (
    "scheduler", "vae", "transformer", "unet", "transformer_2", "text_encoder", "tokenizer", "image_encoder",
    "image_processor",
)  # fmt: skip

OutputType = Literal["np", "pil", "pt", "latent"]


@dataclass
class VideoGenPipelineOutput(BaseOutput):
    """Videos: a list of lists of images, an array `(b, f, h, w, c)` in [0, 1], or a tensor `(b, f, c, h, w)`."""

    frames: Any

    def _repr_html_(self) -> str | None:
        """The videos as animations, which notebooks show; `None` for latents."""
        if isinstance(self.frames, Tensor) and (self.frames.shape[2] != 3 or self.frames.aminmax().min < 0):
            return None
        return animations_html(self.frames)


class VideoGenPipeline(RunningCallMixin, DiffusionPipeline, LoraLoaderMixin):
    """Generates videos from prompts and known frames.

    Defaults that are `None` are those of the pipeline whose `components` the denoiser comes from, or those of Wan 2.1.

    Args:
        scheduler: Any diffusers scheduler that fits the denoiser's training; `None` to encode prompts only.
        vae: Encodes clips to latents and decodes them. A 2D VAE works frame by frame, and diffusers'
            `AutoencoderKLWan` is converted. Without a VAE, the denoiser works on pixels.
        transformer: The denoiser, if it is a Transformer; diffusers' `WanTransformer3DModel` and
            `SkyReelsV2Transformer3DModel` are converted.
        unet: The denoiser, if it is a U-Net.
        transformer_2: A second Transformer for low noise levels, as in Wan 2.2 A14B.
        image_encoder: Encodes known frames for Wan 2.1 image to video.
        image_processor: Of the image encoder.
        text_encoder: Any transformers text encoder; without one, prompts must be embeddings. A denoiser that was
            trained without prompts (no `text` among its tasks) needs none.
        tokenizer: Of the text encoder.
        height: Default height of videos, in pixels.
        width: Default width, in pixels.
        num_frames: Default number of frames.
        frame_rate: Default pixel frames per second of the content.
        num_inference_steps: Default number of denoising steps; with `sigmas`, their number.
        guidance_scale: Default weight of classifier-free guidance.
        max_sequence_length: Default length of prompts, in tokens.
        rollout_defaults: Defaults of `rollout` and `predict` that differ from those of single clips and of the
            denoiser: any fields of `RolloutOptions`.
        sigmas: Noise levels in descending order, before the scheduler's shift, that replace the scheduler's own.
            Another number of steps takes levels between them. Many few-step checkpoints are trained for these only.
        boundary_ratio: Noise level in [0, 1] below which `transformer_2` replaces the Transformer.
        guidance_scale_2: Default weight of guidance below it; `None` is the weight above it.
        negative_prompt: Default of the negative prompt; `None` is "".
        expand_timesteps: Whether the Transformer takes an image as its first latent at noise level 0, which all frames
            attend to and which attends to all, as Wan 2.2 TI2V-5B does.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->transformer->transformer_2->unet->vae"
    _optional_components = [name for name in _COMPONENTS if name != "scheduler"]
    _callback_tensor_inputs = list(TENSOR_INPUTS)

    def __init__(
        self,
        scheduler: SchedulerMixin | None,
        vae: CausalVideoVAE | AutoencoderKL | AutoencoderKLWan | None = None,
        transformer: SpacetimeTransformer | WanTransformer3DModel | SkyReelsV2Transformer3DModel | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        unet: UNet3D | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        frame_rate: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        max_sequence_length: int | None = None,
        rollout_defaults: dict[str, Any] | None = None,
        sigmas: Sequence[float] | None = None,
        transformer_2: SpacetimeTransformer | WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        guidance_scale_2: float | None = None,
        image_encoder: CLIPVisionModel | None = None,
        image_processor: BaseImageProcessor | None = None,
        expand_timesteps: bool | None = None,
        negative_prompt: str | None = None,
    ) -> None:
        super().__init__()
        if transformer is not None and unet is not None:
            raise ValueError("a pipeline has one denoiser: pass transformer or unet, not both")
        if isinstance(vae, AutoencoderKLWan):
            vae = with_same_weights(vae, CausalVideoVAE, shared=True)
        if isinstance(transformer, (WanTransformer3DModel, SkyReelsV2Transformer3DModel)):
            transformer = with_same_weights(transformer, SpacetimeTransformer, shared=True)
        if isinstance(transformer_2, WanTransformer3DModel):
            transformer_2 = with_same_weights(transformer_2, SpacetimeTransformer, shared=True)
        given = {
            "height": height,
            "width": width,
            "num_frames": num_frames,
            "frame_rate": frame_rate,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "max_sequence_length": max_sequence_length,
            "rollout_defaults": rollout_defaults,
            "sigmas": None if sigmas is None else storable(_custom_steps(None, sigmas)["sigmas"]),
            "boundary_ratio": boundary_ratio,
            "guidance_scale_2": guidance_scale_2,
            "expand_timesteps": expand_timesteps,
            "negative_prompt": negative_prompt,
        }
        if sigmas is not None and num_inference_steps is None:
            given["num_inference_steps"] = sum(level > 0 for level in sigmas)
        network = transformer if unet is None else unet
        defaults = {} if network is None else _DEFAULTS_OF.get(network, {})
        defaults = _DEFAULTS | defaults | {name: value for name, value in given.items() if value is not None}
        RolloutOptions.from_json(defaults["rollout_defaults"], "rollout_defaults")
        _check_experts(transformer, transformer_2, defaults["boundary_ratio"])
        self.register_modules(
            scheduler=scheduler,
            vae=vae,
            transformer=transformer,
            unet=unet,
            transformer_2=transformer_2,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            image_encoder=image_encoder,
            image_processor=image_processor,
        )
        self.register_to_config(**copy.deepcopy(defaults))
        self._prediction_type = None if scheduler is None else prediction_type(scheduler)
        vae = self.video_vae
        self.vae_scale_factor_temporal = 1 if vae is None else vae.temporal_compression_ratio
        self.vae_scale_factor_spatial = 1 if vae is None else vae.spatial_compression_ratio
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> VideoGenPipeline:
        """Loads a packaged checkpoint (`vgen/shapes-64`), a folder, or a Hub id, in this order.

        Folders of diffusers' `WanPipeline` and `WanImageToVideoPipeline` (Wan 2.1 and 2.2) and of its
        `SkyReelsV2DiffusionForcingPipeline` load too.

        Args:
            pretrained_model_name_or_path: Name of the checkpoint.
            kwargs: Further arguments of diffusers' method. `dtype` is float32 by default; it may be a name, such as
                `"bfloat16"`, or `"auto"`, the data type of each component's weights.

        Raises:
            ValueError: There is no such checkpoint, a file is malformed, its weights are pickled, do not fit its
                config, or are NaN or infinite, or only some components have the requested variant.
        """
        source = find_checkpoint(pretrained_model_name_or_path)
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError("use_safetensors must stay True: other weights are pickles, which can run code")
        # transformers would keep the file's half precision
        dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", torch.float32))
        kwargs["dtype"] = parse_dtype(dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        folder = source if isinstance(source, Path) else cls._download(source, **kwargs)
        with loading(folder):
            return cls._from_folder(folder, **kwargs)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Saves all components and defaults as diffusers does.

        Args:
            save_directory: Folder to write to.
            args: Further arguments of diffusers' method.
            kwargs: The same by name.

        Raises:
            ValueError: A component has LoRA layers.
        """
        for name, component in self.components.items():
            if isinstance(component, nn.Module):
                check_no_adapters(component, name)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def _from_folder(cls, folder: Path, **kwargs: Any) -> VideoGenPipeline:
        components = [path for path in sorted(folder.iterdir()) if path.is_dir() and kwargs.get(path.name, path)]
        for component in components:
            check_not_pickled(component)
        index = {name: entry for name, entry in cls.load_config(folder).items() if isinstance(entry, (list, tuple))}
        loaded = {name: entry[1] for name, entry in index.items() if name not in kwargs and entry[0] is not None}
        for name in loaded:
            for path in (folder / name).glob("*config.json"):
                read_json(path)  # diffusers may take another value for a Hub id
        if kwargs["dtype"] == "auto":
            kwargs["dtype"] = stored_dtypes(folder, loaded, kwargs.get("variant")) | {"default": torch.float32}
        if kwargs.get("variant"):
            check_variant(folder, loaded, kwargs["variant"])
        if "text_encoder" in loaded:
            check_text_encoder(folder / "text_encoder", loaded["text_encoder"], kwargs.get("variant"))
        # networks of other libraries, which do not check their weights
        foreign = [
            name
            for name in ("text_encoder", "image_encoder", "vae")
            if loaded.get(name) not in (None, "CausalVideoVAE")
        ]
        if loaded.get("vae") == "AutoencoderKL":
            load = AutoencoderKL.from_pretrained  # here without reading weights
            load_strictly(load, "AutoencoderKL", folder / "vae", device_map="meta", variant=kwargs.get("variant"))
        pipe = super().from_pretrained(str(folder), **kwargs)
        for name in foreign:
            check_finite(getattr(pipe, name), f"{loaded[name]} in {folder / name}")
        if "scheduler" in kwargs:
            trained = getattr(diffusers, index["scheduler"][1])
            pipe._prediction_type = prediction_type(trained.from_pretrained(folder / "scheduler"))
        return pipe

    @classmethod
    def from_single_file(cls, source: str | Path, *, config: str | Path, **kwargs: Any) -> VideoGenPipeline:
        """Loads the Transformer or the VAE from one file, and the other components from a pipeline.

        Args:
            source: A `.safetensors` or `.gguf` file; see `SpacetimeTransformer.from_single_file`.
            config: The pipeline that has the other components: a packaged checkpoint, a folder or a Hub id. The
                file's network must have the config of the one that it replaces.
            kwargs: Arguments of `from_pretrained`, and `quantization_config` for the file.

        Raises:
            ValueError: The file does not match the network that it replaces, or a case of `from_pretrained`.
        """
        from vgen.models.convert.names import kind_of
        from vgen.models.single_file import load_single_file, read_single_file

        weights = read_single_file(source)
        is_vae = kind_of(weights) == "vae"
        name, network_class = ("vae", CausalVideoVAE) if is_vae else ("transformer", SpacetimeTransformer)
        dtype = kwargs.get("torch_dtype", kwargs.get("dtype", torch.float32))
        dtype = dtype.get(name, dtype.get("default")) if isinstance(dtype, dict) else dtype
        dtype = dtype if isinstance(dtype, torch.dtype) else None if dtype in (None, "auto") else parse_dtype(dtype)
        options = {"dtype": dtype, "quantization_config": kwargs.pop("quantization_config", None)}
        options = {key: value for key, value in options.items() if value is not None}
        folder = find_checkpoint(config)
        network = load_single_file(network_class, source, weights, config=folder, subfolder=name, **options)
        return cls.from_pretrained(config, **{name: network}, **kwargs)

    @classmethod
    def _download(cls, source: str, **kwargs: Any) -> Path:
        """The folder of a pipeline of the Hub, after its download.

        Raises:
            ValueError: There is no such pipeline, or it is of another class.
        """
        hub = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
        try:
            cls.load_config(source, **{name: kwargs[name] for name in hub if name in kwargs})  # refuse before loading
            with loading(source):
                return Path(cls.download(source, **kwargs))
        except OSError as error:
            raise ValueError(f"{not_found(source)}, and it could not be loaded from the Hub: {error}") from error

    @classmethod
    def from_stable_diffusion(
        cls,
        source: str | Path | DiffusionPipeline,
        *,
        num_frames: int = 16,
        frame_rate: float = 8.0,
        **unet: Any,
    ) -> VideoGenPipeline:
        """Inflates an image pipeline. At first, every video frame equals the image it generates from the same noise.

        Args:
            source: A `StableDiffusionPipeline`, or the folder or Hub id of one (the layouts of 1.5 and 2.1). Its
                safety checker is dropped.
            num_frames: Default number of frames.
            frame_rate: Default pixel frames per second.
            unet: Arguments of `UNet3D` that the 2D network does not have, such as `group_modes` or `keyframe_slots`.

        Raises:
            ValueError: The layout is not supported; the part is named.
        """
        return cls(**inflate_stable_diffusion(source, **unet), num_frames=num_frames, frame_rate=frame_rate)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> VideoGenPipeline:
        """A pipeline with the components of another one, without more memory for weights.

        Args:
            pipeline: A pipeline of this class, or a `WanPipeline`, `WanImageToVideoPipeline`,
                `WanVideoToVideoPipeline` or `SkyReelsV2DiffusionForcingPipeline` of diffusers.
            kwargs: Components or defaults to replace, and `torch_dtype`; by default the weights keep their data type.

        Raises:
            ValueError: It is another pipeline, or lacks one of two experts.
        """
        known = (cls.__name__, *WAN_PIPELINES, WanVideoToVideoPipeline.__name__)
        if type(pipeline).__name__ not in known:
            raise ValueError(f"pipeline must be one of {', '.join(known)}, got {type(pipeline).__name__}")
        if type(pipeline).__name__ in WAN_PIPELINES:
            check_wan(pipeline.config)
            kept = ("boundary_ratio", "expand_timesteps")
            kwargs = {name: pipeline.config[name] for name in kept if name in pipeline.config} | kwargs
            kwargs = defaults_of(type(pipeline).__name__) | kwargs
        dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", None))
        parts = pipeline.components | (pipeline.defaults if isinstance(pipeline, cls) else {}) | kwargs
        result = cls(**{name: parts[name] for name in (*_COMPONENTS, *_DEFAULTS) if name in parts})
        return result if dtype is None else result.to(dtype=dtype)

    def to_diffusers(self, shared: bool = False) -> Any:
        """A pipeline of diffusers that gives the same videos: `WanPipeline`, or that for images or for SkyReels-V2.

        Args:
            shared: Whether its networks share the memory of their weights with these. By default they are copies.

        Raises:
            ValueError: The networks have no counterparts in diffusers.
        """
        if not isinstance(self.vae, CausalVideoVAE) or not isinstance(self.denoiser, SpacetimeTransformer):
            raise ValueError(
                "only a pipeline with a CausalVideoVAE and a SpacetimeTransformer becomes a WanPipeline, got "
                f"{type(self.vae).__name__} and {type(self.denoiser).__name__}"
            )
        parts = {
            "tokenizer": self.tokenizer,
            "text_encoder": self.text_encoder,
            "vae": self.vae.to_diffusers(shared),
            "scheduler": copy.deepcopy(self.scheduler),
            "transformer": self.denoiser.to_diffusers(shared),
        }
        if self.denoiser.config.inject_sample_info:
            return diffusers.SkyReelsV2DiffusionForcingPipeline(**parts)
        parts |= {
            "transformer_2": None if self.transformer_2 is None else self.transformer_2.to_diffusers(shared),
            "boundary_ratio": self.config.boundary_ratio,
            "expand_timesteps": self.config.expand_timesteps,
        }
        if not self.denoiser.condition_channels:
            return WanPipeline(**parts)
        images = {"image_encoder": self.image_encoder, "image_processor": self.image_processor}
        return diffusers.WanImageToVideoPipeline(**parts, **images)  # importing it warns

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Reads `model_index.json`; that of one of `WAN_PIPELINES` becomes one of this class.

        Raises:
            ValueError: The index is that of another pipeline class. The error names it.
        """
        index = super().load_config(pretrained_model_name_or_path, **kwargs)
        name = index.get("_class_name") if isinstance(index, dict) else cls.__name__
        if name in WAN_PIPELINES:
            return from_wan_index(index)
        if name != cls.__name__:
            raise ValueError(
                f"{pretrained_model_name_or_path} must contain a {cls.__name__}, {' or '.join(WAN_PIPELINES)}, got a "
                f"{name}"
            )
        return index

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        guidance_scale_2: float | None = None,
        image: Any = None,
        frames: Mapping[int, Any] | None = None,
        video: Any = None,
        strength: float = 0.8,
        frame_rate: float | None = None,
        actions: Any = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        groups: str | Sequence[int] | None = None,
        guider: BaseGuidance | None = None,
        output_type: OutputType = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
    ) -> Any:
        """Generates videos. `None` uses the checkpoint's default.

        Args:
            prompt: Describes the video; `None` is for checkpoints that were trained without prompts.
            negative_prompt: Describes what to steer away from; by default that of the checkpoint, or "".
            height: Height in pixels; by default that of the known frames or of `video`.
            width: Width in pixels; by default that of the known frames or of `video`.
            num_frames: Length of the video, `1 + s*k`; by default that of `video`.
            num_inference_steps: Number of denoising steps.
            guidance_scale: Weight of classifier-free guidance. Values up to 1 turn it off.
            guidance_scale_2: The same for `transformer_2`; by default `guidance_scale`, if that is given.
            image: The first frame: a PIL image, an array `(h, w, 3)` or a tensor `(3, h, w)`, uint8 or in [0, 1]; a
                list has one for each prompt. The same as `frames={0: image}`.
            frames: Known frames by index, in the format of `image`; -1 is the last one. They are returned unchanged
                at their positions, except by image-to-video checkpoints of Wan, which only imitate them.
            video: A video to change, in the format of `rollout`; a list has one for each prompt.
            strength: How much `video` is changed: the share of the denoising steps that are done, above 0 and up to 1,
                which starts from pure noise.
            frame_rate: Pixel frames per second that the denoiser is conditioned on; ignored by checkpoints without a
                frame rate embedding.
            actions: Actions `(num_frames, a)`, or `(b, num_frames, a)` with one array for each video, for checkpoints
                with actions: that of a frame leads from the frame before it to this one; that of frame 0 is not read.
                `None` means that they are unknown. Guidance also steers towards them.
            timesteps: Timesteps instead of those of `num_inference_steps`, for schedulers that take them.
            sigmas: Noise levels instead of those of `num_inference_steps`, for schedulers that take them.
            num_videos_per_prompt: Number of videos for each prompt.
            generator: Source of the noise; a list has one for each video. A CPU generator draws the same noise for
                every device.
            latents: Noise `(b, c, t, h, w)` to start from.
            prompt_embeds: Embeddings `(b, l, d)` instead of `prompt`.
            negative_prompt_embeds: Embeddings `(b, l, d)` instead of `negative_prompt`.
            groups: Which token frames attend to which: `full`, `causal`, `chunk`, or a list of integers. By default
                `full`; checkpoints that were not trained for it make the video as a `rollout`.
            guider: One of diffusers' guiders, instead of classifier-free guidance with `guidance_scale`; those that
                skip attention layers need a `skip_layer_config` that skips whole blocks.
            output_type: `np`, `pil`, `pt` or `latent`.
            return_dict: Whether to return a `VideoGenPipelineOutput` or a tuple.
            attention_kwargs: `{"scale": ...}` scales LoRA layers, including those of the text encoder.
            callback_on_step_end: Called as `f(pipeline, step, timestep, tensors)`; tensors that it returns replace
                the current ones.
            callback_on_step_end_tensor_inputs: Names of the tensors that the callback receives.
            max_sequence_length: Length of prompts in tokens.

        Raises:
            ValueError: An argument is invalid. The error names the allowed values and the nearest one.
        """
        if self.is_unprompted and prompt is None and prompt_embeds is None:
            prompt = [""] * len(image) if isinstance(image, list) else ""
        given = (
            {}
            if image is None and frames is None
            else collect_given_frames(image, frames, _count(prompt, prompt_embeds))
        )
        clips = None
        if video is not None:
            clips = to_clips(video, _count(prompt, prompt_embeds), isinstance(prompt, list))
        _check_size(height, width)
        for one in (*given.values(), *([] if clips is None else [clips])):
            height = one.shape[-2] if height is None else height
            width = one.shape[-1] if width is None else width
            if (height, width) != tuple(one.shape[-2:]):
                raise ValueError(
                    f"given frames must have the size of the video, {height}x{width}, got {size_text(one)}"
                )
        height = self.config.height if height is None else height
        width = self.config.width if width is None else width
        if groups is None and "full" not in self.denoiser.config.group_modes:
            unsupported = {"latents": latents, "video": video, "timesteps": timesteps, "sigmas": sigmas}
            wrong = [name for name, value in unsupported.items() if value is not None]
            wrong += ["output_type='latent'"] if output_type == "latent" else []
            if wrong:
                raise ValueError(f"this checkpoint makes videos as a rollout, which takes no {wrong[0]}: pass groups")
            clip = self._roll_out(
                prompt, prompt_embeds, negative_prompt_embeds, given, num_frames, num_videos_per_prompt, actions,
                height=height, width=width, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
                negative_prompt=negative_prompt, frame_rate=frame_rate, generator=generator, guider=guider,
                attention_kwargs=attention_kwargs, max_sequence_length=max_sequence_length,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            )  # fmt: skip
            videos = self._postprocess(clip, output_type)
            return VideoGenPipelineOutput(frames=videos) if return_dict else (videos,)
        groups = "full" if groups is None else groups
        if clips is not None and num_frames not in (None, clips.shape[2]):
            raise ValueError(f"num_frames must be the length of the video, {clips.shape[2]}, got {num_frames}")
        num_frames = clips.shape[2] if clips is not None else num_frames
        num_frames = self.config.num_frames if num_frames is None else num_frames
        frame_rate = self.config.frame_rate if frame_rate is None else frame_rate
        check_number("strength", strength, above=0, maximum=1)
        custom = _custom_steps(timesteps, sigmas)
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        steps = len(next(iter(custom.values()))) if custom else steps
        self._check_guidance(guidance_scale, guider)
        if guidance_scale_2 is not None:
            if self.transformer_2 is None:
                raise ValueError("guidance_scale_2 is for checkpoints with transformer_2: pass guidance_scale only")
            check_number("guidance_scale_2", guidance_scale_2)
        elif guidance_scale is None:
            guidance_scale_2 = self.config.guidance_scale_2
        default = self.config.guidance_scale if self.is_guidable else 1.0
        scale = default if guidance_scale is None else guidance_scale
        guidance = Guidance(scale=scale, guider=guider, low_noise_scale=guidance_scale_2)
        tensor_inputs = tensor_inputs_of(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(
            prompt,
            negative_prompt,
            height,
            width,
            num_frames,
            frame_rate,
            steps,
            prompt_embeds,
            negative_prompt_embeds,
            groups,
            output_type,
            guidance.scale,
            num_videos_per_prompt,
            max_sequence_length,
            attention_kwargs,
        )
        trained = self.denoiser.config.trained_token_frames
        if trained is not None and self.grid.num_latents(num_frames) > trained * self.grid.patch_frames:
            longest = self.grid.num_frames(trained * self.grid.patch_frames)
            logger.warning(
                f"num_frames={num_frames} is longer than the clips that this checkpoint was trained with, which have "
                f"up to {longest} frames ({trained} token frames): use rollout for longer videos"
            )
        self._warn_untrained_size(height, width)
        self._warn_untrained_rate(frame_rate)
        sampler = self.sampler(guidance)
        known = self._encode_given(given, num_frames, num_videos_per_prompt)
        positive, negative = self.encode_prompt(
            prompt,
            negative_prompt,
            guidance.needs_negative,
            num_videos_per_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            max_sequence_length,
            sampler.device,
            self.denoiser.dtype,
            (attention_kwargs or {}).get("scale"),
        )
        start = None
        if clips is not None:
            if num_steps(steps, strength) < 1:
                raise ValueError(f"strength times the number of steps must be at least 1, got {strength} and {steps}")
            encoded = encode_clip(self.video_vae, clips.to(self._execution_device))
            start = Start(encoded.repeat_interleave(num_videos_per_prompt, dim=0), strength)
        noise = self.prepare_latents(
            len(positive), height, width, num_frames, torch.float32, sampler.device, generator, latents
        )
        if isinstance(groups, str):
            p_t = self.grid.patch_frames
            num_known = 0 if self.config.expand_timesteps else known.layout.num_leading // p_t
            groups = make_groups(groups, noise.shape[2] // p_t, num_known, self.denoiser.config.chunk_size)
        acted = None
        if actions is not None:
            acted = read_actions(actions, self.denoiser.config.action_dim, len(positive), num_frames)
            acted = pack_actions(acted, self.grid).to(sampler.device)
        conditions = Conditions(
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            frame_rate=frame_rate if self.denoiser.takes_frame_rate else None,
            keyframes=None if known.keyframes is None else known.keyframes.to(sampler.device, self.denoiser.dtype),
            condition=known.condition,
            image_embeds=known.image_embeds,
            groups=groups,
            actions=acted,
            attention_kwargs=attention_kwargs,
        )
        total = steps if start is None else num_steps(steps, start.strength)
        with self.progress_bar(total=total) as bar:
            on_step = step_function(self, sampler, callback_on_step_end, tensor_inputs, bar.update)
            latents = sampler.denoise(
                noise,
                conditions,
                steps,
                generator,
                known=known,
                on_step=on_step,
                start=start,
                custom=custom,
            )
        videos = latents if output_type == "latent" else self.decode_latents(latents, output_type, known)
        self.maybe_free_model_hooks()
        return VideoGenPipelineOutput(frames=videos) if return_dict else (videos,)

    def _roll_out(
        self,
        prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        given: dict[int, Tensor],
        num_frames: int | None,
        num_videos_per_prompt: int,
        actions: Any,
        **options: Any,
    ) -> Tensor:
        """Videos `(b, 3, f, h, w)` in [-1, 1] of a rollout, with the given frames at their start.

        Raises:
            ValueError: The given frames are not the first ones, or there is no frame to generate.
        """
        if sorted(given) != list(range(len(given))):
            raise ValueError(
                f"this checkpoint makes videos as a rollout: given frames must be the first ones, got {sorted(given)}"
            )
        num_frames = self.config.num_frames if num_frames is None else num_frames
        check_integer("num_frames", num_frames, len(given) + 1)
        check_integer("num_videos_per_prompt", num_videos_per_prompt, 1)
        embeds = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        embeds = {
            name: None if one is None else one.repeat_interleave(num_videos_per_prompt, dim=0)
            for name, one in embeds.items()
        }
        prompts: Any = prompt
        if num_videos_per_prompt > 1 and prompt is not None:
            prompts = [
                one for one in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(num_videos_per_prompt)
            ]
        parts = []
        video: Any = None
        if given:
            leading = torch.stack([given[index] for index in range(len(given))], dim=2)
            leading = leading.repeat_interleave(num_videos_per_prompt, dim=0)
            parts.append(leading.cpu())
            videos = list(((leading + 1) / 2).transpose(1, 2))
            video = videos if len(videos) > 1 or isinstance(prompts, list) else videos[0]
        if actions is not None:
            count = num_videos_per_prompt * _count(prompt, prompt_embeds)
            acted = read_actions(actions, self.denoiser.config.action_dim, count, num_frames)
            options["actions"] = acted[:, len(given) :]
            options["video_actions"] = acted[:, : len(given)] if given else None
        rollout = self.rollout(prompts, video, num_frames=num_frames - len(given), **embeds, **options)
        with self.progress_bar(total=num_frames - len(given)) as bar:
            while not rollout.is_done:
                parts.append(rollout.step().cpu())
                bar.update(parts[-1].shape[2])
        self.maybe_free_model_hooks()
        return torch.cat(parts, dim=2)

    @accepts(RolloutOptions)
    @torch.no_grad()
    def rollout(
        self,
        prompt: str | list[str | None] | Mapping[int, str] | None = None,
        video: Any = None,
        *,
        num_frames: int | None = None,
        actions: Any = None,
        video_actions: Any = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        decoder: TinyVideoVAE | None = None,
        guider: BaseGuidance | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        max_sequence_length: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_type: FrameType = "uint8",
        overlap: Overlap = False,
        options: RolloutOptions | None = None,
        **overrides: Any,
    ) -> Rollout | CoarseToFine:
        """Continues a video, or starts a new one, chunk by chunk in bounded memory.

        Args:
            prompt: Describes the video; `{0: "...", 64: "..."}` changes it at the first chunk that starts at new
                frame 64 or later; a list makes several videos. `None` (also inside a list) continues the video
                unconditionally; if all prompts are `None`, guidance is off by default.
            video: Given frames to continue: an array `(f, h, w, 3)`, a tensor `(f, 3, h, w)` or a list of images,
                uint8 or in [0, 1]; a list of these, with a list of prompts or none; or an iterator over images, which
                is read frame by frame, however long it is (as a whole with `keyframe_interval`). `None` starts a new
                video.
            num_frames: Number of new frames; `None` is unlimited.
            actions: Actions of the new frames, `(num_frames, a)`, or `(b, num_frames, a)` with one array for each
                video, for checkpoints with actions; see the call of the pipeline. In an unlimited rollout, those of
                the first new frames. `Rollout.step` takes those of its chunk. Others are unknown.
            video_actions: Actions of the given frames, in the same form; `None` means that they are unknown.
            height: Height in pixels; by default that of the video.
            width: Width in pixels; by default that of the video.
            generator: Source of the noise; a list has one for each video.
            prompt_embeds: Embeddings `(b, l, d)` instead of `prompt`.
            negative_prompt_embeds: Embeddings `(b, l, d)` instead of `negative_prompt`.
            decoder: Decodes instead of the VAE, faster and less exactly, for previews.
            guider: As in the call of the pipeline, instead of `guidance_scale`.
            attention_kwargs: As in the call of the pipeline.
            max_sequence_length: Length of prompts in tokens.
            callback_on_step_end: As in the call of the pipeline, for each denoising step of each chunk.
            callback_on_step_end_tensor_inputs: Names of the tensors that the callback receives.
            output_type: What iterating yields: `uint8` arrays `(n, h, w, 3)`, or `np`, `pil` or `pt`; with a leading
                axis for several videos.
            overlap: Whether a second thread denoises the next chunk while one is decoded and used; see `Rollout`.
                `auto` means on a CPU with idle cores, where it is faster. It has no effect with callbacks, with a
                keyframe interval, or if the context is not cached.
            options: A `RolloutOptions`, whose fields are also arguments.
            overrides: Fields of `RolloutOptions`; they take precedence over those of `options`.

        Returns:
            A `Rollout` or, with a keyframe interval, a `CoarseToFine`: both are iterators over new frames with `step`,
            `fork` and `save`.

        Raises:
            ValueError: The checkpoint cannot continue videos, or an argument is invalid.
        """
        self._check_embeds(prompt_embeds, negative_prompt_embeds)
        if negative_prompt_embeds is not None and prompt_embeds is None:
            raise ValueError("a rollout with negative_prompt_embeds needs prompt_embeds: its other prompts may change")
        if (
            negative_prompt_embeds is not None
            and prompt_embeds is not None
            and negative_prompt_embeds.shape != prompt_embeds.shape
        ):
            raise ValueError(
                "negative_prompt_embeds of a rollout must have the shape of prompt_embeds, "
                f"{tuple(prompt_embeds.shape)}, got {tuple(negative_prompt_embeds.shape)}"
            )
        prompt = _one_per_video(prompt, video)
        schedule = PromptSchedule.of(prompt)
        prompted = has_prompt(prompt) or prompt_embeds is not None or self.is_unprompted and self.is_guidable
        config = self.denoiser.config
        check_tasks(config, self.grid, {"leading"})
        if self.transformer_2 is not None:
            raise ValueError(
                "a checkpoint with transformer_2 makes single clips only: it has no cache of two networks"
            )
        options = RolloutOptions() if options is None else options
        check_type("options", options, RolloutOptions, "RolloutOptions")
        options = options.updated(**overrides)
        self._check_guidance(options.guidance_scale, guider)
        options = options.resolve(self.config, config, prompted=prompted)
        guidance, interval = Guidance.of(options, guider), options.keyframe_interval or 1
        single = is_single(prompt) and (prompt_embeds is None or len(prompt_embeds) == 1)
        count = 1 if single else len(prompt if prompt_embeds is None else prompt_embeds)  # type: ignore[arg-type]
        clips, size = self._clips_to_continue(video, single, count, interval > 1, height, width)
        tensor_inputs = tensor_inputs_of(callback_on_step_end, callback_on_step_end_tensor_inputs)
        for texts in schedule.prompts.values():
            self.check_inputs(
                fill_empty_prompts(texts, "") if prompt_embeds is None or has_prompt(texts) else None,
                options.negative_prompt,
                *size,
                self.grid.first,
                options.frame_rate or 0,
                options.num_inference_steps or 0,
                prompt_embeds,
                negative_prompt_embeds,
                groups=(0,),
                max_sequence_length=max_sequence_length,
                attention_kwargs=attention_kwargs,
            )
        check_choice("output_type", output_type, FrameType)
        check_choice("overlap", overlap, Overlap)
        if num_frames is not None:
            check_integer("num_frames", num_frames, minimum=1)
        if guidance.uses_weak_history and not is_flow(self.scheduler):
            raise ValueError(f"history guidance needs a flow-matching scheduler, got {type(self.scheduler).__name__}")
        check_generator(generator, count)
        sampler = self.sampler(guidance, decoder)
        if interval > 1:
            check_tasks(config, self.grid, {"keyframes"})
            check_factor(interval, self.grid, max_latents(sampler))

        state = RolloutState(
            options=options,
            schedule=schedule,
            single=single,
            size=size,
            num_frames=None if num_frames is None else int(num_frames),
            max_sequence_length=max_sequence_length,
            attention_kwargs=attention_kwargs and {name: float(value) for name, value in attention_kwargs.items()},
            generator=draw_generator() if generator is None else generator,
            denoiser=new_state(options),
        )
        if (actions is not None or video_actions is not None) and interval > 1:
            raise ValueError("actions and video_actions must be None with a keyframe interval")
        if actions is not None:
            state.actions = read_actions(actions, config.action_dim, count, num_frames)
        before = None
        if video_actions is not None:
            before = read_actions(video_actions, config.action_dim, count, None, "video_actions")
        hooks = self._hooks(state, sampler, callback_on_step_end, tensor_inputs)
        if prompt_embeds is not None:
            state.prompt = schedule.due(0)
            state.prompt_embeds, state.negative_prompt_embeds = self.encode_prompt(
                None,
                options.negative_prompt,
                guidance.needs_negative,
                1,
                prompt_embeds,
                negative_prompt_embeds,
                max_sequence_length,
                sampler.device,
                self.denoiser.dtype,
            )
        self._warn_untrained_size(*size)
        assert options.frame_rate is not None
        for rate in (options.frame_rate, options.frame_rate / interval):
            self._warn_untrained_rate(rate)
        if video is not None:
            clips = iter(clips)
            first = next(clips)
            warn_unlike_training(self.video_vae, first[:, :, 0], sampler.device)
            clips = itertools.chain([first], clips)
        if interval == 1:
            rollout = Rollout(sampler, state, hooks, output_type, _overlaps(overlap, sampler.device))
            rollout.take(clips, before)
            return rollout
        return begin_coarse_to_fine(sampler, state, hooks, output_type, next(iter(clips), None))

    def _check_decoder(self, decoder: TinyVideoVAE) -> None:
        """Checks that a decoder is for the latents of this pipeline.

        Raises:
            ValueError: It is not.
        """
        names = ("temporal_compression_ratio", "spatial_compression_ratio")
        needed = [
            self.denoiser.config.out_channels or self.denoiser.config.in_channels,
            *(getattr(self.video_vae, name, 1) for name in names),
        ]
        found = [decoder.config.latent_channels, *(getattr(decoder, name) for name in names)]
        if needed != found:
            raise ValueError(
                f"decoder must be for latents of {needed[0]} channels, {needed[1]} frames and {needed[2]}x{needed[2]} "
                f"pixels, got {found[0]} channels, {found[1]} frames and {found[2]}x{found[2]} pixels"
            )

    def _clips_to_continue(
        self, video: Any, single: bool, count: int, whole: bool, height: int | None, width: int | None
    ) -> tuple[Iterable[Tensor], tuple[int, int]]:
        """Given frames of `count` videos as clips `(b, 3, f, h, w)`, as one if `whole`, and the size of the frames.

        Raises:
            ValueError: They are not videos, or their number or size is not the requested one.
        """
        if video is None:
            return [], (
                self.config.height if height is None else height,
                self.config.width if width is None else width,
            )
        _check_size(height, width)
        if isinstance(video, Iterator):
            video = video if single and not whole else list(video)
        clips = stream_clips(video) if isinstance(video, Iterator) else iter([to_clips(video, count, not single)])
        first = next(clips)
        size = (first.shape[-2], first.shape[-1])
        wanted = (size[0] if height is None else height, size[1] if width is None else width)
        if wanted != size:
            raise ValueError(f"the video must have the size {wanted[0]}x{wanted[1]}, got {size_text(first)}")
        return itertools.chain([first], clips), size

    def _hooks(
        self, state: RolloutState, sampler: Sampler, callback: Callback | None, tensor_inputs: Sequence[str]
    ) -> Hooks:
        """Functions of this pipeline that a rollout uses."""

        def encode(prompt: Any) -> tuple[Tensor, Tensor | None]:
            return self.encode_prompt(
                prompt,
                state.options.negative_prompt,
                sampler.guidance.needs_negative,
                max_sequence_length=state.max_sequence_length,
                device=sampler.device,
                dtype=self.denoiser.dtype,
                lora_scale=(state.attention_kwargs or {}).get("scale"),
            )

        on_step = None if callback is None else step_function(self, sampler, callback, tensor_inputs)
        return Hooks(encode=encode, fingerprint=self.fingerprint, on_step=on_step, on_end=self.maybe_free_model_hooks)

    @accepts(RolloutOptions)
    @torch.no_grad()
    def predict(
        self,
        video: Any,
        num_frames: int = 16,
        prompt: str | list[str | None] | Mapping[int, str] | None = None,
        *,
        output_type: Literal["np", "pil", "pt"] = "np",
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        """Continues a video: a `rollout` of fixed length, returned as one video.

        Args:
            video: Given frames as in `rollout`.
            num_frames: Number of new frames; only these are returned.
            prompt: Describes the video; `None` continues it unconditionally.
            output_type: `np`, `pil` or `pt`.
            return_dict: Whether to return a `VideoGenPipelineOutput` or a tuple.
            options: Any other argument of `rollout`.

        Raises:
            ValueError: As `rollout` does.
        """
        check_choice("output_type", output_type, ("np", "pil", "pt"))
        if video is None or num_frames is None:
            raise ValueError("predict needs a video to continue and a number of new frames")
        rollout = self.rollout(prompt, video, num_frames=num_frames, **options)
        chunks = []
        while not rollout.is_done:
            chunks.append(to_uint8(rollout.step()).cpu())
        self.maybe_free_model_hooks()
        videos = self._postprocess(from_uint8(torch.cat(chunks, dim=2)), output_type)
        return VideoGenPipelineOutput(frames=videos) if return_dict else (videos,)

    @accepts(InterpolationOptions)
    @torch.no_grad()
    def interpolate(
        self,
        video: Any,
        factor: int | None = None,
        prompt: str | list[str | None] | None = None,
        *,
        generator: Generators = None,
        output_type: Literal["np", "pil", "pt"] = "np",
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        """Generates the frames between given ones. Returns `factor * (f - 1) + 1` frames, the given ones unchanged.

        Clips of any length are processed window by window. Each window is conditioned on finished frames and on the
        given frames inside it.

        Args:
            video: Given frames, two or more, as in `rollout`.
            factor: The given frames become every `factor`-th frame of the result; 2 by default.
            prompt: Describes the video; `None` interpolates unconditionally.
            generator: Source of the noise; a list has one for each video.
            output_type: `np`, `pil` or `pt`.
            return_dict: Whether to return a `VideoGenPipelineOutput` or a tuple.
            options: Other arguments of `interpolator`. `frame_rate` is that of the given frames; the denoiser is
                conditioned on `factor` times that rate.

        Raises:
            ValueError: The checkpoint cannot interpolate, `factor` is too large for it, or an argument is invalid.
        """
        check_choice("output_type", output_type, ("np", "pil", "pt"))
        check_type("prompt", prompt, (str, list, NoneType), "a string, a list of strings, or None")
        prompt = _one_per_video(prompt, video)
        single = is_single(prompt)
        clip = to_clips(video, 1 if single else len(prompt), batched=not single)  # type: ignore[arg-type]
        size = (clip.shape[-2], clip.shape[-1])
        make = self.interpolator(factor, prompt, size=size, generator=generator, **options)
        whole = torch.cat([made.cpu() for made in make.stream([clip])], dim=2)
        self.maybe_free_model_hooks()
        videos = self._postprocess(whole, output_type)
        return VideoGenPipelineOutput(frames=videos) if return_dict else (videos,)

    @accepts(InterpolationOptions)
    @torch.no_grad()
    def interpolator(
        self,
        factor: int | None = None,
        prompt: str | list[str | None] | None = None,
        *,
        size: tuple[int, int],
        generator: Generators = None,
        keep_given: bool = True,
        guider: BaseGuidance | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        max_sequence_length: int | None = None,
        options: InterpolationOptions | None = None,
        **overrides: Any,
    ) -> Interpolator:
        """Interpolates frames that arrive one by one. It relates to `interpolate` as `rollout` does to `predict`.

        Args:
            factor: The given frames become every `factor`-th frame of the result; 2 by default.
            prompt: Describes the video.
            size: Height and width of the frames in pixels.
            generator: Source of the noise.
            keep_given: Whether to return given frames unchanged. Otherwise the VAE decodes them together with the
                others: they are no longer exact, but there is no visible jump between them and their neighbors.
            guider: As in the call of the pipeline, instead of `guidance_scale`.
            attention_kwargs: As in the call of the pipeline.
            max_sequence_length: Length of prompts in tokens.
            options: An `InterpolationOptions`, whose fields are also arguments.
            overrides: Fields of `InterpolationOptions`; they take precedence over those of `options`.

        Raises:
            ValueError: As `interpolate` does.
        """
        options = InterpolationOptions() if options is None else options
        check_type("options", options, InterpolationOptions, "InterpolationOptions")
        check_type("prompt", prompt, (str, list, NoneType), "a string, a list of strings, or None")
        check_generator(generator, 1 if is_single(prompt) else len(prompt))  # type: ignore[arg-type]
        options = options.updated(factor=factor, **overrides)
        self._check_guidance(options.guidance_scale, guider)
        options = options.resolve(self.config, prompted=has_prompt(prompt))
        if not isinstance(size, (tuple, list)) or len(size) != 2:
            raise ValueError(f"size must be (height, width), got {shown(size)}")
        guidance = Guidance.of(options, guider)
        sampler = self.sampler(guidance)
        check_factor(options.factor, self.grid, max_latents(sampler))
        check_tasks(self.denoiser.config, self.grid, {"leading", "keyframes"})
        self.check_inputs(
            fill_empty_prompts(prompt, ""),
            options.negative_prompt,
            *size,
            self.grid.first,
            options.frame_rate or 0,
            options.num_inference_steps or 0,
            groups=(0,),
            max_sequence_length=max_sequence_length,
            attention_kwargs=attention_kwargs,
        )
        self._warn_untrained_size(*size)
        assert options.frame_rate is not None
        self._warn_untrained_rate(options.frame_rate * options.factor)
        positive, negative = self.encode_prompt(
            fill_empty_prompts(prompt, ""),
            options.negative_prompt,
            guidance.needs_negative,
            max_sequence_length=max_sequence_length,
            device=sampler.device,
            dtype=self.denoiser.dtype,
            lora_scale=(attention_kwargs or {}).get("scale"),
        )
        conditions = Conditions(
            prompt_embeds=positive, negative_prompt_embeds=negative, attention_kwargs=attention_kwargs
        )
        return Interpolator(sampler, options, conditions, generator, keep_given=keep_given)

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """Chooses the attention backend; called when xformers attention is enabled or disabled.

        Raises:
            RuntimeError: xformers or CUDA is not available.
            ValueError: `attention_op` is given; xformers chooses its kernel.
        """
        for network in (self.denoiser, self.transformer_2):
            if network is not None:
                network.set_use_memory_efficient_attention_xformers(valid, attention_op)

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        height: int,
        width: int,
        num_frames: int,
        frame_rate: float,
        num_inference_steps: int,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        groups: str | Sequence[int] = "full",
        output_type: OutputType = "np",
        guidance_scale: float = 1.0,
        num_videos_per_prompt: int = 1,
        max_sequence_length: int | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Checks arguments.

        Raises:
            ValueError: An argument is invalid. The error names the given value and the allowed ones.
        """
        _, p_h, p_w = self.denoiser.patch_size
        for name, side, patch in (("height", height, p_h), ("width", width, p_w)):
            unit = self.vae_scale_factor_spatial * patch
            check_integer(name, side)
            if side < 1 or side % unit:
                nearest = max(unit, round(side / unit) * unit)
                raise ValueError(f"{name} must be a multiple of {unit}, got {side} (nearest: {nearest})")
        self.grid.check(num_frames)
        check_number("frame_rate", frame_rate, above=0)
        check_number("guidance_scale", guidance_scale)
        check_integer("num_inference_steps", num_inference_steps, minimum=1)
        check_integer("num_videos_per_prompt", num_videos_per_prompt, minimum=1)
        if max_sequence_length is not None:
            check_integer("max_sequence_length", max_sequence_length, minimum=1)
        self._check_embeds(prompt_embeds, negative_prompt_embeds)
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("pass either prompt or prompt_embeds, not both")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("pass negative_prompt or negative_prompt_embeds, not both")
        if prompt is not None:
            check_prompts(prompt)
        if self.is_unprompted:
            self._check_unprompted(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        elif prompt is not None and (self.text_encoder is None or self.tokenizer is None):
            raise ValueError("this pipeline has no text encoder: pass prompt_embeds instead of prompt")
        for one in negative_prompt if isinstance(negative_prompt, list) else [negative_prompt]:
            if one is not None or isinstance(negative_prompt, list):
                check_type("negative_prompt", one, str, "a string or a list of strings")
        if isinstance(groups, str):
            check_choice("groups", groups, tuple(self.denoiser.config.group_modes))
        else:
            check_groups(groups)
        check_choice("output_type", output_type, OutputType)
        if attention_kwargs is not None:
            check_type("attention_kwargs", attention_kwargs, dict, "a dict")
        for name, value in (attention_kwargs or {}).items():
            check_choice("a key of attention_kwargs", name, ("scale",))
            check_number("attention_kwargs['scale']", value)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        lora_scale: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings of prompts and, for guidance, of negative prompts, `(b * num_videos_per_prompt, l, d)` each.

        Warns of words that the checkpoint was not trained with. `lora_scale` scales LoRA layers of the text encoder.
        For a checkpoint that was trained without prompts, `l` is 0.

        Raises:
            ValueError: There is another number of negative prompts than of prompts, or the checkpoint was trained
                without prompts.
        """
        device = device or self._execution_device
        if self.is_unprompted:
            self._check_unprompted(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
            count = (1 if isinstance(prompt, str) else len(prompt or [])) * num_videos_per_prompt
            nothing = torch.zeros(count, 0, self.denoiser.text_dim, device=device, dtype=dtype)
            return nothing, nothing if do_classifier_free_guidance else None
        length = max_sequence_length or self.config.max_sequence_length
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
            warn_unknown_words(self.tokenizer, prompts)
            prompt_embeds = encode_texts(self.text_encoder, self.tokenizer, prompts, length, device, lora_scale)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            if self.text_encoder is None:
                raise ValueError("without a text encoder, guidance needs negative_prompt_embeds (or guidance_scale=1)")
            count = prompt_embeds.shape[0]
            if negative_prompt is None:
                negative_prompt = self.config.negative_prompt or ""
            negatives = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt] * count
            if len(negatives) != count:
                raise ValueError(f"expected 1 or {count} negative prompts for {count} prompts, got {len(negatives)}")
            length = prompt_embeds.shape[1]
            negative_prompt_embeds = encode_texts(
                self.text_encoder, self.tokenizer, negatives, length, device, lora_scale
            )
        negative = negative_prompt_embeds
        if do_classifier_free_guidance and negative is not None and len(negative) != len(prompt_embeds):
            raise ValueError(f"expected {len(prompt_embeds)} negative_prompt_embeds, as prompts, got {len(negative)}")

        def ready(embeds: Tensor | None) -> Tensor | None:
            if embeds is None or not do_classifier_free_guidance and embeds is negative_prompt_embeds:
                return None
            return embeds.to(device=device, dtype=dtype).repeat_interleave(num_videos_per_prompt, dim=0)

        embeds = ready(prompt_embeds)
        assert embeds is not None
        return embeds, ready(negative_prompt_embeds)

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        num_frames: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise `(b, c, t, h, w)` of variance 1, drawn on the CPU unless a generator is on another device.

        Raises:
            ValueError: The number of generators or the shape of `latents` does not fit.
        """
        num_latents = self.grid.num_latents(num_frames)
        shape = latent_shape(self.denoiser, self.video_vae, batch_size, num_latents, (height, width))
        check_generator(generator, batch_size)
        if latents is not None:
            check_type("latents", latents, Tensor, f"a tensor {shape}")
            if tuple(latents.shape) != shape:
                raise ValueError(f"latents must have shape {shape} for these settings, got {tuple(latents.shape)}")
        return (draw_noise(shape, generator, dtype) if latents is None else latents).to(device=device, dtype=dtype)

    def decode_latents(self, latents: Tensor, output_type: OutputType, known: KnownFrames | None = None) -> Any:
        """Decodes normalized latents; known frames replace the decoded ones at their positions."""
        clip = decode_latents(self.video_vae, latents)
        return self._postprocess(clip if known is None else known.overwrite_frames(clip), output_type)

    def _postprocess(self, clip: Tensor, output_type: str) -> Any:
        return self.video_processor.postprocess_video(clip.float(), output_type=output_type)

    @torch.no_grad()
    def decode_stream(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Yields the videos of latents from `output_type="latent"` slice by slice, uint8 `(b, n, h, w, c)`."""
        slices: Iterable[Tensor] = [latents]
        vae = self.video_vae
        if vae is not None:
            slices = vae.decode_stream(vae.denormalize(latents).to(vae.dtype))
        for one in slices:
            yield to_frames(one)

    def maybe_free_model_hooks(self) -> None:
        """Offloads components again and clears step caches, after evaluations in other threads have finished."""
        denoiser = getattr(self, self.denoiser_name, None)
        with nullcontext() if denoiser is None else lock_of(denoiser):
            super().maybe_free_model_hooks()

    def sampler(self, guidance: Guidance | None = None, decoder: TinyVideoVAE | None = None) -> Sampler:
        """Creates a sampler with this pipeline's networks and its own copy of the scheduler.

        Args:
            guidance: How predictions are guided.
            decoder: Decodes instead of the VAE.

        Raises:
            ValueError: There is no scheduler, its settings contradict each other, or the decoder is for other latents.
        """
        if decoder is not None:
            self._check_decoder(decoder)
        check_scheduler(self.scheduler)
        kind = prediction_type(self.scheduler)
        if self._prediction_type not in (None, kind):
            logger.warning(
                f"{type(self.scheduler).__name__} has the prediction type {kind!r}, but the checkpoint's has "
                f"{self._prediction_type!r}: the video may be noise"
            )
        self._last_sampler = Sampler(
            self.denoiser,
            self.scheduler,
            self.video_vae,
            device=self._execution_device,
            guidance=guidance,
            sigmas=self.config.sigmas,
            decoder=decoder,
            low_noise=(
                None if self.transformer_2 is None else LowNoise(self.transformer_2, self.config.boundary_ratio)
            ),
            siblings=self._samplers,
        )
        return self._last_sampler

    def fingerprint(self) -> dict[str, list[str | None]]:
        """Hashes that identify the configuration and all weights of each component, adapters included."""
        networks = {"denoiser": self.denoiser, "vae": self.vae, "text encoder": self.text_encoder}
        if self.transformer_2 is not None:
            networks["low-noise denoiser"] = self.transformer_2
        return fingerprint_components(self.scheduler, self.tokenizer, networks)

    @property
    def defaults(self) -> dict[str, Any]:
        """The checkpoint's defaults, such as the number of frames."""
        return {name: self.config[name] for name in _DEFAULTS}

    @property
    def components(self) -> dict[str, Any]:
        """Networks, tokenizer and scheduler. A pipeline that is made with the denoiser also gets the defaults."""
        network = getattr(self, self.denoiser_name, None)
        if network is not None:
            _DEFAULTS_OF[network] = copy.deepcopy(self.defaults)
        return {name: getattr(self, name, None) for name in self.config if name in _COMPONENTS}

    @property
    def video_vae(self) -> CausalVideoVAE | PerFrameVAE | None:
        """The VAE; a 2D VAE is wrapped to work frame by frame."""
        return None if self.vae is None else as_video_vae(self.vae)

    @property
    def denoiser(self) -> SpacetimeTransformer | UNet3D:
        """The denoiser.

        Raises:
            ValueError: The pipeline has no denoiser.
        """
        found = getattr(self, self.denoiser_name, None)
        if found is None:
            raise ValueError("this pipeline has no denoiser: it can only encode prompts")
        return found

    def __getattr__(self, name: str) -> Any:
        if name in _DENOISERS:  # otherwise their entries in the config
            raise AttributeError(f"this pipeline has no {name}")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _DENOISERS and value is None:
            self.__dict__.pop(name, None)
            return
        if name in _DENOISERS:
            self.__dict__.setdefault(name, None)  # diffusers updates the config of attributes that exist
        super().__setattr__(name, value)

    @property
    def is_unprompted(self) -> bool:
        """Whether the checkpoint was trained without prompts, so that all videos are unconditional."""
        return self.text_encoder is None and "text" not in self.denoiser.config.tasks

    @property
    def grid(self) -> LatentGrid:
        """Arithmetic of pixel frames, latents and token frames."""
        return LatentGrid(self.vae_scale_factor_temporal, self.denoiser.patch_size[0])

    def _warn_untrained_size(self, height: int, width: int) -> None:
        """Warns, once, of a size other than the default of a checkpoint that records what it was trained on."""
        size = self.config.height, self.config.width
        if self.denoiser.config.trained_token_frames is not None and (height, width) != size:
            logger.warning_once(
                f"{width}x{height} is not the size that this checkpoint makes by default, {size[1]}x{size[0]}: videos "
                "of a size that it was not trained on often look wrong"
            )

    def _warn_untrained_rate(self, frame_rate: float) -> None:
        """Warns, once, of a frame rate more than a quarter outside the range that the denoiser was trained with."""
        config = self.denoiser.config
        if config.trained_frame_rates is None or not config.frame_rate_embedding:
            return
        low, high = config.trained_frame_rates
        if not 0.75 * low <= frame_rate <= 1.25 * high:
            trained = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            logger.warning_once(
                f"{frame_rate:g} frames per second is outside of what this checkpoint was trained with, {trained}: "
                "videos at such a rate often look wrong"
            )

    @property
    def is_guidable(self) -> bool:
        """Whether there are prompts or actions to steer towards."""
        return not self.is_unprompted or bool(self.denoiser.config.action_dim)

    def _check_guidance(self, scale: float | None, guider: BaseGuidance | None) -> None:
        """Checks that at most one kind of guidance is requested.

        Raises:
            ValueError: Both kinds are requested, or a guider with FasterCache.
        """
        if guider is not None:
            check_type("guider", guider, BaseGuidance, "one of diffusers' guiders")
        if guider is not None and scale is not None:
            raise ValueError("pass guidance_scale or guider, not both: the guider has its own weight")
        if self.is_unprompted and (guider is not None or not self.is_guidable and (scale or 0) > 1):
            raise ValueError(
                "guidance_scale must be at most 1 and guider None for a checkpoint that was trained without prompts, "
                f"got {scale if guider is None else type(guider).__name__}"
            )
        if guider is not None and isinstance(self.denoiser._cache_config, FasterCacheConfig):
            raise ValueError("FasterCache needs guidance in one batch: call disable_cache(), or pass no guider")

    def _check_unprompted(self, prompt: Any, negative_prompt: Any, *embeds: Tensor | None) -> None:
        """Checks that there are no prompts.

        Raises:
            ValueError: There is one.
        """
        texts = [text for one in (prompt, negative_prompt) for text in ([one] if isinstance(one, str) else one or [])]
        if any(texts) or any(one is not None for one in embeds):
            raise ValueError("this checkpoint was trained without prompts: leave the prompt out")

    def _check_embeds(self, prompt_embeds: Tensor | None, negative_prompt_embeds: Tensor | None) -> None:
        """Checks embeddings.

        Raises:
            ValueError: They are not tensors of the width that the denoiser expects.
        """
        width = self.denoiser.text_dim
        for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
            if embeds is not None:
                check_type(name, embeds, Tensor, f"a tensor (b, l, {width})")
                if embeds.ndim != 3 or embeds.shape[-1] != width:
                    raise ValueError(f"{name} must have shape (b, l, {width}), got {tuple(embeds.shape)}")

    def _encode_given(self, given: dict[int, Tensor], num_frames: int, num_videos_per_prompt: int) -> KnownFrames:
        """Encodes known frames to inputs of the denoiser.

        Raises:
            ValueError: An index is out of range, or the checkpoint cannot use what is given.
        """
        given = from_start(given, num_frames)
        if self.denoiser.condition_channels:
            return self._encode_images(given, num_frames, num_videos_per_prompt)
        layout = lay_out(given.keys(), num_frames, self.grid)
        uses = {"leading": layout.num_leading > 0, "keyframes": bool(layout.slots)}
        if self.config.expand_timesteps:
            if given.keys() - {0}:
                raise ValueError(
                    f"this checkpoint takes the first frame only: pass image, got the frames {sorted(given)}"
                )
            uses = {}
        check_tasks(self.denoiser.config, self.grid, {task for task, used in uses.items() if used})
        device = self._execution_device
        pixels = {
            index: one.to(device).repeat_interleave(num_videos_per_prompt, dim=0) for index, one in given.items()
        }
        if given:
            warn_unlike_training(self.video_vae, given[min(given)], device)
        still = self.denoiser.config.still_keyframes
        return encode_known_frames(pixels, num_frames, self.grid, self.video_vae, still)

    def _encode_images(self, given: dict[int, Tensor], num_frames: int, num_videos_per_prompt: int) -> KnownFrames:
        """Encodes known frames to extra channels of the denoiser's input, and to tokens of the image encoder.

        Raises:
            ValueError: The checkpoint cannot use what is given, or it has no image encoder.
        """
        config, device, dtype = self.denoiser.config, self._execution_device, self.denoiser.dtype
        check_images(config, given.keys(), num_frames)
        pixels = {index: given[index].to(device) for index in sorted(given)}
        condition = encode_condition(pixels, num_frames, self.grid, self.video_vae)
        tokens = None
        if config.image_dim is not None:
            if self.image_encoder is None or self.image_processor is None:
                raise ValueError("this checkpoint needs its image_encoder and image_processor")
            tokens = embed_images(self.image_encoder, self.image_processor, pixels.values())
            tokens = tokens.to(dtype).repeat_interleave(num_videos_per_prompt, dim=0)
        return KnownFrames(
            KnownFrameLayout(0, 0, {}), None, None, {},
            condition=condition.to(dtype).repeat_interleave(num_videos_per_prompt, dim=0), image_embeds=tokens,
        )  # fmt: skip


def load_rollout(
    folder: str | Path,
    pipe: VideoGenPipeline,
    *,
    decoder: TinyVideoVAE | None = None,
    guider: BaseGuidance | None = None,
    callback_on_step_end: Callback | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    output_type: FrameType = "uint8",
    overlap: Overlap = False,
) -> Rollout | CoarseToFine:
    """Continues a rollout where `save` was called; on the CPU, with the same versions, bit for bit.

    Args:
        folder: Folder that `Rollout.save` or `CoarseToFine.save` wrote.
        pipe: The pipeline that made it, or the same one loaded again.
        decoder: The decoder that the rollout was started with.
        guider: The guider that the rollout was started with.
        callback_on_step_end: As in `VideoGenPipeline.rollout`.
        callback_on_step_end_tensor_inputs: As in `VideoGenPipeline.rollout`.
        output_type: As in `VideoGenPipeline.rollout`.
        overlap: As in `VideoGenPipeline.rollout`.

    Raises:
        ValueError: The folder contains no rollout, or one made with other networks or another scheduler. The error
            names them.
    """
    folder = Path(folder)
    check_choice("overlap", overlap, Overlap)
    with locked_rollout(folder, read_only=True):
        is_coarse = read_record(folder, (ROLLOUT, COARSE_TO_FINE))["format"] == COARSE_TO_FINE
        device = pipe._execution_device
        state = RolloutState.load(folder / "coarse" if is_coarse else folder, device, pipe.fingerprint())
        sampler = pipe.sampler(Guidance.of(state.options, guider), decoder)
        tensor_inputs = tensor_inputs_of(callback_on_step_end, callback_on_step_end_tensor_inputs)
        hooks = pipe._hooks(state, sampler, callback_on_step_end, tensor_inputs)
        rollout = Rollout(sampler, state, hooks, output_type, not is_coarse and _overlaps(overlap, device))
        return load_coarse_to_fine(folder, rollout) if is_coarse else rollout


def _overlaps(overlap: Overlap, device: torch.device) -> bool:
    return device.type == "cpu" and has_idle_cores() if overlap == "auto" else overlap


def _check_experts(
    transformer: SpacetimeTransformer | None, low_noise: SpacetimeTransformer | None, boundary: float | None
) -> None:
    """Checks the network for low noise levels.

    Raises:
        ValueError: It has another config than the Transformer, or the boundary between them is missing.
    """
    if low_noise is None:
        return
    if boundary is None:
        raise ValueError("transformer_2 needs boundary_ratio, the noise level below which it is used")
    check_number("boundary_ratio", boundary, 0, maximum=1)
    configs = [
        {name: list(value) if isinstance(value, tuple) else value for name, value in network.config.items()}
        for network in (transformer, low_noise)
        if network is not None
    ]
    wrong = sorted(name for name in configs[0] if name[:1] != "_" and configs[0][name] != configs[-1][name])
    if transformer is None or wrong:
        raise ValueError(
            f"transformer_2 must have the config of transformer; see {wrong[0] if wrong else 'transformer'}"
        )


def _one_per_video(prompt: Any, video: Any) -> Any:
    """The prompt; for several videos without one, `None` for each."""
    return [None] * len(video) if prompt is None and is_batch(video) else prompt


def _custom_steps(timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> dict[str, Sequence[float]]:
    """The custom timesteps or noise levels, by name.

    Raises:
        ValueError: Both are given, or one is not a list of numbers.
    """
    given = {"timesteps": timesteps, "sigmas": sigmas}
    custom = {name: values for name, values in given.items() if values is not None}
    if len(custom) == 2:
        raise ValueError("pass timesteps or sigmas, not both")
    for name, values in custom.items():
        if isinstance(values, (str, bytes)) or not hasattr(values, "__len__") or not len(values):
            raise ValueError(f"{name} must be a non-empty list of numbers, got {shown(values)}")
        for value in values:
            check_number(f"each of {name}", value, 0)
    return custom


def _check_size(height: Any, width: Any) -> None:
    """Checks the types of the sides of a video where they are given.

    Raises:
        ValueError: One is not an integer.
    """
    for name, side in (("height", height), ("width", width)):
        if side is not None:
            check_integer(name, side)


def _count(prompt: Any, prompt_embeds: Tensor | None) -> int:
    """Number of prompts.

    Raises:
        ValueError: There are none.
    """
    if prompt is None and prompt_embeds is None:
        raise ValueError("pass either prompt or prompt_embeds, not both")
    if prompt is not None:
        check_prompts(prompt)
    rows: Any = prompt_embeds if prompt is None else [prompt] if isinstance(prompt, str) else prompt
    return len(rows)
