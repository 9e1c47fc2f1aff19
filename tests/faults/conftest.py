"""A finished run and a base of the tiny model of the fault benchmark, made once."""

import os
from pathlib import Path

import jax
import pytest

from benchmarks.fault_inputs import train_flags, write_inputs
from benchmarks.fault_worker import command


@pytest.fixture(scope="package")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("faults") / "inputs")


@pytest.fixture(scope="package")
def whole(inputs: Path) -> Path:
    """A folder with run/, of 4 steps and an evaluation, and base/. Tests work on copies."""
    folder, before = inputs.parent / "whole", Path.cwd()
    folder.mkdir()
    os.chdir(folder)
    quantize = ("quantize", f"--model={inputs / 'model'}", "--output_dir=base", "--progress=false")
    ask = ("eval", "--run=run", "--task=perplexity", f"--text={inputs / 'text.txt'}")
    try:
        with jax.numpy_dtype_promotion("standard"):
            for argv in (
                (*quantize, "--quant.calibration=none"),
                train_flags(inputs, 4),
                (*ask, "--progress=false"),
            ):
                answer = command(*argv)
                assert answer.kind == "done", answer.error
    finally:
        os.chdir(before)
    return folder
