// All kernels, for the instruction set of the file that includes this.
#pragma once

#include "cpu/vector_math.h"
// (vector_math.h stands first: the others need it.)
#include "cpu/multiply_tile.h"
// (multiply.h needs its tiles, and linear and paged_attention need multiply.h.)
#include "cpu/multiply.h"
#include "cpu/guided_sample.h"
#include "cpu/layer_norm.h"
#include "cpu/linear.h"
#include "cpu/paged_attention.h"
#include "cpu/rotary_and_store.h"

namespace steer::STEER_ISA {

extern const Kernels kernels{linear, layer_norm, rotary_and_store, paged_attention, guided_sample};

}  // namespace steer::STEER_ISA
