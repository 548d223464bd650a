"""Sampling, stops, streams and batches."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.engine import Engine
from halfbyte.errors import ContextLengthError
from halfbyte.generate import StopStrings, generate, stream
from halfbyte.kv_cache import CacheStep
from halfbyte.models import Decoder, DecoderConfig, Output
from halfbyte.sampling import NOT_FINITE, Kind, Sampling, SamplingRows
from halfbyte.tokenizer import Tokenizer

VOCAB = 260  # 256 bytes and four special tokens
EOS, OTHER_EOS, BOS = 256, 257, 258
RAW = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def tiny(**changes) -> Decoder:
    torch.manual_seed(3)
    model = Decoder(DecoderConfig.from_dict({**RAW, **changes})).eval()
    for param in model.parameters():
        if param.dim() > 1:
            param.data.normal_(0, 1.5 / param.shape[-1] ** 0.5)
    # Never the end by itself, so that lengths are known; tests of eos set their own ids.
    model.lm_head.weight.data[256:] = 0
    return model


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny()


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory) -> Tokenizer:
    """Token i is byte i, so one character may take four tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = _byte_characters()
    vocab = {alphabet[byte]: byte for byte in range(256)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<eos>", "<other>", "<bos>", "<pad>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    inner.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return Tokenizer.from_folder(folder)


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


class Scripted(Decoder):
    """A decoder that says the same tokens to every prompt."""

    def __init__(self, script: list[int], tokenizer=None, **changes):
        super().__init__(DecoderConfig.from_dict({**RAW, **changes}))
        # Tensors, because a recorded step does not run this Python again.
        self.script = torch.tensor([*script, EOS])
        self.forwards = torch.zeros(1, dtype=torch.int64)
        self.tokenizer = tokenizer
        self.eval()

    def forward(self, ids, labels=None, cache: CacheStep | None = None, num_items=None, **_):
        token = self.script[self.forwards.clamp(max=len(self.script) - 1)]
        self.forwards.add_(1)
        logits = (torch.arange(VOCAB) == token).float()
        return Output(None, logits.repeat(len(ids), 1, 1))


def scripted_text(text: str, tokenizer, **changes) -> Scripted:
    return Scripted(list(text.encode()), tokenizer, **{"max_position_embeddings": 4096, **changes})


# --- greedy, lengths and ends ----------------------------------------------------------------


def reference_greedy(model: Decoder, prompt: list[int], new: int) -> list[int]:
    """Without a cache: the whole sequence again for every token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_recomputing_everything(model):
    prompt = [5, 9, 200, 31]
    expected = reference_greedy(model, prompt, 20)
    assert generate(model, prompt, max_new_tokens=20) == expected
    assert len(set(expected)) > 5, "a loop of few tokens would prove little"


def test_greedy_equals_transformers():
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    model = tiny()
    config = transformers.AutoConfig.for_model(**RAW)
    reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    reference.load_state_dict(model.state_dict())
    prompt = torch.tensor([[7, 77, 177]])
    for penalty in (1.0, 1.3):
        expected = reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=30,
            repetition_penalty=penalty,
            pad_token_id=259,
        )[0, 3:]
        got = generate(model, prompt[0], repetition_penalty=penalty, max_new_tokens=30)
        assert got == expected.tolist()


def test_stories260k_writes_what_transformers_writes(shared):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    folder = shared / "models" / "stories260K"
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = Decoder(DecoderConfig.from_dict(json.loads((folder / "config.json").read_text())))
    model.load_state_dict(reference.state_dict())
    model.tokenizer = Tokenizer.from_folder(folder)
    prompt = [1, *model.tokenizer.encode("Once upon a time")]
    expected = reference.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=120)
    pieces = stream(model.eval(), prompt, max_new_tokens=120)
    text = "".join(pieces)
    assert pieces.token_ids == expected[0, len(prompt) :].tolist()
    assert len(pieces.token_ids) == 120 and pieces.finish_reason == "length"
    whole = model.tokenizer.decode(prompt + pieces.token_ids)
    assert text.strip() and whole.endswith(text)
    # A text goes on as it would be written; ids are answered with what theirs decode to.
    goes_on = Engine(model, max_batch=1).generate("Once upon a time there", max_new_tokens=20)
    assert model.tokenizer.decode(goes_on.token_ids) == goes_on.text[1:]
    prompt = model.tokenizer.encode("Once upon a time there", add_special_tokens=True)
    assert model.tokenizer.decode(prompt + goes_on.token_ids).endswith("there" + goes_on.text)
    assert Engine(model, max_batch=1).generate(prompt, max_new_tokens=20).text == goes_on.text[1:]


def test_mixed_lengths_equal_single_rows(model):
    prompts = [[4, 8, 15, 16, 23, 42], [99], [7, 3, 7, 3, 7, 3, 7, 3, 7, 3, 7]]
    batch = generate(model, prompts, max_new_tokens=12)
    assert batch == [generate(model, prompt, max_new_tokens=12) for prompt in prompts]


def until(reply: list[int], eos: int) -> list[int]:
    return reply[: reply.index(eos)] if eos in reply else reply


def test_rows_end_on_their_own(model):
    """One row at its eos, one at the context, one at max_new_tokens; the rest goes on alike."""
    prompts = [[1, 2, 3], list(range(58)), [50]]
    alone = [generate(model, prompt, max_new_tokens=15) for prompt in prompts]
    assert [len(reply) for reply in alone] == [15, 6, 15]
    eos = next(token for token in alone[0][2:] if token not in alone[1] + alone[2])
    batch = generate(tiny(eos_token_id=eos), prompts, max_new_tokens=15)
    assert batch == [until(alone[0], eos), alone[1], alone[2]]


@pytest.mark.parametrize("where", ["config", "config list", "generation_config"])
def test_every_eos_id_ends(where, byte_tokenizer):
    changes = {"config": OTHER_EOS, "config list": [EOS, OTHER_EOS], "generation_config": EOS}
    model = Scripted([65, 66, OTHER_EOS, 67], byte_tokenizer, eos_token_id=changes[where])
    if where == "generation_config":
        model.generation_config = {"eos_token_id": [EOS, OTHER_EOS]}
    pieces = stream(model, [1])
    assert "".join(pieces) == "AB"
    assert pieces.finish_reason == "stop" and pieces.token_ids == [65, 66]


def test_finish_reasons_and_usage(byte_tokenizer):
    pieces = stream(scripted_text("abcdef", byte_tokenizer), [1, 2], max_new_tokens=3)
    assert "".join(pieces) == "abc" and pieces.finish_reason == "length"
    assert pieces.usage == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    cut = scripted_text("abcdef", byte_tokenizer, max_position_embeddings=6)
    pieces = stream(cut, [1, 2])
    assert "".join(pieces) == "abcd" and pieces.finish_reason == "context"
    pieces = stream(cut, [1] * 6)
    assert list(pieces) == [] and pieces.finish_reason == "context"


def test_closing_a_stream_ends_it(byte_tokenizer):
    pieces = stream(scripted_text("abcdef", byte_tokenizer), [1])
    assert next(pieces) == "a"
    pieces.close()
    assert list(pieces) == [] and pieces.finish_reason == "cancelled"
    assert pieces.token_ids == [97]


def test_prompts_are_checked(model):
    with pytest.raises(ContextLengthError, match="at most 64 tokens .*, got 65"):
        generate(model, [1] * 65)
    for token in (260, -1):
        with pytest.raises(ValueError, match=f"ids in 0 to 259, got {token}"):
            generate(model, [3, token])
    message = {"role": "user", "content": "hi"}
    for wrong, kind in ((None, "NoneType"), (message, "dict"), ([message], "dict"), (3, "int")):
        with pytest.raises(TypeError, match=f"prompt: expected text or token ids, got {kind}"):
            generate(model, wrong)
    with pytest.raises(TypeError, match="expected token ids, got 1.5 among them"):
        generate(model, [1, 1.5])
    with pytest.raises(ValueError, match=r"tensor \[T\] or \[B, T\]"):
        generate(model, torch.zeros(1, 1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="model.tokenizer is None"):
        stream(model, [1])
    with pytest.raises(ValueError, match="stop strings: .*model.tokenizer is None"):
        generate(model, [1], stop="x")
    with pytest.raises(ValueError, match="one prompt, got a batch"):
        stream(model, [[1], [2]])
    with pytest.raises(TypeError, match="temprature"):
        generate(model, [1], temprature=1.0)


def test_empty_prompt_starts_with_bos(model):
    assert generate(model, [], max_new_tokens=5) == generate(model, [BOS], max_new_tokens=5)
    assert generate(model, [[]], max_new_tokens=5) == [generate(model, [BOS], max_new_tokens=5)]
    with pytest.raises(ValueError, match="no bos token"):
        generate(tiny(bos_token_id=None), [])


def test_tensors_and_lists_are_the_same_prompts(model):
    prompts = [[5, 6, 7], [8, 9, 10]]
    expected = generate(model, prompts, max_new_tokens=4)
    assert generate(model, torch.tensor(prompts), max_new_tokens=4) == expected
    assert generate(model, torch.tensor(prompts[0]), max_new_tokens=4) == expected[0]
    # Read once, though it is both checked and submitted.
    assert generate(model, iter([5, 6, 7]), max_new_tokens=4) == generate(
        model, [5, 6, 7], max_new_tokens=4
    )


def test_a_training_model_generates_without_dropout():
    model = tiny(attention_dropout=0.9)
    expected = generate(model, [1, 2, 3], max_new_tokens=10)
    model.train()
    model.model.layers[0].eval()
    assert generate(model, [1, 2, 3], max_new_tokens=10) == expected
    assert model.training and model.model.layers[1].training
    assert not model.model.layers[0].training


# --- sampling --------------------------------------------------------------------------------


def test_a_seed_is_the_same_text_in_any_company(model):
    options = dict(temperature=1.5, top_k=50, top_p=0.9, seed=11, max_new_tokens=16)
    alone = generate(model, [1, 2, 3], **options)
    assert alone == generate(model, [1, 2, 3], **options)
    torch.manual_seed(0)
    batch = generate(model, [[9] * 20, [1, 2, 3], [4, 4]], **options)
    assert batch[1] == alone
    assert alone != generate(model, [1, 2, 3], **{**options, "seed": 12})


def test_without_a_seed_rows_differ_and_torch_seeds_them(model):
    options = dict(temperature=2.0, max_new_tokens=12)
    torch.manual_seed(5)
    first = generate(model, [[1, 2], [1, 2]], **options)
    assert first[0] != first[1]
    torch.manual_seed(5)
    assert generate(model, [[1, 2], [1, 2]], **options) == first


def test_sampling_twice_the_same_as_streaming(model, byte_tokenizer):
    model.tokenizer = byte_tokenizer
    options = dict(temperature=1.0, seed=2, max_new_tokens=20)
    pieces = stream(model, [1, 2, 3], **options)
    text = "".join(pieces)
    tokens = generate(model, [1, 2, 3], **options)
    model.tokenizer = None
    assert pieces.token_ids == tokens and text == byte_tokenizer.decode(tokens)


def sampling_rows(
    samplings: list[Sampling], vocab: int, prompts=None, replies=None, ends=()
) -> SamplingRows:
    rows = SamplingRows(len(samplings), vocab, "cpu")
    for row, sampling in enumerate(samplings):
        prompt = prompts[row] if prompts else [0]
        reply = replies[row] if replies else []
        rows.set(row, sampling, sampling.seed or 0, prompt, reply, ends)
    return rows


def sample(logits: torch.Tensor, sampling: Sampling, positions=None, **lists) -> list[int]:
    """The next token of each row of logits, all with one setting."""
    rows = sampling_rows([sampling] * len(logits), logits.shape[-1], **lists)
    if positions is not None:
        rows.lengths.copy_(torch.tensor(positions))
    return rows.sample(logits, 0, sampling.kind).tokens.tolist()


def edited(logits: torch.Tensor, sampling: Sampling, prompts, replies) -> torch.Tensor:
    rows = sampling_rows([sampling] * len(logits), logits.shape[-1], prompts, replies)
    assert rows.edits is not None
    return rows.edits.apply(logits, rows.penalties, torch.zeros(len(logits), dtype=torch.bool))


def draws(logits: torch.Tensor, n: int, **fields) -> Counter:
    sampling = Sampling(temperature=fields.pop("temperature", 1.0), seed=7, **fields)
    return Counter(sample(logits.expand(n, -1), sampling, list(range(n))))


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.25, 0.05])
    n = 20000
    for fields in ({}, {"top_k": 5}, {"top_p": 0.9999}):
        counts = draws(probabilities.log(), n, **fields)
        assert counts[1] == 0
        for token, p in enumerate(probabilities.tolist()):
            assert abs(counts[token] / n - p) < 4.5 * math.sqrt(p * (1 - p) / n) + 1e-9


def test_temperature_sharpens():
    logits = torch.tensor([1.0, 2.0, 3.0])
    n = 20000
    counts = draws(logits, n, temperature=0.5)
    expected = (logits / 0.5).softmax(-1)
    for token in range(3):
        assert abs(counts[token] / n - expected[token]) < 0.015
    assert set(draws(logits * 1e30, 50, temperature=1e-30)) == {2}


def test_every_row_has_its_own_settings():
    """Rows of one batch get what each gets alone, whatever the others ask for."""
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(8)) * 3
    settings = [
        Sampling(),
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.7, top_k=5, seed=2),
        Sampling(temperature=1.3, top_p=0.5, min_p=0.01, seed=3, repetition_penalty=1.5),
        Sampling(logit_bias={7: 100.0}),
        Sampling(frequency_penalty=5.0, logprobs=3),
    ]
    prompts, replies = [[1, 2]] * 6, [[3, 3, 9]] * 6
    rows = sampling_rows(settings, 50, prompts, replies)
    kind = Kind()
    for sampling in settings:
        kind = kind | sampling.kind
    assert kind == Kind(True, True)
    together = rows.sample(logits, 0, kind).tokens.tolist()
    for row, sampling in enumerate(settings):
        part = {"prompts": prompts[:1], "replies": replies[:1]}
        assert together[row] == sample(logits[row : row + 1], sampling, **part)[0]
    assert together[4] == 7


def test_logit_bias_decides(model):
    assert set(generate(model, [1, 2], logit_bias={77: 1e4}, max_new_tokens=5)) == {77}
    free = generate(model, [1, 2], max_new_tokens=5)
    assert generate(model, [1, 2], logit_bias={free[0]: -1e4}, max_new_tokens=5)[0] != free[0]


def test_ends_wait_for_the_least_length(model):
    free = generate(model, [1, 2, 3], max_new_tokens=12)
    end = free[3]
    options = dict(stop_ids=[end], max_new_tokens=12)
    assert generate(model, [1, 2, 3], **options) == free[: free.index(end)]
    longer = generate(model, [1, 2, 3], min_new_tokens=8, **options)
    assert len(longer) >= 8 and end not in longer


def test_logprobs_are_the_models(model):
    engine = Engine(model, max_batch=2)
    got = engine.generate([5, 6, 7], logprobs=4, temperature=1.0, seed=3, max_new_tokens=6)
    ids = torch.tensor([[5, 6, 7, *got.token_ids]])
    with torch.no_grad():
        expected = model(ids).logits[0, 2:-1].log_softmax(-1)
    for row, entry in zip(expected, got.logprobs, strict=True):
        assert abs(row[entry.token] - entry.logprob) < 1e-4
        top = row.topk(4)
        assert [token for token, _ in entry.top] == top.indices.tolist()
        assert torch.allclose(torch.tensor([p for _, p in entry.top]), top.values, atol=1e-4)


def test_repetition_penalty_equals_transformers():
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(6))
    prompts, replies = [[1, 2, 2, 29], [7, 8, 9, 9]], [[2], [5]]
    ids = torch.tensor([[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)])
    for penalty in (1.3, 0.8):
        processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
        got = edited(logits, Sampling(repetition_penalty=penalty), prompts, replies)
        assert torch.equal(got, processor(ids, logits.clone()))


def test_frequency_and_presence_count_the_reply_only():
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=0.25)
    got = edited(torch.zeros(1, 4), sampling, [[0, 1]], [[1, 2, 2]])
    assert got.tolist() == [[0.0, -0.75, -1.25, 0.0]]


def test_penalties_act_on_greedy_and_per_row(model):
    prompts = [[5, 5, 5], [9, 8, 7, 6, 5]]
    options = dict(frequency_penalty=50.0, max_new_tokens=30)
    batch = generate(model, prompts, **options)
    for prompt, reply in zip(prompts, batch, strict=True):
        assert len(set(reply)) == 30, "a token said once costs more than any other"
        assert reply == generate(model, prompt, **options)


def test_penalized_rows_stay_apart_when_one_ends(model):
    prompts = [[1, 2, 3], [9, 8, 7, 6, 5]]
    options = dict(repetition_penalty=1.7, presence_penalty=0.5, max_new_tokens=20)
    alone = [generate(model, prompt, **options) for prompt in prompts]
    eos = next(token for token in alone[0][1:] if token not in alone[1])
    got = generate(tiny(eos_token_id=eos), prompts, **options)
    assert got == [until(alone[0], eos), alone[1]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_are_an_error(bad):
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    for temperature in (0.0, 1.0):
        assert sample(logits, Sampling(temperature=temperature))[1] == NOT_FINITE
    model = tiny()
    model.lm_head.weight.data[3] = bad
    with pytest.raises(FloatingPointError, match="logits at position 2: expected finite"):
        generate(model, [1, 2])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"temperature": -0.1}, r"temperature: expected in \[0, 1e\+30\], got -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": 1e31}, "temperature"),
        ({"top_k": -1}, "top_k: expected an integer >= 0"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0.0}, r"top_p: expected in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty: expected in \[0.01, 100.0\]"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty"),
        ({"repetition_penalty": 101.0}, "repetition_penalty"),
        ({"frequency_penalty": math.inf}, r"frequency_penalty: expected in \[-1e\+30, 1e\+30\]"),
        ({"frequency_penalty": -1e38}, "frequency_penalty"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"seed": 1.0}, "seed"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected an integer >= 1, got 0"),
        ({"stop": ["a", ""]}, "stop: expected non-empty strings"),
        ({"stop": [3]}, "stop"),
        ({"stop_ids": [-1]}, "stop_ids"),
        ({"logit_bias": {3: math.nan}}, r"logit_bias: expected in \[-1e\+30, 1e\+30\]"),
        ({"logprobs": 21}, "logprobs: expected <= 20, got 21"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_sampling_names_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


def test_sampling_cannot_become_bad():
    with pytest.raises(FrozenInstanceError):
        Sampling().top_p = 2.0
    assert Sampling(stop="x").stop == ("x",)


# --- text ------------------------------------------------------------------------------------


def cut_at_stop(text: str, stops: list[str]) -> str:
    """The definition: the first position at which some stop string ends, longest one first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


TEXTS = st.text(alphabet="ab\n é漢🙂", max_size=30)
STOPS = st.lists(st.text(alphabet="ab\n é🙂", min_size=1, max_size=4), max_size=3)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, stops=STOPS, cuts=st.lists(st.integers(0, 30), max_size=6))
def test_stop_strings_do_not_depend_on_the_pieces(text, stops, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    matcher = StopStrings(stops)
    given_out = ""
    for start, end in zip(edges, edges[1:], strict=False):
        given_out += matcher.push(text[start:end])
        assert text.startswith(given_out)
    assert given_out + matcher.flush() == cut_at_stop(text, stops)


def test_held_back_text_is_only_what_may_stop():
    matcher = StopStrings(["###", "\n\nUser"])
    assert matcher.push("one #") == "one "
    assert matcher.push("# two\n") == "## two"
    assert matcher.push("\nUs") == ""
    assert matcher.push("ing") == "\n\nUsing"
    assert matcher.push("a###b") == "a"
    assert matcher.push("more") == "" and matcher.flush() == ""


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1, max_size=12), stops=STOPS)
def test_stream_is_the_text_of_its_tokens(byte_tokenizer, text, stops):
    pieces = list(stream(scripted_text(text, byte_tokenizer), [1], stop=stops))
    whole = byte_tokenizer.decode(list(text.encode()))
    assert "".join(pieces) == cut_at_stop(whole, stops)
    for piece in pieces:
        assert piece and "\ufffd" not in piece.replace("\ufffd" if "\ufffd" in text else "", "")


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 255), min_size=1, max_size=16))
def test_stream_of_random_bytes_equals_the_full_decode(byte_tokenizer, tokens):
    model = Scripted(tokens, byte_tokenizer)
    assert "".join(stream(model, [1])) == byte_tokenizer.decode(tokens)


