"""Converts a file of public weights to a pipeline folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm.auto import tqdm

from vgen.hub import locate
from vgen.io.atomic import atomic_directory
from vgen.io.errors import loading
from vgen.io.records import read_json
from vgen.models.convert.files import Weights, read_pickle, unwrap
from vgen.models.convert.networks import from_wan_index
from vgen.models.convert.presets import CheckpointPreset
from vgen.models.loading import PICKLED
from vgen.models.single_file import cast, check_weights, config_of, read_single_file, with_our_names
from vgen.models.transformer import SpacetimeTransformer

WEIGHTS = "diffusion_pytorch_model"
_SHARD = "2GB"
"""Most memory that weights take while they are written."""
_SHARED = ("text_encoder", "tokenizer", "vae")


def convert_file(
    file: Path,
    base: str,
    preset: CheckpointPreset,
    output: Path,
    container: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Makes a pipeline folder from the weights of a Transformer, atomically.

    The text encoder, the tokenizer and the VAE are those of a pipeline of the same family; on the same disk their
    files are linked, not copied. A pickled file is read with `weights_only=True`, which runs no code.

    Args:
        file: `.pt`, `.pth`, `.safetensors`, or the index of several.
        base: The pipeline: a folder or Hub id.
        preset: How to sample.
        output: The folder to write.
        container: The entry of the file that has the weights; by default the first that `unwrap` finds.
        dtype: Data type of the written weights; by default that of the file.

    Raises:
        ValueError: The weights are quantized, or not those of a Transformer of this preset and base.
    """
    if file.suffix == ".gguf":
        raise ValueError(f"{file} is quantized: load it with SpacetimeTransformer.from_single_file")
    folder = _base_folder(base)
    index = _index_of(folder)
    name = f"SpacetimeTransformer in {file}"
    content = read_pickle(file) if file.suffix in PICKLED else read_single_file(file)
    weights = with_our_names(SpacetimeTransformer, unwrap(content, str(file), container), name)
    config = _config_of(weights, name, folder, preset)
    with init_empty_weights():
        network = SpacetimeTransformer(**config | preset.denoiser)
    check_weights(weights, network.state_dict(), name)
    settings = dict(preset.scheduler)
    scheduler = getattr(diffusers, settings.pop("class"))(**settings)
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    with atomic_directory(output) as partial:
        network.save_config(partial / "transformer")
        _write(weights, partial / "transformer", dtype, network._keep_in_fp32_modules or ())
        scheduler.save_pretrained(partial / "scheduler")
        for part in _SHARED:
            shutil.copytree(folder / part, partial / part, copy_function=_link)
        index |= preset.pipeline | {"rollout_defaults": preset.rollout}
        (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _base_folder(base: str) -> Path:
    place = locate(base)
    if isinstance(place, Path):
        return place
    with loading(place):
        return Path(snapshot_download(place, allow_patterns=["*.json", *(f"{part}/*" for part in _SHARED)]))


def _index_of(folder: Path) -> dict[str, Any]:
    """The `model_index.json` for a pipeline with the components of another one.

    Raises:
        ValueError: The folder has no pipeline of this family.
    """
    missing = [name for name in ("model_index.json", *_SHARED) if not (folder / name).exists()]
    if missing:
        raise ValueError(f"--base {folder} must be the folder of a pipeline of Wan 2.1 text to video: no {missing[0]}")
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") == "WanPipeline":
        return from_wan_index(index)
    names = ("_class_name", "_diffusers_version", "text_encoder", "tokenizer", "vae", "transformer")
    return {name: index[name] for name in names if name in index}


def _config_of(weights: Weights, name: str, folder: Path, preset: CheckpointPreset) -> dict[str, Any]:
    """The sizes of the network; the base has the size of a head, which no weight shows.

    Raises:
        ValueError: They are not those of the preset, or not those of the base.
    """
    path = folder / "transformer" / "config.json"
    of_base = read_json(path) if path.is_file() else {}
    known = {"head_dim": of_base["attention_head_dim"]} if "attention_head_dim" in of_base else {}
    config = config_of(SpacetimeTransformer, weights, name, **known)
    for source, expected in (("the preset has", preset.network), ("--base has", of_base)):
        wrong = [
            f"{key}={config[key]}, and {source} {expected[key]}"
            for key in config
            if key in expected and expected[key] != config[key]
        ]
        if wrong:
            raise ValueError(f"{name} has {'; '.join(wrong)}")
    return config


def _write(weights: Weights, folder: Path, dtype: torch.dtype | None, kept: Collection[str]) -> None:
    """Writes weights shard by shard, so that one shard is in memory at a time; `kept` modules stay in float32."""
    split = split_torch_state_dict_into_shards(
        weights, filename_pattern=WEIGHTS + "{suffix}.safetensors", max_shard_size=_SHARD
    )
    with tqdm(total=len(weights), unit="weight") as bar:
        for file, names in split.filename_to_tensors.items():
            shard = {name: weights[name].contiguous() for name in names}
            save_file(shard if dtype is None else cast(shard, dtype, kept), folder / file, metadata={"format": "pt"})
            bar.update(len(names))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _link(source: str, target: str) -> None:
    """Makes a hard link to a file, or a copy on another disk."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
