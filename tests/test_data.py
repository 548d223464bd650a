"""Files, row formats, token ids and loss masks, batches and their order."""

from __future__ import annotations

import gzip
import json
import sys

import numpy as np
import pytest
import torch
from tiny import write_tokenizer

from halfbyte.data import (
    FORMATS,
    Batches,
    DataReport,
    EncodedRow,
    Encoder,
    Malformed,
    check_format,
    check_report,
    collate,
    data_fingerprint,
    detect_format,
    encode_rows,
    grouped_by_length,
    read_rows,
    split_rows,
)
from halfbyte.errors import DataError
from halfbyte.tokenizer import Tokenizer

BOS, EOS = 0, 1
ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "ü", "completion": "d"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_folder(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def encode(rows, tokenizer, format_name=None, **options):
    report = DataReport(format_name or detect_format(rows), format_name is None)
    return encode_rows(rows, Encoder(tokenizer, **options), report.format, report), report


# Files


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


WRITERS = {
    "rows.jsonl": as_jsonl,
    "rows.ndjson": lambda rows: as_jsonl(rows).replace("\n", "\n\n"),
    "rows.json": lambda rows: json.dumps(rows, indent=1),
    "lines.json": as_jsonl,
    "table.json": lambda rows: json.dumps({"data": rows}),
    "rows.csv": lambda rows: (
        "prompt,completion\r\n"
        + "".join(f'"{row["prompt"]}",{row["completion"]}\r\n' for row in rows)
    ),
    "rows.tsv": lambda rows: (
        "prompt\tcompletion\n" + "".join(f"{row['prompt']}\t{row['completion']}\n" for row in rows)
    ),
}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", WRITERS)
def test_read_rows(tmp_path, name, zipped):
    content = WRITERS[name](ROWS).encode()
    path = tmp_path / (name + ".gz" if zipped else name)
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert read_rows(path) == ROWS


def test_byte_order_mark_and_quoted_newlines(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,completion\n"two\nlines","a, ""b"""\n')
    assert read_rows(path) == [{"prompt": "two\nlines", "completion": 'a, "b"'}]


def test_long_csv_field(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read_rows(path)[0]["text"]) == 200_000


def test_line_that_is_no_json_is_one_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n{"text": "b"}\n')
    first, bad, last = read_rows(path)
    assert (first, last) == ({"text": "a"}, {"text": "b"})
    assert isinstance(bad, Malformed)
    assert bad.reason == "line 2 is not JSON (Expecting value at column 9)"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("1" * 5000, "line 2 holds a number of too many digits"),
        ("[" * 100_000, "line 2 is nested too deeply"),
    ],
    ids=["digits", "depth"],
)
def test_line_that_json_gives_up_on_is_one_bad_row(tmp_path, value, reason):
    for name in ("rows.jsonl", "rows.json"):
        path = tmp_path / name
        path.write_text('{"text": "a"}\n{"text": ' + value + '}\n{"text": "b"}\n')
        first, bad, last = read_rows(path)
        assert (first, bad.reason, last) == ({"text": "a"}, reason, {"text": "b"})


