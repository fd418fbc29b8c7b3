"""How somebody errs who compares two responses: noise, slips, a liking for what is shown first, and second thoughts.

With margin d, how much better the first response is, noise s, bias b in log-odds for what is shown first, tie width t:

    x = d / s + b    where the first response is shown first,    x = d / s - b    where it is shown second
    P(first better) = (1 - flip) sigmoid(x - t) + flip sigmoid(-x - t)
    P(second better) = (1 - flip) sigmoid(-x - t) + flip sigmoid(x - t),    and else it is a tie

Both orders are decided by one draw of the judge, or, on a share `inconsistency` of the pairs, by a draw for each. So
the chances of a verdict in one order do not depend on `inconsistency`; that of agreement does.

Source: ties as Rao and Kupper 1967, J. Am. Stat. Assoc. 62:194, with theta = exp(t); without bias, slips and ties this
is Bradley and Terry's model.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Interval
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from rlhf_lab.types import Fraction, NonNegative, Positive

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Manner:
    """The parameters of the model above.

    Fields:
        noise: units of the margin per unit of log-odds.
        flip: share of the verdicts that are turned round; at 0.5 a verdict says nothing.
        position_bias: log-odds in favour of what is shown first, negative for last.
        inconsistency: share of the pairs on which the two orders are decided apart.
        tie_width: log-odds.
    """

    noise: Positive
    flip: Annotated[float, Interval(ge=0, lt=0.5)]
    position_bias: float
    inconsistency: Fraction
    tie_width: NonNegative

    def chances(self, margin: ArrayLike) -> Floats:
        """(n,) margins -> (n, 2, 2): in each order, the chance that the first is better, and that the second is."""
        bias = np.array([self.position_bias, -self.position_bias])
        x = np.asarray(margin, dtype=np.float64)[:, None] / self.noise + bias
        first, second = expit(x - self.tie_width), expit(-x - self.tie_width)
        mixed = ((1 - self.flip) * first + self.flip * second, (1 - self.flip) * second + self.flip * first)
        return np.stack(mixed, axis=-1)

    def says(self, margin: ArrayLike, draws: Floats) -> Floats:
        """What it says of (n,) margins in each order, (n, 2): 1 for the first response, 0 for the second, 0.5 a tie.

        Args:
            draws: (n, 3), uniform on [0, 1): the pair's, the second order's own, and whether that counts. Equal draws
                give equal verdicts.
        """
        shared, own, afresh = draws.T
        decides = np.stack([shared, np.where(afresh < self.inconsistency, own, shared)], axis=1)
        chances = self.chances(margin)
        first, second = decides < chances[..., 0], decides >= 1 - chances[..., 1]
        return np.where(first, 1.0, np.where(second, 0.0, 0.5))
