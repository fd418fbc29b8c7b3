"""Who is stronger, from who beat whom: the likeliest Bradley-Terry strengths, on Elo's scale.

Ratings that are updated game by game depend on the order of the games; the maximum of the likelihood does not.
"""

import math

import torch
from torch import Tensor

ELO_PER_NAT = 400 / math.log(10)  # Elo's scale: 400 points are odds of ten to one
_MOST_STEPS = 500


def linked(wins: Tensor) -> Tensor:
    """(..., K, K) wins of row over column -> (...) bool: whether finite strengths make these wins likeliest.

    They do if and only if every player is reached from every other along wins: no group of players lost, or won, every
    game against the rest, and none never met the rest.

    Source: Ford 1957, American Mathematical Monthly 64(8), part 2.
    """
    reached = (wins > 0) | torch.eye(wins.shape[-1], dtype=torch.bool)
    for _ in range(wins.shape[-1].bit_length()):  # each squaring doubles the length of the chains
        reached = reached.double() @ reached.double() > 0
    return reached.all(-1).all(-1)


def bradley_terry(wins: Tensor, virtual_ties: float) -> Tensor:
    """The strengths that make the games likeliest: player i beats j with probability sigmoid(theta_i - theta_j).

    Newton's method in float64 from equal strengths; the likelihood is concave.

    Args:
        wins: (..., K, K) games that the row won against the column; a tie is half a game to each. The diagonal counts
            for nothing.
        virtual_ties: drawn games added to every pair before counting. They keep strengths finite where someone won
            everything or two never met, and pull all strengths together a little; 0 adds none.

    Returns:
        (..., K) float64 in nats, of mean 0.

    Raises:
        ValueError: there are no finite likeliest strengths; only without virtual ties.

    Source: Bradley and Terry 1952, Biometrika 39(3/4).
    """
    num = wins.shape[-1]
    others = 1 - torch.eye(num, dtype=torch.float64)
    won = (wins.double() + virtual_ties / 2) * others
    if not bool(linked(won).all()):
        raise ValueError(
            "these games have no finite ratings: some player, or group of players, won or lost every game against the "
            "rest, or never met it; add drawn games (virtual_ties=1), or leave it out"
        )
    games = won + won.mT
    theta = torch.zeros(won.shape[:-1], dtype=torch.float64)
    for _ in range(_MOST_STEPS):
        chance = torch.sigmoid(theta[..., :, None] - theta[..., None, :])
        gradient = (won - games * chance).sum(-1)
        weight = games * chance * (1 - chance)
        # the information is singular along equal strengths; the constant makes it regular there and nowhere else
        information = torch.diag_embed(weight.sum(-1)) - weight + weight.sum((-1, -2), keepdim=True) / num**2
        step = torch.linalg.solve(information, gradient)
        # far from the maximum Newton's steps are too long
        theta = theta + step / (step.abs().amax(-1, keepdim=True)).clamp(min=1)
        if bool((step.abs().amax(-1) < 1e-10).all()):
            return theta - theta.mean(-1, keepdim=True)
    raise ValueError("the ratings did not converge; the games are all but one-sided, add drawn games (virtual_ties=1)")


def elo(strengths: Tensor, anchor: int, rating: float) -> Tensor:
    """(..., K) strengths in nats -> (..., K) points, of which player number `anchor` has `rating`."""
    return rating + ELO_PER_NAT * (strengths - strengths[..., anchor : anchor + 1])


def elo_interval(
    wins: Tensor, virtual_ties: float, anchor: int, rating: float, draws: int, seed: int, level: float = 0.95
) -> tuple[Tensor, Tensor, int]:
    """Percentile bootstrap over prompts of the ratings of `bradley_terry` on Elo's scale.

    Args:
        wins: (P, K, K) the games on each prompt, which are drawn again together.
        draws: resamples.

    Returns:
        (K,) the lower and (K,) the upper end; and how many resamples had no finite ratings and are left out, which is 0
        with virtual ties. Where these are more than the tails of the interval, or there is one prompt, which says
        nothing of others, its ends are infinite.

    Source: the intervals of Chiang et al. 2024, arXiv:2403.04132 (Chatbot Arena).
    """
    num_prompts, num = wins.shape[0], wins.shape[-1]
    source = torch.Generator().manual_seed(seed)
    flat = wins.double().reshape(num_prompts, -1)
    resampled = []
    for _ in range(draws):
        drawn = torch.randint(num_prompts, (num_prompts,), generator=source)
        counts = torch.bincount(drawn, minlength=num_prompts).double()
        resampled.append((counts @ flat).view(num, num))
    games = torch.stack(resampled)
    finite = linked(games + virtual_ties * (1 - torch.eye(num, dtype=torch.float64)))
    left_out = draws - int(finite.sum())
    tail = (1 - level) / 2
    if left_out > tail * draws or num_prompts == 1:
        unknown = torch.full((num,), math.inf, dtype=torch.float64)
        unknown[anchor] = 0
        return rating - unknown, rating + unknown, left_out
    ratings = elo(bradley_terry(games[finite], virtual_ties), anchor, rating)
    return torch.quantile(ratings, tail, 0), torch.quantile(ratings, 1 - tail, 0), left_out
