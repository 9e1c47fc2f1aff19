"""Compares cuDNN's flash attention with XLA's path: do they agree, and how fast are they?

    python benchmarks/attention.py [--tokens 512 2048] [--heads 32] [--features 128]

Prints the relative errors of the result and of the three gradients of causal attention, against
XLA's path in float32 on the same numbers. The bound is 1e-2; exit code 1 above it. Prints the times
of forward with backward too, in turns. If cuDNN cannot serve, prints why.
"""

import argparse
import functools
import sys

import jax
import jax.numpy as jnp
from timing import compare, machine, relative_error, table, verdict

from irqlora_jax.model.attention import attend

BOUND = 1e-2
NAMES = ("y", "dq", "dk", "dv")


@functools.partial(jax.jit, static_argnums=0)
def both(implementation: str, g: jax.Array, *qkv: jax.Array) -> tuple[jax.Array, ...]:
    """The result and the gradients."""
    y, pull = jax.vjp(functools.partial(attend, implementation=implementation), *qkv)  # type: ignore[arg-type]
    return y, *pull(g)


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--features", type=int, default=128, help="features of a head")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    print(f"{machine()}; {args.heads} heads of {args.features}, {args.dtype}\n", flush=True)
    rows, refusals, worst = [], [], 0.0
    for tokens in args.tokens:
        shape, keys = (1, tokens, args.heads, args.features), jax.random.split(jax.random.key(0), 4)
        arrays = [jax.random.normal(key, shape).astype(args.dtype) for key in keys]
        expected = both("xla", *(x.astype(jnp.float32) for x in arrays))
        calls = {"xla": functools.partial(both, "xla", *arrays)}
        try:
            both("cudnn", *arrays)
            calls["cudnn"] = functools.partial(both, "cudnn", *arrays)
        except ValueError as error:
            refusals.append(str(error))
        times = compare(calls, args.repeats)
        for name, time in times.items():
            errors = [relative_error(*pair) for pair in zip(calls[name](), expected, strict=True)]
            worst = max(worst, *errors)
            cells = (str(tokens), name, time.milliseconds(), time.speedups(times["xla"]))
            rows.append((*cells, *(f"{error:.1e}" for error in errors)))
    columns = ("tokens", "attention", "forward and backward, ms", "to xla")
    print(table((*columns, *(f"error of {name}" for name in NAMES)), rows))
    for refusal in dict.fromkeys(refusals):
        print(f"\nnot run: {refusal}")
    met = worst <= BOUND
    print(f"\nlargest relative error {worst:.1e}, must be at most {BOUND}: {verdict(met)}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
