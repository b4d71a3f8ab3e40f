import tempfile
from pathlib import Path

import numpy as np
import pytest

from vgen.data.memory_file import MemoryFile
from vgen.data.video_io import iter_video, read_video, video_info, write_video


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_a_file_in_memory_reads_as_the_file(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"video{suffix}"
    frames = np.random.default_rng(0).integers(0, 256, (90, 16, 24, 3), dtype=np.uint8)
    write_video(frames, path, frame_rate=10.0)
    memory = MemoryFile(path, path.read_bytes())
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *_, **__: pytest.fail("a temporary folder"))
    here, there = video_info(path), video_info(memory)
    assert (here.duration, here.frame_rate, here.num_frames) == (there.duration, there.frame_rate, there.num_frames)
    assert (here.height, here.width, here.codec) == (there.height, there.width, there.codec)
    assert np.array_equal(read_video(path)[0], read_video(memory)[0])
    options = {"start": 7.0, "end": 8.5, "frame_rate": 4.0}  # so late that it seeks
    assert all(map(np.array_equal, iter_video(path, **options), iter_video(memory, **options)))


def test_damaged_files_are_named(tmp_path):
    write_video(np.zeros((30, 16, 24, 3), dtype=np.uint8), tmp_path / "a.gif", frame_rate=10.0)
    content = (tmp_path / "a.gif").read_bytes()
    for part, message in (
        (b"", r"a\.gif is empty"),
        (b"no video", r"a\.gif"),
        (content[: len(content) // 2], "truncated"),
    ):
        with pytest.raises(ValueError, match=message):
            list(iter_video(MemoryFile(Path("somewhere/a.gif"), part)))
