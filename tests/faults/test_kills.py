"""Commands that are killed and started again end as if they had not been killed."""

from pathlib import Path

import pytest

from benchmarks.fault_kills import Undisturbed, one_chain, steps


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(steps(inputs), tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.long
@pytest.mark.parametrize(("phase", "kills"), [("checkpoint", 1), ("quantize", 1)])
def test_a_killed_command_starts_again(
    undisturbed: Undisturbed, tmp_path: Path, phase: str, kills: int
) -> None:
    killed: list[str] = []
    for seed in range(3):  # the command may end before the kill
        killed, fault = one_chain(undisturbed, phase, kills, seed, tmp_path / "scratch")
        assert fault is None
        if killed:
            break
    assert len(killed) == kills
