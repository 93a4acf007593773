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

// Axes innermost first; strides in elements, from the second axis on.
template <int kRank>
CUtensorMap encode_map(const char* op, const void* data, const std::int64_t (&sizes)[kRank],
                       const std::int64_t (&strides)[kRank - 1], int box_rows, DType dtype) {
  static const Encode encode = find_encode(op);
  CUtensorMap map;
  cuuint64_t extents[kRank], steps[kRank - 1];
  cuuint32_t box[kRank], element_strides[kRank];
  for (int axis = 0; axis < kRank; ++axis) {
    extents[axis] = static_cast<cuuint64_t>(sizes[axis]);
    box[axis] = axis == 0 ? kBoxColumns : axis == 1 ? static_cast<cuuint32_t>(box_rows) : 1;
    element_strides[axis] = 1;
    if (axis > 0) steps[axis - 1] = static_cast<cuuint64_t>(strides[axis - 1] * size_of(dtype));
  }
  const CUtensorMapDataType type =
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = encode(&map, type, kRank, const_cast<void*>(data), extents, steps, box, element_strides,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return map;
  std::ostringstream message;
  message << op << ": cuTensorMapEncodeTiled refuses a tensor [";
  for (int axis = kRank - 1; axis >= 0; --axis) message << sizes[axis] << (axis == 0 ? "] with strides [" : ", ");
  for (int axis = kRank - 2; axis >= 0; --axis) message << strides[axis] << ", ";
  message << "1] at " << data << " with error " << static_cast<int>(result);
  throw std::runtime_error(message.str());
}

}  // namespace

CUtensorMap tensor_map(const char* op, const void* matrix, std::int64_t rows, std::int64_t columns, int box_rows,
                       DType dtype) {
  return encode_map<2>(op, matrix, {columns, rows}, {columns}, box_rows, dtype);
}

CUtensorMap head_map(const char* op, const AttentionHeads& heads, std::int64_t batch, std::int64_t rows,
                     std::int64_t count, std::int64_t head_dim, int box_rows, DType dtype) {
  // TMA wants a stride where there is nothing to step over, too.
  const auto step = [head_dim](std::int64_t stride, std::int64_t size) { return size == 1 ? head_dim : stride; };
  return encode_map<4>(op, heads.data, {head_dim, rows, count, batch},
                       {step(heads.row_stride, rows), step(heads.head_stride, count), step(heads.batch_stride, batch)},
                       box_rows, dtype);
}

}  // namespace megatron_qwen
