// The kernels for AVX-512 with bf16 products (Cooper Lake, Zen 4 and later).
#include <immintrin.h>

#include "cpu/common.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#define STEER_ISA avx512_bf16
#define STEER_HAS_AVX512_BF16
#include "cpu/simd_avx512.h"
// (The kernels need F16.)
#include "cpu/kernels.h"
#pragma GCC pop_options
