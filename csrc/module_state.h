// fastbert._C.ModuleState: whether torch modules are still what they were.
#pragma once

#include <pybind11/pybind11.h>

namespace fastbert {

void bind_module_state(pybind11::module_& m);

}  // namespace fastbert
