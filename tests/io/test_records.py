import json

import pytest

from vgen.io.records import check_seal, read_json, seal


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, "\ufeff{}"])
def test_what_is_not_a_json_object_is_an_error_that_names_the_file(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path} must be a JSON object"):
        read_json(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^no such file: {tmp_path / 'a.json'}$"):
        read_json(tmp_path / "a.json")


def test_every_change_after_sealing_is_found(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part/a.bin").write_bytes(b"12")
    seal(tmp_path, "record.json", {"step": 3, "size": (1, 2)})
    assert check_seal(tmp_path, "record.json")["size"] == [1, 2]
    path = tmp_path / "record.json"
    content = path.read_text()
    path.write_text(content.replace('"step": 3', '"step": 4'))
    with pytest.raises(ValueError, match="^record.json was changed$"):
        check_seal(tmp_path, "record.json")
    path.write_text(json.dumps({"files": 1}))
    with pytest.raises(ValueError, match="^record.json was changed$"):
        check_seal(tmp_path, "record.json")
    path.write_text(content)
    (tmp_path / "part/a.bin").write_bytes(b"13")
    with pytest.raises(ValueError, match="^missing or changed files: part/a.bin$"):
        check_seal(tmp_path, "record.json")
    path.unlink()
    with pytest.raises(ValueError, match="^record.json is missing$"):
        check_seal(tmp_path, "record.json")
