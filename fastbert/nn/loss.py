"""Namesakes of torch.nn's cross-entropy losses."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as TF
from torch.nn.modules.loss import _WeightedLoss

from fastbert import functional as F


def _has_indices(target: Tensor) -> bool:
    return target.dtype == torch.int64


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` through ``fastbert.functional.cross_entropy``.

    Class indices for logits [classes] or [rows, classes] without class weights take the fast way; class weights, class
    probabilities and [rows, classes, d1, …] go to torch's function. One documented difference: on the fast way losses of 16-bit
    logits are float32, where torch rounds them to the logits' dtype.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        fast = (
            self.weight is None
            and _has_indices(target)
            and 1 <= input.dim() <= 2
            and target.dim() == input.dim() - 1
            and input.shape[-1] > 0
        )
        if not fast:
            return super().forward(input, target)
        return F.cross_entropy(
            input,
            target,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class LinearCrossEntropyLoss(_WeightedLoss):
    """Cross-entropy of a linear layer's outputs without these outputs in memory: a language model's head and its loss.

    The constructor and state of ``torch.nn.LinearCrossEntropyLoss`` (which torch has from 2.13 on), through
    ``fastbert.functional.linear_cross_entropy``. Class weights, class probabilities and further output dimensions go to a linear
    layer and torch's cross-entropy. One documented difference: on the fast way losses of 16-bit inputs are float32.

    Args:
        in_features: width of the input.
        num_classes: of the linear layer.
        out_features: further dimensions (d1, …) of its output, each with a loss of its own.
        bias: whether the linear layer has one.
        reduction: "mean" over the rows that count, "sum", or "none".
        weight: [num_classes], class weights.
        ignore_index: rows with this target have loss 0 and do not count in the mean; None: −100 for class indices.
        label_smoothing: in [0, 1].
        options: torch's choice of chunks. Not looked at: chunks are chosen by the kernel, and repeated backward passes work.
    """

    ignore_index: int | None
    label_smoothing: float

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        if weight is not None and tuple(weight.shape) != (num_classes,):
            raise ValueError(f"weight has shape {list(weight.shape)}; expected [{num_classes}], one a class")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing is {label_smoothing}; expected a number in [0, 1]")
        super().__init__(weight, reduction=reduction)
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.linear = nn.Linear(
            in_features, math.prod(self.out_features, start=num_classes), bias=bias, device=device, dtype=dtype
        )

    def forward(
        self,
        input: Tensor,  # [in_features] or [rows, in_features]
        target: Tensor,  # int64 [], [rows] or [rows, *out_features]; or probabilities with the classes at dimension 1
    ) -> Tensor:
        """A scalar, or target's shape without reduction."""
        linear = self.linear
        ignore_index = -100 if self.ignore_index is None else self.ignore_index
        if self.weight is None and not self.out_features and _has_indices(target) and target.dim() == input.dim() - 1:
            return F.linear_cross_entropy(
                input,
                linear.weight,
                target,
                linear.bias,
                ignore_index=ignore_index,
                reduction=self.reduction,
                label_smoothing=self.label_smoothing,
            )
        logits = linear(input).unflatten(-1, (self.num_classes, *self.out_features))
        return TF.cross_entropy(
            logits,
            target,
            self.weight,
            ignore_index=ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, out_features={self.out_features}, "
            f"bias={self.linear.bias is not None}, reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )
