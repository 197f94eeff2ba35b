"""The procedure as the paper's text has it, in plain loops; nothing here is shared with what it checks."""

import math


def scores(weight, inputs=None):
    """S_ij = |W_ij| · ‖X_j‖₂ (without inputs |W_ij|); `inputs` are tokens × features."""
    norms = [1.0] * len(weight[0])
    if inputs is not None:
        norms = [math.sqrt(sum(token[j] ** 2 for token in inputs)) for j in range(len(weight[0]))]
    return [[abs(w) * norms[j] for j, w in enumerate(row)] for row in weight]


def lowest(values, count):
    """The positions of the `count` lowest values; among equals the first."""
    positions = sorted(range(len(values)), key=lambda position: (values[position], position))
    return set(positions[:count])


def keep_by_row(score, count):
    return [[j not in lowest(row, count) for j in range(len(row))] for row in score]


def keep_by_layer(score, count):
    width = len(score[0])
    removed = lowest([value for row in score for value in row], count)
    return [[i * width + j not in removed for j in range(width)] for i in range(len(score))]


def keep_n_of_m(score, n, m):
    keep = []
    for row in score:
        kept = []
        for start in range(0, len(row), m):
            removed = lowest(row[start : start + m], m - n)
            kept += [j not in removed for j in range(m)]
        keep.append(kept)
    return keep
