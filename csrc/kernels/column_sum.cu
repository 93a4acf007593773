#include "dtype.cuh"
#include "launch.cuh"
#include "megatron_qwen/check.h"
#include "megatron_qwen/column_sum.h"
#include "vector.cuh"

namespace megatron_qwen {
namespace {

constexpr int kColumns = 32;
// A warp per row lane: a warp reads 128 neighbouring bytes of a row.
constexpr int kRowLanes = 16;
constexpr int kThreads = kColumns * kRowLanes;

// A block sums 32 columns: each warp every 16th row, then the 16 warps in a fixed order.
template <typename T>
__global__ __launch_bounds__(kThreads) void column_sum_kernel(const float* __restrict__ partial, T* __restrict__ out,
                                                              std::int64_t rows, std::int64_t columns) {
  __shared__ float sums[kRowLanes][kColumns];
  const int lane = static_cast<int>(threadIdx.x) % kColumns;
  const int row_lane = static_cast<int>(threadIdx.x) / kColumns;
  const std::int64_t column = std::int64_t{blockIdx.x} * kColumns + lane;

  float sum = 0.0f;
  if (column < columns) {
#pragma unroll 4
    for (std::int64_t row = row_lane; row < rows; row += kRowLanes) {
      float value[1];
      unpack(load<1>(partial + row * columns + column), value);
      sum += value[0];
    }
  }
  sums[row_lane][lane] = sum;
  __syncthreads();
  if (row_lane != 0 || column >= columns) return;

  float total[1] = {0.0f};
#pragma unroll
  for (int i = 0; i < kRowLanes; ++i) total[0] += sums[i][lane];
  store(out + column, pack<T>(total));
}

}  // namespace

void column_sum(const ColumnSumParams& params) {
  check(params);
  if (params.columns == 0) return;
  dispatch(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch("column_sum", column_sum_kernel<T>, ceil_divide(params.columns, kColumns), kThreads, params.stream,
           params.partial, static_cast<T*>(params.out), params.rows, params.columns);
  });
}

}  // namespace megatron_qwen
