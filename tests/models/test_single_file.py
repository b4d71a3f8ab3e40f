"""Loading from one file. The oracle is diffusers' own loading of the same file."""

import re

import pytest
import torch
from diffusers import AutoencoderKLWan, GGUFQuantizationConfig, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from vgen.models.convert.names import to_original
from vgen.models.transformer import SpacetimeTransformer
from vgen.models.vae import CausalVideoVAE
from vgen.pipeline import VideoGenPipeline

ORIGINAL = (
    (r"condition_embedder\.time_embedder\.linear_(\d)", lambda found: f"time_embedding.{2 * int(found[1]) - 2}"),
    (r"condition_embedder\.text_embedder\.linear_(\d)", lambda found: f"text_embedding.{2 * int(found[1]) - 2}"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"attn1", "self_attn"),
    (r"attn2", "cross_attn"),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"^scale_shift_table", "head.modulation"),
    (r"scale_shift_table", "modulation"),
    (r"proj_out", "head.head"),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
    (r"norm2", "norm3"),
)
"""Names of a Transformer's weights: those of diffusers, and the original ones."""
WAN_TINY = {
    "num_attention_heads": 1, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 64,
    "freq_dim": 32, "ffn_dim": 64, "num_layers": 2,
}  # fmt: skip


def original(weights):
    renamed = {}
    for key, value in weights.items():
        for pattern, name in ORIGINAL:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed


@pytest.fixture
def wan(randomize):
    network = WanTransformer3DModel(**WAN_TINY)
    randomize(network)
    return network


def same(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(
        value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]) for key, value in ours.items()
    )


