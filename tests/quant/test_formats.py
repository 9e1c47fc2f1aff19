"""Level tables against the published rules and figures."""

from statistics import NormalDist

import numpy as np
import pytest

from irqlora_jax.quant.formats import FORMATS, get_format

OFFSET = 0.9677083  # 1 - (1/32 + 1/30) / 2, truncated
quantile = NormalDist().inv_cdf


def asymmetric(bits: int) -> np.ndarray:
    half = 2 ** (bits - 1)
    positive = [quantile(p) for p in np.linspace(OFFSET, 0.5, half + 1)[:-1]]
    negative = [-quantile(p) for p in np.linspace(OFFSET, 0.5, half)[:-1]]
    levels = np.sort([*positive, *negative, 0.0])
    return levels / levels[-1]


def symmetric(bits: int) -> np.ndarray:
    edges = np.array([quantile(p) for p in np.linspace(1 - OFFSET, OFFSET, 2**bits + 1)])
    levels = (edges[1:] + edges[:-1]) / 2
    return levels / levels[-1]


@pytest.mark.parametrize(
    ("name", "levels"),
    [("nf8", asymmetric(8)), ("nf4", asymmetric(4)), ("nf3", asymmetric(3)), ("nf2", symmetric(2))],
)
def test_normal_float_follows_its_quantile_rule(name: str, levels: np.ndarray) -> None:
    # The published tables were computed in float32: within an ulp or two of the rule.
    np.testing.assert_allclose(FORMATS[name].table, levels, atol=1.2e-7, rtol=0)


def test_fp4_decides_where_the_cuda_code_does() -> None:
    published = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]
    midpoints = FORMATS["fp4"].midpoints
    np.testing.assert_allclose(midpoints[8:], published, atol=1e-6)
    np.testing.assert_allclose(midpoints[:7], -np.array(published)[::-1], atol=1e-6)
    assert -1e-30 < midpoints[7] < 0


@pytest.mark.parametrize("name", FORMATS)
def test_codes_count_the_levels(name: str) -> None:
    fmt = FORMATS[name]
    assert len(fmt.levels) == 2**fmt.bits
    assert sorted(fmt.order) == list(range(2**fmt.bits))
    assert np.all(np.diff(fmt.table[list(fmt.order)]) >= 0)
    assert np.all(np.diff(fmt.midpoints) > 0)


def test_integer_levels_are_the_codes() -> None:
    assert FORMATS["int3"].levels == (0, 1, 2, 3, 4, 5, 6, 7)


def test_unknown_format_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"quant.format = 'nf5'.*nf4.*int2"):
        get_format("nf5")
