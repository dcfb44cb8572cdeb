"""Compare differentially private fine-tuning methods under one matched, PRV-accounted budget.

    import dpft

    frame = dpft.run(task="sentences", method=["dp-adam", "dp-lora"], epsilon=8)

docs/python.md has more. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["plan", "records", "report", "run"]

# In a checkout the rooms lie beside this folder; installed, they are in it.
if (Path(__file__).parent.parent / "harness" / "api.py").is_file():
    __path__.append(str(Path(__file__).parent.parent))


def __getattr__(name: str):
    if name in __all__:
        from dpft.harness import api

        return getattr(api, name)
    raise AttributeError(f"module 'dpft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
