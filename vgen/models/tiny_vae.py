"""A tiny autoencoder of videos, for previews: its decoder costs a small fraction of that of the VAE it imitates.

Axes: `b` videos, `f` frames, `c` channels, `h w` rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vgen.hub import locate
from vgen.models.convert.files import unwrap
from vgen.models.loading import StrictLoading, check_finite
from vgen.models.vae import CausalVideoVAE
from vgen.temporal.state import History, TemporalState, network_identity, register_state_keys

LATENTS_PER_SLICE = 4
"""Latents that `decode_stream` decodes at once."""
_FOLDER = "tiny_decoder"
_ENCODER = "encoder.0.weight"
_DECODER = tuple(f"decoder.{index}.weight" for index in (1, 8, 14, 20))
"""Weights whose shapes show the sizes of a public network: its first convolution, and those between levels."""


class SoftClamp(nn.Module):
    """Limits values softly to [-3, 3]."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps a tensor to the same shape."""
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """Residual 2D convolutions of each frame and of the one before it, which are zeros for the first frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(2 * channels, channels)]
        for _ in range(2):
            layers += [nn.ReLU(), _conv(channels, channels)]
        self.conv = nn.Sequential(*layers)
        self.state_key = ""

    def forward(self, x: Tensor, history: History) -> Tensor:
        """Maps `(b, f, c, h, w)` to the same shape."""
        before = history.get(self.state_key)
        before = torch.zeros_like(x[:, :1]) if before is None else before.to(x)
        history.put(self.state_key, x[:, -1:].clone())
        past = torch.cat([before, x[:, :-1]], dim=1)
        return (_per_frame(self.conv, torch.cat([x, past], dim=2)) + x).relu()


class TimePool(nn.Module):
    """Merges `stride` consecutive frames into one, with a linear map of their channels."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels * stride, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(b, f, c, h, w)` to `(b, f / stride, c, h, w)`."""
        return _per_frame(self.conv, rearrange(x, "b (f s) c h w -> b f (s c) h w", s=self.stride))


class TimeGrow(nn.Module):
    """Makes `stride` consecutive frames of each one, with a linear map of its channels."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, channels * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(b, f, c, h, w)` to `(b, f * stride, c, h, w)`."""
        return rearrange(_per_frame(self.conv, x), "b f (s c) h w -> b (f s) c h w", s=self.stride)


