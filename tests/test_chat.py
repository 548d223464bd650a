"""Answers, conversations and the terminal chat, on a tiny random model or a scripted answer."""

from __future__ import annotations

import builtins
import io
import json
import signal
import sys
from collections.abc import Iterator

import pytest
import tiny
import torch

from halfbyte.chat import Conversation, chat, repl, stream_chat
from halfbyte.errors import CheckpointError, ContextLengthError
from halfbyte.generate import Sampling, generate, stream
from halfbyte.tokenizer import Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture
def model(tmp_path):
    made = tiny.tiny_model(eos_token_id=None)
    made.tokenizer = Tokenizer.from_folder(tiny.write_tokenizer(tmp_path / "model", TEMPLATE))
    return made


class Scripted:
    """Stands for the engine: notes each prompt's text, then gives the next answer of the script."""

    def __init__(self, *answers) -> None:
        self.answers = list(answers)
        self.prompts: list[str] = []
        self.samplings: list[Sampling] = []
        self.closed = 0

    def stream(self, prompt, sampling=None):
        is_text = isinstance(prompt, str)
        self.prompts.append(prompt if is_text else self.model.tokenizer.decode(prompt))
        self.samplings.append(sampling)
        return ScriptedStream(self, self.answers.pop(0))


class ScriptedStream:
    def __init__(self, script: Scripted, pieces) -> None:
        self.script, self.pieces = script, list(pieces)
        self.finish_reason = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if not self.pieces:
            self.finish_reason = self.finish_reason or "stop"
            raise StopIteration
        piece = self.pieces.pop(0)
        if piece in ("length", "context"):
            self.finish_reason = piece
            return next(self)
        if piece == "^C":
            signal.raise_signal(signal.SIGINT)
        if isinstance(piece, Exception):
            raise piece
        return piece

    def close(self) -> None:
        self.script.closed += 1
        self.finish_reason = self.finish_reason or "cancelled"


@pytest.fixture
def script(monkeypatch):
    # A process started in the background may ignore the signal that the tests raise.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def use(*answers) -> Scripted:
        scripted = Scripted(*answers)

        def engine(conversation: Conversation) -> Scripted:
            scripted.model = conversation.model
            return scripted

        monkeypatch.setattr(Conversation, "_engine_now", engine)
        return scripted

    yield use
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def run(monkeypatch):
    """The terminal chat with these lines on a piped standard input; its output."""
    from rich.console import Console

    def piped(conversation: Conversation, *lines: str, raw: bool = False) -> str:
        console = Console(file=io.StringIO(), width=60)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        repl(conversation, raw=raw, console=console)
        return console.file.getvalue()

    return piped


# ---- one answer ----


def test_chat_is_the_decoded_continuation_of_the_templates_ids(model):
    messages = [{"role": "system", "content": "Be"}, {"role": "user", "content": "hi"}]
    ids = model.tokenizer.chat_ids(messages)
    assert model.tokenizer.decode(ids, skip_special_tokens=False) == "<s>[s]Be[u]hi[a]"
    for settings in ({}, {"temperature": 0.9, "seed": 7, "top_k": 50}):
        tokens = generate(model, ids, max_new_tokens=12, **settings)
        expected = model.tokenizer.decode(tokens)
        assert chat(model, messages, max_new_tokens=12, **settings) == expected
        assert chat(model, messages, Sampling(max_new_tokens=12, **settings)) == expected
        pieces = list(stream_chat(model, messages, max_new_tokens=12, **settings))
        assert "".join(pieces) == expected and len(expected) > 0


def test_a_string_is_one_question(model):
    question = [{"role": "user", "content": "hi"}]
    assert chat(model, "hi", max_new_tokens=9) == chat(model, question, max_new_tokens=9)


def test_chat_needs_a_tokenizer_and_a_template(model):
    model.tokenizer.chat_templates.clear()
    with pytest.raises(CheckpointError, match="no chat template.*hint"):
        chat(model, "hi")
    model.tokenizer = None
    with pytest.raises(CheckpointError, match="tiny: the model has no tokenizer. hint"):
        chat(model, "hi")


def test_too_long_a_conversation_says_how_long(model):
    with pytest.raises(ContextLengthError, match=r"107 tokens long.*model's 96. hint: .*/reset"):
        chat(model, "x" * 100)
    assert chat(model, "x" * 88, max_new_tokens=50) is not None


# ---- conversations ----


def test_every_question_is_asked_with_the_turns_before_it(model, script):
    scripted = script(["one", " two"], ["three"])
    sampling = Sampling(temperature=0.5)
    conversation = Conversation(model, system="S", sampling=sampling)
    assert list(conversation.send("q1")) == ["one", " two"]
    assert list(conversation.send("q2")) == ["three"]
    assert scripted.prompts == ["[s]S[u]q1[a]", "[s]S[u]q1[a]one two[u]q2[a]"]
    assert scripted.samplings == [sampling, sampling]
    assert conversation.finish_reason == "stop"
    conversation.reset()
    assert conversation.history == [{"role": "system", "content": "S"}]


