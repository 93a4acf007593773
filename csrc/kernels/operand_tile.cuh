// How operands of a tile lie in shared memory, for TMA, for cp.async and for wgmma alike.
//
// A box is rows of 64 elements, 128 bytes; the 16 bytes at place c of row r are at place c ^ (r % 8) (swizzle 128B),
// and a box starts at a multiple of 1024 bytes. An operand whose neighbours in memory lie along the sum ("k") is one
// box of all its rows. One whose neighbours lie along the other axis is a box of 64 rows, which are the sum's terms,
// for each 64 of its columns; boxes follow one another. Source: PTX ISA 9.0, "Asynchronous Warpgroup Level Matrix
// Shared Memory Layout".
#pragma once

#include <cstdint>

namespace megatron_qwen {

constexpr int kTileRows = 128;     // of the product, 64 per warpgroup
constexpr int kTileColumns = 256;  // of the product
constexpr int kTileDepth = 64;     // terms of the sum per stage
constexpr int kRowBytes = 128;
constexpr int kBoxBytes = 64 * kRowBytes;
constexpr int kLeftBytes = kTileRows / 64 * kBoxBytes;
constexpr int kRightBytes = kTileColumns / 64 * kBoxBytes;
constexpr int kStageBytes = kLeftBytes + kRightBytes;

// Where the 16 bytes at place `chunk` of a row of a box are.
__device__ __forceinline__ int swizzled_offset(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// Matrix descriptor of wgmma: bits 0-13 address, 16-29 leading offset, 32-45 stride offset, all in units of 16 bytes;
// 62-63 = 1 says 128-byte swizzle. The stride leads from 8 rows of a box to the next 8. The leading offset leads from
// 64 columns to the next 64, that is, from box to box of kBytes; an operand along the sum has none.
template <int kBytes = kBoxBytes>
__device__ __forceinline__ std::uint64_t operand_descriptor(std::uint32_t address) {
  constexpr std::uint64_t kStride = 8 * kRowBytes / 16, kLeading = kBytes / 16;
  return std::uint64_t{1} << 62 | kStride << 32 | kLeading << 16 | (address & 0x3ffff) >> 4;
}

// Bytes from the operand of one multiplication, 16 terms, to that of the next: along a row, or 16 rows down.
template <bool kTransposed>
constexpr int kStepBytes = kTransposed ? 16 * kRowBytes : 32;

}  // namespace megatron_qwen
