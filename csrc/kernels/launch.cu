#include <sstream>
#include <stdexcept>
#include <string>

#include "launch.cuh"

namespace megatron_qwen {

void check_cuda(const char* op, const char* what, cudaError_t status) {
  if (status == cudaSuccess) return;
  std::ostringstream message;
  message << op << ": " << what << ": " << cudaGetErrorName(status) << ": " << cudaGetErrorString(status);
  throw std::runtime_error(message.str());
}

void require_on_device(const char* op, const char* name, const void* pointer) {
  cudaPointerAttributes attributes{};
  check_cuda(op, "cannot look up a pointer", cudaPointerGetAttributes(&attributes, pointer));
  if (attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged) return;
  std::ostringstream message;
  message << op << ": " << name << " = " << pointer << " is host memory; expected device memory";
  throw std::invalid_argument(message.str());
}

int num_multiprocessors(const char* op) {
  int device = 0;
  int count = 0;
  check_cuda(op, "no current device", cudaGetDevice(&device));
  check_cuda(op, "cannot read the number of multiprocessors",
             cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

int compute_capability_major(const char* op) {
  int device = 0;
  int major = 0;
  check_cuda(op, "no current device", cudaGetDevice(&device));
  check_cuda(op, "cannot read the compute capability",
             cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major;
}

void require_sm90(const char* op) {
  const int major = compute_capability_major(op);
  if (major == 9) return;
  throw std::runtime_error(std::string(op) + ": its kernel is made for sm_90a, but the current device has compute " +
                           "capability " + std::to_string(major) + ".x; use backend triton or reference");
}

}  // namespace megatron_qwen