def test_a_conversation_equals_chat_with_its_history(model):
    conversation = Conversation(model, sampling=Sampling(max_new_tokens=8))
    first = "".join(conversation.send("hi"))
    assert first == chat(model, "hi", max_new_tokens=8)
    history = [*conversation.messages, {"role": "user", "content": "go"}]
    expected = chat(model, history, max_new_tokens=8)
    assert "".join(conversation.send("go")) == expected
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2


def test_a_closed_answer_stays_as_far_as_it_came(model, script):
    scripted = script(["one", " two"], ["never"], ["four"])
    conversation = Conversation(model)
    pieces = conversation.send("q1")
    assert next(pieces) == "one"
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": "one"}
    assert conversation.finish_reason == "cancelled" and scripted.closed == 1
    conversation.send("unasked").close()
    assert len(conversation.messages) == 2
    assert list(conversation.send("q2")) == ["four"]
    assert scripted.prompts[-1] == "[u]q1[a]one[u]q2[a]"


def test_an_answer_interrupted_before_it_began_leaves_nothing(model, script):
    script(["^C"], [])
    conversation = Conversation(model)
    with pytest.raises(KeyboardInterrupt):
        list(conversation.send("q"))
    assert conversation.messages == []
    assert list(conversation.send("q")) == []
    assert conversation.messages[-1] == {"role": "assistant", "content": ""}


def test_what_is_refused_leaves_the_conversation_as_it_was(model):
    conversation = Conversation(model, sampling=Sampling(max_new_tokens=4))
    list(conversation.send("hi"))
    before = list(conversation.messages)
    with pytest.raises(ContextLengthError):
        conversation.send("x" * 100)
    assert conversation.messages == before


def test_save_and_load(model, script, tmp_path):
    script(["naïve 🎉"])
    path = tmp_path / "chat.json"
    first = Conversation(model, "Ünï", Sampling(temperature=0.5, stop=["\n", "##"], seed=3))
    list(first.send("¿q?"))
    first.save(path)
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant"]
    second = Conversation(model)
    second.load(path)
    assert second.history == first.history and second.system == "Ünï"
    assert second.sampling == first.sampling
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "only"}]}))
    second.load(path)
    assert second.system is None and second.sampling == Sampling()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": 3}]}',
        '{"messages": ["hi"]}',
        '{"messages": [], "sampling": {"temperature": -1}}',
        '{"messages": [], "sampling": {"warmth": 1}}',
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(model, tmp_path, content):
    path = tmp_path / "chat.json"
    path.write_text(content)
    conversation = Conversation(model, system="S")
    with pytest.raises(ValueError, match=r"chat\.json: expected a saved conversation"):
        conversation.load(path)
    assert conversation.history == [{"role": "system", "content": "S"}]


# ---- the terminal chat ----


def test_lines_are_questions_until_the_input_ends(model, script, run):
    scripted = script(["Hel", "lo"], ["bye"])
    shown = run(Conversation(model), "q1", "", "   ", "q2")
    assert shown == "Hello\nbye\n"
    assert scripted.prompts[1] == "[u]q1[a]Hello[u]q2[a]"


def test_exit_leaves_at_once(model, script, run):
    scripted = script(["one"], ["never"])
    assert run(Conversation(model), "q1", "/exit", "q2") == "one\n"
    assert len(scripted.prompts) == 1


def test_a_real_model_answers(model, run):
    conversation = Conversation(model, sampling=Sampling(max_new_tokens=6))
    expected = chat(model, "hi", max_new_tokens=6)
    shown = run(conversation, "hi")
    assert conversation.messages[1]["content"] == expected
    assert "stopped after 6 tokens; /set max_new_tokens 24" in shown


def test_commands(model, script, run, tmp_path):
    scripted = script(["one"], ["two"], ["three"])
    conversation = Conversation(model, system="old")
    path = tmp_path / "saved.json"
    shown = run(
        conversation,
        "/help",
        "/system Be terse",
        "q1",
        "/set temperature 0.7",
        "/set top_k 5",
        "/set stop ## end",
        "/set seed 4",
        f"/save {path}",
        "/show",
        "/reset",
        "q2",
        "/set seed none",
        "/set stop",
        "/system",
        f"/load {path}",
        "q3",
    )
    assert scripted.prompts == [
        "[s]Be terse[u]q1[a]",
        "[s]Be terse[u]q2[a]",
        "[s]Be terse[u]q1[a]one[u]q3[a]",
    ]
    expected = Sampling(temperature=0.7, top_k=5, stop="## end", seed=4)
    assert scripted.samplings == [Sampling(), expected, expected]
    for command in ("/help", "/system", "/reset", "/set", "/show", "/save", "/load", "/exit"):
        assert command in shown
    used = len("[s]Be terse[u]q1[a]one[a]") + 1
    assert "temperature: 0.7" in shown and f"2 messages, {used} of 96 tokens" in shown


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/nope", "/nope: no such command. hint: /help"),
        ("/set warmth 1", "expected one of temperature, top_k"),
        ("/set temperature hot", "/set temperature: expected a number, got 'hot'"),
        ("/set top_k 1.5", "/set top_k: expected a number"),
        ("/set top_p 7", "top_p: expected in (0, 1], got 7.0"),
        ("/save", "expected the name of a file"),
        ("/load /no/such/file", "No such file"),
        ("/save /no/such/folder/x", "No such file"),
        ("x" * 100, "the conversation is 107 tokens long"),
    ],
)
def test_what_goes_wrong_is_said_and_the_chat_goes_on(model, script, run, line, said):
    script(["fine"])
    conversation = Conversation(model)
    shown = run(conversation, line, "q")
    assert said in shown.replace("\n", " ") and shown.endswith("fine\n")
    assert conversation.sampling == Sampling()


