"""Compiled programs are kept for the next process, and never get in the way of a run."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from irqlora_jax.machine import cache_programs, free_memory, installed_version, total_memory

RUN = """
import jax, sys
from irqlora_jax.machine import cache_programs
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
events = []
jax.monitoring.register_event_listener(lambda name, **kwargs: events.append(name))
print(cache_programs())
from tests.train.small_step import step_and_shapes
step, *shapes = step_and_shapes("float32")
ones = jax.tree.map(lambda x: jax.numpy.ones(x.shape, x.dtype), shapes)
print(float(jax.jit(step)(*ones)[1]["loss"]).hex())
print(events.count("/jax/compilation_cache/cache_hits"))
"""


def run(home: Path, **variables: str) -> tuple[list[str], str]:
    """Lines of stdout, and stderr, of a process with that home."""
    kept = ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    environment = {k: v for k, v in os.environ.items() if k not in kept}
    environment |= {"HOME": str(home), "JAX_PLATFORMS": "cpu"} | variables
    environment["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # tests.models imports transformers
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines(), done.stderr


def test_the_second_process_compiles_nothing_and_computes_the_same(tmp_path: Path) -> None:
    (first, loss, none), quiet = run(tmp_path)
    assert first == str(tmp_path / ".cache" / "irqlora_jax") and none == "0"
    kept = {file.name for file in Path(first).iterdir() if "-atime" not in file.name}
    (second, again, hits), quiet_too = run(tmp_path)
    assert (second, again) == (first, loss) and int(hits) == len(kept) > 0
    assert quiet == quiet_too == ""


def test_a_folder_that_cannot_be_used_is_said_once_and_breaks_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lines, said = run(tmp_path, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert lines[0] == "None" and lines[2] == "0"
    assert said.count("compiled programs are not kept") == 1
    assert f"'{tmp_path}/file/irqlora_jax'" in said


def test_variables_choose_the_folder_or_none(tmp_path: Path) -> None:
    before = jax.config.jax_compilation_cache_dir
    folder = str(tmp_path / "mine")
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        assert cache_programs({"JAX_COMPILATION_CACHE_DIR": folder}) is None
        assert not Path(folder).exists()
        jax.config.update("jax_enable_compilation_cache", True)
        assert cache_programs({"JAX_COMPILATION_CACHE_DIR": folder}) == Path(folder)
        other = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        assert cache_programs(other) == tmp_path / "cache" / "irqlora_jax"
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache" / "irqlora_jax")
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_clone_that_is_not_installed_loses_a_line_and_not_the_run() -> None:
    """Training ended in PackageNotFoundError where the package was only on the path."""
    assert installed_version("jax") == importlib.metadata.version("jax")
    assert installed_version("no-such-package-of-ours") == "not installed"


MEMINFO = "MemTotal: 900 kB\nMemFree: 5 kB\nMemAvailable: 800 kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 800 * 1024),
        ({"memory.max": "max", "memory.current": "5", "memory.stat": ""}, 800 * 1024),
        ({"memory.max": "9000", "memory.current": "5000", "memory.stat": "anon 3"}, 4000),
        (
            {
                "memory.max": "9000",
                "memory.current": "5000",
                "memory.stat": "active_file 70\ninactive_file 300\n",
            },
            4300,
        ),
        (
            {
                "memory/memory.limit_in_bytes": "9000",
                "memory/memory.usage_in_bytes": "9100",
                "memory/memory.stat": "inactive_file 10\ntotal_inactive_file 50\n",
            },
            0,
        ),
    ],
)
def test_free_memory_heeds_the_limit_of_a_container(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(MEMINFO)
    for name, content in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    assert free_memory(tmp_path) == expected


@pytest.mark.parametrize("file", ["memory.max", "memory/memory.limit_in_bytes"])
def test_total_memory_heeds_the_limit_of_a_container(tmp_path: Path, file: str) -> None:
    limit = tmp_path / "sys/fs/cgroup" / file
    limit.parent.mkdir(parents=True)
    limit.write_text("max\n")
    everything = total_memory(tmp_path)
    assert everything == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit.write_text(f"{everything // 3}\n")
    assert total_memory(tmp_path) == everything // 3


def test_free_memory_of_this_machine_and_of_an_unknown_one(tmp_path: Path) -> None:
    everything = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory() <= everything
    assert free_memory(tmp_path) == everything // 2
