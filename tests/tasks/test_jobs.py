"""Jobs over many inputs: every file is written once, however often a run is interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.warm import warm_python
from vgen.data.video_io import VideoWriter, read_video, write_video
from vgen.io.atomic import locked
from vgen.io.records import check_settings
from vgen.tasks.engine import EngineOptions
from vgen.tasks.jobs import (
    Job,
    JobConfig,
    ModelConfig,
    job_worker,
    prompt_jobs,
    read_manifest,
    run_jobs,
    run_settings,
    video_jobs,
)
from vgen.tasks.video_files import rollout_in_segments

from ..test_pipeline import make_pipeline, seeded

ROOT = Path(__file__).parents[2]
JOBS = [Job(f"{index}.txt", {"prompt": f"number {index}", "seed": index}) for index in range(4)]


class Maker:
    """Writes the prompt into the file; fails for some names."""

    def __init__(self, bad=()):
        self.bad, self.written = bad, []

    def __call__(self, job, path):
        if job.name in self.bad:
            raise ValueError("two\nlines")
        self.written.append(job.name)
        path.write_text(job.inputs["prompt"])
        return {"num_frames": 1}


def run(folder, maker, jobs=JOBS, **settings):
    return run_jobs(jobs, EngineOptions(), folder, lambda: job_worker(maker, folder, settings))


def test_finished_jobs_are_skipped_and_failed_jobs_are_retried(tmp_path, capsys):
    first, again = Maker(bad=["2.txt"]), Maker()
    assert run(tmp_path, first) == 1 and first.written == ["0.txt", "1.txt", "3.txt"]
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["0.txt", "1.txt", "2.txt", "3.txt"]
    assert lines[2]["status"] == "failed" and lines[2]["error"] == "two lines"
    assert lines[0] | {"seconds": 0, "time": 0} == {
        "name": "0.txt", "status": "done", "prompt": "number 0", "seed": 0, "num_frames": 1, "seconds": 0, "time": 0
    }  # fmt: skip
    assert "3 of 4 done, 1 failed" in capsys.readouterr().out
    assert run(tmp_path, again) == 0 and again.written == ["2.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0.txt", "1.txt", "2.txt", "3.txt", "manifest.jsonl", "settings.json"
    ]  # fmt: skip


def test_a_job_out_of_memory_frees_its_memory_before_the_next(tmp_path):
    held = []

    def make(job, path):
        if job.name == "0.txt":
            big = torch.zeros(1)
            big.itself = big  # a cycle, as networks with hooks have them
            held.append(weakref.ref(big))
            raise torch.OutOfMemoryError("out of memory")
        assert held[0]() is None
        path.write_text("done")
        return {}

    assert run(tmp_path, make, JOBS[:2]) == 1 and (tmp_path / "1.txt").is_file()


def test_jobs_with_changed_inputs_or_missing_files_run_again(tmp_path):
    run(tmp_path, Maker())
    changed = [Job("0.txt", {"prompt": "another", "seed": 0}), *JOBS[1:]]
    (tmp_path / "3.txt").unlink()
    maker = Maker()
    assert run(tmp_path, maker, changed) == 0 and maker.written == ["0.txt", "3.txt"]
    back = Maker()
    assert run(tmp_path, back) == 0 and back.written == ["0.txt"]  # its first line is older than its file
    assert (tmp_path / "0.txt").read_text() == "number 0"


def test_a_truncated_manifest_and_leftovers_of_a_killed_writer_do_no_harm(tmp_path):
    run(tmp_path, Maker())
    whole = (tmp_path / "manifest.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "manifest.jsonl").unlink()
    (tmp_path / "manifest-00000.jsonl").write_text(whole[0] + whole[1][:20])  # as in the middle of a run
    (tmp_path / "manifest-00001.jsonl").write_text(whole[3])
    (tmp_path / ".1-abcd_123").mkdir()
    (tmp_path / ".1-abcd_123" / "1.txt").write_text("half")
    (tmp_path / ".11-keep").mkdir()
    maker = Maker()
    assert run(tmp_path, maker) == 0 and maker.written == ["1.txt", "2.txt"]
    assert set(read_manifest(tmp_path)) == {"0.txt", "1.txt", "2.txt", "3.txt"}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"0.txt", "1.txt", "2.txt", "3.txt", "manifest.jsonl", "settings.json", ".11-keep"}


def test_other_settings_and_duplicate_names_are_an_error(tmp_path):
    run(tmp_path, Maker(), model="a", steps=3)
    with pytest.raises(ValueError, match=r"different settings \(steps\): choose another folder"):
        run(tmp_path, Maker(), model="a", steps=4)
    with pytest.raises(ValueError, match="'0.txt'"):
        run(tmp_path / "new", Maker(), [JOBS[0], JOBS[0]])
    with pytest.raises(ValueError, match="'a/b'"):
        run(tmp_path / "new", Maker(), [Job("a/b", {})])
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="no settings.json"):
        check_settings(tmp_path, {}, ["*.txt"])


def test_inputs_become_jobs(tmp_path):
    config = JobConfig(output_dir=tmp_path, seed=5)
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert prompt_jobs(tmp_path / "a.txt", config) == [
        Job("000000.mp4", {"prompt": "one", "seed": 5}), Job("000001.mp4", {"prompt": "two", "seed": 6})
    ]  # fmt: skip
    rows = [{"prompt": "one", "name": "x", "seed": 1}, {"prompt": {"0": "one", "8": "two"}}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    named, scheduled = prompt_jobs(tmp_path / "b.jsonl", config, schedules=True)
    assert named == Job("x.mp4", {"prompt": "one", "seed": 1}) and scheduled.inputs["prompt"]["8"] == "two"
    assert "prompt and name must be strings" in prompt_jobs(tmp_path / "b.jsonl", config)[1].error
    for name, content, message in (
        ("d.txt", b" ", "at least one prompt"),
        ("e.txt", b"\xff", "is not UTF-8 text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{tmp_path / name}.*{message}"):
            prompt_jobs(tmp_path / name, config)
    folder = tmp_path / "videos"
    (folder / "frames").mkdir(parents=True)
    for name in ("b.mp4", "a.gif", "notes.txt", ".hidden.mp4"):
        (folder / name).touch()
    assert [job.name for job in video_jobs(folder, config)] == ["a.mp4", "b.mp4", "frames.mp4"]
    with pytest.raises(ValueError, match="expected videos"):
        video_jobs(folder / "frames", config)
    config.suffix = ".avi"
    for make, source in ((prompt_jobs, tmp_path / "a.txt"), (video_jobs, folder)):
        with pytest.raises(ValueError, match="suffix must be one of '.mp4', '.gif', '.webp', '', got '.avi'"):
            make(source, config)


MALFORMED = {
    "{": "expected one JSON object",
    "[" * 100_000: "expected one JSON object",
    "3": "must have a prompt",
    "{}": "must have a prompt",
    '{"prompt": "x", "size": 1}': "must have a prompt",
    '{"prompt": "x", "seed": true}': "seed an integer",
    '{"prompt": "x", "seed": "y"}': "seed an integer",
    '{"prompt": "x", "seed": 1.0}': "seed an integer",
    '{"prompt": "x", "seed": NaN}': "seed an integer",
    '{"prompt": "x", "seed": -1}': "seed must be at least 0 and below 2**63, got -1",
    '{"prompt": "x", "seed": 9223372036854775808}': "seed must be at least 0 and below 2**63",
    '{"prompt": 3}': "must be strings",
    '{"prompt": null}': "must be strings",
    '{"prompt": "x", "name": 1}': "must be strings",
    '{"prompt": "x", "name": "a/b"}': "name must be a file name without a folder, got 'a/b'",
    '{"prompt": "x", "name": ".."}': "name must be a file name",
    '{"prompt": "x", "name": ""}': "name must be a file name",
    '{"prompt": "x", "name": "a\\u0000"}': "name must be a file name",
    '{"prompt": "x", "name": "good"}': "an earlier line has the name 'good'",
}


def test_a_malformed_line_fails_alone_and_is_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(['\ufeff{"prompt": "a\u2028b", "name": "good"}', *MALFORMED, '{"prompt": "last"}']))
    config = JobConfig(output_dir=tmp_path / "out", suffix="")
    jobs = prompt_jobs(path, config)
    assert jobs[0] == Job("good", {"prompt": "a\u2028b", "seed": 0}) and jobs[-1].inputs["prompt"] == "last"
    for number, (job, message) in enumerate(zip(jobs[1:-1], MALFORMED.values(), strict=True), 2):
        assert job.error.startswith(f"line {number} of {path}: ") and message in job.error, job
    maker = Maker()
    assert run(tmp_path / "out", maker, jobs) == len(MALFORMED)
    assert maker.written == ["good", jobs[-1].name]
    lines = read_manifest(tmp_path / "out")
    assert all(lines[job.name]["error"] == " ".join(job.error.split()) for job in jobs[1:-1])


def test_malformed_lines_of_a_manifest_are_ignored(tmp_path):
    run(tmp_path, Maker())
    rows = [b"{", b"3", b"null", b"[]", b"{}", b'{"name": 1}', b'{"name": "0.txt", "time": null}', b"\xff\xfe", b"\0",
            b"[" * 100_000]  # fmt: skip
    with open(tmp_path / "manifest.jsonl", "ab") as file:
        file.write(b"\n".join(rows))
    assert set(read_manifest(tmp_path)) == {job.name for job in JOBS}
    assert run(tmp_path, again := Maker()) == 0 and not again.written


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_malformed_settings_of_a_folder_are_named(tmp_path, text):
    run(tmp_path, Maker())
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path / 'settings.json'} must be a JSON object"):
        run(tmp_path, Maker())


HOLD = """
import sys, time
from pathlib import Path
from vgen.io.atomic import locked
from vgen.io.records import check_settings

