// The CUDA runtime that PyTorch calls, without a device; see ../hollow_gpu.py. The functions of cuBLAS, of the driver and
// of the rest of the runtime, which do nothing, are generated beside it.
//
// Device memory is the host's, mapped when touched. Copies are made up to HOLLOW_COPY bytes, kernels do nothing. While a
// thread records a graph, what CUDA forbids then fails with CUDA's error, is named on stderr and spoils the recording.
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#define API extern "C" cudaError_t

namespace {

std::mutex lock;
std::map<char*, size_t> device_blocks, pinned_blocks;
std::map<cudaStream_t, cudaStreamCaptureStatus> captures;
thread_local int own_captures = 0;  // begun by this thread
thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last_error = cudaSuccess;
thread_local int current = 0;
std::atomic<long> used{0}, next_handle{1 << 20};
std::atomic<long> launches{0}, graph_launches{0}, mallocs{0}, waits{0}, to_device{0}, to_host{0}, products{0};
std::atomic<long> collectives{0};

std::mutex histogram_lock;
std::map<std::string, long> histogram;
std::map<const void*, std::string>& kernel_names() {
  static auto* names = new std::map<const void*, std::string>;
  return *names;
}

long setting(const char* name, long otherwise) {
  const char* value = getenv(name);
  return value ? atol(value) : otherwise;
}

long total() {
  static long bytes = setting("HOLLOW_GB", 80) << 30;
  return bytes;
}

size_t most_copied() {
  static size_t bytes = setting("HOLLOW_COPY", 64 << 20);
  return bytes;
}

template <class T>
cudaError_t make(T* handle) {
  *handle = (T)(next_handle += 64);
  return cudaSuccess;
}

cudaError_t fail(cudaError_t error) { return last_error = error; }

bool inside(const std::map<char*, size_t>& blocks, const void* pointer) {
  std::lock_guard<std::mutex> guard(lock);
  auto block = blocks.upper_bound((char*)pointer);
  if (block == blocks.begin()) return false;
  --block;
  return (char*)pointer < block->first + block->second;
}

cudaStreamCaptureStatus status(cudaStream_t stream) {
  std::lock_guard<std::mutex> guard(lock);
  auto found = captures.find(stream);
  return found == captures.end() ? cudaStreamCaptureStatusNone : found->second;
}

cudaError_t unless_recording(const char* what, cudaError_t error = cudaErrorStreamCaptureUnsupported) {
  if (!own_captures || mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  fprintf(stderr, "hollow GPU: %s while a graph is recorded\n", what);
  std::lock_guard<std::mutex> guard(lock);
  for (auto& capture : captures) capture.second = cudaStreamCaptureStatusInvalidated;
  return fail(error);
}

cudaError_t wait(const char* what) {
  cudaError_t error = unless_recording(what);
  if (!error) waits++;
  return error;
}

// Something for a stream to do, which a recording's own stream records.
cudaError_t work(cudaStream_t stream, const char* what) {
  if (!own_captures || status(stream)) return cudaSuccess;
  if (!stream) return unless_recording(what, cudaErrorStreamCaptureImplicit);
  fprintf(stderr, "hollow GPU: %s on another stream while a graph is recorded\n", what);
  return cudaSuccess;
}

void count(const std::string& name) {
  launches++;
  std::lock_guard<std::mutex> guard(histogram_lock);
  histogram[name]++;
}

cudaError_t kernel(const void* function, cudaStream_t stream) {
  auto found = kernel_names().find(function);
  count(found == kernel_names().end() ? "?" : found->second);
  return work(stream, "a kernel");
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  bool there = inside(device_blocks, to), here = inside(device_blocks, from);
  to_device += there && !here;
  to_host += here && !there;
  if (cudaError_t error = work(stream, "a copy")) return error;
  if (status(stream)) {
    if (there != here && !inside(pinned_blocks, there ? from : to))
      fprintf(stderr, "hollow GPU: a copy of %zu bytes of pageable memory is recorded\n", bytes);
  } else if (bytes <= most_copied()) {
    memcpy(to, from, bytes);
  }
  return cudaSuccess;
}

}  // namespace

// What hollow_gpu.py reads.
extern "C" void hollow_counts(long* counts) {
  long now[] = {launches, graph_launches, products, collectives, mallocs, waits, to_device, to_host};
  memcpy(counts, now, sizeof now);
}
extern "C" void hollow_forget_kernels() {
  std::lock_guard<std::mutex> guard(histogram_lock);
  histogram.clear();
}
extern "C" void hollow_write_kernels(const char* path) {
  std::lock_guard<std::mutex> guard(histogram_lock);
  FILE* file = fopen(path, "w");
  for (auto& entry : histogram) fprintf(file, "%ld %s\n", entry.second, entry.first.c_str());
  fclose(file);
}
// What the generated functions call.
extern "C" int hollow_product() {
  products++;
  count("matrix product");
  return 0;
}
extern "C" int hollow_collective() {
  collectives++;
  count("collective");
  return 0;
}
extern "C" void hollow_driver_kernel(const char* name) { count(name); }

API cudaGetDeviceCount(int* count) { *count = 1; return cudaSuccess; }
API cudaGetDevice(int* device) { *device = current; return cudaSuccess; }
API cudaSetDevice(int device) { current = device; return cudaSuccess; }
API cudaRuntimeGetVersion(int* version) { *version = CUDART_VERSION; return cudaSuccess; }
API cudaDriverGetVersion(int* version) { *version = CUDART_VERSION; return cudaSuccess; }
API cudaGetLastError() { cudaError_t error = last_error; last_error = cudaSuccess; return error; }
API cudaPeekAtLastError() { return last_error; }
extern "C" const char* cudaGetErrorName(cudaError_t error) { return error ? "cudaError" : "cudaSuccess"; }
extern "C" const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureImplicit: return "operation would make the legacy stream depend on a capturing blocking stream";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    default: return "an error of the hollow GPU";
  }
}

