"""Namesakes of torch.nn's norms."""

from torch import Tensor, nn

from fastbert import functional as F


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm``, its constructor, parameters and formula, through ``fastbert.functional.layer_norm``.

    Under autocast it stays in its input's dtype, where torch's returns float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm``, its constructor, parameters and formula, through ``fastbert.functional.rms_norm``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
