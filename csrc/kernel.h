// The kernel's entry points, one pair for each instruction set that the library holds.
#pragma once

#include "selective_scan.h"

#define VMAMBA_DECLARE(target)                                                  \
  namespace target {                                                            \
  int forward(const vmamba_scan &, void *y, void *last, void *states);          \
  int backward(const vmamba_scan &, const vmamba_gradients &);                  \
  void bare_loop(int64_t values, int64_t threads);                              \
  }

VMAMBA_DECLARE(vmamba_baseline)
VMAMBA_DECLARE(vmamba_avx2)
VMAMBA_DECLARE(vmamba_avx512)
