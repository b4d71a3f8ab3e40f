"""Fixtures of all tests: tiny random networks and folders in the formats of public checkpoints."""

import io
import json
import multiprocessing.spawn
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.warm import warm_python
from vgen.models.prompts import make_word_tokenizer


@torch.no_grad()
def _randomize(module: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def _splits(length: int) -> Iterator[list[int]]:
    yield []
    for first in range(1, length + 1):
        yield from ([first, *rest] for rest in _splits(length - first) if first + sum(rest) == length)


@pytest.fixture(scope="session")
def randomize() -> Callable[..., Any]:
    """Draws all weights of a module from N(0, 0.2), so that every path through it matters."""
    return _randomize


@pytest.fixture
def splits() -> Callable[[int], list[list[int]]]:
    """All ways to cut a length into slices."""
    return lambda length: [slices for slices in _splits(length) if sum(slices) == length]


@pytest.fixture
def warm_workers() -> Iterator[None]:
    """The workers of data loaders are forks of the warm interpreter."""
    before = multiprocessing.spawn.get_executable()
    multiprocessing.set_executable(warm_python())
    yield
    multiprocessing.set_executable(before)


@pytest.fixture
def make_vae() -> Callable[..., Any]:
    """Builds a tiny CausalVideoVAE with random weights."""
    from vgen.models.vae import CausalVideoVAE

    def make(seed: int = 0, **config: Any) -> CausalVideoVAE:
        tiny = {"base_dim": 4, "z_dim": 3, "dim_mult": [1, 2, 2], "num_res_blocks": 1}
        return _randomize(CausalVideoVAE(**{**tiny, "temperal_downsample": [True, True], **config}), seed)

    return make


@pytest.fixture
def make_transformer() -> Callable[..., Any]:
    """Builds a tiny SpacetimeTransformer with random weights."""
    from vgen.models.transformer import SpacetimeTransformer

    def make(seed: int = 0, **config: Any) -> SpacetimeTransformer:
        tiny = {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 3,
            "out_channels": 3,
            "text_dim": 5,
            "freq_dim": 8,
            "ffn_dim": 16,
            "num_layers": 2,
        }
        return _randomize(SpacetimeTransformer(**{**tiny, **config}), seed)

    return make


@pytest.fixture
def counting_checkpoint() -> Any:
    """What `enable_gradient_checkpointing` takes; its `count` says how often it was used."""

    def checkpoint(block: Callable[..., Any], *inputs: Any) -> Any:
        checkpoint.count += 1
        return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)

    checkpoint.count = 0
    return checkpoint


