// fastbert._C. The only file that knows pybind11, and none knows torch: tensors arrive as addresses, sizes and strides
// (in elements), and the caller has checked them. Address 0 stands for an absent tensor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/layer_norm.h"
#include "cpu/linear.h"

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
                    uintptr_t packed, uintptr_t bias, int activation, uintptr_t residual, int residual_dtype,
                    int64_t residual_stride, uintptr_t y, int y_dtype, int64_t y_stride, int threads) {
    Linear a = {};
    a.precision = static_cast<Precision>(precision);
    a.rows = rows;
    a.out = out;
    a.in = in;
    a.x = pointer<void>(x);
    a.x_dtype = static_cast<Dtype>(x_dtype);
    a.x_stride = x_stride;
    a.packed = pointer<void>(packed);
    a.bias = pointer<float>(bias);
    a.activation = activation;
    a.residual = pointer<void>(residual);
    a.residual_dtype = static_cast<Dtype>(residual_dtype);
    a.residual_stride = residual_stride;
    a.y = pointer<void>(y);
    a.y_dtype = static_cast<Dtype>(y_dtype);
    a.y_stride = y_stride;
    linear(a, threads);
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
    m.def("add_layer_norm_backward", &add_layer_norm_backward_binding, unlocked);
    m.def("linear_packed_bytes", [](int precision, int64_t out, int64_t in) {
        return linear_packed_bytes(static_cast<Precision>(precision), out, in);
    });
    m.def("linear_pack", &linear_pack_binding, unlocked);
    m.def("linear", &linear_binding, unlocked);
}
