// What fastres._cpu offers for writing kernel calls down and running them again.
#pragma once

#include <pybind11/pybind11.h>

namespace fastres::cpu {

void define_program(pybind11::module_& m);

}  // namespace fastres::cpu
