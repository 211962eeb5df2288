// The kernels for AVX2 with FMA.
#include <immintrin.h>

#include "cpu/common.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define STEER_ISA avx2
#include "cpu/simd_avx2.h"
// (The kernels need F16.)
#include "cpu/kernels.h"
#pragma GCC pop_options
