"""Files and folder of a context store: what is damaged, half written or not ours is never read."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from safetensors import safe_open

from megatron_star.algorithm.saved_context import SavedTensor
from megatron_star.planning.mask import Range
from megatron_star.store import rank_file
from megatron_star.store.folder import ContextFolder
from megatron_star.store.manifest import MANIFEST, DamagedEntry, Manifest
from megatron_star.store.publisher import EntryPublisher, NewEntry
from megatron_star.store.rank_file import RankFile, record_of, write_rank_file
from megatron_star.store.writer import ContextWriter

FILE = "rank-0-0.safetensors"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32, torch.float8_e4m3fn)


def tensors(seed: int = 0, num_rows: int = 37) -> list[SavedTensor]:
    """One of each dtype, not contiguous; the last one is empty."""
    torch.manual_seed(seed)
    tokens = (Range(0, 30), Range(50, 50 + num_rows - 30))
    made = [
        SavedTensor(str(i), tokens, (torch.randn(3, num_rows, 5) * 9).to(dtype).transpose(0, 1))
        for i, dtype in enumerate(DTYPES)
    ]
    return [*made, SavedTensor("empty", (), torch.empty(37, 1, 2, 0))]


def name_of(number: int) -> str:
    """Of an entry."""
    return f"{number:040x}"


def write_entry(folder: ContextFolder, number: int, **of_tensors: int) -> None:
    """As a rank and the driver write one."""
    writing = folder.begin(name_of(number))
    write_rank_file(writing / FILE, tensors(number, **of_tensors))
    files = {FILE: record_of(writing / FILE)}
    folder.publish(
        writing, name_of(number), Manifest(identity={"n": number}, star={}, cp_size=1, model="m", files=files)
    )


def read_entry(folder: ContextFolder, number: int) -> bool:
    """Whether there is one; raises DamagedEntry or AssertionError if it is not what was written."""
    manifest = folder.find(name_of(number))
    if manifest is None:
        return False
    assert manifest.identity == {"n": number}
    file = RankFile(folder.path / name_of(number) / FILE, manifest.files[FILE])
    for name, tokens, tensor in tensors(number):
        read = file.read(name)
        assert file.tokens(name) == tokens and read.dtype == tensor.dtype
        assert torch.equal(read.view(torch.uint8), tensor.contiguous().view(torch.uint8))
    file.close()
    return True


@pytest.fixture
def folder(tmp_path) -> ContextFolder:
    """An empty one."""
    made = ContextFolder(tmp_path / "store", 1 << 30)
    made.make()
    return made


def test_what_was_written_is_read_by_us_and_by_the_library_and_belongs_to_its_owner_alone(
    folder, monkeypatch
):
    monkeypatch.setattr(rank_file, "CHUNK_BYTES", 100)
    write_entry(folder, 1)
    assert read_entry(folder, 1) and not read_entry(folder, 2)
    path = folder.path / name_of(1)
    with safe_open(path / FILE, "pt") as file:
        for name, _, tensor in tensors(1):
            assert torch.equal(file.get_tensor(name).float(), tensor.float())
    assert [oct(each.stat().st_mode & 0o777) for each in (folder.path, path)] == ["0o700"] * 2
    assert {oct(each.stat().st_mode & 0o777) for each in path.iterdir()} == {"0o600"}


def test_a_flipped_bit_or_a_missing_end_is_noticed_wherever_it_is(folder):
    write_entry(folder, 1)
    rng = random.Random(0)
    for name in (FILE, MANIFEST):
        path = folder.path / name_of(1) / name
        content = path.read_bytes()
        places = [rng.randrange(len(content)) for _ in range(60)] + [0, 7, 8, len(content) - 1]
        for place in places:
            flipped = bytearray(content)
            flipped[place] ^= 1 << rng.randrange(8)
            for damaged in (bytes(flipped), content[:place]):
                path.write_bytes(damaged)
                if name == MANIFEST and damaged.rstrip(b"\n") == content.rstrip(b"\n"):
                    continue
                with pytest.raises(DamagedEntry):
                    read_entry(folder, 1)
        path.write_bytes(content)
    assert read_entry(folder, 1)


def test_what_is_no_manifest_is_damaged_and_what_is_no_entry_is_left_alone(folder):
    write_entry(folder, 1)
    manifest = folder.path / name_of(1) / MANIFEST
    for content in (b"", b"{}\n", b"\x80\x04." * 9, b"0" * (1 << 25), json.dumps([1] * 99).encode()):
        manifest.write_bytes(content)
        with pytest.raises(DamagedEntry):
            folder.find(name_of(1))
    (folder.path / "notes.txt").write_text("mine")
    (folder.path / "a folder").mkdir()
    (folder.path / name_of(7)).symlink_to(folder.path / "a folder")
    assert [entry.name for entry in folder.entries()] == [name_of(1)]
    assert not ContextFolder(folder.path, 1000).make_room(1001)
    assert ContextFolder(folder.path, 1000).make_room(1000)
    folder.remove_leftovers(0)
    assert sorted(path.name for path in folder.path.iterdir()) == [name_of(7), "a folder", "notes.txt"]


def test_the_least_recently_used_go_and_the_limit_holds(folder):
    for number in range(4):
        write_entry(folder, number)
        os.utime(folder.path / name_of(number) / MANIFEST, (1000 + number,) * 2)
    folder.touch(name_of(0))
    size = folder.entries()[0].num_bytes
    small = ContextFolder(folder.path, 3 * size + size // 2)
    assert small.make_room(size)
    assert [entry.name for entry in folder.entries()] == [name_of(3), name_of(0)]


def test_what_a_killed_writer_left_goes_after_a_while_and_what_is_being_written_stays(folder):
    old, new = folder.begin(name_of(1)), folder.begin(name_of(2))
    (old / "rank-0-0.part").write_bytes(b"half")
    for path in (old / "rank-0-0.part", old):
        os.utime(path, (time.time() - 4000,) * 2)
    folder.remove_leftovers()
    assert not old.exists() and new.exists()


def test_two_that_write_the_same_both_go_on_and_one_of_them_is_there(folder):
    first, second = folder.begin(name_of(1)), folder.begin(name_of(1))
    published = []
    for writing in (first, second):
        write_rank_file(writing / FILE, tensors(1))
        files = {FILE: record_of(writing / FILE)}
        manifest = Manifest(identity={"n": 1}, star={}, cp_size=1, model="m", files=files)
        published.append(folder.publish(writing, name_of(1), manifest))
    assert published == [True, False] and read_entry(folder, 1)
    assert [path.name for path in folder.path.iterdir()] == [name_of(1)]


WRITER = """
import sys
from test_context_folder import ContextFolder, name_of, write_entry
folder = ContextFolder(sys.argv[1], 1 << 30)
print("ready", flush=True)
for line in sys.stdin:
    import os
    pid = os.fork()
    if not pid:
        number = int(line)
        while True:
            write_entry(folder, number, num_rows=37)
            folder.drop(name_of(number))
            write_entry(folder, number, num_rows=37)
            number += 1
    print(pid, flush=True)
