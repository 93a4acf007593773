// Copies from global to shared memory that no register sees: boxes of a matrix by TMA, and 16 bytes by cp.async.
// See mbarrier.cuh. Source: PTX ISA 9.0, "cp.async", "cp.async.bulk.tensor", "async proxy".
#pragma once

#include <cuda.h>

#include "megatron_qwen/sm90/mbarrier.cuh"

namespace megatron_qwen::sm90 {

// Copies the box at (row, column) of the matrix behind `map`; what lies outside of the matrix becomes 0. The whole box
// counts as bytes written, at `barrier`.
__device__ __forceinline__ void copy_box(void* destination, const CUtensorMap* map, Barrier* barrier, std::int32_t row,
                                         std::int32_t column) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}

// Copies the box at (row, column) of one head of [batch, rows, heads, columns]; see copy_box.
__device__ __forceinline__ void copy_head_box(void* destination, const CUtensorMap* map, Barrier* barrier,
                                              std::int32_t batch, std::int32_t head, std::int32_t row,
                                              std::int32_t column) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// Copies 16 bytes, or writes 16 zeros unless `exists`: then nothing is read.
__device__ __forceinline__ void copy_16_bytes(std::uint32_t destination, const void* source, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(exists ? 16 : 0)
               : "memory");
}

// The copies of this thread since the last commit are a group; kPending groups may still be under way after the wait.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// What this thread wrote to shared memory so far, cp.async included, may be read by wgmma and TMA (the async proxy)
// after this and an arrival.
__device__ __forceinline__ void fence_for_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace megatron_qwen::sm90
