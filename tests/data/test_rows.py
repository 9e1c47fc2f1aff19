"""All kinds of files give the same rows; what cannot be read is named with its place."""

import functools
import json
import sys
import traceback

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from irqlora_jax.data import load_examples, read_rows
from irqlora_jax.data.chat import read_conversations
from irqlora_jax.data.formats import read_pairs
from irqlora_jax.data.rows import read_documents
from irqlora_jax.data.sources import load_data_sets
from tests.data.small_data import ROWS, config, make_tokenizer, write_file


@pytest.fixture
def write(tmp_path):
    return functools.partial(write_file, tmp_path)


def test_the_files_formats_agree(write):
    tokenizer = make_tokenizer()
    wrapped = json.dumps({"version": 1, "data": ROWS})
    blank_lines = "\n".join(json.dumps(row) + "\n" for row in ROWS)
    paths = [write("a.json", ROWS), write("b.json", wrapped), write("c.jsonl", blank_lines)]
    one, two, three = (load_examples(path, config(), tokenizer) for path in paths)
    for a, b, c in zip(one, two, three, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist() == c.tokens.tolist()
    assert len(load_examples(paths[0], config(max_examples=1), tokenizer)) == 1


def test_json_strings_may_hold_other_line_ends(write):
    row = json.dumps({"input": "the\u2028cat", "output": "sat"}, ensure_ascii=False)
    (example,) = load_examples(write("a.jsonl", row), config(), make_tokenizer("byte"))
    assert "the\u2028cat" in make_tokenizer("byte").decode(example.tokens)


def write_table(path, rows):
    """Rows of text as .csv, .tsv, .parquet or .jsonl, by other means than ours."""
    table = datasets.Dataset.from_list(rows)
    with path.open("wb") as file:
        if path.suffix == ".parquet":
            table.to_parquet(file)
        elif path.suffix == ".jsonl":
            table.to_json(file, lines=True)
        else:
            table.to_csv(file, sep="\t" if path.suffix == ".tsv" else ",")
    return str(path)


# pandas, which writes these tables, cannot quote a lone carriage return.
cell = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=12)
tables = st.lists(
    st.fixed_dictionaries({"input": cell.filter(bool), "out put": cell}), min_size=1, max_size=5
)


@settings(max_examples=25, deadline=None)
@given(rows=tables)
@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "jsonl"])
def test_any_text_survives_every_kind_of_file(tmp_path_factory, suffix, rows):
    path = tmp_path_factory.mktemp("tables") / f"a.{suffix}"
    found = read_rows(write_table(path, rows), ("input", "out put"))
    assert [row.columns for row in found] == rows


def test_places_in_a_csv_are_lines(write):
    path = write("a.csv", '\ufeffinput,output\r\n"a\n\nb",c\r\n\r\n"d ""e""",""\r\n')
    assert [tuple(row) for row in read_rows(path, ("input",))] == [
        (f"{path}, line 2", {"input": "a\n\nb", "output": "c"}),
        (f"{path}, line 6", {"input": 'd "e"', "output": ""}),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"text": "red"}]'),
        ("a.jsonl", '{"text": "red"}\n'),
        ("a.csv", "text\nred\n"),
        ("a.tsv", "text\tinput\nred\tblue\n"),
        ("a.txt", "red\n"),
    ],
)
def test_a_byte_order_mark_is_no_text(write, name, content):
    assert read_documents(write(name, "\ufeff" + content)) == ["red"]
    (inside,) = read_documents(write(name, content.replace("red", "r\ufeffd")))
    assert inside == "r\ufeffd"  # elsewhere it is a character


def test_long_documents_fit_into_a_csv(write):
    path = write("a.csv", f"text\n{'red ' * 100_000}\n")
    assert len(read_documents(path)[0]) == 400_000


def test_lists_of_messages_survive_parquet(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "hi", "name": None}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows(str(tmp_path / "a.parquet"), ("messages",))[0].columns == rows[0]


