"""Conversion between files of public weights and pipeline folders."""

from __future__ import annotations

import inspect
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
from transformers import AutoConfig, AutoModelForTextEncoding

from vgen.checks import check_choice
from vgen.hub import locate
from vgen.io.atomic import atomic_directory, atomic_file
from vgen.io.errors import loading
from vgen.io.records import read_json
from vgen.models.convert.files import LORA_CONTAINER, Weights, read_pickle, unwrap
from vgen.models.convert.names import Network, from_original, kind_of, to_original
from vgen.models.convert.networks import WAN_PIPELINES, from_wan_index
from vgen.models.convert.presets import CheckpointPreset
from vgen.models.loading import PICKLED, shorten
from vgen.models.lora import lora_to_original, merge_lora
from vgen.models.single_file import cast, check_weights, config_of, read_single_file
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.vae import CausalVideoVAE

_SHARD = "2GB"
"""Most memory that weights take while they are written."""
_WEIGHTS = {"text_encoder": "model"}
"""Names of files of weights, other than `diffusion_pytorch_model`."""
_ORIGINAL_FILES = {
    "transformer": "diffusion_pytorch_model", "vae": "Wan2.1_VAE", "text_encoder": "models_t5_umt5-xxl-enc",
}  # fmt: skip
_EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
"""Folders of the two Transformers in the original repositories of Wan 2.2 A14B."""


def convert_file(
    file: Path,
    base: str,
    output: Path,
    preset: CheckpointPreset | None = None,
    component: str | None = None,
    container: str | None = None,
    dtype: torch.dtype | None = None,
    lora: Path | None = None,
) -> None:
    """Makes a pipeline folder from the weights of one network, atomically.

    All else is that of a pipeline of the same family; on the same disk its files are linked, not copied. A pickled
    file is read with `weights_only=True`, which runs no code.

    Args:
        file: `.pt`, `.pth`, `.safetensors`, or the index of several, with the weights of a Transformer, a VAE or a
            text encoder.
        base: The pipeline: a folder or Hub id.
        output: The folder to write.
        preset: How to sample with a Transformer; by default as the base does.
        component: Which component the weights replace; by default the one that they are for. `transformer_2` is the
            other Transformer.
        container: The entry of the file that has the weights; by default the first that `unwrap` finds.
        dtype: Data type of the written weights; by default that of the file.
        lora: File of a LoRA that is added to the weights of a Transformer.

    Raises:
        ValueError: The weights are quantized, or not those of a network of this preset and base.
    """
    if file.suffix == ".gguf":
        raise ValueError(f"{file} is quantized: load it with SpacetimeTransformer.from_single_file")
    content = read_pickle(file) if file.suffix in PICKLED else read_single_file(file)
    weights = unwrap(content, str(file), container)
    kind = kind_of(weights)
    component = component or kind
    check_choice("component", component, ("transformer", "transformer_2") if kind == "transformer" else (kind,))
    if preset is not None and kind != "transformer":
        raise ValueError(f"{file} has the weights of a {kind}, and a preset is for those of a Transformer")
    folder = _base_folder(base, {component} if preset is None else {component, "scheduler"})
    index = _index_of(folder)
    if index.get(component, [None])[0] is None:
        raise ValueError(f"--base {folder} has no {component} that {file} could replace")
    weights = from_original(kind, weights)
    name = f"{component} in {file}"
    network = _checked_network(kind, weights, name, folder / component, preset)
    if lora is not None:
        if kind != "transformer":
            raise ValueError(f"--lora is for Transformers, and {file} has the weights of a {kind}")
        merge_lora(weights, _lora_of(lora), network)
    kept = network._keep_in_fp32_modules or ()
    replaced = {component}
    with atomic_directory(output) as partial:
        if preset is not None:
            settings = dict(preset.scheduler)
            scheduler = getattr(diffusers, settings.pop("class"))(**settings)
            scheduler.save_pretrained(partial / "scheduler")
            index["scheduler"] = ["diffusers", type(scheduler).__name__]
            index |= preset.pipeline | {"rollout_defaults": preset.rollout}
            replaced.add("scheduler")
        for part, entry in index.items():
            if isinstance(entry, list) and isinstance(entry[0], str) and part not in replaced:
                shutil.copytree(folder / part, partial / part, copy_function=_link)
        (partial / component).mkdir()
        if kind == "transformer":
            network.save_config(partial / component)
        else:
            shutil.copy2(folder / component / "config.json", partial / component)
        _write(weights, partial / component, _WEIGHTS.get(kind, "diffusion_pytorch_model"), dtype, kept)
        (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def convert_lora(file: Path, output: Path) -> None:
    """Writes a LoRA with the original names of Wan, which ComfyUI reads, atomically.

    Args:
        file: The LoRA with diffusers' names.
        output: The `.safetensors` file to write.

    Raises:
        ValueError: The file is malformed, or has other names.
    """
    with loading(file):
        weights = lora_to_original(file)
    with atomic_file(output) as partial:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, partial)


