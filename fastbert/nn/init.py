"""BERT's initialisation (Devlin et al. 2019): weights normal(0, 0.02), biases 0, layer norms 1 and 0."""

import torch
from torch import nn


@torch.no_grad()
def initialize(module: nn.Module, std: float = 0.02) -> None:
    """Fills the parameters of ``module`` and of everything in it, in the order of ``modules()``.

    Linear and embedding weights are drawn from normal(0, std), a ``padding_idx`` row is 0, biases are 0 and layer norms
    the identity.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            part.weight.normal_(0.0, std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            part.bias.zero_()
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            part.weight[part.padding_idx].zero_()
        if isinstance(part, nn.LayerNorm):
            part.reset_parameters()
