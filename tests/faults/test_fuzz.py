"""Wrong input of fixed seeds ends in one sentence, or is read."""

from pathlib import Path

import pytest

from benchmarks.fault_fuzz import run_input, targets, write_originals

COUNT = 10


@pytest.fixture(scope="module")
def originals(inputs: Path, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    answer = write_originals(folder, inputs, whole / "run")
    assert answer.kind == "done", answer.error
    return folder


@pytest.mark.parametrize("name", targets())
def test_wrong_input_ends_in_a_sentence(originals: Path, tmp_path: Path, name: str) -> None:
    for seed in range(COUNT):
        answer = run_input(originals, tmp_path, name, seed)
        assert answer.kind in ("done", "refused"), f"{name}, seed {seed}: {answer.error}"
        assert answer.is_sentence, f"{name}, seed {seed}: {answer.error}"
