"""Whole verification of real runs that ask other questions than one gradient."""

import pytest
from small_runs import a_spec, quiet

from dpft.harness.records.store import Store
from dpft.harness.records.verifying import verify_folder
from dpft.harness.train import run

RUNS = [
    ("dp-zo", {"directions": 2, "steps": 4}),
    ("dp-adafest", {"tau": 0.0}),
    ("dp-fest", {"choose": "votes"}),
    ("dp-adam", {"clipping": "quantile"}),
    ("dp-adam", {"clipping": "slaclip"}),
]


@pytest.mark.parametrize(("method", "more"), RUNS)
def test_a_run_that_asks_something_else_is_found_right(method, more, tiny_bert, settings, tmp_path):
    one = a_spec(method, tiny_bert, **more)
    record, curve = run.execute(one, settings, quiet)
    assert record["status"] == "done", record["error"]
    Store(tmp_path).write(record, curve)
    (found,) = verify_folder(tmp_path).values()
    assert found.findings == []
