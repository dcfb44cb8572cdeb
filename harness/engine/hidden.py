"""What changes a layer without changing its type: a rule by type cannot see it, so it is refused by name."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from dpft.harness.errors import CannotRun


def ordinary(module: nn.Conv1d | nn.Conv2d) -> bool:
    """Whether a convolution computes what its base class does, also where it is of a subclass."""
    base = nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d
    return type(module).forward is base.forward and type(module)._conv_forward is base._conv_forward


def refuse_hidden(path: str, module: nn.Module, by_type: bool) -> None:
    """Raise CannotRun for a layer whose parameters are not what it computes with.

    by_type: the layer's rule follows from its type; otherwise its own `forward` is differentiated, which hooks are no part of.
    """
    kind = type(module).__name__
    if isinstance(module, parametrize.ParametrizationList):
        raise CannotRun(
            f"Layer {path.partition('.parametrizations')[0]} is parametrised, so what trains is not what it computes with; "
            "remove the parametrisation (torch.nn.utils.parametrize.remove_parametrizations) or use --engine reference."
        )
    if module._backward_hooks or module._backward_pre_hooks:
        raise CannotRun(
            f"Layer {path} ({kind}) has a backward hook, which no rule sees; remove it or use --engine reference."
        )
    names = module._parameters.keys()
    made = sorted(name[:-5] for name in names if name.endswith("_orig"))
    made += sorted(name[:-2] for name in names if name.endswith("_g") and f"{name[:-2]}_v" in names)
    if made:
        raise CannotRun(
            f"Layer {path} ({kind}) makes its {made[0]} anew in a hook, as pruning and weight_norm do, so what trains is not "
            "what it computes with; make it permanent (prune.remove, remove_weight_norm) or use --engine reference."
        )
    if by_type and (strange := sorted(names - {"weight", "bias"})):
        raise CannotRun(
            f"Layer {path} ({kind}) holds a parameter {strange[0]} that no {kind} has, so its type does not say what it "
            "computes; give the layer a class of its own with a forward of its own, freeze it, or use --engine reference."
        )
    if not by_type and module._forward_pre_hooks:
        raise CannotRun(
            f"Layer {path} ({kind}) has a forward pre-hook, which may change what it computes with; remove it, freeze the "
            "layer, or use --engine reference."
        )


def refuse_parameter_hooks(parameters: dict[str, nn.Parameter]) -> None:
    """Raise CannotRun for a hook on a parameter's gradient: per-example gradients never pass through it."""
    for name, p in parameters.items():
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            raise CannotRun(
                f"The parameter {name} has a hook on its gradient, which per-example gradients do not pass through; remove it."
            )
