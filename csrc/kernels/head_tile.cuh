// Tiles of rows of one head in shared memory, for TMA and wgmma, and products of them.
//
// A tile is boxes of kRows rows and 64 columns, one or two as heads have 64 or 128 numbers; see operand_tile.cuh. It
// serves as an operand in both ways: the sum over the numbers of a head (q k^T), or over its rows (p v).
#pragma once

#include "megatron_qwen/sm90/async_copy.cuh"
#include "megatron_qwen/sm90/wgmma.cuh"
#include "operand_tile.cuh"
#include "tensor_map.cuh"
#include "vector.cuh"

namespace megatron_qwen {

template <int kRows, int kHead>
struct HeadTile {
  static_assert(kHead == 64 || kHead == 128, "one or two boxes");
  static_assert(kRows % 64 == 0 && kRows <= 256, "groups of 8 rows, boxes of TMA");
  static constexpr int kBoxBytes = kRows * kRowBytes;
  static constexpr int kBytes = kHead / kBoxColumns * kBoxBytes;

  // Where the 16 bytes `chunk` of a row are: numbers 8 chunk ... 8 chunk + 7 of the head.
  __device__ __forceinline__ static int offset(int row, int chunk) {
    return chunk / 8 * kBoxBytes + swizzled_offset(row, chunk % 8);
  }

  // Operand whose sum runs over numbers 16 step ... 16 step + 15 of the head; rows are those of `address` and on.
  __device__ __forceinline__ static std::uint64_t along_head(std::uint32_t address, int step) {
    return operand_descriptor<kBoxBytes>(address + step / 4 * kBoxBytes + step % 4 * kStepBytes<false>);
  }

  // Operand whose sum runs over rows 16 step ... 16 step + 15; transposed, in the words of wgmma.cuh.
  __device__ __forceinline__ static std::uint64_t along_rows(std::uint32_t address, int step) {
    return operand_descriptor<kBoxBytes>(address + step * kStepBytes<true>);
  }

  // By one thread: rows `row` and on of a head. kBytes count at `barrier`, also for rows beyond the tensor, which
  // become 0.
  __device__ __forceinline__ static void copy(unsigned char* destination, const CUtensorMap* map,
                                              sm90::Barrier* barrier, std::int32_t batch, std::int32_t head,
                                              std::int32_t row) {
#pragma unroll
    for (int box = 0; box < kHead / kBoxColumns; ++box) {
      sm90::copy_head_box(destination + box * kBoxBytes, map, barrier, batch, head, row, box * kBoxColumns);
    }
  }
};

// A product of kCount accumulators rounded to T, as the left operands of the multiplications of a sum over its columns:
// those of step s are columns 16 s ... 16 s + 15.
template <typename T, int kCount>
__device__ __forceinline__ void to_operands(const float (&product)[kCount], std::uint32_t (&operands)[kCount / 8][4]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const auto pair = PairOf<T>::from(product[2 * i], product[2 * i + 1]);
    std::memcpy(&operands[i / 4][i % 4], &pair, sizeof(pair));
  }
}

}  // namespace megatron_qwen
