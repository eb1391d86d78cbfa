/* The CUDA driver that Triton and PyTorch's compiled kernels call, without a device; see ../hollow_gpu.py. */
#include <string.h>

extern void hollow_driver_kernel(const char *name) __attribute__((weak)); /* in runtime.cpp */

int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)64; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetLimit(unsigned long *value, int limit) { *value = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)64; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "an error of the hollow GPU"; return 0; }
int cuPointerGetAttribute(void *value, int attribute, unsigned long pointer) {
  *(unsigned long *)value = pointer;
  return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) { /* an H100's */
    case 1: *value = 1024; break;    /* threads a block */
    case 10: *value = 32; break;     /* threads a warp */
    case 16: *value = 132; break;    /* multiprocessors */
    case 75: *value = 9; break;      /* compute capability */
    case 76: *value = 0; break;
    case 81: *value = 233472; break; /* shared memory of a multiprocessor, and of a block */
    case 97: *value = 232448; break;
    default: *value = 65536;
  }
  return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute ? 0 : 1024; return 0; }
int cuModuleLoad(void **module, const char *file) { *module = (void *)128; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)128; return 0; }
int cuModuleLoadDataEx(void **module, const void *image, int n, void *options, void **values) {
  *module = (void *)128;
  return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = strdup(name); return 0; }
int cuOccupancyMaxActiveClusters(int *count, void *function, void *config) { *count = 1; return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, void *function, int threads, unsigned long shared) {
  *count = 2;
  return 0;
}
int cuLaunchKernel(void *function, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned f,
                   unsigned shared, void *stream, void **arguments, void **extra) {
  if (hollow_driver_kernel) hollow_driver_kernel(function);
  return 0;
}
int cuLaunchKernelEx(void *config, void *function, void **arguments, void **extra) {
  if (hollow_driver_kernel) hollow_driver_kernel(function);
  return 0;
}