// An H100's limits, as far as PyTorch asks.
API cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "NVIDIA H100 (hollow)");
  properties->major = 9;
  properties->multiProcessorCount = 132;
  properties->totalGlobalMem = total();
  properties->warpSize = 32;
  properties->regsPerMultiprocessor = properties->regsPerBlock = 65536;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxThreadsPerBlock = 1024;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = 232448;
  properties->sharedMemPerMultiprocessor = 233472;
  properties->l2CacheSize = 50 << 20;
  properties->maxBlocksPerMultiProcessor = 32;
  properties->textureAlignment = 512;
  properties->unifiedAddressing = properties->concurrentKernels = 1;
  for (int i = 0; i < 3; i++) {
    properties->maxThreadsDim[i] = i < 2 ? 1024 : 64;
    properties->maxGridSize[i] = i ? 65535 : 2147483647;
  }
  return cudaSuccess;
}
API cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    default: *value = 1;
  }
  return cudaSuccess;
}
API cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  attributes->binaryVersion = attributes->ptxVersion = 90;
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 64;
  attributes->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
API cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 4;
  return cudaSuccess;
}
extern "C" int hollow_nothing() { return 0; }
API cudaGetDriverEntryPointByVersion(
    const char*, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
  *function = (void*)hollow_nothing;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

API cudaMemGetInfo(size_t* free, size_t* all) { *all = total(); *free = total() - used; return cudaSuccess; }
API cudaMalloc(void** pointer, size_t bytes) {
  if (cudaError_t error = unless_recording("cudaMalloc")) return error;
  bytes = (bytes + 4095) & ~4095UL;
  if (used + (long)bytes > total()) return fail(cudaErrorMemoryAllocation);
  *pointer = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*pointer == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  mallocs++;
  used += bytes;
  std::lock_guard<std::mutex> guard(lock);
  device_blocks[(char*)*pointer] = bytes;
  return cudaSuccess;
}
API cudaFree(void* pointer) {
  if (!pointer) return cudaSuccess;
  if (cudaError_t error = unless_recording("cudaFree")) return error;
  std::lock_guard<std::mutex> guard(lock);
  auto block = device_blocks.find((char*)pointer);
  if (block == device_blocks.end()) return cudaErrorInvalidValue;
  munmap(pointer, block->second);
  used -= block->second;
  device_blocks.erase(block);
  return cudaSuccess;
}
API cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  *pointer = aligned_alloc(4096, (bytes + 4095) & ~4095UL);
  std::lock_guard<std::mutex> guard(lock);
  pinned_blocks[(char*)*pointer] = bytes;
  return cudaSuccess;
}
API cudaFreeHost(void* pointer) {
  {
    std::lock_guard<std::mutex> guard(lock);
    pinned_blocks.erase((char*)pointer);
  }
  free(pointer);
  return cudaSuccess;
}
API cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = inside(device_blocks, pointer)   ? cudaMemoryTypeDevice
                     : inside(pinned_blocks, pointer) ? cudaMemoryTypeHost
                                                      : cudaMemoryTypeUnregistered;
  attributes->devicePointer = attributes->hostPointer = (void*)pointer;
  return cudaSuccess;
}
API cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (cudaError_t error = wait("cudaMemcpy")) return error;
  return copy(to, from, bytes, nullptr);
}
API cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, from, bytes, stream);
}
API cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (cudaError_t error = work(stream, "cudaMemsetAsync")) return error;
  if (!status(stream) && bytes <= most_copied()) memset(to, value, bytes);
  return cudaSuccess;
}

API cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return make(stream); }
API cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return make(stream); }
API cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
API cudaStreamGetPriority(cudaStream_t, int* priority) { *priority = 0; return cudaSuccess; }
API cudaStreamSynchronize(cudaStream_t) { return wait("cudaStreamSynchronize"); }
API cudaDeviceSynchronize() { return wait("cudaDeviceSynchronize"); }
API cudaEventSynchronize(cudaEvent_t) { return wait("cudaEventSynchronize"); }
API cudaStreamQuery(cudaStream_t) { return unless_recording("cudaStreamQuery"); }
API cudaEventQuery(cudaEvent_t) { return unless_recording("cudaEventQuery"); }
API cudaEventCreate(cudaEvent_t* event) { return make(event); }
API cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return make(event); }
API cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) { *milliseconds = 0.01f; return cudaSuccess; }

API cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode wanted) {
  std::lock_guard<std::mutex> guard(lock);
  captures[stream] = cudaStreamCaptureStatusActive;
  own_captures++;
  mode = wanted;
  return cudaSuccess;
}
API cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  std::lock_guard<std::mutex> guard(lock);
  bool good = captures[stream] == cudaStreamCaptureStatusActive;
  captures.erase(stream);
  own_captures--;
  *graph = nullptr;
  return good ? make(graph) : fail(cudaErrorStreamCaptureInvalidated);
}
API cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* found) {
  *found = status(stream);
  return cudaSuccess;
}
API cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* found, unsigned long long* id, cudaGraph_t* graph,
    const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* number) {
  *found = status(stream);
  if (id) *id = *found ? (unsigned long long)stream : 0;
  if (graph) *graph = *found ? (cudaGraph_t)stream : nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (number) *number = 0;
  return cudaSuccess;
}
API cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) { std::swap(*other, mode); return cudaSuccess; }
API cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t, unsigned long long) { return make(executable); }
API cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* number) { *number = 1; return cudaSuccess; }
API cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { graph_launches++; return cudaSuccess; }

API cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return kernel(function, stream);
}
API cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  return kernel(function, config->stream);
}
API __cudaLaunchKernel(cudaKernel_t function, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return kernel((const void*)function, stream);
}
API __cudaGetKernel(cudaKernel_t* kernel, const void* function) { *kernel = (cudaKernel_t)function; return cudaSuccess; }
namespace {
thread_local struct { dim3 grid, block; size_t shared; void* stream; } call;
}
extern "C" unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  call = {grid, block, shared, stream};
  return 0;
}
API __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = call.grid;
  *block = call.block;
  *shared = call.shared;
  *(void**)stream = call.stream;
  return cudaSuccess;
}
extern "C" void** __cudaRegisterFatBinary(void*) { static void* handle[4]; return handle; }
extern "C" void __cudaRegisterFunction(
    void**, const char* function, char*, const char* name, int, void*, void*, void*, void*, int*) {
  std::lock_guard<std::mutex> guard(histogram_lock);
  kernel_names()[function] = name;
}
extern "C" int cublasCreate_v2(void** handle) { return make(handle); }
extern "C" int cublasLtMatmulAlgoGetHeuristic(
    void*, void*, void*, void*, void*, void*, void*, int, void* result, int* found) {
  memset(result, 0, 64);
  *found = 1;
  return 0;
}
