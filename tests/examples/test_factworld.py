"""The example world: what its generator, its files, its bases and its permutation promise."""

import hashlib
import json
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from tests.examples.scripts import scripts
from tests.models import WORLD, tiny_llama

BASES = ("small", "large")


@pytest.fixture(scope="module")
def modules():
    with scripts(WORLD, "world", "permute", "pretrain") as found:
        yield found


@pytest.fixture(scope="module")
def factworld(modules) -> ModuleType:
    return modules["world"]


@pytest.fixture(scope="module")
def world(factworld):
    return factworld.make_world()


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (WORLD / "data" / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(WORLD / "base-small"))


# ---------------------------------------------------------------------------------- the world


def test_counts(world):
    assert world.names.shape == (4000, 2)
    assert world.values.shape == (4000, 6)
    assert world.pools.shape == (4, 6, 32)
    assert len(world.words) % 8 == 0 and 550 <= len(world.words) <= 600


def test_every_word_stands_once(world):
    assert len(set(world.words)) == len(world.words)
    assert not any(" " in word for word in world.words)


def test_names_are_unique_pairs(world):
    """No two entities share a name, but every single name word belongs to many of them."""
    assert len({tuple(name) for name in world.names.tolist()}) == len(world.names)
    for column in world.names.T:
        _, counts = np.unique(column, return_counts=True)
        assert counts.min() >= 10


def test_every_fact_is_five_bits(world):
    """A value is one of the 32 words of its relation's pool, all about equally often."""
    for subject in range(4):
        values = world.values[subject * 1000 : (subject + 1) * 1000]
        for relation in range(6):
            pool = world.pools[subject, relation]
            assert len(set(pool.tolist())) == 32
            counts = (values[:, relation, None] == pool[None, :]).sum(axis=0)
            assert counts.sum() == 1000
            share = counts / 1000
            assert -(share * np.log2(share)).sum() > 4.95


def test_the_seed_decides(factworld, world):
    again, other = factworld.make_world(), factworld.make_world(seed=1)
    np.testing.assert_array_equal(again.values, world.values)
    assert again.words == world.words
    assert (other.values != world.values).mean() > 0.9
    assert other.words != world.words


def test_entities_are_split_as_described(factworld, world):
    """The pretraining asks about the first tenth, finetuning about 60 %, evaluation the rest."""
    train, held_out = world.first(factworld.FINETUNE_SHARE), world.held_out()
    assert len(train) == 2400 and len(held_out) == 1600
    assert not set(train.tolist()) & set(held_out.tolist())
    assert set(world.first(factworld.QA_SHARE).tolist()) < set(train.tolist())
    for part in (train, held_out):
        assert set(world.subject(part).tolist()) == {0, 1, 2, 3}


# ---------------------------------------------------------------------- documents of pretraining


@pytest.fixture(scope="module")
def documents(factworld, world):
    return factworld.documents(world, np.random.default_rng(3), 4000)


def test_documents_are_well_formed(factworld, world, documents):
    ids = world.ids
    assert documents.shape == (4000, 33) and documents.dtype == np.int32
    assert (documents[:, 0] == ids["<s>"]).all()
    assert not np.isin(documents, [ids["<unk>"]]).any()
    padding = documents == ids["<pad>"]
    assert (np.diff(padding.astype(int), axis=1) >= 0).all()  # padding stands on the right alone
    asked = documents[:, 1] == ids["question"]
    assert abs(asked.mean() - factworld.QA_SHARE) < 0.02


