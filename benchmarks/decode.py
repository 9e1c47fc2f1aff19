"""Decoding one text at a time: packed weights compared with bfloat16 weights.

    python benchmarks/decode.py [--size 7b] [--slots 512]

Tokens a second of greedy decoding with `Llama.decode` and a full cache, several tokens in one
program. Compares the unquantized model with nf4 and ICQ, by every implementation that can serve
here. Weights are random.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from timing import compare, machine, table
from train_step import FLOAT, SHIFTED, add_size, fill_size, llama, random_base

from irqlora_jax.model.llama import Llama
from irqlora_jax.quant.matmul import check_implementation, with_preferred_layout

STEPS = 16


def decoder(args: argparse.Namespace, base: dict[str, Any], matmul: Any) -> Callable[[], Any]:
    """A call that decodes STEPS tokens greedily. They fill the last slots of the cache."""
    model = Llama(llama(args), compute_dtype=args.dtype, matmul=matmul)
    slots = args.slots + STEPS
    cache = model.init_cache(1, slots) | {"length": jnp.full((1,), args.slots, jnp.int32)}

    @jax.jit
    def run(base: Any, cache: Any) -> jax.Array:
        def advance(carry: Any, _: None) -> tuple[Any, jax.Array]:
            token, cache = carry
            logits, cache = model.apply({"base": base}, token, cache, method="decode")
            token = logits.argmax(-1).astype(jnp.int32)[:, None]
            return (token, cache), token

        start = jnp.ones((1, 1), jnp.int32), cache
        return jax.lax.scan(advance, start, None, length=STEPS)[1]

    return functools.partial(run, base, cache)


def refusal(base: dict[str, Any], matmul: Any, dtype: str) -> str | None:
    """Why an implementation cannot serve, or None."""
    stack = base["layers"]["mlp"]["down_proj"]["weight"]
    weight = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stack)
    try:
        check_implementation(matmul, jax.ShapeDtypeStruct((1, weight.shape[1]), dtype), weight)
    except ValueError as error:
        return str(error)
    return None


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_size(parser)
    parser.add_argument("--slots", type=int, default=512, help="tokens in the cache")
    parser.add_argument("--repeats", type=int, default=5)
    args = fill_size(parser.parse_args())
    args.length = args.slots + STEPS
    print(f"{machine()}; {args.slots} tokens in the cache, {args.dtype}", flush=True)
    calls = {"unquantized": decoder(args, random_base(args, FLOAT), None)}
    packed = random_base(args, SHIFTED)
    for name in ("xla", "triton", "mosaic"):
        base = with_preferred_layout(packed, name)
        if (reason := refusal(base, name, args.dtype)) is not None:
            print(reason)
            continue
        calls[f"nf4 with ICQ, {name}"] = decoder(args, base, name)
    times = compare(calls, args.repeats)
    rows = [
        (name, time.rate(STEPS), time.speedups(times["unquantized"]))
        for name, time in times.items()
    ]
    print(table(("weights", "tokens/s", "to unquantized"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
