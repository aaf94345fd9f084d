// The optimizers' arguments straight from Python lists of tensors, past torch's dispatcher: DLPack's exchange table
// gives a tensor's address, shape and type in 30 to 60 ns; an operator's argument costs 200 or more, which is most of
// the step of a small tensor. To ask whether one is lazily negated takes 60 to 80, so that alone is kept from one step
// to the next.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "common/tensor_lists.h"

namespace fastnn {

// Throws NotCovered for what is not a plain torch tensor with elements of a type the kernels have.
Views views_of(const pybind11::list& tensors, const char* op, const char* name);
// Likewise; `known`: by name, the tensors that an earlier step has seen not to be lazily negated, and their addresses,
// which are brought up to date. Another tensor, or one at another address, is asked.
Views views_of(const pybind11::list& tensors, const char* op, const char* name, pybind11::dict known);

// Increments the tensors' version counters as torch's in-place operators do, then lets go of the GIL.
template <>
struct Writing<pybind11::list> {
  explicit Writing(std::initializer_list<const pybind11::list*> lists);
  std::optional<pybind11::gil_scoped_release> released;
};

}  // namespace fastnn
