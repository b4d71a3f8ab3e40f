"""A folder of diffusers' WanPipeline, loaded by VideoGenPipeline, gives WanPipeline's videos."""

import json

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from vgen.models.transformer import SpacetimeTransformer
from vgen.models.vae import CausalVideoVAE
from vgen.pipeline import VideoGenPipeline

PROMPT, NEGATIVE = "a red circle moves", "a blue square"
SETTINGS = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 3.0}


def load(folder):
    theirs, ours = WanPipeline.from_pretrained(folder, dtype=torch.float32), VideoGenPipeline.from_pretrained(folder)
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
    return theirs, ours


def test_the_same_noise_gives_the_same_video(wan_folder):
    theirs, ours = load(wan_folder)
    assert isinstance(ours.vae, CausalVideoVAE) and isinstance(ours.transformer, SpacetimeTransformer)
    noise = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    videos = [pipe(PROMPT, NEGATIVE, latents=noise, **SETTINGS).frames for pipe in (theirs, ours)]
    assert videos[0].std() > 0.05
    assert np.abs(videos[0] - videos[1]).max() < 1e-4


def test_the_video_is_decoded_as_a_stream(wan_folder):
    _, pipe = load(wan_folder)
    pipe.vae.frames_per_slice = 4
    generator = torch.Generator().manual_seed
    latents = pipe(PROMPT, generator=generator(1), output_type="latent", **SETTINGS).frames
    pieces = list(pipe.decode_stream(latents))
    assert [piece.shape[1] for piece in pieces] == [1, 4, 4]
    whole = pipe(PROMPT, generator=generator(1), **SETTINGS).frames
    assert np.abs(np.concatenate(pieces, axis=1) / 255 - whole).max() < 0.51 / 255 + 1e-5


def test_it_is_saved_as_ours(wan_folder, tmp_path):
    _, pipe = load(wan_folder)
    pipe.save_pretrained(tmp_path)
    again = VideoGenPipeline.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "VideoGenPipeline"
    weights = again.transformer.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in pipe.transformer.state_dict().items())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"_class_name": "WanImageToVideoPipeline"}, "WanImageToVideoPipeline"),
        ({"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline"),
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "transformer_2"),
        ({"boundary_ratio": 0.875}, "boundary_ratio"),
        ({"expand_timesteps": True}, "expand_timesteps"),
    ],
)
def test_other_layouts_are_rejected_by_name(wan_folder, tmp_path, change, named):
    index = json.loads((wan_folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=named):
        VideoGenPipeline.from_pretrained(tmp_path)
