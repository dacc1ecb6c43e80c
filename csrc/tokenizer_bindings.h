#pragma once

#include <pybind11/pybind11.h>

namespace fastbert {

void bind_tokenizer(pybind11::module_& m);

}  // namespace fastbert
