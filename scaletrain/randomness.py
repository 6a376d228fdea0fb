"""The global generators of torch on the CPU, NumPy and Python: what reading an example may draw from."""

import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed the global generators of torch on the CPU, NumPy and Python."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


def random_states() -> tuple[Any, ...]:
    """Return where the generators stand."""
    return torch.default_generator.get_state(), random.getstate(), np.random.get_state()


def set_random_states(states: tuple[Any, ...]) -> None:
    """Put the generators back to where they stood."""
    torch.default_generator.set_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


def drew(before: tuple[Any, ...]) -> bool:
    """Whether somebody has drawn from a global generator since ``before``."""
    now = random_states()
    return not torch.equal(now[0], before[0]) or now[1] != before[1] or str(now[2]) != str(before[2])
