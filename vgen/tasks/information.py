"""What `vgen info` and `vgen models` tell, as rows of tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vgen.data.video_io import video_info
from vgen.hub import find_checkpoint, packaged_checkpoints
from vgen.io.records import read_json
from vgen.models.convert.presets import read_presets
from vgen.sampling.options import RolloutOptions, help_of
from vgen.temporal.grid import LatentGrid

_MEANINGS = {
    "height": "Pixels.",
    "width": "Pixels.",
    "num_frames": "Frames of a video. The VAE compresses time by s, so a video has 1 + s*k frames.",
    "frame_rate": "Frames per second of the content.",
    "num_inference_steps": "Denoising steps: more take longer and change less and less.",
    "guidance_scale": "How strongly the prompt is followed; 1 turns guidance off.",
    "negative_prompt": "What to steer away from, if a command names nothing else.",
    "boundary_ratio": "Noise level below which transformer_2 takes over.",
    "guidance_scale_2": "How strongly the prompt is followed below that level.",
    "expand_timesteps": "Whether the first frame can be given as an image.",
    "rollout_defaults": "Defaults of rollouts and predictions that differ from the others.",
    "sigmas": "Noise levels of the steps that the checkpoint was trained for, before the scheduler's shift.",
    "tasks": "Trained for: text (vgen generate), leading (predict, animate, rollout), keyframes (interpolate).",
    "group_modes": "Which frames attend to which: full (all), causal (earlier ones), chunk (own and earlier chunks).",
    "trained_token_frames": "Longest training clip in token frames, the denoiser's units of time.",
    "trained_frame_rates": "Lowest and highest frame rate of the training clips.",
    "scheduler": "Noise levels, and the rule of a denoising step.",
    "vae": "Compresses videos to latents and decodes them.",
    "transformer": "The denoiser: it makes latents out of noise.",
    "transformer_2": "The denoiser for low noise levels.",
    "unet": "The denoiser: it makes latents out of noise.",
    "text_encoder": "Turns the prompt into embeddings that the denoiser reads.",
    "tokenizer": "Splits the prompt into the tokens that the text encoder knows.",
}
_OPTIONAL = (
    "rollout_defaults", "sigmas", "boundary_ratio", "guidance_scale_2", "expand_timesteps", "negative_prompt",
)  # fmt: skip
_DENOISER = ("tasks", "group_modes", "trained_token_frames", "trained_frame_rates", "chunk_size", "window", "sink")


def describe_pipeline(pipe: Any) -> list[tuple[str, str, str]]:
    """Name, value and meaning of a pipeline's defaults, capabilities and components."""
    values: dict[str, Any] = {name: pipe.config[name] for name in _MEANINGS if name in pipe.defaults}
    values |= {name: pipe.denoiser.config[name] for name in _DENOISER}
    values = {name: value for name, value in values.items() if value or name not in _OPTIONAL}
    if pipe.video_vae is not None and values["trained_token_frames"] is not None:
        frames = pipe.grid.num_frames(values["trained_token_frames"] * pipe.grid.patch_frames)
        values["trained_token_frames"] = f"{values['trained_token_frames']} ({frames} frames)"
    for name, component in pipe.components.items():
        if component is not None:
            values[name] = type(component).__name__ + _parameters(component)
    meanings = help_of(RolloutOptions) | _MEANINGS
    return [(name, _text(value), meanings[name]) for name, value in values.items()]


def describe_recognizer(network: Any) -> list[tuple[str, str, str]]:
    """Name, value and meaning of a recognizer's settings."""
    config = network.config
    return [
        ("name", config.name + _parameters(network), "The kind of network, and the number of its weights."),
        ("num_frames", str(config.num_frames), "Frames of a clip that it reads at once."),
        ("image_size", str(config.image_size), "Height and width of the frames, in pixels."),
        (
            "frame_rate",
            "unknown" if config.frame_rate is None else f"{config.frame_rate:g}",
            "Frames per second of the training clips.",
        ),
        ("multi_label", str(config.multi_label), "Whether a clip can have several labels."),
        ("labels", _text(network.labels), "What it can see."),
    ]


def describe_public() -> list[tuple[str, str, str, str, str]]:
    """Hub id, tasks, size of all weights, size and rate, and length of the public pipelines that load as they are."""
    rows = []
    for name, one in read_presets().items():
        if not name.startswith("wan"):
            continue
        if "pos_embed_seq_len" in one.network:
            tasks = "first and last frame to video"
        elif one.network["in_channels"] == 36:
            tasks = "image to video"
        else:
            tasks = "text or image to video" if one.pipeline.get("expand_timesteps") else "text to video"
        videos = "{width}x{height}, {frame_rate:g} fps".format(**one.pipeline)
        weights = "{weights:.1f} GiB".format(**one.needs)
        rows.append((one.base, tasks, weights, videos, str(one.pipeline["num_frames"])))
    return rows


def describe_video(path: Path) -> list[tuple[str, str]]:
    """Name and value of a video's properties, and of what it was made from.

    Raises:
        ValueError: It is not a readable video.
    """
    info = video_info(path)
    rate = "unknown" if info.frame_rate is None else f"{info.frame_rate:g} frames per second"
    rows = [("file", f"{info.num_frames} frames of {info.width}x{info.height}, {rate}, {info.codec}")]
    if info.scale > 1:
        height, width = info.content_size
        rows.append(("enlarged", f"{info.scale} times, from {width}x{height}"))
    if info.damage is not None:
        rows.append(("damage", info.damage))
    if not info.metadata:
        return [*rows, ("made with", "not stored in this file")]
    hidden = ("scale", "content_size")
    return [*rows, *((name, _text(value)) for name, value in info.metadata.items() if name not in hidden)]


def describe_packaged() -> list[tuple[str, ...]]:
    """Name, tasks, size of the files, resolution and lengths of each checkpoint in the package."""
    return [_describe_files(name) for name in packaged_checkpoints()]


def _describe_files(name: str) -> tuple[str, ...]:
    folder = Path(find_checkpoint(name))
    index = read_json(folder / "model_index.json")
    denoiser = next(part for part in ("transformer", "unet") if index.get(part, [None])[0] is not None)
    config = read_json(folder / denoiser / "config.json")
    vae = read_json(folder / "vae" / "config.json")
    grid = LatentGrid(vae["scale_factor_temporal"], config.get("patch_size", [1])[0])
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    tasks = {"text": "text to video", "leading": "prediction, animation, rollout", "keyframes": "interpolation"}
    longest = grid.num_frames(config["trained_token_frames"] * grid.patch_frames)
    return (
        name,
        ", ".join(tasks[task] for task in config["tasks"]),
        vae.get("training_data") or "unknown",
        f"{size:.0f} MB",
        f"{index['width']}x{index['height']}, {index['frame_rate']:g} fps",
        f"{index['num_frames']}, at most {longest}; any with rollout",
    )


def _parameters(component: Any) -> str:
    if not hasattr(component, "parameters"):
        return ""
    return f", {sum(one.numel() for one in component.parameters()) / 1e6:.2f}M parameters"


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
