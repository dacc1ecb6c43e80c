// fastbert._C. Only the files beside this one know Python, and none knows torch: tensors arrive as addresses, sizes and
// strides (in elements), and the caller has checked them. Address 0 stands for an absent tensor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/attention.h"
#include "cpu/attention_backward.h"
#include "cpu/block.h"
#include "cpu/cross_entropy.h"
#include "cpu/dispatch.h"
#include "cpu/embedding.h"
#include "cpu/gated_act.h"
#include "cpu/gelu.h"
#include "cpu/layer_norm.h"
#include "cpu/linear.h"
#include "cpu/rms_norm.h"
#include "cpu/rotary.h"
#include "cpu/softmax.h"
#include "module_state.h"
#include "tokenizer_bindings.h"

namespace py = pybind11;
using namespace fastbert;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void layer_norm_binding(int dtype, int64_t rows, int64_t width, uintptr_t x, int64_t x_stride, uintptr_t weight,
                        uintptr_t bias, int parameter_dtype, float eps, uintptr_t y, uintptr_t mean, uintptr_t rstd,
                        int threads) {
    LayerNormForward a = {};
    a.rows = rows;
    a.width = width;
    a.x = pointer<void>(x);
    a.x_stride = x_stride;
    a.eps = eps;
    a.y = pointer<void>(y);
    a.mean = pointer<float>(mean);
    a.rstd = pointer<float>(rstd);
    const Dtype of_parameters = static_cast<Dtype>(parameter_dtype);
    layer_norm(static_cast<Dtype>(dtype), a, {pointer<void>(weight), of_parameters},
               {pointer<void>(bias), of_parameters}, threads);
}

Dropout dropout(double p, int64_t seed, int64_t offset) {
    Dropout d = {};
    d.on = p > 0.0;
    // min(round(p * 2^32), 2^32 - 1), ties to even as Python rounds
    const double threshold = __builtin_nearbyint(p * 4294967296.0);
    d.threshold = threshold >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(threshold);
    d.scale = p == 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p));
    d.seed = static_cast<uint64_t>(seed);
    d.offset = static_cast<uint64_t>(offset);
    return d;
}

void add_layer_norm_binding(int dtype, int64_t rows, int64_t width, uintptr_t x, int64_t x_stride, uintptr_t residual,
                            int64_t residual_stride, uintptr_t x_bias, int x_bias_dtype, uintptr_t weight,
                            uintptr_t bias, int parameter_dtype, float eps, double dropout_p, int64_t seed,
                            int64_t offset, uintptr_t y, uintptr_t sum, uintptr_t mean, uintptr_t rstd, int threads) {
    AddLayerNormForward a = {};
    a.rows = rows;
    a.width = width;
    a.x = pointer<void>(x);
    a.x_stride = x_stride;
    a.residual = pointer<void>(residual);
    a.residual_stride = residual_stride;
    a.eps = eps;
    a.dropout = dropout(dropout_p, seed, offset);
    a.y = pointer<void>(y);
    a.sum = pointer<void>(sum);
    a.mean = pointer<float>(mean);
    a.rstd = pointer<float>(rstd);
    const Dtype of_parameters = static_cast<Dtype>(parameter_dtype);
    add_layer_norm(static_cast<Dtype>(dtype), a, {pointer<void>(x_bias), static_cast<Dtype>(x_bias_dtype)},
                   {pointer<void>(weight), of_parameters}, {pointer<void>(bias), of_parameters}, threads);
}

