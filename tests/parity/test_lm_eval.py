"""The interface to lm-eval beside its own for transformers, on the same model."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irqlora_jax import hf
from irqlora_jax.model.llama import Llama
from tests.data.small_data import make_tokenizer
from tests.models import STORIES, needs_stories, tiny_llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402

from irqlora_jax.evaluate.harness_model import HarnessLM  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages

CONTEXT = 96
TEXT = "the cat sat on the mat and the answer is red or green, dark blue at night."
WORDS = np.array(TEXT.split(" "))


def both(folder):
    """Theirs and ours, of one folder."""
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=3)
    base, config = hf.load_base(folder, None)
    ours = HarnessLM(Llama(config), {"params": {}, "base": base}, hf.load_tokenizer(folder), 3)
    assert theirs.max_length == ours.max_length == config.max_position_embeddings
    assert theirs.eot_token_id == ours.eot_token_id
    assert theirs.prefix_token_id == ours.prefix_token_id
    return theirs, ours


@pytest.fixture(params=["byte", "piece"])
def folder(request, tmp_path):
    """A model of random weights, large enough that it has opinions, and a tokenizer."""
    tokenizer = make_tokenizer(request.param)
    config = tiny_llama(vocab_size=400, head_dim=6, max_position_embeddings=CONTEXT)
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(**config.to_dict(), initializer_range=0.3)
    transformers.LlamaForCausalLM(settings).eval().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def texts(count, longest, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(count)]


def compare(theirs, ours, context_words, limit):
    contexts, endings = texts(6, context_words, 0), texts(6, 6, 1)
    pairs = [(context, f" {ending}") for context in contexts for ending in endings]
    pairs += [(f"{context} ", ending) for context, ending in zip(contexts, endings, strict=True)]
    pairs += [("", ending) for ending in endings]
    bos = theirs.tokenizer.bos_token
    pairs += [(f"{bos}{contexts[0]}", f" {endings[0]}")]
    pairs += [(" ".join(contexts * 20), f" {ending}") for ending in endings]  # cut on the left
    asked = requests(*pairs)
    want = theirs.loglikelihood(asked, disable_tqdm=True)
    got = ours.loglikelihood(asked)
    assert ours.truncated >= len(endings)
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in want], rtol=1e-5, atol=limit)
    assert [bool(greedy) for _, greedy in got] == [greedy for _, greedy in want]

    asked = requests(*((text,) for text in [*contexts, " ".join(contexts * 20), "a"]))
    want = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    np.testing.assert_allclose(ours.loglikelihood_rolling(asked), want, rtol=1e-5, atol=limit)

    settings = {"do_sample": False, "max_gen_toks": 16, "until": ["\n\n"]}
    asked = requests(*((text, settings) for text in [*contexts, " ".join(contexts * 20)]))
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
    for stop in "ae":
        cut = {**settings, "until": [stop]}
        asked = requests(*((text, cut) for text in contexts[:3]))
        assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def test_answers_are_those_of_hflm(folder):
    theirs, ours = both(folder)
    # Contexts share what they begin with, so that ours computes it once.
    compare(theirs, ours, 12, 1e-4)
    shared = " ".join([*WORDS] * 4)
    asked = requests(*((f"{shared} {text}", " red") for text in texts(8, 4, 2)))
    want = theirs.loglikelihood(asked, disable_tqdm=True)
    got = ours.loglikelihood(asked)
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in want], rtol=1e-5, atol=1e-4)


@needs_stories
def test_answers_are_those_of_hflm_for_stories260k():
    theirs, ours = both(STORIES)
    compare(theirs, ours, 30, 1e-3)
    assert jax.tree.leaves(ours.variables)[0].dtype == jnp.float32
