"""Time of rounding a matrix with error feedback, beside the same algorithm in torch, on one CPU.

    python benchmarks/feedback_speed.py [--shapes 4096x4096] [--repeats 3]

Both get the weights and X^T X, make the Cholesky factor with the largest inputs first, find the
plain quantizer's ranges of int4 in blocks of 64, and round the columns within parts of 128. The
peer is written here with torch operations in the order of GPTQ's paper (arXiv 2210.17323,
algorithm 1). The codes of both are compared. Both run in turns. The first call, which compiles
ours, is not counted but printed.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from timing import line, machine, table

from irqlora_jax.quant.config import QuantConfig
from irqlora_jax.quant.encode import quantize

BLOCK, PART, DAMPING, LARGEST = 64, 128, 0.01, 15


def peer(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """The codes, [out, in]."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows, -1, BLOCK)
    low, high = blocks.amin(2).clamp(max=0), blocks.amax(2).clamp(min=0)
    scale = (high - low) / LARGEST
    zero = torch.round(-low / scale)
    order = torch.argsort(-torch.diagonal(gram), stable=True)
    damped = gram[order][:, order].clone()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    work, codes = weight[:, order].clone(), torch.empty_like(weight)
    for start in range(0, columns, PART):
        stop = min(start + PART, columns)
        errors = torch.empty(rows, stop - start)
        for j in range(start, stop):
            own = int(order[j]) // BLOCK
            step, middle = scale[:, own], zero[:, own]
            code = torch.clamp(torch.round(work[:, j] / step) + middle, 0, LARGEST)
            error = (work[:, j] - step * (code - middle)) / upper[j, j]
            work[:, j:stop] -= torch.outer(error, upper[j, j:stop])
            codes[:, j], errors[:, j - start] = code, error
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return torch.empty_like(codes).index_copy_(1, order, codes)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of one call."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["1536x576", "576x1536", "4096x4096"])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(machine())
    print(table(("out x in", "ours (s)", "first call (s)", "torch (s)", "torch / ours", "equal")))
    config = QuantConfig(format="int4", calibration="gptq")
    for shape in args.shapes:
        rows, columns = map(int, shape.split("x"))
        rng = np.random.default_rng(0)
        weight = rng.standard_normal((rows, columns), np.float32) * np.float32(0.02)
        inputs = rng.standard_normal((2 * columns, columns), np.float32)
        inputs *= np.exp(rng.standard_normal(columns)).astype(np.float32)
        gram = inputs.T @ inputs
        ours = jnp.asarray(weight), jnp.asarray(gram)
        theirs = torch.tensor(weight), torch.tensor(gram)

        def run(ours: Any = ours) -> Any:
            return jax.block_until_ready(quantize(ours[0], config, gram=ours[1], damping=DAMPING))

        (first, packed), (_, codes) = timed(run), timed(lambda theirs=theirs: peer(*theirs))
        turns = [
            (timed(run)[0], timed(lambda theirs=theirs: peer(*theirs))[0])
            for _ in range(args.repeats)
        ]
        mine, other = np.median(turns, axis=0)
        equal = (np.asarray(packed.codes()) == codes.numpy()).mean()
        numbers = f"{mine:.2f}", f"{first:.2f}", f"{other:.2f}", f"{other / mine:.2f}"
        print(line((shape, *numbers, f"{equal:.2%}")), flush=True)


if __name__ == "__main__":
    main()
