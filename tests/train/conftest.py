"""Tiny runs of the training scripts that many tests start from."""

import pytest

from .scripts import encode, train_text_encoder, train_vae


@pytest.fixture(scope="session")
def vae_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    train_vae(folder)
    return folder


@pytest.fixture(scope="session")
def latents_dir(vae_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    encode(vae_run, folder)
    return folder


@pytest.fixture(scope="session")
def text_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    train_text_encoder(folder)
    return folder


@pytest.fixture(scope="session")
def runs(vae_run, text_run, latents_dir):
    return vae_run, text_run, latents_dir


@pytest.fixture(scope="session")
def long_latents(vae_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    options = {"--num_frames": 17, "--keyframes": "true", "--frame_rates": "[4.0, 8.0]", "--flow": "dis"}
    encode(vae_run, folder, **options)
    return folder
