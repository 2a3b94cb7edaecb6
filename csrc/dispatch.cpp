// The choice of the kernel that the processor at hand can run.
#include "kernel.h"

namespace {

struct Kernel {
  const char *name;
  int (*forward)(const vmamba_scan &, void *, void *, void *);
  int (*backward)(const vmamba_scan &, const vmamba_gradients &);
  void (*bare_loop)(int64_t, int64_t);
};

Kernel choose() {
#if defined(VMAMBA_AVX2) || defined(VMAMBA_AVX512)
  __builtin_cpu_init();
#endif
#ifdef VMAMBA_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return {"avx512", vmamba_avx512::forward, vmamba_avx512::backward, vmamba_avx512::bare_loop};
#endif
#ifdef VMAMBA_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {"avx2", vmamba_avx2::forward, vmamba_avx2::backward, vmamba_avx2::bare_loop};
#endif
  return {"baseline", vmamba_baseline::forward, vmamba_baseline::backward, vmamba_baseline::bare_loop};
}

const Kernel kernel = choose();

}  // namespace

int vmamba_scan_forward(const vmamba_scan *scan, void *y, void *last, void *states) {
  return kernel.forward(*scan, y, last, states);
}

int vmamba_scan_backward(const vmamba_scan *scan, const vmamba_gradients *gradients) {
  return kernel.backward(*scan, *gradients);
}

void vmamba_bare_loop(int64_t values, int64_t threads) { kernel.bare_loop(values, threads); }

const char *vmamba_instruction_set(void) { return kernel.name; }
