"""Host memory that it takes to quantize a checkpoint while reading it, or to export a run.

    python benchmarks/load_memory.py [--calibration none|icq] [--layers 11] [--cold] ...
    python benchmarks/load_memory.py --loftq 3 --calibration none
    python benchmarks/load_memory.py --export bfloat16 --calibration none

(with the package installed, or PYTHONPATH=.)

Writes a synthetic bfloat16 LLaMA in shards (about 1 GB by default), loads it in a fresh process and
compares the growth of the resident set with the packed base. The limit is the packed base and two
float32 tensors of the largest linear layer; exit code 1 above it. With --export the packed base is
loaded before, with an IEC adapter of rank 64. The script then measures the writing of the merged
model, and the limit is three such tensors.

With --loftq TURNS, LoftQ of rank 64 quantizes the targets, and its pairs count as packed.

With --calibration icq, the script compares the seconds to load with the seconds of the search
alone, on the same weights in memory, in turns, twice each. The limit is 1.5 times.

The quantizer is compiled before, on one layer of the same widths. Compiling takes about 100 MB for
a moment, for any size of model. Then the script returns freed memory to the system, so that new
allocations show as growth. With --cold the measurement includes the compilation.

The resident set (RSS) has two parts: anonymous memory, which a process must really have, and pages
of mapped files, which the system can drop at any time. The script samples both every millisecond,
and also prints the kernel's record of the largest RSS (VmHWM).
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.adapters.loftq import LoftqOptions
from irqlora_jax.base.make import load_base, load_loftq
from irqlora_jax.export.model import save_model
from irqlora_jax.files.tensors import FLOATS, read_headers, read_into
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import linear_path, weight_name
from irqlora_jax.quant.calibrations import icq, icq_integer
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.formats import get_format
from irqlora_jax.sharding import LINEAR_NAMES

STATUS = Path("/proc/self/status")
FIELDS = ("VmRSS", "RssAnon", "RssFile", "VmHWM")


def resident() -> dict[str, int]:
    """Bytes by field of /proc/self/status."""
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return {line[0][:-1]: int(line[1]) * 1024 for line in lines if line[0][:-1] in FIELDS}


def write_checkpoint(folder: Path, config: LlamaConfig) -> None:
    """Writes one shard for each layer and one for the rest, so that writing needs little memory."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)

    hidden, vocab = config.hidden_size, config.vocab_size
    weight_map: dict[str, str] = {}

    def write(number: int, tensors: dict[str, np.ndarray]) -> None:
        file = f"model-{number:05}-of-{config.num_hidden_layers + 1:05}.safetensors"
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))

    for i in range(config.num_hidden_layers):
        tensors = {
            weight_name(linear_path(name), i): random(*config.linear_shapes[name])
            for name in LINEAR_NAMES
        }
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[weight_name((name,), i)] = random(hidden)
        write(i + 1, tensors)
    write(
        config.num_hidden_layers + 1,
        {
            weight_name(("embed_tokens",)): random(vocab, hidden),
            weight_name(("lm_head",)): random(vocab, hidden),
            weight_name(("norm",)): random(hidden),
        },
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def llama(args: argparse.Namespace) -> LlamaConfig:
    """The measured model."""
    return LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 256,
        head_dim=64,
    )


def rehearsal(args: argparse.Namespace) -> LlamaConfig:
    """The model that is loaded before the measured one."""
    if args.cold:
        args = argparse.Namespace(vocab=64, hidden=256, ffn=192, layers=1)
    return dataclasses.replace(llama(args), num_hidden_layers=1, vocab_size=64)


def give_back() -> None:
    """Returns freed memory to the system, so that new allocations count as growth."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        print("no malloc_trim: reuse of freed memory does not show as growth", file=sys.stderr)
    else:
        trim(0)
    # Since Linux 4.0 this resets VmHWM to the current VmRSS.
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("VmHWM could not be reset: it includes the rehearsal", file=sys.stderr)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Loads the rehearsal, then the model; returns the growth of memory and the seconds."""
    quant = QuantConfig(format=args.format, calibration=args.calibration)
    if args.export:
        export(folder / "rehearsal out", args, *adapted(folder / "rehearsal", quant))
        model, variables = adapted(folder / "model", quant)
    else:
        load(folder / "rehearsal", quant, args)
    done = threading.Event()
    peaks = dict.fromkeys(FIELDS, 0)

    def sample() -> None:
        while not done.wait(0.001):
            for name, value in resident().items():
                peaks[name] = max(peaks[name], value)

    give_back()
    before = resident()
    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    if args.export:
        export(folder / "out", args, model, variables)
        packed = 0
    else:
        base = load(folder / "model", quant, args)
        packed = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    peaks["VmHWM"] = resident()["VmHWM"]
    search = 0.0
    if args.calibration == "icq" and not args.export and not args.loftq:
        # In turns, and after the memory was measured, because reuse of freed memory does not show.
        base = None
        first = search_seconds(folder, quant)
        start = time.perf_counter()
        load_base(folder / "model", quant)
        seconds = (seconds + time.perf_counter() - start) / 2
        search = (first + search_seconds(folder, quant)) / 2
    return {
        "packed": packed,
        "seconds": seconds,
        "search": search,
        **{f"growth of {name}": peaks[name] - before[name] for name in FIELDS},
    }


