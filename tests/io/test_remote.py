"""Inputs and outputs at URLs: in memory, and on a local S3 server."""

import json
import runpy
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from tests.test_pipeline import make_pipeline
from vgen.data.latents import LatentSet
from vgen.data.video_io import read_video, write_video
from vgen.io.remote import as_path, last_modified, local_copy, local_input, local_output
from vgen.io.settings import parse_settings
from vgen.tasks.engine import EngineOptions
from vgen.tasks.evaluation import EvaluationConfig, evaluate
from vgen.tasks.jobs import Job, JobConfig, job_worker, read_manifest, run_jobs, video_jobs
from vgen.tasks.video_files import predict_file

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def s3():
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        server.start()
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
        server.stop()


@pytest.fixture(params=["memory", "s3"])
def url(request, tmp_path):
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    return f"memory://{tmp_path.name}"


def run(jobs, folder, make, **settings):
    return run_jobs(jobs, EngineOptions(), folder, lambda: job_worker(make, folder, settings))


def lines_of(folder):
    lines = map(json.loads, (as_path(folder) / "manifest.jsonl").read_text().splitlines())
    left_out = ("seconds", "time", "modified", "video")
    return [{name: value for name, value in line.items() if name not in left_out} for line in lines]


def test_local_paths_stay_as_they_are_and_urls_keep_their_slashes(tmp_path):
    assert as_path("a/b") == Path("a/b") and as_path(tmp_path) is tmp_path
    assert str(as_path("memory://a/b")).startswith("memory://") and as_path("memory://a/b").name == "b"
    with pytest.raises(ValueError, match="a URL must be a string"):
        as_path(Path("s3://bucket/folder"))
    with pytest.raises(ValueError, match="no file system for nowhere:// is known"):
        as_path("nowhere://a")


def test_the_command_line_keeps_the_slashes_of_urls():
    config = parse_settings(JobConfig, "", ["--output_dir", "s3://bucket/a", "--engine", "ray"])
    assert config.output_dir == "s3://bucket/a" and config.engine == "ray"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ImportError, match="pip install gcsfs"):
        as_path("gs://bucket/a")


def test_files_and_folders_come_back_as_they_were_written(url):
    for name, content in (("a.txt", b"one"), ("a.txt", b"another")):
        with local_output(as_path(url) / name) as path:
            path.write_bytes(content)
    with local_input(f"{url}/a.txt") as path:
        assert path.name == "a.txt" and path.read_bytes() == b"another"
    assert not path.exists()
    for names in (("0.png", "1.png"), ("0.png",)):
        with local_output(as_path(url) / "frames") as folder:
            folder.mkdir()
            for name in names:
                (folder / name).write_bytes(name.encode())
    copy = local_copy(f"{url}/frames")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {"0.png": b"0.png"}
    with pytest.raises(RuntimeError), local_output(as_path(url) / "b.txt") as path:
        path.write_text("half")
        raise RuntimeError
    assert not (as_path(url) / "b.txt").exists()
    with pytest.raises(FileNotFoundError, match="no such file"), local_input(f"{url}/nothing"):
        pass
    assert last_modified(as_path(url) / "a.txt") > 1e9


def test_jobs_at_urls_resume_and_equal_local_ones(url, tmp_path):
    jobs = [Job(f"{index}.txt", {"prompt": f"number {index}"}) for index in range(4)]
    written = []

    def make(job, path, failing=()):
        if job.name in failing:
            raise KeyboardInterrupt
        written.append(job.name)
        path.write_text(job.inputs["prompt"])
        return {"num_frames": 1}

    with pytest.raises(KeyboardInterrupt):
        run(jobs, url, lambda job, path: make(job, path, ["2.txt"]), steps=3)
    assert set(read_manifest(as_path(url))) == {"0.txt", "1.txt"}
    assert run(jobs, url, make, steps=3) == 0 and run(jobs, url, make, steps=3) == 0
    assert written == ["0.txt", "1.txt", "2.txt", "3.txt"]
    run(jobs, tmp_path, make, steps=3)
    assert sorted(path.name for path in as_path(url).iterdir()) == sorted(path.name for path in tmp_path.iterdir())
    assert lines_of(url) == lines_of(tmp_path)
    with pytest.raises(ValueError, match=r"different settings \(steps\)"):
        run(jobs, url, make, steps=4)


@pytest.mark.parametrize("suffix", [".mp4", ""])
def test_videos_at_urls_give_the_same_videos(url, tmp_path, suffix):
    pipe = make_pipeline(tasks=["text", "leading"], window=2, sink=1)
    (tmp_path / "clips").mkdir()
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    write_video(frames, tmp_path / "clips" / f"a{suffix}", frame_rate=8)
    with local_output(as_path(f"{url}/clips") / f"a{suffix}") as path:
        write_video(frames, path, frame_rate=8)

    def make(job, path):
        with local_input(job.inputs["video"]) as video:
            return predict_file(pipe, video, path, num_frames=4, num_inference_steps=1, seed=job.inputs["seed"])

    folders = (tmp_path / "clips", tmp_path / "out"), (f"{url}/clips", f"{url}/out")
    for inputs, outputs in folders:
        config = JobConfig(output_dir=outputs, suffix=suffix)
        before = video_jobs(inputs, config)
        assert run(before, outputs, make) == 0 and video_jobs(inputs, config) == before
    with local_input(f"{url}/out/a{suffix}") as video:
        assert np.array_equal(read_video(video)[0], read_video(tmp_path / "out" / f"a{suffix}")[0])
    assert lines_of(f"{url}/out") == lines_of(tmp_path / "out")


def test_latents_and_evaluations_at_urls_resume(tmp_path, monkeypatch):
    make_pipeline(tasks=["text", "leading"]).save_pretrained(tmp_path)
    folder = f"memory://{tmp_path.name}"
    options = {
        "vae": tmp_path / "vae", "output_dir": f"{folder}/latents", "height": 16, "width": 16, "num_frames": 5,
        "batch_size": 2, "shard_size": 2, "num_clips": 3, "mixed_precision": "no",
    }  # fmt: skip
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(
        sys, "argv", ["", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    )
    config = EvaluationConfig(
        output_dir=f"{folder}/out", model=str(tmp_path), num_clips=2, tasks=["reconstruction"], batch_size=1
    )
    modified = []
    for _ in range(2):
        runpy.run_path(str(ROOT / "pipelines/encode_latents.py"), run_name="__main__")
        results = evaluate(config)
        files = [*as_path(f"{folder}/latents").glob("*.safetensors"), *as_path(f"{folder}/out/clips").glob("0*.json")]
        modified.append([last_modified(path) for path in sorted(files, key=str)])
    assert modified[0] == modified[1] and len(modified[0]) == 4
    assert json.loads((as_path(folder) / "out/results.json").read_text()) == results
    assert len(LatentSet(local_copy(f"{folder}/latents"))) == 3