def test_folders_named_like_partitions_add_no_columns(tmp_path):
    folder = tmp_path / "split=train"
    folder.mkdir()
    (row,) = read_rows(write_table(folder / "a.parquet", [{"text": "red"}]), ("text",))
    assert row.columns == {"text": "red"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "not JSON: .* at line 1, column 1"),
        ("a.json", '[{"input": "a",\n"output" 3}]', "not JSON: .* at line 2, column 10"),
        ("a.jsonl", '{"input": "a", "output": "b"}\n{"input"}', "not JSON: .* at line 2, column 9"),
        ("a.json", "[" * 100_000, "not JSON of rows: nested too deep"),
        ("a.json", "[]", "has no rows"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.json", '{"rows": []}', "expected a list of objects"),
        (
            "a.json",
            '[{"input": "a", "output": "b"}, 3]',
            "row 2 is of type int: expected an obj",
        ),
        (
            "a.jsonl",
            '{"input": "a", "output": "b"}\n\n{"question": "a", "output": "b"}',
            "line 3 has no column 'input': its columns are question, output; expected are input, o",
        ),
        ("a.json", [{"input": "a", "output": 3}], "row 1: output = 3: expected text"),
        ("a.json", [{"input": None, "output": "a"}], "row 1: input = None: expected text"),
        ("a.xlsx", "input,output", "expected a file"),
        ("a.txt", "red", "a file of rows is .json, .jsonl, .csv, .tsv or .parquet"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "input,output\n", "has no rows"),
        ("a.csv", "input;output\na;b\n", "line 2 has no column 'input': its columns are input;o"),
        ("a.tsv", "input\toutput\na\n", "line 2 has 1 fields: the first line names 2 columns"),
        ("a.csv", 'input,output\na,b\nc,"d\n\n', "a.csv is not csv: .*, from line 3 to line"),
        ("a.csv", "input,output,input\na,b,c\n", "line 1 names the column 'input' twice"),
        (
            "a.jsonl",
            '{"input": "a", "output": "b"}\n\n{"input": "a", "output": "b", "output": "c"}',
            "a.jsonl, line 3 names the key 'output' twice",
        ),
        (
            "a.json",
            '[{"input": "a", "output": "b"},\n\n{"input": "a", "x": [{"y": 1, "y": 1}]}]',
            "a.json, row 2: x names the key 'y' twice",
        ),
        ("a.json", '{"data": [], "data": []}', "a.json names the key 'data' twice"),
        (
            "a.jsonl",
            '{"input": "a", "output": "b", "id": 1}\n{"input": "a", "x": [0, 1' + "0" * 9999 + "]}",
            r"a.jsonl, line 2: x = 10+\.\.\.: expected a number of at most 4300 digits",
        ),
        (
            "a.json",
            '[{"input": "a", "output": "b"}, {"id": {"x": -1' + "0" * 9999 + "}}]",
            r"a.json, row 2: x = -10+\.\.\.: expected a number of at most 4300 digits",
        ),
        ("a.parquet", "PAR1 red PAR1", "a.parquet is not a whole parquet file: "),
        ("a.parquet", "", "a.parquet is not a whole parquet file: "),
    ],
)
def test_bad_rows_are_refused(write, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        load_examples(write(name, content), config(), make_tokenizer())
    assert name in str(error.value) and "\n" not in str(error.value)


def test_two_columns_of_one_name_are_refused_in_parquet(tmp_path):
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["input", "output", "output"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet names the column 'output' twice"):
        load_examples(str(tmp_path / "a.parquet"), config(), make_tokenizer())


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.tsv"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_bytes_that_are_no_text_are_refused(tmp_path, name, mark):
    (tmp_path / name).write_bytes(mark + b"text\nred \xff\xfe")
    message = rf"{name}, line 2 is not UTF-8 text \(byte {len(mark) + 9}\)"
    with pytest.raises(ValueError, match=message):
        load_examples(str(tmp_path / name), config("text"), make_tokenizer())


def damaged_text(offsets, data):
    buffers = [None, pyarrow.py_buffer(np.array(offsets, np.int32)), pyarrow.py_buffer(data)]
    return pyarrow.Array.from_buffers(pyarrow.string(), len(offsets) - 1, buffers)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (damaged_text([0, 1, 3], b"ab\xff"), r"row 2: x is not UTF-8 text \(byte 1\)"),
        (pyarrow.array([0, 2**60], pyarrow.timestamp("ms")), "row 2: x cannot be read: "),
        (
            pyarrow.StructArray.from_arrays([pyarrow.array([1, 2])] * 2, names=["y", "y"]),
            "row 1: x cannot be read: .* duplicate field names",
        ),
    ],
)
def test_values_of_parquet_that_python_cannot_hold_are_refused(tmp_path, column, message):
    table = pyarrow.table({"text": ["red", "blue"], "x": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"a.parquet, {message}") as error:
        read_documents(str(tmp_path / "a.parquet"))
    assert "\n" not in str(error.value)


def test_damaged_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["red"] * 9}), path)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            read_documents(str(path))
        except ValueError as error:
            refused += 1
            assert "a.parquet" in str(error) and "\n" not in str(error)
    assert refused > 9


@pytest.mark.parametrize("format", ["alpaca", "flan_v2", "chip2", "hh_rlhf", "oasst1", "text"])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_conversations_in_another_format_are_recognized(write, format, column):
    path = write("a.jsonl", [{column: [{"role": "user", "content": "hi"}]}])
    with pytest.raises(ValueError, match=r"line 1 has no column .*looks like data.format = 'chat'"):
        load_examples(path, config(format), make_tokenizer())