def test_gzip_with_a_damaged_byte_anywhere(tmp_path):
    """Whatever zlib makes of it: an error that names the file, or other rows."""
    path, whole = tmp_path / "rows.jsonl.gz", gzip.compress(as_jsonl(ROWS * 200).encode())
    failed = 0
    for place in range(12, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            read_rows(path)
        except DataError as error:
            failed += str(path) in str(error)
    assert failed > 5


def test_json_file_whose_later_line_is_broken(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"text": "a"}\noops\n')
    assert [type(row) for row in read_rows(path)] == [dict, Malformed]


def test_table_row_with_too_many_cells(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\na,b,c\nd\n")
    too_many, too_few = read_rows(path)
    assert "line 2 has more cells" in too_many.reason
    assert too_few == {"prompt": "d"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.xlsx", b"", "unknown extension"),
        ("rows.parquet.gz", b"", "unknown extension"),
        ("rows.jsonl", b'{"text": "\xff"}', "not UTF-8"),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-12], "damaged"),
        ("rows.jsonl.gz", b"plain", "damaged"),
        ("rows.json", b"{", "not JSON"),
        ("rows.json", b'[{"text": %s}]' % (b"1" * 5000), "holds a number of too many digits"),
        ("rows.json", b"[" * 100_000, "is nested too deeply"),
        ("rows.json", b"3", "expected a list of objects"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_rows(path)
    assert str(path) in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.jsonl does not exist"):
        read_rows(tmp_path / "nothing.jsonl")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_rows(tmp_path)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    chat = [{"messages": [{"role": "user", "content": "hi"}], "n": 1}]
    parquet.write_table(pyarrow.Table.from_pylist(chat), path)
    assert read_rows(path) == chat
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged"):
        read_rows(path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"pip install 'halfbyte\[parquet\]'"):
        read_rows(path)


# Formats: name, row, expected (source, target) pairs, written out by hand

FORMAT_CASES = [
    (
        "alpaca",
        {"instruction": "Add {these}.", "input": "1 2", "output": "3"},
        [
            (
                "Below is an instruction that describes a task, paired with an input that provides"
                " further context. Write a response that appropriately completes the request."
                "\n\n### Instruction:\nAdd {these}.\n\n### Input:\n1 2\n\n### Response: ",
                "3",
            )
        ],
    ),
    (
        "alpaca",
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        [
            (
                "Below is an instruction that describes a task. Write a response that "
                "appropriately completes the request.\n\n### Instruction:\nSay hi.\n\n"
                "### Response: ",
                "hi",
            )
        ],
    ),
    (
        "alpaca-clean",
        {"instruction": "Say hi.", "output": "hi"},
        [
            (
                "Below is an instruction that describes a task. Write a response that "
                "appropriately completes the request.\n\n### Instruction:\nSay hi.\n\n"
                "### Response: ",
                "hi",
            )
        ],
    ),
    (
        "chip2",
        {"text": "<human>: Who are you?\n<bot>: A chip.\n<human>: Ok\n<bot>: Bye"},
        [("Who are you?", "A chip.\n<human>: Ok")],
    ),
    ("self-instruct", {"prompt": "p ", "completion": " c"}, [("p ", " c")]),
    (
        "hh-rlhf",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "x"},
        [("", "\n\nHuman: a\n\nAssistant: b")],
    ),
    (
        "oasst1",
        {"text": "### Human: a### Assistant: b"},
        [("", "### Human: a### Assistant: b")],
    ),
    ("guanaco", {"text": "### Human: a"}, [("", "### Human: a")]),
    ("longform", {"input": "i", "output": "o"}, [("i", "o")]),
    (
        "unnatural-instructions",
        {
            "instruction": "x",
            "instances": [
                {"instruction_with_input": "i1", "output": "o1", "input": "z"},
                {"instruction_with_input": "i2", "output": "o2"},
            ],
        },
        [("i1", "o1"), ("i2", "o2")],
    ),
    (
        "unnatural-instructions",
        {"instruction_with_input": "i", "output": "o"},
        [("i", "o")],
    ),
    ("flan", {"inputs": "i", "targets": "t", "task": "x"}, [("i", "t")]),
    ("flan", {"prompt": "i", "completion": "t .<|endoftext|>"}, [("i", "t .")]),
    ("input-output", {"input": "", "output": "o"}, [("", "o")]),
    ("prompt-completion", {"prompt": "p", "completion": "c"}, [("p", "c")]),
]


@pytest.mark.parametrize(("name", "row", "pairs"), FORMAT_CASES)
def test_templates(name, row, pairs):
    assert [(pair.source, pair.target) for pair in FORMATS[name](row)] == pairs


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [], "text": "x"}, "messages"),
        ({"instruction": "x", "input": "", "output": "y"}, "alpaca"),
        ({"prompt": "x", "completion": "y"}, "prompt-completion"),
        ({"input": "x", "output": "y"}, "input-output"),
        ({"inputs": "x", "targets": "y"}, "flan"),
        ({"chosen": "x", "rejected": "y"}, "hh-rlhf"),
        ({"instruction": "x", "instances": []}, "unnatural-instructions"),
        ({"instruction_with_input": "x", "output": "y"}, "unnatural-instructions"),
        ({"text": "x"}, "text"),
        ({"text": "<human>: a\n<bot>: b"}, "chip2"),
        ({"text": "### Human: a### Assistant: b"}, "oasst1"),
        ({"input_ids": [1]}, "tokenized"),
    ],
)
def test_detect_format(row, name):
    assert detect_format([Malformed("x"), row]) == name


