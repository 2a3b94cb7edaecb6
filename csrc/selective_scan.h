/* The 2D selective scan on a CPU: the C interface of libvmamba_cpu.
 *
 * Sizes: b batch, h height, w width, l = h·w, d channels, k routes, n state size, r rank of delta, s = ceil(l / state_stride).
 *
 * Images are addressed by strides, counted in elements; their last dimension is contiguous. All other arrays
 * are contiguous and of the state's type, float or double. Sizes are checked by the caller. */
#ifndef VMAMBA_SELECTIVE_SCAN_H
#define VMAMBA_SELECTIVE_SCAN_H

#include <stdint.h>

#ifdef _WIN32
#define VMAMBA_API __declspec(dllexport)
#else
#define VMAMBA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum vmamba_type { VMAMBA_FLOAT32 = 0, VMAMBA_FLOAT64 = 1, VMAMBA_FLOAT16 = 2, VMAMBA_BFLOAT16 = 3 };

enum vmamba_status { VMAMBA_OK = 0, VMAMBA_OUT_OF_MEMORY = 1 };

/* An operand in image position. */
typedef struct {
  const void *data;
  int64_t type;      /* enum vmamba_type */
  int64_t stride[4]; /* of batch, height, width and route */
} vmamba_image;

typedef struct {
  int64_t batch, height, width, channels, n_routes, n_state;
  int64_t rank;         /* r; 0: delta is given for every channel */
  int64_t softplus;     /* whether delta passes through it */
  int64_t state_stride; /* positions between saved states */
  int64_t state_type;   /* VMAMBA_FLOAT32 or VMAMBA_FLOAT64 */
  int64_t threads;
  const int64_t *routes; /* (k): 0 row, 1 column, 2 row reversed, 3 column reversed; unread where there is an order */
  const int64_t *const *orders; /* (k): null, or the route's l flat positions row·width + column, each in 0 … l - 1 */
  vmamba_image x;        /* (b, h, w, d) */
  vmamba_image delta;    /* (b, h, w, k, r), or (b, h, w, k, d) if r is 0 */
  vmamba_image B, C;     /* (b, h, w, k, n) */
  const void *A;         /* (k, d, n) */
  const void *D;         /* (k, d) or null */
  const void *bias;      /* (k, d) or null */
  const void *weight;    /* (k, d, r) or null */
  const void *initial;   /* (b, k, d, n) or null */
} vmamba_scan;

/* y (b, h, w, d), last (b, k, d, n) and states (b, k, s, n, d) are written in full. */
VMAMBA_API int vmamba_scan_forward(const vmamba_scan *scan, void *y, void *last, void *states);

/* Gradients, each of its operand's shape, contiguous, written in full; those of operands that are null are not
 * written. */
typedef struct {
  vmamba_image y;     /* of y, (b, h, w, d) */
  const void *last;   /* of the last state, (b, k, d, n), or null */
  const void *states; /* as the forward saved them */
  void *x, *delta, *A, *B, *C, *D, *bias, *weight, *initial;
} vmamba_gradients;

VMAMBA_API int vmamba_scan_backward(const vmamba_scan *scan, const vmamba_gradients *gradients);

/* A loop of exp, log1p and exp over as many values, cached, and nothing else: what the scan is measured against. */
VMAMBA_API void vmamba_bare_loop(int64_t values, int64_t threads);

/* The instruction set in use: "avx512", "avx2" or "baseline". */
VMAMBA_API const char *vmamba_instruction_set(void);

#ifdef __cplusplus
}
#endif
#endif
