"""Activations and their derivatives on float32 tiles, in few instructions: at the rate of memory, arithmetic is not free.

An H200 issues 132 * 4 * 32 lanes * 1.755 GHz = 29.6e12 instructions a second, and in a second it reads and writes 1.08e12
bfloat16 elements (4.3 TB/s): 27 instructions for each. CUDA's erff alone takes 30 of them (sm_90's assembly), a division 9 with its
care for denormal numbers. So 1 / x is rsqrt(x)^2 here, and exact GELU a formula of its own, 15 instructions.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_TANH_SCALE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
_TANH_CUBIC = tl.constexpr(0.044715)  # Hendrycks and Gimpel 2016, section 2
_QUICK_SLOPE = tl.constexpr(1.702)  # the same paper's sigmoid approximation
_DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)

# The normal distribution's upper tail as Hastings (1955) writes it: for a >= 0 and t = 1 / (1 + _TAIL_SLOPE * a),
#     1 - Phi(a) = exp(-a^2 / 2) * (_TAIL_1 * t + ... + _TAIL_6 * t^6).
# Slope and coefficients are those of the least absolute error, 5e-9; an ulp of Phi in float32 is 6e-8.
_TAIL_SLOPE = tl.constexpr(0.275)
_TAIL_1 = tl.constexpr(0.117816508)
_TAIL_2 = tl.constexpr(0.0420637242)
_TAIL_3 = tl.constexpr(0.334057242)
_TAIL_4 = tl.constexpr(-0.331155747)
_TAIL_5 = tl.constexpr(0.452103496)
_TAIL_6 = tl.constexpr(-0.114885211)


@triton.jit
def _sigmoid(z):
    """sigmoid(z) and 1 - sigmoid(z), neither with the cancellation of 1 - something near 1."""
    e = tl.exp2(z * -_LOG2_E)
    root = tl.rsqrt(1.0 + e)
    s = root * root
    return s, tl.where(z < 0.0, 1.0 - s, e * s)


@triton.jit
def activate(z, NAME: tl.constexpr):
    """The activation of a float32 tile and its derivative there; what is not used costs nothing."""
    if NAME == "gelu":
        magnitude = tl.abs(z)
        u = 1.0 + _TAIL_SLOPE * magnitude
        t = tl.rsqrt(u * u)
        series = _TAIL_5 + _TAIL_6 * t
        series = _TAIL_4 + series * t
        series = _TAIL_3 + series * t
        series = _TAIL_2 + series * t
        series = _TAIL_1 + series * t
        e = tl.exp2(z * z * (-0.5 * _LOG2_E))
        excess = 0.5 - e * (series * t)  # Phi(|z|) - 1/2
        result = 0.5 * z + magnitude * excess
        derivative = 0.5 + tl.where(z < 0.0, -excess, excess) + z * (e * _DENSITY_AT_0)
    elif NAME == "gelu_tanh":
        # (1 + tanh(v)) / 2 = sigmoid(2 v). From |z| = 100 on it is 0 or 1, and the bound keeps 0 * infinity away.
        square = tl.minimum(z * z, 10000.0)
        s, rest = _sigmoid(z * (2.0 * _TANH_SCALE + (2.0 * _TANH_SCALE * _TANH_CUBIC) * square))
        result = z * s
        slope = 2.0 * _TANH_SCALE + (6.0 * _TANH_SCALE * _TANH_CUBIC) * square
        derivative = s + result * rest * slope
    elif NAME == "gelu_quick":
        s, rest = _sigmoid(z * _QUICK_SLOPE)
        result = z * s
        derivative = s + result * rest * _QUICK_SLOPE
    elif NAME == "silu":
        s, rest = _sigmoid(z)
        result = z * s
        derivative = s + result * rest
    elif NAME == "sigmoid":
        result, rest = _sigmoid(z)
        derivative = result * rest
    else:
        tl.static_assert(NAME == "relu", "an unknown activation")
        result = tl.where(z < 0.0, 0.0, z)  # NaN stays NaN
        derivative = tl.where(z > 0.0, 1.0, 0.0)
    return result, derivative
