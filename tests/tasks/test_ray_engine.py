"""Jobs on a Ray cluster of two nodes: the same files and lines as without Ray, also if actors and nodes are killed."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest

from tests.tasks.test_jobs import finish, frames_in, start
from tests.test_pipeline import make_pipeline
from tests.warm import warm_python
from vgen.data.latents import LatentSet
from vgen.tasks.engine import EngineOptions, Worker
from vgen.tasks.ray_engine import MAX_DEATHS, ItemError, ray_pool

NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("ACCELERATE_USE_CPU", "true")
        from ray.cluster_utils import Cluster

        patch.setattr(sys, "executable", warm_python())  # that of actors, which import PyTorch
        cluster = Cluster(initialize_head=True, head_node_args=NODE)
        yield cluster
        cluster.shutdown()


@pytest.fixture
def second_node(cluster):
    node = cluster.add_node(**NODE)
    yield node
    if node in cluster.list_all_nodes():
        cluster.remove_node(node)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_pipeline(tasks=["text", "leading", "keyframes"], window=2, sink=1).save_pretrained(folder)
    return folder


def wait_until(process, ready):
    while not ready():
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail("finished too early: " + process.stderr.read()[-3000:])


def lines_of(folder):
    lines = map(json.loads, (folder / "manifest.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in ("seconds", "time")} for line in lines]


def actors(cluster):
    """The processes of actors of a cluster, which write into its folder."""
    session = cluster.head_node.get_session_dir_path()
    processes = psutil.process_iter(["name", "open_files"])  # skips those that end meanwhile
    found = [one for one in processes if one.info["name"].startswith("ray::_Actor")]
    return [one for one in found if any(file.path.startswith(session) for file in one.info["open_files"] or ())]


@pytest.mark.slow
def test_a_killed_actor_and_a_killed_node_do_not_stop_a_job_or_change_its_outputs(
    cluster, second_node, model, tmp_path
):
    (tmp_path / "prompts.txt").write_text("a red circle\n" * 8)
    options = {"prompts": tmp_path / "prompts.txt", "num_inference_steps": 25}
    killed, plain = tmp_path / "killed", tmp_path / "plain"
    process = start("text_to_video.py", model, killed, engine="ray", ray_address=cluster.address, **options)
    wait_until(process, lambda: len(list(killed.glob("*.mp4"))) >= 1)
    os.kill(actors(cluster)[0].pid, signal.SIGKILL)
    wait_until(process, lambda: len(list(killed.glob("*.mp4"))) >= 3)
    recorded = (killed / "manifest-00000.jsonl").read_text().splitlines()
    times = {name: (killed / name).stat().st_mtime_ns for name in (json.loads(line)["name"] for line in recorded)}
    cluster.remove_node(second_node, allow_graceful=False)
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert "8 of 8 done, 0 failed" in output
    assert times and times == {name: (killed / name).stat().st_mtime_ns for name in times}
    finish("text_to_video.py", model, plain, **options)
    assert lines_of(killed) == lines_of(plain)
    assert (killed / "settings.json").read_text() == (plain / "settings.json").read_text()
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in plain.iterdir())
    expected = frames_in(plain)
    assert all(np.array_equal(frames, expected[name]) for name, frames in frames_in(killed).items())


@pytest.mark.slow
def test_evaluations_and_latents_are_those_of_accelerate(cluster, model, tmp_path):
    ray = {"engine": "ray", "ray_address": cluster.address}
    evaluation = {"suite": "shapes", "num_clips": 2, "tasks": '["reconstruction"]', "batch_size": 1}
    latents = {"vae": model / "vae", "height": 16, "width": 16, "num_frames": 5, "batch_size": 2, "shard_size": 2,
               "num_clips": 3, "mixed_precision": "no"}  # fmt: skip
    for name, options in (("ray", ray), ("plain", {})):
        finish("evaluate.py", model, tmp_path / name / "evaluation", **evaluation, **options)
        finish("encode_latents.py", None, tmp_path / name / "latents", **latents, **options)
    of_ray, plain = tmp_path / "ray", tmp_path / "plain"
    results = [json.loads((folder / "evaluation/results.json").read_text()) for folder in (of_ray, plain)]
    assert results[0] == results[1]
    assert lines_of(of_ray / "evaluation/clips") == lines_of(plain / "evaluation/clips")
    shards = [path.name for path in sorted((plain / "latents").iterdir())]
    assert shards == [path.name for path in sorted((of_ray / "latents").iterdir())] and len(shards) == 3
    assert all((plain / "latents" / name).read_bytes() == (of_ray / "latents" / name).read_bytes() for name in shards)
    assert len(LatentSet(of_ray / "latents")) == 3


@pytest.mark.slow
def test_an_item_that_ends_its_actors_is_given_up_and_others_are_done_once(cluster, tmp_path):
    def load():
        import os

        (tmp_path / f"loaded-{os.getpid()}").touch()

        def work(item):
            with (tmp_path / str(item)).open("a") as file:
                file.write("once ")
            if item == 1:
                os._exit(1)
            return 2 * item

        return Worker("settings", work)

    def fail():
        raise ValueError("no such model")

    options = EngineOptions(engine="ray", ray_address=cluster.address)
    with ray_pool(load, options, 4) as pool:
        assert pool.settings == "settings"
        results = dict(pool.map([0, 1, 2, 3]))
    assert isinstance(results.pop(1), ItemError) and results == {0: 0, 2: 4, 3: 6}
    assert [(tmp_path / str(item)).read_text() for item in (0, 2, 3)] == ["once "] * 3
    assert (tmp_path / "1").read_text() == "once " * MAX_DEATHS
    assert len(list(tmp_path.glob("loaded-*"))) == MAX_DEATHS + 1
    with pytest.raises(ValueError, match="no such model"), ray_pool(fail, options, 1) as pool:
        _ = pool.settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ray_actors": 0}, "ray_actors must be an integer of at least 1, got 0"),
        ({"ray_cpus": -1.0}, "ray_cpus"),
        ({"ray_gpus": -1.0}, "ray_gpus"),
    ],
)
def test_invalid_options_are_an_error_before_a_cluster_starts(options, message):
    with pytest.raises(ValueError, match=message), ray_pool(lambda: None, EngineOptions(**options)):
        pass


def test_ray_replaces_accelerate_launch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="run the script with python"), ray_pool(lambda: None, EngineOptions()):
        pass


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "vgen\[ray\]"'), ray_pool(lambda: None, EngineOptions()):
        pass
