import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from vgen.models.vae import CausalVideoVAE

WEIGHTS = "diffusion_pytorch_model.safetensors"
KEY = "encoder.conv_in.weight"


@pytest.fixture
def folder(make_vae, tmp_path):
    make_vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def change(folder, edit) -> None:
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def test_missing_key_is_named(folder):
    change(folder, lambda weights: weights.pop(KEY))
    with pytest.raises(ValueError, match=f"missing keys: {KEY}"):
        CausalVideoVAE.from_pretrained(folder)


def test_unexpected_key_is_named(folder):
    change(folder, lambda weights: weights.update({"encoder.extra": torch.ones(1)}))
    with pytest.raises(ValueError, match="unexpected keys: encoder.extra"):
        CausalVideoVAE.from_pretrained(folder)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_mismatched_shape_is_named(folder, low_cpu_mem_usage):
    change(folder, lambda weights: weights.update({KEY: torch.ones(5, 3, 3, 3, 3)}))
    with pytest.raises((ValueError, RuntimeError), match=KEY):
        CausalVideoVAE.from_pretrained(folder, low_cpu_mem_usage=low_cpu_mem_usage)


def test_config_that_asks_for_more_layers_than_there_are_weights_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_res_blocks": 2}))
    with pytest.raises(ValueError, match="do not fit its config|expected shape"):
        CausalVideoVAE.from_pretrained(folder)


def test_many_keys_are_shortened(folder):
    change(folder, lambda weights: weights.update({f"extra{index}": torch.ones(1) for index in range(20)}))
    with pytest.raises(ValueError, match="and 12 more"):
        CausalVideoVAE.from_pretrained(folder)


@pytest.mark.parametrize("subfolder", [None, "vae"])
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "model.ckpt"])
def test_folder_with_pickled_weights_only_is_refused_by_name(folder, subfolder, name):
    torch.save(load_file(folder / WEIGHTS), folder / name)
    (folder / WEIGHTS).unlink()
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises(ValueError, match=f"{name} is a pickle"):
            if subfolder:
                CausalVideoVAE.from_pretrained(folder.parent, subfolder=subfolder, **options)
            else:
                CausalVideoVAE.from_pretrained(folder, **options)


def test_pickle_beside_safetensors_is_never_read(folder):
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"not even a pickle")
    CausalVideoVAE.from_pretrained(folder)
    with pytest.raises(ValueError, match="only safetensors are loaded"):
        CausalVideoVAE.from_pretrained(folder, use_safetensors=False)


def test_loading_info_is_returned_when_asked_for(folder):
    model, info = CausalVideoVAE.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, CausalVideoVAE) and not info["missing_keys"]


def test_loads_in_the_asked_precision(folder):
    assert CausalVideoVAE.from_pretrained(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