@pytest.fixture
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that group offloading has put on disk are not a number, rather than by luck what they were."""
    empty_like = torch.empty_like

    def spoilt(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        created = empty_like(tensor, **options)
        return created.fill_(float("nan")) if created.is_floating_point() else created

    monkeypatch.setattr(torch, "empty_like", spoilt)


@pytest.fixture
def video() -> np.ndarray:
    """Noise of 13 frames, uint8 `(f, h, w, 3)`."""
    return np.random.default_rng(1).integers(0, 256, (13, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, bytes]]:
    """The files of each repository that `push_to_hub` uploads, instead of a network."""
    from huggingface_hub import ModelCard

    uploaded: dict[str, dict[str, bytes]] = {}

    def upload(self: Any, folder: str, repo_id: str, **_: Any) -> None:
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        uploaded[repo_id] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    hub_utils = "diffusers.utils.hub_utils"
    monkeypatch.setattr(f"{hub_utils}.PushToHubMixin._upload_folder", upload)
    monkeypatch.setattr(f"{hub_utils}.create_repo", lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(f"{hub_utils}.load_or_create_model_card", lambda *_, **__: ModelCard("---\n---\n"))
    return uploaded


@pytest.fixture
def make_unet() -> Callable[..., Any]:
    """Builds a tiny UNet3D with random weights."""
    from vgen.models.unet import UNet3D

    def make(seed: int = 0, **config: Any) -> UNet3D:
        tiny = {
            "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 4,
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 5, "attention_head_dim": 2,
            "temporal_head_dim": 8,
        }  # fmt: skip
        return _randomize(UNet3D(**{**tiny, **config}), seed)

    return make


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random folder in the format of Stable Diffusion 1.5."""
    folder = tmp_path_factory.mktemp("sd")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    vocabulary = {word: index for index, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=32,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=2,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(config), tokenizer=tokenizer, unet=unet, safety_checker=None,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                set_alpha_to_one=False, steps_offset=1),
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / "pipeline")  # fmt: skip
    return folder / "pipeline"


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory, randomize: Callable[..., Any]) -> Path:
    """A tiny random folder of a WanPipeline, in the layout of the public checkpoints."""
    torch.manual_seed(0)
    tokenizer = make_word_tokenizer(["a", "blue", "circle", "moves", "red", "square"], 16)
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, is_encoder_decoder=False
        )
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.1, 0.9, 1.2, 0.8],
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    path = tmp_path_factory.mktemp("wan")
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=randomize(vae),
        scheduler=scheduler,
        transformer=randomize(transformer),
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def image_folders(
    wan_folder: Path, tmp_path_factory: pytest.TempPathFactory, randomize: Callable[..., Any]
) -> dict[str, Path]:
    """Tiny random folders in the layouts of I2V and FLF2V of Wan 2.1 and of I2V A14B of Wan 2.2."""
    parts = WanPipeline.from_pretrained(wan_folder).components
    config = {name: value for name, value in parts["transformer"].config.items() if name[:1] != "_"}
    config |= {"in_channels": 12}
    vision = CLIPVisionConfig(
        hidden_size=8, projection_dim=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip
    image_encoder = randomize(CLIPVisionModel(vision))
    made = {}
    for name in ("2.1", "2.1-first-last", "2.2"):
        images = {} if name == "2.2" else {"image_dim": 8, "added_kv_proj_dim": 24}
        images |= {"pos_embed_seq_len": 2 * 5} if name == "2.1-first-last" else {}
        parts["transformer"] = randomize(WanTransformer3DModel(**config | images), seed=1)
        extra = {"image_encoder": image_encoder, "image_processor": CLIPImageProcessor(crop_size=32, size=32)}
        if name == "2.2":
            extra = {"image_encoder": None, "image_processor": None, "boundary_ratio": 0.9}
            extra["transformer_2"] = randomize(WanTransformer3DModel(**config), seed=2)
        made[name] = tmp_path_factory.mktemp("images")
        WanImageToVideoPipeline(**parts | extra).save_pretrained(made[name])
    return made


@pytest.fixture(scope="session")
def first_frame_folder(
    wan_folder: Path, tmp_path_factory: pytest.TempPathFactory, randomize: Callable[..., Any]
) -> Path:
    """A tiny random folder in the layout of Wan 2.2 TI2V-5B."""
    parts = WanPipeline.from_pretrained(wan_folder).components
    config = {name: value for name, value in parts["transformer"].config.items() if name[:1] != "_"}
    parts["transformer"] = randomize(WanTransformer3DModel(**config | {"in_channels": 6, "out_channels": 6}))
    parts["vae"] = randomize(
        AutoencoderKLWan(
            base_dim=4, decoder_base_dim=8, z_dim=6, is_residual=True, patch_size=2, in_channels=12, out_channels=12,
            scale_factor_spatial=16, latents_mean=[0.1] * 6, latents_std=[1.2] * 6,
        )
    )  # fmt: skip
    path = tmp_path_factory.mktemp("small")
    WanPipeline(**parts, expand_timesteps=True).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def experts_folder(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory, randomize: Callable[..., Any]) -> Path:
    """A tiny random folder in the layout of Wan 2.2 T2V A14B."""
    path = tmp_path_factory.mktemp("experts")
    parts = WanPipeline.from_pretrained(wan_folder).components
    parts["transformer_2"] = randomize(WanTransformer3DModel.from_config(parts["transformer"].config), seed=5)
    WanPipeline(**parts, boundary_ratio=0.8).save_pretrained(path)
    return path


def write_tar(path, members):
    """Writes a tar file with members of these names and contents, bytes or text."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
