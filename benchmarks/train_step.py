"""Tokens a second of a training step: ours, variants of ours, and the alternatives for users.

    python benchmarks/train_step.py --size cpu --peer tunix --peer-python PYTHON
    python benchmarks/train_step.py --size 7b --peer peft
    python benchmarks/train_step.py --size cpu --growth

All steps run in turns. The peer has its own process with the interpreter PYTHON (default: this
one), which needs the peer's packages. The script waits for every step. Our variants: the full
method (nf4 with ICQ and IEC), without ICQ's shift, with LoRA and not IEC, and LoRA on unquantized
weights of the same compute dtype. Weights and shifts are random. All layers have the same matrices,
which does not change the time.

Goals: at least 0.88 of the speed of the unquantized LoRA step; ICQ's shift and IEC cost at most 1 %
of a step each; on a CPU not slower than tunix, on a GPU 1.5 times as fast as PEFT. Exit code 1
otherwise. --size tiny only checks that everything runs; it is too small for the goals.

--growth prints our time against tokens a step, bits and rank instead.
"""

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs memory too

import jax
import jax.numpy as jnp
import numpy as np
from peer import Peer
from timing import compare, machine, table, verdict

from irqlora_jax.adapters.config import AdapterConfig
from irqlora_jax.config import TrainConfig
from irqlora_jax.model.config import LlamaConfig
from irqlora_jax.model.llama import Llama
from irqlora_jax.model.tree import ATTENTION_NAMES
from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize
from irqlora_jax.quant.qtensor import QTensor
from irqlora_jax.runs.state import TrainState, init_state, make_optimizer
from irqlora_jax.sharding import LINEAR_NAMES
from irqlora_jax.train.step import train_step

FIELDS = ("hidden", "layers", "ffn", "vocab", "heads", "rank", "batch", "length", "dtype")
SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(zip(FIELDS, (128, 2, 256, 512, 2, 8, 2, 64, "float32"), strict=True)),
    "cpu": dict(zip(FIELDS, (512, 8, 1536, 4096, 8, 16, 4, 256, "float32"), strict=True)),
    "7b": dict(zip(FIELDS, (4096, 32, 11008, 32000, 32, 64, 1, 2048, "bfloat16"), strict=True)),
}
GROWTH: dict[str, list[tuple[int, int]]] = {  # rows of a step, and tokens of a row
    "tiny": [(1, 64), (2, 64)],
    "cpu": [(1, 256), (2, 256), (4, 256), (8, 256)],
    "7b": [(1, 2048), (2, 2048), (4, 2048)],
}
PEERS = {"tunix": "peer_tunix.py", "peft": "peer_peft.py"}
SHIFTED = QuantConfig(format="nf4", calibration="icq")
PLAIN = QuantConfig(format="nf4", calibration="none")
FLOAT = QuantConfig(format="none", calibration="none")
OURS, NO_SHIFT, NO_IEC = "nf4, ICQ, IEC", "nf4, IEC", "nf4, ICQ, LoRA"
UNQUANTIZED = "unquantized, LoRA"


def llama(args: argparse.Namespace) -> LlamaConfig:
    """The architecture."""
    return LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        head_dim=args.hidden // args.heads,
        max_position_embeddings=args.length,
    )


