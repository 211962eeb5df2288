// The kernels for AVX-512 as of Skylake.
#include <immintrin.h>

#include "cpu/common.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#define STEER_ISA avx512
#include "cpu/simd_avx512.h"
// (The kernels need F16.)
#include "cpu/kernels.h"
#pragma GCC pop_options
