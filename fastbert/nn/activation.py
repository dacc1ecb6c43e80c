"""Namesakes of torch.nn's GELU and Softmax."""

from torch import Tensor, nn

from fastbert import functional as F


class GELU(nn.GELU):
    """``torch.nn.GELU`` through ``fastbert.functional.gelu``; ``approximate`` also takes "quick" (x · sigmoid(1.702 x))."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, self.approximate)


class Softmax(nn.Softmax):
    """``torch.nn.Softmax`` through ``fastbert.functional.softmax``.

    Two documented differences: where everything is −inf the result is zeros, torch's is NaN; and under autocast it stays in its
    input's dtype, where torch's returns float32. Of a scalar, and without a ``dim``, which torch guesses with a warning, torch
    answers.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.dim is None or input.dim() == 0:
            return super().forward(input)
        return F.softmax(input, self.dim)
