"""Small random image models and batches of several views."""

import torch
import transformers as hf

from dpft.tasks import batchnorm, heads

BODY = dict(
    hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, image_size=8, patch_size=4
)
CONFIGS = {
    "vit": hf.ViTConfig(**BODY, num_labels=3),
    "deit": hf.DeiTConfig(**BODY, num_labels=3, architectures=["DeiTForImageClassification"]),
    "resnet": hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=3),
    "bottleneck": hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[16], depths=[2], layer_type="bottleneck", num_labels=3
    ),
}


def model_of(kind, views=1, seed=0):
    """A random image model in float64, away from its initial values."""
    torch.manual_seed(seed)
    inner = hf.AutoModelForImageClassification.from_config(CONFIGS[kind])
    batchnorm.convert(inner)
    model = heads.image_classifier()(inner, []).double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.views = views
    return model


def batch_of(size, views, side=8):
    torch.manual_seed(1)
    pixels = torch.randn(size, views, 3, side, side, dtype=torch.float64)
    return {"pixel_values": pixels if views > 1 else pixels[:, 0], "labels": torch.arange(size) % 3}
