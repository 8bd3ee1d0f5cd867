"""Regression weights: how much each sample of an iteration counts in reward-weighted regression.

All take numbers [N], NaN for a failed reward, and return float32 [N]: NaN stays NaN, the others are
at least 0 and 1 on average, so that the learning rate means what it means without weights.
"""

from __future__ import annotations

import torch
from torch import Tensor


def exponential_weights(advantages: Tensor, temperature: float) -> Tensor:
    """w = exp(a / temperature) / mean exp(a / temperature), over the samples with a number.

    *Source:* Peters and Schaal 2007; Black et al. 2023 (arXiv 2305.13301), section 4.1, where the
    reward itself stands in the exponent; here it is the normalised one, so that a temperature means
    the same for every reward.
    """
    known = ~advantages.isnan()
    exponents = advantages[known].double() / temperature
    # The largest becomes exp(0): nothing overflows, and the mean takes the factor out again.
    raw = (exponents - exponents.max()).exp() if len(exponents) else exponents
    return _spread(raw / raw.mean(), known)


def sparse_weights(values: Tensor, least: float) -> Tensor:
    """w = 1[value >= least] / the share of samples for which it holds.

    Where it holds for none, every weight is 0: there is nothing to learn from.

    *Source:* Black et al. 2023 (arXiv 2305.13301), section 4.1 (RWR-sparse); Lee et al. 2023
    (arXiv 2302.12192) weigh by a reward in [0, 1] instead.
    """
    known = ~values.isnan()
    raw = (values[known].double() >= least).double()
    return _spread(raw / raw.mean() if bool(raw.any()) else raw, known)


def best_share(values: Tensor, quantile: float) -> float:
    """The value that a share 1 - `quantile` of the known ones reaches: at least the best one."""
    known = values[~values.isnan()].double().sort().values
    place = min(int(quantile * len(known)), len(known) - 1)
    return float(known[place])


def effective_share(weights: Tensor) -> float:
    """Kish's effective sample size over N: (sum w)^2 / (N sum w^2), 1 where all weigh alike."""
    known = weights[~weights.isnan()].double()
    squares = float(known.square().sum())
    return float(known.sum()) ** 2 / (len(known) * squares) if squares else 0.0


def _spread(values: Tensor, known: Tensor) -> Tensor:
    result = torch.full(known.shape, torch.nan)
    result[known] = values.float()
    return result
