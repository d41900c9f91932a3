// A CUDA driver that launches nothing: what Triton asks of one, with the limits of a Hopper GPU checked.
//
// Sources of the limits: CUDA driver API, cuTensorMapEncodeTiled and cuLaunchKernelEx.

#include "cuda.h"
#include <string.h>

static const char *broken = "a limit of the driver is broken";

static CUresult demand(int holds, const char *what) {
  if (!holds)
    broken = what;
  return holds ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = broken;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) { return *version = 12080, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)1, CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  return *function = (CUfunction)strdup(name), CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN      ? 227 << 10
           : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR ? 228 << 10
                                                                                   : 32;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer; // host memory stands for the device's
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  if (demand(config->gridDimX >= 1 && config->gridDimX < 1u << 31, "gridDimX: 1 to 2^31 - 1") ||
      demand(config->gridDimY >= 1 && config->gridDimY < 1 << 16, "gridDimY: 1 to 65535") ||
      demand(config->gridDimZ == 1, "gridDimZ: 1") || demand(config->blockDimX <= 1024, "blockDimX: at most 1024") ||
      demand(config->sharedMemBytes <= 227 << 10, "sharedMemBytes: at most 227 KiB"))
    return CUDA_ERROR_INVALID_VALUE;
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  unsigned width = box[0] * (type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2);
  unsigned widest = swizzle == CU_TENSOR_MAP_SWIZZLE_32B    ? 32
                    : swizzle == CU_TENSOR_MAP_SWIZZLE_64B  ? 64
                    : swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128
                                                            : width;
  CUresult result = demand(rank >= 1 && rank <= 5, "tensorRank: 1 to 5");
  result |= demand((size_t)address % 16 == 0, "globalAddress: a multiple of 16");
  result |= demand(width % 16 == 0 && width <= widest, "boxDim[0]: a multiple of 16 bytes within the swizzle");
  for (cuuint32_t i = 0; i < rank; i++) {
    result |= demand(dims[i] >= 1 && dims[i] <= 1ull << 32, "globalDim: 1 to 2^32");
    result |= demand(box[i] >= 1 && box[i] <= 256, "boxDim: 1 to 256");
    result |= demand(steps[i] == 1, "elementStrides: 1");
    if (i + 1 < rank)
      result |= demand(strides[i] % 16 == 0 && strides[i] < 1ull << 40, "globalStrides: multiples of 16 below 2^40");
  }
  return result;
}
