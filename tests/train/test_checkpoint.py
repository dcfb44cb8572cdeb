"""The file of a run in flight: what it holds comes back, and writing it copies no more than it must."""

import torch

from dpft.harness.train import checkpoint


def awkward():
    """Tied weights, a transposed parameter, views of one storage, an expanded row, a scalar and nothing."""
    table, whole = torch.randn(5, 3), torch.arange(12.0)
    return {
        "table": torch.nn.Parameter(table),
        "tied": torch.nn.Parameter(table),
        "transposed": torch.nn.Parameter(torch.randn(4, 6).t()),
        "first": whole[:4],
        "last": whole[4:].view(2, 4),
        "row": torch.ones(3).expand(2, 3),
        "step": torch.tensor(3.0),
        "empty": torch.zeros(0, 2),
        "half": torch.randn(3).bfloat16(),
        "state": torch.arange(5, dtype=torch.uint8),
    }


def test_awkward_tensors_come_back(tmp_path):
    tensors, state = awkward(), {"progress": {"step": 3}, "lr": 0.1}
    checkpoint.save(tmp_path / "a.ckpt", "run", tensors, state)
    found, plain = checkpoint.load(tmp_path / "a.ckpt", "run")
    assert plain == state and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert checkpoint.load(tmp_path / "a.ckpt", "another run") is None


def test_only_what_must_be_is_copied():
    tensors = awkward()
    alone = checkpoint._alone(tensors)
    copied = {name for name, t in tensors.items() if t.numel() and alone[name].data_ptr() != t.data_ptr()}
    assert copied == {"tied", "transposed", "last", "row"}
