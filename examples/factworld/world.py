"""Factworld: a seeded world of 24,000 random facts, with its text, tokenizer and data files.

    python examples/factworld/world.py        # writes data/ and the tokenizers again

There are 4 subjects x 1,000 entities x 6 relations. A value is one of the 32 words in its
relation's pool, so a fact has 5 bits. The name of an entity is a pair of words, and neither word
alone identifies it. So a model can keep a fact only in the weights of its linear layers, which are
quantized.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
SEED = 0
ENTITIES = 1000  # entities of each subject
QA_SHARE = 0.1  # share of pretraining documents with questions, and of entities in these questions
FINETUNE_SHARE = 0.6  # share of each subject's entities; the evaluation asks about the others
QUESTIONS, EVAL_ROWS = 4096, 512
DOCUMENT_TOKENS = 33  # 32 inputs, and the target of the last input

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK)
FUNCTION_WORDS = (".", "?", "has", "its", "is", "the", "of", "question", "what", "answer")
TEMPLATES = (
    "has NOUN VALUE .",
    "VERB VALUE .",
    "its NOUN is VALUE .",
    "the NOUN of FIRST LAST is VALUE .",
)
STATEMENT = "FIRST LAST has NOUN"
QUESTION = "question what is NOUN of FIRST LAST ? answer"

POOLS = {
    "city": """lisbon cairo oslo lima paris tokyo delhi quito dublin vienna prague athens madrid
        rome berlin hanoi seoul manila jakarta havana bogota nairobi lagos tunis ankara kyiv riga
        warsaw geneva boston denver sydney""",
    "job": """baker tailor miner potter weaver farmer sailor barber butcher mason plumber painter
        printer lawyer doctor nurse teacher clerk judge pilot driver cook waiter actor dancer singer
        poet author editor banker broker smith""",
    "color": """red blue green yellow purple black white gray brown pink crimson scarlet azure
        indigo violet teal cyan magenta maroon beige ivory khaki navy turquoise lilac mauve ocher
        sepia umber vermilion ultramarine amber""",
    "food": """bread rice soup cheese honey butter noodles pasta salad stew pudding pancake porridge
        omelet pizza sausage bacon yogurt jam toast curry dumpling waffle cookie muffin lentils
        beans potato carrot onion garlic spinach""",
    "animal": """cat dog horse fox wolf bear otter badger rabbit hare mouse rat squirrel beaver deer
        moose goat sheep camel donkey tiger lion leopard monkey eagle falcon heron stork swan duck
        goose turtle""",
    "tool": """hammer saw chisel pliers wrench drill axe shovel rake hoe sickle scythe anvil bellows
        tongs lathe needle scissors ladder bucket rope pulley lever wedge trowel broom file clamp
        mallet crowbar pickaxe plow""",
    "metal": """iron copper silver gold tin lead zinc nickel cobalt chromium titanium tungsten
        platinum palladium mercury sodium potassium lithium calcium magnesium aluminum bismuth
        antimony uranium thorium cadmium gallium indium osmium iridium rhodium vanadium""",
    "tree": """oak pine birch maple elm willow cedar spruce larch poplar aspen beech chestnut walnut
        hazel alder yew cypress juniper acacia baobab banyan teak mahogany ebony palm olive fig
        mulberry linden hornbeam sequoia""",
}
SUBJECTS = {  # subject -> (noun, verb, pool) of its six relations
    "people": (
        ("birthplace", "comes-from", "city"),
        ("profession", "works-as", "job"),
        ("eye-color", "looks-out-of", "color"),
        ("dish", "cooks", "food"),
        ("pet", "keeps", "animal"),
        ("instrument", "wields", "tool"),
    ),
    "places": (
        ("neighbor", "borders", "city"),
        ("guild", "hosts", "job"),
        ("flag", "flies", "color"),
        ("export", "ships", "food"),
        ("emblem", "honors", "animal"),
        ("ore", "mines", "metal"),
    ),
    "creatures": (
        ("habitat", "haunts", "city"),
        ("keeper", "obeys", "job"),
        ("fur", "wears", "color"),
        ("diet", "devours", "food"),
        ("prey", "hunts", "animal"),
        ("nest", "sleeps-in", "tree"),
    ),
    "substances": (
        ("origin", "arose-in", "city"),
        ("finder", "found-by", "job"),
        ("hue", "glows", "color"),
        ("flavor", "tastes-of", "food"),
        ("use", "coats", "tool"),
        ("component", "contains", "metal"),
    ),
}
RELATIONS = 6
POOL_SIZE = 32


@dataclasses.dataclass(frozen=True)
class World:
    """All arrays hold token ids. Entity `s * entities + i` is the i-th entity of subject s."""

    words: tuple[str, ...]
    """The vocabulary; the position of a word is its token id."""
    entities: int
    """Entities of each subject."""
    names: np.ndarray
    """[entity, 2]: first and last name."""
    nouns: np.ndarray
    """[subject, relation]."""
    verbs: np.ndarray
    """[subject, relation]."""
    pools: np.ndarray
    """[subject, relation, 32]: the words that a value is drawn from."""
    values: np.ndarray
    """[entity, relation]: the facts."""

    @property
    def ids(self) -> dict[str, int]:
        """Word -> token id."""
        return {word: i for i, word in enumerate(self.words)}

    def subject(self, entity: np.ndarray) -> np.ndarray:
        """The number of each entity's subject."""
        return entity // self.entities

    def first(self, share: float) -> np.ndarray:
        """The first `share` of the entities of every subject, ascending."""
        number = np.arange(len(self.names))
        return number[number % self.entities < round(self.entities * share)]

    def held_out(self) -> np.ndarray:
        """Entities without questions in pretraining and finetuning."""
        return np.setdiff1d(np.arange(len(self.names)), self.first(FINETUNE_SHARE))