void add_layer_norm_backward_binding(int dtype, int64_t rows, int64_t width, uintptr_t grad_y, int64_t grad_y_stride,
                                     uintptr_t grad_sum, int64_t grad_sum_stride, uintptr_t sum, int64_t sum_stride,
                                     uintptr_t mean, uintptr_t rstd, uintptr_t weight, int parameter_dtype,
                                     double dropout_p, int64_t seed, int64_t offset, uintptr_t dx, uintptr_t dresidual,
                                     uintptr_t dx_bias, uintptr_t dweight, uintptr_t dbias, int threads) {
    AddLayerNormBackward a = {};
    a.rows = rows;
    a.width = width;
    a.grad_y = pointer<void>(grad_y);
    a.grad_y_stride = grad_y_stride;
    a.grad_sum = pointer<void>(grad_sum);
    a.grad_sum_stride = grad_sum_stride;
    a.sum = pointer<void>(sum);
    a.sum_stride = sum_stride;
    a.mean = pointer<float>(mean);
    a.rstd = pointer<float>(rstd);
    a.dropout = dropout(dropout_p, seed, offset);
    a.dx = pointer<void>(dx);
    a.dresidual = pointer<void>(dresidual);
    a.dx_bias = pointer<float>(dx_bias);
    a.dweight = pointer<float>(dweight);
    a.dbias = pointer<float>(dbias);
    add_layer_norm_backward(static_cast<Dtype>(dtype), a, {pointer<void>(weight), static_cast<Dtype>(parameter_dtype)},
                            threads);
}

void linear_pack_binding(int precision, uintptr_t weight, int dtype, int64_t stride, int64_t out, int64_t in,
                         uintptr_t packed, int threads) {
    linear_pack(static_cast<Precision>(precision), pointer<void>(weight), static_cast<Dtype>(dtype), stride, out, in,
                pointer<void>(packed), threads);
}

void linear_binding(int precision, int64_t rows, int64_t out, int64_t in, uintptr_t x, int x_dtype, int64_t x_stride,
                    uintptr_t packed, uintptr_t bias, int bias_dtype, int activation, uintptr_t residual,
                    int residual_dtype, int64_t residual_stride, uintptr_t y, int y_dtype, int64_t y_stride,
                    int threads) {
    Linear a = {};
    a.precision = static_cast<Precision>(precision);
    a.rows = rows;
    a.out = out;
    a.in = in;
    a.x = pointer<void>(x);
    a.x_dtype = static_cast<Dtype>(x_dtype);
    a.x_stride = x_stride;
    a.packed = pointer<void>(packed);
    a.bias = {pointer<void>(bias), static_cast<Dtype>(bias_dtype)};
    a.activation = static_cast<Activation>(activation);
    a.residual = pointer<void>(residual);
    a.residual_dtype = static_cast<Dtype>(residual_dtype);
    a.residual_stride = residual_stride;
    a.y = pointer<void>(y);
    a.y_dtype = static_cast<Dtype>(y_dtype);
    a.y_stride = y_stride;
    linear(a, threads);
}

// Strides as Python gives them: [batch, head, token, element] of a dense tensor, without batch of a packed one.
AttentionOperand operand(uintptr_t address, const py::tuple& strides) {
    const auto at = [&](size_t i) { return strides[i].cast<int64_t>(); };
    if (strides.size() == 4) return {pointer<void>(address), at(0), at(1), at(2), at(3)};
    return {pointer<void>(address), 0, at(1), at(0), at(2)};
}