def test_an_error_of_the_model_does_not_end_the_chat(model, script, run):
    script(["a", FloatingPointError("logits are not finite")], ["fine"])
    shown = run(Conversation(model), "q1", "q2")
    assert "logits are not finite" in shown and shown.endswith("fine\n")


def test_control_c_stops_that_answer_only(model, script, run):
    scripted = script(["par", "^C", "never"], ["^C"], ["whole"])
    conversation = Conversation(model)
    assert run(conversation, "q1", "q2", "q3") == "par\nstopped\n\nstopped\nwhole\n"
    assert scripted.prompts[-1] == "[u]q1[a]par[u]q3[a]"
    assert conversation.finish_reason == "stop"


def test_why_an_answer_ended_early_is_said(model, script, run):
    script(["a", "length"], ["b", "context"])
    shown = run(Conversation(model), "q1", "q2")
    assert "stopped after 256 tokens; /set max_new_tokens 1024 allows more" in shown
    assert "the model's context is full; /reset starts over" in shown


def test_text_is_shown_as_it_is_but_for_control_characters(model, script, run):
    script(["[bold]x[/bold] :smile: ", "\x1b[2J\x07\u009b31m tab\tend\n", "y" * 100])
    shown = run(Conversation(model), "q")
    assert shown == "[bold]x[/bold] :smile: [2J31m tab\tend\n" + "y" * 100 + "\n"


def test_a_keyboard_that_interrupts_and_ends_its_input(model, script, monkeypatch, capsys):
    from rich.console import Console

    script(["one"])
    typed: list = [KeyboardInterrupt, "q1", EOFError]

    def keyboard(prompt: str) -> str:
        line = typed.pop(0)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr(sys, "stdin", type("Tty", (), {"isatty": lambda self: True})())
    monkeypatch.setattr(builtins, "input", keyboard)
    console = Console(file=io.StringIO(), width=60)
    repl(Conversation(model), console=console)
    shown = console.file.getvalue()
    assert "/help lists the commands" in shown and "/exit or Ctrl-D leaves" in shown
    assert "one\n" in shown and typed == []


def test_a_model_without_template_is_refused_before_the_first_question(model, script, run):
    scripted = script(["never"])
    model.tokenizer.chat_templates.clear()
    with pytest.raises(CheckpointError, match="no chat template.*--raw"):
        run(Conversation(model), "q")
    model.tokenizer = None
    with pytest.raises(CheckpointError, match="no tokenizer"):
        run(Conversation(model), "q", raw=True)
    assert scripted.prompts == []


def test_raw_completes_each_line_alone(model, script, run):
    model.tokenizer.chat_templates.clear()
    scripted = script([" upon"], ["^C"], [" a time", "length"])
    conversation = Conversation(model, system="unused")
    shown = run(conversation, "Once", "stop me", "Once upon", raw=True)
    assert scripted.prompts == ["Once", "stop me", "Once upon"]
    assert shown.startswith(" upon\n\nstopped\n a time\n") and "stopped after 256" in shown
    assert conversation.messages == [] and scripted.closed == 3


def test_raw_on_a_real_base_model(shared, run):
    from halfbyte.checkpoint import load

    model = load(
        shared / "models" / "stories260K",
        quant_type=None,
        dtype=torch.float32,
        device="cpu",
        progress=False,
    )
    begin = "Once upon a time there"
    ids = model.tokenizer.encode(begin, add_special_tokens=True)
    assert ids[0] == 1
    story = model.tokenizer.decode(generate(model, ids, max_new_tokens=20))
    sampling = Sampling(max_new_tokens=20)
    shown = run(Conversation(model, sampling=sampling), begin, raw=True)
    # What goes on with a text keeps the space that the ids alone lose.
    assert shown.startswith(f" {story}\n") and story.startswith("was a little girl")
    assert "".join(stream(model, begin, sampling)) == f" {story}"
    assert "".join(stream(model, ids, sampling)) == story
    assert generate(model, begin, sampling, stop=(" was",)) == []
