import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from vgen.data import clips
from vgen.data.augment import Augmentation
from vgen.data.clips import Bucket, Listed, Sampling, VideoFolder, choose_bucket, list_videos, sort_into_buckets
from vgen.data.video_io import write_video


def write_clip(path, num_frames=20, frame_rate=10.0, size=(32, 48)):
    """Frame i has brightness 10 i."""
    frames = np.repeat(np.arange(num_frames, dtype=np.uint8) * 10, size[0] * size[1] * 3)
    write_video(frames.reshape(num_frames, *size, 3), path, frame_rate=frame_rate)


def shown(clip):
    """Which frames a clip has."""
    return np.round(clip.frames.mean(axis=(1, 2, 3)) / 10).astype(int).tolist()


@pytest.fixture
def folder(tmp_path):
    for name in ("a.mp4", "b.gif", "deeper/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_clip(tmp_path / name)
    return tmp_path


def test_captions_come_from_text_files_next_to_the_videos(folder):
    (folder / "a.txt").write_text("a dog\n\n a brown dog \n")
    listed = list_videos(folder)
    assert [one.path.name for one in listed] == ["a.mp4", "b.gif", "c.mp4"]
    assert [one.captions for one in listed] == [("a dog", "a brown dog"), ("",), ("",)]


def write_table(path, rows):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_lists_parts_with_captions(folder, kind):
    rows = [
        {"file_name": "deeper/c.mp4", "text": "a cat, asleep", "start": 0.5, "end": 1.5},
        {"file_name": "a.mp4", "text": 'says "hello"'},
    ]
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif kind == "parquet":
        write_table(folder / "metadata.parquet", rows)
    else:
        lines = 'file_name,text,start,end\ndeeper/c.mp4,"a cat, asleep",0.5,1.5\na.mp4,"says ""hello""",,\n'
        (folder / "metadata.csv").write_text("\ufeff" + lines)
    assert list_videos(folder) == [
        Listed(path=folder / "deeper/c.mp4", captions=("a cat, asleep",), start=0.5, end=1.5),
        Listed(path=folder / "a.mp4", captions=('says "hello"',)),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: invalid JSON"),
        ("[1]", "line 2: expected a JSON object"),
        ('{"file_name": "a.mp4"}', "line 2: file_name and text are required"),
        ('{"file_name": "a.mp4", "text": [1]}', "line 2: file_name and text are required"),
        ('{"file_name": "../a.mp4", "text": "x"}', "line 2: ../a.mp4 is outside of"),
        ('{"file_name": "a.mp4", "text": "x", "start": "soon"}', "line 2: start and end must be numbers of seconds"),
        (
            '{"file_name": "a.mp4", "text": "x", "start": 2, "end": 1}',
            "line 2: 0 <= start < end is required, got start=2.0, end=1.0",
        ),
    ],
)
def test_an_unusable_row_is_named(folder, line, message):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": ["x", "y"]}\n' + line)
    with pytest.raises(ValueError, match=message):
        list_videos(folder)


def test_a_comma_that_is_not_quoted_is_named(folder):
    (folder / "metadata.csv").write_text('file_name,text\na.mp4,"a cat, asleep"\nb.mp4,a cat, asleep\n')
    with pytest.raises(ValueError, match=r"metadata\.csv, line 3: more fields .* in double quotes"):
        list_videos(folder)
    (folder / "metadata.csv").write_text('file_name,text\na.mp4,"a cat, asleep"\n')
    assert list_videos(folder)[0].captions == ("a cat, asleep",)


