"""Streamed examples are those in memory, read when they are used."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from irqlora_jax.data import Batches, load_examples, make_batches
from irqlora_jax.data.batches import pad
from irqlora_jax.data.chat import read_conversations
from irqlora_jax.data.config import DataSource
from irqlora_jax.data.order import Part
from irqlora_jax.data.packing import pad_packed
from irqlora_jax.data.row_files import JsonlFile, read_group
from irqlora_jax.data.sources import load_data_sets
from tests.data.small_data import WORDS, config, make_tokenizer, write_file
from tests.data.test_sources import rows_of, same


def write_parquet(path: Path, rows: list[dict], group: int) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return str(path)


def write(folder: Path, kind: str, rows: list[dict]) -> str:
    """Writes two files, and returns their pattern."""
    cut = len(rows) // 3
    for name, part in (("a", rows[:cut]), ("b", rows[cut:])):
        if kind == "jsonl":
            # Blank lines, and an end of line of Windows.
            lines = [
                json.dumps(row) + ("\r\n \n" if i % 7 == 2 else "\n") for i, row in enumerate(part)
            ]
            (folder / f"{name}.jsonl").write_bytes("\ufeff\n".encode() + "".join(lines).encode())
        else:
            write_parquet(folder / f"{name}.parquet", part, 13)
    return str(folder / f"*.{kind}")


def load(source, tokenizer=None, **settings):
    data = config(train=source, **settings)
    return load_data_sets(data, tokenizer or make_tokenizer(), 64, seed=0)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("fields", [{}, {"max_examples": 50}, {"eval_fraction": 0.3}])
def test_streamed_examples_are_those_in_memory(tmp_path, kind, fields):
    source = write(tmp_path, kind, rows_of(100))
    kept, streamed = load(source, **fields), load(source, streaming=True, **fields)
    assert len(streamed.train) == len(kept.train)
    assert same(streamed.train, kept.train) and same(streamed.evaluation, kept.evaluation)
    assert streamed.train.lengths().tolist() == [len(example.tokens) for example in kept.train]
    (part,) = streamed.parts
    assert part.count == len(kept.train)
    assert part.blocks is None if kind == "jsonl" else sum(part.blocks) == part.count
    for one, other in zip(streamed.train, kept.train, strict=True):
        assert (one.targets == other.targets).all()


@pytest.mark.parametrize("tokenizer", ["byte", "piece"])
def test_the_space_at_the_seam_is_decided_as_in_memory(tmp_path, tokenizer):
    # The first rows do not show what the tokenizer does; in memory, a later one decides for all.
    rows = [{"input": "the cat\n", "output": "sat"}] * 5 + [{"input": "the", "output": "cat"}] * 5
    source = write_file(tmp_path, "a.jsonl", rows)
    made = make_tokenizer(tokenizer)
    assert same(load(source, made, streaming=True).train, load(source, made).train)


@pytest.mark.parametrize("format", ["chat", "hh_rlhf", "alpaca"])
def test_every_format_of_rows_can_be_streamed(tmp_path, format):
    talk = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    row = {"messages": talk, "chosen": "red green", "instruction": "red", "output": "blue"}
    source = write_file(tmp_path, "a.jsonl", [row] * 3)
    tokenizer = make_tokenizer("byte")
    fields = {"format": format, "chat_template": "chatml", "source_length": 512}
    streamed = load(source, tokenizer, streaming=True, **fields)
    assert same(streamed.train, load(source, tokenizer, **fields).train)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_streamed_batches_are_a_function_of_the_step(tmp_path, kind):
    source = write(tmp_path, kind, rows_of(60))
    kept = load(source)
    streamed = load(source, streaming=True)
    make = lambda: make_batches(streamed.train, config(streaming=True), 8, 1, 64, streamed.parts)  # noqa: E731
    batches = make()
    order = [index for step in range(15) for index in batches.indices(step)]
    assert sorted(order[:60]) == sorted(order[60:]) == list(range(60))
    assert order[:60] != order[60:]
    # The batches of the same order in memory; for .jsonl, this is the default order.
    parts = None if kind == "jsonl" else streamed.parts
    wanted = Batches(kept.train, 8, 1, multiple=64, parts=parts)
    again = make()
    for step in (11, 2, 2):
        assert again.indices(step) == batches.indices(step) == wanted.indices(step)
        for name, values in wanted[step].items():
            np.testing.assert_array_equal(again[step][name], values)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("fields", [{}, {"sequence_length": 100}, {"max_examples": 3}])
def test_windows_of_streamed_text_are_those_in_memory(tmp_path, kind, fields):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, count)) for count in rng.integers(1, 40, 50)]
    texts[3:6] = [" \n", "\nred\n", "  "]
    source = write(tmp_path, kind, [{"text": text} for text in texts])
    fields = {"format": "text", "sequence_length": 7} | fields
    kept, streamed = load(source, **fields), load(source, streaming=True, **fields)
    assert same(streamed.train, kept.train)
    for one, other in zip(streamed.train, kept.train, strict=True):
        assert (one.targets == other.targets).all()
    assert streamed.train.lengths().tolist() == [len(example.tokens) for example in kept.train]
    (part,) = streamed.parts
    assert kind == "jsonl" or sum(part.blocks or ()) == part.count == len(kept.train)


def test_streamed_text_without_windows_is_refused(tmp_path):
    source = write_file(tmp_path, "a.jsonl", [{"text": " "}, {"text": "\n"}])
    with pytest.raises(ValueError, match=r"a.jsonl has fewer than 2 tokens"):
        load(source, format="text", streaming=True)
    source = write_file(tmp_path, "a.jsonl", [{"txt": "red"}])
    with pytest.raises(ValueError, match="line 1 has no column 'text'"):
        load(source, format="text", streaming=True)


@pytest.mark.parametrize("name", ["packing", "group_by_length"])
def test_streams_are_packed_and_grouped_as_in_memory(tmp_path, name):
    source = write(tmp_path, "jsonl", rows_of(40))
    sets = {streaming: load(source, streaming=streaming) for streaming in (True, False)}
    batches = [
        make_batches(found.train, config(streaming=streaming, **{name: True}), 4, 0, 64)
        for streaming, found in sets.items()
    ]
    for step in (0, 5, 3):
        assert batches[0].indices(step) == batches[1].indices(step)
    other = write_parquet(tmp_path / "c.parquet", rows_of(5), 2)
    with pytest.raises(ValueError, match=rf"data.{name} = True: expected false for streamed .parq"):
        load(other, streaming=True, **{name: True})


def test_streams_are_drawn_by_weight(tmp_path):
    one = write_file(tmp_path, "one.jsonl", rows_of(5))
    other = write_parquet(tmp_path / "other.parquet", rows_of(9), 4)
    sources = (DataSource(one, 1.0), DataSource(other, 2.0, max_examples=7))
    train, _, parts = load(sources, streaming=True)
    assert parts == (Part(5, 1.0), Part(7, 2.0, (4, 3)))
    batches = make_batches(train, config(streaming=True, train=sources), 6, 0, 64, parts)
    order = [index for step in range(60) for index in batches.indices(step)]
    first = [index for index in order if index < 5]
    assert sorted(first[:5]) == sorted(first[5:10]) == list(range(5))
    assert 80 < len(first) < 160


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps(row) for row in rows_of(80)]
    path.write_text("\n".join(["", *rows[:70], " ", "", "{broken", *rows[70:]]))
    train = load(str(path), streaming=True).train  # the first rows are good
    with pytest.raises(ValueError, match=r"a.jsonl is not JSON: .* at line 74, column 2"):
        train[70]
    assert len(train[71].tokens) > 2


def test_a_bad_row_among_the_first_is_found_at_once(tmp_path):
    source = write_file(tmp_path, "a.jsonl", [*rows_of(3), {"input": "red"}])
    with pytest.raises(ValueError, match="line 4 has no column 'output'"):
        load(source, streaming=True)
    source = write_file(tmp_path, "a.jsonl", [{"message_id": "1", "text": "red"}])
    with pytest.raises(ValueError, match="line 1 is a message of a tree: expected whole"):
        load(source, streaming=True, format="oasst1")


def test_a_file_that_changes_is_refused(tmp_path):
    source = write_file(tmp_path, "a.jsonl", rows_of(3))
    train = load(source, streaming=True).train
    with open(source, "a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match=r"a.jsonl: changed during the run"):
        train[2]


def test_rows_without_a_target_stay_and_are_said_once(tmp_path, said):
    talk = lambda role: {"messages": [{"role": role, "content": "red"}]}  # noqa: E731
    source = write_file(tmp_path, "a.jsonl", [talk("assistant"), talk("user"), talk("user")])
    settings = {"format": "chat", "chat_template": "chatml", "streaming": True}
    train = load(source, make_tokenizer("byte"), **settings).train
    assert [bool(example.targets.any()) for example in train] == [True, False, False]
    assert len([line for line in said if "have no token to learn" in line]) == 1
    source = write_file(tmp_path, "a.jsonl", [talk("user")] * 3)
    with pytest.raises(ValueError, match="none of its first 3 rows has a token to learn"):
        load(source, make_tokenizer("byte"), **settings)


def test_rows_without_any_token_are_padding(tmp_path):
    template = tmp_path / "answers.jinja"
    answer = "{% if m.role == 'assistant' %}{{ m.content }}{% endif %}"
    template.write_text(f"{{% for m in messages %}}{answer}{{% endfor %}}")
    talk = lambda role: {"messages": [{"role": role, "content": "red blue"}]}  # noqa: E731
    source = write_file(tmp_path, "a.jsonl", [talk("assistant"), talk("user")])
    settings = {"format": "chat", "chat_template": str(template), "streaming": True}
    full, empty = load(source, make_tokenizer("byte"), **settings).train
    assert len(empty.tokens) == 0
    batch = pad([empty], 1, 8)
    assert batch["tokens"].shape == (1, 8) and not batch["targets"].any()
    size = len(full.tokens)
    packed = pad_packed([[full, empty, full, empty]], 2 * size)
    assert packed["segment_ids"].tolist() == [[1] * size + [2] * size]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a.json", r"a.json: .json; expected .jsonl or .parquet files with data.streaming true"),
        ("[ab].*", r".json and .jsonl; expected"),
        ("empty.jsonl", "has no rows"),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    write_file(tmp_path, "a.json", rows_of(2))
    write_file(tmp_path, "b.jsonl", rows_of(2))
    write_file(tmp_path, "empty.jsonl", "\n\n")
    with pytest.raises(ValueError, match=message):
        load(source, streaming=True)


def test_digests_tell_files_and_settings_apart(tmp_path):
    source = write_file(tmp_path, "a.jsonl", rows_of(5))
    digest = load(source, streaming=True).train.digest
    assert load(source, streaming=True).train.digest == digest
    others = [load(source, streaming=True, max_examples=3).train.digest]
    write_file(tmp_path, "a.jsonl", rows_of(5, seed=1))
    others.append(load(source, streaming=True).train.digest)
    assert len({digest, *others}) == 3


def test_the_memory_does_not_hold_the_file(tmp_path):
    rows = [row | {"rest": "x" * 5000} for row in rows_of(20)]
    source = write_file(tmp_path, "a.jsonl", rows * 50)
    load(source, streaming=True)  # imports and caches
    peaks = {}
    for streaming in (True, False):
        tokenizer = make_tokenizer()
        tracemalloc.start()
        sets = load(source, tokenizer, streaming=streaming)
        settings = config(streaming=streaming)
        batches = make_batches(sets.train, settings, 16, 0, 64, sets.parts)
        for step in range(20):
            batches[step]
        peaks[streaming] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    size = Path(source).stat().st_size
    assert size > 5e6
    assert peaks[True] < size / 10 and peaks[False] > size


def test_an_epoch_reads_every_row_group_of_parquet_once(tmp_path, monkeypatch):
    monkeypatch.setattr("irqlora_jax.data.order.POOL", 30)
    monkeypatch.setattr("irqlora_jax.data.row_files.POOL", 30)
    reads = []

    def read(path, group):
        reads.append(group)
        return read_group(path, group)

    monkeypatch.setattr("irqlora_jax.data.row_files.read_group", read)
    sets = load(write_parquet(tmp_path / "a.parquet", rows_of(240), 10), streaming=True)
    batches = make_batches(sets.train, config(streaming=True), 8, 0, 64, sets.parts)
    assert reads[:7] == list(range(7))  # the first 64 rows are checked
    before = len(reads)
    for step in range(30):
        batches[step]
    # Some of the first ones may still be there.
    assert set(reads) == set(range(24)) and len(reads) - before <= 24


def test_the_index_is_8_bytes_a_row(tmp_path):
    file = JsonlFile(Path(write_file(tmp_path, "a.jsonl", rows_of(1000))))
    assert file.count == 1000 and file._starts.nbytes == 8 * 1001


def test_rows_of_both_names_of_conversations_can_be_mixed(tmp_path):
    rows = [
        {"system": "Be kind.", "conversations": [{"from": "human", "value": "red"}]},
        {"conversations": [{"from": "system", "value": "x"}, {"from": "gpt", "value": "blue"}]},
        {"messages": [{"role": "user", "content": "red"}], "system": ""},
        {
            "conversations": [
                {"from": "chatgpt", "value": "a"},
                {"from": "observation", "value": "b"},
            ]
        },
    ]
    found = read_conversations(write_file(tmp_path, "a.jsonl", rows))
    roles = [[message["role"] for message in talk.messages] for talk in found]
    assert roles == [["system", "user"], ["system", "assistant"], ["user"], ["assistant", "tool"]]
    assert found[0].messages[0]["content"] == "Be kind."
    bad = write_file(tmp_path, "b.jsonl", [rows[0] | {"system": 5}])
    with pytest.raises(ValueError, match="line 1: system = 5: expected text"):
        read_conversations(bad)


def test_streaming_reads_what_load_examples_reads(tmp_path):
    source = write_file(tmp_path, "a.jsonl", rows_of(5))
    tokenizer = make_tokenizer()
    assert same(
        load(source, tokenizer, streaming=True).train, load_examples(source, config(), tokenizer)
    )
