"""Peak memory of one training step, predicted from shapes alone: no weights, no GPU, no data."""