def _lora_of(file: Path) -> Path | Weights:
    """A safetensors file of a LoRA, or the weights in the entry `generator_lora` of a pickled one."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    return unwrap(read_pickle(file), str(file), LORA_CONTAINER) if file.suffix in PICKLED else file


def convert_back(pipe: Any, output: Path, layout: str, dtype: torch.dtype | None = None) -> None:
    """Writes a pipeline for other programs, atomically.

    Args:
        pipe: The `VideoGenPipeline`.
        output: The folder to write.
        layout: `diffusers`, a folder of a Wan pipeline; or `original`, safetensors with the names of the original
            repositories, which ComfyUI reads, too.
        dtype: Data type of the written weights; by default that of each network.

    Raises:
        ValueError: A network has layers that the other layout does not have.
    """
    check_choice("layout", layout, ("diffusers", "original"))
    back = pipe.to_diffusers(shared=True)
    if layout == "diffusers":
        with atomic_directory(output) as partial:
            (back if dtype is None else back.to(dtype=dtype)).save_pretrained(partial)
        return
    parts = {name: getattr(back, name, None) for name in (*_ORIGINAL_FILES, "transformer_2")}
    with atomic_directory(output) as partial:
        for name, network in parts.items():
            if network is None:
                continue
            kind: Any = "transformer" if name == "transformer_2" else name
            weights = dict(network.state_dict())
            weights.pop("encoder.embed_tokens.weight", None)  # the same as `shared`
            renamed = to_original(kind, weights)
            _check_original(kind, network, weights, renamed)
            folder = partial / _EXPERTS[name] if parts["transformer_2"] is not None and name in _EXPERTS else partial
            folder.mkdir(exist_ok=True)
            _write(renamed, folder, _ORIGINAL_FILES[kind], dtype, ())


def _check_original(kind: Network, network: Any, weights: Weights, renamed: Weights) -> None:
    """Checks that a network has the layers of the original one.

    Raises:
        ValueError: It has others.
    """
    wrong = [
        ours
        for ours, theirs in zip(weights, renamed, strict=True)
        if ours == theirs and not ours.startswith(("patch_embedding.", "fps_embedding."))
    ]
    if kind == "vae" and (network.config.num_res_blocks != 2 or len(network.config.dim_mult) != 4):
        wrong = ["other numbers of blocks than 2 in 4 levels"]
    if wrong or from_original(kind, renamed).keys() != weights.keys():
        raise ValueError(f"the original layout of a {kind} does not have {shorten(wrong)}")


def _base_folder(base: str, replaced: set[str]) -> Path:
    place = locate(base)
    if isinstance(place, Path):
        return place
    with loading(place):
        skipped = [f"{part}/*.safetensors" for part in replaced]
        return Path(snapshot_download(place, allow_patterns=["*.json", "*/*"], ignore_patterns=[*skipped, "*.bin"]))


def _index_of(folder: Path) -> dict[str, Any]:
    """The `model_index.json` of a pipeline of this package with the components of another one.

    Raises:
        ValueError: The folder has no pipeline of this family.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise ValueError(f"--base {folder} must be the folder of a pipeline: it has no model_index.json")
    index = read_json(path)
    if index.get("_class_name") in WAN_PIPELINES:
        return from_wan_index(index)
    if index.get("_class_name") != "VideoGenPipeline":
        raise ValueError(f"--base {folder} must be a pipeline of Wan or of vgen, got a {index.get('_class_name')}")
    return index


def _checked_network(kind: Network, weights: Weights, name: str, folder: Path, preset: CheckpointPreset | None) -> Any:
    """The network of these weights, without memory for them.

    Raises:
        ValueError: The weights do not fit. The error names what is wrong.
    """
    network: Any
    with init_empty_weights():
        if kind == "transformer":
            network = _network_of(weights, name, folder, preset)
        elif kind == "vae":
            network = CausalVideoVAE.from_config(CausalVideoVAE.load_config(folder))
        else:
            network = AutoModelForTextEncoding.from_config(AutoConfig.from_pretrained(folder))
    expected = network.state_dict()
    if kind == "text_encoder" and "encoder.embed_tokens.weight" not in weights:
        expected.pop("encoder.embed_tokens.weight", None)  # the same as `shared`
    check_weights(weights, expected, name)
    return network


def _network_of(weights: Weights, name: str, folder: Path, preset: CheckpointPreset | None) -> SpacetimeTransformer:
    """The Transformer of these weights, without memory for them.

    The sizes are those of the weights; the base has the size of a head, which no weight shows, and without a preset
    all other settings.

    Raises:
        ValueError: The sizes are not those of the preset, or not those of the base.
    """
    path = folder / "config.json"
    accepted = inspect.signature(SpacetimeTransformer.__init__).parameters
    of_base = {key: value for key, value in (read_json(path) if path.is_file() else {}).items() if key in accepted}
    known = {"head_dim": of_base["attention_head_dim"]} if "attention_head_dim" in of_base else {}
    config = config_of(SpacetimeTransformer, weights, name, **known)
    if preset is not None:
        of_base.pop("inject_sample_info", None)  # the base is of the same family, but may lack these layers
    for source, expected in (("the preset has", {} if preset is None else preset.network), ("--base has", of_base)):
        wrong = [
            f"{key}={config[key]}, and {source} {expected[key]}"
            for key in config
            if key in expected and expected[key] != config[key]
        ]
        if wrong:
            raise ValueError(f"{name} has {'; '.join(wrong)}")
    settings = config | preset.denoiser if preset is not None else of_base | config
    with init_empty_weights():
        return SpacetimeTransformer(**settings)


def _write(weights: Weights, folder: Path, name: str, dtype: torch.dtype | None, kept: Collection[str]) -> None:
    """Writes weights shard by shard, so that one shard is in memory at a time; `kept` modules stay in float32."""
    split = split_torch_state_dict_into_shards(
        weights, filename_pattern=name + "{suffix}.safetensors", max_shard_size=_SHARD
    )
    with tqdm(total=len(weights), unit="weight") as bar:
        for file, names in split.filename_to_tensors.items():
            shard = {name: weights[name].contiguous() for name in names}
            save_file(shard if dtype is None else cast(shard, dtype, kept), folder / file, metadata={"format": "pt"})
            bar.update(len(names))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _link(source: str, target: str) -> None:
    """Makes a hard link to a file, or a copy on another disk."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
