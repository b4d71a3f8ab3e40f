import pytest

from vgen.io.atomic import atomic_directory, backup_path


def write(folder, text):
    with atomic_directory(folder) as partial:
        (partial / "a.txt").write_text(text)


def test_a_folder_appears_whole_and_replaces_the_older_one(tmp_path):
    folder = tmp_path / "runs" / "result"
    write(folder, "first")
    (folder / "left.txt").write_text("of the first alone")
    write(folder, "second")
    assert [path.name for path in folder.iterdir()] == ["a.txt"] and (folder / "a.txt").read_text() == "second"
    assert list(folder.parent.iterdir()) == [folder]


def test_what_is_cut_short_leaves_the_older_one_and_does_not_disturb_the_next(tmp_path):
    folder = tmp_path / "result"
    write(folder, "first")
    with pytest.raises(KeyboardInterrupt), atomic_directory(folder) as partial:
        (partial / "b.txt").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in folder.iterdir()] == ["a.txt"] and (folder / "a.txt").read_text() == "first"
    write(folder, "second")
    assert [path.name for path in folder.iterdir()] == ["a.txt"] and (folder / "a.txt").read_text() == "second"


def test_between_the_two_renamings_the_older_one_is_put_by(tmp_path, monkeypatch):
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
    write(folder, "third")
    assert (folder / "a.txt").read_text() == "third" and list(tmp_path.iterdir()) == [folder]
