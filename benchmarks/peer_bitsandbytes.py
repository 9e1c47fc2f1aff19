"""bitsandbytes' 4-bit product: NF4 with double quantization, called as PEFT's layers call it.

matmul.py starts it. A step uses several weights, several times, and then waits for the device.
"""

import functools

from peer import Step, serve, settings

ASKED = settings()

import bitsandbytes as bnb  # noqa: E402
import torch  # noqa: E402
from bitsandbytes.functional import quantize_4bit  # noqa: E402
from timing import versions  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def product(shape: str, tokens: int, copies: int, rounds: int, gradient: bool) -> Step:
    """A step for one case. It allocates its memory at the first call."""
    out, features = map(int, shape.split("x"))
    dtype = getattr(torch, ASKED["dtype"])

    @functools.lru_cache(maxsize=1)
    def prepared() -> tuple:
        torch.manual_seed(0)
        weight = (torch.randn(out, features) * 0.02).to(DEVICE, dtype)
        packed = [
            quantize_4bit(weight, compress_statistics=True, quant_type="nf4") for _ in range(copies)
        ]
        x = torch.randn(tokens, features).to(DEVICE, dtype).requires_grad_(gradient)
        return packed, x, torch.randn(tokens, out).to(DEVICE, dtype)

    def run() -> float:
        packed, x, g = prepared()
        for _ in range(rounds):
            for weight, state in packed:
                y = bnb.matmul_4bit(x, weight.t(), quant_state=state)
                if gradient:
                    torch.autograd.grad(y, x, g)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return 0.0

    return run


def main() -> None:
    """Serves every case, with and without the gradient."""
    steps = {}
    for shape, tokens, copies, rounds in ASKED["cases"]:
        for what, gradient in (("y", False), ("y and dX", True)):
            steps[f"{shape} {tokens} {what}"] = product(shape, tokens, copies, rounds, gradient)
    serve(steps, {}, versions())


if __name__ == "__main__":
    main()