def _conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def _per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class TinyVideoVAE(StrictLoading, ModelMixin, ConfigMixin):
    """A tiny autoencoder for the latents of another VAE, with the arithmetic of TAEHV.

    The decoder runs over streams, and any split gives the same frames. Latent 0 gives frame 0, and each other one the
    next `s`, as in the VAE that it imitates. Parameters have the public names.

    Args:
        latent_channels: Channels of the latents.
        patch_size: Side in pixels of the squares that are moved into channels.
        encoder_channels: Channels of the encoder; `None` for a decoder alone.
        decoder_channels: Channels of the decoder's levels, from latents to pixels.
        encoder_time: For each level of the encoder, whether it halves time.
        decoder_time: For each level of the decoder, whether it doubles time.
        latents_mean: Mean of each channel of the latents that it decodes; `None` decodes normalized latents.
        latents_std: Their standard deviation.

    Source: TAEHV, github.com/madebyollin/taehv.
    """

    _skip_keys = ["history", "state"]

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        patch_size: int = 1,
        encoder_channels: int | None = 64,
        decoder_channels: Sequence[int] = (256, 128, 64, 64),
        encoder_time: Sequence[bool] = (True, True, False),
        decoder_time: Sequence[bool] = (False, True, True),
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        width, pixels = encoder_channels, 3 * patch_size**2
        self.encoder: nn.Sequential | None = None
        if width is not None:
            layers: list[nn.Module] = [_conv(pixels, width), nn.ReLU()]
            for halves in encoder_time:
                layers += [TimePool(width, 1 + halves), _conv(width, width, stride=2, bias=False)]
                layers += [MemoryBlock(width) for _ in range(3)]
            self.encoder = nn.Sequential(*layers, _conv(width, latent_channels))
        first = decoder_channels[0]
        layers = [SoftClamp(), _conv(latent_channels, first), nn.ReLU()]
        for own, following, doubles in zip(decoder_channels[:-1], decoder_channels[1:], decoder_time, strict=True):
            layers += [MemoryBlock(own) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), TimeGrow(own, 1 + doubles), _conv(own, following, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _conv(decoder_channels[-1], pixels))
        self.temporal_compression_ratio = 2 ** sum(decoder_time)
        self.spatial_compression_ratio = patch_size * 2 ** len(decoder_time)
        register_state_keys(self)

    @property
    def state_identity(self) -> dict[str, str]:
        """Identity of this network for `TemporalState`."""
        return network_identity(self)

    def encode(self, clip: Tensor) -> Tensor:
        """Encodes clips `(b, 3, f, h, w)` in [-1, 1] to latents `(b, c, ceil(f / s), h', w')`.

        A length that is no multiple of the temporal compression `s` is filled up with the last frame.

        Raises:
            ValueError: The network is a decoder alone.
        """
        if self.encoder is None:
            raise ValueError("this TinyVideoVAE is a decoder alone (encoder_channels=None): encode with the VAE")
        ratio = 2 ** sum(self.config.encoder_time)
        x = F.pixel_unshuffle((clip.transpose(1, 2) + 1) / 2, self.config.patch_size)
        x = torch.cat([x, *[x[:, -1:]] * (-x.shape[1] % ratio)], dim=1)
        return _run(self.encoder, x, TemporalState().history()).transpose(1, 2)

    def decode(self, latents: Tensor, state: TemporalState | None = None, clamp: bool = True) -> DecoderOutput:
        """Decodes latents, or the next slice of a stream of them.

        Args:
            latents: `(b, c, t, h', w')`, normalized or not as `latents_mean` says.
            state: Memory of the stream; updated by this call.
            clamp: Whether to clamp pixels to [-1, 1].

        Returns:
            An output whose `sample` has pixels `(b, 3, f, h, w)`: one frame for the first latent of a stream, and `s`
            for each other one.
        """
        state = TemporalState() if state is None else state
        state.bind(self)
        history = state.history()
        begins = history.get("begun") is None
        history.put("begun", latents.new_ones(()))
        x = _run(self.decoder, latents.transpose(1, 2), history)
        state.commit(history)
        x = x[:, self.temporal_compression_ratio - 1 :] if begins else x
        clip = F.pixel_shuffle(x, self.config.patch_size).transpose(1, 2) * 2 - 1
        return DecoderOutput(sample=clip.clamp(-1, 1) if clamp else clip)

    def forward(self, latents: Tensor) -> DecoderOutput:
        """Decodes latents as `decode` does, without clamping."""
        return self.decode(latents, clamp=False)

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Decodes latents a few at a time; yields pixels `(b, 3, n, h, w)`."""
        state = TemporalState()
        for part in latents.split(LATENTS_PER_SLICE, dim=2):
            yield self.decode(part, state).sample

    def denormalize(self, latents: Tensor) -> Tensor:
        """Converts normalized latents to those that `decode` takes."""
        if self.config.latents_mean is None:
            return latents
        mean, std = (
            latents.new_tensor(values).view(-1, 1, 1, 1)
            for values in (self.config.latents_mean, self.config.latents_std)
        )
        return latents * std + mean

    @classmethod
    def from_single_file(cls, source: str | Path, **config: Any) -> TinyVideoVAE:
        """Loads public weights, such as `taew2_1.safetensors` (Wan 2.1) or `taew2_2.safetensors`.

        Args:
            source: A `.safetensors` file.
            config: Arguments of the class that no weight shows: `latents_mean` and `latents_std` for a decoder that
                takes the latents of the VAE as they are, as LightTAE does.

        Raises:
            ValueError: The weights are not those of such a network. The error names them.
        """
        from vgen.models.single_file import check_weights, read_single_file

        name = f"{cls.__name__} in {source}"
        weights = unwrap(read_single_file(source), name)
        with torch.device("meta"):
            network = cls(**_sizes(weights, name) | config)
        expected = network.state_dict()
        for key in [f"{name}.conv.weight" for name, module in network.named_modules() if isinstance(module, TimeGrow)]:
            if key in weights:  # public files have weights for more frames; the last ones count
                weights[key] = weights[key][-len(expected[key]) :]
        check_weights(weights, expected, name)
        network.load_state_dict(weights, assign=True)
        check_finite(network, name)
        return network.eval()


def load_tiny_vae(source: str | Path) -> TinyVideoVAE:
    """Loads a tiny VAE.

    Args:
        source: A `.safetensors` file of public weights; a folder that `save_pretrained` or `train_vae.py --distill`
            wrote; or a checkpoint with one in its subfolder `tiny_decoder`.

    Raises:
        ValueError: There is no such file, folder or checkpoint, the checkpoint has none, or the weights do not match.
    """
    if Path(source).is_file() or Path(source).suffix == ".safetensors":
        return TinyVideoVAE.from_single_file(source)
    place = locate(source)
    own = isinstance(place, Path) and (place / "config.json").is_file()
    if isinstance(place, Path) and not own and not (place / _FOLDER).is_dir():
        raise ValueError(f"{source} has no tiny decoder: train one with train/train_vae.py --distill {source}")
    return TinyVideoVAE.from_pretrained(place, **({} if own else {"subfolder": _FOLDER})).eval()


class TinyCodec:
    """A VAE whose decoder is a tiny one.

    Args:
        vae: Encodes clips.
        decoder: Decodes its latents.
    """

    def __init__(self, vae: CausalVideoVAE, decoder: TinyVideoVAE) -> None:
        self.vae, self.decoder = vae, decoder

    def encode(self, clip: Tensor) -> Any:
        """As `CausalVideoVAE.encode`."""
        return self.vae.encode(clip)

    def decode(self, latents: Tensor) -> DecoderOutput:
        """As `CausalVideoVAE.decode`."""
        return self.decoder.decode(self.decoder.denormalize(self.vae.normalize(latents)))

    def train(self, mode: bool = True) -> None:
        """Sets the mode of the decoder; the VAE stays in evaluation mode."""
        self.decoder.train(mode)

    def eval(self) -> None:
        """Sets evaluation mode."""
        self.train(False)


def _run(layers: nn.Sequential, x: Tensor, history: History) -> Tensor:
    for layer in layers:
        if isinstance(layer, MemoryBlock):
            x = layer(x, history)
        else:
            x = layer(x) if isinstance(layer, (TimePool, TimeGrow)) else _per_frame(layer, x)
    return x


def _sizes(weights: dict[str, Tensor], name: str) -> dict[str, Any]:
    """The arguments of the class that the shapes of the weights show.

    Raises:
        ValueError: A weight that shows a size is missing.
    """
    missing = [key for key in (_ENCODER, *_DECODER) if key not in weights]
    if missing:
        raise ValueError(f"the weights of {name} do not match the network: missing: {missing[0]}")
    width, pixels = weights[_ENCODER].shape[:2]
    return {
        "latent_channels": weights[_DECODER[0]].shape[1],
        "patch_size": round((pixels / 3) ** 0.5),
        "encoder_channels": width,
        "decoder_channels": [weights[key].shape[0] for key in _DECODER],
    }
