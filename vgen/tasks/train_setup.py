"""What the parts of a plan of `vgen train` have in common: options, preset, machine, videos, clips and networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from vgen.checks import check_choice, check_integer, check_number
from vgen.hub import locate
from vgen.models.image_vae import vae_config
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.unet import UNet3D
from vgen.pipeline import VideoGenPipeline
from vgen.tasks.train_machine import Machine
from vgen.tasks.train_options import TrainOptions
from vgen.tasks.train_videos import Videos
from vgen.temporal.grid import LatentGrid
from vgen.training.needs import ClipShape

SMALL = 1000
"""Number of clips, end to end, below which training stops early."""


@dataclass
class Codec:
    """The VAE of a run: its arguments, its compression and its channels."""

    source: str | None
    """A pretrained one; `None` if the run trains it."""
    model: dict[str, Any]

    @property
    def time(self) -> int:
        """Frames per latent frame, the first one excepted."""
        return 2 ** sum(self.model.get("temperal_downsample", []))

    @property
    def space(self) -> int:
        """Pixels per latent along height and width."""
        return 2 ** (len(self.model["dim_mult"]) - 1) * (self.model.get("patch_size") or 1)

    @property
    def channels(self) -> int:
        """Channels of latents."""
        return self.model["z_dim"]


@dataclass(kw_only=True)
class Setup:
    """What a plan is made from."""

    options: TrainOptions
    preset_name: str
    preset: dict[str, Any]
    """As `read_preset` returns it."""
    machine: Machine
    changes: dict[str, dict[str, Any]]
    """Settings of `--set` by stage."""
    codec: Codec
    pipe: dict[str, Any] | None
    """The pipeline to fine-tune, as `read_pipeline` returns it."""
    videos: Videos
    clip: ClipShape
    frame_rate: float
    """Frame rate of training clips in frames per second."""
    record: dict[str, Any]
    """What `plan.json` has about the stages that have begun."""

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.options.output

    @property
    def captioned(self) -> bool:
        """Whether videos have captions, as far as that is known."""
        return self.videos.num_captioned > 0 or self.videos.is_stream

    @property
    def trains_text(self) -> bool:
        """Whether the run trains a text encoder of its own."""
        return self.captioned and self.pipe is None and self.options.text_encoder is None

    def is_trained(self, stage: str) -> bool:
        """Whether the run trains this network."""
        return stage == "denoiser" or self.codec.source is None

    @property
    def is_small(self) -> bool:
        """Whether there are so few clips that a network learns them by heart."""
        return (
            not self.videos.is_stream
            and self.videos.num_clips(self.clip, self.frame_rate, self.clip.num_frames) < SMALL
        )

    @property
    def limit(self) -> float:
        """Seconds that the whole run may take."""
        return 60.0 * (self.options.minutes or self.preset["minutes"])

    def wanted(self, stage: str, name: str) -> Any:
        """A setting of a stage: that of `--set`, or else of the preset."""
        return self.changes.get(stage, {}).get(name, self.preset.get(stage, {}).get(name))

    def changes_of(self, stage: str) -> dict[str, Any]:
        """The settings of `--set` for the commands of a stage; the denoiser's `model` is completed elsewhere."""
        changes = self.changes.get(stage, {})
        return {name: value for name, value in changes.items() if (stage, name) != ("denoiser", "model")}

    @property
    def num_inference_steps(self) -> int:
        """Denoising steps of a video."""
        own = (self.pipe or {}).get("num_inference_steps")
        return own or self.wanted("denoiser", "num_inference_steps")

    @property
    def compares_one_step(self) -> bool:
        """Whether the evaluation is repeated with one denoising step, which predicts the mean of what may follow."""
        return self.num_inference_steps > 1 and "num_inference_steps" not in self.changes.get("evaluation", {})

    @property
    def denoiser_model(self) -> dict[str, Any]:
        """Arguments of the denoiser."""
        if self.pipe is not None:
            return self.pipe["model"]
        channels = {"in_channels": self.codec.channels, "out_channels": self.codec.channels}
        changes = self.changes.get("denoiser", {})
        own = {} if "denoiser" in changes else self.preset["denoiser"]["model"]
        return channels | {"keyframe_slots": self.codec.time} | own | changes.get("model", {})

    @property
    def pretrained_text(self) -> str | None:
        """The pretrained text encoder that embeds the captions."""
        return (self.options.text_encoder or self.options.init) if self.captioned else None

    @property
    def text_length(self) -> int:
        """Tokens per prompt."""
        if self.pipe is not None:
            return self.pipe["max_sequence_length"]
        return self.wanted("denoiser", "max_sequence_length") or 32

    @property
    def text_dim(self) -> int:
        """Channels of the prompts' embeddings."""
        if self.pipe is not None:
            return self.denoiser_model.get("text_dim") or self.denoiser_model["cross_attention_dim"]
        source = self.options.text_encoder
        return self.preset["text"]["dim"] if source is None else text_config(source).hidden_size


