"""Per-example gradients: the factored engine (default), Opacus's grad samplers, and the slow reference."""

from dpft.harness.errors import unknown

NAMES = ("factored", "opacus", "reference")


def engine_class(name: str):
    """The engine called `name`. Raises BadInput with the nearest match. Imports torch only here."""
    if name == "factored":
        from dpft.harness.engine.factored import FactoredEngine

        return FactoredEngine
    if name == "opacus":
        from dpft.harness.engine.opacus import OpacusEngine

        return OpacusEngine
    if name == "reference":
        from dpft.harness.engine.reference import ReferenceEngine

        return ReferenceEngine
    raise unknown("engine", name, NAMES)
