"""VideoGenPipeline: from a sentence to a video, with diffusers' arguments and output types."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FasterCacheConfig, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders import BaseGuidance
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.utils import BaseOutput, logging, scale_lora_layers, unscale_lora_layers
from diffusers.video_processor import VideoProcessor
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vgen.coarse_to_fine import coarse_to_fine
from vgen.interpolation import UNTOLD_LIMIT, Interpolator, check_factor
from vgen.known_frames import KnownFrames, encode_known_frames, is_batch, place, to_clip, to_frames, to_pixels
from vgen.models.convert import from_wan_index
from vgen.models.image_vae import FrameByFrame, as_codec, load_vae
from vgen.models.loading import refuse_pickles
from vgen.models.lora import LoraLoaderMixin
from vgen.models.prompts import embed, is_single, is_told, known_words, tokenize, unknown_words, untold_as
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.unet import UNet3D
from vgen.models.vae import CausalVideoVAE
from vgen.rollout import SETTINGS_WITH_DEFAULTS, draw_noise, start_rollout
from vgen.temporal.attention import make_groups
from vgen.temporal.state import TemporalState

logger = logging.get_logger(__name__)

CHECKPOINTS = Path(str(resources.files("vgen"))) / "checkpoints"
PREFIX = "vgen/"


@dataclass
class VideoGenPipelineOutput(BaseOutput):
    """Videos: a list of lists of images, an array `(b, f, h, w, c)` in [0, 1], or a tensor `(b, f, c, h, w)`."""

    frames: Any


class VideoGenPipeline(DiffusionPipeline, LoraLoaderMixin):
    """Turns prompts into videos.

    Args:
        scheduler: Any diffusers scheduler that fits the denoiser's training.
        vae: Clips to latents and back, a 2D one frame by frame; without one the denoiser works on pixels.
        transformer: The denoiser, or
        unet: The denoiser.
        text_encoder: Any transformers text encoder; without one, prompts are given as embeddings.
        tokenizer: Its tokenizer.
        height: Default height of videos, in pixels.
        width: Default width, in pixels.
        num_frames: Default number of frames.
        frame_rate: Default pixel frames per second of the content.
        num_inference_steps: Default number of denoising steps.
        guidance_scale: Default weight of classifier-free guidance.
        max_sequence_length: Default length of prompts, in tokens.
        rollout_defaults: Defaults of `rollout` and `predict` that differ from those of single clips and of the
            denoiser: any of `num_inference_steps`, `guidance_scale`, `chunk_size`, `window`, `sink`, `history_noise`
            and `history_guidance_scale`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->unet->vae"
    _optional_components = ["vae", "transformer", "unet", "text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        scheduler: SchedulerMixin,
        vae: CausalVideoVAE | AutoencoderKL | None = None,
        transformer: SpacetimeTransformer | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        unet: UNet3D | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        frame_rate: float = 16.0,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        max_sequence_length: int = 512,
        rollout_defaults: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if transformer is not None and unet is not None:
            raise ValueError("a pipeline has one denoiser: give transformer or unet, not both")
        unknown = sorted(set(rollout_defaults or ()) - set(SETTINGS_WITH_DEFAULTS))
        if unknown:
            raise ValueError(f"rollout_defaults has {unknown}: possible are {', '.join(SETTINGS_WITH_DEFAULTS)}")
        self.register_modules(
            scheduler=scheduler,
            vae=vae,
            transformer=transformer,
            unet=unet,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(
            height=height,
            width=width,
            num_frames=num_frames,
            frame_rate=frame_rate,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            max_sequence_length=max_sequence_length,
            rollout_defaults=rollout_defaults or {},
        )
        codec = self.codec
        self.vae_scale_factor_temporal = 1 if codec is None else codec.temporal_compression_ratio
        self.vae_scale_factor_spatial = 1 if codec is None else codec.spatial_compression_ratio
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> VideoGenPipeline:
        """Loads a packaged checkpoint (`vgen/shapes-64`), a folder, or a Hub id, in this order.

        Folders of diffusers' `WanPipeline` (Wan 2.1 text to video) load too.

        Raises:
            ValueError: There is no such checkpoint, its weights are pickled, or they do not fit its config.
        """
        source = find_checkpoint(pretrained_model_name_or_path)
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError("use_safetensors must stay True: other weights are pickles, which can run code")
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)  # transformers would keep the file's half precision
        if isinstance(source, Path):
            for component in sorted(path for path in source.iterdir() if path.is_dir()):
                refuse_pickles(component)
            return super().from_pretrained(str(source), **kwargs)
        hub = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
        try:
            cls.load_config(source, **{name: kwargs[name] for name in hub if name in kwargs})  # refuse before loading
            return super().from_pretrained(source, **kwargs)
        except OSError as error:
            raise ValueError(f"{_not_found(source)}, and it could not be loaded from the Hub: {error}") from error

    @classmethod
    def from_stable_diffusion(
        cls,
        source: str | Path | DiffusionPipeline,
        *,
        num_frames: int = 16,
        frame_rate: float = 8.0,
        **unet: Any,
    ) -> VideoGenPipeline:
        """Inflates an image pipeline: every frame of a video is at first the image that it makes from the same noise.

        Args:
            source: A `StableDiffusionPipeline`, or the folder or Hub id of one (the layouts of 1.5 and 2.1). Its
                safety checker is left behind.
            num_frames: Default number of frames.
            frame_rate: Default pixel frames per second.
            unet: What the 2D network does not have, such as `group_modes` or `keyframe_slots`.

        Raises:
            ValueError: The layout is not served; the part is named.
        """
        given = isinstance(source, DiffusionPipeline)
        name = type(source).__name__ if given else DiffusionPipeline.load_config(str(source)).get("_class_name")
        if name != "StableDiffusionPipeline":
            raise ValueError(f"{source} holds a {name}: only a StableDiffusionPipeline can be inflated")
        images: Any = source
        if not given:
            parts = {"unet": None, "vae": load_vae(source), "safety_checker": None, "requires_safety_checker": False}
            images = DiffusionPipeline.from_pretrained(str(source), use_safetensors=True, **parts)
        network = UNet3D.from_unet2d(images.unet if given else source, None if given else "unet", **unet)
        size = network.config.sample_size
        sides = (size, size) if isinstance(size, int) else size
        if sides is None:
            raise ValueError("sample_size=None in this 2D U-Net: it does not tell what images it was trained on")
        height, width = (side * 2 ** (len(images.vae.config.block_out_channels) - 1) for side in sides)
        return cls(
            scheduler=images.scheduler,
            vae=images.vae,
            unet=network,
            text_encoder=images.text_encoder,
            tokenizer=images.tokenizer,
            height=height,
            width=width,
            num_frames=num_frames,
            frame_rate=frame_rate,
            num_inference_steps=50,
            guidance_scale=7.5,
            max_sequence_length=images.tokenizer.model_max_length,
        )

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Reads `model_index.json`, that of a `WanPipeline` as ours.

        Raises:
            ValueError: It belongs to another kind of pipeline, which is named.
        """
        index = super().load_config(pretrained_model_name_or_path, **kwargs)
        name = index.get("_class_name") if isinstance(index, dict) else cls.__name__
        if name == "WanPipeline":
            return from_wan_index(index)
        if name != cls.__name__:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {name}: served are {cls.__name__} and WanPipeline"
            )
        return index

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        *,
        image: Any = None,
        frames: Mapping[int, Any] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        frame_rate: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        groups: str | Sequence[int] = "full",
        guider: BaseGuidance | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
    ) -> Any:
        """Generates videos; whatever is `None` takes the checkpoint's default.

        Args:
            prompt: What to show.
            negative_prompt: What to steer away from; "" if not given.
            image: The first frame: a PIL image, an array `(h, w, 3)` or a tensor `(3, h, w)`, uint8 or in [0, 1]; a
                list has one for each prompt. The same as `frames={0: image}`.
            frames: Known frames by index, each as `image`; they come back at their places.
            height: In pixels; with known frames, theirs.
            width: In pixels.
            num_frames: All frames, `1 + s*k`.
            frame_rate: Pixel frames per second of the content, told to a denoiser that knows it.
            num_inference_steps: Denoising steps.
            guidance_scale: Weight of classifier-free guidance; off up to 1.
            num_videos_per_prompt: Videos for each prompt.
            generator: Source of the noise; a list has one for each video. A CPU generator gives the same video on
                every device.
            latents: Noise `(b, c, t, h, w)` to start from instead.
            prompt_embeds: `(b, l, d)` instead of `prompt`.
            negative_prompt_embeds: `(b, l, d)` instead of `negative_prompt`.
            groups: Which token frames see which: `full`, `causal`, `chunk`, or integers.
            guider: One of diffusers' guiders, instead of classifier-free guidance with `guidance_scale`; those that
                skip attention layers need one of `skip_layer_config` to do so by whole blocks.
            output_type: `np`, `pil`, `pt` or `latent`.
            return_dict: Whether to return a `VideoGenPipelineOutput` or a tuple.
            attention_kwargs: `{"scale": ...}` scales LoRA layers, the text encoder's too.
            callback_on_step_end: Called as `f(pipeline, step, timestep, tensors)`; what it returns replaces tensors.
            callback_on_step_end_tensor_inputs: Names of the tensors it gets.
            max_sequence_length: Length of prompts, in tokens.

        Raises:
            ValueError: An argument is not possible; the nearest legal one is named.
        """
        given = {} if image is None and frames is None else self._given_frames(image, frames, prompt, prompt_embeds)
        for one in given.values():
            height, width = height or one.shape[-2], width or one.shape[-1]
            if (height, width) != tuple(one.shape[-2:]):
                raise ValueError(
                    f"a known frame of {one.shape[-2]}x{one.shape[-1]} pixels does not fit a video of {height}x{width}"
                )
        height = self.config.height if height is None else height
        width = self.config.width if width is None else width
        num_frames = self.config.num_frames if num_frames is None else num_frames
        frame_rate = self.config.frame_rate if frame_rate is None else frame_rate
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
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
            callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if guider is not None and guidance_scale is not None:
            raise ValueError("give guidance_scale or guider, not both: the guider has a weight of its own")
        if guider is not None and isinstance(self.denoiser._cache_config, FasterCacheConfig):
            raise ValueError("FasterCache wants guidance in one batch, guiders do not: disable_cache() or no guider")
        self._guider = guider
        self._interrupt = False
        device, dtype = self._execution_device, self.denoiser.dtype

        known = self._encode_given(given, num_frames, num_videos_per_prompt)
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            negative_prompt,
            self.do_classifier_free_guidance,
            num_videos_per_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            max_sequence_length,
            device,
            dtype,
            (attention_kwargs or {}).get("scale"),
        )
        self.scheduler.set_timesteps(steps, device=device)
        latents = self.prepare_latents(
            prompt_embeds.shape[0], height, width, num_frames, torch.float32, device, generator, latents
        )
        latents = known.put_back(latents)
        token_frames = latents.shape[2] // self.denoiser.patch_size[0]
        num_known = known.placement.num_leading // self.denoiser.patch_size[0]
        generated = torch.arange(token_frames, device=device) >= num_known
        if isinstance(groups, str):
            groups = make_groups(groups, token_frames, num_known, self.denoiser.config.chunk_size)
        conditions: dict[str, Any] = {
            "frame_rate": frame_rate if self.denoiser.config.frame_rate_embedding else None,
            "keyframes": None if known.keyframes is None else known.keyframes.to(device, dtype),
            "groups": groups,
            "attention_kwargs": attention_kwargs,
        }
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)

        with self.progress_bar(total=steps) as bar:
            for index, timestep in enumerate(timesteps):
                if self._interrupt:
                    continue
                self._current_timestep = timestep
                if guider is not None:
                    guider.set_state(step=index, num_inference_steps=len(timesteps), timestep=timestep)
                latents = self.denoising_step(
                    latents,
                    timestep,
                    timestep * generated if num_known else timestep,
                    prompt_embeds,
                    negative_prompt_embeds,
                    generator,
                    known,
                    **conditions,
                )
                latents = known.put_back(latents)
                if callback_on_step_end is not None:
                    tensors: dict[str, Any] = {"latents": latents, "prompt_embeds": prompt_embeds}
                    tensors["negative_prompt_embeds"] = negative_prompt_embeds
                    asked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, index, timestep, asked) or {}
                    latents, prompt_embeds = known.put_back(tensors["latents"]), tensors["prompt_embeds"]
                    negative_prompt_embeds = tensors["negative_prompt_embeds"]
                if index == len(timesteps) - 1 or (index + 1) % self.scheduler.order == 0:
                    bar.update()
        self._current_timestep = None

        videos = latents if output_type == "latent" else self.decode_latents(latents, output_type, known)
        self.maybe_free_model_hooks()
        return VideoGenPipelineOutput(frames=videos) if return_dict else (videos,)

    @torch.no_grad()
    def rollout(
        self,
        prompt: str | Sequence[str | None] | Mapping[int, str] | None = None,
        video: Any = None,
        *,
        negative_prompt: str | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        frame_rate: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        chunk_size: int | None = None,
        window: int | None = None,
        sink: int | None = None,
        history_noise: float | None = None,
        history_guidance_scale: float | None = None,
        stride: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Any:
        """Continues a video, or begins one, chunk after chunk, in memory that does not grow.

        Whatever is `None` takes the checkpoint's default for rollouts (`rollout_defaults`), or else its own.

        Args:
            prompt: What to show; `{0: "...", 64: "..."}` changes it with the first chunk that begins at or behind new
                frame 64; a list makes several videos. None, also in a list, continues without being told what,
                unguided if all are so.
            video: Given frames to continue: an array `(f, h, w, 3)`, a tensor `(f, 3, h, w)` or a list of images,
                uint8 or in [0, 1]; a list of these, with a list of prompts or none; or an iterator over images, which
                is read frame by frame, however long it is (but whole with a stride). The first frames, if None, are
                generated.
            negative_prompt: What to steer away from.
            num_frames: New frames, any number; `None` never ends.
            height: In pixels; with a video, its own.
            width: In pixels; with a video, its own.
            frame_rate: Pixel frames per second of the content.
            num_inference_steps: Denoising steps a chunk.
            guidance_scale: Weight of classifier-free guidance; off up to 1.
            chunk_size: Token frames a chunk.
            window: Recent token frames that are remembered.
            sink: Token frames from the start that are never forgotten.
            history_noise: Noise level that generated frames are told to have when they are remembered.
            history_guidance_scale: Weight of what is remembered, against remembering it noisily; off at 1. Doubles the
                cost.
            stride: Coarse to fine: only every `stride`-th frame is rolled out, at a lower frame rate, and the others
                are interpolated, so that what is remembered reaches further back.
            generator: Source of the noise; a list has one for each video.

        Returns:
            A `Rollout` or, with a stride, a `CoarseToFine`: an iterator over new frames, uint8 `(n, h, w, 3)`, or
            `(b, n, h, w, 3)` for several videos.

        Raises:
            ValueError: The checkpoint cannot continue videos, or an argument is not possible.
        """
        begin = start_rollout if stride == 1 else partial(coarse_to_fine, stride=stride)
        return begin(
            self,
            _prompt_of_each(prompt, video),
            video,
            negative_prompt=negative_prompt,
            num_frames=num_frames,
            height=height,
            width=width,
            frame_rate=frame_rate,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            chunk_size=chunk_size,
            window=window,
            sink=sink,
            history_noise=history_noise,
            history_guidance_scale=history_guidance_scale,
            generator=generator,
        )

    @torch.no_grad()
    def predict(
        self,
        video: Any,
        num_frames: int = 16,
        prompt: str | Sequence[str | None] | Mapping[int, str] | None = None,
        *,
        output_type: str = "np",
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        """Continues a video: a `rollout`, gathered.

        Args:
            video: Given frames as in `rollout`.
            num_frames: New frames, any number; only these are returned.
            prompt: What to show; `None` continues without being told what, unguided.
            output_type: `np`, `pil` or `pt`.
            return_dict: Whether to return a `VideoGenPipelineOutput` or a tuple.
            options: Any other argument that `rollout` takes.

        Raises:
            ValueError: As `rollout` does.
        """
        _check_output_type(output_type)
        if video is None or num_frames is None:
            raise ValueError("a prediction needs a video to continue, and a number of new frames")
        rollout = self.rollout(prompt, video, num_frames=num_frames, **options)
        chunks = [chunk[None] if rollout.single else chunk for chunk in rollout]
        pixels = torch.from_numpy(np.concatenate(chunks, axis=1)).float() / 127.5 - 1
        videos = self.video_processor.postprocess_video(rearrange(pixels, "b f h w c -> b c f h w"), output_type)
        return VideoGenPipelineOutput(frames=videos) if return_dict else (videos,)

    @torch.no_grad()
    def interpolate(
        self,
        video: Any,
        factor: int = 2,
        prompt: str | Sequence[str | None] | None = None,
        *,
        negative_prompt: str | None = None,
        frame_rate: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> Any:
        """Makes the frames between given ones: `factor * (f - 1) + 1` in all, the given ones unchanged.

        Clips of any length are made window by window; each sees what was made before and the given frames ahead.

        Args:
            video: Given frames, two or more, as in `rollout`.
            factor: Given frames become every `factor`-th, 2 or more.
            prompt: What to show; `None` interpolates without being told what, unguided.
            negative_prompt: What to steer away from.
            frame_rate: Of the given frames, in frames per second; the result is told to have `factor` times as many.
            num_inference_steps: Denoising steps a window.
            guidance_scale: Weight of classifier-free guidance; off up to 1.
            generator: Source of the noise; a list has one for each video.
            output_type: `np`, `pil` or `pt`.
            return_dict: Whether to return a `VideoGenPipelineOutput` or a tuple.

        Raises:
            ValueError: The checkpoint cannot interpolate, or by less; or an argument is not possible.
        """
        _check_output_type(output_type)
        prompt = _prompt_of_each(prompt, video)
        clip = self.given_clip(video, prompt)
        make = self.interpolator(
            factor,
            prompt,
            size=(clip.shape[-2], clip.shape[-1]),
            negative_prompt=negative_prompt,
            frame_rate=frame_rate,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
        )
        whole = torch.cat([piece.cpu() for piece in make.stream([clip.to(self._execution_device)])], dim=2)
        self.maybe_free_model_hooks()
        videos = self.video_processor.postprocess_video(whole, output_type=output_type)
        return VideoGenPipelineOutput(frames=videos) if return_dict else (videos,)

    @torch.no_grad()
    def interpolator(
        self,
        factor: int = 2,
        prompt: str | Sequence[str | None] | None = None,
        *,
        size: tuple[int, int],
        negative_prompt: str | None = None,
        frame_rate: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        keep_given: bool = True,
    ) -> Interpolator:
        """What `interpolate` runs, for given frames that come one after another; it takes them when called.

        Args:
            factor: As in `interpolate`, like all that follow but `size`.
            prompt: What to show.
            size: Height and width of the frames, in pixels.
            negative_prompt: What to steer away from.
            frame_rate: Of the given frames.
            num_inference_steps: Denoising steps a window.
            guidance_scale: Weight of classifier-free guidance.
            generator: Source of the noise.
            keep_given: Whether given frames come back as they are. Otherwise they come as the VAE decodes them: no
                longer exact, but nothing jumps between them and their neighbours.

        Raises:
            ValueError: As `interpolate` does.
        """
        config = self.denoiser.config
        limit = config.trained_token_frames or UNTOLD_LIMIT
        check_factor(factor, self.vae_scale_factor_temporal, self.denoiser.patch_size[0], limit)
        self.check_tasks({"leading", "keyframes"})
        frame_rate = self.config.frame_rate if frame_rate is None else frame_rate
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        self.check_inputs(
            untold_as(prompt, "a video"), negative_prompt, *size, self.first_frames, frame_rate, steps, groups=(0,)
        )
        if guidance_scale is None:
            guidance_scale = self.config.guidance_scale if is_told(prompt) else 1.0
        embeds = self.encode_prompt(
            untold_as(prompt, ""),
            negative_prompt,
            guidance_scale > 1,
            device=self._execution_device,
            dtype=self.denoiser.dtype,
        )
        return Interpolator(
            self,
            factor,
            embeds,
            guidance_scale=guidance_scale,
            frame_rate=frame_rate * factor,
            num_inference_steps=steps,
            generator=generator,
            keep_given=keep_given,
        )

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """What `enable_xformers_memory_efficient_attention` and its opposite call: chooses the denoiser's attention.

        Raises:
            RuntimeError: xformers or CUDA is not there.
            ValueError: `attention_op` is given; xformers chooses its kernel.
        """
        self.denoiser.set_use_memory_efficient_attention_xformers(valid, attention_op)

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
        output_type: str = "np",
        callback_on_step_end_tensor_inputs: Sequence[str] = (),
    ) -> None:
        """Refuses what cannot be generated.

        Raises:
            ValueError: Says what was given, what is legal, and the nearest legal value.
        """
        _, p_h, p_w = self.denoiser.patch_size
        for name, side, patch in (("height", height, p_h), ("width", width, p_w)):
            unit = self.vae_scale_factor_spatial * patch
            if side < 1 or side % unit:
                nearest = max(unit, round(side / unit) * unit)
                raise ValueError(f"{name}={side} is not possible: give a multiple of {unit}; the nearest is {nearest}")
        self._check_num_frames(num_frames)
        if not frame_rate > 0:
            raise ValueError(f"frame_rate={frame_rate} is not possible: give frames per second above 0")
        text_dim = self.denoiser.text_dim
        if prompt_embeds is not None and (prompt_embeds.ndim != 3 or prompt_embeds.shape[-1] != text_dim):
            raise ValueError(f"prompt_embeds of shape {tuple(prompt_embeds.shape)}: give (b, l, {text_dim})")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps} is not possible: give 1 or more")
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds, and not both")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("give negative_prompt or negative_prompt_embeds, not both")
        if prompt is not None and (self.text_encoder is None or self.tokenizer is None):
            raise ValueError("this pipeline has no text encoder: give prompt_embeds instead of prompt")
        if prompt is not None and not prompt and not isinstance(prompt, str):
            raise ValueError("prompt is an empty list: give at least one prompt")
        for one in [prompt] if isinstance(prompt, str) else prompt or []:
            if not isinstance(one, str) or not one.strip():
                raise ValueError(f"a prompt must be a text that says something, not {one!r}")
        modes = self.denoiser.config.group_modes
        if isinstance(groups, str) and groups not in modes:
            raise ValueError(f"groups={groups!r}: this checkpoint was trained with {', '.join(modes)}")
        if output_type not in ("np", "pil", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} is unknown: give np, pil, pt or latent")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"callbacks can have {self._callback_tensor_inputs}, not {sorted(unknown)}")

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
        """Embeds prompts and, for guidance, what to steer away from, `(b * num_videos_per_prompt, l, d)` each.

        Warns of words that the checkpoint has never seen. `lora_scale` scales LoRA layers of the text encoder.

        Raises:
            ValueError: There are not as many negative prompts as prompts.
        """
        device = device or self._execution_device
        length = max_sequence_length or self.config.max_sequence_length
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
            self._warn_of_unknown_words(prompts)
            prompt_embeds = self._embed(prompts, length, device, dtype, lora_scale)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            if self.text_encoder is None:
                raise ValueError("without a text encoder, guidance needs negative_prompt_embeds (or guidance_scale=1)")
            count = prompt_embeds.shape[0]
            negatives = [negative_prompt or ""] * count if not isinstance(negative_prompt, list) else negative_prompt
            if len(negatives) != count:
                raise ValueError(f"{len(negatives)} negative prompts for {count} prompts: give one, or as many")
            negative_prompt_embeds = self._embed(negatives, prompt_embeds.shape[1], device, dtype, lora_scale)
        negative = negative_prompt_embeds
        if do_classifier_free_guidance and negative is not None and negative.shape != prompt_embeds.shape:
            raise ValueError(
                f"negative_prompt_embeds of shape {tuple(negative.shape)} do not go with prompt "
                f"embeddings of shape {tuple(prompt_embeds.shape)}: they must be the same"
            )

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
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise `(b, c, t, h, w)`, drawn on the CPU unless a generator lives elsewhere, as the scheduler begins with.

        Raises:
            ValueError: The number of generators or the shape of `latents` does not fit.
        """
        space, time = self.vae_scale_factor_spatial, self.vae_scale_factor_temporal
        channels = self.denoiser.config.in_channels
        shape = (batch_size, channels, (num_frames - 1) // time + 1, height // space, width // space)
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ValueError(f"latents of shape {tuple(latents.shape)} do not fit: these settings need {shape}")
        elif isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for {batch_size} videos: give one, or as many")
        noise = (draw_noise(shape, generator, dtype) if latents is None else latents).to(device=device, dtype=dtype)
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def denoising_step(
        self,
        latents: Tensor,
        timestep: Tensor,
        levels: Tensor,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        known: KnownFrames | None = None,
        **conditions: Any,
    ) -> Tensor:
        """Latents `(b, c, t, h, w)` after one step of the scheduler at `timestep`.

        Token frames are told to be at `levels`, in timesteps, one for all or `(n,)`; known ones are not scaled.
        """
        scaled = latents
        if hasattr(self.scheduler, "scale_model_input"):
            scaled = self.scheduler.scale_model_input(latents, timestep)
        if known is not None:
            scaled = known.put_back(scaled)
        prediction = self.predict_noise(scaled, levels, prompt_embeds, negative_prompt_embeds, **conditions)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if takes_generator else {}
        return self.scheduler.step(prediction, timestep, latents, return_dict=False, **options)[0]

    def denoise(
        self,
        noise: Tensor,
        num_inference_steps: int,
        embeds: tuple[Tensor, Tensor | None],
        generator: torch.Generator | list[torch.Generator] | None,
        known: KnownFrames | None = None,
        **conditions: Any,
    ) -> Tensor:
        """Latents `(b, c, t, h, w)` from noise, all steps at once; with what is known kept at level 0."""
        device = self._execution_device
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = noise.to(device) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        generated: Tensor | int = 1
        if known is not None:
            p_t = self.denoiser.patch_size[0]
            num_known = known.placement.num_leading // p_t
            generated = torch.arange(latents.shape[2] // p_t, device=device) >= num_known
            latents = known.put_back(latents)
        self.denoiser._reset_stateful_cache()  # a step cache must not compare with other latents' last step
        for timestep in self.scheduler.timesteps:
            self._current_timestep = timestep
            latents = self.denoising_step(
                latents, timestep, timestep * generated, *embeds, generator, known, **conditions
            )
            latents = latents if known is None else known.put_back(latents)
        self._current_timestep = None
        return latents

    def predict_noise(
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None = None,
        *,
        weak_state: TemporalState | None = None,
        history_guidance_scale: float = 1.0,
        **conditions: Any,
    ) -> Tensor:
        """The guided prediction, float32; classifier-free guidance has its rows in one batch, guiders one by one.

        With a `weak_state`, which remembers less of the same video than `state`, the prediction is also led away from
        what it would be with that: history guidance.

        Source: History-guided video diffusion, arXiv 2502.06764.
        """
        prediction = self._guided(latents, timestep, prompt_embeds, negative_prompt_embeds, conditions)
        if weak_state is None:
            return prediction
        conditions |= {"state": weak_state}
        weak = self._guided(latents, timestep, prompt_embeds, negative_prompt_embeds, conditions, context="weak_")
        return weak + history_guidance_scale * (prediction - weak)

    def _guided(
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None,
        conditions: dict[str, Any],
        context: str = "",
    ) -> Tensor:
        if self._guider is not None:
            return self._predict_with_guider(latents, timestep, prompt_embeds, negative_prompt_embeds, conditions)
        if not self.do_classifier_free_guidance or negative_prompt_embeds is None:
            return self._predict(f"{context}cond", latents, timestep, prompt_embeds, conditions)
        prompts = torch.cat([negative_prompt_embeds, prompt_embeds])
        keyframes = conditions.get("keyframes")
        conditions = conditions | {"keyframes": None if keyframes is None else torch.cat([keyframes, keyframes])}
        out = self._predict(f"{context}cond_uncond", torch.cat([latents, latents]), timestep, prompts, conditions)
        negative, positive = out.chunk(2)
        return negative + self.guidance_scale * (positive - negative)

    def _predict_with_guider(
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None,
        conditions: dict[str, Any],
    ) -> Tensor:
        guider: Any = self._guider
        rows = guider.prepare_inputs({"prompts": (prompt_embeds, negative_prompt_embeds)})
        for row in rows:
            guider.prepare_models(self.denoiser)
            name = getattr(row, guider._identifier_key)
            row.noise_pred = self._predict(name, latents, timestep, row.prompts, conditions)
            guider.cleanup_models(self.denoiser)
        return guider(rows)[0]

    def _predict(
        self, name: str, latents: Tensor, timestep: Tensor, prompts: Tensor, conditions: dict[str, Any]
    ) -> Tensor:
        """One evaluation; diffusers' step caches keep what they remember of one name apart from others.

        Raises:
            ValueError: FasterCache is enabled with keyframes or a state, which it cannot take half of.
        """
        whole = [name for name in ("keyframes", "state") if conditions.get(name) is not None]
        if whole and isinstance(self.denoiser._cache_config, FasterCacheConfig):
            raise ValueError(
                "FasterCache leaves half of the batch out, which keyframes, interpolation and rollouts do not allow: "
                "disable_cache(), or enable another one"
            )
        with self.denoiser.cache_context(name):
            out = self.denoiser(
                hidden_states=latents.to(self.denoiser.dtype),
                timestep=timestep.expand(latents.shape[0], *timestep.shape),
                encoder_hidden_states=prompts,
                return_dict=False,
                **conditions,
            )
        return out[0].float()

    def decode_latents(self, latents: Tensor, output_type: str, known: KnownFrames | None = None) -> Any:
        """Denormalised and decoded videos in the asked form, known frames as they were given."""
        if self.codec is not None:
            latents = self.codec.decode(self.codec.denormalize(latents).to(self.codec.dtype)).sample
        if known is not None:
            latents = known.paste(latents)
        return self.video_processor.postprocess_video(latents.float(), output_type=output_type)

    def decode_next(self, latents: Tensor, state: TemporalState) -> Tensor:
        """Pixels `(b, 3, f, h, w)` in [-1, 1] of the next latents of a stream, which without a VAE are the pixels."""
        if self.codec is None:
            return latents
        return self.codec.decode(self.codec.denormalize(latents).to(self.codec.dtype), state=state).sample

    @torch.no_grad()
    def decode_stream(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Yields the videos of latents from `output_type="latent"` piece by piece, uint8 `(b, n, h, w, c)`."""
        pieces: Iterable[Tensor] = [latents]
        if self.codec is not None:
            pieces = self.codec.decode_stream(self.codec.denormalize(latents).to(self.codec.dtype))
        for piece in pieces:
            yield to_frames(piece)

    @property
    def codec(self) -> CausalVideoVAE | FrameByFrame | None:
        """The VAE, a 2D one frame by frame."""
        return None if self.vae is None else as_codec(self.vae)

    @property
    def denoiser(self) -> SpacetimeTransformer | UNet3D:
        """The network that predicts.

        Raises:
            ValueError: There is none.
        """
        found = self.transformer if self.unet is None else self.unet
        if found is None:
            raise ValueError("this pipeline has no denoiser: it can encode prompts and nothing else")
        return found

    @property
    def guidance_scale(self) -> float:
        """Weight of classifier-free guidance in the running call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call guides, so that it needs negative prompts."""
        return self._guider is not None or self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Timesteps of the running call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """The running call's timestep."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to stop denoising."""
        return self._interrupt

    @property
    def first_frames(self) -> int:
        """Pixel frames of the first token frame."""
        return 1 + self.vae_scale_factor_temporal * (self.denoiser.patch_size[0] - 1)

    def given_clip(self, video: Any, prompt: Any) -> Tensor:
        """Given videos `(b, 3, f, h, w)` in [-1, 1], one for each of a sequence of prompts.

        Raises:
            ValueError: They are not as many as the prompts, or not of one length and size.
        """
        single = is_single(prompt)
        count = 1 if single else len(prompt)
        videos = [video] if single and not is_batch(video) else list(video)
        if len(videos) != count:
            raise ValueError(f"{len(videos)} videos for {count} prompts: give one for each")
        clips = [to_clip(one) for one in videos]
        if len({clip.shape for clip in clips}) > 1:
            raise ValueError("the videos of a batch must have one length and size")
        return torch.stack(clips)

    def _given_frames(
        self,
        image: Any,
        frames: Mapping[int, Any] | None,
        prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
    ) -> dict[int, Tensor]:
        """Known frames `(b, 3, h, w)` in [-1, 1] by index, one for each prompt.

        Raises:
            ValueError: There are none, two for one index, not as many as prompts, or of different sizes.
        """
        if image is not None and frames is not None and 0 in frames:
            raise ValueError("frame 0 is given twice: as image and in frames")
        if frames is not None and not frames:
            raise ValueError("frames is empty: give at least one known frame, or leave it out")
        given = ({} if image is None else {0: image}) | dict(frames or {})
        if prompt is None and prompt_embeds is None:
            raise ValueError("give either prompt or prompt_embeds, and not both")
        rows: Any = prompt_embeds if prompt is None else [prompt] if isinstance(prompt, str) else prompt
        count = len(rows)
        result: dict[int, Tensor] = {}
        for index, one in given.items():
            images = list(one) if isinstance(one, (list, tuple)) else [one] * count
            if len(images) != count:
                raise ValueError(f"{len(images)} images of frame {index} for {count} prompts: give one, or as many")
            pixels = [to_pixels(each) for each in images]
            sizes = sorted({f"{each.shape[-2]}x{each.shape[-1]}" for each in pixels})
            if len(sizes) > 1:
                raise ValueError(f"the images of frame {index} have different sizes: {', '.join(sizes)}")
            result[index] = torch.stack(pixels)
        return result

    def _encode_given(self, given: dict[int, Tensor], num_frames: int, num_videos_per_prompt: int) -> KnownFrames:
        """What the denoiser gets of known frames.

        Raises:
            ValueError: An index is out of range, or the checkpoint cannot use what is given.
        """
        layout = (self.vae_scale_factor_temporal, self.denoiser.patch_size[0])
        placement = place(given.keys(), num_frames, *layout)
        uses = {"leading": placement.num_leading > 0, "keyframes": bool(placement.slots)}
        self.check_tasks({task for task, used in uses.items() if used})
        device = self._execution_device
        pixels = {
            index: one.to(device).repeat_interleave(num_videos_per_prompt, dim=0) for index, one in given.items()
        }
        return encode_known_frames(pixels, num_frames, self.codec, *layout)

    def check_tasks(self, tasks: set[str]) -> None:
        """Refuses what the checkpoint was not trained for.

        Raises:
            ValueError: It names the missing tasks.
        """
        config, slots = self.denoiser.config, self.vae_scale_factor_temporal
        missing = sorted(tasks - set(config.tasks))
        if missing or ("keyframes" in tasks and config.keyframe_slots != slots):
            raise ValueError(
                f"this needs a checkpoint trained for {' and '.join(missing or ['keyframes'])}: this one "
                f"was trained for {', '.join(config.tasks)} and has {config.keyframe_slots} keyframe slots"
            )

    def _check_num_frames(self, num_frames: int) -> None:
        unit, first = self.vae_scale_factor_temporal * self.denoiser.patch_size[0], self.first_frames
        if num_frames < first or (num_frames - first) % unit:
            below = max(first, first + (num_frames - first) // unit * unit)
            nearest = below if num_frames <= below + unit / 2 else below + unit
            raise ValueError(
                f"num_frames={num_frames} is not possible: give {first} + {unit}*k; the nearest is {nearest}"
            )

    def _embed(
        self,
        prompts: Sequence[str],
        length: int,
        device: torch.device,
        dtype: torch.dtype | None,
        lora_scale: float | None,
    ) -> Tensor:
        assert self.text_encoder is not None
        ids, mask = tokenize(self.tokenizer, prompts, length)
        scaled = lora_scale is not None and getattr(self.text_encoder, "_hf_peft_config_loaded", False)
        if scaled:
            scale_lora_layers(self.text_encoder, lora_scale)
        embeds = embed(self.text_encoder, ids.to(device), mask.to(device))
        if scaled:
            unscale_lora_layers(self.text_encoder, lora_scale)
        return embeds.to(device=device, dtype=dtype)

    def _warn_of_unknown_words(self, prompts: Sequence[str]) -> None:
        words = dict.fromkeys(word for prompt in prompts for word in unknown_words(self.tokenizer, prompt))
        if words:
            logger.warning(
                f"this checkpoint has never seen: {', '.join(words)}. "
                f"The words it knows: {' '.join(known_words(self.tokenizer))}"
            )


def _prompt_of_each(prompt: Any, video: Any) -> Any:
    """The prompt; of several videos without one, `None` for each."""
    return [None] * len(video) if prompt is None and is_batch(video) else prompt


def _check_output_type(output_type: str) -> None:
    if output_type not in ("np", "pil", "pt"):
        raise ValueError(f"output_type={output_type!r} is unknown: give np, pil or pt")


def find_checkpoint(name: str | Path) -> Path | str:
    """The folder of a packaged checkpoint or of a path, or the Hub id.

    Raises:
        ValueError: The name can be neither, or its folder holds no pipeline.
    """
    text = str(name)
    packaged = find_packaged(text)
    if packaged is not None and (packaged / "model_index.json").is_file():
        return packaged
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{folder} holds no pipeline: it has no model_index.json")
        return folder
    if text.count("/") != 1 or text.startswith((PREFIX, ".", "/", "~")):
        raise ValueError(_not_found(text))
    return text


def find_packaged(name: str) -> Path | None:
    """The folder of what ships with the package under a name that begins with `vgen/`."""
    folder = CHECKPOINTS / name.removeprefix(PREFIX)
    return folder if name.startswith(PREFIX) and folder.is_dir() else None


def packaged_checkpoints() -> list[str]:
    """Names of the checkpoints that ship with the package."""
    return sorted(PREFIX + path.parent.name for path in CHECKPOINTS.glob("*/model_index.json"))


def _not_found(name: str) -> str:
    packaged = ", ".join(packaged_checkpoints()) or "none"
    return f"no model {name!r}: it is no packaged checkpoint ({packaged}) and no folder here ({Path.cwd()})"


# `DiffusionPipeline.from_pretrained` looks a pipeline's class up in the diffusers module
diffusers.VideoGenPipeline = VideoGenPipeline
# and downloads from the Hub only what it knows how to load
for _component in (CausalVideoVAE, SpacetimeTransformer, UNet3D):
    LOADABLE_CLASSES[_component.__module__] = {_component.__name__: ["save_pretrained", "from_pretrained"]}
