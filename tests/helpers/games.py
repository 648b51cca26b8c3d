"""Random games, policies and prompt distributions that the claims are tried on, and the tolerances
they must meet."""

import math

import pytest
import torch

from oracle import PreferenceTable, random_feature_game, random_game, style_game

EXACT = 1e-12  # float64 identities: a few thousand roundings of 1e-16 each
LP = 1e-8  # what the linear program promises


def random_policy(X: int, Y: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """softmax of normal logits, [X, Y] float64, of full support."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(X, Y, generator=generator, dtype=torch.float64)).softmax(-1)


def random_rho(X: int, seed: int) -> torch.Tensor:
    """A prompt distribution that is not uniform, [X]."""
    return random_policy(1, X, seed + 1000)[0]


SIZES = [(1, 2), (1, 3), (2, 3), (3, 5), (2, 8), (5, 13), (3, 21), (2, 40)]
GAMES = [
    pytest.param(make(X, Y, seed).P, id=f"{make.__name__}-{X}x{Y}")
    for seed, (X, Y) in enumerate(SIZES)
    for make in (random_game, random_feature_game)
]
games = pytest.mark.parametrize("P", GAMES)

# As large as the default game, for what is solved: there libraries share the work among threads.
LARGE = [
    pytest.param(style_game(3, 6, 3, seed=0).P, id="style_game-3x216"),
    pytest.param(random_feature_game(2, 160, seed=1).P, id="random_feature_game-2x160"),
]


def games_of_all_sizes(test):
    """Try the test on all games, the large ones too, and on those of over 20 responses with two
    threads also: of smaller ones nobody makes parts."""
    tried = [
        pytest.param(*game.values, threads, id=f"{game.id}-{threads} threads")
        for game in GAMES + LARGE
        for threads in (1, 2)
        if threads == 1 or game.values[0].shape[1] > 20
    ]
    by_threads = pytest.mark.parametrize(("P", "threads"), tried, indirect=["threads"])
    return pytest.mark.usefixtures("threads")(by_threads(test))


# Comparisons a > b 0.1, a > c 0.8, b > c 0.1: the 3x3 game of COMAL (Liu et al. 2024), and the
# start of its experiments.
COMAL = PreferenceTable(
    torch.tensor([[[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]]], dtype=torch.float64)
).P
COMAL_START = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)


def chi_square(counts, expected):
    """Pearson's statistic, standardised: about normal(0, 1). Cells that expect less than 10 are
    counted as one."""
    rare = expected < 10
    counts, expected = (
        torch.cat([cells[~rare], cells[rare].sum().reshape(1)]).double()
        for cells in (counts, expected)
    )
    expected[-1] += 1e-9  # there may be no rare cell; any count in it is then an outlier
    degrees = len(expected) - 1
    return float(((counts - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees)
