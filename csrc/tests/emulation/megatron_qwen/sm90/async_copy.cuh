// Stands in for the header of PTX instructions of this name (emulation.h, hopper.h).
#pragma once

#include <cuda.h>

#include "megatron_qwen/sm90/mbarrier.cuh"

namespace megatron_qwen::sm90 {

inline void copy_box(void* destination, const CUtensorMap* map, Barrier* barrier, std::int32_t row,
                     std::int32_t column) {
  emulation::copy_box(destination, *map, barrier, {column, row});
}
inline void copy_head_box(void* destination, const CUtensorMap* map, Barrier* barrier, std::int32_t batch,
                          std::int32_t head, std::int32_t row, std::int32_t column) {
  emulation::copy_box(destination, *map, barrier, {column, row, head, batch});
}
inline void copy_16_bytes(std::uint32_t destination, const void* source, bool exists) {
  emulation::copy_16_bytes(destination, exists ? source : nullptr);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kPending>
void wait_for_copies() {
  emulation::wait_for_copies(kPending);
}
inline void fence_for_async_proxy() { emulation::fence_for_async_proxy(); }

}  // namespace megatron_qwen::sm90
