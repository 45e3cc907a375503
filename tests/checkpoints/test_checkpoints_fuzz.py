"""Whatever a file says, it is read or refused in one line that names it: random mutations of each kind.

All of them were once run 1,000 times; of those that take long, this suite runs fewer.
"""

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from random_models import CONFIGS
from test_checkpoints_gguf_fields import fields, tensors, write_file
from test_checkpoints_recorded import MODEL

from checkpoints_tools import from_gguf, recorded_by_megatron
from checkpoints_tools.hf_checkpoint import open_hf_checkpoint
from checkpoints_tools.hf_config import model_arguments
from checkpoints_tools.inspect import inspect
from megatron_star.model.checkpoint import DESCRIPTION_FILE

NUM_MUTATIONS, OF_SLOW_KINDS = 1000, 300
ODD = (
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**30, -(10**400), 0.0, -0.5, 1e-320, 1e308, 1.5,
    float("nan"), float("inf"), "", "4", "silu", "\ud800", "a\u2028b", "x" * 5000, [], [1], [None], ["a"],
    [[]], {}, {"a": 1}, {"rope_type": "yarn"}, {"rope_type": "llama3", "factor": "8"},
)  # fmt: skip


def mutate(value: Any, draw: random.Random) -> Any:
    """A copy of a JSON value with one to three places changed, taken out, or given a value of another."""
    changed = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        places = [(changed, key) for key in changed]
        places += [(inner, key) for inner in changed.values() if isinstance(inner, dict) for key in inner]
        places += [
            (deep, key)
            for inner in changed.values()
            if isinstance(inner, dict)
            for deep in inner.values()
            if isinstance(deep, dict)
            for key in deep
        ]
        if not places:
            return changed
        holder, key = draw.choice(places)
        kind = draw.randrange(10)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[key] = copy.deepcopy(draw.choice(list(holder.values())))
        elif kind == 2:
            name = str(draw.choice(("rope_scaling", "unknown", "quantization_config", key)))
            holder[name] = copy.deepcopy(draw.choice(ODD))  # which may itself be changed later
        else:
            holder[key] = copy.deepcopy(draw.choice(ODD))
    return changed


