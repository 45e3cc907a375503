"""A tokenizer that nothing can load is noticed at conversion; none asks, and none runs code of its own."""

import json
from pathlib import Path

import pytest
from test_checkpoints_gguf_fields import fields, tensors, write_file

from checkpoints_tools import convert_hf_to_megatron, convert_megatron_to_hf, from_gguf
from megatron_star.model.checkpoint import read_checkpoint_info


@pytest.fixture
def hf(tmp_path) -> Path:
    """A small checkpoint with a tokenizer."""
    from_gguf.convert(write_file(tmp_path / "a.gguf", fields(), tensors()), tmp_path / "hf")
    return tmp_path / "hf"


def lfs_pointer(hf: Path) -> None:
    (hf / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n")


def of_mistral(hf: Path) -> None:
    (hf / "tokenizer.json").unlink()
    (hf / "tokenizer_config.json").unlink()
    (hf / "tekken.json").write_text('{"config": {}}')


def with_code(hf: Path) -> None:
    path = hf / "tokenizer_config.json"
    code = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | code))
    (hf / "own.py").write_text("raise SystemExit('its code was run')")


def truncated(hf: Path) -> None:
    (hf / "tokenizer.json").write_text((hf / "tokenizer.json").read_text()[:200])


@pytest.mark.parametrize(
    "change, word",
    [
        (lfs_pointer, "tokenizer.json: a pointer of Git LFS"),
        (of_mistral, "tekken.json: not a tokenizer that can be loaded"),
        (with_code, "its tokenizer cannot be loaded"),
        (truncated, "its tokenizer cannot be loaded"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_refused_unless_none_is_wanted(
    hf, tmp_path, monkeypatch, change, word
):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    change(hf)
    with pytest.raises(ValueError, match=f"{hf}.*{word}.*--no-tokenizer"):
        convert_hf_to_megatron.convert(hf, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()
    convert_hf_to_megatron.convert(hf, tmp_path / "megatron", with_tokenizer=False)
    assert read_checkpoint_info(tmp_path / "megatron").family == "llama"


def test_a_checkpoint_without_any_tokenizer_converts_and_says_so(hf, tmp_path, capsys):
    (hf / "tokenizer.json").unlink()
    (hf / "tokenizer_config.json").unlink()
    convert_hf_to_megatron.convert(hf, tmp_path / "megatron")
    assert "note: without a tokenizer" in capsys.readouterr().err


def test_the_generation_config_travels_there_and_back(hf, tmp_path):
    text = '{"eos_token_id": [1, 2], "temperature": 0.6}'
    (hf / "generation_config.json").write_text(text)
    convert_hf_to_megatron.convert(hf, tmp_path / "megatron")
    assert (tmp_path / "megatron/tokenizer/generation_config.json").read_text() == text
    convert_megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    assert (tmp_path / "back/generation_config.json").read_text() == text
