// Which instruction set the ops use: the fastest on this machine, unless STEER_CPU_ISA or
// set_cpu_isa names one.
#pragma once

#include <string>

#include "cpu/ops.h"

namespace steer {

const Kernels& kernels();

// "portable", "avx2", "avx512" or "avx512_bf16".
std::string cpu_isa();

// Uses `name` from now on, or the machine's highest if that is less. Throws std::invalid_argument
// for an unknown name.
void set_cpu_isa(const std::string& name);

}  // namespace steer