def test_detect_format_says_what_it_saw():
    with pytest.raises(DataError, match=r"\['question', 'reply'\].*dataset_format"):
        detect_format([{"question": "x", "reply": "y"}])
    with pytest.raises(DataError, match="none of the first 1 rows is an object.*: got 'x'"):
        detect_format(["x"])
    with pytest.raises(DataError, match="none of the first 2 rows .*: line 1 is not JSON"):
        detect_format([Malformed("line 1 is not JSON"), "x"])
    with pytest.raises(DataError, match="none of the first 0 rows"):
        detect_format([])


PAIR, TURNS = {"prompt": "x", "completion": "y"}, {"messages": [{"role": "user"}]}


def test_detect_format_needs_whole_rows():
    """Columns of one row do not complete those of another, and few rows decide nothing."""
    for rows in ([{"instruction": "x"}, {"output": "y"}], [{"prompt": "x"}] * 15 + [PAIR]):
        with pytest.raises(DataError, match="cannot tell the row format.*dataset_format"):
            detect_format(rows)
    assert detect_format([PAIR] * 15 + [{"prompt": "x"}]) == "prompt-completion"


def test_mixed_formats_are_named():
    with pytest.raises(DataError, match="15 rows in prompt-completion, 1 rows in messages"):
        detect_format([PAIR] * 15 + [TURNS])
    with pytest.raises(DataError, match="mixed row formats.*1 rows in tokenized"):
        detect_format([{"text": "x", "input_ids": None}] * 3 + [{"input_ids": [1]}])


def test_unknown_formats():
    with pytest.raises(ValueError, match="never released"):
        check_format("vicuna")
    with pytest.raises(ValueError, match="unknown dataset_format 'alpacca'.*alpaca-clean"):
        check_format("alpacca")
    check_format("oasst1")


# Tokens and masks


def test_pair_is_tokenized_apart_with_bos_and_eos(tokenizer):
    (row,), _ = encode([{"input": "ab", "output": "cd"}], tokenizer)
    ab, cd = text_ids(tokenizer, "ab"), text_ids(tokenizer, "cd")
    assert row.ids.tolist() == [BOS, *ab, *cd, EOS]
    assert row.trained.tolist() == [False] * 3 + [True] * 3
    assert row.targets == 3


def test_train_on_source(tokenizer):
    (row,), _ = encode([{"input": "ab", "output": "cd"}], tokenizer, train_on_source=True)
    assert row.trained.all() and row.targets == 5


def test_empty_source_trains_on_everything_but_bos(tokenizer):
    (row,), _ = encode([{"text": "### Human: a"}], tokenizer, "oasst1")
    assert row.ids.tolist() == [BOS, *text_ids(tokenizer, "### Human: a"), EOS]
    assert row.trained.tolist() == [False] + [True] * 13


def test_source_and_target_are_cut_on_the_right(tokenizer):
    rows = [{"input": "abcd", "output": "efgh"}, {"input": "a", "output": "b"}]
    encoded, report = encode(rows, tokenizer, source_max_len=3, target_max_len=2)
    assert encoded[0].ids.tolist() == [BOS, *text_ids(tokenizer, "ab"), *text_ids(tokenizer, "ef")]
    assert encoded[1].ids.tolist()[-1] == EOS
    assert report.truncated == 1


def test_context_cuts_what_the_lengths_allow(tokenizer):
    (row,), report = encode([{"input": "abcd", "output": "efgh"}], tokenizer, context=6)
    assert row.ids.tolist() == [BOS, *text_ids(tokenizer, "abcde")]
    assert row.targets == 1 and report.truncated == 1