def save(weights, path):
    save_file({key: value.contiguous() for key, value in weights.items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("names", [original, dict])
def test_a_transformer_has_the_sizes_and_weights_of_the_file(wan, tmp_path, names, prefix):
    weights = names(wan.state_dict())
    path = save({prefix + key: value for key, value in weights.items()}, tmp_path / "wan.safetensors")
    network = SpacetimeTransformer.from_single_file(path)
    assert same(network, wan) and not network.training
    assert {key: network.config[key] for key in WAN_TINY} == WAN_TINY
    wan.save_pretrained(tmp_path / "wan")
    expected = SpacetimeTransformer.from_pretrained(tmp_path / "wan", dtype=torch.bfloat16)
    assert same(SpacetimeTransformer.from_single_file(str(path), dtype=torch.bfloat16), expected)


@pytest.mark.parametrize("kind", ["2.1", "2.2"])
def test_a_vae_has_the_sizes_and_statistics_that_its_file_shows(randomize, tmp_path, kind):
    config = {"base_dim": 4, "z_dim": 16}
    if kind == "2.2":
        config |= {
            "z_dim": 48, "decoder_base_dim": 8, "is_residual": True, "patch_size": 2, "in_channels": 12,
            "out_channels": 12, "scale_factor_spatial": 16,
        }  # fmt: skip
    theirs = randomize(AutoencoderKLWan(**config))
    ours = CausalVideoVAE.from_single_file(save(to_original("vae", theirs.state_dict()), tmp_path / "a.safetensors"))
    assert same(ours, theirs) and {key: ours.config[key] for key in config} == config
    assert ours.temporal_compression_ratio == 4
    if kind == "2.1":
        assert ours.config.latents_mean == theirs.config.latents_mean
        assert ours.config.latents_std == theirs.config.latents_std
    else:
        assert ours.config.latents_mean[0] == -0.2289 and ours.config.latents_std[-1] == 0.7744
        assert len(ours.config.latents_mean) == len(ours.config.latents_std) == 48


def test_an_image_to_video_transformer_has_the_sizes_of_its_file(randomize, tmp_path):
    config = WAN_TINY | {"in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 128, "pos_embed_seq_len": 10}
    theirs = randomize(WanTransformer3DModel(**config))
    path = save(to_original("transformer", theirs.state_dict()), tmp_path / "a.safetensors")
    ours = SpacetimeTransformer.from_single_file(path)
    assert same(ours, theirs) and {key: ours.config[key] for key in config} == config


def test_the_original_names_are_those_that_diffusers_converts(wan, tmp_path):
    path = save(original(wan.state_dict()), tmp_path / "wan.safetensors")
    wan.save_pretrained(tmp_path / "wan")
    assert same(WanTransformer3DModel.from_single_file(str(path), config=str(tmp_path / "wan")), wan)


def test_a_vae_has_the_sizes_and_weights_of_the_file(tmp_path):
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    vae.save_pretrained(tmp_path / "vae")
    path = save(vae.state_dict(), tmp_path / "vae.safetensors")
    config = {"base_dim": 8, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    for given in (tmp_path / "vae", config):
        assert same(CausalVideoVAE.from_single_file(path, config=given), vae)
    with pytest.raises(ValueError, match="vae.safetensors do not match .* instead of"):
        CausalVideoVAE.from_single_file(path, config=config | {"base_dim": 16})
    for key in ("encoder.conv_in.weight", "post_quant_conv.weight"):
        with pytest.raises(ValueError, match=f"missing: {key}"):
            CausalVideoVAE.from_single_file({name: value for name, value in vae.state_dict().items() if name != key})


def test_weights_in_gguf_stay_quantized_and_compute_the_same(wan, tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "wan.gguf", "wan")
    for key, value in original(wan.state_dict()).items():
        quantized = value.ndim == 2 and key.endswith(".weight")
        kind = gguf.GGMLQuantizationType.Q8_0 if quantized else gguf.GGMLQuantizationType.F32
        writer.add_tensor(key, gguf.quants.quantize(value.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wan.save_pretrained(tmp_path / "wan")
    quantization = GGUFQuantizationConfig(compute_dtype=torch.float32)
    theirs = WanTransformer3DModel.from_single_file(
        str(tmp_path / "wan.gguf"), config=str(tmp_path / "wan"), quantization_config=quantization
    )
    inputs = (torch.randn(1, 16, 2, 4, 4), torch.tensor([500]), torch.randn(1, 3, 64))
    for options in ({}, {"quantization_config": quantization}):
        ours = SpacetimeTransformer.from_single_file(tmp_path / "wan.gguf", **options)
        assert ours.blocks[0].attn1.to_q.weight.dtype == torch.uint8
        with torch.no_grad():
            torch.testing.assert_close(ours(*inputs).sample, theirs(*inputs).sample, atol=1e-4, rtol=1e-4)


def test_float8_weights_are_read_in_bfloat16_and_scaled_ones_are_refused(wan, tmp_path):
    weights = original(wan.state_dict())
    small = {key: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value for key, value in weights.items()}
    path = save(small, tmp_path / "fp8.safetensors")
    network = SpacetimeTransformer.from_single_file(path)
    expected = small["blocks.0.self_attn.q.weight"].bfloat16()
    assert network.dtype == torch.bfloat16 and torch.equal(network.blocks[0].attn1.to_q.weight, expected)
    save(small | {"blocks.0.self_attn.q.scale_weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="unexpected: .*attn1.to_q.scale_weight .float8 weights with scales are not"):
        SpacetimeTransformer.from_single_file(path)


def test_files_that_do_not_fit_are_named(wan, tmp_path):
    weights = original(wan.state_dict())
    path = tmp_path / "wan.safetensors"
    for change, message in (
        ({"blocks.1.ffn.0.bias": None}, "missing: blocks.1.ffn.net.0.proj.bias"),
        ({"extra": torch.ones(1)}, "unexpected: extra"),
        ({"patch_embedding.weight": None}, "missing: patch_embedding.weight"),
        ({"head.head.bias": torch.ones(3)}, "of another shape: proj_out.bias .3,. instead of .64,."),
        ({"head.head.bias": torch.full((64,), float("nan"))}, "proj_out.bias of .* is NaN or infinite"),
    ):
        save({key: value for key, value in (weights | change).items() if value is not None}, path)
        with pytest.raises(ValueError, match=message) as error:
            SpacetimeTransformer.from_single_file(path)
        assert str(path) in str(error.value)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="wan.safetensors is malformed or not available"):
        SpacetimeTransformer.from_single_file(path)
    with pytest.raises(ValueError, match="pickles can run code"):
        SpacetimeTransformer.from_single_file(tmp_path / "wan.pth")
    with pytest.raises(ValueError, match="there is no file .*nosuch.safetensors"):
        SpacetimeTransformer.from_single_file(tmp_path / "nosuch.safetensors")
    with pytest.raises(ValueError, match="has 32 channels, no multiple of 128: pass config"):
        SpacetimeTransformer.from_single_file({"patch_embedding.weight": torch.ones(32, 16, 1, 2, 2)})


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_a_pipeline_takes_one_network_from_a_file(wan_folder, tmp_path, component):
    (stored,) = (wan_folder / component).glob("*.safetensors")
    changed = {key: value + 0.5 for key, value in load_file(stored).items()}
    path = save(original(changed) if component == "transformer" else changed, tmp_path / "file.safetensors")
    pipe = VideoGenPipeline.from_single_file(path, config=wan_folder)
    whole = VideoGenPipeline.from_pretrained(wan_folder)
    for name in ("transformer", "vae"):
        weights = changed if name == component else getattr(whole, name).state_dict()
        found = getattr(pipe, name).state_dict()
        assert all(torch.equal(found[key], value) for key, value in weights.items()), name
    half = VideoGenPipeline.from_single_file(path, config=wan_folder, dtype="bfloat16")
    assert getattr(half, component).dtype == half.text_encoder.dtype == torch.bfloat16