def search_seconds(folder: Path, quant: QuantConfig) -> float:
    """Seconds of the search of all linear layers, with weights in memory and a compiled program."""

    def load(part: str) -> list[jax.Array]:
        weights = []
        for file in sorted((folder / part).glob("*.safetensors")):
            for name, header in read_headers(file).items():
                if name.split(".")[-2] in LINEAR_NAMES:
                    weight = np.empty(header.shape, FLOATS[header.dtype])
                    read_into(weight, header, name)
                    weights.append(jnp.asarray(weight.reshape(-1, quant.block_size)))
        return jax.block_until_ready(weights)

    def search(weights: list[jax.Array]) -> None:
        for blocks in weights:
            if get_format(quant.format).integer:
                bits = get_format(quant.format).bits
                found = icq_integer.search_range(blocks, bits, quant.symmetric, quant.icq.range)
            else:
                found = icq.search_shift(blocks, quant.format, quant.icq.range)
            jax.block_until_ready(found)

    search(load("rehearsal"))
    weights = load("model")
    start = time.perf_counter()
    search(weights)
    return time.perf_counter() - start


def load(folder: Path, quant: QuantConfig, args: argparse.Namespace) -> tuple:
    """Loads the base and, with --loftq, its pairs."""
    if not args.loftq:
        return load_base(folder, quant, progress=args.progress)[:1]
    adapter = AdapterConfig(rank=64, init="loftq", loftq=LoftqOptions(args.loftq))
    key = jax.random.key(0)
    return load_loftq(folder, quant, adapter, key, progress=args.progress)[:2]


def adapted(folder: Path, quant: QuantConfig) -> tuple[Llama, dict]:
    """A quantized base with an adapter."""
    base, config = load_base(folder, quant)
    model = Llama(config, AdapterConfig(method="iec", rank=64))
    return model, {"params": model.init_adapters(jax.random.key(0)), "base": base}


def export(folder: Path, args: argparse.Namespace, model: Llama, variables: dict) -> None:
    """Writes the merged model."""
    folder.mkdir()
    save_model(folder, model, variables, dtype=args.export, progress=args.progress)


def report(result: dict[str, float], args: argparse.Namespace) -> bool:
    """Prints the figures; returns whether they are within the limits."""
    config = llama(args)
    linear = 4 * max(rows * columns for rows, columns in config.linear_shapes.values())
    table = 4 * config.vocab_size * config.hidden_size
    mb = 1e6
    print(f"jax {jax.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(
        f"format {args.format}, calibration {args.calibration}, {config.num_hidden_layers} layers"
        + (f", {args.loftq} turns of LoftQ" if args.loftq else "")
    )
    done = "export" if args.export else "load  "
    print(f"seconds to {done}                    {result['seconds']:9.1f}")
    in_time = True
    if result["search"]:
        ratio = result["seconds"] / result["search"]
        in_time = ratio <= 1.5
        print(f"seconds of the search alone          {result['search']:9.1f}")
        print(f"load / search                        {ratio:9.2f}   must be at most 1.50")
    if not args.export:
        print(f"packed base, with embeddings (MB)    {result['packed'] / mb:9.1f}")
    print(f"largest linear layer, float32 (MB)   {linear / mb:9.1f}")
    print(f"embedding table, float32 (MB)        {table / mb:9.1f}")
    worst = 0.0
    print(f"{'growth of the peak':24} {'MB':>9} {'above packed, in largest linear layers':>40}")
    for name in FIELDS:
        growth = result[f"growth of {name}"]
        ratio = (growth - result["packed"]) / linear
        print(f"{name:24} {growth / mb:9.1f} {ratio:40.2f}")
        worst = max(worst, ratio)
    limit = 3 if args.export else 2
    print(f"worst {worst:.2f}, must be at most {limit:.2f}")
    return worst <= limit and in_time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calibration", choices=["none", "icq"], default="icq")
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--loftq", type=int, default=0, help="turns of LoftQ (0: no LoftQ)")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--export", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--cold", action="store_true", help="measure the compilation too")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is not None:  # the fresh process
        print(json.dumps(measure(args.folder, args)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, config in (("rehearsal", rehearsal(args)), ("model", llama(args))):
            (folder / part).mkdir()
            write_checkpoint(folder / part, config)
        files = list((folder / "model").glob("*.safetensors"))
        print(f"checkpoint {sum(file.stat().st_size for file in files) / 1e9:.2f} GB")
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder)]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return 0 if report(json.loads(child.stdout), args) else 1


if __name__ == "__main__":
    sys.exit(main())
