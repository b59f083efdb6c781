"""From rewards to advantages: each picture against the other pictures of its prompt.

Rewards of a round are gathered first and grouped by prompt, so the statistics are those of whole groups
however pictures were batched or sharded. Host arithmetic in float64: it is a few hundred numbers.

Source: group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300), with the constants of Flow-GRPO
(arXiv 2505.05470).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EPSILON = 1e-4
"""Added to a deviation; a group whose rewards are all alike then teaches nothing."""


@dataclass(frozen=True)
class Advantages:
    """Advantages of a round and what its groups look like.

    Attributes:
      values: float32 ``[B]``.
      std: mean of the groups' standard deviations.
      dead: share of groups whose rewards are all equal.
      clipped: share of advantages that the bound cut.
    """

    values: np.ndarray
    std: float
    dead: float
    clipped: float


def group_advantages(
    rewards: np.ndarray, groups: np.ndarray, *, clip: float = 5.0, whole_std: bool = False
) -> Advantages:
    """``(r - mean of group) / (population std of group + 1e-4)``, bounded by ``clip``.

    Args:
      rewards: ``[B]``.
      groups: integers ``[B]``; equal numbers are one group, in any order.
      clip: bound of an advantage.
      whole_std: divide by the deviation of all rewards instead of the group's.
    """
    rewards = np.asarray(rewards, np.float64)
    _, member = np.unique(groups, return_inverse=True)
    count = np.bincount(member)
    centred = rewards - (np.bincount(member, rewards) / count)[member]
    std = np.sqrt(np.bincount(member, centred**2) / count)
    scale = rewards.std() if whole_std else std[member]
    values = centred / (scale + EPSILON)
    bounded = np.clip(values, -clip, clip)
    smallest = 1e-8 * max(float(np.abs(rewards).max()), 1.0)  # below it a deviation is rounding
    return Advantages(
        bounded.astype(np.float32),
        float(std.mean()),
        float((std <= smallest).mean()),
        float((bounded != values).mean()),
    )
