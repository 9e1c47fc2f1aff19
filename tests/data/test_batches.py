"""Every example comes once per epoch, in batches that are a function of the step alone."""

import contextlib
import threading
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.data import Batches, Example, eval_batches, hold_out, make_batches, prefetch
from irqlora_jax.data.config import DataConfig
from irqlora_jax.data.packing import pack, pad_packed
from irqlora_jax.model.llama import Llama, head_weight
from irqlora_jax.model.loss import cross_entropy
from tests.models import TINY, random_variables


def some_examples(lengths):
    """Examples that can be told apart: example i consists of tokens i + 1."""
    return [
        Example(np.full(length, index + 1, np.int32), np.arange(length) > 0)
        for index, length in enumerate(lengths)
    ]


def drawn(batches, steps):
    return [index for step in range(steps) for index in batches.indices(step)]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 25])
def test_each_example_comes_once_per_epoch(batch_size):
    batches = Batches(some_examples([2] * 7), batch_size, seed=0)
    order = drawn(batches, steps=7)
    for epoch in range(len(order) // 7):
        assert sorted(order[7 * epoch : 7 * epoch + 7]) == list(range(7))


def test_orders_differ_between_epochs_and_seeds_and_nothing_else():
    examples = some_examples([2] * 50)
    first, second = (drawn(Batches(examples, 50, seed), 2) for seed in (0, 1))
    assert first[:50] != first[50:] and first[:50] != second[:50]
    assert first == drawn(Batches(examples, 50, 0), 2)
    # Neighboring seeds must not share orders of other epochs.
    orders = Counter(tuple(o) for o in (first[:50], first[50:], second[:50], second[50:]))
    assert max(orders.values()) == 1
    # The batch size cuts the same stream.
    assert first == drawn(Batches(examples, 10, 0), 10)


def test_a_batch_depends_on_its_step_alone():
    examples = some_examples(range(2, 13))
    batches_by_step = Batches(examples, 4, seed=3)
    batches = [batch for batch, _ in zip(batches_by_step, range(9), strict=False)]
    behind = Batches(examples, 4, seed=3)
    for step in [8, 2, 2, 5, 0]:
        for name, values in behind[step].items():
            np.testing.assert_array_equal(values, batches[step][name])


def test_batches_are_padded_without_targets_to_a_multiple():
    lengths = [2, 9, 17, 30]
    batches = Batches(some_examples(lengths), 2, seed=0, multiple=8)
    seen = set()
    for step in range(20):
        batch = batches[step]
        assert batch["tokens"].dtype == np.int32 and batch["targets"].dtype == bool
        longest = max(lengths[index] for index in batches.indices(step))
        assert batch["tokens"].shape == batch["targets"].shape == (2, -(-longest // 8) * 8)
        seen.add(batch["tokens"].shape)
        for row, index in enumerate(batches.indices(step)):
            length = lengths[index]
            assert (batch["tokens"][row, :length] == index + 1).all()
            assert batch["targets"][row].sum() == length - 1
            assert not batch["targets"][row, length:].any()
    assert len(seen) <= 4


def test_eval_batches_hold_every_example_once_longest_first():
    lengths = [3, 30, 2, 17, 9]
    batches = list(eval_batches(some_examples(lengths), 2, multiple=8))
    assert [batch["tokens"].shape for batch in batches] == [(2, 32), (2, 16), (2, 8)]
    rows = [row for batch in batches for row in zip(batch["tokens"], batch["targets"], strict=True)]
    found = [(int(tokens[0]), int(targets.sum())) for tokens, targets in rows]
    assert found == [(2, 29), (4, 16), (5, 8), (1, 2), (3, 1), (0, 0)]


def test_held_out_examples_are_a_random_part():
    examples = some_examples([2] * 40)
    stay, held = hold_out(examples, 0.25, seed=0)
    names = [int(example.tokens[0]) for example in stay + held]
    assert len(held) == 10 and sorted(names) == list(range(1, 41))
    _, other = hold_out(examples, 0.25, seed=1)
    assert [e.tokens[0] for e in held] != [e.tokens[0] for e in other]
    assert len(hold_out(examples, 0.001, seed=0)[1]) == 1
    assert hold_out(examples, 0.0, seed=0) == (examples, [])
    with pytest.raises(ValueError, match="holds out 1 of 1 examples"):
        hold_out(examples[:1], 0.1, seed=0)


def test_bad_arguments_of_batches_are_refused():
    examples = some_examples([2])
    with pytest.raises(ValueError, match="there are no examples"):
        Batches([], 2, seed=0)
    with pytest.raises(ValueError, match="batch_size = 0"):
        Batches(examples, 0, seed=0)
    with pytest.raises(ValueError, match="multiple = 0"):
        Batches(examples, 1, seed=0, multiple=0)
    with pytest.raises(IndexError, match="step = -1"):
        Batches(examples, 1, seed=0)[-1]


lengths_lists = st.lists(st.integers(2, 30), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(lengths=lengths_lists, batch_size=st.integers(1, 9), seed=st.integers(0, 3))
@pytest.mark.parametrize("kind", ["random", "grouped", "packed"])
def test_every_kind_of_batch_is_a_function_of_the_step(kind, lengths, batch_size, seed):
    examples = some_examples(lengths)
    settings = DataConfig(
        source_length=16,
        target_length=16,
        group_by_length=kind == "grouped",
        packing=kind == "packed",
    )
    batches = make_batches(examples, settings, batch_size, seed)
    order = [index for step in range(30) for index in batches.indices(step)]
    if kind != "packed":  # an epoch of packed rows is as many batches, but not as many examples
        for start in range(0, len(order) - len(lengths) + 1, len(lengths)):
            assert sorted(order[start : start + len(lengths)]) == list(range(len(lengths)))
    again = make_batches(examples, settings, batch_size, seed)
    for step in (17, 3, 3):
        assert again.indices(step) == batches.indices(step)
        batch = again[step]
        assert batch.keys() == batches[step].keys()
        assert all((batch[name] == values).all() for name, values in batches[step].items())
        held = Counter(batch["tokens"][batch["targets"]].tolist())
        wanted = Counter()
        for index in batches.indices(step):
            wanted[index + 1] += lengths[index] - 1
        assert held == wanted


def test_grouping_by_length_pads_less_and_begins_with_the_longest():
    lengths = np.random.default_rng(0).integers(2, 500, 1000).tolist()
    examples = some_examples(lengths)

    def padding(batches):
        total = sum(batches[step]["tokens"].size for step in range(125))
        used = sum(lengths[i] for step in range(125) for i in batches.indices(step))
        return 1 - used / total

    grouped = Batches(examples, 8, seed=0, multiple=8, group_by_length=True)
    assert padding(grouped) < 0.05 < 0.3 < padding(Batches(examples, 8, seed=0, multiple=8))
    assert max(lengths) in [lengths[index] for index in grouped.indices(0)]
    # The other batches come in no order of their lengths, and another one in every epoch.
    longest = [max(lengths[i] for i in grouped.indices(step)) for step in range(1, 250)]
    steps = np.diff(longest)
    assert 0.4 < (steps > 0).mean() < 0.6
    companions = {frozenset(grouped.indices(step)) for step in range(250)}
    assert len(companions) > 240
    assert grouped.indices(0) != Batches(examples, 8, 1, 8, True).indices(0)


def test_epochs_that_end_within_a_batch_stay_grouped():
    # 103 examples, batches of 10: every epoch begins elsewhere in a batch.
    lengths = np.random.default_rng(0).integers(2, 500, 103).tolist()
    grouped = Batches(some_examples(lengths), 10, seed=0, group_by_length=True)
    spreads = [np.ptp([lengths[i] for i in grouped.indices(step)]) for step in range(103)]
    # One batch an epoch holds the end of it and the start of the next one.
    assert sum(spread > 150 for spread in spreads) <= 10


@settings(max_examples=100, deadline=None)
@given(lengths=lengths_lists, room=st.integers(30, 64), seed=st.integers(0, 3))
def test_packing_puts_every_example_into_one_row(lengths, room, seed):
    rows = pack(np.array(lengths), room, seed)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    used = [sum(lengths[index] for index in row) for row in rows]
    assert min(used) > 0 and max(used) <= room
    # No two rows fit into one: at most one is half empty.
    assert sum(2 * length <= room for length in used) <= 1
    assert rows == pack(np.array(lengths), room, seed)


def test_equal_lengths_are_packed_in_an_order_of_the_seed():
    lengths = np.full(40, 10)
    first, second = pack(lengths, 30, 0), pack(lengths, 30, 1)
    assert sorted(map(len, first)) == sorted(map(len, second)) == [1] + 13 * [3]
    assert first != second


def test_packed_rows_keep_their_examples_apart():
    examples = some_examples([3, 2, 4])
    examples[1].targets[:] = True
    batch = pad_packed([[examples[0], examples[1]], [examples[2]]], 6)
    assert batch["tokens"].tolist() == [[1, 1, 1, 2, 2, 0], [3, 3, 3, 3, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]]
    # Nothing of its own stands in front of the first token of an example.
    assert batch["targets"].astype(int).tolist() == [[0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 0, 0]]
    assert [str(values.dtype) for values in batch.values()] == ["int32", "bool", "int32"]


def test_packed_batches_have_one_shape_and_each_example_once_per_epoch():
    lengths = np.random.default_rng(0).integers(2, 60, 200)
    batches = make_batches(some_examples(lengths), DataConfig(packing=True), 4, seed=0)
    rows = len(pack(lengths, 512, 0))
    assert {batches[step]["tokens"].shape for step in range(rows)} == {(4, 512)}
    # 4 epochs: so many steps of 4 rows.
    order = [index for step in range(rows) for index in batches.indices(step)]
    assert Counter(order) == dict.fromkeys(range(200), 4)
    assert order[:50] != order[-50:]


@pytest.mark.parametrize(
    ("settings", "max_length", "length"),
    [
        ({}, None, 512),
        ({"source_length": 20, "target_length": 30}, None, 50),
        ({"source_length": 20, "target_length": 30}, 40, 40),
        ({"format": "text"}, 4096, 256),
        ({"packing_length": 99}, 40, 99),
    ],
)
def test_packed_rows_are_as_long_as_an_example_can_be(settings, max_length, length):
    settings = DataConfig(packing=True, **settings)
    batches = make_batches(some_examples([9, 30]), settings, 2, 0, max_length)
    assert batches[0]["tokens"].shape == (2, length)


def test_examples_longer_than_a_packed_row_are_refused():
    settings = DataConfig(packing=True, packing_length=20)
    with pytest.raises(ValueError, match=r"data.packing_length = 20: the longest example has 21"):
        make_batches(some_examples([20, 21]), settings, 2, seed=0)
    with pytest.raises(ValueError, match="group_by_length = True: expected False with"):
        Batches(some_examples([2]), 1, 0, group_by_length=True, packing_length=20)
    with pytest.raises(ValueError, match="there are no examples"):
        make_batches([], settings, 2, seed=0)


def test_packed_batches_have_the_loss_and_gradient_of_the_examples():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 20, 17)
    examples = [
        Example(rng.integers(0, 40, n).astype(np.int32), rng.random(n) < 0.7) for n in lengths
    ]
    model = Llama(TINY, adapter=AdapterConfig(method="iec", rank=4, alpha=6.0))
    variables = random_variables(model, 0.3)

    @jax.jit
    @jax.value_and_grad
    def loss(adapters, batch):
        features = model.apply(
            {"params": adapters, "base": variables["base"]},
            batch["tokens"],
            segment_ids=batch.get("segment_ids"),
            method="features",
        )
        head = head_weight(variables["base"])
        total, count = cross_entropy(features, head, batch["tokens"], batch["targets"], chunk=16)
        return total / count

    rows = len(pack(lengths, 24, seed=0))
    packed = Batches(examples, rows, seed=0, packing_length=24)
    apart = next(eval_batches(examples, len(examples)))
    assert rows < len(examples) / 1.5
    value, gradient = loss(variables["params"], packed[0])
    wanted, wanted_gradient = loss(variables["params"], apart)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert value > 1
    for one, other in zip(*map(jax.tree.leaves, (gradient, wanted_gradient)), strict=True):
        scale = float(abs(other).max())
        assert scale > 1e-3
        np.testing.assert_allclose(one, other, atol=1e-5 * scale)
    # Without the segments it is another loss: the test can fail.
    one_segment = {"segment_ids": np.ones_like(packed[0]["segment_ids"])}
    merged, _ = loss(variables["params"], packed[0] | one_segment)
    assert abs(float(merged - wanted)) > 1e-2


def batch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_the_next_batch_is_made_while_one_is_used() -> None:
    made = [threading.Event() for _ in range(4)]

    def make(step: int) -> tuple[int, str]:
        made[step].set()
        return step, threading.current_thread().name

    for step, (got, thread) in enumerate(prefetch(make, range(4))):
        assert got == step and thread.startswith("batches")
        if step < 3:
            assert made[step + 1].wait(100)
    assert not batch_threads()
    assert list(prefetch(make, range(0))) == []


def test_an_error_in_the_thread_is_raised_in_order() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise OSError("no such file")
        return step

    seen = []
    with pytest.raises(OSError, match="no such file"):
        for step in prefetch(make, range(5)):
            seen.append(step)
    assert seen == [0, 1]
    assert not batch_threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_no_thread_is_left_behind(error: type[BaseException]) -> None:
    with pytest.raises(error), contextlib.closing(prefetch(lambda step: step, range(100))) as steps:
        for step in steps:
            if step == 3:
                assert len(batch_threads()) == 1
                raise error
    assert not batch_threads()
