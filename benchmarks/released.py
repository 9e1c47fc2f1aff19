"""The search of IR-QLoRA's released code, as the peer of our search: torch and bitsandbytes.

It is written from a description of that code. For every candidate it quantizes the whole tensor
again. The entropy of each block is a float32 sum over bins; for each bin, the codes are repeated
and compared with an int64 number. A block keeps a candidate that is strictly better than all others
before it.

The released code has 16 bins for all formats. Fewer bits need only 2**bits bins, so `bins` can be
set, as somebody might have improved the procedure. bitsandbytes quantizes NF4 and FP4, as in the
released code. It has no NF3 and NF2: for these, torch.bucketize uses the midpoints of the code
book. The integer search is AutoGPTQ's quantizer with a loop over factors of the range.

A search imports torch and bitsandbytes (extra `parity`) when it is called.
"""

import warnings
from typing import Any

import numpy as np

from irqlora_jax.quant.formats import get_format

SIGMA = 1 / 1.8481308  # standard deviation in units of the scale
BINS = 16


def peer_missing() -> str | None:
    """Why the peer cannot run, or None."""
    try:
        import_peer()
    except ImportError as error:
        return f"{error} (pip install 'irqlora-jax[parity]')"
    return None


def search_shift(
    blocks: Any, name: str, search_range: float = 0.1, steps: int = 100, bins: int = BINS
) -> tuple[Any, Any]:
    """Codes (uint8 tensor [n, block]) at the chosen shifts, and the shifts [n].

    Args:
        blocks: float32 tensor [n, block] on any device.
        name: nf4, nf3, nf2 or fp4.
        search_range: lambda of the paper.
        steps: half the number of candidates.
        bins: number of bins of the entropy.
    """
    torch, _ = import_peer()
    middle = blocks.median(dim=1, keepdim=True).values
    spread = (blocks - middle).abs().amax(dim=1, keepdim=True)
    reach = search_range * SIGMA
    best = torch.full_like(middle[:, 0], -1)
    codes, shift = torch.zeros_like(blocks, dtype=torch.uint8), middle[:, 0].clone()
    for factor in torch.linspace(-reach, reach, 2 * steps + 1):
        candidate = middle + factor.to(blocks.device) * spread
        found = quantize(blocks - candidate, name)
        bits = entropy(found, bins)
        wins = bits > best
        best = torch.where(wins, bits, best)
        shift = torch.where(wins, candidate[:, 0], shift)
        codes = torch.where(wins[:, None], found, codes)
    return codes, shift


def search_range(
    groups: Any,
    bits: int,
    symmetric: bool = False,
    search_range: float = 0.1,
    steps: int = 50,
    bins: int = BINS,
) -> tuple[Any, Any]:
    """Codes (uint8 tensor [n, group]) with the chosen ranges, and the scales [n].

    Args:
        groups: float32 tensor [n, group] on any device.
        bits: width of a code.
        symmetric: fixes the zero point.
        search_range: largest relative change of the range.
        steps: number of candidates above, and below, the plain range.
        bins: number of bins of the entropy.
    """
    torch, _ = import_peer()
    top = 2**bits - 1
    low = groups.amin(dim=1).clamp(max=0)
    high = groups.amax(dim=1).clamp(min=0)
    if symmetric:
        high = torch.maximum(low.abs(), high)
        low = torch.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    up = torch.linspace(1, 1 + search_range, steps + 1)
    down = torch.linspace(1, 1 - search_range, steps + 1)[1:]
    best = torch.full_like(low, -1)
    codes, chosen = torch.zeros_like(groups, dtype=torch.uint8), torch.ones_like(low)
    for factor in torch.cat([up, down]).to(groups.device):
        scale = (factor * high - factor * low) / top
        zero = torch.full_like(scale, (top + 1) // 2)
        if not symmetric:
            zero = torch.round(-factor * low / scale)
        found = torch.round(groups / scale[:, None]) + zero[:, None]
        found = found.clamp(0, top).to(torch.uint8)
        entropies = entropy(found, bins)
        wins = entropies > best
        best = torch.where(wins, entropies, best)
        chosen = torch.where(wins, scale, chosen)
        codes = torch.where(wins[:, None], found, codes)
    return codes, chosen


def quantize(centered: Any, name: str) -> Any:
    """Codes (uint8 tensor [n, block]) of blocks minus their shift; the scale is max|w|."""
    torch, functional = import_peer()
    block = centered.shape[1]
    if name in ("nf4", "fp4"):
        packed, _ = functional.quantize_4bit(centered, blocksize=block, quant_type=name)
        pairs = packed.view(-1, 1)
        codes = torch.cat([pairs >> 4, pairs & 15], dim=1).view(-1, block)
        if name == "fp4" and codes.device.type == "cpu":
            # On GPUs, small w < 0 get code 8, FP4's -0. The CPU code gives it to small w > 0, and
            # gives an exact 0 a different code than a slightly larger number.
            codes = torch.where(codes & 7 == 0, (centered < 0).to(torch.uint8) * 8, codes)
        return codes
    scale = centered.abs().amax(dim=1, keepdim=True).clamp(min=1e-38)
    points = torch.from_numpy(np.asarray(get_format(name).midpoints)).to(centered.device)
    return torch.bucketize(centered * (1 / scale), points, out_int32=True).to(torch.uint8)


def entropy(codes: Any, bins: int) -> Any:
    """Entropy of each block in bits, float32 [n], summed over the bins."""
    torch, _ = import_peer()
    levels = torch.arange(bins, device=codes.device)[:, None, None]
    repeated = codes[None].repeat(bins, 1, 1)
    share = (repeated == levels).sum(dim=2) / codes.shape[1]
    return torch.nan_to_num(-share * torch.log2(share), nan=0.0).sum(dim=0)


def import_peer() -> tuple[Any, Any]:
    """Imports torch and bitsandbytes.functional."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from bitsandbytes import functional
    return torch, functional