def test_folders_without_videos_or_with_two_tables_are_errors(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        list_videos(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="contains no videos"):
        list_videos(tmp_path / "empty")
    for name in ("metadata.csv", "metadata.jsonl", "metadata.parquet"):
        (folder / name).write_text("")
    for name in ("metadata.csv", "metadata.jsonl"):
        with pytest.raises(ValueError, match="keep only one"):
            list_videos(folder)
        (folder / name).unlink()


def test_consecutive_frames_are_inside_the_video_and_every_position_is_drawn():
    sampling = Sampling(num_frames=3, stride=2)
    rng, firsts = random.Random(0), set()
    for _ in range(200):
        indices, real = sampling.indices(8, rng=rng)
        assert real == 3 and np.diff(indices).tolist() == [2, 2] and 0 <= indices[0] and indices[-1] <= 7
        firsts.add(indices[0])
    assert firsts == {0, 1, 2, 3}
    assert sampling.indices(8)[0] == [1, 3, 5]  # the middle without chance


def test_uniform_and_segments_are_spread_over_the_video():
    assert Sampling(num_frames=5, kind="uniform").indices(9)[0] == [0, 2, 4, 6, 8]
    sampling = Sampling(num_frames=4, kind="segments")
    assert sampling.indices(12)[0] == [1, 4, 7, 10]
    drawn = [sampling.indices(12, rng=random.Random(seed))[0] for seed in range(100)]
    assert [sorted(set(column)) for column in zip(*drawn, strict=True)] == [
        [0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11],
    ]  # fmt: skip
    assert sampling.clip_rate(12, 24.0) == 8.0


def test_sliding_windows_are_all_there_is():
    sampling = Sampling(num_frames=4, kind="sliding", hop=3)
    assert [sampling.indices(13, clip)[0][0] for clip in range(sampling.num_clips(13))] == [0, 3, 6, 9]
    assert Sampling(num_frames=4, kind="sliding").num_clips(13) == 3
    assert Sampling(num_frames=4, kind="sliding").num_clips(3) == 0


@pytest.mark.parametrize("kind", ["random", "uniform", "segments", "sliding"])
def test_short_videos_are_skipped_or_padded(kind):
    assert Sampling(num_frames=5, kind=kind).num_clips(3) == 0
    padded = Sampling(num_frames=5, kind=kind, short="pad")
    assert padded.num_clips(3) == 1 and padded.num_clips(0) == 0
    assert padded.indices(3) == ([0, 1, 2, 2, 2], 3)
    assert Sampling(num_frames=3, stride=2, short="pad").indices(4) == ([0, 2, 2], 2)


@pytest.mark.parametrize(
    "options", [{"kind": "all"}, {"short": "loop"}, {"stride": 0}, {"hop": 0}, {"frame_rate": 0.0}]
)
def test_unknown_samplings_are_rejected(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(num_frames=4, **options)


def test_the_nearest_shape_and_the_longest_that_is_filled():
    buckets = [Bucket(17, 64, 64), Bucket(33, 64, 64), Bucket(17, 48, 80), Bucket(17, 96, 96)]
    samplings = sampled(buckets)
    assert choose_bucket(samplings, 40, 100, 100) == Bucket(33, 64, 64)
    assert choose_bucket(samplings, 20, 100, 100) == Bucket(17, 96, 96)
    assert choose_bucket(samplings, 40, 720, 1280) == Bucket(17, 48, 80)
    assert choose_bucket(samplings, 16, 100, 100) is None
    assert choose_bucket(sampled(buckets, short="pad"), 16, 100, 100) == Bucket(17, 96, 96)
    assert choose_bucket(sampled(buckets, stride=2), 40, 100, 100) == Bucket(17, 96, 96)  # 33 need 65
    assert choose_bucket(sampled(buckets, stride=2), 32, 100, 100) is None


def sampled(buckets, **options):
    return {bucket: Sampling(num_frames=bucket.num_frames, frame_rate=8.0, **options) for bucket in buckets}


def test_clips_are_the_requested_frames(folder):
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "a.mp4", "text": "x", "start": 0.5, "end": 1.5}\n{"file_name": "b.gif", "text": "y"}\n'
    )
    clips = VideoFolder(folder, Sampling(num_frames=4, kind="sliding", hop=3), 16, 16)
    assert [shown(clips[index]) for index in range(3)] == [[5, 6, 7, 8], [8, 9, 10, 11], [11, 12, 13, 14]]
    assert shown(clips[3]) == [0, 1, 2, 3] and len(clips) == 3 + 6
    clip = clips[1]
    assert clip.frames.shape == (4, 16, 16, 3) and clip.real.all() and clip.captions == ("x",)
    assert clip.frame_rate == pytest.approx(10) and clip.first == pytest.approx(0.8)
    slower = VideoFolder(folder, Sampling(num_frames=4, kind="sliding", frame_rate=5.0), 16, 16)
    assert shown(slower[0]) == [5, 7, 9, 11] and slower[0].frame_rate == 5
    padded = VideoFolder(folder, Sampling(num_frames=12, short="pad"), 16, 16)[0]
    assert padded.real.sum() == 10 and shown(padded) == [*range(5, 15), 14, 14]


