"""How updates reach the parameters: dense ones, lazy ones, and sparse ones that cost what their rows cost."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpft.harness.query import updates
from dpft.harness.query.updates import LazyUpdates, apply, finite


def rows_of(rows, values, shape):
    return torch.sparse_coo_tensor(
        torch.tensor([rows], dtype=torch.int64), values, shape, is_coalesced=True, check_invariants=True
    )


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made inside holds, strided or as values of a sparse one."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = {id(t) for t in (*args, *(kwargs or {}).values()) if torch.is_tensor(t)}
        if torch.is_tensor(out) and id(out) not in inputs:  # not what is changed in place
            self.numbers = max(self.numbers, out._nnz() * out.shape[1] if out.is_sparse else out.numel())
        return out


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("rows", [[1, 4], [], list(range(7))])
def test_a_sparse_update_moves_its_rows_and_no_other(rows, lazy):
    table, bias = nn.Parameter(torch.randn(7, 3)), nn.Parameter(torch.randn(2))
    before, values = table.detach().clone(), torch.randn(len(rows), 3)
    made = {"table": rows_of(rows, values, (7, 3)), "bias": torch.ones(2)}
    made = LazyUpdates(made, lambda name, part: part) if lazy else made
    parameters = {"table": table, "bias": bias}
    assert finite(made)
    apply(torch.optim.SGD(parameters.values(), lr=0.5), parameters, made)
    expected = before.clone()
    expected[rows] -= 0.5 * values
    still = [row for row in range(7) if row not in rows]
    assert torch.allclose(table, expected) and torch.equal(table[still], before[still])
    assert table.grad is None and bias.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_row_that_is_not_finite_is_found(bad, lazy):
    values = torch.ones(2, 3)
    made = {"table": rows_of([0, 5], values, (9, 3)), "bias": torch.ones(2)}
    assert finite(LazyUpdates(made, None) if lazy else made)
    values[1, 2] = bad
    made = {"table": rows_of([0, 5], values, (9, 3)), "bias": torch.ones(2)}
    assert not finite(LazyUpdates(made, None) if lazy else made)


def test_it_costs_what_its_rows_cost():
    table = nn.Parameter(torch.zeros(100_000, 8))
    made = {"table": rows_of([3, 70_000], torch.ones(2, 8), table.shape)}
    optimizer = torch.optim.SGD([table], lr=1.0)
    with Largest() as seen:
        assert finite(made)
        apply(optimizer, {"table": table}, made)
    assert 0 < seen.numbers <= 16 and float(table.detach().sum()) == -16
    with Largest() as seen:
        apply(optimizer, {"table": table}, {"table": made["table"].to_dense()})
    assert seen.numbers == table.numel(), "the measure sees a dense update"


def test_rows_are_bundled_by_their_size(monkeypatch):
    monkeypatch.setattr(updates, "_TOGETHER", 20)
    parameters = {name: nn.Parameter(torch.zeros(10, 2)) for name in "abc"}
    few = {name: rows_of([1, 2], torch.ones(2, 2), (10, 2)) for name in "abc"}
    dense = {name: torch.ones(10, 2) for name in "abc"}
    steps = []
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    optimizer.register_step_post_hook(lambda *a: steps.append(sum(p.grad is not None for p in parameters.values())))
    for made in (few, dense):
        apply(optimizer, parameters, LazyUpdates(made, lambda name, part: part))
    assert steps == [3, 1, 1, 1]
