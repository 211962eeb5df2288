// The kernels in plain C++, for any machine.
#include "cpu/common.h"

#define STEER_ISA portable
#include "cpu/simd_portable.h"
// (The kernels need F16.)
#include "cpu/kernels.h"
