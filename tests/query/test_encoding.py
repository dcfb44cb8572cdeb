"""What an encoding's updates can move, counted and seen."""

import pytest
import torch

from dpft.harness.query.encoding import IDENTITY, Encoding

NONE, DENSE, TO_NOTHING = None, torch.ones(6, 2), torch.zeros(6, 0)
ROWS, EMPTY = torch.tensor([1, 4, 5]), torch.zeros(0, dtype=torch.long)


@pytest.mark.parametrize("shape", [(6,), (6, 6), (6, 2, 3)])
@pytest.mark.parametrize("right", [NONE, DENSE, TO_NOTHING, ROWS, EMPTY])
@pytest.mark.parametrize("left", [NONE, DENSE, TO_NOTHING, ROWS, EMPTY])
def test_reach_is_what_a_lifted_update_fills(left, right, shape):
    encoding, shape = Encoding(left, right, scale=2.0), torch.Size(shape)
    filled = encoding.lift(torch.ones(encoding.shape(shape)), shape)
    assert encoding.reach(shape) == int((filled != 0).sum())


def test_the_identity_moves_everything_scalars_included():
    assert [IDENTITY.reach(torch.Size(shape)) for shape in ((), (4,), (2, 3, 5), (0, 3))] == [1, 4, 30, 0]
