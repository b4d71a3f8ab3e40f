"""Small copies of videos, and their split into training and held-out videos."""

import errno
import gzip
import json
import os
import shutil
import struct
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.fixtures import write_tar
from vgen.data import prepare as module
from vgen.data.clips import Sampling, VideoFolder, list_videos
from vgen.data.inspection import Survey, inspect_source
from vgen.data.prepare import PrepareConfig, describe, prepare
from vgen.data.video_io import read_video, video_info, write_video


def write_clip(path, num_frames=20, frame_rate=10.0, size=(32, 48), number=0):
    """Frame i is 5 i everywhere, but for a square whose brightness is the number of the video."""
    frames = np.repeat(np.arange(num_frames, dtype=np.uint8) * 5, size[0] * size[1] * 3).reshape(-1, *size, 3)
    frames[:, :8, :8] = number
    path.parent.mkdir(exist_ok=True, parents=True)
    write_video(frames, path, frame_rate=frame_rate, crf=8)


def natural(num_frames, height, width):
    """A camera that pans over a picture whose spectrum falls as 1/f, as that of photographs does."""
    rng = np.random.default_rng(0)
    rows, columns = height + num_frames, width + num_frames
    frequency = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.fftfreq(columns))
    frequency[0, 0] = 1
    planes = [np.fft.ifft2(np.fft.fft2(rng.standard_normal((rows, columns))) / frequency).real for _ in range(3)]
    picture = np.stack(planes, -1) @ [[1, 0.8, 0.7], [0.3, -0.2, 0.0], [0.0, 0.2, -0.3]]
    picture = (120 + 45 * picture / picture.std()).clip(0, 255).astype(np.uint8)
    return np.stack([picture[i // 2 :, i:][:height, :width] for i in range(num_frames)])


def psnr(one, other):
    return 10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2))


def config(tmp_path, **settings):
    tiny = {
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "output_dir": tmp_path / "out",
        "data": str(tmp_path / "videos"),
    }
    return PrepareConfig(**{**tiny, **settings})


def rows(tmp_path, side):
    return [json.loads(line) for line in (tmp_path / "out" / side / "metadata.jsonl").read_text().splitlines()]


def sources(tmp_path, side):
    return sorted(os.path.relpath(row["source"], tmp_path / "videos") for row in rows(tmp_path, side))


def frames_of(path):
    """Which frames of `write_clip` a copy has."""
    return np.round(read_video(path)[0][:, -6:, -6:].mean(axis=(1, 2, 3)) / 5).astype(int).tolist()


@pytest.fixture
def videos(tmp_path):
    """Six videos, two of them with captions, one of them in a subfolder."""
    folder = tmp_path / "videos"
    for number in range(6):
        name = f"{number}.mp4" if number < 5 else "deeper/0.mp4"
        write_clip(folder / name, number=40 * number)
    (folder / "1.txt").write_text("one\nfirst")
    (folder / "2.txt").write_text("two")
    return folder


def test_copies_are_split_by_video_with_captions_and_originals(videos, tmp_path):
    summary = prepare(config(tmp_path))
    assert summary["split"] == "video" and json.loads((tmp_path / "out/summary.json").read_text()) == summary
    assert len(sources(tmp_path, "train")) == 5 and len(sources(tmp_path, "held_out")) == 1
    names = [f"{number}.mp4" for number in range(5)] + ["deeper/0.mp4"]
    assert sorted(sources(tmp_path, "train") + sources(tmp_path, "held_out")) == sorted(names)
    found = {}
    for side in ("train", "held_out"):
        for listed, row in zip(list_videos(tmp_path / "out" / side), rows(tmp_path, side), strict=True):
            assert listed.path.name == row["file_name"]
            found[os.path.relpath(row["source"], videos)] = listed
    assert found["1.mp4"].captions == ("one", "first") and found["3.mp4"].captions == ("",)
    for name, listed in found.items():
        square = read_video(listed.path)[0][:, :3, :3].mean()
        assert square == pytest.approx(40 * names.index(name), abs=4)
        assert frames_of(listed.path) == list(range(20)) and listed.info().frame_rate == 10.0
    counts = {"videos": 5, "frames": 100, "seconds": 10.0, "clips": 20}
    assert summary["train"].items() >= counts.items()
    assert summary["train"]["captioned"] + summary["held_out"]["captioned"] == 2
    assert summary["sizes"] == {"48x32": 6} and summary["frame_rates"] == {"10": 6} and not summary["refused"]
    assert "captions: 2 of 6 videos" in describe(summary)
    with Image.open(tmp_path / "out/pictures.png") as picture:
        assert picture.size == (4 * 128, 128)


def test_the_split_depends_on_seed_and_names_alone(videos, tmp_path):
    held_out = []
    for seed in range(4):
        prepare(config(tmp_path, seed=seed, held_out_share=0.3))
        held_out.append(tuple(sources(tmp_path, "held_out")))
        shutil.rmtree(tmp_path / "out")
    assert all(len(names) == 2 for names in held_out) and len(set(held_out)) > 1
    videos.rename(tmp_path / "moved")
    prepare(config(tmp_path, data=str(tmp_path / "moved"), held_out_share=0.3))
    (tmp_path / "moved").rename(videos)
    moved = [row["source"].replace("moved", "videos") for row in rows(tmp_path, "held_out")]
    assert tuple(sorted(os.path.relpath(path, videos) for path in moved)) == held_out[0]


def test_files_with_the_same_content_stay_on_one_side(videos, tmp_path):
    for number in range(5):
        shutil.copy(videos / f"{number}.mp4", videos / f"{number} (1).mp4")
    for seed in range(2):
        summary = prepare(config(tmp_path, seed=seed, held_out_share=0.4))
        sides = [{name[0] for name in sources(tmp_path, side)} for side in ("train", "held_out")]
        assert len(sides[0] - {"d"}) + len(sides[1] - {"d"}) == 5 and summary["held_out"]["videos"] >= 3
        shutil.rmtree(tmp_path / "out")


def test_files_with_a_single_content_cannot_be_split(tmp_path):
    for number in range(5):
        write_clip(tmp_path / f"videos/{number}.mp4")
    with pytest.raises(ValueError, match="too few videos are left .*: all have the same content"):
        prepare(config(tmp_path))


def test_segments_of_a_file_stay_on_one_side(videos, tmp_path):
    table = [
        {"file_name": f"{number}.mp4", "text": f"{number} {part}", "start": part, "end": part + 0.9}
        for number in range(5)
        for part in range(2)
    ]
    (videos / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    for seed in range(3):
        prepare(config(tmp_path, seed=seed, held_out_share=0.4))
        sides = [sources(tmp_path, side) for side in ("train", "held_out")]
        assert [len(side) for side in sides] == [6, 4] and not set(sides[0]) & set(sides[1])
        for row in rows(tmp_path, "train"):
            part = int(row["text"][0].split()[1])
            assert frames_of(tmp_path / "out/train" / row["file_name"]) == list(range(10 * part, 10 * part + 9))
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(("num_frames", "train"), [(20, 15), (25, 20), (50, 40)])
def test_few_videos_are_split_in_time(tmp_path, num_frames, train):
    write_clip(tmp_path / "videos/a.mp4", num_frames)
    write_clip(tmp_path / "videos/short.mp4", 9, frame_rate=5.0)
    summary = prepare(config(tmp_path))
    assert summary["split"] == "time" and any("fewer than 5 videos" in line for line in describe(summary))
    assert sources(tmp_path, "train") == ["a.mp4", "short.mp4"] and sources(tmp_path, "held_out") == ["a.mp4"]
    out = tmp_path / "out"
    (held,) = rows(tmp_path, "held_out")
    trained = next(row for row in rows(tmp_path, "train") if row["source"].endswith("a.mp4"))
    shown = [frames_of(out / side / row["file_name"]) for side, row in (("train", trained), ("held_out", held))]
    assert shown == [list(range(train)), list(range(train, num_frames))]


def test_segments_are_cut_at_the_same_time(tmp_path):
    write_clip(tmp_path / "videos/a.mp4", 24)
    table = [
        {"file_name": "a.mp4", "text": "all"},
        {"file_name": "a.mp4", "text": "begin", "start": 0, "end": 1.0},
        {"file_name": "a.mp4", "text": "end", "start": 1.2},
    ]
    (tmp_path / "videos/metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    prepare(config(tmp_path))
    shown = {
        side: {row["text"][0]: frames_of(tmp_path / "out" / side / row["file_name"]) for row in rows(tmp_path, side)}
        for side in ("train", "held_out")
    }
    assert shown == {
        "train": {"all": list(range(19)), "begin": list(range(10)), "end": list(range(12, 19))},
        "held_out": {"all": list(range(19, 24)), "end": list(range(19, 24))},
    }


def test_clips_at_another_rate_need_more_frames(tmp_path):
    write_clip(tmp_path / "videos/a.mp4", 24)
    summary = prepare(config(tmp_path, frame_rate=5.0))  # five of them take ten frames
    assert summary["train"]["frames"] == 14 and summary["held_out"]["frames"] == 10
    assert summary["train"]["clips"] == summary["held_out"]["clips"] == 1
    assert len(VideoFolder(tmp_path / "out/held_out", Sampling(num_frames=5, frame_rate=5.0), 16, 16)) == 1


def test_given_videos_are_held_out_and_not_trained_on(videos, tmp_path):
    summary = prepare(config(tmp_path, held_out=str(videos / "deeper")))
    assert summary["split"] == "given"
    assert sources(tmp_path, "train") == [f"{number}.mp4" for number in range(5)]
    assert sources(tmp_path, "held_out") == ["deeper/0.mp4"]
    with pytest.raises(ValueError, match="none is left to train on"):
        prepare(config(tmp_path, held_out=str(videos), output_dir=tmp_path / "other"))


@pytest.mark.parametrize(
    ("size", "aspect", "settings", "copy"),
    [
        ((72, 128), 1, {}, (24, 42)),
        ((128, 72), 1, {}, (42, 24)),
        ((72, 128), 1, {"width": 32}, (28, 48)),
        ((72, 128), 1, {"margin": 1.0}, (16, 28)),
        ((21, 33), 1, {}, (20, 32)),
        ((72, 128), 2, {}, (24, 86)),
    ],
)
def test_copies_have_the_aspect_ratio_of_the_video(tmp_path, size, aspect, settings, copy):
    write_video(np.zeros((2, *size, 3), np.uint8), tmp_path / "a.mp4", pixel_format="yuv444p")
    info = replace(video_info(tmp_path / "a.mp4"), pixel_aspect_ratio=aspect)
    assert module.copy_size(config(tmp_path, **settings), info) == copy


def test_copies_are_near_the_original(tmp_path):
    frames = natural(30, 96, 170)
    (tmp_path / "videos").mkdir()
    write_video(frames, tmp_path / "videos/a.mp4", frame_rate=25.0, crf=0, pixel_format="yuv444p")
    prepare(config(tmp_path, height=64, width=64))
    (row,) = rows(tmp_path, "train")
    copy, rate = read_video(tmp_path / "out/train" / row["file_name"])
    assert rate == pytest.approx(25.0) and copy.shape == (24, 96, 170, 3)
    assert psnr(frames[:24], copy) > 38


def test_an_interrupted_run_resumes_and_keeps_what_it_has(videos, tmp_path, monkeypatch):
    whole, written = module._write_copy, []

    def interrupted(part, path, settings):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        whole(part, path, settings)

    monkeypatch.setattr(module, "_write_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(tmp_path))
    assert not (tmp_path / "out/summary.json").exists()
    (tmp_path / f"out/train/.{written[0].stem}-abcdefgh").mkdir()  # of a killed process
    monkeypatch.setattr(module, "_write_copy", whole)
    times = [path.stat().st_mtime_ns for path in written]
    summary = prepare(config(tmp_path))
    again = {path.name: path for path in (tmp_path / "out").glob("*/*.mp4")}
    assert [again[path.name].stat().st_mtime_ns for path in written] == times and len(again) == 6
    assert {path.name for path in (tmp_path / "out/train").glob(".*")} == {".vgen-index.json"}
    assert prepare(config(tmp_path)) == summary


def test_other_settings_and_other_videos_are_errors(videos, tmp_path):
    prepare(config(tmp_path))
    for changed in ({"seed": 1}, {"margin": 2.0}):
        with pytest.raises(ValueError, match=rf"different settings \({next(iter(changed))}\): choose another folder"):
            prepare(config(tmp_path, **changed))
    write_clip(videos / "new.mp4")
    with pytest.raises(ValueError, match=r"different settings \(videos\)"):
        prepare(config(tmp_path))


def test_unusable_videos_are_refused_with_a_reason(videos, tmp_path):
    (videos / "broken.mp4").write_bytes((videos / "0.mp4").read_bytes()[:900])
    write_clip(videos / "short.mp4", 3)
    summary = prepare(config(tmp_path))
    reasons = summary["refused"]
    assert reasons[str(videos / "short.mp4")] == "3 frames at 10 per second; a clip needs 5"
    assert reasons[str(videos / "broken.mp4")] == "has no frames" and len(reasons) == 2
    assert summary["train"]["videos"] == 5 and any(line.startswith("2 refused: ") for line in describe(summary))
    assert inspect_source(str(videos), Sampling(num_frames=5))["refused"] == reasons


def test_videos_that_turn_out_to_be_damaged_are_never_all_that_is_held_out(videos, tmp_path, monkeypatch):
    prepare(config(tmp_path))
    (held_out,) = sources(tmp_path, "held_out")
    shutil.rmtree(tmp_path / "out")
    whole = module.iter_video

    def damaged(path, **options):
        yield from whole(path, **options)
        if path == videos / held_out:
            raise ValueError(f"{path} is damaged or truncated near 2.00 s")

    monkeypatch.setattr(module, "iter_video", damaged)
    summary = prepare(config(tmp_path))
    assert summary["refused"] == {str(videos / held_out): "is damaged or truncated near 2.00 s"}
    assert summary["train"]["videos"] == 4 and summary["held_out"]["videos"] == 1


@pytest.mark.parametrize(
    ("lengths", "settings", "message"),
    [
        ([], {}, "contains no videos"),
        ([4, 3, 3], {}, r"are too short: 10 frames in all and at most 4 in one; a clip needs 5 \(num_frames\)"),
        ([9, 9], {}, "fewer than 5 videos, and none is long enough to hold out its end"),
        ([20], {"held_out_share": 1.0}, "held_out_share must be a finite number above 0 and below 1"),
        ([20], {"margin": 0.5}, "margin must be a finite number of at least 1"),
        ([20], {"max_videos": 0}, "max_videos must be an integer of at least 1"),
        ([20], {"output_dir": "s3://bucket/out"}, "must be a local folder"),
    ],
)
def test_mistakes_are_errors_before_anything_is_written(tmp_path, lengths, settings, message):
    (tmp_path / "videos").mkdir()
    for number, length in enumerate(lengths):
        write_clip(tmp_path / f"videos/{number}.mp4", length)
    with pytest.raises(ValueError, match=message):
        prepare(config(tmp_path, **settings))
    assert not (tmp_path / "out").exists()


def test_missing_sources_and_unsuitable_folders_are_errors(videos, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no folder"):
        prepare(config(tmp_path, data=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="choose a folder outside"):
        prepare(config(tmp_path, output_dir=videos / "out"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        prepare(config(tmp_path, output_dir=tmp_path / "file/out"))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(OSError, match=r"the copies may need .* GiB, but .*out has .* GiB free"):
        prepare(config(tmp_path, margin=2.0))  # other settings are possible later
    monkeypatch.undo()

    def full_disk(self, frames):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.VideoWriter, "append", full_disk)
    with pytest.raises(OSError, match="No space left"):
        prepare(config(tmp_path))


def test_some_of_many_videos_are_copied(videos, tmp_path):
    chosen = []
    for seed in range(4):
        assert inspect_source(str(videos), Sampling(num_frames=5), max_videos=5, seed=seed)["videos"] == 5
        summary = prepare(config(tmp_path, max_videos=5, seed=seed))
        assert summary["train"]["videos"] == 4 and summary["held_out"]["videos"] == 1
        chosen.append(tuple(sources(tmp_path, "train") + sources(tmp_path, "held_out")))
        shutil.rmtree(tmp_path / "out")
    assert len({tuple(sorted(names)) for names in chosen}) > 1


@pytest.mark.parametrize("num_videos", [2, 6])
def test_a_stream_is_copied_as_its_folder_is(videos, tmp_path, num_videos):
    paths = sorted(videos.rglob("*.mp4"))[:num_videos]
    members = {f"{index}.mp4": path.read_bytes() for index, path in enumerate(paths)} | {"1.txt": b"one"}
    write_tar(tmp_path / "videos.tar", members)
    settings = config(tmp_path, data=f"shards:{tmp_path}/videos.tar")
    unknown = inspect_source(settings.data, Sampling(num_frames=5))
    assert unknown["videos"] is None and unknown["clips"] is None
    split, parts = module.plan(settings, Survey(Sampling(num_frames=5)))
    kept = module._copied(settings, tmp_path / "out", parts, split, Survey(Sampling(num_frames=5)))
    for side in ("train", "held_out"):
        (tmp_path / "out" / side).mkdir(parents=True)
    assert all(part.original.listed.content is None for part in kept)  # it would stay in memory
    shutil.rmtree(tmp_path / "out")
    summary = prepare(settings)
    assert summary["split"] == ("time" if num_videos == 2 else "video")
    captions = [row["text"] for side in ("train", "held_out") for row in rows(tmp_path, side)]
    assert captions.count(["one"]) == (2 if num_videos == 2 else 1)
    assert summary["sizes"] == {"48x32": num_videos}
    assert prepare(settings) == summary  # resumes


def test_digits_are_copied_too(tmp_path):
    pytest.importorskip("idx2numpy")
    digits = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    path = tmp_path / "digits-idx3-ubyte.gz"
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(">4i", 0x803, *digits.shape) + digits.tobytes())
    with pytest.raises(ValueError, match="max_videos=1000"):
        prepare(config(tmp_path, data=str(path)))
    summary = prepare(config(tmp_path, data=str(path), max_videos=6, height=64, width=64))
    assert summary["train"].items() >= {"videos": 5, "frames": 25, "clips": 5}.items()
    assert summary["sizes"] == {"64x64": 6} and summary["frame_rates"] == {"8": 6}


def test_a_source_is_described_without_decoding_it(videos, monkeypatch):
    write_clip(videos / "short.mp4", 3, frame_rate=5.0, size=(16, 16))
    monkeypatch.setattr("vgen.data.video_io.iter_video", None)
    found = inspect_source(str(videos), Sampling(num_frames=5, kind="sliding"))
    assert found.pop("refused").keys() == {str(videos / "short.mp4")}
    assert found == {
        "videos": 7, "usable": 6, "captioned": 2, "frames": 120, "seconds": 12.0, "clips": 24,
        "sizes": {"48x32": 6, "16x16": 1}, "frame_rates": {"10": 6, "5": 1},
    }  # fmt: skip