@pytest.mark.parametrize("name", ["nothing.json", "/no/such/file", "a/b/c", "./x", "a b"])
def test_a_missing_file_is_not_looked_for_on_the_hub(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_examples(name, config(), make_tokenizer())


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 300 + ".jsonl"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_name_that_is_too_long_is_one_sentence(name, streaming):
    message = "^the data set 'xxx.* has a name that no file can have: expected a file"
    with pytest.raises(ValueError, match=message) as error:
        load_data_sets(config(train=name, streaming=streaming), make_tokenizer(), 64, seed=0)
    assert len(str(error.value)) < 450


def test_a_folder_and_an_empty_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder: expected a file"):
        load_examples(str(tmp_path), config(), make_tokenizer())
    with pytest.raises(ValueError, match="has no name"):
        load_examples("", config(), make_tokenizer())


@pytest.fixture
def hub(monkeypatch):
    """hub(load): `load` in place of `datasets.load_dataset`, and a hub that answers."""
    monkeypatch.setattr("irqlora_jax.data.hub.reaches_hub", lambda: True)
    return lambda load: monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("someone/some.data-set", (("someone/some.data-set",), "train")),
        ("someone/data:part", (("someone/data", "part"), "train")),
        ("someone/data:part:test", (("someone/data", "part"), "test")),
        ("data::test", (("data",), "test")),
    ],
)
def test_hub_data_is_read_from_the_split_train_or_a_named_one(hub, write, name, call):
    calls = []

    def load(*names, split):
        calls.append((names, split))
        return iter(ROWS)

    hub(load)
    tokenizer = make_tokenizer()
    examples = load_examples(name, config(), tokenizer)
    local = load_examples(write("a.json", ROWS), config(), tokenizer)
    assert [e.tokens.tolist() for e in examples] == [e.tokens.tolist() for e in local]
    assert calls == [call]


SECRET = "hf_notasecret"
GATED = "Dataset 'someone/data' is a gated dataset on the Hub. You must be authenticated."


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError(f"no\nnetwork for {SECRET}"),
            "the hub could not be reached; connect to the network",
        ),
        (OSError(f"401 {SECRET}"), r"the hub does not provide it \(OSError\); .*`hf auth login`"),
        (ValueError(f"Invalid header value b'Bearer {SECRET}'"), r"not provide it \(ValueError\)"),
        (RuntimeError("Dataset scripts are no longer supported"), "by a script, which is never"),
        (datasets.exceptions.DatasetNotFoundError(f"{GATED} {SECRET}"), "accept its terms .*`hf a"),
        (
            datasets.exceptions.DatasetNotFoundError(f"doesn't exist {SECRET}"),
            "the hub has no such data set, or it is private; check the name, or log in with `hf a",
        ),
        (
            ValueError("Unknown split \"train\". Should be one of ['validation']."),
            r"Should be one of \['validation'\]. Give ID:CONFIGURATION:SPLIT",
        ),
        (ValueError("Config name is missing.\nPick one: ['a', 'b']"), r"Pick one: \['a', 'b'\]"),
    ],
)
def test_a_failing_hub_is_one_sentence_without_secrets(hub, error, message):
    def load(name, split):
        raise error

    hub(load)
    with pytest.raises(FileNotFoundError, match=rf"^someone/data: there is no .*{message}") as info:
        load_examples("someone/data", config(), make_tokenizer())
    text = str(info.value)
    assert "\n" not in text and text.endswith("or give a local file")
    trace = "".join(traceback.format_exception(info.value))
    assert SECRET not in trace


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"prompt": "a", "completion": "b"}, "data.format = 'self_instruct'"),
        ({"inputs": "a", "targets": "b"}, "data.format = 'flan_v2'"),
        ({"chosen": "a", "rejected": "b"}, "data.format = 'hh_rlhf' or 'preference'"),
        ({"text": "a"}, "data.format = 'chip2' or 'oasst1' or 'text'"),
        ({"question": "a", "answer": "b"}, None),
    ],
)
def test_rows_of_another_format_are_recognized(write, row, hint):
    path = str(write("a.jsonl", [row]))
    for read in (lambda: read_pairs(path, "alpaca"), lambda: read_conversations(path)):
        with pytest.raises(ValueError, match="line 1 has no column") as error:
            read()
        assert ("looks like" in str(error.value)) == (hint is not None)
        assert hint is None or str(error.value).endswith(f"it looks like {hint}")


def test_without_a_network_only_the_cache_of_the_hub_is_read(hub, monkeypatch):
    """Whatever the cache lacks, the reason is the network."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    seen = []

    def load(name, split):
        seen.append(constants.is_offline_mode())
        raise FileNotFoundError("not cached")

    hub(load)
    monkeypatch.setattr("irqlora_jax.data.hub.reaches_hub", lambda: False)
    with pytest.raises(FileNotFoundError, match="the hub could not be reached; connect"):
        load_examples("someone/data", config(), make_tokenizer())
    assert seen == [True] and not constants.is_offline_mode()
