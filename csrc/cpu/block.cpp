#include "block.h"

#include <string.h>

#include <algorithm>
#include <cmath>

#include "dispatch.h"
#include "parallel.h"
#include "scratch.h"

namespace fastbert {
namespace {

// Multiplications of a product for each thread, below which none helps.
constexpr int64_t kLeastWork = 1 << 17;

int64_t element_bytes(Dtype dtype) {
    return dtype == kFloat32 ? 4 : 2;
}

bool is_unchanged(const BlockLinear& linear) {
    return std::all_of(linear.originals.begin(), linear.originals.end(),
                       [](const Original& each) { return fingerprint(each.data, each.bytes) == each.fingerprint; });
}

int64_t room_for_bias(const BlockLinear& linear) {
    return linear.biases.size() > 1 ? Scratch::round_up(linear.out * 4) : 0;
}

// The biases as one vector; in `room` if they are several. An absent one counts as zeros.
Parameter whole_bias(const BlockLinear& linear, char* room) {
    if (linear.biases.size() == 1) return linear.biases[0];
    Parameter whole = {};
    for (const Parameter& part : linear.biases) {
        if (part.data) whole = {room, part.dtype};
    }
    if (!whole.data) return whole;
    const int64_t bytes = linear.out / static_cast<int64_t>(linear.biases.size()) * element_bytes(whole.dtype);
    for (const Parameter& part : linear.biases) {
        if (part.data) {
            memcpy(room, part.data, bytes);
        } else {
            memset(room, 0, bytes);
        }
        room += bytes;
    }
    return whole;
}

struct Rows {
    void* data;
    Dtype dtype;
    int64_t width;
};

void multiply(const Block& block, const BlockLinear& weights, int64_t rows, Rows x, Rows y, Parameter bias,
              Activation activation, const Rows* residual, int threads) {
    Linear a = {};
    a.precision = block.precision;
    a.rows = rows;
    a.out = weights.out;
    a.in = weights.in;
    a.x = x.data;
    a.x_dtype = x.dtype;
    a.x_stride = x.width;
    a.packed = weights.packed;
    a.bias = bias;
    a.activation = activation;
    if (residual) {
        a.residual = residual->data;
        a.residual_dtype = residual->dtype;
        a.residual_stride = residual->width;
    }
    a.y = y.data;
    a.y_dtype = y.dtype;
    a.y_stride = y.width;
    linear(a, threads);
}

void normalize(const Block& block, int64_t rows, Rows x, Parameter weight, Parameter bias, void* y, int threads) {
    LayerNormForward a = {};
    a.rows = rows;
    a.width = x.width;
    a.x = x.data;
    a.x_stride = x.width;
    a.eps = block.eps;
    a.y = y;
    layer_norm(block.stream, a, weight, bias, threads);
}

// y = layer_norm(x + x_bias + residual)
void add_normalize(const Block& block, int64_t rows, Rows x, Parameter x_bias, Rows residual, Parameter weight,
                   Parameter bias, void* y, int threads) {
    AddLayerNormForward a = {};
    a.rows = rows;
    a.width = x.width;
    a.x = x.data;
    a.x_stride = x.width;
    a.residual = residual.data;
    a.residual_stride = residual.width;
    a.eps = block.eps;
    a.y = y;
    add_layer_norm(block.stream, a, x_bias, weight, bias, threads);
}

void attend(const Block& block, const BlockCall& call, Rows qkv, Rows context, int threads) {
    const int64_t hidden = context.width, head_dim = hidden / block.heads;
    const int64_t bytes = hidden * element_bytes(qkv.dtype);
    Attention a = {};
    a.batch = call.batch;
    a.heads = a.kv_heads = block.heads;
    a.head_dim = a.value_dim = head_dim;
    a.seq_q = a.seq_k = call.max_seqlen;
    a.cu_seqlens_q = a.cu_seqlens_k = call.cu_seqlens;
    char* const data = static_cast<char*>(qkv.data);
    a.q = {data, 0, head_dim, qkv.width, 1};
    a.k = {data + bytes, 0, head_dim, qkv.width, 1};
    a.v = {data + 2 * bytes, 0, head_dim, qkv.width, 1};
    a.out = context.data;
    a.out_head = head_dim;
    a.out_token = hidden;
    a.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
    a.left = -1;
    a.right = block.causal ? 0 : -1;
    attention(qkv.dtype, a, threads);
}

bool cuts_rows(const BlockCall& call) {
    if (call.cu_seqlens[0] != 0 || call.cu_seqlens[call.batch] != call.rows) return false;
    for (int64_t b = 0; b < call.batch; ++b) {
        const int64_t length = int64_t{call.cu_seqlens[b + 1]} - call.cu_seqlens[b];
        if (length < 0 || length > call.max_seqlen) return false;
    }
    return true;
}

void run_layer(const Block& block, const BlockCall& call, int threads) {
    const int64_t rows = call.rows, hidden = block.qkv.in, intermediate = block.up.out;
    const Dtype stream = block.stream;
    // What only feeds a product is kept in the product's precision. (Integers come from bfloat16.)
    const Dtype inner = block.precision == kPrecisionFloat32 ? stream : kBfloat16;

    // Two tensors of a layer's life share memory where one is dead before the other is born.
    thread_local Scratch scratch;
    const int64_t stream_bytes = Scratch::round_up(rows * hidden * element_bytes(stream));
    const int64_t context_bytes = Scratch::round_up(rows * hidden * element_bytes(inner));
    const int64_t wide_bytes = Scratch::round_up(rows * std::max(3 * hidden, intermediate) * element_bytes(inner));
    const int64_t bias_bytes = room_for_bias(block.qkv);
    char* next = scratch.get(2 * stream_bytes + context_bytes + wide_bytes + bias_bytes);
    const auto take = [&next](int64_t bytes) {
        char* const taken = next;
        next += bytes;
        return taken;
    };
    const Rows x = {const_cast<void*>(call.x), stream, hidden}, y = {call.y, stream, hidden};
    const Rows middle = {take(stream_bytes), stream, hidden}, projected = {take(stream_bytes), stream, hidden};
    const Rows context = {take(context_bytes), inner, hidden};
    char* const wide = take(wide_bytes);
    const Rows qkv = {wide, inner, 3 * hidden}, up = {wide, inner, intermediate};
    const Parameter qkv_bias = whole_bias(block.qkv, take(bias_bytes)), out_bias = block.out.biases[0];
    const Parameter up_bias = block.up.biases[0], down_bias = block.down.biases[0];

    if (block.norm_first) {
        normalize(block, rows, x, block.attention_norm_weight, block.attention_norm_bias, projected.data, threads);
        multiply(block, block.qkv, rows, projected, qkv, qkv_bias, kNone, nullptr, threads);
        attend(block, call, qkv, context, threads);
        multiply(block, block.out, rows, context, middle, out_bias, kNone, &x, threads);
        normalize(block, rows, middle, block.feed_forward_norm_weight, block.feed_forward_norm_bias, projected.data,
                  threads);
        multiply(block, block.up, rows, projected, up, up_bias, block.activation, nullptr, threads);
        multiply(block, block.down, rows, up, y, down_bias, kNone, &middle, threads);
    } else {
        multiply(block, block.qkv, rows, x, qkv, qkv_bias, kNone, nullptr, threads);
        attend(block, call, qkv, context, threads);
        multiply(block, block.out, rows, context, projected, {}, kNone, nullptr, threads);
        add_normalize(block, rows, projected, out_bias, x, block.attention_norm_weight, block.attention_norm_bias,
                      middle.data, threads);
        multiply(block, block.up, rows, middle, up, up_bias, block.activation, nullptr, threads);
        multiply(block, block.down, rows, up, projected, {}, kNone, nullptr, threads);
        add_normalize(block, rows, projected, down_bias, middle, block.feed_forward_norm_weight,
                      block.feed_forward_norm_bias, y.data, threads);
    }
    scratch.done();
}

}  // namespace

uint64_t fingerprint(const void* data, int64_t bytes) {
    constexpr int64_t kSamples = 8, kSampleBytes = 4;
    uint64_t hash = 0xcbf29ce484222325;  // FNV-1a, by words
    if (bytes < kSampleBytes) return hash;
    const char* const from = static_cast<const char*>(data);
    const int64_t last = bytes / kSampleBytes - 1;
    for (int64_t i = 0; i < kSamples; ++i) {
        uint32_t sample;
        memcpy(&sample, from + last * i / (kSamples - 1) * kSampleBytes, kSampleBytes);
        hash = (hash ^ sample) * 0x100000001b3;
    }
    return hash;
}

BlockOutcome run_blocks(const Block* const* blocks, int64_t count, BlockCall call, int threads) {
    for (int64_t i = 0; i < count; ++i) {
        const Block& block = *blocks[i];
        if (block.isa != isa_name()) return BlockOutcome::kStale;
        for (const BlockLinear* each : {&block.qkv, &block.out, &block.up, &block.down}) {
            if (!is_unchanged(*each)) return BlockOutcome::kStale;
        }
    }
    if (!cuts_rows(call)) return BlockOutcome::kRefused;
    if (call.rows == 0 || count == 0) return BlockOutcome::kDone;
    const BlockLinear& largest = blocks[0]->up;
    with_team(range_count(call.rows * largest.out * largest.in, kLeastWork, threads), [&] {
        for (int64_t i = 0; i < count; ++i) {
            run_layer(*blocks[i], call, threads);
            call.x = call.y;
        }
    });
    return BlockOutcome::kDone;
}

}  // namespace fastbert
