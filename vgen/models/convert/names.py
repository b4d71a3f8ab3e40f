"""Names of weights: those of the original Wan repositories, and those of diffusers and transformers, which are ours.

One table for each kind of network converts in both directions. Names that are in no table stay as they are.
"""

from __future__ import annotations

import re
from typing import Literal

from vgen.models.convert.files import Weights

Network = Literal["transformer", "vae", "text_encoder"]

_WAN = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "fps_projection.0": "fps_projection.net.0.proj",
    "fps_projection.2": "fps_projection.net.2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "blocks.*.norm3": "blocks.*.norm2",  # the other two norms of a block have no weights
    "blocks.*.ffn.0": "blocks.*.ffn.net.0.proj",
    "blocks.*.ffn.2": "blocks.*.ffn.net.2",
    "blocks.*.modulation": "blocks.*.scale_shift_table",
    **{
        f"blocks.*.{theirs}.{part}": f"blocks.*.{ours}.{name}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, name in (
            ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k"),
        )
    },
    "blocks.*.cross_attn.k_img": "blocks.*.attn2.add_k_proj",
    "blocks.*.cross_attn.v_img": "blocks.*.attn2.add_v_proj",
    "blocks.*.cross_attn.norm_k_img": "blocks.*.attn2.norm_added_k",
}  # fmt: skip
_RESIDUAL = {
    "residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}  # fmt: skip
_RESAMPLING = ("resample.1", "time_conv")
_VAE = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{f"{half}.conv1": f"{half}.conv_in" for half in ("encoder", "decoder")},
    **{f"{half}.head.0": f"{half}.norm_out" for half in ("encoder", "decoder")},
    **{f"{half}.head.2": f"{half}.conv_out" for half in ("encoder", "decoder")},
    **{
        f"{half}.middle.{place}.{theirs}": f"{half}.mid_block.resnets.{place // 2}.{ours}"
        for half in ("encoder", "decoder")
        for place in (0, 2)
        for theirs, ours in _RESIDUAL.items()
    },
    **{
        f"{half}.middle.1.{part}": f"{half}.mid_block.attentions.0.{part}"
        for half in ("encoder", "decoder")
        for part in ("norm", "to_qkv", "proj")
    },
}
_VAE_2_1 = _VAE | {
    **{f"encoder.downsamples.*.{theirs}": f"encoder.down_blocks.*.{ours}" for theirs, ours in _RESIDUAL.items()},
    **{f"encoder.downsamples.*.{part}": f"encoder.down_blocks.*.{part}" for part in _RESAMPLING},
    **{
        f"decoder.upsamples.{4 * level + place}.{theirs}": f"decoder.up_blocks.{level}.resnets.{place}.{ours}"
        for level in range(4)
        for place in range(3)
        for theirs, ours in _RESIDUAL.items()
    },
    **{
        f"decoder.upsamples.{4 * level + 3}.{part}": f"decoder.up_blocks.{level}.upsamplers.0.{part}"
        for level in range(3)
        for part in _RESAMPLING
    },
}
_VAE_2_2 = _VAE | {
    **{
        f"encoder.downsamples.*.downsamples.{place}.{theirs}": f"encoder.down_blocks.*.resnets.{place}.{ours}"
        for place in range(2)
        for theirs, ours in _RESIDUAL.items()
    },
    **{
        f"decoder.upsamples.*.upsamples.{place}.{theirs}": f"decoder.up_blocks.*.resnets.{place}.{ours}"
        for place in range(3)
        for theirs, ours in _RESIDUAL.items()
    },
    **{
        f"encoder.downsamples.*.downsamples.2.{part}": f"encoder.down_blocks.*.downsampler.{part}"
        for part in _RESAMPLING
    },
    **{f"decoder.upsamples.*.upsamples.3.{part}": f"decoder.up_blocks.*.upsampler.{part}" for part in _RESAMPLING},
}
_LAYER = "encoder.block.*.layer"
_UMT5 = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
    "blocks.*.norm1": f"{_LAYER}.0.layer_norm",
    **{f"blocks.*.attn.{part}": f"{_LAYER}.0.SelfAttention.{part}" for part in "qkvo"},
    "blocks.*.pos_embedding.embedding": f"{_LAYER}.0.SelfAttention.relative_attention_bias",
    "blocks.*.norm2": f"{_LAYER}.1.layer_norm",
    "blocks.*.ffn.gate.0": f"{_LAYER}.1.DenseReluDense.wi_0",
    "blocks.*.ffn.fc1": f"{_LAYER}.1.DenseReluDense.wi_1",
    "blocks.*.ffn.fc2": f"{_LAYER}.1.DenseReluDense.wo",
}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def kind_of(weights: Weights) -> Network:
    """Which network the weights of a file are for, by names that only this one has."""
    if any(name in weights for name in ("token_embedding.weight", "shared.weight")):
        return "text_encoder"
    return "vae" if any(name.startswith("decoder.") for name in weights) else "transformer"


def from_original(network: Network, weights: Weights) -> Weights:
    """Weights with our names."""
    return _renamed(_table(network, weights), weights)


def to_original(network: Network, weights: Weights) -> Weights:
    """Weights with the original names."""
    return _renamed({ours: theirs for theirs, ours in _table(network, weights).items()}, weights)


def original_name(layer: str) -> str:
    """The original name of a layer of a Transformer."""
    return _rename({ours: theirs for theirs, ours in _WAN.items()}, layer)


def _table(network: Network, weights: Weights) -> dict[str, str]:
    if network != "vae":
        return _WAN if network == "transformer" else _UMT5
    levels = ("encoder.downsamples.0.downsamples.", "encoder.down_blocks.0.resnets.")
    return _VAE_2_2 if any(name.startswith(levels) for name in weights) else _VAE_2_1


def _renamed(table: dict[str, str], weights: Weights) -> Weights:
    return {_rename(table, name): weight for name, weight in weights.items()}


def _rename(table: dict[str, str], name: str) -> str:
    """Looks up a name without `.weight` and so on: as it is, or with its first number as a wildcard."""
    for stem, suffix in ((name, ""), *([tuple(name.rsplit(".", 1))] if "." in name else [])):
        suffix = suffix and f".{suffix}"
        if stem in table:
            return table[stem] + suffix
        number = _NUMBER.search(f"{stem}.")
        pattern = _NUMBER.sub("*", f"{stem}.", count=1)[:-1]
        if number is not None and pattern in table:
            return table[pattern].replace("*", number[0], 1) + suffix
    return name