"""


def test_whatever_a_writer_that_is_killed_was_doing_nothing_wrong_is_read(folder):
    """50 writers are killed; an entry is there and right, or not there."""
    paths = os.pathsep.join(sys.path)
    parent = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WRITER, str(folder.path)],
        env=os.environ | {"PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    rng, found = random.Random(0), 0
    try:
        assert parent.stdout.readline() == "ready\n"
        for attempt in range(50):
            parent.stdin.write(f"{1000 * attempt}\n")
            parent.stdin.flush()
            pid = int(parent.stdout.readline())
            time.sleep(0.002 + 0.03 * rng.random())
            os.kill(pid, signal.SIGKILL)
            names = [entry.name for entry in folder.entries()]
            found += sum(read_entry(folder, int(name, 16)) for name in names[-3:])
    finally:
        parent.kill()
        parent.wait()
    assert found > 20


def published(folder: ContextFolder, write: bool = True) -> tuple[int, list[str]]:
    """Bytes that a rank's writer and the driver's publisher have written of an entry, and what they said."""
    said: list[str] = []

    def report(message: str, what: object = None) -> None:
        said.append(message)

    publisher = EntryPublisher(folder, [FILE], model="m", cp_size=1, report=report)
    writer = ContextWriter(0, 0, torch.device("cpu"))
    writer._report = report
    publisher.start(NewEntry(7, name_of(1), {"n": 1}, {}, most_bytes=20_000))
    with suppress(Exception):
        writer.save(folder.path / publisher.ready.get(timeout=0.5), tensors(1))
    key, num_bytes = publisher.ended.get(timeout=20)
    writer.close()
    assert key == 7
    return num_bytes, said


def test_a_writer_and_a_publisher_make_an_entry(folder):
    num_bytes, said = published(folder)
    assert num_bytes > 0 and said == [] and read_entry(folder, 1)


def test_a_full_disk_is_reported_and_leaves_nothing(folder):
    """A limit on the size of files stands for it: writing ends with an error in the middle of one."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        num_bytes, said = published(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert num_bytes == 0 and len(said) == 1 and "a context was not stored: File too large" in said[0]
    assert list(folder.path.iterdir()) == []


def test_an_entry_that_is_larger_than_the_folder_may_be_drops_nothing(folder):
    write_entry(folder, 2)
    num_bytes, said = published(ContextFolder(folder.path, 10_000))
    assert num_bytes == 0 and "the folder may have 10,000" in said[0]
    assert read_entry(folder, 2)


def test_a_folder_that_is_gone_or_cannot_be_written_is_reported(folder):
    folder.path.rmdir()
    folder.path.write_text("a file")
    num_bytes, said = published(folder)
    assert num_bytes == 0 and len(said) == 1
