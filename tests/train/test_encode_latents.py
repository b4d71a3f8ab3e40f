"""Latents of every kind of data, and what is trained on them."""

import gzip
import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.fixtures import write_tar
from vgen.data.latents import LatentSet
from vgen.data.shapes import ShapesWorld, render
from vgen.data.video_io import read_video, write_video
from vgen.models.vae import CausalVideoVAE
from vgen.temporal.flow import measure_motion

from .scripts import (
    encode,
    latents_of,
    train_vae,
    train_vdm,
)


def test_latents_are_normalized_and_the_same_command_resumes(vae_run, latents_dir):
    paths = sorted(latents_dir.glob("*.safetensors"))
    assert [path.name for path in paths] == ["00000000-00000008.safetensors", "00000008-00000012.safetensors"]
    latents = torch.cat([load_file(path)["latents"] for path in paths]).float()
    assert latents.shape == (12, 4, 2, 2, 2)
    before = paths[0].stat().st_mtime_ns
    paths[1].unlink()
    encode(vae_run, latents_dir)
    assert paths[0].stat().st_mtime_ns == before
    again = torch.cat([load_file(path)["latents"] for path in paths]).float()
    assert torch.equal(latents, again)
    rejected = encode(vae_run, latents_dir, check=False, **{"--seed": 1})
    assert rejected.returncode != 0 and "different settings (seed)" in rejected.stderr


@pytest.mark.parametrize("fast", ["no", "bf16"])
def test_the_faster_precision_is_used_and_kept_when_the_command_resumes(vae_run, tmp_path, monkeypatch, fast):
    monkeypatch.setattr("vgen.machine.fast_precision", lambda device: fast)
    chosen = {"--num_clips": 4, "--shard_size": 2}
    encode(vae_run, tmp_path / "auto", **chosen, **{"--mixed_precision": "auto"})
    encode(vae_run, tmp_path / "requested", **chosen, **{"--mixed_precision": fast})
    automatic, requested = LatentSet(tmp_path / "auto"), LatentSet(tmp_path / "requested")
    assert torch.equal(latents_of(automatic), latents_of(requested))
    sorted((tmp_path / "auto").glob("*.safetensors"))[1].unlink()
    monkeypatch.setattr("vgen.machine.fast_precision", lambda device: "no" if fast == "bf16" else "bf16")
    encode(vae_run, tmp_path / "auto", **chosen, **{"--mixed_precision": "auto"})
    assert torch.equal(latents_of(LatentSet(tmp_path / "auto")), latents_of(requested))


def test_a_folder_of_videos_is_encoded_and_trained_on(vae_run, text_run, tmp_path, caplog):
    videos = tmp_path / "videos"
    videos.mkdir()
    for index in range(3):
        frames = np.random.default_rng(index).integers(0, 256, (12, 24, 32, 3), dtype=np.uint8)
        write_video(frames, videos / f"{index}.mp4", frame_rate=8.0)
        (videos / f"{index}.txt").write_text(f"a red circle\nnumber {index}")
    (videos / "broken.mp4").write_bytes((videos / "0.mp4").read_bytes()[:900])
    options = {"--data": videos, "--frame_rates": "[8.0, 4.0]"}
    train_vae(tmp_path / "vae", **options, **{"--init": vae_run / "vae"})
    assert read_video(tmp_path / "vae/samples.mp4")[0].shape == (5, 32, 8 * 16, 3)
    latents = tmp_path / "latents"
    encode(tmp_path / "vae", latents, **options, **{"--num_clips": None})
    assert sum("skipped (" in message and "broken.mp4" in message for message in caplog.messages) == 1
    done = encode(tmp_path / "vae", tmp_path / "fresh", processes=2, **options, **{"--num_clips": None})
    assert "skipped (1 so far): " in done.stderr and "broken.mp4" in done.stderr
    assert json.loads((tmp_path / "fresh/settings.json").read_text()) == json.loads(
        (latents / "settings.json").read_text()
    )
    data, shared = LatentSet(tmp_path / "latents"), LatentSet(tmp_path / "fresh")
    torch.testing.assert_close(latents_of(shared), latents_of(data), atol=1e-2, rtol=0)  # half precision
    assert shared.captions == data.captions and torch.equal(shared.frame_rates, data.frame_rates)
    assert (len(data), *data.shape) == (9, 4, 2, 2, 2)  # two of 5 frames at 8 frames per second, one at 4, of each
    assert sorted(data.frame_rates.tolist()) == [4.0] * 3 + [8.0] * 6
    assert sorted(data.captions)[0] == ["a red circle", "number 0"]
    options = {"--sample_prompts": '["a red circle", "number 2"]', "--sample_every": 2, "--max_steps": 2}
    train_vdm((tmp_path / "vae", text_run, tmp_path / "latents"), tmp_path / "run", **options)
    assert read_video(tmp_path / "run/samples.mp4")[0].shape == (5, 16, 2 * 16, 3)