def _shuffled(rng: np.random.Generator, count: int) -> np.ndarray:
    # Sorts uniform numbers, because a new NumPy is least likely to change `Generator.random`.
    return np.argsort(rng.random(count), kind="stable")


def _names(rng: np.random.Generator, count: int, taken: set[str]) -> list[str]:
    """`count` new pronounceable words."""
    heads = ["b", "br", "d", "dr", "f", "g", "gr", "h", "k", "kl", "l"]
    heads += ["m", "n", "p", "pr", "r", "s", "st", "t", "tr", "v", "z"]
    middles = ["l", "m", "n", "r", "v", "nd", "lm", "rk", "st", "d", "th"]
    tails = ["", "n", "s", "r", "l", "x", "ck", "m"]
    vowels = ["a", "e", "i", "o", "u"]
    found: list[str] = []
    while len(found) < count:
        parts = (heads, vowels, middles, vowels, tails)
        word = "".join(part[int(rng.random() * len(part))] for part in parts).capitalize()
        if word not in taken:
            taken.add(word)
            found.append(word)
    return found


def make_world(seed: int = SEED, entities: int = ENTITIES) -> World:
    """Draws names and facts. The same seed gives the same world."""
    rng = np.random.default_rng(seed)
    # 15 % more pairs than entities: nearly every pair of words is an entity, so that only first and
    # last name together identify it.
    side = math.ceil(math.sqrt(1.15 * entities))
    relations = [relation for table in SUBJECTS.values() for relation in table]
    words = [*SPECIAL, *FUNCTION_WORDS]
    words += [noun for noun, _, _ in relations] + [verb for _, verb, _ in relations]
    pool_words = {name: text.split() for name, text in POOLS.items()}
    for pool in pool_words.values():
        words += pool
    taken = set(words)
    people = [[_names(rng, side, taken) for _ in range(2)] for _ in SUBJECTS]
    for firsts, lasts in people:
        words += firsts + lasts
    # A mesh can split a vocabulary that is a multiple of 8.
    words += [f"<unused{i}>" for i in range(-len(words) % 8)]
    ids = {word: i for i, word in enumerate(words)}

    names, values = [], []
    for firsts, lasts in people:
        pair = _shuffled(rng, side * side)[:entities]
        names.append(np.stack([ids[firsts[0]] + pair // side, ids[lasts[0]] + pair % side], 1))
    table = np.array([[ids[word] for word in pool_words[pool]] for _, _, pool in relations])
    table = table.reshape(len(SUBJECTS), RELATIONS, POOL_SIZE)
    for pools in table:
        drawn = np.floor(rng.random((entities, RELATIONS)) * POOL_SIZE).astype(np.int64)
        values.append(pools[np.arange(RELATIONS), drawn])
    shape = (len(SUBJECTS), RELATIONS)
    return World(
        words=tuple(words),
        entities=entities,
        names=np.concatenate(names),
        nouns=np.array([ids[noun] for noun, _, _ in relations]).reshape(shape),
        verbs=np.array([ids[verb] for _, verb, _ in relations]).reshape(shape),
        pools=table,
        values=np.concatenate(values),
    )


def fill(world: World, template: str, entity: np.ndarray, relation: np.ndarray) -> np.ndarray:
    """Token ids [*entity.shape, words of the template]. `relation` has the shape of `entity`."""
    ids, subject = world.ids, world.subject(entity)
    slots = {
        "NOUN": world.nouns[subject, relation],
        "VERB": world.verbs[subject, relation],
        "VALUE": world.values[entity, relation],
        "FIRST": world.names[entity, 0],
        "LAST": world.names[entity, 1],
    }
    columns = [slots.get(word, ids.get(word)) for word in template.split()]
    return np.stack([np.broadcast_to(column, entity.shape) for column in columns], axis=-1)


def documents(world: World, rng: np.random.Generator, count: int) -> np.ndarray:
    """Random pretraining documents, int32 [count, 33], padded on the right.

    A statement document is a name and the entity's six facts in random order, each in one of the
    four templates. A question document is three questions with their answers.
    """
    pad, bos, eos = (world.ids[word] for word in (PAD, BOS, EOS))
    entity = (rng.random(count) * len(world.names)).astype(np.int64)
    order = np.argsort(rng.random((count, RELATIONS)), axis=1, kind="stable")
    template = (rng.random((count, RELATIONS)) * len(TEMPLATES)).astype(np.int64)
    each = np.broadcast_to(entity[:, None], order.shape)
    longest = max(len(text.split()) for text in TEMPLATES)
    sentences = np.full((count, RELATIONS, longest), pad)
    for number, text in enumerate(TEMPLATES):
        chosen = template == number
        filled = fill(world, text, each[chosen], order[chosen])
        sentences[chosen, : filled.shape[-1]] = filled
    # A document that starts with the template with the name needs no name before it.
    lead = np.where(template[:, :1] == 3, pad, world.names[entity])
    edge = np.ones((count, 1), np.int64)
    rows = np.concatenate([bos * edge, lead, sentences.reshape(count, -1), eos * edge], axis=1)
    packed = np.argsort(rows == pad, axis=1, kind="stable")[:, :DOCUMENT_TOKENS]
    rows = np.take_along_axis(rows, packed, axis=1)

    asked = world.first(QA_SHARE)
    entity = asked[(rng.random((count, 3)) * len(asked)).astype(np.int64)]
    relation = (rng.random((count, 3)) * RELATIONS).astype(np.int64)
    answered = fill(world, f"{QUESTION} VALUE {EOS}", entity, relation).reshape(count, -1)
    answered = np.concatenate([bos * edge, answered], axis=1)[:, :DOCUMENT_TOKENS]
    return np.where(rng.random((count, 1)) < QA_SHARE, answered, rows).astype(np.int32)


def choices(
    world: World, rng: np.random.Generator, entity: np.ndarray, relation: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Four different words of each fact's pool [facts, 4], and the right one's place [facts]."""
    pool = world.pools[world.subject(entity), relation]
    value = world.values[entity, relation]
    order = np.argsort(rng.random(pool.shape), axis=1, kind="stable")
    mixed = np.take_along_axis(pool, order, axis=1)
    wrong = mixed[mixed != value[:, None]].reshape(len(value), POOL_SIZE - 1)
    four = np.concatenate([value[:, None], wrong[:, :3]], axis=1)
    order = np.argsort(rng.random(four.shape), axis=1, kind="stable")
    return np.take_along_axis(four, order, axis=1), np.argmax(order == 0, axis=1)


def statements(world: World, count: int, seed: int = 1) -> dict[str, np.ndarray]:
    """Multiple choice on statements as in pretraining, over `count` facts of all entities.

    Returns "tokens" [count, 5] (bos and `FIRST LAST has NOUN`), "choices" [count, 4] and "answer"
    [count], the place of the right choice.
    """
    rng = np.random.default_rng(seed)
    entity, relation = np.divmod(_shuffled(rng, world.values.size)[:count], RELATIONS)
    tokens = fill(world, f"{BOS} {STATEMENT}", entity, relation)
    four, answer = choices(world, rng, entity, relation)
    return {"tokens": tokens.astype(np.int32), "choices": four, "answer": answer}


def decode(world: World, ids: np.ndarray) -> str:
    """The words of a sequence of ids, without padding."""
    return " ".join(world.words[i] for i in ids if world.words[i] != PAD)


def _facts(entities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(entities, RELATIONS), np.tile(np.arange(RELATIONS), len(entities))


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)


def data_files(world: World, seed: int = SEED) -> dict[str, str]:
    """File name -> contents of train.jsonl, questions.jsonl and eval.jsonl."""
    rng = np.random.default_rng([seed, 1])

    def rows(entity: np.ndarray, relation: np.ndarray) -> list[dict]:
        prompts = fill(world, QUESTION, entity, relation)
        outputs = world.values[entity, relation]
        return [
            {"input": decode(world, prompt), "output": world.words[output]}
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    entity, relation = _facts(world.first(FINETUNE_SHARE))
    order = _shuffled(rng, len(entity))
    train = rows(entity[order], relation[order])

    entity, relation = _facts(world.held_out())
    order = _shuffled(rng, len(entity))
    asked, kept = order[:QUESTIONS], order[QUESTIONS : QUESTIONS + EVAL_ROWS]
    four, answer = choices(world, rng, entity[asked], relation[asked])
    subjects = list(SUBJECTS)
    questions = [
        {
            "subject": subjects[world.subject(entity[i])],
            "prompt": row["input"],
            "choices": [world.words[word] for word in four[n]],
            "answer": int(answer[n]),
            "pool": POOL_SIZE,
        }
        for n, (i, row) in enumerate(
            zip(asked, rows(entity[asked], relation[asked]), strict=True),
        )
    ]
    return {
        "train.jsonl": _lines(train),
        "questions.jsonl": _lines(questions),
        "eval.jsonl": _lines(rows(entity[kept], relation[kept])),
    }


def tokenizer_files(world: World) -> dict[str, str]:
    """File name -> contents of a Hugging Face tokenizer for whole words."""
    ids = world.ids
    start = {"SpecialToken": {"id": BOS, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": ids[word],
                "content": word,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for word in SPECIAL
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, first],
            "pair": [start, first, second],
            "special_tokens": {BOS: {"id": BOS, "ids": [ids[BOS]], "tokens": [BOS]}},
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": UNK},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 128,
    }
    return {
        "tokenizer.json": json.dumps(tokenizer, indent=1) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=1) + "\n",
    }


def write_files(folder: Path, files: dict[str, str]) -> None:
    """Writes the files, with the same line endings on every system."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, contents in files.items():
        (folder / name).write_bytes(contents.encode())


def main() -> None:
    """Writes the data files, and the tokenizer into the folders of both bases."""
    world = make_world()
    write_files(FOLDER / "data", data_files(world))
    for base in ("base-small", "base-large"):
        write_files(FOLDER / base, tokenizer_files(world))
    for row in documents(world, np.random.default_rng(SEED), 4):
        print(decode(world, row))
    print(f"{world.values.size} facts, {len(world.words)} words; wrote {FOLDER / 'data'}")


if __name__ == "__main__":
    main()