def choose_codec(options: TrainOptions, preset: Mapping[str, Any], changes: Mapping[str, Any]) -> Codec:
    """The VAE of a run: a pretrained one by its config, or the preset's."""
    source = options.vae or options.init
    if source is None:
        return Codec(None, changes.get("vae", {}).get("model", preset["vae"]["model"]))
    config = vae_config(source)
    if "temperal_downsample" not in config:
        advice = "pass --vae with" if options.vae else "pass --from with a model that has"
        raise ValueError(
            f"{source} has an {config['_class_name']}, which vgen train does not support: {advice} a CausalVideoVAE "
            "or an AutoencoderKLWan, or leave it out to train one"
        )
    return Codec(source, {name: value for name, value in config.items() if not name.startswith("_")})


def read_pipeline(source: str) -> dict[str, Any]:
    """Defaults of a pipeline, and the kind (`denoiser`) and arguments (`model`) of its denoiser, from its configs."""
    place = locate(source)
    index = VideoGenPipeline.load_config(place)
    kind = "unet" if index.get("unet", [None])[0] else "transformer"
    network = UNet3D if kind == "unet" else SpacetimeTransformer
    model = {name: value for name, value in network.load_config(place, subfolder=kind).items() if name[0] != "_"}
    defaults = {name: value for name, value in index.items() if not name.startswith("_")}
    return {"max_sequence_length": 512, **defaults, "denoiser": kind, "model": model}


def text_config(source: str) -> Any:
    """The config of a text encoder."""
    return AutoConfig.from_pretrained(locate(source), subfolder="text_encoder")


def clip_of(pipe: Mapping[str, Any]) -> dict[str, Any]:
    """The clips that a pipeline makes by default."""
    return {name: pipe[name] for name in ("height", "width", "num_frames", "frame_rate") if pipe.get(name)}


def choose_shape(
    preset: Mapping[str, Any],
    pipe: Mapping[str, Any] | None,
    changes: Mapping[str, Any],
    codec: Codec,
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """`height`, `width`, `num_frames` and `frame_rate` of training clips; those of a run that has begun are kept.

    Raises:
        ValueError: A change has an unknown name, is not a positive number, or comes too late.
    """
    shape = dict(preset["clip"]) | (clip_of(pipe) if pipe else {})
    for name, value in changes.items():
        check_choice("the setting of --set clip", name, tuple(shape))
        if name == "frame_rate":
            check_number("--set clip.frame_rate", value, above=0)
        else:
            check_integer(f"--set clip.{name}", value, 5 if name == "num_frames" else 1)
    shape |= changes
    shape["num_frames"] = LatentGrid(codec.time).nearest(shape["num_frames"])
    if "data" in record:
        begun = {name: record["data"]["commands"][0]["settings"][name] for name in shape}
        late = [name for name in changes if begun[name] != shape[name]]
        if late:
            raise ValueError(
                f"the run was begun with {late[0]}={begun[late[0]]}: choose another --output to change it"
            )
        return begun
    return shape


def check_fine_tuning(options: TrainOptions, pipe: Mapping[str, Any], videos: Videos) -> None:
    """Checks that a model can be fine-tuned on these videos.

    Raises:
        ValueError: It cannot.
    """
    model = pipe["model"]
    if pipe.get("boundary_ratio") is not None:
        reason = "has two Transformers"
    elif pipe.get("expand_timesteps") or (model.get("out_channels") or model["in_channels"]) != model["in_channels"]:
        reason = "makes videos from images"
    else:
        reason = ""
    if reason:
        raise ValueError(
            f"{options.init} {reason}, which vgen train does not plan: use pipelines/encode_latents.py and "
            "train/train_vdm.py, as docs/public_weights.md shows"
        )
    if videos.num_captioned and not pipe.get("text_encoder", [None])[0]:
        raise ValueError(f"{options.init} has no text encoder, but videos have captions: pass videos without captions")
    divided = pipe["denoiser"] == "unet" or pipe["model"].get("attention") == "divided"
    if options.train_only == "temporal" and not divided:
        raise ValueError(
            f"{options.init} attends to space and time jointly, so it has no temporal layers: pass --train-only lora"
        )
