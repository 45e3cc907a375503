"""`--force` replaces a checkpoint that we have written, and destroys nothing else."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_checkpoints_gguf_fields import fields, tensors, write_file

from checkpoints_tools import convert_hf_to_megatron, convert_megatron_to_hf, from_gguf
from checkpoints_tools.describe import add_description
from megatron_star.model.checkpoint import DESCRIPTION_FILE, read_checkpoint_info

Convert = Callable[..., None]


class Case:
    """A converter with its input in a directory, and what it writes."""

    def __init__(self, source: Path, convert: Convert) -> None:
        self.source, self.convert = source, convert

    def run(self, output: Path, *, force: bool = True) -> None:
        self.convert(self.source, output, force=force)


@pytest.fixture(params=["to_megatron", "to_hf", "from_gguf"])
def case(request, converted, tmp_path) -> Case:
    place = tmp_path / "place"
    place.mkdir()
    if request.param == "from_gguf":
        return Case(write_file(place / "in", fields(), tensors()), from_gguf.convert)
    pair = converted("llama_tied")
    source = pair.hf if request.param == "to_megatron" else pair.megatron
    shutil.copytree(source, place / "in")
    tool = convert_hf_to_megatron if request.param == "to_megatron" else convert_megatron_to_hf
    return Case(place / "in", tool.convert)


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture
def refused(tmp_path) -> Callable[[Case, Path, str], None]:
    """Asserts that an output is refused and that nothing at all has changed."""

    def check(case: Case, output: Path, message: str) -> None:
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=message):
            case.run(output)
        assert contents(tmp_path) == before

    return check


def test_an_output_that_is_or_contains_or_lies_in_the_input_is_refused(case, refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(case, case.source, "is .*in, which is read")
    refused(case, case.source.parent, "contains .*in, which is read")
    refused(case, case.source / "deep/er", "lies in .*in, which is read")
    refused(case, Path("place/../place"), "contains .*in, which is read")
    refused(case, Path("place/in/."), "is .*in, which is read")


def test_symbolic_links_are_seen_through(case, refused, tmp_path):
    (tmp_path / "link").symlink_to(case.source.parent)
    refused(case, tmp_path / "link", "is a symbolic link")
    refused(case, tmp_path / "link/in", "is .*in, which is read")
    refused(case, tmp_path / "link/in/deep", "lies in .*in, which is read")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    refused(case, tmp_path / "nowhere", "is a symbolic link")


def test_an_input_given_by_a_link_is_the_same_input(case, refused, tmp_path):
    (tmp_path / "link").symlink_to(case.source)
    case.source = tmp_path / "link"
    refused(case, tmp_path / "place", "contains .*in, which is read")


def test_what_is_no_checkpoint_of_ours_is_kept_even_with_force(case, refused, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "mine").write_text("keep")
    refused(case, output, "not a checkpoint of ours")
    refused(case, output / "mine", "it is not a directory")


def test_a_checkpoint_of_ours_is_replaced_with_force_alone(case, tmp_path):
    output = tmp_path / "output"
    case.run(output, force=False)
    with pytest.raises(ValueError, match="output exists; --force replaces it"):
        case.run(output, force=False)
    before = contents(output)
    case.run(output)
    assert contents(output).keys() == before.keys() and not list(tmp_path.glob(".output*"))


@pytest.mark.parametrize("place", ["notes.txt", "release/optim.pt", "tokenizer/notes.txt", "checkpoint-5/a"])
def test_a_file_of_the_users_in_a_checkpoint_of_ours_is_kept(case, refused, tmp_path, place):
    output = tmp_path / "output"
    case.run(output)
    (output / place).parent.mkdir(exist_ok=True)
    (output / place).write_text("mine")
    refused(case, output, "is not ours")


def test_an_empty_directory_is_replaced(case, tmp_path):
    (tmp_path / "output").mkdir()
    case.run(tmp_path / "output")
    assert contents(tmp_path / "output")


def test_a_hugging_face_checkpoint_of_others_is_kept(case, refused, converted, tmp_path):
    output = Path(shutil.copytree(converted("qwen2").hf, tmp_path / "output"))
    refused(case, output, "model.safetensors in it was written by another program")


def test_a_checkpoint_that_was_only_described_is_kept(case, refused, converted, tmp_path):
    output = Path(shutil.copytree(converted("qwen2").megatron, tmp_path / "output"))
    (output / DESCRIPTION_FILE).unlink()
    shutil.rmtree(output / "tokenizer")
    add_description(output, converted("qwen2").hf)
    refused(case, output, "describes weights that another program has written")


def test_what_appears_in_the_output_while_a_conversion_runs_is_kept(case, monkeypatch, tmp_path):
    output = tmp_path / "output"
    case.run(output)
    module = {
        convert_hf_to_megatron.convert: convert_hf_to_megatron,
        convert_megatron_to_hf.convert: convert_megatron_to_hf,
        from_gguf.convert: from_gguf,
    }[case.convert]
    name = "write_weights" if module is convert_hf_to_megatron else "write_hf_weights"
    write = getattr(module, name)

    def write_and_leave_a_note(*args: object) -> None:
        write(*args)
        (output / "note").write_text("mine")

    monkeypatch.setattr(module, name, write_and_leave_a_note)
    with pytest.raises(ValueError, match="note in it is not ours"):
        case.run(output)
    assert (output / "note").read_text() == "mine" and not list(tmp_path.glob(".output*"))


def test_describe_overwrites_no_description_and_no_tokenizer(converted, tmp_path):
    hf, output = converted("qwen2").hf, tmp_path / "output"
    shutil.copytree(converted("qwen2").megatron, output)
    with pytest.raises(ValueError, match="was converted, and needs no other description"):
        add_description(output, hf, force=True)
    (output / DESCRIPTION_FILE).unlink()
    before = contents(output)
    with pytest.raises(ValueError, match="tokenizer exists and is not ours"):
        add_description(output, hf, force=True)
    assert contents(output) == before
    shutil.rmtree(output / "tokenizer")
    add_description(output, hf)
    with pytest.raises(ValueError, match="--force replaces it"):
        add_description(output, hf)
    add_description(output, hf, force=True)
    assert read_checkpoint_info(output).family == "qwen2"


def test_every_file_and_folder_is_on_the_disk_before_the_output_has_its_name(case, monkeypatch, tmp_path):
    output, synced, fsync = tmp_path / "place" / "out", {}, os.fsync

    def recorded(descriptor: int) -> None:
        synced[os.fstat(descriptor).st_ino] = output.exists()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    case.run(output)
    written = {path.stat().st_ino for path in (output, *output.rglob("*"))}
    assert written <= {inode for inode, was_there in synced.items() if not was_there}
    assert synced[output.parent.stat().st_ino], "the folder that has the name was not synced after it had it"