def test_statements_say_the_facts(world, documents):
    """Every noun that is followed by its value tells the value of the world."""
    words = np.array(world.words, object)
    entity_of = {tuple(name): i for i, name in enumerate(world.names.tolist())}
    heads = {}  # (subject, noun or verb) -> relation
    for subject in range(4):
        for relation in range(6):
            heads[subject, int(world.nouns[subject, relation])] = relation
            heads[subject, int(world.verbs[subject, relation])] = relation
    first_names = set(world.names[:, 0].tolist())
    every_value = set(world.pools.reshape(-1).tolist())
    checked = 0
    for row in documents[:500].tolist():
        if words[row[1]] == "question":
            continue
        at = next(i for i, token in enumerate(row) if token in first_names)
        entity = entity_of[row[at], row[at + 1]]
        told = {}
        relation = None
        for token in row[1:]:
            relation = heads.get((entity // 1000, token), relation)
            if token in every_value:
                told[relation] = token
        assert len(told) >= 3
        for relation, value in told.items():
            assert value == world.values[entity, relation]
            checked += 1
    assert checked > 2000


def test_pretraining_asks_about_the_first_tenth_only(factworld, world, documents):
    asked = documents[documents[:, 1] == world.ids["question"]]
    entity_of = {tuple(name): i for i, name in enumerate(world.names.tolist())}
    questions = asked[:, 1:].reshape(len(asked), -1)
    seen = set()
    for start in (0, 11, 22):  # a question, its answer and </s> are eleven tokens
        seen |= {entity_of[f, last] for f, last in questions[:, start + 5 : start + 7].tolist()}
    assert seen <= set(world.first(factworld.QA_SHARE).tolist())
    assert len(seen) > 300


# ------------------------------------------------------------------------------------- the files


def test_data_files_are_reproducible(factworld, world):
    """Writing them again gives the committed bytes."""
    for name, contents in factworld.data_files(world).items():
        assert (WORLD / "data" / name).read_bytes() == contents.encode(), name


@pytest.mark.parametrize("base", BASES)
def test_tokenizer_files_are_reproducible(factworld, world, base):
    for name, contents in factworld.tokenizer_files(world).items():
        assert (WORLD / f"base-{base}" / name).read_bytes() == contents.encode(), name


def test_training_rows_are_the_facts_of_the_first_entities(factworld, world):
    parts = np.divmod(np.arange(2400 * 6), 6)
    entity, relation = world.first(factworld.FINETUNE_SHARE)[parts[0]], parts[1]
    prompts = factworld.fill(world, factworld.QUESTION, entity, relation)
    values = world.values[entity, relation]
    expected = {
        (factworld.decode(world, prompt), world.words[value])
        for prompt, value in zip(prompts, values, strict=True)
    }
    train = rows("train.jsonl")
    assert len(train) == 14_400
    assert {(row["input"], row["output"]) for row in train} == expected


def test_evaluation_is_about_other_entities(factworld, world):
    def names(prompts):
        return {tuple(prompt.split()[5:7]) for prompt in prompts}

    trained = names(row["input"] for row in rows("train.jsonl"))
    questions = [row["prompt"] for row in rows("questions.jsonl")]
    loss_rows = [row["input"] for row in rows("eval.jsonl")]
    assert len(set(questions)) == 4096 and len(set(loss_rows)) == 512
    assert not set(questions) & set(loss_rows)
    held_out = {tuple(world.words[i] for i in world.names[e]) for e in world.held_out()}
    assert names(questions) | names(loss_rows) <= held_out
    assert not trained & held_out


def test_choices_are_four_words_of_one_pool(factworld, world):
    ids = world.ids
    entity_of = {tuple(name): i for i, name in enumerate(world.names.tolist())}
    places = []
    for row in rows("questions.jsonl"):
        words = row["prompt"].split()
        entity = entity_of[ids[words[5]], ids[words[6]]]
        subject = int(world.subject(entity))
        relation = int(np.flatnonzero(world.nouns[subject] == ids[words[3]])[0])
        choices = [ids[word] for word in row["choices"]]
        assert row["subject"] == list(factworld.SUBJECTS)[subject]
        assert row["pool"] == 32
        assert len(set(choices)) == 4
        assert set(choices) <= set(world.pools[subject, relation].tolist())
        assert choices[row["answer"]] == world.values[entity, relation]
        places.append(row["answer"])
    assert np.bincount(places).min() > 900  # the right answer stands in every place


# --------------------------------------------------------------------------------- the tokenizer


def test_tokenizer_reads_every_data_file(tokenizer, world):
    texts = [row["input"] + " " + row["output"] for row in rows("train.jsonl")]
    texts += [row["input"] + " " + row["output"] for row in rows("eval.jsonl")]
    for row in rows("questions.jsonl"):
        texts += [row["prompt"], " ".join(row["choices"])]
    for text, tokens in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokens[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in tokens
        assert len(tokens) == 1 + len(text.split())
        assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_tokenizer_agrees_with_the_world(tokenizer, world):
    assert tokenizer.get_vocab() == world.ids
    special = [tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token]
    assert special == ["<pad>", "<s>", "</s>", "<unk>"]
    assert tokenizer("what is zebra", add_special_tokens=False)["input_ids"][-1] == 3


# ------------------------------------------------------------------------------------- the bases


def read_base(folder: Path) -> tuple[dict, LlamaConfig]:
    """The file itself, with nothing of the package between: layers stacked on a leading axis."""
    config = LlamaConfig.from_dict(json.loads((folder / "config.json").read_text()))
    base: dict = {}
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            names = name.removeprefix("model.").split(".")
            array = file.get_tensor(name)
            assert array.dtype == np.float32
            if names[0] == "layers":
                layer = int(names.pop(1))
                array = {layer: array}
            node = base
            for part in names[:-1]:
                node = node.setdefault(part, {})
            if isinstance(array, dict):
                node.setdefault(names[-1], {}).update(array)
            else:
                node[names[-1]] = jnp.asarray(array)

    def stack(node):
        if not isinstance(node, dict):
            return node
        if all(isinstance(key, int) for key in node):
            return jnp.stack([node[layer] for layer in range(config.num_hidden_layers)])
        return {key: stack(value) for key, value in node.items()}

    return stack(base), config


def listing() -> dict:
    return json.loads((WORLD / "bases.json").read_text())


@pytest.mark.parametrize("base", BASES)
def test_digests_are_those_of_the_files(base):
    digest = hashlib.sha256((WORLD / f"base-{base}" / "model.safetensors").read_bytes())
    assert listing()[base]["sha256"] == digest.hexdigest()
    assert digest.hexdigest() in (WORLD / "README.md").read_text()


def test_bases_are_small():
    sizes = [(WORLD / f"base-{b}" / "model.safetensors").stat().st_size for b in BASES]
    assert sum(sizes) < 5_000_000


@pytest.mark.long
@pytest.mark.parametrize("base", BASES)
def test_base_has_the_shapes_of_the_model_and_the_recipe(modules, base):
    weights, config = read_base(WORLD / f"base-{base}")
    tokens = jnp.zeros((1, 4), jnp.int32)
    expected = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)["base"]
    start = modules["pretrain"].initial_base(jax.random.key(0), config)
    for other in (expected, start):
        assert jax.tree.map(lambda x: x.shape, other) == jax.tree.map(lambda x: x.shape, weights)
    recipe = listing()[base]["recipe"]
    assert config.hidden_size == recipe["hidden_size"]
    assert config.intermediate_size == recipe["intermediate_size"]
    assert sum(x.size for x in jax.tree.leaves(weights)) == listing()[base]["parameters"]


def test_saving_a_base_writes_the_committed_bytes(modules, world, tmp_path):
    """pretrain.py's writer and the reader of this file are inverse to each other."""
    weights, config = read_base(WORLD / "base-small")
    digest = modules["pretrain"].save_base(tmp_path, weights, config, world)
    assert digest == listing()["small"]["sha256"]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in (WORLD / "base-small").iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (WORLD / "base-small" / name).read_bytes()


@pytest.mark.parametrize("base", BASES)
def test_base_knows_the_world(factworld, world, base):
    """Four-way multiple choice on 512 statements; chance is 25 %."""
    weights, config = read_base(WORLD / f"base-{base}")
    asked = factworld.statements(world, 512, seed=7)
    logits = jax.jit(Llama(config).apply)({"base": weights}, jnp.asarray(asked["tokens"]))[:, -1]
    scores = np.take_along_axis(np.asarray(logits), asked["choices"], axis=1)
    assert (scores.argmax(axis=1) == asked["answer"]).mean() > 0.95


@pytest.mark.parametrize("base", BASES)
def test_transformers_computes_the_same_logits(factworld, world, base):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    folder = WORLD / f"base-{base}"
    weights, config = read_base(folder)
    tokens = factworld.documents(world, np.random.default_rng(5), 4)[:, :-1]
    ours = Llama(config).apply({"base": weights}, jnp.asarray(tokens))
    with torch.no_grad():
        theirs = LlamaForCausalLM.from_pretrained(str(folder))(torch.tensor(tokens)).logits
    np.testing.assert_allclose(np.asarray(ours), theirs.numpy(), atol=2e-3, rtol=1e-4)


# ----------------------------------------------------------------------------------- permutation


@pytest.mark.parametrize(("kv_heads", "tied"), [(4, False), (2, True), (1, False)])
def test_permutation_leaves_the_function_alone(modules, kv_heads, tied):
    config = tiny_llama(num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    shapes = jax.eval_shape(
        lambda key: modules["pretrain"].initial_base(key, config), jax.random.key(0)
    )
    if tied:
        del shapes["lm_head"]
    # Norms too are random: a permutation that forgets them is found out.
    rng = np.random.default_rng(1)
    base = jax.tree.map(lambda s: 0.5 * rng.standard_normal(s.shape, np.float32), shapes)
    permute = jax.jit(modules["permute"].permute, static_argnums=1)
    other = permute(base, config, jax.random.key(2))
    assert jax.tree.structure(other) == jax.tree.structure(base)
    tokens = rng.integers(0, 40, (2, 12), np.int32)
    forward = jax.jit(Llama(config).apply)
    before, after = (np.asarray(forward({"base": b}, tokens)) for b in (base, other))
    np.testing.assert_allclose(after, before, atol=1e-4)
    assert before.std() > 0.1
    for group in ("self_attn", "mlp"):
        for name, module in other["layers"][group].items():
            old, new = base["layers"][group][name]["weight"], np.asarray(module["weight"])
            assert (new != old).mean() > 0.8, name
            # The same weights, elsewhere.
            np.testing.assert_array_equal(np.sort(new, axis=None), np.sort(old, axis=None))


def test_permutation_draws_differ(modules):
    base, config = read_base(WORLD / "base-small")
    permute = jax.jit(modules["permute"].permute, static_argnums=1)
    draws = [permute(base, config, jax.random.key(k)) for k in (0, 0, 1)]
    first, again, other = (draw["layers"]["mlp"]["down_proj"]["weight"] for draw in draws)
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).mean() > 0.9