def test_incomplete_characters_are_held_back(byte_tokenizer):
    pieces = stream(scripted_text("a🙂é", byte_tokenizer), [1])
    assert list(pieces) == ["a", "🙂", "é"]
    cut = stream(scripted_text("a🙂", byte_tokenizer), [1], max_new_tokens=3)
    assert "".join(cut) == byte_tokenizer.decode([97, 0xF0, 0x9F])
    assert cut.finish_reason == "length"


def test_stop_string_drops_its_tokens(byte_tokenizer):
    text = "hello 🙂 END more"
    model = scripted_text(text, byte_tokenizer)
    tokens = generate(model, [1], stop=["END", "never"])
    assert byte_tokenizer.decode(tokens) == "hello 🙂 "
    assert model.forwards == len("hello 🙂 END".encode()), "nothing is computed past the stop"
    pieces = stream(scripted_text(text, byte_tokenizer), [1], stop="END")
    assert "".join(pieces) == "hello 🙂 "
    assert pieces.finish_reason == "stop" and pieces.token_ids == tokens
    assert pieces.usage["completion_tokens"] == len(tokens)


def test_stop_string_that_the_end_completes_not(byte_tokenizer):
    pieces = stream(scripted_text("so EN", byte_tokenizer), [1], stop="END")
    assert "".join(pieces) == "so EN" and pieces.finish_reason == "stop"


