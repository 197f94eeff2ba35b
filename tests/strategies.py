"""Hypothesis strategies: matrices of few distinct values."""

import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

# Few distinct values, so that ties, zeros and constant rows are the rule; and a huge one.
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1e30])


@st.composite
def matrices(draw, columns=None):
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 12) if columns is None else columns)
    return torch.from_numpy(draw(arrays.arrays("float32", shape, elements=VALUES)))