def test_empty_completion_still_learns_to_stop(tokenizer):
    (row,), _ = encode([{"prompt": "a", "completion": ""}], tokenizer)
    assert row.ids.tolist()[-1] == EOS and row.targets == 1


def test_text_trains_on_everything(tokenizer):
    (plain, marked), _ = encode([{"text": "ab"}, {"text": "<s>ab"}], tokenizer)
    assert plain.ids.tolist() == [BOS, *text_ids(tokenizer, "ab"), EOS]
    assert marked.ids.tolist() == plain.ids.tolist()
    assert plain.trained.all() and plain.targets == 3


def test_chat_trains_on_assistant_turns_only(tokenizer):
    turns = [
        ("system", "S"),
        ("user", "U"),
        ("assistant", "one"),
        ("user", "V"),
        ("assistant", "2"),
    ]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    (row,), _ = encode(rows, tokenizer)
    assert (
        tokenizer.decode(row.ids.tolist(), skip_special_tokens=False)
        == "<s>[system]S[user]U[assistant]one</s>[user]V[assistant]2</s>"
    )
    learnt = tokenizer.decode(row.ids[row.trained].tolist(), skip_special_tokens=False)
    assert learnt == "one</s>2</s>"
    (everything,), _ = encode(rows, tokenizer, train_on_source=True)
    assert everything.trained.all()


def test_tokenized_rows_need_no_tokenizer():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9]}]
    encoded, _ = encode(rows, None)
    assert [row.ids.tolist() for row in encoded] == [[5, 6, 7], [8, 9]]
    assert [row.trained.tolist() for row in encoded] == [[False, True, True], [True, True]]


def test_a_row_of_which_one_part_is_bad_is_left_out_whole(tokenizer):
    good, long = ({"instruction_with_input": text, "output": "b"} for text in ("a", "abcdefgh"))
    rows = [{"instances": [good, long]}, {"instances": [good, good]}]
    encoded, report = encode(rows, tokenizer, "unnatural-instructions", context=6)
    assert [row.number for row in encoded] == [2, 2]
    assert (report.kept, report.truncated, report.skipped.total()) == (2, 0, 1)


# Bad rows

USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("format_name", "row", "reason"),
    [
        ("alpaca", {"instruction": "x"}, "no field 'output'"),
        ("alpaca", {"instruction": None, "output": "x"}, "no field 'instruction'"),
        ("alpaca", {"instruction": "x", "input": 3, "output": "x"}, "'input' is int"),
        ("chip2", {"text": "<human>: a"}, "has no"),
        ("text", {"text": 3}, "'text' is int, expected text"),
        ("text", {"text": ""}, "the text is empty"),
        ("text", ["x"], "it is list, expected an object"),
        ("text", Malformed("line 3 is not JSON"), "line 3 is not JSON"),
        ("unnatural-instructions", {"instances": 3}, "'instances' is not a list"),
        ("unnatural-instructions", {"instances": []}, "'instances' is empty"),
        ("messages", {"messages": []}, "not a list of messages"),
        ("messages", {"messages": ["x"]}, "not an object with a role"),
        ("messages", {"messages": [USER]}, "no assistant message"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "by user is NoneType"),
        ("messages", {"messages": [{**ANSWER, "content": "\ud800"}]}, "no valid Unicode"),
        ("text", {"text": "\ud800"}, "field 'text' is no valid Unicode: surrogates not allowed"),
        ("tokenized", {"input_ids": [1, 2.5]}, "not a list of integers"),
        ("tokenized", {"input_ids": [1, 2], "labels": [1]}, "1 labels for 2 ids"),
        ("tokenized", {"input_ids": [1, 2], "labels": [1, 3]}, "neither its own id nor -100"),
        ("tokenized", {"input_ids": [], "labels": []}, "all labels are masked"),
        ("tokenized", {"input_ids": [4, 5], "labels": [4, -100]}, "all labels are masked"),
        ("tokenized", {"input_ids": [4, 258]}, "token id 258 is outside the model's 258 ids"),
        ("tokenized", {"input_ids": [4, -3]}, "token id -3 is outside"),
        ("tokenized", {"input_ids": [4, 2**40]}, "token id 1099511627776 is outside"),
        ("tokenized", {"input_ids": [4, -(2**70)]}, "token id -1180591620717411303424 is outside"),
    ],
)
def test_bad_rows_are_counted_with_their_reason(tokenizer, format_name, row, reason):
    good = {
        "alpaca": {"instruction": "x", "output": "y"},
        "chip2": {"text": "<human>: a\n<bot>: b"},
        "text": {"text": "x"},
        "unnatural-instructions": {"instruction_with_input": "x", "output": "y"},
        "messages": {"messages": [USER, ANSWER]},
        "tokenized": {"input_ids": [1, 2]},
    }[format_name]
    encoded, report = encode([good, row], tokenizer, format_name, vocab_size=258)
    assert [one.number for one in encoded] == [1]
    ((number, why),) = report.examples
    assert number == 2 and reason in why
    assert (report.read, report.kept, report.skipped.total()) == (2, 1, 1)
    assert f"skipped row 2: {why}" in "\n".join(report.lines())
    check_report(report, strict=False)
    with pytest.raises(DataError, match="every row must be usable"):
        check_report(report, strict=True)


