"""Rows of numbers: clipped in float64, dense and sparse alike, refused where they are no rows of these examples."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpft.harness.errors import BadInput
from dpft.harness.train.row_sum import Rows

numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
tables = st.integers(1, 5).flatmap(
    lambda size: st.lists(st.lists(numbers, min_size=size, max_size=size), min_size=1, max_size=6)
)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(rows=tables, bound=st.floats(1e-3, 1e3), sparse=st.booleans())
def test_every_row_is_cut_to_the_bound_and_a_short_one_is_left_as_it_is(rows, bound, sparse):
    rows = torch.tensor(rows, dtype=torch.float64)
    for row in rows:
        one = Rows(len(row), bound)
        one.add(row[None].to_sparse() if sparse else row[None], 1)
        length = float(one.total().double().norm())
        assert length <= bound * (1 + 1e-6)
        if float(row.norm()) <= bound:
            assert torch.equal(one.total(), row.float())
        elif float(row.norm()) > 1e-3:
            assert length == pytest.approx(bound, rel=1e-5)
    together = Rows(rows.shape[1], bound)
    norms = together.add(rows.to_sparse() if sparse else rows, len(rows))
    assert torch.allclose(norms, rows.norm(dim=1), rtol=1e-12)
    cut = rows * (bound / rows.norm(dim=1).clamp_min(bound))[:, None]
    assert torch.allclose(together.total().double(), cut.sum(0), rtol=1e-5, atol=1e-6 * bound)


def test_sums_and_norms_are_float64_whatever_comes():
    """In float32 the square of 1e25 is infinite, and 1 is lost beside 1e8."""
    huge = Rows(2, 1.0)
    assert float(huge.add(torch.full((1, 2), 1e25), 1)) == pytest.approx(2**0.5 * 1e25, rel=1e-6)
    assert torch.allclose(huge.total(), torch.full((2,), 0.5**0.5))
    many = Rows(1, 1e9)
    for value in (1e8, *[1.0] * 16, -1e8):
        many.add(torch.tensor([[value]]), 1)
    assert float(many.total()) == 16.0
    counts = Rows(1, 2.0)
    assert counts.add(torch.tensor([[1], [3], [0]]), 3).tolist() == [1.0, 3.0, 0.0]
    assert counts.total().dtype == torch.float32 and float(counts.total()) == 3.0


def test_entries_of_a_sparse_row_that_stand_twice_are_one_number():
    rows = torch.sparse_coo_tensor([[0, 0, 1], [2, 2, 0]], [3.0, 4.0, 1.0], (3, 4))
    found = Rows(4, 3.5)
    assert found.add(rows, 3).tolist() == [7.0, 1.0, 0.0]
    assert found.total().tolist() == [1.0, 0.0, 3.5, 0.0]


def test_each_row_may_have_a_bound_of_its_own():
    found = Rows(1, 5.0)
    found.add(torch.tensor([[9.0], [9.0], [1.0]]), 3, torch.tensor([2.0, 0.0, 3.0]))
    assert float(found.total()) == 3.0


def test_nothing_was_there():
    assert torch.equal(Rows(3, 1.0).total(), torch.zeros(3))
    none = Rows(3, 1.0)
    assert none.add(torch.zeros(0, 3), 0).shape == (0,) and torch.equal(none.total(), torch.zeros(3))


@pytest.mark.parametrize("shape", [(4, 2), (3,), (3, 3), (1, 2), (2,), (3, 2, 1)])
def test_another_shape_is_refused(shape):
    """One row for all, a row too many, a column too few: whose numbers they are is not known."""
    with pytest.raises(BadInput, match=r"2 numbers of 3 examples was answered in shape .*return \[3, 2\]"):
        Rows(2, 1.0).add(torch.zeros(shape), 3)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_that_is_none_is_refused(bound):
    with pytest.raises(BadInput, match="must be finite and positive"):
        Rows(1, bound)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sparse", [False, True])
def test_what_is_not_finite_shows_in_the_norm(bad, sparse):
    rows = torch.tensor([[1.0, bad], [1.0, 0.0]])
    norms = Rows(2, 1.0).add(rows.to_sparse() if sparse else rows, 2)
    assert torch.isfinite(norms).tolist() == [False, True]
