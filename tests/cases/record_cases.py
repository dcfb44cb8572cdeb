"""The smallest record that a store takes, and its curve."""


def record(run_id="abc", final=0.5, seconds=1.0):
    return {
        "schema": 1,
        "run_id": run_id,
        "status": "done",
        "spec": {"seed": 0},
        "privacy": None,
        "result": {"final": final},
        "cost": {"train_s": seconds},
        "diagnostics": {"private": False},
        "provenance": {},
        "error": None,
    }


CURVE = [{"step": 1, "metric": None}, {"step": 2, "metric": 0.5}]