// All but its results. Strides as Python gives them.
Attention attention_of(const py::tuple& shape, uintptr_t q, const py::tuple& q_strides, uintptr_t k,
                       const py::tuple& k_strides, uintptr_t v, const py::tuple& v_strides, uintptr_t cu_seqlens_q,
                       uintptr_t cu_seqlens_k, int mask_kind, uintptr_t mask, const py::tuple& mask_strides,
                       uintptr_t padding, const py::tuple& padding_strides, uintptr_t slopes, int64_t slopes_batch,
                       double scale, int64_t left, int64_t right, bool bottom_right, double dropout_p, int64_t seed,
                       int64_t offset) {
    Attention a = {};
    const auto size = [&](size_t i) { return shape[i].cast<int64_t>(); };
    a.batch = size(0);
    a.heads = size(1);
    a.kv_heads = size(2);
    a.seq_q = size(3);
    a.seq_k = size(4);
    a.head_dim = size(5);
    a.value_dim = size(6);
    const int64_t tokens = size(7);  // packed: of q
    a.cu_seqlens_q = pointer<int32_t>(cu_seqlens_q);
    a.cu_seqlens_k = pointer<int32_t>(cu_seqlens_k);
    a.q = operand(q, q_strides);
    a.k = operand(k, k_strides);
    a.v = operand(v, v_strides);
    if (a.cu_seqlens_q) {
        a.out_head = a.value_dim;
        a.out_token = a.heads * a.value_dim;
        a.lse_head = tokens;
    } else {
        a.out_token = a.value_dim;
        a.out_head = a.seq_q * a.value_dim;
        a.out_batch = a.heads * a.out_head;
        a.lse_head = a.seq_q;
        a.lse_batch = a.heads * a.seq_q;
    }
    a.mask_kind = static_cast<MaskKind>(mask_kind);
    a.mask = pointer<void>(mask);
    if (mask) {
        a.mask_batch = a.cu_seqlens_q ? 0 : mask_strides[0].cast<int64_t>();  // packed sequences share a mask
        a.mask_head = mask_strides[1].cast<int64_t>();
        a.mask_q = mask_strides[2].cast<int64_t>();
        a.mask_k = mask_strides[3].cast<int64_t>();
    }
    a.padding = pointer<uint8_t>(padding);
    if (padding) {
        a.padding_batch = padding_strides[0].cast<int64_t>();
        a.padding_key = padding_strides[1].cast<int64_t>();
    }
    a.slopes = pointer<float>(slopes);
    a.slopes_batch = slopes_batch;
    a.slopes_head = 1;
    a.scale = static_cast<float>(scale);
    a.left = left;
    a.right = right;
    a.bottom_right = bottom_right;
    a.dropout = dropout(dropout_p, seed, offset);
    return a;
}

template <class Result, class... Arguments>
std::tuple<std::decay_t<Arguments>...> as_tuple(Result (*)(Arguments...));
using AttentionArguments = decltype(as_tuple(&attention_of));

void attention_binding(int dtype, const AttentionArguments& arguments, uintptr_t out, uintptr_t lse, int threads) {
    Attention a = std::apply(attention_of, arguments);
    a.out = pointer<void>(out);
    a.lse = pointer<float>(lse);
    const py::gil_scoped_release unlocked;
    attention(static_cast<Dtype>(dtype), a, threads);
}

void attention_backward_binding(int dtype, const AttentionArguments& arguments, uintptr_t out, uintptr_t lse,
                                uintptr_t grad_out, const py::tuple& grad_out_strides, uintptr_t dq, uintptr_t dk,
                                uintptr_t dv, uintptr_t dmask, const py::tuple& dmask_strides, int threads) {
    AttentionBackward b = {};
    Attention& a = b.forward;
    a = std::apply(attention_of, arguments);
    a.out = pointer<void>(out);
    a.lse = pointer<float>(lse);
    b.grad_out = operand(grad_out, grad_out_strides);
    const auto gradient = [&](uintptr_t address, int64_t heads, int64_t rows, int64_t width) {
        if (a.cu_seqlens_q) return AttentionGradient{pointer<void>(address), 0, width, heads * width};
        return AttentionGradient{pointer<void>(address), heads * rows * width, rows * width, width};
    };
    b.dq = gradient(dq, a.heads, a.seq_q, a.head_dim);
    b.dk = gradient(dk, a.kv_heads, a.seq_k, a.head_dim);
    b.dv = gradient(dv, a.kv_heads, a.seq_k, a.value_dim);
    b.dmask = pointer<float>(dmask);
    if (dmask) {
        b.dmask_batch = a.cu_seqlens_q ? 0 : dmask_strides[0].cast<int64_t>();  // packed sequences share a mask
        b.dmask_head = dmask_strides[1].cast<int64_t>();
        b.dmask_q = dmask_strides[2].cast<int64_t>();
        b.dmask_k = dmask_strides[3].cast<int64_t>();
    }
    const py::gil_scoped_release unlocked;
    attention_backward(static_cast<Dtype>(dtype), b, threads);
}

using Vector = std::pair<uintptr_t, int>;                                              // address, dtype
using Watched = std::vector<std::tuple<uintptr_t, int64_t, uint64_t>>;                 // as Original
using Weight = std::tuple<int64_t, int64_t, uintptr_t, std::vector<Vector>, Watched>;  // as BlockLinear

