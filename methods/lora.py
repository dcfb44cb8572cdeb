"""Low-rank adapters through PEFT: DP-LoRA (Yu et al., 2110.06500) and FFA-LoRA (Sun et al., 2403.12313)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dpft.methods.base import Method

if TYPE_CHECKING:
    import torch
    from torch import nn

# Attention projections by the names the architectures give them; the first group that a model has is used.
TARGETS = (
    ("query", "key", "value"),  # BERT, RoBERTa, ELECTRA
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa-v2
    ("q_proj", "k_proj", "v_proj"),  # OPT, Llama, Qwen
    ("c_attn",),  # GPT-2
)


class DPLoRA(Method):
    """Rank-r adapters on the attention projections, and the task's head; everything else frozen.

    alpha/r scales the adapters' gradients, so the clip norm and lr move with it. LoRA dropout is 0.
    """

    name = "dp-lora"
    summary = "low-rank adapters and head (PEFT)"
    reference = "arXiv:2110.06500"
    defaults: ClassVar = {"optimizer": "adam", "lr": 3e-4, "clip_norm": 2.0}
    options: ClassVar = {"rank": 8, "alpha": 16, "targets": "attention", "head_lr_factor": 30.0}

    def skip(self, model: nn.Module) -> str | None:
        if self.settings["targets"] == "attention" and not self._targets(model):
            return f"{self.name} knows no attention projections of this model; set `targets` to module names."
        return None

    def prepare(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        import torch
        from peft import LoraConfig, inject_adapter_in_model

        head = set(model.head_parameters)
        model.requires_grad_(False)
        config = LoraConfig(
            r=self.settings["rank"],
            lora_alpha=self.settings["alpha"],
            lora_dropout=0.0,
            target_modules=self._targets(model),
            init_lora_weights=self._start(),
        )
        with torch.random.fork_rng(devices=[]):  # PEFT draws A from the global generator
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            model = inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in head or self._trains(name))
        return model

    def _start(self) -> bool | str:
        """How PEFT fills the factors: A at random, B with zeros."""
        return True

    def _trains(self, name: str) -> bool:
        return "lora_" in name

    def _targets(self, model: nn.Module) -> list[str]:
        if self.settings["targets"] != "attention":
            return self.settings["targets"].split(",")
        ends = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        return next((list(group) for group in TARGETS if ends.issuperset(group)), [])


class FFALoRA(DPLoRA):
    """LoRA with A random and frozen: the product of two noised factors is avoided, B and the head train."""

    name = "ffa-lora"
    summary = "LoRA with A frozen at random; B and head train"
    reference = "arXiv:2403.12313"

    def _trains(self, name: str) -> bool:
        return "lora_B" in name