def test_captions_that_are_too_long_are_reported_while_they_are_embedded_or_trained_on(
    vae_run, text_run, latents_dir, tmp_path, caplog
):
    def reports():
        found = [message for message in caplog.messages if "their ends are cut" in message]
        caplog.clear()
        return found

    captions = [text for one in LatentSet(latents_dir).captions for text in one]
    tokenizer = AutoTokenizer.from_pretrained(text_run / "tokenizer")
    lengths = [len(tokenizer(text).input_ids) for text in captions]
    limit = sorted(set(lengths))[-2]  # cuts the longest only
    expected = f"{lengths.count(max(lengths))} of {len(captions)} captions have more than max_sequence_length={limit}"
    short = {"--max_sequence_length": limit}
    encode(vae_run, tmp_path / "embedded", **short, **{"--text_encoder": text_run, "--shard_size": 12})
    (report,) = reports()
    assert report.startswith(expected) and f"with {max(lengths)} tokens, this is cut: '" in report
    encode(vae_run, tmp_path / "more", **{"--text_encoder": text_run, "--max_sequence_length": 4, "--shard_size": 4})
    first, total = reports()
    assert "of 16 captions" in first and f"of {len(captions)} captions" in total
    for folder, count in ((tmp_path / "embedded", 0), (latents_dir, 1)):
        runs = vae_run, text_run, folder
        train_vdm(runs, tmp_path / folder.name / "run", **short, **{"--max_steps": 1, "--sample_every": 9})
        found = reports()
        assert len(found) == count and all(report.startswith(expected) for report in found)


def test_a_stream_is_encoded_shard_by_shard_and_resumes(vae_run, tmp_path, caplog):
    for index in range(5):
        frames = np.full((12, 16, 16, 3), 40 * index, dtype=np.uint8)
        write_video(frames, tmp_path / f"{index}.mp4", frame_rate=8.0)
    (tmp_path / "2.mp4").write_bytes(b"no video")
    videos = {f"{index}.mp4": (tmp_path / f"{index}.mp4").read_bytes() for index in range(5)}
    write_tar(tmp_path / "all.tar", videos | {f"{index}.txt": f"number {index}" for index in range(5)})
    options = {"--data": f"shards:{tmp_path}/all.tar", "--shard_size": 3, "--num_clips": 100}
    latents = tmp_path / "latents"
    encode(vae_run, latents, **options)
    assert [message.split(": ")[1] for message in caplog.messages if "skipped (" in message] == [
        f"{tmp_path}/all.tar/2.mp4"
    ]
    paths = sorted(latents.glob("*.safetensors"))
    # two clips of 5 frames a video; a shard ends with a whole video
    assert [path.stem.split("-", 4)[4] for path in paths] == ["00000000-00000002", "00000002-00000005"]
    captions = [["number 0"]] * 2 + [["number 1"]] * 2 + [["number 3"]] * 2 + [["number 4"]] * 2
    whole = LatentSet(latents)
    expected = latents_of(whole)
    assert whole.captions == captions
    paths[1].unlink()
    encode(vae_run, latents, **options)
    assert sorted(latents.glob("*.safetensors")) == paths and torch.equal(latents_of(LatentSet(latents)), expected)
    encode(vae_run, tmp_path / "few", **options | {"--num_clips": 3})
    assert LatentSet(tmp_path / "few").captions == captions[:3]
    train_vae(tmp_path / "vae", **{"--data": options["--data"], "--image_steps": 0, "--max_steps": 2})