def mutate_bytes(data: bytes, draw: random.Random, most: int) -> bytes:
    """A copy with one to four of the first `most` bytes changed, or with a part cut out."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(most, len(changed)))
        if draw.random() < 0.1:
            del changed[at : at + draw.randint(1, 40)]
        else:
            changed[at] = draw.choice((0, 255, changed[at] ^ (1 << draw.randrange(8)), draw.randrange(256)))
    return bytes(changed)


def accepted(read: Callable[[], object], words: tuple[str, ...], what: object) -> bool:
    """Whether it was read; fails unless a refusal is one line, by ValueError or OSError, with such a word."""
    try:
        read()
    except (ValueError, OSError) as error:
        message = str(error)
        assert any(word in message for word in words) and "\n" not in message.strip(), (message, what)
        assert len(message) < 1500, (message, what)
        return False
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__}: {error}, from {what!r:.2000}") from error
    return True


def run_all(attempt: Callable[[random.Random], bool], count: int = NUM_MUTATIONS) -> float:
    """The share of the mutations that was accepted."""
    return sum(attempt(random.Random(seed)) for seed in range(count)) / count


def test_configurations():
    configs = [json.loads(config.to_json_string()) for config in CONFIGS.values()]
    configs += [config | {"rope_scaling": {"type": "yarn", "factor": 4.0}} for config in configs]

    def attempt(draw: random.Random) -> bool:
        config = mutate(draw.choice(configs), draw)
        return accepted(lambda: model_arguments(config), ("config.json", "model_type"), config)

    assert 0.05 < run_all(attempt) < 0.95


@pytest.fixture
def hf(converted, tmp_path) -> Path:
    return Path(shutil.copytree(converted("llama_tied").hf, tmp_path / "hf"))


def test_files_of_configurations(hf):
    text = (hf / "config.json").read_bytes()

    def attempt(draw: random.Random) -> bool:
        data = mutate_bytes(text, draw, len(text))
        (hf / "config.json").write_bytes(data)
        return accepted(lambda: open_hf_checkpoint(hf), (str(hf), "config.json", "model_type"), data)

    assert run_all(attempt) < 0.95


def test_headers_of_safetensors(hf):
    path = hf / "model.safetensors"
    original = path.read_bytes()
    length = int.from_bytes(original[:8], "little")
    header, data = json.loads(original[8 : 8 + length]), original[8 + length :]

    def attempt(draw: random.Random) -> bool:
        if draw.random() < 0.3:
            changed = mutate_bytes(original, draw, 8 + length)
        else:
            text = json.dumps(mutate(header, draw)).encode()
            changed = len(text).to_bytes(8, "little") + text + data
        path.write_bytes(changed)
        return accepted(lambda: open_hf_checkpoint(hf), (str(hf),), changed[: length + 8])

    assert 0 < run_all(attempt) < 0.95


def test_indices_of_safetensors(hf):
    (hf / "model.safetensors").rename(hf / "a.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "a.safetensors"}}

    def attempt(draw: random.Random) -> bool:
        changed = mutate(index, draw)
        (hf / "model.safetensors.index.json").write_text(json.dumps(changed))
        return accepted(lambda: open_hf_checkpoint(hf), (str(hf),), changed)

    assert run_all(attempt) < 0.95


def test_gguf_files(tmp_path, monkeypatch):
    path = write_file(tmp_path / "a.gguf", fields(), tensors())
    original = path.read_bytes()
    monkeypatch.setattr(from_gguf, "write_hf_weights", lambda *args: list(args[2]))

    def attempt(draw: random.Random) -> bool:
        changed = mutate_bytes(original, draw, 2600)
        path.write_bytes(changed)
        done = accepted(lambda: from_gguf.convert(path, tmp_path / "hf"), (str(path),), changed[:2600])
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        return done

    assert run_all(attempt, OF_SLOW_KINDS) < 0.95


def test_gguf_fields(tmp_path, monkeypatch):
    path = tmp_path / "a.gguf"
    monkeypatch.setattr(from_gguf, "write_hf_weights", lambda *args: list(args[2]))
    odd = (
        0,
        1,
        2**31,
        2**32 - 1,
        -1,
        0.5,
        float("nan"),
        True,
        False,
        "",
        "gpt-2",
        ["a"],
        [1, 2],
        ["a b", "b c"],
    )

    def attempt(draw: random.Random) -> bool:
        values = fields()
        for _ in range(draw.randint(1, 2)):
            values[draw.choice(list(values))] = draw.choice(odd)
        values = {key: value for key, value in values.items() if type(value) is not int or value >= 0}
        write_file(path, values, tensors())
        done = accepted(lambda: from_gguf.convert(path, tmp_path / "hf"), (str(path), "config.json"), values)
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        return done

    assert run_all(attempt, OF_SLOW_KINDS) < 0.95


def test_descriptions(converted, tmp_path):
    megatron = Path(shutil.copytree(converted("qwen2_yarn").megatron, tmp_path / "megatron"))
    description = json.loads((megatron / DESCRIPTION_FILE).read_text())

    def attempt(draw: random.Random) -> bool:
        changed = mutate(description, draw)
        (megatron / DESCRIPTION_FILE).write_text(json.dumps(changed))
        return accepted(lambda: inspect(megatron), (str(megatron), "model_type"), changed)

    assert run_all(attempt) < 0.95


def test_what_bridge_recorded(tmp_path):
    of_model = {"num_layers": 3, "gated_linear_unit": True, "window_size": None, "layernorm_epsilon": 1e-6}
    recorded = {"model": of_model | {"_target_": "a.Qwen2ModelProvider", "num_moe_experts": None}}

    def read() -> None:
        found = recorded_by_megatron.recorded_arguments(tmp_path)
        recorded_by_megatron.check_agreement(tmp_path, found, MODEL)

    def attempt(draw: random.Random) -> bool:
        changed = mutate(recorded, draw)
        text = yaml.safe_dump(changed).encode("utf-8", "surrogatepass")
        (tmp_path / "run_config.yaml").write_bytes(text)
        return accepted(read, (str(tmp_path),), changed)

    assert run_all(attempt, OF_SLOW_KINDS) < 0.95