Parameter parameter(const Vector& v) {
    return {pointer<void>(v.first), static_cast<Dtype>(v.second)};
}

BlockLinear block_linear(const Weight& w) {
    BlockLinear linear = {};
    linear.out = std::get<0>(w);
    linear.in = std::get<1>(w);
    linear.packed = pointer<void>(std::get<2>(w));
    for (const Vector& bias : std::get<3>(w)) linear.biases.push_back(parameter(bias));
    for (const auto& [data, bytes, hash] : std::get<4>(w))
        linear.originals.push_back({pointer<void>(data), bytes, hash});
    return linear;
}

Block block(int precision, int stream, int64_t heads, int activation, float eps, bool norm_first, bool causal,
            const std::array<Weight, 4>& linears, const std::array<Vector, 4>& norms) {
    Block b = {};
    b.precision = static_cast<Precision>(precision);
    b.stream = static_cast<Dtype>(stream);
    b.heads = heads;
    b.activation = static_cast<Activation>(activation);
    b.eps = eps;
    b.norm_first = norm_first;
    b.causal = causal;
    b.qkv = block_linear(linears[0]);
    b.out = block_linear(linears[1]);
    b.up = block_linear(linears[2]);
    b.down = block_linear(linears[3]);
    b.attention_norm_weight = parameter(norms[0]);
    b.attention_norm_bias = parameter(norms[1]);
    b.feed_forward_norm_weight = parameter(norms[2]);
    b.feed_forward_norm_bias = parameter(norms[3]);
    b.isa = isa_name();
    return b;
}

int run_blocks_binding(const std::vector<const Block*>& blocks, int64_t rows, uintptr_t x, uintptr_t cu_seqlens,
                       int64_t batch, int64_t max_seqlen, uintptr_t y, int threads) {
    const BlockCall call = {rows, pointer<void>(x), pointer<int32_t>(cu_seqlens), batch, max_seqlen, pointer<void>(y)};
    const py::gil_scoped_release unlocked;
    return static_cast<int>(run_blocks(blocks.data(), static_cast<int64_t>(blocks.size()), call, threads));
}

Parameter parameter(uintptr_t data, int dtype) {
    return {pointer<void>(data), static_cast<Dtype>(dtype)};
}

void bias_gelu_binding(int dtype, int gelu, int64_t rows, int64_t width, uintptr_t x, int64_t x_stride, uintptr_t bias,
                       int bias_dtype, uintptr_t y, int threads) {
    bias_gelu(static_cast<Dtype>(dtype), static_cast<Activation>(gelu), rows, width, pointer<void>(x), x_stride,
              parameter(bias, bias_dtype), pointer<void>(y), threads);
}

void bias_gelu_backward_binding(int dtype, int gelu, int64_t rows, int64_t width, uintptr_t grad_y,
                                int64_t grad_y_stride, uintptr_t x, int64_t x_stride, uintptr_t bias, int bias_dtype,
                                uintptr_t dx, uintptr_t dbias, int threads) {
    bias_gelu_backward(static_cast<Dtype>(dtype), static_cast<Activation>(gelu), rows, width, pointer<void>(grad_y),
                       grad_y_stride, pointer<void>(x), x_stride, parameter(bias, bias_dtype), pointer<void>(dx),
                       pointer<float>(dbias), threads);
}

// `sizes` and `strides` are those of the leading dimensions.
void softmax_binding(int dtype, int64_t rows, int64_t columns, uintptr_t x, int64_t x_stride, float scale,
                     uintptr_t mask, int mask_type, const std::vector<int64_t>& sizes,
                     const std::vector<int64_t>& strides, int64_t causal_rows, uintptr_t y, int threads) {
    if (sizes.size() != strides.size() || sizes.size() > kMostMaskDims) {
        throw std::invalid_argument("the mask has " + std::to_string(sizes.size()) + " leading dimensions; at most " +
                                    std::to_string(kMostMaskDims) + " are supported");
    }
    Softmax a = {};
    a.rows = rows;
    a.columns = columns;
    a.x = pointer<void>(x);
    a.x_stride = x_stride;
    a.scale = scale;
    a.mask.data = pointer<void>(mask);
    a.mask.type = static_cast<MaskType>(mask_type);
    a.mask.dims = static_cast<int>(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i) {
        a.mask.sizes[i] = sizes[i];
        a.mask.strides[i] = strides[i];
    }
    a.causal_rows = causal_rows;
    a.y = pointer<void>(y);
    softmax(static_cast<Dtype>(dtype), a, threads);
}