def test_stop_string_at_the_first_token(byte_tokenizer):
    pieces = stream(scripted_text("\nrest", byte_tokenizer), [1], stop="\n")
    assert list(pieces) == [] and pieces.token_ids == [] and pieces.finish_reason == "stop"


def test_special_tokens_are_not_text(byte_tokenizer):
    model = Scripted([72, BOS, 105], byte_tokenizer)
    pieces = stream(model, [1])
    assert "".join(pieces) == "Hi" and pieces.token_ids == [72, BOS, 105]


@pytest.mark.gpu
def test_gpu_generates_what_the_cpu_does():
    model = tiny()
    prompts = [[4, 8, 15, 16], [99]]
    options = dict(temperature=1.0, seed=3, top_k=40, repetition_penalty=1.1, max_new_tokens=16)
    expected = [generate(model, prompts, **options), generate(model, prompts, max_new_tokens=16)]
    model.cuda()
    got = [generate(model, prompts, **options), generate(model, prompts, max_new_tokens=16)]
    assert got == expected


@pytest.mark.parametrize("prompts", [[[5, 6, 7]], [[5, 6, 7], [8]]])
def test_the_head_reads_rows(prompts):
    """For a strided third dimension torch would copy the head's frozen matrix."""
    model, shapes = tiny(), []
    model.lm_head.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    generate(model, prompts, max_new_tokens=2)
    assert shapes == [(1, 32)] * len(prompts) + [(len(prompts), 32)]
