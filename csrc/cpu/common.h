// Everything that the kernels use and that is not compiled per instruction set. The isa_*.cpp files
// include this before they switch the instruction set: no function that other files share may be
// compiled for a machine that is not there.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/bf16.h"
#include "cpu/compressed_weight.h"
#include "cpu/ops.h"
#include "philox.h"
#include "cpu/scratch.h"
#include "cpu/select_prefix.h"
