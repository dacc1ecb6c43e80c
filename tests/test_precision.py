"""The precisions of a block and a model: what they compute, how exact they are, and where they end."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastbert
from fastbert import functional as F
from fastbert.models import BertModel
from fastbert.nn import PRECISIONS, BlockOptions, BlockWeights, TransformerBlock, transformer_block
from tests.bert_samples import batch, minilm_folder, saved_bert

_C = pytest.importorskip("fastbert._C", reason="the extension is not built")
ISAS = _C.isas()
CU_SEQLENS = torch.tensor([0, 5, 5, 22, 41], dtype=torch.int32)
VARIANTS = {
    "post": {},
    "pre": {"norm_first": True},
    "causal": {"norm_first": True, "causal": True, "activation": "gelu_tanh"},
    "no-bias": {"bias": False, "activation": "silu"},
}


@pytest.fixture(params=ISAS)
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def _block(dtype=torch.float32, **options) -> tuple[TransformerBlock, Tensor]:
    block = TransformerBlock(48, 3, 70, eps=1e-5, dtype=dtype, **options).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    return block, torch.randn(41, 48, dtype=dtype)


def _one_by_one(block: TransformerBlock, x: Tensor, options: BlockOptions | None = None) -> Tensor:
    """The same block without the call that runs all of it: a dispatch mode looks on."""

    class Looking(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            return function(*arguments, **(keywords or {}))

    with Looking(), torch.no_grad():
        return transformer_block(x, CU_SEQLENS, 19, block.weights(), options or block.options)


def _separate(block: TransformerBlock) -> BlockWeights:
    """Its weights with query, key and value as parameters of their own."""
    weights = block.weights()
    three = [
        None if each is None else tuple(torch.nn.Parameter(part.detach().clone()) for part in each.chunk(3))
        for each in weights[:2]
    ]
    return weights._replace(qkv_weight=three[0], qkv_bias=three[1])


@torch.no_grad()
def _run(block: TransformerBlock, x: Tensor) -> Tensor:
    return block(x, CU_SEQLENS, 19)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_separate_query_key_and_value_are_packed_as_one(isa, variant, precision):
    if isa == "baseline" and precision == "fp32":
        pytest.skip("nothing is packed")
    block, x = _block(precision=precision, **VARIANTS[variant])
    weights = _separate(block)
    fastbert.drop_packed_weights()

    def run():
        return transformer_block(x, CU_SEQLENS, 19, weights, block.options)

    assert torch.equal(run(), _run(block, x))
    assert fastbert.packed_weights_info().count == 5  # two of query, key and value, three that both use
    tensors = [weights.qkv_weight[1]] if weights.qkv_bias is None else [weights.qkv_weight[1], weights.qkv_bias[2]]
    for tensor, whole in zip(tensors, (block.attention.qkv.weight, block.attention.qkv.bias), strict=False):
        tensor.add_(0.5)
        begin = 48 if whole is block.attention.qkv.weight else 96
        whole[begin : begin + 48] += 0.5
        assert torch.equal(run(), _run(block, x))


@torch.no_grad()
def test_a_key_without_bias_has_one_of_zeros():
    block, x = _block()
    weights = _separate(block)
    block.attention.qkv.bias[48:96] = 0.0
    query, _, value = weights.qkv_bias
    for bias in ((query, None, value), (None, None, None)):
        if bias[0] is None:
            block.attention.qkv.bias.zero_()
        actual = transformer_block(x, CU_SEQLENS, 19, weights._replace(qkv_bias=bias), block.options)
        assert torch.equal(actual, _run(block, x))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_in_one_call_is_its_operations_one_by_one(isa, variant, precision):
    block, x = _block(precision=precision, **VARIANTS[variant])
    whole = _run(block, x)
    tolerance = {"fp32": 2e-6, "bf16": 2e-2, "int8": 5e-2}[
        precision
    ]  # a bit of bfloat16 more or less, and what follows
    scale = whole.abs().max()
    assert (whole - _one_by_one(block, x)).abs().max() <= tolerance * scale
    with fastbert.use_reference():
        assert (whole - _run(block, x)).abs().max() <= tolerance * scale


@pytest.mark.parametrize("variant", VARIANTS)
def test_errors_against_float64(isa, variant):
    block, x = _block(**VARIANTS[variant])
    with fastbert.use_reference():
        exact = _run(block.double(), x.double())
    block.float()
    errors = {}
    for precision in PRECISIONS:
        block.precision = precision
        errors[precision] = ((_run(block, x) - exact).abs().max() / exact.abs().max()).item()
    assert errors["fp32"] < 2e-6
    assert 1e-4 < errors["bf16"] < 2e-2
    assert errors["bf16"] < errors["int8"] < 8e-2


def test_parameters_in_bfloat16():
    for precision in PRECISIONS:
        block, x = _block(torch.bfloat16, precision=precision)
        y = _run(block, x)
        with fastbert.use_reference():
            expected = _run(block, x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected, rtol=0.05, atol=0.1)


def test_no_gradient_and_a_clear_way_out():
    block, x = _block(precision="int8")
    with pytest.raises(RuntimeError, match=r"'int8' is for inference.*no_grad"):
        block(x, CU_SEQLENS, 19)
    block.precision = "fp32"
    block(x, CU_SEQLENS, 19).sum().backward()


BAD = {
    "block": lambda: TransformerBlock(48, 3, precision="fp8"),
    "options": lambda: BlockOptions(3, precision="half"),
    "setter": lambda: setattr(_block()[0], "precision", "int4"),
    "model": lambda: BertModel.from_pretrained("nowhere", precision="int16"),
    "linear": lambda: F.linear_act(torch.ones(2, 3), torch.ones(4, 3), precision="fp16"),
}


@pytest.mark.parametrize("name", BAD)
def test_unknown_precisions(name):
    with pytest.raises(ValueError, match=r"precision is '\w+'; expected one of 'fp32', 'bf16', 'int8'"):
        BAD[name]()


def test_a_result_dtype_belongs_to_a_reduced_precision():
    with pytest.raises(ValueError, match="with precision 'fp32' the result has input's"):
        F.linear_act(torch.ones(2, 3), torch.ones(4, 3), dtype=torch.bfloat16)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_compiled_in_one_graph(precision):
    block, x = _block(precision=precision)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, CU_SEQLENS, 19), _one_by_one(block, x))


def test_wrong_boundaries_raise_what_attention_raises():
    block, x = _block()
    with torch.no_grad():
        for wrong, message in (
            ([0, 5, 60], "from 0 to 60"),
            ([0, 30, 20, 41], "decreases"),
            ([0, 41], "sequence of 41"),
            ([], r"shape \[0\]"),
        ):
            with pytest.raises(ValueError, match=message):
                block(x, torch.tensor(wrong, dtype=torch.int32), 19)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_that_do_not_fit_raise_what_the_operations_raise(precision):
    block, x = _block(precision=precision)
    fitting, cases = block.weights(), []
    cases.append((fitting._replace(out_weight=torch.nn.Parameter(torch.ones(48, 47))), r"weight \[48, 47\]"))
    cases.append((fitting._replace(up_weight=torch.nn.Parameter(torch.ones(70, 48, device="meta"))), "meta"))
    cases.append((fitting._replace(up_bias=torch.ones(71)), r"expected \[70\]"))
    for weights, message in cases:
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            transformer_block(x, CU_SEQLENS, 19, weights, block.options)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", [8, 64])
def test_rows_of_another_width_than_the_first_ones(precision, width):
    block, x = _block(precision=precision)
    _run(block, x)
    with pytest.raises(ValueError, match=rf"\[41, {width}\]"):
        _run(block, torch.randn(41, width))


class Doubled(torch.Tensor):
    """A weight that is computed where it is used, as quantized ones are: it has no memory of its own."""

    @staticmethod
    def __new__(cls, half):
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype)

    def __init__(self, half):
        self.half_of_it = half

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        plain = torch.utils._pytree.tree_map_only(cls, lambda t: 2.0 * t.half_of_it, (arguments, keywords or {}))
        result = function(*plain[0], **plain[1])
        return cls(result / 2.0) if function is torch.ops.aten.detach.default else result


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["qkv_weight", "down_weight", "up_bias"])
def test_weights_of_a_tensor_subclass(precision, name):
    block, x = _block(precision=precision)
    fitting = block.weights()
    half = torch.nn.Parameter(Doubled(getattr(fitting, name).detach() / 2.0), requires_grad=False)
    with torch.no_grad():
        actual = transformer_block(x, CU_SEQLENS, 19, fitting._replace(**{name: half}), block.options)
    tolerance = {"fp32": 2e-6, "bf16": 2e-2, "int8": 5e-2}[precision]
    torch.testing.assert_close(actual, _run(block, x), rtol=0.0, atol=tolerance * actual.abs().max().item())


def test_a_tangent_is_not_dropped():
    block, x = _block()
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        block(forward_ad.make_dual(x, torch.ones_like(x)), CU_SEQLENS, 19)


def test_nothing_is_packed_of_weights_whose_changes_cannot_be_noticed(monkeypatch):
    with torch.inference_mode():
        block, x = _block()
    monkeypatch.setattr("fastbert.cpu.packed_weights.PackedWeight", None)
    with torch.inference_mode():
        _run(block, x)


def test_a_model_has_one_precision(tmp_path):
    folder = saved_bert(tmp_path)
    model = BertModel.from_pretrained(folder, precision="int8")
    assert model.precision == "int8" and {layer.precision for layer in model.layers} == {"int8"}
    assert "int8" in repr(model)
    ids, mask, _ = batch("right")
    with torch.no_grad():
        integers = model(ids, mask).last_hidden_state
        model.precision = "fp32"
        full = model(ids, mask).last_hidden_state
        assert torch.equal(full, BertModel.from_pretrained(folder)(ids, mask).last_hidden_state)
    assert not torch.equal(integers, full)
    assert model.state_dict().keys() == BertModel.from_pretrained(folder).state_dict().keys()


def test_embeddings_of_minilm():
    """What README says of the precisions: cosine and largest difference to float32."""
    encoder = fastbert.SentenceEncoder.from_pretrained(minilm_folder())
    texts = [
        "A cat sits on the mat.",
        "Quantum chromodynamics describes quarks and gluons.",
        "ok",
        "one two three " * 30,
    ]
    full = encoder.encode(texts, normalize=True)
    for precision, cosine, largest in (("bf16", 0.9999, 2e-3), ("int8", 0.975, 5e-2)):
        encoder.precision = precision
        reduced = encoder.encode(texts, normalize=True)
        assert (reduced * full).sum(1).min() > cosine
        assert 0.0 < (reduced - full).abs().max() < largest