with locked(Path(sys.argv[1]), Path(sys.argv[2])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_command_for_the_same_folder_names_the_process_that_writes_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr("vgen.processes.locked", partial(locked, wait=0.2))
    command = [sys.executable, "-c", HOLD, str(tmp_path), str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"{tmp_path} is in use by process {process.pid} on .*: wait until"):
            run(tmp_path, Maker())
        process.kill()
    assert run(tmp_path, Maker()) == 0 and not (tmp_path / ".lock").exists()


def test_a_job_changes_if_its_video_is_replaced_but_not_with_other_videos(tmp_path):
    def jobs(**options):
        return {job.name: job for job in video_jobs(tmp_path, JobConfig(output_dir=tmp_path, **options))}

    (tmp_path / "b.mp4").write_bytes(b"as it was")
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "0.png").write_bytes(b"as it was")
    before = jobs()
    one, two, other = (job.inputs["seed"] for job in (*before.values(), jobs(seed=1)["frames.mp4"]))
    assert one != two != other
    (tmp_path / "a.mp4").symlink_to("nowhere")
    assert {name: job for name, job in jobs().items() if name != "a.mp4"} == before
    (tmp_path / "frames" / "1.png").write_bytes(b"new")
    assert jobs()["frames.mp4"] != before["frames.mp4"] and jobs()["b.mp4"] == before["b.mp4"]
    (tmp_path / "b.mp4").write_bytes(b"as it is.")
    os.utime(tmp_path / "b.mp4", (1, 1))
    assert jobs()["b.mp4"] != before["b.mp4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    abilities = {"tasks": ["text", "leading", "keyframes"], "window": 2, "sink": 1, "trained_token_frames": 5}
    make_pipeline(**abilities).save_pretrained(folder)
    return folder


def start(script, model, output_dir, *, processes=1, **options):
    options |= {"output_dir": output_dir} | ({} if model is None else {"model": model})
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    launcher += ["--main_process_port=0"]
    command = [warm_python(), *(launcher if processes > 1 else []), str(ROOT / "pipelines" / script), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def finish(*args, code=0, **options):
    process = start(*args, **options)
    out, err = process.communicate()
    assert process.returncode == code, err[-3000:]
    return out


def kill_when(process, ready):
    while not ready():
        assert process.poll() is None, "finished before it could be killed: " + process.stderr.read()[-2000:]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def frames_in(folder):
    return {path.name: read_video(path)[0] for path in folder.iterdir() if path.suffix == ".mp4"}


@pytest.mark.slow
def test_text_to_video_survives_a_kill_and_does_not_depend_on_the_processes(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n" * 10)
    options = {"prompts": tmp_path / "prompts.txt", "num_inference_steps": 15}
    killed, plain = tmp_path / "killed", tmp_path / "plain"
    process = start("text_to_video.py", model, killed, **options)
    kill_when(process, lambda: (killed / "000002.mp4").exists())
    assert len(frames_in(killed)) < 10
    assert "10 of 10 done" in finish("text_to_video.py", model, killed, processes=2, **options)
    finish("text_to_video.py", model, plain, **options)
    expected = frames_in(plain)
    assert len(expected) == 10 and not np.array_equal(expected["000000.mp4"], expected["000001.mp4"])
    for name, frames in frames_in(killed).items():
        assert np.array_equal(frames, expected[name])
    assert sorted(path.name for path in killed.iterdir()) == sorted([*expected, "manifest.jsonl", "settings.json"])


@pytest.mark.parametrize("stride", [1, 2])
def test_an_interrupted_rollout_resumes_from_its_saved_state(tmp_path, monkeypatch, stride):
    pipe = make_pipeline(tasks=["text", "leading", "keyframes"], window=2, sink=1, trained_token_frames=5)
    work, output = tmp_path / ".v.1", tmp_path / "v.mp4"
    settings = {"num_frames": 60, "num_inference_steps": 1, "segment_frames": 16, "keyframe_interval": stride}

    def record(**options):
        return rollout_in_segments(pipe, "a red circle", output, work, **settings | options)

    expected = np.concatenate(list(pipe.rollout("a red circle", generator=seeded(), num_frames=60,
                                                num_inference_steps=1, keyframe_interval=stride)))  # fmt: skip
    kind = type(pipe.rollout("a red circle", keyframe_interval=stride))
    save, saved, append, written = kind.save, [], VideoWriter.append, []

    def listen(self, frames):
        written.append(frames)
        append(self, frames)

    monkeypatch.setattr("vgen.tasks.video_files.VideoWriter.append", listen)

    def save_and_stop(self, folder):
        save(self, folder)
        saved.append(self.frames_done)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kind, "save", save_and_stop)
        record()
    assert 0 < saved[0] < saved[1] < 60 and not output.exists()
    (work / f"{saved[1]:09d}.mp4").write_bytes((work / "000000000.mp4").read_bytes())  # its state was not saved
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "rollout", lambda *_, **__: pytest.fail("started again"))
        assert record() == {"num_frames": 60}
    frames, _ = read_video(output)
    assert len(frames) == 60 and np.array_equal(np.concatenate(written), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]
    work.mkdir()
    write_video(expected[:16], work / "000000000.mp4")  # segments without a state are not resumed
    assert record() == {"num_frames": 60}
    assert np.array_equal(read_video(output)[0], frames)
    with pytest.raises(ValueError, match="num_frames must be set"):
        record(num_frames=None)


def test_a_checkpoint_with_other_defaults_makes_other_files(tmp_path):
    pipe, config = make_pipeline(), ModelConfig(output_dir=tmp_path)
    one = run_settings(config, pipe)
    assert one["defaults"]["num_frames"] == 9 and json.loads(json.dumps(one["defaults"])) == one["defaults"]
    (tmp_path / "a.mp4").touch()
    (tmp_path / "settings.json").write_text(json.dumps(one, default=str))
    check_settings(tmp_path, run_settings(config, make_pipeline()), ["*.mp4"])
    pipe.register_to_config(rollout_defaults={"chunk_size": 1})
    with pytest.raises(ValueError, match=r"different settings \(defaults\): choose"):
        check_settings(tmp_path, run_settings(config, pipe), ["*.mp4"])


def test_a_killed_rollout_resumes_in_the_middle_of_a_video(model, tmp_path):
    rows = [{"prompt": {"0": "a red circle", "40": "a blue square"}, "name": "long"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps(rows[0]))
    options = {"prompts": tmp_path / "prompts.jsonl", "num_frames": 120, "segment_frames": 16,
               "num_inference_steps": 2, "guidance_scale": 2.0, "chunk_size": 1}  # fmt: skip
    killed, plain = tmp_path / "killed", tmp_path / "plain"
    process = start("rollout.py", model, killed, **options)
    kill_when(process, lambda: len(list(killed.glob(".long.*/*.mp4"))) >= 3)
    assert not (killed / "long.mp4").exists()
    [state] = killed.glob(".long.*/state/rollout.json")
    saved = json.loads(state.read_text())
    assert 0 < saved["frames_done"] < 120 and saved["options"]["chunk_size"] == 1
    finish("rollout.py", model, killed, **options)
    finish("rollout.py", model, plain, **options | {"segment_frames": 16})
    assert np.array_equal(frames_in(killed)["long.mp4"], frames_in(plain)["long.mp4"])
    assert len(frames_in(plain)["long.mp4"]) == 120
    assert {path.name for path in killed.iterdir()} == {"long.mp4", "manifest.jsonl", "settings.json"}


def test_a_damaged_video_is_recorded_and_does_not_stop_the_rest(model, tmp_path):
    (tmp_path / "videos").mkdir()
    frames = np.random.default_rng(0).integers(0, 256, (6, 24, 40, 3), dtype=np.uint8)
    write_video(frames, tmp_path / "videos" / "good.gif", frame_rate=4.0)
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"nothing")
    for script, options, count in (("predict.py", {"num_frames": 5}, 5), ("interpolate.py", {"factor": 3}, 16)):
        folder = tmp_path / script
        finish(script, model, folder, code=1, videos=tmp_path / "videos", num_inference_steps=1, suffix="", **options)
        lines = read_manifest(folder)
        assert lines["bad"]["status"] == "failed" and "bad.mp4" in lines["bad"]["error"]
        assert lines["good"]["num_frames"] == count and "24x24" in lines["good"]["fit"]
        frames, rate = read_video(folder / "good")
        assert frames.shape == (count, 24, 24, 3) and rate == pytest.approx(4)


def test_only_line_ends_separate_prompts(tmp_path):
    prompt, config = "a cat\u2028(runs\x0bfast\x85now", JobConfig(output_dir=tmp_path)
    (tmp_path / "prompts.txt").write_bytes(f"\ufeff{prompt}\r\n\r\na dog".encode())
    assert [job.inputs["prompt"] for job in prompt_jobs(tmp_path / "prompts.txt", config)] == [prompt, "a dog"]
    row = json.dumps({"prompt": prompt, "name": "x"}, ensure_ascii=False)
    (tmp_path / "prompts.JSONL").write_bytes(f"\ufeff{row}\n".encode())
    (job,) = prompt_jobs(tmp_path / "prompts.JSONL", config)
    assert job.name == "x.mp4" and job.inputs["prompt"] == prompt
    (tmp_path / "prompts.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts\.txt is not UTF-8 text"):
        prompt_jobs(tmp_path / "prompts.txt", config)


def test_folders_of_systems_are_no_videos(tmp_path):
    for name in ("__MACOSX", "@eaDir", ".git", "frames"):
        (tmp_path / name).mkdir()
    for name in ("._a.mp4", "a.mp4", "b.TS"):
        (tmp_path / name).write_bytes(b"x")
    jobs = video_jobs(tmp_path, JobConfig(output_dir=tmp_path))
    assert [Path(job.inputs["video"]).name for job in jobs] == ["a.mp4", "b.TS", "frames"]