void softmax_backward_binding(int dtype, int64_t rows, int64_t columns, uintptr_t grad_y, int64_t grad_y_stride,
                              uintptr_t y, int64_t y_stride, float scale, uintptr_t dx, int threads) {
    SoftmaxBackward a = {};
    a.rows = rows;
    a.columns = columns;
    a.grad_y = pointer<void>(grad_y);
    a.grad_y_stride = grad_y_stride;
    a.y = pointer<void>(y);
    a.y_stride = y_stride;
    a.scale = scale;
    a.dx = pointer<void>(dx);
    softmax_backward(static_cast<Dtype>(dtype), a, threads);
}

void cross_entropy_binding(int dtype, int64_t rows, int64_t classes, uintptr_t logits, int64_t logits_stride,
                           uintptr_t target, int64_t ignore_index, float label_smoothing, uintptr_t losses,
                           uintptr_t lse, int threads) {
    CrossEntropy a = {};
    a.rows = rows;
    a.classes = classes;
    a.logits = pointer<void>(logits);
    a.logits_stride = logits_stride;
    a.target = pointer<int64_t>(target);
    a.ignore_index = ignore_index;
    a.label_smoothing = label_smoothing;
    a.losses = pointer<float>(losses);
    a.lse = pointer<float>(lse);
    cross_entropy(static_cast<Dtype>(dtype), a, threads);
}

void cross_entropy_backward_binding(int dtype, int64_t rows, int64_t classes, uintptr_t grad_losses,
                                    int64_t grad_losses_stride, uintptr_t logits, int64_t logits_stride,
                                    uintptr_t target, uintptr_t lse, int64_t ignore_index, float label_smoothing,
                                    uintptr_t dlogits, int threads) {
    CrossEntropyBackward a = {};
    a.rows = rows;
    a.classes = classes;
    a.grad_losses = pointer<float>(grad_losses);
    a.grad_losses_stride = grad_losses_stride;
    a.logits = pointer<void>(logits);
    a.logits_stride = logits_stride;
    a.target = pointer<int64_t>(target);
    a.lse = pointer<float>(lse);
    a.ignore_index = ignore_index;
    a.label_smoothing = label_smoothing;
    a.dlogits = pointer<void>(dlogits);
    cross_entropy_backward(static_cast<Dtype>(dtype), a, threads);
}

void rotary_binding(int dtype, int64_t batch, int64_t seq, int64_t heads, int64_t head_dim, uintptr_t x,
                    int64_t batch_stride, int64_t seq_stride, int64_t head_stride, int64_t pairs, uintptr_t cos,
                    uintptr_t sin, int table_dtype, int64_t cos_stride, int64_t sin_stride, uintptr_t positions,
                    bool interleaved, bool inverse, uintptr_t y, int threads) {
    Rotary a = {};
    a.batch = batch;
    a.seq = seq;
    a.heads = heads;
    a.head_dim = head_dim;
    a.x = pointer<void>(x);
    a.batch_stride = batch_stride;
    a.seq_stride = seq_stride;
    a.head_stride = head_stride;
    a.pairs = pairs;
    a.cos = pointer<void>(cos);
    a.sin = pointer<void>(sin);
    a.table_dtype = static_cast<Dtype>(table_dtype);
    a.cos_stride = cos_stride;
    a.sin_stride = sin_stride;
    a.positions = pointer<int64_t>(positions);
    a.interleaved = interleaved;
    a.inverse = inverse;
    a.y = pointer<void>(y);
    rotary(static_cast<Dtype>(dtype), a, threads);
}

// (data, stride, ids) of a table; 0 for the ids of an absent one
using TableArguments = std::tuple<uintptr_t, int64_t, uintptr_t>;

