"""Small text files: what is read, and what is refused."""

from pathlib import Path

import pytest

from irqlora_jax.files.small import read_json


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b'\xef\xbb\xbf{"model_type": "llama"}\r\n')
    assert read_json(file) == {"model_type": "llama"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1,\n "b": "\xff"}', r"config.json, line 2 is not UTF-8 text \(byte 16\)$"),
        (b'{"a": 1', "config.json: not valid JSON: "),
        (b"[" * 100_000, "config.json: not valid JSON: nested too deep"),
        (b"[]", "config.json: a JSON list; expected an object"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(error.value)
