// A CUDA driver that launches nothing: what Triton asks of one, with the limits of a Hopper GPU checked. Whoever sets
// `on_launch` learns of each launch, and what a tensor map says can be read from it.
//
// Sources of the limits: CUDA driver API, cuTensorMapEncodeTiled and cuLaunchKernelEx.

#include "cuda.h"
#include <stdint.h>
#include <string.h>

void (*on_launch)(CUfunction function, void **parameters) = 0;

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
  if (on_launch)
    on_launch(function, parameters);
  return CUDA_SUCCESS;
}

// What stands in a tensor map here; a real one is opaque. tests/emulator/matrices.py reads it.
struct plain_map {
  uint32_t magic, rank, item_size, swizzle_width;
  uint64_t address, sizes[5], strides[4];
  uint16_t box[5];
};
_Static_assert(sizeof(struct plain_map) <= sizeof(CUtensorMap), "a plain map fits into a tensor map");

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  unsigned item_size = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2, width = box[0] * item_size;
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
  if (result != CUDA_SUCCESS)
    return result;
  struct plain_map plain = {0x74786c21, rank, item_size, swizzle ? widest : 16, (uint64_t)address};
  for (cuuint32_t i = 0; i < rank; i++) {
    plain.sizes[i] = dims[i], plain.box[i] = box[i];
    if (i + 1 < rank)
      plain.strides[i] = strides[i];
  }
  memcpy(map, &plain, sizeof plain);
  return CUDA_SUCCESS;
}
