#include <cuda_runtime.h>

#include <sstream>
#include <stdexcept>

#include "launch.cuh"
#include "tensor_map.cuh"

namespace megatron_qwen {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode(const char* op) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  check_cuda(op, "the driver has no cuTensorMapEncodeTiled",
             cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
  if (found == cudaDriverEntryPointSuccess && function != nullptr) return reinterpret_cast<Encode>(function);
  throw std::runtime_error(std::string(op) + ": the driver has no cuTensorMapEncodeTiled; CUDA 12.0 or newer has it");
}

}  // namespace

CUtensorMap tensor_map(const char* op, const void* matrix, std::int64_t rows, std::int64_t columns, int box_rows,
                       DType dtype) {
  static const Encode encode = find_encode(op);
  CUtensorMap map;
  // Innermost first. The stride of the innermost is its size, and not asked for.
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns * size_of(dtype))};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t element_strides[] = {1, 1};
  const CUtensorMapDataType type =
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = encode(&map, type, 2, const_cast<void*>(matrix), sizes, strides, box, element_strides,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return map;
  std::ostringstream message;
  message << op << ": cuTensorMapEncodeTiled refuses a matrix [" << rows << ", " << columns << "] at " << matrix
          << " with error " << static_cast<int>(result);
  throw std::runtime_error(message.str());
}

}  // namespace megatron_qwen