def test_nothing_left_after_truncation(tokenizer):
    rows = [{"input": "abcdef", "output": "g"}]
    encoded, report = encode(rows, tokenizer, context=4)
    assert encoded == []
    assert report.examples == [
        (1, "no token of the first 4 that fit is trained on, all labels are masked")
    ]
    with pytest.raises(DataError, match="no usable row\n1 rows in format input-output"):
        check_report(report, strict=False)


def test_chat_template_that_refuses_a_row(tmp_path):
    template = "{% if messages|length > 2 %}{{ raise_exception('too many turns') }}{% endif %}x"
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path, template))
    _, report = encode([{"messages": [USER, ANSWER, USER, ANSWER]}], tokenizer)
    assert "too many turns" in report.examples[0][1]


def test_only_the_first_few_reasons_are_listed(tokenizer):
    _, report = encode([{"text": "ok"}] + [{"text": ""}] * 8, tokenizer)
    lines = report.lines()
    assert len(report.examples) == 5 and lines[-1] == "  and 3 more skipped rows"
    assert lines[0].startswith("9 rows in format text (detected from the columns): 1 sequences")


def test_what_rows_cannot_be_tokenized_with_at_all(tmp_path):
    bare = Tokenizer.from_folder(write_tokenizer(tmp_path, chat_template=None))
    with pytest.raises(DataError, match="no chat template"):
        encode([{"messages": [USER, ANSWER]}], bare)
    with pytest.raises(DataError, match="has no tokenizer"):
        encode([{"text": "a"}], None)


# Batches


def encoded_row(ids: list[int], masked: int = 0, number: int = 1) -> EncodedRow:
    trained = np.arange(len(ids)) >= masked
    return EncodedRow(np.asarray(ids, np.int32), trained, number)


def test_collate_pads_on_the_right():
    rows = [encoded_row([5, 6, 7], masked=1), encoded_row([8], masked=0), encoded_row([9, 9])]
    ids, labels = collate(rows, pad_id=9)
    assert ids.dtype == labels.dtype == torch.int64
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]]
    assert labels.tolist() == [[-100, 6, 7], [8, -100, -100], [9, 9, -100]]


def test_fingerprint_sees_ids_masks_and_row_borders():
    base = data_fingerprint([encoded_row([1, 2]), encoded_row([3])])
    assert base == data_fingerprint([encoded_row([1, 2]), encoded_row([3])])
    assert base != data_fingerprint([encoded_row([1]), encoded_row([2, 3])])
    assert base != data_fingerprint([encoded_row([1, 2], masked=1), encoded_row([3])])
    assert base != data_fingerprint([encoded_row([3]), encoded_row([1, 2])])


