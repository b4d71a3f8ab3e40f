import os
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from tests.warm import warm_python
from vgen.io.atomic import (
    atomic_directory,
    atomic_file,
    backup_path,
    partial_path,
    remove_directory,
    remove_workspaces,
    restore_backup,
    workspace_for,
    write_text,
)


def write(folder, text):
    with atomic_directory(folder) as partial:
        (partial / "a.txt").write_text(text)


def test_a_folder_is_written_atomically_and_replaces_the_older_one(tmp_path):
    folder = tmp_path / "runs" / "result"
    write(folder, "first")
    (folder / "left.txt").write_text("of the first alone")
    write(folder, "second")
    assert [path.name for path in folder.iterdir()] == ["a.txt"] and (folder / "a.txt").read_text() == "second"
    assert list(folder.parent.iterdir()) == [folder]


def test_an_interrupted_write_leaves_the_older_one_and_does_not_affect_the_next(tmp_path):
    folder = tmp_path / "result"
    write(folder, "first")
    with pytest.raises(KeyboardInterrupt), atomic_directory(folder) as partial:
        (partial / "b.txt").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in folder.iterdir()] == ["a.txt"] and (folder / "a.txt").read_text() == "first"
    write(folder, "second")
    assert [path.name for path in folder.iterdir()] == ["a.txt"] and (folder / "a.txt").read_text() == "second"


def test_between_the_two_renames_the_older_one_is_kept_aside(tmp_path, monkeypatch):
    folder = tmp_path / "result"
    write(folder, "first")
    replace = type(folder).replace

    def killed(self, target):
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(type(folder), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(folder, "second")
    assert not folder.exists() and (backup_path(folder) / "a.txt").read_text() == "first"
    monkeypatch.undo()
    restore_backup(folder)
    assert (folder / "a.txt").read_text() == "first" and not backup_path(folder).exists()
    write(folder, "third")
    assert (folder / "a.txt").read_text() == "third" and list(tmp_path.iterdir()) == [folder]


def test_a_folder_is_renamed_before_it_is_removed(tmp_path, monkeypatch):
    folder = tmp_path / "result"
    write(folder, "first")

    def killed(path, **options):
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr("vgen.io.atomic.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_directory(folder)
    assert not folder.exists() and partial_path(folder).is_dir()
    monkeypatch.undo()
    write(folder, "second")
    remove_directory(folder)
    assert not list(tmp_path.iterdir())


def test_a_file_replaces_the_older_one_only_if_nothing_was_raised(tmp_path):
    path = tmp_path / "record.json"
    write_text(path, "first")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
    write_text(path, "second")
    assert path.read_text() == "second" and list(tmp_path.iterdir()) == [path]


def test_workspaces_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    left = [workspace_for(tmp_path / name) for name in ("a.mp4", "other.mp4")]
    for name in (".a-notes", ".hidden", "a.mp4"):
        (tmp_path / name).write_text("kept")
    remove_workspaces(tmp_path, ["a.mp4", "b.mp4"])
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {".a-notes", ".hidden", "a.mp4", left[1].name.rpartition("/")[2]}
    for workspace in left:
        workspace.cleanup()


FULL = """
import os, resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from vgen.io.atomic import atomic_directory, atomic_file, write_text
from vgen.tasks.jobs import append_line

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as a full disk does, it makes `write` fail
big, path = torch.zeros(10000), Path(sys.argv[1]) / "result"

def tensors():
    with atomic_file(path) as partial:
        save_file({"a": big}, partial)

def folder():
    with atomic_directory(path) as partial:
        save_file({"a": big}, partial / "a.safetensors")

def pickled():
    with atomic_directory(path) as partial:
        torch.save(big, partial / "a.bin")

text = "a" * 10000
for write in (tensors, folder, pickled, lambda: write_text(path, text), lambda: append_line(path, {"a": text})):
    try:
        write()
    except OSError as error:
        print(error.strerror)
"""


def test_a_failed_write_names_the_path(tmp_path):
    done = subprocess.run([warm_python(), "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and all(line.startswith(f"could not write {tmp_path / 'result'}: ") for line in lines)
    assert sum(line.endswith("File too large") for line in lines) == 4


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_results_have_the_permissions_of_the_users_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with atomic_file(tmp_path / "a.safetensors") as partial:
            save_file({"a": torch.zeros(1)}, partial)
        with atomic_directory(tmp_path / "folder") as partial:
            (partial / "part").mkdir()
            save_file({"a": torch.zeros(1)}, partial / "part/a.safetensors")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {0o666 & ~mask}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_dir()} == {0o777 & ~mask}
