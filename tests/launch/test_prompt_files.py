"""Prompt files as editors and programs write them."""

import json
import pathlib

import pytest

from flamingo_jax.errors import UserError
from launch.prompt_files import read_prompts

PROMPTS = [[{"image": "a.png"}, {"text": "one\u2028still one\x85"}], [{"text": "漢字"}]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_of_prompts_end_at_line_feeds_alone(tmp_path: pathlib.Path, encoding: str) -> None:
    text = "\r\n".join(json.dumps(prompt, ensure_ascii=False) for prompt in PROMPTS)
    (tmp_path / "p.jsonl").write_bytes(text.encode(encoding))
    assert read_prompts(tmp_path / "p.jsonl", "--prompt") == PROMPTS
    (tmp_path / "p.json").write_bytes(json.dumps(PROMPTS[0], indent=1).encode(encoding))
    assert read_prompts(tmp_path / "p.json", "--prompt") == PROMPTS[:1]


@pytest.mark.parametrize("data", [b"[\xff]", "[1]".encode("utf-16") + b"\0", b"[" * 100_000])
def test_what_is_no_text_is_one_sentence(tmp_path: pathlib.Path, data: bytes) -> None:
    (tmp_path / "p.json").write_bytes(data)
    with pytest.raises(UserError, match="cannot be read as text|neither JSON nor JSONL"):
        read_prompts(tmp_path / "p.json", "--prompt")