def test_a_clip_depends_only_on_seed_epoch_and_number(folder):
    sampling = Sampling(num_frames=4)
    first, same, other = (VideoFolder(folder, sampling, 16, 16, seed) for seed in (1, 1, 2))
    draws = [[shown(one.clip(0, epoch)) for epoch in range(6)] for one in (first, same, other)]
    assert draws[0] == draws[1] != draws[2] and len({tuple(draw) for draw in draws[0]}) > 2


def test_damaged_files_are_skipped_and_named(folder):
    whole = (folder / "a.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    clips = VideoFolder(folder, Sampling(num_frames=4), 16, 16)
    assert len(clips) == 3
    assert {one.path.name for one in clips.skipped} == {"cut.mp4", "empty.mp4"}
    drawn = [clips.sample(number).source.path.name for number in range(6)]
    assert sorted(drawn[:3]) == sorted(drawn[3:]) == ["a.mp4", "b.gif", "c.mp4"]
    (folder / "a.mp4").unlink()  # while it is being used
    assert clips[0] is None and "no such file" in clips.skipped[clips.clips[0][0]]
    assert {clips.sample(number).source.path.name for number in range(3)} == {"b.gif", "c.mp4"}
    (folder / "short").mkdir()
    write_clip(folder / "short/d.mp4", num_frames=3)
    with pytest.raises(ValueError, match="none of 1 videos can be used.*3 frames at 10 per second; a clip needs 4"):
        VideoFolder(folder / "short", Sampling(num_frames=4), 16, 16)


def test_videos_of_no_bucket_are_skipped_with_a_warning_or_padded(tmp_path, caplog):
    for name, length in (("short", 3), ("long", 9)):
        write_video(np.zeros((length, 16, 16, 3), dtype=np.uint8), tmp_path / f"{name}.mp4", frame_rate=8.0)
    (tmp_path / "broken.mp4").write_bytes(b"")
    listed, bucket = list_videos(tmp_path), Bucket(5, 16, 16)
    assert [one.path.stem for one in sort_into_buckets(listed, sampled([bucket]))[bucket]] == ["long"]
    warnings = [message for message in caplog.messages if "skipped (" in message]
    assert len(warnings) == 2 and "broken.mp4" in warnings[0]
    assert "short.mp4: 3 frames; the shortest bucket needs 5" in warnings[1]
    padded = sort_into_buckets(listed, sampled([bucket], short="pad"))[bucket]
    assert [one.path.stem for one in padded] == ["long", "short"]


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl"])
def test_captions_that_are_no_utf8_are_named(tmp_path, name):
    write_video(np.zeros((3, 16, 16, 3), dtype=np.uint8), tmp_path / "a.mp4", frame_rate=8.0)
    (tmp_path / name).write_bytes('{"file_name": "a.mp4", "text": "caf\u00e9"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name} is not UTF-8 text"):
        list_videos(tmp_path)


def touch(path, content="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def test_files_of_every_supported_container_are_listed_and_the_others_named(tmp_path, caplog):
    suffixes = "ts mpg mpeg wmv flv 3gp mts m2ts ogv 3g2 f4v asf vob qt m2t mpe divx MTS webm Mp4".split()
    for suffix in [*suffixes, "rmvb", "mxf", "srt", "json"]:
        touch(tmp_path / f"{suffix}.{suffix}")
    assert [one.path.name for one in list_videos(tmp_path)] == sorted(f"{suffix}.{suffix}" for suffix in suffixes)
    (warning,) = [message for message in caplog.messages if "format is not supported" in message]
    assert warning.startswith("2 videos of") and "mxf.mxf" in warning and "rmvb.rmvb" in warning


def test_hidden_files_and_those_of_systems_are_no_videos(tmp_path):
    names = (
        "._a.mp4 .hidden.mp4 __MACOSX/a.mp4 x/__MACOSX/._a.mp4 @eaDir/a.mp4/a.mp4 .git/a.mp4 #recycle/a.mp4".split()
    )
    for name in [*names, "a.mp4", "x/_b.mp4"]:
        touch(tmp_path / name)
    touch(tmp_path / "._metadata.csv")
    assert [one.path for one in list_videos(tmp_path)] == [tmp_path / "a.mp4", tmp_path / "x/_b.mp4"]


def test_linked_folders_are_searched_once_and_loops_end(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    for path in (data / "z/a.mp4", data / "z/a.txt", other / "b.mp4", other / "deeper/c.mp4"):
        touch(path, "a caption")
    (data / "a link").symlink_to(other)
    (data / "another link").symlink_to(other)
    (data / "to z").symlink_to(data / "z")
    (other / "deeper/up").symlink_to(data)
    (other / "itself").symlink_to(other / "itself")
    (data / "broken.mp4").symlink_to(tmp_path / "nowhere")
    (data / "loop.mp4").symlink_to(data / "loop.mp4")
    names = ["a link/b.mp4", "a link/deeper/c.mp4", "broken.mp4", "loop.mp4", "z/a.mp4"]
    assert [one.path for one in list_videos(data)] == [data / name for name in names]


def test_metadata_may_list_linked_files_and_folders(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write_clip(tmp_path / "elsewhere/a.mp4")
    folder = tmp_path / "data"
    touch(folder / "metadata.csv", "file_name,text\na.mp4,x\nlinked/a.mp4,y\n")
    (folder / "a.mp4").symlink_to(tmp_path / "elsewhere/a.mp4")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    assert len(VideoFolder(folder, Sampling(num_frames=4), 16, 16)) == 2


def test_metadata_of_subfolders_is_read(tmp_path, caplog):
    for name in ("train/a.mp4", "train/deeper/b.mp4", "train/unlisted.mp4", "test/c.mp4", "d.mp4"):
        touch(tmp_path / name)
    touch(tmp_path / "train/metadata.csv", "file_name,text\ndeeper/b.mp4,y\na.mp4,x\n")
    touch(tmp_path / "test/Metadata.JSONL", '{"file_name": "c.mp4", "caption": "z"}\n')
    touch(tmp_path / "d.txt", "v")
    found = {str(one.path.relative_to(tmp_path)): one.captions for one in list_videos(tmp_path)}
    assert found == {"train/a.mp4": ("x",), "train/deeper/b.mp4": ("y",), "test/c.mp4": ("z",), "d.mp4": ("v",)}
    (warning,) = caplog.messages
    assert "1 videos of" in warning and "no metadata file lists them" in warning and "unlisted.mp4" in warning
    with pytest.raises(ValueError, match="line 2: ../../x.mp4 is outside of"):
        touch(tmp_path / "train/metadata.csv", "file_name,text\n../../x.mp4,y\n")
        list_videos(tmp_path)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_only_line_ends_separate_captions(tmp_path, ending):
    caption = "a cat\u2028(runs\x0bfast\x85now\x0c\x1c\u2029!"
    for name in ("a.mp4", "b.MP4"):
        touch(tmp_path / name)
    (tmp_path / "a.txt").write_bytes(f"\ufeff{caption}{ending}{ending} a dog ".encode())
    (tmp_path / "b.TXT").write_bytes(f"\ufeffa bird{ending}".encode())
    assert [one.captions for one in list_videos(tmp_path)] == [(caption, "a dog"), ("a bird",)]
    row = json.dumps({"file_name": "a.mp4", "text": caption}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(f"\ufeff{row}{ending}{ending}".encode())
    assert [one.captions for one in list_videos(tmp_path)] == [(caption,)]


@pytest.mark.parametrize("texts", [("a man says hello", '"'), ('"a man says hello',), ('"a "man" says hello"',),
                                   ('"' + "a " * 70_000 + '"',), ('"a man says hello', 'a dog"'),
                                   ('"a man says hello', 'a dog", b')])  # fmt: skip
def test_an_unbalanced_quote_is_named(tmp_path, texts):
    texts = [*texts, "a cat", "a bird"]
    touch(tmp_path / "metadata.csv", "file_name,text\n" + "".join(f"{i}.mp4,{text}\n" for i, text in enumerate(texts)))
    line = next(number for number, text in enumerate(texts, start=2) if '"' in text)
    with pytest.raises(ValueError, match=rf"metadata\.csv, (from )?line {line}: .*double quote"):
        list_videos(tmp_path)


@pytest.mark.parametrize("header", ["a.mp4,x", "file_name;text", "file_name,title", "text", ""])
def test_a_table_without_the_columns_is_named(tmp_path, header):
    touch(tmp_path / "metadata.csv", f"{header}\na.mp4,x\n" if header else "")
    with pytest.raises(ValueError, match=r"metadata\.csv, line 1: expected the columns file_name and text"):
        list_videos(tmp_path)


def test_quoted_text_may_have_lines(tmp_path):
    touch(tmp_path / "metadata.csv", 'file_name,text\na.mp4,"a cat,\r\nand a ""dog"""\n\nb.mp4,"x"\nc.mp4,y,z\n')
    with pytest.raises(ValueError, match=r"line 6: more fields"):
        list_videos(tmp_path)
    touch(tmp_path / "metadata.csv", 'text,file_name\n"a cat,\nand a ""dog""",a.mp4\n')
    assert [one.captions for one in list_videos(tmp_path)] == [('a cat,\nand a "dog"',)]


@pytest.mark.parametrize(
    "line",
    [
        '{"file_name": 5, "text": "x"}',
        '{"file_name": ["a.mp4"], "text": "x"}',
        '{"file_name": "a.mp4", "text": 5}',
        '{"file_name": "a.mp4", "text": "\\ud800"}',
        '{"file_name": "a.mp4", "text": "x", "start": NaN}',
        '{"file_name": "a.mp4", "text": "x", "end": NaN}',
        '{"file_name": "a.mp4", "text": "x", "start": Infinity}',
        '{"file_name": "a.mp4", "text": "x", "start": 1' + "0" * 400 + "}",
        '{"file_name": "a.mp4", "text": "x", "start": 1' + "0" * 5000 + "}",
        '{"file_name": "a.mp4", "text": "x", "start": [1]}',
        "[" * 100_000,
        '{"a":' * 100_000,
        "null",
        '"a.mp4"',
    ],
)
def test_a_malformed_row_is_named(tmp_path, line):
    touch(tmp_path / "metadata.jsonl", '{"file_name": "a.mp4", "text": "x"}\n' + line)
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2: "):
        list_videos(tmp_path)


def test_a_parquet_table_may_have_other_columns_alternatives_and_missing_captions(folder, caplog):
    rows = [
        {"caption": ["a dog", "a brown dog"], "size": (1, 2), "file_name": "a.mp4"},
        {"caption": None, "size": None, "file_name": "b.gif"},
    ]
    write_table(folder / "metadata.parquet", rows)
    assert [one.captions for one in list_videos(folder)] == [("a dog", "a brown dog"), ("",)]
    assert f"1 videos of {folder} have no caption" in caplog.text and "metadata.parquet" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "a.mp4", "text": 5}, "row 1: file_name and text are required"),
        ({"file_name": b"a.mp4", "text": "x"}, "row 1: file_name and text are required"),
        ({"file_name": "../a.mp4", "text": "x"}, "row 1: ../a.mp4 is outside of"),
        ({"file_name": "a.mp4", "text": "x", "end": float("nan")}, "row 1: 0 <= start < end is required"),
        ({"text": "x"}, "expected the columns file_name and text or label, got ['text']"),
    ],
)
def test_an_unusable_parquet_table_is_named(folder, row, message):
    write_table(folder / "metadata.parquet", [row])
    with pytest.raises(ValueError) as error:
        list_videos(folder)
    assert f"{folder / 'metadata.parquet'}" in str(error.value) and message in str(error.value)


def test_a_damaged_parquet_table_is_one_line(folder):
    path = folder / "metadata.parquet"
    write_table(path, [{"file_name": f"{index}.mp4", "text": f"caption {index}"} for index in range(50)])
    content, rng = path.read_bytes(), random.Random(0)
    failed = 0
    for place in range(0, len(content), 23):
        for damaged in (content[:place], content[:place] + rng.randbytes(8) + content[place + 8 :]):
            path.write_bytes(damaged)
            try:
                list_videos(folder)
            except ValueError as error:
                failed += 1
                assert str(path) in str(error) and "\n" not in str(error)
    assert failed > len(content) // 23  # all that are truncated


def test_a_parquet_table_without_pyarrow_names_the_extra(folder, monkeypatch):
    write_table(folder / "metadata.parquet", [{"file_name": "a.mp4", "text": "x"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"metadata\.parquet needs pyarrow: pip install vgen\[data\]"):
        list_videos(folder)


def test_videos_without_a_caption_are_named(tmp_path, caplog):
    for name in "abcdef":
        touch(tmp_path / f"{name}.mp4")
    touch(tmp_path / "a.txt", "a dog")
    touch(tmp_path / "b.txt", " \n")
    touch(tmp_path / "c.caption", "a cat")
    list_videos(tmp_path)
    list_videos(tmp_path)
    (warning,) = caplog.messages
    assert warning.startswith(f"5 videos of {tmp_path} have no caption: expected a row of metadata.jsonl")
    assert warning.endswith(f"({tmp_path / 'b.mp4'}, {tmp_path / 'c.mp4'}, {tmp_path / 'd.mp4'}, ...)")


def test_a_skipped_file_is_counted_once(tmp_path, caplog):
    listed = [Listed(path=tmp_path / f"{name}.mp4", start=start) for name in "ab" for start in (0.0, 1.0)]
    clips._skipped.clear()
    for one in listed:
        for reason in ("3 frames at 8 per second", "2 frames at 4 per second"):
            clips.warn_skipped(one, reason)
    assert [message.partition(":")[0] for message in caplog.messages] == [
        f"skipped ({n} so far)" for n in (1, 1, 2, 2)
    ]


def test_pipes_are_no_captions(tmp_path):
    touch(tmp_path / "a.mp4")
    for name in ("a.txt", "metadata.csv"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is not a file"):
            list_videos(tmp_path)


def test_names_that_are_no_unicode_are_listed(tmp_path, caplog):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.mp4"))
    write_clip(path.with_name("a.mp4"))
    path.with_name("a.mp4").rename(path)
    opened = VideoFolder(tmp_path, Sampling(num_frames=4), 16, 16)
    assert len(opened) == 1 and opened.digest
    assert "udcff .mp4" in caplog.messages[0] and caplog.messages[0].encode()


def test_every_part_of_a_wide_video_is_shown_at_a_random_position(tmp_path):
    columns = np.arange(0, 240, 5, dtype=np.uint8)  # from dark on the left to bright on the right
    frames = np.broadcast_to(columns[:, None], (10, 16, 48, 3))
    write_video(frames, tmp_path / "wide.mp4", crf=1)
    sampling = Sampling(num_frames=10)

    def levels(**settings):
        folder = VideoFolder(tmp_path, sampling, 16, 16, augmentation=Augmentation(**settings))
        return np.array([folder.clip(0, epoch).frames.mean(axis=(1, 2, 3)) for epoch in range(40)])

    assert np.ptp(levels()) < 3
    found = levels(position=1.0)
    assert np.ptp(found, axis=1).max() < 3  # the same for all frames
    assert found.min() < 50 and found.max() > 185
    assert np.array_equal(found, levels(position=1.0))


def test_padding_stays_at_the_end_of_a_reversed_clip(tmp_path):
    write_clip(tmp_path / "short.mp4", num_frames=4)
    sampling = Sampling(num_frames=6, short="pad")
    clip = VideoFolder(tmp_path, sampling, 16, 16, augmentation=Augmentation(reverse=1.0)).clip(0)
    assert shown(clip) == [3, 2, 1, 0, 0, 0] and clip.real.tolist() == [True] * 4 + [False] * 2