Table table(const TableArguments& arguments) {
    return {pointer<void>(std::get<0>(arguments)), std::get<1>(arguments), pointer<int64_t>(std::get<2>(arguments))};
}

void embedding_layer_norm_binding(int dtype, int64_t tokens, int64_t width, TableArguments word,
                                  TableArguments position, TableArguments token_type, uintptr_t weight, uintptr_t bias,
                                  int parameter_dtype, float eps, double dropout_p, int64_t seed, int64_t offset,
                                  uintptr_t y, uintptr_t mean, uintptr_t rstd, int threads) {
    EmbeddingForward a = {};
    a.tokens = tokens;
    a.width = width;
    a.tables[0] = table(word);
    a.tables[1] = table(position);
    a.tables[2] = table(token_type);
    a.eps = eps;
    a.dropout = dropout(dropout_p, seed, offset);
    a.y = pointer<void>(y);
    a.mean = pointer<float>(mean);
    a.rstd = pointer<float>(rstd);
    embedding_layer_norm(static_cast<Dtype>(dtype), a, parameter(weight, parameter_dtype),
                         parameter(bias, parameter_dtype), threads);
}

bool ids_in_range_binding(uintptr_t ids, int64_t count, int64_t limit) {
    const int64_t* const at = pointer<int64_t>(ids);
    return std::all_of(at, at + count, [limit](int64_t id) { return 0 <= id && id < limit; });
}

template <class T>
py::object mask_lengths(const T* mask, int64_t batch, int64_t seq) {
    py::list lengths(batch);
    for (int64_t row = 0; row < batch; ++row) {
        int64_t real = 0, others = 0;
        for (int64_t column = 0; column < seq; ++column) {
            const T value = mask[row * seq + column];
            real += value == 1;
            others += value != 1 && value != 0;
        }
        if (others) return py::none();
        lengths[row] = real;
    }
    return lengths;
}

py::object mask_lengths_binding(int bytes, uintptr_t mask, int64_t batch, int64_t seq) {
    switch (bytes) {
        case 1:
            return mask_lengths(pointer<uint8_t>(mask), batch, seq);
        case 4:
            return mask_lengths(pointer<int32_t>(mask), batch, seq);
        case 8:
            return mask_lengths(pointer<int64_t>(mask), batch, seq);
        default:
            throw std::invalid_argument("a mask of " + std::to_string(bytes) + " bytes an element; expected 1, 4 or 8");
    }
}

// Of each table's gradient (data, entries).
using GradientArguments = std::tuple<uintptr_t, int64_t>;

void embedding_layer_norm_backward_binding(int dtype, int64_t tokens, int64_t width, TableArguments word,
                                           TableArguments position, TableArguments token_type, uintptr_t grad_y,
                                           int64_t grad_y_stride, uintptr_t mean, uintptr_t rstd, uintptr_t weight,
                                           int parameter_dtype, double dropout_p, int64_t seed, int64_t offset,
                                           int64_t padding_idx, GradientArguments dword, GradientArguments dposition,
                                           GradientArguments dtoken_type, uintptr_t dweight, uintptr_t dbias,
                                           int threads) {
    EmbeddingBackward a = {};
    a.tokens = tokens;
    a.width = width;
    a.tables[0] = table(word);
    a.tables[1] = table(position);
    a.tables[2] = table(token_type);
    a.grad_y = pointer<void>(grad_y);
    a.grad_y_stride = grad_y_stride;
    a.mean = pointer<float>(mean);
    a.rstd = pointer<float>(rstd);
    a.dropout = dropout(dropout_p, seed, offset);
    a.dweight = pointer<float>(dweight);
    a.dbias = pointer<float>(dbias);
    const TableGradient gradients[kTables] = {
        {pointer<float>(std::get<0>(dword)), std::get<1>(dword), padding_idx},
        {pointer<float>(std::get<0>(dposition)), std::get<1>(dposition), -1},
        {pointer<float>(std::get<0>(dtoken_type)), std::get<1>(dtoken_type), -1},
    };
    embedding_layer_norm_backward(static_cast<Dtype>(dtype), a, gradients, parameter(weight, parameter_dtype), threads);
}