def test_videos_go_to_buckets_of_their_shape_and_are_augmented(vae_run, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, (length, height, width) in {"wide": (12, 16, 32), "tall": (6, 40, 20), "long": (20, 16, 32)}.items():
        frames = np.random.default_rng(0).integers(0, 256, (length, height, width, 3), dtype=np.uint8)
        write_video(frames, videos / f"{name}.mp4", frame_rate=8.0)
        (videos / f"{name}.txt").write_text(name)
    options = {"--data": videos, "--buckets": '["5x16x32", "17x16x32", "5x32x16", "5x16x16"]'}
    done = encode(vae_run, tmp_path / "latents", **options)
    assert "bucket 5x16x16 is empty: every video is nearer to another bucket" in done.stdout
    encoded = {path.name: LatentSet(path) for path in (tmp_path / "latents").iterdir()}
    shapes = {name: (data.captions, data.shape) for name, data in encoded.items()}
    assert shapes == {
        "5x16x32": ([["wide"]] * 2, (4, 2, 2, 4)),
        "17x16x32": ([["long"]], (4, 5, 2, 4)),
        "5x32x16": ([["tall"]], (4, 2, 4, 2)),
    }
    augmented = {"--augment": '{"flip": 0.5, "brightness": 0.3}', "--repeats": 3, "--num_clips": 100}
    encode(vae_run, tmp_path / "more", **{"--data": videos, **augmented})
    more = LatentSet(tmp_path / "more")
    assert len(more) == 3 * (2 + 1 + 4)
    of_tall = [more[index].latents for index, captions in enumerate(more.captions) if captions == ["tall"]]
    assert len(of_tall) == 3 and not torch.equal(of_tall[0], of_tall[1])


def test_moving_digits_are_encoded_and_trained_on(vae_run, tmp_path):
    digits = np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, *digits.shape) + digits.tobytes()))
    size = {"--data": path, "--height": 64, "--width": 64}
    encode(vae_run, tmp_path / "latents", **size, **{"--num_clips": 5})
    data = LatentSet(tmp_path / "latents")
    assert (len(data), *data.shape) == (5, 4, 2, 8, 8) and data.captions == [[""]] * 5
    train_vae(tmp_path / "vae", **size, **{"--max_steps": 3, "--sample_every": 9, "--num_calibration_clips": 2})
    rejected = train_vae(tmp_path / "no", check=False, **{"--data": path})
    assert rejected.returncode != 0 and "Moving MNIST is 64x64" in rejected.stderr


def test_long_clips_are_encoded_with_their_rates_and_single_frames(vae_run, long_latents):
    data = LatentSet(long_latents)
    assert (len(data), *data.shape) == (12, 4, 5, 2, 2) and data[0].frames.shape == (16, 4, 2, 2)
    assert set(data.frame_rates.tolist()) == {4, 8}
    vae, world = CausalVideoVAE.from_pretrained(vae_run / "vae"), ShapesWorld()
    for index in range(4):
        size = {"num_frames": 17, "height": 16, "width": 16, "frame_rate": data[index].frame_rate}
        clip = render([world.scene(index)], **size)
        alone = vae.normalize(vae.encode(clip[:, :, 7:8]).latent_dist.mode())[0, :, 0]
        torch.testing.assert_close(data[index].frames[6].float(), alone, atol=0.1, rtol=0)  # bf16
        flow, seen = measure_motion(clip[:, :, ::4]).scaled_down(8)
        torch.testing.assert_close(data[index].motion.float(), torch.cat([flow, seen], 1)[0], atol=1e-2, rtol=0)
