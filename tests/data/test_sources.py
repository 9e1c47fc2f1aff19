"""Several data sets: patterns of files, formats by source, and draws by weight."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irqlora_jax.config import parse_config, read_stored_config
from irqlora_jax.data import Batches, load_examples
from irqlora_jax.data.config import DataConfig, DataSource
from irqlora_jax.data.order import Part, WeightedDraws, block_order
from irqlora_jax.data.sources import load_data_sets
from tests.data.small_data import ROWS, WORDS, config, make_tokenizer, write_file
from tests.data.test_batches import drawn, some_examples


def rows_of(count, seed=0):
    rng = np.random.default_rng(seed)
    words = lambda most: " ".join(rng.choice(WORDS, rng.integers(1, most)))  # noqa: E731
    return [{"input": words(8), "output": words(4)} for _ in range(count)]


def load_all(data, seed=0):
    return load_data_sets(data, make_tokenizer(), 64, seed)


def same(one, other):
    return [e.tokens.tolist() for e in one] == [e.tokens.tolist() for e in other]


def test_a_pattern_is_its_files_in_the_order_of_their_names(tmp_path):
    rows = rows_of(5)
    write_file(tmp_path, "b.jsonl", rows[3:])
    write_file(tmp_path, "a.jsonl", rows[:3])
    write_file(tmp_path, "c.json", ROWS)
    tokenizer = make_tokenizer()
    found = load_examples(str(tmp_path / "*.jsonl"), config(), tokenizer)
    assert same(found, load_examples(write_file(tmp_path, "d.json", rows), config(), tokenizer))
    limited = load_examples(str(tmp_path / "[ab].jsonl"), config(max_examples=4), tokenizer)
    assert same(limited, found[:4])


def test_a_pattern_of_texts_is_read_as_documents(tmp_path):
    for name in ("a.txt", "b.txt"):
        write_file(tmp_path, name, "red green blue dark")
    found = load_examples(str(tmp_path / "*.txt"), config("text"), make_tokenizer())
    assert sum(len(e.tokens) for e in found) == 2 * 6  # with bos and eos


def test_a_file_with_the_signs_of_a_pattern_in_its_name_is_that_file(tmp_path):
    path = write_file(tmp_path, "a[1].jsonl", ROWS)
    write_file(tmp_path, "a1.jsonl", rows_of(7))
    assert len(load_examples(path, config(), make_tokenizer())) == 2


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x*.jsonl", r"x\*.jsonl: no file fits this pattern"),
        ("*", r"a.bin: expected a file \(.json"),
        ("", r"is a folder: .*/\*.jsonl names the files in it"),
    ],
)
def test_bad_patterns_are_refused(tmp_path, pattern, message):
    (tmp_path / "a.bin").write_text("")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_examples(str(tmp_path / pattern) if pattern else str(tmp_path), config(), None)


def test_sources_have_their_own_format_and_limit(tmp_path):
    pairs = write_file(tmp_path, "pairs.jsonl", rows_of(5))
    talks = write_file(tmp_path, "talks.jsonl", [{"chosen": "red green"}, {"chosen": "blue dark"}])
    data = config(
        train=(DataSource(pairs, max_examples=3), DataSource(talks, format="hh_rlhf")),
        eval=(DataSource(pairs), DataSource(talks, format="hh_rlhf", max_examples=1)),
    )
    train, evaluation, parts = load_all(data)
    one = load_examples(pairs, config(), make_tokenizer())
    other = load_examples(talks, config("hh_rlhf"), make_tokenizer())
    assert same(train, [*one[:3], *other]) and same(evaluation, [*one, *other[:1]])
    assert parts == (Part(3), Part(2))
    assert data.formats == ("input_output", "hh_rlhf")


def test_held_out_examples_come_from_all_sources_and_leave_their_sizes(tmp_path):
    colors = {"red": 20, "blue": 40}
    files = [
        write_file(tmp_path, f"{color}.jsonl", [{"input": "what is", "output": color}] * count)
        for color, count in colors.items()
    ]
    sources = tuple(DataSource(file, 1.0) for file in files)
    train, evaluation, parts = load_all(config(train=sources, eval_fraction=0.5))
    assert len(evaluation) == 30 and sum(part.count for part in parts) == len(train) == 30
    answers = make_tokenizer().batch_decode([e.tokens[-2:-1] for e in train])
    assert answers == ["red"] * parts[0].count + ["blue"] * parts[1].count
    assert parts[0].count not in (0, 20)


def test_an_empty_list_for_the_evaluation_is_none(tmp_path):
    data = config(train=write_file(tmp_path, "a.jsonl", rows_of(10)), eval=(), eval_fraction=0.3)
    assert len(load_all(data)[1]) == 3


def test_a_source_that_is_all_held_out_is_refused(tmp_path):
    files = [write_file(tmp_path, f"{n}.jsonl", rows_of(n)) for n in (1, 40)]
    sources = tuple(DataSource(file, 1.0) for file in files)
    with pytest.raises(ValueError, match=r"data.train\[0\].path = .*leaves none of its examples"):
        for seed in range(20):
            load_all(config(train=sources, eval_fraction=0.5), seed)


def test_no_data_is_refused():
    for nothing in ("", ()):
        with pytest.raises(ValueError, match=r"data.train = .*: expected a file or the id"):
            load_all(config(train=nothing))


# ------------------------------------------------------------------------------------------ draws


parts_lists = st.lists(
    st.tuples(st.integers(1, 30), st.floats(0.1, 5)).map(lambda pair: Part(*pair)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=15, deadline=None)
@given(parts=parts_lists, batch_size=st.integers(1, 9), seed=st.integers(0, 3))
def test_weighted_sources_go_through_their_own_epochs(parts, batch_size, seed):
    total = sum(part.count for part in parts)
    examples = some_examples([2] * total)
    make = lambda: Batches(examples, batch_size, seed, parts=parts)  # noqa: E731
    order = drawn(make(), 40)
    ends = np.cumsum([part.count for part in parts])
    for end, part in zip(ends, parts, strict=True):
        own = [index for index in order if end - part.count <= index < end]
        for first in range(0, len(own) - part.count + 1, part.count):
            epoch = own[first : first + part.count]
            assert sorted(epoch) == list(range(end - part.count, end))
    # Resumed anywhere, in any order of the steps.
    resumed = make()
    for step in (33, 7, 7):
        assert resumed.indices(step) == order[step * batch_size : (step + 1) * batch_size]


def test_sources_come_by_their_weights_and_differ_between_seeds():
    weights = [1.0, 3.0, 0.5]
    draws = {seed: WeightedDraws(weights, seed) for seed in (0, 1)}
    sources = {seed: [s for s, _ in d.places(0, 20_000)] for seed, d in draws.items()}
    shares = np.bincount(sources[0]) / 20_000
    wanted = np.array(weights) / sum(weights)
    noise = np.sqrt(wanted * (1 - wanted) / 20_000)
    assert (abs(shares - wanted) < 4 * noise).all()
    assert sources[0] != sources[1]
    # Any window of the stream, across the blocks.
    places = draws[0].places(0, 20_000)
    again = WeightedDraws(weights, 0)
    for first, count in ((9000, 17), (4090, 12), (0, 3), (12_287, 2)):
        assert again.places(first, count) == places[first : first + count]
    for source in range(3):
        own = [number for s, number in places if s == source]
        assert own == list(range(len(own)))


def test_without_weights_several_sources_are_one_set():
    examples = some_examples([2] * 12)
    plain = Batches(examples, 5, 3)
    assert drawn(plain, 9) == drawn(Batches(examples, 5, 3, parts=[Part(4), Part(8)]), 9)
    assert plain.rows == 12


def test_weighted_packed_rows_hold_one_source():
    examples = some_examples([5] * 8 + [3] * 16)
    parts = [Part(8, 1.0), Part(16, 1.0)]
    batches = Batches(examples, 4, 0, packing_length=10, parts=parts)
    assert batches.rows == 4 + 6  # 2 of 5 and 3 of 3 tokens in each
    seen = set()
    for step in range(20):
        for row in batches[step]["tokens"]:
            sources = {int(token) > 8 for token in row if token}
            assert len(sources) == 1
            seen |= sources
    assert seen == {True, False}


@settings(max_examples=40, deadline=None)
@given(blocks=st.lists(st.integers(1, 20_000), min_size=1, max_size=8), seed=st.integers(0, 9))
def test_blocks_are_read_one_pool_after_the_other(blocks, seed):
    order = block_order(blocks, seed, 0)
    assert (np.sort(order) == np.arange(sum(blocks))).all()
    block = np.searchsorted(np.cumsum(blocks), order, side="right")
    # A block is used within one stretch of the order, shorter than two pools.
    for one in range(len(blocks)):
        places = np.flatnonzero(block == one)
        assert np.ptp(places) < max(2 * 16_384, 16_384 + max(blocks))


# ---------------------------------------------------------------------------------- configuration

ENTRIES = "[{path: a.jsonl, weight: 2}, {path: 'b/*.parquet', weight: 0.5, format: chat}]"


def parsed(value):
    return parse_config(["--model=m", "--output_dir=o", "--data.train", value]).data


def test_flags_files_and_stored_configurations_hold_the_same_sources(tmp_path):
    wanted = (DataSource("a.jsonl", 2.0), DataSource("b/*.parquet", 0.5, "chat"))
    assert parsed(ENTRIES).train == wanted and parsed(ENTRIES).weights == (2.0, 0.5)
    (tmp_path / "run.yaml").write_text(f"model: m\noutput_dir: o\ndata:\n  train: {ENTRIES}\n")
    found = parse_config(["--config", str(tmp_path / "run.yaml")])
    assert found.data.train == wanted
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(found)))
    assert read_stored_config(tmp_path / "config.json") == found


def test_text_and_lists_of_text_stay_short():
    assert parsed("a.jsonl").train == "a.jsonl" and parsed("[ab]*.jsonl").train == "[ab]*.jsonl"
    assert parsed("[a, b]").train == (DataSource("a"), DataSource("b"))
    assert parsed("{path: a}").sources == (DataSource("a"),) == parsed("a").sources


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{path: a, weight: -1}]", r"data.train\[0\].weight = -1.0: expected a positive"),
        ("[{path: a, weight: .inf}]", r"data.train\[0\].weight = inf: expected a positive"),
        ("[{path: a, weight: 1}, b]", r"data.train\[1\].weight = None: expected a positive number"),
        ("[{path: a, wieght: 1}]", r"data.train\[0\].wieght: unknown field; did you mean"),
        ("[{weight: 1}]", r"data.train\[0\].path: no value"),
        ("[{path: a", r"data.train = '\[\{path: a': expected a list such as \[\{path"),
        ("[5]", r"data.train\[0\] = 5: expected a section with path"),
        ("[{path: a, format: x}]", r"data.train\[0\].format = 'x': expected alpaca"),
        ("[{path: a, max_examples: 0}]", r"data.train\[0\].max_examples = 0: expected a whole"),
        ("[a, '']", r"data.train\[1\].path = '': expected a file"),
    ],
)
def test_bad_sources_are_refused(value, message):
    with pytest.raises(ValueError, match=message) as error:
        parsed(value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval": (DataSource("a", 1.0),)}, r"data.eval\[0\].weight = 1.0: expected null"),
        (
            {"train": (DataSource("a", 1.0),), "group_by_length": True},
            "data.group_by_length = True: expected false with weights",
        ),
        (
            {"packing": True, "group_by_length": True, "streaming": True},
            "data.group_by_length = True: expected false with data.packing true",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)
