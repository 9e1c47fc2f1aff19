"""What quantization does to knowledge: the committed factworld base, formats against each other."""

import pytest

from irqlora_jax import hf
from irqlora_jax.evaluate import load_questions, score_questions
from irqlora_jax.evaluate.scores import mean_entropy
from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.config import QuantConfig
from tests.models import WORLD


@pytest.fixture(scope="module")
def questions():
    tokenizer = hf.load_tokenizer(WORLD / "base-small")
    return load_questions(str(WORLD / "data" / "questions.jsonl"), tokenizer, 2048)


def score(questions, name: str, calibration: str = "none") -> tuple[float, float | None]:
    """Bits per fact and mean entropy."""
    config = QuantConfig(format=name, calibration=calibration)  # type: ignore[arg-type]
    base, llama = hf.load_base(WORLD / "base-small", config)
    scores = score_questions(Llama(llama), {"params": {}, "base": base}, questions, 256)
    return scores.accuracy, mean_entropy(base)


@pytest.mark.long
def test_fewer_bits_retain_less_and_icq_raises_the_entropy(questions) -> None:
    full, entropy = score(questions, "none")
    assert entropy is None
    accuracy, plain, icq = {}, {}, {}
    for name in ("nf4", "nf3", "nf2"):
        accuracy[name], plain[name] = score(questions, name)
        _, icq[name] = score(questions, name, "icq")
        assert icq[name] > plain[name] + 0.04
    assert full > accuracy["nf4"] > accuracy["nf3"] > accuracy["nf2"] > 0.25
    assert 4 > plain["nf4"] > 3 > plain["nf3"] > 2 > plain["nf2"]
