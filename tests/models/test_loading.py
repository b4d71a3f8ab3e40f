import json
import threading
import time

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from vgen.models.image_vae import load_vae
from vgen.models.prompts import check_text_encoder, load_text_encoder
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.unet import UNet3D
from vgen.models.vae import CausalVideoVAE

WEIGHTS = "diffusion_pytorch_model.safetensors"
KEYS = {"vae": "encoder.conv_in.weight", "transformer": "patch_embedding.weight", "unet": "conv_in.weight"}
MORE = {"vae": {"num_res_blocks": 2}, "transformer": {"num_layers": 3}, "unet": {"layers_per_block": 2}}
"""Settings that add layers."""


@pytest.fixture(params=KEYS)
def folder(request, tmp_path):
    """A saved network, in a folder named after its kind."""
    request.getfixturevalue(f"make_{request.param}")().save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def load(folder, **options):
    return {"vae": CausalVideoVAE, "transformer": SpacetimeTransformer, "unet": UNet3D}[folder.name].from_pretrained(
        folder, **options
    )


def change(folder, edit) -> None:
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def test_missing_key_is_named(folder):
    key = KEYS[folder.name]
    change(folder, lambda weights: weights.pop(key))
    with pytest.raises(ValueError, match=f"missing keys: {key}"):
        load(folder)


def test_unexpected_key_is_named(folder):
    change(folder, lambda weights: weights.update({"extra.weight": torch.ones(1)}))
    with pytest.raises(ValueError, match="unexpected keys: extra.weight"):
        load(folder)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_mismatched_shape_is_named(folder, low_cpu_mem_usage):
    if folder.name == "transformer" and not low_cpu_mem_usage:
        pytest.skip("diffusers raises another error if a part stays in float32")
    key = KEYS[folder.name]
    change(folder, lambda weights: weights.update({key: torch.ones(5, 3, 3, 3, 3)}))
    with pytest.raises((ValueError, RuntimeError), match=key):
        load(folder, low_cpu_mem_usage=low_cpu_mem_usage)


def test_a_config_with_more_layers_than_the_weights_is_an_error(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | MORE[folder.name]))
    with pytest.raises(ValueError, match="do not match its config|expected shape"):
        load(folder)


@pytest.mark.parametrize("value", [20_000, 10**9])
def test_a_config_of_a_much_larger_network_than_its_weights_is_an_error_at_once(folder, value):
    config, (name, before) = json.loads((folder / "config.json").read_text()), *MORE[folder.name].items()
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    assert before < 20_000
    begin = time.process_time()
    with pytest.raises(ValueError, match=rf"{folder / 'config.json'} describes a much larger .* {name}={value}$"):
        load(folder)
    assert time.process_time() - begin < 2


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_huge_sizes_in_a_config_allocate_nothing(folder, low_cpu_mem_usage, monkeypatch):
    """Also sizes of buffers, of which no weight tells, and those in lists."""
    config = json.loads((folder / "config.json").read_text())
    allocated = []
    monkeypatch.setattr(
        torch, "empty", lambda *size, make=torch.empty, **options: allocated.append(size) or make(*size)
    )
    for name, value in config.items():
        huge = [10**10, *value[1:]] if isinstance(value, list) and value and type(value[0]) is int else 10**10
        if type(value) is int or isinstance(huge, list):
            (folder / "config.json").write_text(json.dumps(config | {name: huge}))
            with pytest.raises(ValueError, match=rf"{folder / 'config.json'} .*: check {name}=10000000000$"):
                load(folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not allocated


def test_networks_of_other_threads_do_not_count(folder):
    """Only the thread that loads is stopped."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict.fromkeys(MORE[folder.name], 20_000)))
    done, errors = threading.Event(), []

    def make():
        while not done.is_set():
            try:
                torch.nn.ModuleList([torch.nn.Linear(1, 1) for _ in range(500)])
            except ValueError as error:
                errors.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    with pytest.raises(ValueError, match="much larger"):
        load(folder)
    done.set()
    thread.join()
    assert not errors


@pytest.mark.parametrize(("name", "value"), [("num_layers", 20_000), ("d_ff", 10**9), ("vocab_size", 10**9)])
def test_a_config_of_a_much_larger_text_encoder_is_an_error_at_once(tmp_path, name, value):
    sizes = {"vocab_size": 20, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    T5EncoderModel(T5Config(**sizes)).save_pretrained(tmp_path / "text_encoder")
    path = tmp_path / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    for check in (
        lambda: load_text_encoder(tmp_path),
        lambda: check_text_encoder(path.parent, "T5EncoderModel", None),
    ):
        with pytest.raises(ValueError, match=rf"{path} describes a much larger network .* {name}={value}$"):
            check()


def test_errors_of_networks_name_their_folder(folder):
    config = json.loads((folder / "config.json").read_text())
    wrong = {"vae": {"in_channels": 300}, "transformer": {"ffn_dim": 300}, "unet": {"norm_num_groups": 300}}
    (folder / "config.json").write_text(json.dumps(config | wrong[folder.name]))
    with pytest.raises(ValueError, match=f"^{folder}: "):
        load(folder)


def test_many_keys_are_shortened(folder):
    change(folder, lambda weights: weights.update({f"extra{index}": torch.ones(1) for index in range(20)}))
    with pytest.raises(ValueError, match="and 12 more"):
        load(folder)


@pytest.mark.parametrize("within_pipeline", [False, True])
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_folder_with_pickled_weights_only_is_an_error_that_names_the_file(folder, within_pipeline, name):
    loaded = load(folder)
    torch.save(load_file(folder / WEIGHTS), folder / name)
    (folder / WEIGHTS).unlink()
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises(ValueError, match=f"{name}, which is a pickle"):
            if within_pipeline:
                type(loaded).from_pretrained(folder.parent, subfolder=folder.name, **options)
            else:
                load(folder, **options)


def test_a_pickle_next_to_safetensors_is_never_read(folder):
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"not even a pickle")
    load(folder)
    with pytest.raises(ValueError, match="use_safetensors must be True"):
        load(folder, use_safetensors=False)


def test_loading_info_is_returned_if_requested(folder):
    model, info = load(folder, output_loading_info=True)
    assert type(model) is type(load(folder)) and not info["missing_keys"]


def test_weights_are_loaded_in_the_requested_precision(folder):
    assert load(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_an_image_vae_is_loaded_as_strictly(tmp_path):
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=4)
    vae.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(ValueError, match="which is a pickle"):
        load_vae(tmp_path / "pickled")
    vae.save_pretrained(tmp_path / "cut")
    path = tmp_path / "cut/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["decoder.conv_out.bias"]
    save_file(weights, path)
    with pytest.raises(ValueError, match="AutoencoderKL .* missing keys: .*decoder.conv_out.bias"):
        load_vae(tmp_path / "cut")


@pytest.mark.parametrize("text", ["null", "[]", "{", '{"patch_size": {}, "dim_mult": null, "block_out_channels": 5}'])
def test_a_malformed_config_is_one_error(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises((ValueError, OSError)) as error:
        load(folder)
    assert str(folder) in str(error.value)