def quantized(weight: jax.Array, quant: QuantConfig) -> QTensor:
    """The quantized weight. With ICQ its shifts are random: search.py measures the search."""
    shift = None
    if quant.calibration == "icq" and not quant.format.startswith("int"):
        rows, columns = weight.shape
        shift = 1e-3 * jax.random.normal(jax.random.key(1), (rows, -(-columns // quant.block_size)))
    return quantize(weight, quant, shift=shift)


def random_base(args: argparse.Namespace, quant: QuantConfig) -> dict[str, Any]:
    """A random frozen base. Unquantized weights have the compute dtype."""
    config, keys = llama(args), iter(jax.random.split(jax.random.key(0), 16))

    def random(*shape: int) -> jax.Array:
        return (jax.random.normal(next(keys), shape) * 0.02).astype(args.dtype)

    def layers(weight: Any) -> Any:
        return jax.tree.map(lambda x: jnp.repeat(x[None], args.layers, axis=0), weight)

    groups: dict[str, Any] = {"self_attn": {}, "mlp": {}}
    for name in LINEAR_NAMES:
        weight = random(*config.linear_shapes[name])
        weight = weight if quant.format == "none" else quantized(weight, quant)
        groups["self_attn" if name in ATTENTION_NAMES else "mlp"][name] = {"weight": layers(weight)}
    ones = jnp.ones(args.hidden, args.dtype)
    norms = ("input_layernorm", "post_attention_layernorm")
    return {
        "embed_tokens": {"weight": random(args.vocab, args.hidden)},
        "layers": groups | {name: {"weight": layers(ones)} for name in norms},
        "norm": {"weight": ones},
        "lm_head": {"weight": random(args.vocab, args.hidden)},
    }


def random_batch(args: argparse.Namespace) -> dict[str, jax.Array]:
    """A batch of random tokens, which are all targets."""
    shape = (args.batch, args.length)
    tokens = np.random.default_rng(1).integers(0, args.vocab, shape)
    return {"tokens": jnp.asarray(tokens, jnp.int32), "targets": jnp.ones(shape, bool)}


class Ours:
    """Our step, jitted as in the training loop: each step donates the state to the next one."""

    def __init__(
        self, args: argparse.Namespace, base: dict[str, Any], method: str, steps: int = 10_000
    ) -> None:
        adapter = AdapterConfig(method=method, rank=args.rank)  # type: ignore[arg-type]
        self.settings = TrainConfig(
            steps=steps, batch_size=args.batch, compute_dtype=args.dtype, remat=args.remat
        )
        self.model = Llama(llama(args), adapter, args.dtype, remat=args.remat)
        self.optimizer = make_optimizer(self.settings)
        self.base, self.batch = base, random_batch(args)
        self._state = self.new_state()
        self._advance = jax.jit(
            functools.partial(
                train_step, model=self.model, optimizer=self.optimizer, config=self.settings
            ),
            donate_argnums=0,
        )

    def new_state(self) -> TrainState:
        """Fresh adapters and a fresh optimizer state."""
        return jax.jit(lambda: init_state(self.model, self.optimizer, 0))()

    def step(self) -> float:
        """Does one step, waits for it, and returns the loss."""
        self._state, metrics = self._advance(self._state, self.base, self.batch)
        jax.block_until_ready(self._state)
        return float(metrics["loss"])


def run_table(args: argparse.Namespace) -> int:
    """Times our variants and the peer; returns the exit code."""
    peer = None
    if args.peer is not None:
        asked = {name: getattr(args, name) for name in (*FIELDS, "remat")} | {"block_size": 64}
        peer = Peer(PEERS[args.peer], asked, args.peer_python)
    bases = {quant: random_base(args, quant) for quant in (SHIFTED, PLAIN, FLOAT)}
    ours = {
        OURS: Ours(args, bases[SHIFTED], "iec"),
        NO_SHIFT: Ours(args, bases[PLAIN], "iec"),
        NO_IEC: Ours(args, bases[SHIFTED], "lora"),
        UNQUANTIZED: Ours(args, bases[FLOAT], "lora"),
    }
    calls: dict[str, Callable[[], Any]] = {name: variant.step for name, variant in ours.items()}
    print(f"{machine()}\n\n{shape(args)}")
    if peer is not None:
        about = peer.ready()
        calls |= {name: functools.partial(peer.step, name) for name in about["variants"]}
        print(f"\nPeer: {about['versions']}")
        print("".join(f"\n- {name}: {text}" for name, text in about["about"].items()), flush=True)
    times = compare(calls, args.repeats, warmup=2)
    tokens = args.batch * args.length
    columns = ("step", "ms", "tokens/s", f"to {OURS}", f"to {UNQUANTIZED}")
    rows = []
    for name, time in times.items():
        speedups = (time.speedups(times[other]) for other in (OURS, UNQUANTIZED))
        rows.append((name, time.milliseconds(), time.rate(tokens), *speedups))
    print(f"\n{table(columns, rows)}\n")
    wanted = [
        ("to unquantized LoRA", times[OURS].speedup(times[UNQUANTIZED]), 0.88),
        ("cost of ICQ's shift", times[OURS].speedup(times[NO_SHIFT]), 1 / 1.01),
        ("cost of IEC", times[OURS].speedup(times[NO_IEC]), 1 / 1.01),
    ]
    if peer is not None:
        least = 1.5 if args.peer == "peft" else 1.0
        wanted += [(f"to {name}", times[OURS].speedup(times[name]), least) for name in peer.losses]
        bytes_, losses = peer.peak_bytes(), peer.losses
        print("; ".join(f"loss of {name} {loss:.4f}" for name, loss in losses.items()))
        if bytes_ is not None:
            print(f"peak memory of the peer's process {bytes_ / 2**30:.2f} GiB")
        peer.close()
    print(f"loss of ours {ours[OURS].step():.4f}\n")
    for what, value, least in wanted:
        print(f"{what}: {value:.3f}, must be at least {least:.3f}: {verdict(value >= least)}")
    met = all(value >= least for _, value, least in wanted)
    return 0 if met or args.size == "tiny" else 1


def run_growth(args: argparse.Namespace) -> int:
    """Prints time against tokens a step, bits and rank. Each table has its own turns."""
    print(f"{machine()}\n\n{shape(args)}; nf4, ICQ, IEC unless a row says otherwise")
    change = lambda **fields: argparse.Namespace(**vars(args) | fields)  # noqa: E731
    base = random_base(args, SHIFTED)

    def show(name: str, variants: dict[str, tuple[Ours, int]]) -> None:
        times = compare({k: v.step for k, (v, _) in variants.items()}, args.repeats, warmup=2)
        first = times[next(iter(times))]
        rows = [
            (key, time.milliseconds(), time.rate(variants[key][1]), time.speedups(first))
            for key, time in times.items()
        ]
        print(f"\n{table((name, 'ms', 'tokens/s', 'steps/s to the first row'), rows)}", flush=True)

    sizes = {f"{rows} x {length}": (rows, length) for rows, length in GROWTH[args.size]}
    show(
        "tokens a step",
        {
            name: (Ours(change(batch=rows, length=length), base, "iec"), rows * length)
            for name, (rows, length) in sizes.items()
        },
    )
    tokens = args.batch * args.length
    formats = {name: dataclasses.replace(SHIFTED, format=name) for name in ("nf4", "nf3", "nf2")}
    formats |= {"int4": QuantConfig(format="int4", block_size=32, calibration="none")}
    formats |= {f"unquantized, {args.dtype}": FLOAT}
    show(
        "weights",
        {
            name: (Ours(args, random_base(args, quant), "iec"), tokens)
            for name, quant in formats.items()
        },
    )
    ranks = {f"r = {rank}": rank for rank in (8, 16, 64, 128)}
    show(
        "rank",
        {name: (Ours(change(rank=rank), base, "iec"), tokens) for name, rank in ranks.items()},
    )
    return 0


def shape(args: argparse.Namespace) -> str:
    """Describes the model and the batch, for the head of a table."""
    return (
        f"hidden {args.hidden}, {args.layers} layers, ffn {args.ffn}, vocabulary {args.vocab}, "
        f"{args.heads} heads, r = {args.rank} on all seven linears, {args.batch} x {args.length} "
        f"tokens a step, {args.dtype}, {'layers' if args.remat else 'nothing'} recomputed"
    )


def add_size(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the model and the batch."""
    parser.add_argument("--size", choices=list(SIZES), default="cpu")
    for name in FIELDS[:-1]:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--remat", action=argparse.BooleanOptionalAction, default=True)


def fill_size(args: argparse.Namespace) -> argparse.Namespace:
    """Fills flags that were not given with the values of the size."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**vars(args) | SIZES[args.size] | given)


def main() -> int:
    """Prints the comparison or the growth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_size(parser)
    parser.add_argument("--peer", choices=list(PEERS))
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--growth", action="store_true")
    args = fill_size(parser.parse_args())
    return run_growth(args) if args.growth else run_table(args)


if __name__ == "__main__":
    sys.exit(main())
