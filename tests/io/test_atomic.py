import pytest

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
