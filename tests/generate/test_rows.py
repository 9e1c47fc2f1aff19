"""Rows of one batch that start and end at different times: each as if it were alone."""

import jax
import numpy as np
import pytest

from irqlora_jax.generate.decode import generate
from irqlora_jax.generate.rows import Rows, Sampling
from irqlora_jax.model.llama import Llama
from tests.models import random_variables, tiny_llama

MODEL = Llama(tiny_llama(num_hidden_layers=1, max_position_embeddings=64))
PROMPTS = ([3, 5, 8], [7, *range(3, 36)], [9, 4], [20] * 12)


@pytest.fixture(scope="module")
def variables():
    return random_variables(MODEL, 0.2)


@pytest.fixture
def rows(variables):
    return Rows(MODEL, variables, 3, 64)


def alone(rows, prompt, count, sampling=Sampling(), row=0):  # noqa: B008
    tokens = [rows.start(row, prompt, sampling)]
    while len(tokens) < count:
        tokens.append(rows.step()[row])
    return tokens


def test_texts_that_join_and_leave_are_those_of_generate(rows, variables):
    wanted = generate(MODEL, variables, PROMPTS, 12)
    assert len({tuple(text) for text in wanted}) == 4
    # When each text starts, and in which row. The last one follows the third in its row.
    plan = {0: (0, 1), 2: (1, 0), 3: (2, 2), 16: (3, 2)}
    texts, open_ = {}, {}
    for time in range(30):
        if time in plan:
            which, row = plan[time]
            open_[row] = which
            texts[which] = [rows.start(row, PROMPTS[which], Sampling())]
        for row, token in enumerate(rows.step()):
            if row in open_:
                texts[open_[row]].append(token)
    assert [texts[which][:12] for which in range(4)] == wanted


def test_a_sampled_text_depends_on_its_own_settings_alone(rows, variables):
    sampling = Sampling(1.5, 0.9, 2**32 - 1, 2)
    key = jax.random.fold_in(jax.random.key(np.uint32(2**32 - 1)), 2)
    (wanted,) = generate(MODEL, variables, PROMPTS[:1], 12, temperature=1.5, top_p=0.9, key=key)
    assert alone(rows, PROMPTS[0], 12, sampling) == wanted
    rows.start(0, PROMPTS[1], Sampling())
    rows.start(1, PROMPTS[2], Sampling(0.7, None, 5))
    assert alone(rows, PROMPTS[0], 12, sampling, row=2) == wanted
    others = [Sampling(1.5, 0.9, 1, 2), Sampling(1.5, 0.9, 2**32 - 1, 1), Sampling(1.5, 1e-6, 3)]
    drawn = [alone(rows, PROMPTS[0], 12, other) for other in others]
    assert all(text != wanted for text in drawn)
    # Of a small nucleus, only the most likely token is left.
    assert drawn[2] == alone(rows, PROMPTS[0], 12)


def test_the_numbers_of_a_row_are_the_same_beside_other_rows(rows, variables):
    def cached(row):
        return [np.asarray(rows._cache[name])[:, row, :15] for name in ("k", "v")]

    alone(rows, PROMPTS[0], 12, row=1)
    before = cached(1)
    rows.start(0, PROMPTS[1], Sampling())
    rows.start(2, PROMPTS[3], Sampling(1.0))
    alone(rows, PROMPTS[0], 12, row=1)
    for a, b in zip(before, cached(1), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_row_that_goes_on_after_its_text_disturbs_nobody(rows, variables):
    rows.start(0, PROMPTS[3], Sampling())
    for _ in range(80):
        rows.step()
    (wanted,) = generate(MODEL, variables, PROMPTS[1:2], 29)
    assert alone(rows, PROMPTS[1], 29, row=1) == wanted
    assert alone(rows, PROMPTS[0], 12) == generate(MODEL, variables, PROMPTS[:1], 12)[0]
