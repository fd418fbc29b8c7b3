"""Perfect, exaggerated, inverted and absent control, and ties."""

import numpy as np
import pytest
import torch

from rlhf_lab.functional.control import followed

ASKED = np.array([-1.0, 0.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ([-1, 0, 0, 1], [1, 1, 1, 0]),
        ([-2, 0, 0, 2], [1, 2, 1, 0.5]),
        ([1, 0, 0, -1], [-1, -1, -1, 1]),
        ([3, 3, 3, 3], [0, 0, 0, 3]),
        # of five pairs that ask for different rewards four are in order, one is not
        ([-1, -2, 0, 1], [2 / 10**0.5, 1, 0.6, 0.5]),
    ],
)  # fmt: skip
def test_what_is_obtained_beside_what_is_asked(means, expected):
    noise = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    obtained = torch.tensor(means, dtype=torch.float64) + noise - noise.mean(0)  # the mean over prompts is what counts
    if len(set(means)) == 1:
        obtained = torch.full((50, 4), float(means[0]))
    assert followed(ASKED, obtained).tolist() == pytest.approx(expected, abs=1e-9)