@pytest.mark.parametrize(("count", "batch"), [(1, 4), (7, 2), (1000, 4), (997, 16)])
def test_grouped_by_length_is_transformers_order(count, batch):
    pytest.importorskip("transformers", reason="needs transformers to compare with")
    from transformers.trainer_pt_utils import get_length_grouped_indices

    lengths = torch.randint(1, 99, (count,), generator=torch.Generator().manual_seed(3)).tolist()
    ours = grouped_by_length(lengths, batch, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    assert ours == get_length_grouped_indices(lengths, batch, generator=generator)


def test_grouping_puts_the_longest_first_and_sorts_mega_batches():
    lengths = list(range(1, 1001))
    order = grouped_by_length(lengths, 2, torch.Generator().manual_seed(0))
    assert sorted(order) == list(range(1000)) and order[0] == 999
    mega_batch = [lengths[row] for row in order[100:200]]
    assert mega_batch[1:] == sorted(mega_batch[1:], reverse=True)


def batches(count=23, per_device=2, accumulation=3, world=1, seed=0, group=True) -> Batches:
    lengths = tuple(1 + (7 * row) % 13 for row in range(count))
    return Batches(lengths, per_device, accumulation, world, seed, group)


@pytest.mark.parametrize("group", [False, True])
def test_an_epoch_visits_every_row_once(group):
    plan = batches(group=group)
    assert plan.rows_per_step == 6 and plan.steps_per_epoch == 4
    steps = [plan.rows(step) for step in range(8)]
    for epoch in (steps[:4], steps[4:]):
        assert [len(rows) for rows in epoch] == [6, 6, 6, 5]
        assert sorted(sum(epoch, [])) == list(range(23))
    assert steps[:4] != steps[4:]


def test_order_depends_on_the_seed_and_not_on_the_past():
    assert batches().rows(6) == batches().rows(6)
    assert batches(seed=1).rows(0) != batches().rows(0)


def test_micro_batches_split_the_step():
    plan = batches()
    assert sum(plan.micro_batches(0, 0), []) == plan.rows(0)
    assert [len(micro) for micro in plan.micro_batches(0, 0)] == [2, 2, 2]
    assert [len(micro) for micro in plan.micro_batches(3, 0)] == [2, 2, 1]


def test_ranks_share_the_micro_batches_of_one_process():
    two, one = batches(per_device=2, world=2), batches(per_device=4, world=1)
    for step in range(2 * one.steps_per_epoch):
        whole = one.micro_batches(step, 0)
        halves = [two.micro_batches(step, rank) for rank in (0, 1)]
        for number, micro in enumerate(whole):
            parts = [half[number] for half in halves if number < len(half)]
            assert sum(parts, []) == micro


def test_split_is_that_of_the_datasets_library():
    train, held_out = split_rows(10, 3)
    order = np.random.default_rng(42).permutation(10).tolist()
    assert (held_out, train) == (order[:3], order[3:])
    assert split_rows(4, 0) == ([0, 1, 2, 3], [])
    with pytest.raises(DataError, match="leaves none to train on"):
        split_rows(4, 4)


# Real data


@pytest.mark.parametrize(
    ("file", "format_name", "detected"),
    [
        ("alpaca/alpaca_15k.jsonl.gz", "alpaca", "alpaca"),
        ("oasst/guanaco_1k.jsonl.gz", "oasst1", "messages"),
        ("hh-rlhf/harmless_base_test.jsonl.gz", "hh-rlhf", "hh-rlhf"),
        ("flan-t0/t0_p3_6k.jsonl.gz", "flan", "prompt-completion"),
        ("dolly/dolly_3k.jsonl.gz", "alpaca", "alpaca"),
        ("oasst/oasst1_val_953.jsonl.gz", "input-output", "input-output"),
    ],
)
def test_real_rows(shared, tokenizer, file, format_name, detected):
    rows = read_rows(shared / "data" / file)[:300]
    assert detect_format(rows) == detected
    encoded, report = encode(rows, tokenizer, format_name)
    assert report.kept == len(rows) and not report.skipped
    assert all(1 <= row.targets <= 256 for row in encoded)
    if detected == "messages":
        _, chats = encode(rows, tokenizer, "messages", max_seq_len=100_000)
        assert chats.kept == len(rows) and chats.truncated == 0
