"""Seconds, host memory and bytes read to make, write and read a base over several processes.

    python benchmarks/reading.py [--gigabytes 4] [--processes 1 2 4] [--format nf4]

(with the package installed, or PYTHONPATH=.)

Writes a synthetic bfloat16 LLaMA of about 1 GB in shards. Processes of this machine, connected over
loopback with a device each, then quantize it on a mesh that splits all weights (fsdp), write the
base in shards, and fresh processes read it again. The quantizer is the plain one, so that reading
counts. Of each process it prints

- the bytes of weights that it read from the files: of linear layers, of all others, and of a base
  those that its device needs and those that it verified;
- how far its anonymous memory (RssAnon) grew above the start, sampled every 2 ms. On a CPU the
  arrays of the device are a part of it, and so are compiled programs and the buffers of gloo.

Bytes do not depend on the machine. Seconds do: all processes share its cores.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.load_memory import resident, write_checkpoint
from irqlora_jax.base.file import base_size, read_base, save_base
from irqlora_jax.base.make import load_base
from irqlora_jax.base.stored import Piece
from irqlora_jax.files.tensors import Header
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.processes import connect, exchange, wait_for_all
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.sharding import MeshConfig, bytes_by_device, make_mesh

MB = 1e6
LAYER = 0.1032  # gigabytes of a layer of `model`


def model(gigabytes: float) -> LlamaConfig:
    """A LLaMA of about this size in bfloat16."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=max(1, round((gigabytes - 0.262) / LAYER)),
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=64,
    )


class Watched:
    """Context that measures seconds and the growth of the anonymous memory."""

    def __enter__(self) -> "Watched":
        self.before = self.peak = resident()["RssAnon"]
        self.started, self.ended = time.perf_counter(), threading.Event()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def sample(self) -> None:
        while not self.ended.wait(0.002):
            self.peak = max(self.peak, resident()["RssAnon"])

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.started
        self.ended.set()
        self.thread.join()

    def found(self, **more: Any) -> dict[str, Any]:
        return {"seconds": self.seconds, "growth": self.peak - self.before, **more}


def work(args: argparse.Namespace) -> None:
    """One process: makes and writes the base, or reads it."""
    if args.count > 1:
        connect(args.address, args.process, args.count)
    mesh = make_mesh(MeshConfig(data=1, fsdp=args.count), args.count)
    read = {"linear": 0, "other": 0, "needed": 0, "verified": 0}
    rows, of_piece, verify = Header.rows, Piece.read, Piece.verify
    verifying = threading.local()

    def counted_rows(self: Header, name: str, *place: Any) -> Any:
        part = rows(self, name, *place)
        read["linear" if "_proj" in name else "other"] += part.nbytes
        return part

    def counted_piece(self: Piece, *place: Any) -> Any:
        part = of_piece(self, *place)
        read["verified" if getattr(verifying, "now", False) else "needed"] += part.nbytes
        return part

    def counted_verify(self: Piece) -> None:
        verifying.now = True
        verify(self)
        verifying.now = False

    Header.rows, Piece.read, Piece.verify = counted_rows, counted_piece, counted_verify  # type: ignore
    path, found = args.folder / "base" / "base.safetensors", {}
    wait_for_all()
    if args.work == "make":
        quant = QuantConfig(format=args.format, calibration="none")
        with Watched() as watched:
            base, llama = load_base(args.folder / "model", quant, mesh=mesh)
        held = sum(bytes_by_device(base).values())
        found["quantize"] = watched.found(held=held, **read)
        with Watched() as watched:
            save_base(path, base, llama, quant, shard_bytes=args.shard)
        found["write"] = watched.found(held=0)
    else:
        with Watched() as watched:
            base, _ = read_base(path, mesh)
        held = sum(bytes_by_device(base).values())
        found["read"] = watched.found(held=held, **read)
    texts = exchange(json.dumps(found))
    if args.process == 0:
        print(json.dumps([json.loads(text) for text in texts]))


def start(args: argparse.Namespace, folder: Path, count: int, kind: str) -> list[dict[str, Any]]:
    """Starts the processes, and returns what each found."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{port.getsockname()[1]}"
    given = ["--work", kind, "--folder", folder, "--address", address, "--count", count]
    given += ["--shard", args.shard, "--format", args.format]
    command = [sys.executable, __file__, *map(str, given)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [*command, "--process", str(i)], stdout=subprocess.PIPE, text=True, env=environment
        )
        for i in range(count)
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a process failed")
    return json.loads(outputs[0].strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--shard", type=int, default=100_000_000, help="bytes of a shard")
    parser.add_argument("--work", choices=("make", "read"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "model").mkdir()
        llama = model(args.gigabytes)
        write_checkpoint(folder / "model", llama)
        size = sum(file.stat().st_size for file in (folder / "model").iterdir())
        print(f"{llama.num_hidden_layers} layers, {size / MB:,.0f} MB, jax {jax.__version__}\n")
        print("| processes | work | process | seconds | growth MB | held MB | read MB |")
        print("|---|---|---|---|---|---|---|")
        for count in args.processes:
            (folder / "base").mkdir(exist_ok=True)
            found = start(args, folder, count, "make")
            for one, more in zip(found, start(args, folder, count, "read"), strict=True):
                one |= more
            for process, works in enumerate(found):
                for kind, values in works.items():
                    parts = [f"{values[n] / MB:,.0f} {n}" for n in _NAMES if values.get(n)]
                    sizes = f"{values['growth'] / MB:,.0f} | {values['held'] / MB:,.0f}"
                    text = f"| {count} | {kind} | {process} | {values['seconds']:.1f} | {sizes} |"
                    print(text, ", ".join(parts), "|")
            print(f"\nbase: {base_size(folder / 'base') / MB:,.0f} MB\n")


_NAMES = "linear", "other", "needed", "verified"

if __name__ == "__main__":
    main()
