// The operators' entry points of fastnn._C, past torch's dispatcher.
#pragma once

#include <pybind11/pybind11.h>

namespace fastnn::cpu {

void bind_conv2d(pybind11::module_& m);
void bind_relu(pybind11::module_& m);
void bind_max_pool2d(pybind11::module_& m);
void bind_cross_entropy(pybind11::module_& m);
void bind_adam(pybind11::module_& m);
void bind_sgd(pybind11::module_& m);

}  // namespace fastnn::cpu