void gated_act_binding(int dtype, int activation, int64_t rows, int64_t width, uintptr_t value, int64_t value_stride,
                       uintptr_t gate, int64_t gate_stride, uintptr_t y, int threads) {
    GatedAct a = {};
    a.rows = rows;
    a.width = width;
    a.value = pointer<void>(value);
    a.value_stride = value_stride;
    a.gate = pointer<void>(gate);
    a.gate_stride = gate_stride;
    a.y = pointer<void>(y);
    gated_act(static_cast<Dtype>(dtype), static_cast<Activation>(activation), a, threads);
}

void gated_act_backward_binding(int dtype, int activation, int64_t rows, int64_t width, uintptr_t grad_y,
                                int64_t grad_y_stride, uintptr_t value, int64_t value_stride, uintptr_t gate,
                                int64_t gate_stride, uintptr_t dvalue, uintptr_t dgate, int64_t gradient_stride,
                                int threads) {
    GatedAct a = {};
    a.rows = rows;
    a.width = width;
    a.grad_y = pointer<void>(grad_y);
    a.grad_y_stride = grad_y_stride;
    a.value = pointer<void>(value);
    a.value_stride = value_stride;
    a.gate = pointer<void>(gate);
    a.gate_stride = gate_stride;
    a.dvalue = pointer<void>(dvalue);
    a.dgate = pointer<void>(dgate);
    a.gradient_stride = gradient_stride;
    gated_act_backward(static_cast<Dtype>(dtype), static_cast<Activation>(activation), a, threads);
}

void rms_norm_binding(int dtype, int64_t rows, int64_t width, uintptr_t x, int64_t x_stride, uintptr_t weight,
                      int weight_dtype, float eps, uintptr_t y, uintptr_t rstd, int threads) {
    RmsNormForward a = {};
    a.rows = rows;
    a.width = width;
    a.x = pointer<void>(x);
    a.x_stride = x_stride;
    a.eps = eps;
    a.y = pointer<void>(y);
    a.rstd = pointer<float>(rstd);
    rms_norm(static_cast<Dtype>(dtype), a, parameter(weight, weight_dtype), threads);
}

void rms_norm_backward_binding(int dtype, int64_t rows, int64_t width, uintptr_t grad_y, int64_t grad_y_stride,
                               uintptr_t x, int64_t x_stride, uintptr_t rstd, uintptr_t weight, int weight_dtype,
                               uintptr_t dx, uintptr_t dweight, int threads) {
    RmsNormBackward a = {};
    a.rows = rows;
    a.width = width;
    a.grad_y = pointer<void>(grad_y);
    a.grad_y_stride = grad_y_stride;
    a.x = pointer<void>(x);
    a.x_stride = x_stride;
    a.rstd = pointer<float>(rstd);
    a.dx = pointer<void>(dx);
    a.dweight = pointer<float>(dweight);
    rms_norm_backward(static_cast<Dtype>(dtype), a, parameter(weight, weight_dtype), threads);
}

// Queries [batch, seq_q, heads, head_dim] over caches [batch, capacity, kv_heads, head_dim]: dense attention, causal
// from the last query and key of each sequence on.
void attention_decode_binding(int dtype, const py::tuple& shape, uintptr_t q, const py::tuple& q_strides, uintptr_t k,
                              const py::tuple& k_strides, uintptr_t v, const py::tuple& v_strides, uintptr_t lengths,
                              uintptr_t slopes, int64_t slopes_batch, double scale, int64_t left, uintptr_t out,
                              uintptr_t lse, int threads) {
    Attention a = {};
    const auto size = [&](size_t i) { return shape[i].cast<int64_t>(); };
    a.batch = size(0);
    a.heads = size(1);
    a.kv_heads = size(2);
    a.seq_q = size(3);
    a.seq_k = size(4);
    a.head_dim = size(5);
    a.value_dim = size(6);
    const auto tokens_first = [](uintptr_t address, const py::tuple& strides) {
        AttentionOperand operand_of_heads = operand(address, strides);
        std::swap(operand_of_heads.head, operand_of_heads.token);
        return operand_of_heads;
    };
    a.q = tokens_first(q, q_strides);
    a.k = tokens_first(k, k_strides);
    a.v = tokens_first(v, v_strides);
    a.lengths_k = pointer<int32_t>(lengths);
    a.slopes = pointer<float>(slopes);
    a.slopes_batch = slopes_batch;
    a.slopes_head = 1;
    a.scale = static_cast<float>(scale);
    a.left = left;
    a.right = 0;
    a.bottom_right = true;
    a.out = pointer<void>(out);
    a.out_head = a.value_dim;
    a.out_token = a.heads * a.value_dim;
    a.out_batch = a.seq_q * a.out_token;
    a.lse = pointer<float>(lse);
    a.lse_head = a.seq_q;
    a.lse_batch = a.heads * a.seq_q;
    const py::gil_scoped_release unlocked;
    attention(static_cast<Dtype>(dtype), a, threads);
}

