#include "ops/cpu/page_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace spot::ops::cpu {
namespace {

#define SPOT_ISA generic
#define SPOT_NAME "generic"
#define SPOT_TARGET
#define SPOT_LANES 4
#include "ops/cpu/page_kernels.inc"
#undef SPOT_ISA
#undef SPOT_NAME
#undef SPOT_TARGET
#undef SPOT_LANES

#if defined(__x86_64__)
#define SPOT_ISA avx2
#define SPOT_NAME "avx2"
#define SPOT_TARGET __attribute__((target("avx2,fma")))
#define SPOT_LANES 8
#include "ops/cpu/page_kernels.inc"
#undef SPOT_ISA
#undef SPOT_NAME
#undef SPOT_TARGET
#undef SPOT_LANES

#define SPOT_ISA avx512
#define SPOT_NAME "avx512"
#define SPOT_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define SPOT_LANES 16
#include "ops/cpu/page_kernels.inc"
#undef SPOT_ISA
#undef SPOT_NAME
#undef SPOT_TARGET
#undef SPOT_LANES
#endif

struct Available {
  const PageKernels* list[3];
  int count = 0;
  Available() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      list[count++] = &avx512::kernels;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list[count++] = &avx2::kernels;
#endif
    list[count++] = &generic::kernels;
  }
};

const Available& available() {
  static const Available found;
  return found;
}

}  // namespace

const PageKernels& page_kernels() {
  return *available().list[0];
}

const PageKernels* const* all_page_kernels(int* count) {
  *count = available().count;
  return available().list;
}

}  // namespace spot::ops::cpu
