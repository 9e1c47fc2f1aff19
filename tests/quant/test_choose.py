"""The dispatcher by itself. Products, searches and attention test it with their implementations."""

import sys

import pytest

from irqlora_jax.quant.choose import Implementation, choose, kernel, serves_all


def fake(name: str, most: int, faster: bool = True) -> Implementation:
    """One that serves numbers up to `most`."""

    def refusal(number: int) -> str | None:
        return None if number <= most else f"it takes numbers up to {most}, not {number}"

    return Implementation(name, refusal, abs, is_faster=lambda operation, number: faster)


SMALL, SLOW, ALL = fake("small", 3), fake("slow", 9, faster=False), fake("all", 100)
THREE = (SMALL, SLOW, ALL)


@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [(None, 3, SMALL), (None, 4, ALL), ("slow", 4, SLOW), ("all", 1, ALL)],
)
def test_the_one_asked_for_or_the_first_faster_one_that_serves(name, number, expected) -> None:
    assert choose(name, THREE, number, operation="test") is expected


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("small", 5, r"^way = 'small': it takes numbers up to 3, not 5; 'slow' or 'all' serves 5$"),
        ("slow", 50, r"^way = 'slow': it takes numbers up to 9, not 50; 'all' serves 50$"),
        ("fast", 1, r"'fast': there is no such implementation; 'small' or 'slow' or 'all' serves"),
    ],
)
def test_a_refusal_is_one_sentence_that_names_the_others(name, number, message) -> None:
    with pytest.raises(ValueError, match=message):
        choose(name, THREE, number, operation="test", setting="way", served=str(number))


def test_a_kernel_is_imported_only_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = kernel("lazy", "no_such_file", "forward", place=lambda number: ("nf4", (number, 1), 1))
    everywhere = Implementation("xla", serves_all, abs)
    assert choose(None, (lazy, everywhere), 1, operation="test") is everywhere
    with pytest.raises(ModuleNotFoundError, match="no_such_file"):
        choose("lazy", (lazy, everywhere), 1, operation="test")
    module = type(sys)("irqlora_jax.kernels.no_such_file")
    module.refusal, module.forward = (lambda number: None), (lambda number: 2 * number)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    chosen = choose("lazy", (lazy, everywhere), 4, operation="test")
    assert chosen.forward(4) == 8 and chosen.backward is None