std::vector<uint32_t> philox_binding(int64_t seed, int64_t offset, int64_t count) {
    if (offset < 0 || offset % 4 != 0 || count < 0) {
        throw std::invalid_argument("offset must be a multiple of 4 and not negative, and count not negative");
    }
    std::vector<uint32_t> words(static_cast<size_t>(count));
    philox_stream(static_cast<uint64_t>(seed), static_cast<uint64_t>(offset), count, words.data());
    return words;
}

py::dict build_info() {
    py::dict info;
    info["version"] = FASTBERT_VERSION;
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#else
    info["compiler"] = "gcc " __VERSION__;
#endif
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ implementations of fastbert's operations for CPUs";
    m.def("build_info", &build_info);
    m.def("isas", &supported_isas);
    m.def("isa", &isa_name);
    m.def("set_isa", &set_isa, py::arg("name"));
    m.def("philox", &philox_binding, py::arg("seed"), py::arg("offset"), py::arg("count"));
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    m.def("layer_norm", &layer_norm_binding, unlocked);
    m.def("add_layer_norm", &add_layer_norm_binding, unlocked);
    m.def("attention", &attention_binding);  // these read tuples, then release the lock themselves
    m.def("attention_backward", &attention_backward_binding);
    m.def("attention_decode", &attention_decode_binding);
    m.def("add_layer_norm_backward", &add_layer_norm_backward_binding, unlocked);
    m.def("linear_packed_bytes", [](int precision, int64_t out, int64_t in) {
        return linear_packed_bytes(static_cast<Precision>(precision), out, in);
    });
    m.def("linear_pack", &linear_pack_binding, unlocked);
    m.def("linear", &linear_binding, unlocked);
    m.def("fingerprint", [](uintptr_t data, int64_t bytes) { return fingerprint(pointer<void>(data), bytes); });
    py::class_<Block>(m, "Block").def(py::init(&block));
    m.def("run_blocks", &run_blocks_binding);
    m.def("bias_gelu", &bias_gelu_binding, unlocked);
    m.def("bias_gelu_backward", &bias_gelu_backward_binding, unlocked);
    m.def("softmax", &softmax_binding, unlocked);
    m.def("softmax_backward", &softmax_backward_binding, unlocked);
    m.def("cross_entropy", &cross_entropy_binding, unlocked);
    m.def("cross_entropy_backward", &cross_entropy_backward_binding, unlocked);
    m.def("rotary", &rotary_binding, unlocked);
    m.def("embedding_layer_norm", &embedding_layer_norm_binding, unlocked);
    m.def("embedding_layer_norm_backward", &embedding_layer_norm_backward_binding, unlocked);
    m.def("ids_in_range", &ids_in_range_binding);
    m.def("mask_lengths", &mask_lengths_binding);
    m.def("gated_act", &gated_act_binding, unlocked);
    m.def("gated_act_backward", &gated_act_backward_binding, unlocked);
    m.def("rms_norm", &rms_norm_binding, unlocked);
    m.def("rms_norm_backward", &rms_norm_backward_binding, unlocked);
    bind_module_state(m);
    bind_tokenizer(m);
}
