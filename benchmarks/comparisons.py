"""How measurements are compared: the floors of a pass, a baseline at the speed of ours, and the answers."""

import numpy as np
from processes import Part


def at_speed_of(ours: Part, base: Part, key: str = "wall") -> float:
    """Return a baseline's seconds at the speed that the machine had while ours was measured."""
    return float(base[key] * ours["floor"]["linears"] / base["floor"]["linears"])


def as_timed(base: Part, key: str = "wall") -> str:
    """Say a baseline's seconds as they were measured, and the speed of the machine then."""
    return f"the baseline took {base[key]:.0f} s at {base['floor']['gflops_linears']:.0f} GFLOP/s"


def pass_floor(floor: Part, windows: int, length: int, *, head: bool = False) -> float:
    """Return the seconds of all linears and of the causal half of attention, for windows one by one."""
    tokens = windows * length
    pairs = windows * length**2 / 2
    each = floor["linears"] + (floor["head"] if head else 0)
    return tokens * each + pairs * floor["attention_flops_a_pair"] * floor["attention"]


def needed_floor(floor: Part, stock: Part) -> tuple[float, int]:
    """Return the seconds and tokens of each context once and its choices after it, with the head where it is read.

    The last token of a choice is not fed. The first tokens of all choices are predicted at the context's last position.
    """
    tokens = positions = pairs = 0
    for task in stock["tasks"].values():
        for question in task["needed"]:
            for context, choices in question:
                after = [choice - 1 for choice in choices]
                tokens += context + sum(after)
                positions += 1 + sum(after)
                pairs += context**2 / 2 + sum(fed * context + fed**2 / 2 for fed in after)
    attention = pairs * floor["attention_flops_a_pair"] * floor["attention"]
    return tokens * floor["linears"] + positions * floor["head"] + attention, tokens


def other_answers(ours: Part, stock: Part, tolerance: float) -> tuple[int, int, float]:
    """Count the items that are answered differently; also return the largest difference of a log-likelihood.

    The first count is of items whose two best choices differ by more than the tolerance in stock lm-eval, the second
    of the others.
    """
    far = close = 0
    theirs_by_task = of_stock(stock)
    for task, answers in ours["loglikelihoods"].items():
        for mine, theirs in zip(answers, theirs_by_task[task], strict=True):
            if np.argmax(mine) != np.argmax(theirs):
                second, best = sorted(theirs)[-2:]
                far, close = (far + 1, close) if best - second > tolerance else (far, close + 1)
    return far, close, furthest_apart(ours["loglikelihoods"], theirs_by_task)


def of_stock(stock: Part) -> Part:
    """Return stock lm-eval's log-likelihoods by task, in the form of ours."""
    return {task: found["loglikelihoods"] for task, found in stock["tasks"].items()}


def furthest_apart(one: Part, other: Part) -> float:
    """Return the largest difference of a log-likelihood; both are by task, item and choice."""
    return max(
        abs(a - b)
        for task, answers in one.items()
        for mine, theirs in zip(answers, other[task], strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )
