// What device tests of Dual Chunk Attention share: random heads, their attention in fp64 on the host, and what a launch
// is told of them.
#pragma once

#include "device_test.cuh"
#include "megatron_qwen/attention.h"

namespace {

using megatron_qwen::AttentionHeads;
using megatron_qwen::kAttentionTileRows;

struct AttentionSizes {
  std::int64_t batch, rows_q, rows_k, heads_q, heads_k, head_dim;
  std::int64_t stride, cap, inter, alike_from;  // of chunks

  std::int64_t query_start() const { return rows_k - rows_q; }
  std::int64_t numbers_q() const { return batch * rows_q * heads_q * head_dim; }
  std::int64_t numbers_k() const { return batch * rows_k * heads_k * head_dim; }
  // Where the head of a row of queries, or of keys, begins.
  std::int64_t query_at(std::int64_t in_batch, std::int64_t row, std::int64_t head) const {
    return ((in_batch * rows_q + row) * heads_q + head) * head_dim;
  }
  std::int64_t key_at(std::int64_t in_batch, std::int64_t column, std::int64_t head) const {
    return ((in_batch * rows_k + column) * heads_k + head / (heads_q / heads_k)) * head_dim;
  }
  // The number of the tile of a position.
  std::int64_t tile_of(std::int64_t position) const {
    const std::int64_t per_chunk = (stride + kAttentionTileRows - 1) / kAttentionTileRows;
    return position / stride * per_chunk + position % stride / kAttentionTileRows;
  }
};

inline double dot(const double* a, const double* b, std::int64_t size) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

// Output and lse are 0 until `attend` has been called for every row.
template <typename T>
class AttentionOnHost {
 public:
  explicit AttentionOnHost(const AttentionSizes& sizes)
      : sizes_(sizes),
        q_(random_values<T>(sizes.numbers_q(), 1, 2.0)),
        k_(random_values<T>(sizes.numbers_k(), 2, 2.0)),
        v_(random_values<T>(sizes.numbers_k(), 3, 1.0)),
        scales_(random_values<float>(sizes.rows_q, 5, 0.2)),
        out_(sizes.numbers_q()),
        lse_(sizes.batch * sizes.heads_q * sizes.rows_q) {
    for (double& each : scales_) each += 1.0;
    const std::int64_t half = sizes.head_dim / 2;
    for (std::int64_t i = 0; i < (sizes.inter + 1) * half; ++i) {
      const double angle = static_cast<double>(i / half) * std::pow(1e4, -static_cast<double>(i % half) / half);
      cos_.push_back(static_cast<float>(std::cos(angle)));
      sin_.push_back(static_cast<float>(std::sin(angle)));
    }
  }

 protected:
  // By the angles of a position, or back.
  Values turned(const double* head, std::int64_t position, double direction) const {
    const std::int64_t half = sizes_.head_dim / 2;
    Values result(sizes_.head_dim);
    for (std::int64_t i = 0; i < half; ++i) {
      const double cos = cos_[position * half + i], sin = direction * sin_[position * half + i];
      result[i] = head[i] * cos - head[i + half] * sin;
      result[i + half] = head[i + half] * cos + head[i] * sin;
    }
    return result;
  }

  // Rounded to T, as kernels multiply it.
  Values rotated(const double* head, std::int64_t position) const {
    Values result = turned(head, position, 1.0);
    for (double& each : result) each = static_cast<float>(T(static_cast<float>(each)));
    return result;
  }

  Values rotated_query(std::int64_t batch, std::int64_t row, std::int64_t head, std::int64_t column) const {
    return rotated(&q_[sizes_.query_at(batch, row, head)], position_towards(row + sizes_.query_start(), column));
  }

  Values rotated_key(std::int64_t at, std::int64_t column) const { return rotated(&k_[at], column % sizes_.stride); }

  std::int64_t position_towards(std::int64_t row, std::int64_t column) const {
    const std::int64_t behind = row / sizes_.stride - column / sizes_.stride, within = row % sizes_.stride;
    if (behind == 0) return within;
    return behind == 1 ? std::min(within + sizes_.stride, sizes_.cap) : sizes_.inter;
  }

  double scale_of(std::int64_t row) const { return scales_[row] / std::sqrt(static_cast<double>(sizes_.head_dim)); }

  // Sets one row's output and lse, and returns its probabilities.
  Values attend(std::int64_t batch, std::int64_t row, std::int64_t head) {
    const std::int64_t size = sizes_.head_dim, at = sizes_.query_at(batch, row, head);
    Values weights;
    double total = 0.0;
    for (std::int64_t column = 0; column <= row + sizes_.query_start(); ++column) {
      const Values query = rotated_query(batch, row, head, column);
      const Values key = rotated_key(sizes_.key_at(batch, column, head), column);
      weights.push_back(std::exp(dot(query.data(), key.data(), size) * scale_of(row)));
      total += weights.back();
    }
    lse_[(batch * sizes_.heads_q + head) * sizes_.rows_q + row] = std::log(total);
    for (std::size_t column = 0; column < weights.size(); ++column) {
      const double* value = &v_[sizes_.key_at(batch, static_cast<std::int64_t>(column), head)];
      weights[column] /= total;
      for (std::int64_t i = 0; i < size; ++i) out_[at + i] += weights[column] * value[i];
    }
    return weights;
  }

  template <typename Function>
  void for_each_row(Function function) const {
    for (std::int64_t batch = 0; batch < sizes_.batch; ++batch) {
      for (std::int64_t row = 0; row < sizes_.rows_q; ++row) {
        for (std::int64_t head = 0; head < sizes_.heads_q; ++head) function(batch, row, head);
      }
    }
  }

  AttentionHeads heads(const Buffer<T>& buffer, std::int64_t rows, std::int64_t count) const {
    const std::int64_t row = count * sizes_.head_dim;
    return {buffer.data(), rows * row, row, sizes_.head_dim};
  }

  // With tiles of queries, the last one first.
  megatron_qwen::AttentionProblem problem(const Buffer<float>& cos, const Buffer<float>& sin,
                                          const Buffer<float>& scales) const {
    const std::int64_t last = sizes_.tile_of(sizes_.rows_k - 1), first = sizes_.tile_of(sizes_.query_start());
    return {{sizes_.batch, sizes_.rows_q, sizes_.rows_k, sizes_.heads_q, sizes_.heads_k, sizes_.head_dim},
            {sizes_.stride, sizes_.cap, sizes_.inter, sizes_.alike_from, false},
            {nullptr, nullptr, 0, sizes_.query_start(), 0},
            {nullptr, sizes_.batch * (last - first + 1), last, sizes_.tile_of(sizes_.stride)},
            {cos.data(), sin.data(), sizes_.inter + 1},
            static_cast<float>(1.0 / std::sqrt(static_cast<double>(sizes_.head_dim))),
            scales.data(),
            kDType<T>,
            nullptr};
  }

  std::string name() const { return "attention of " + std::to_string(sizes_.rows_k) + " keys: "; }

  AttentionSizes sizes_;
  Values q_, k_, v_, scales_, cos_, sin_, out_, lse_;
};

// Returns the exit status; 77 (skipped) where there is no device of sm_90.
template <template <typename> class Problem>
int test_attention(const char* program) {
  if (!has_device(program)) return 77;
  cudaDeviceProp device{};
  require(cudaGetDeviceProperties(&device, 0));
  if (device.major != 9) {
    std::printf("%s: no device of sm_90, skipped\n", program);
    return 77;
  }
  const std::vector<AttentionSizes> all = {{1, 70, 70, 1, 1, 64, 100, 130, 130, 30},
                                           {2, 301, 301, 2, 1, 128, 128, 160, 160, 32},
                                           {1, 200, 700, 3, 1, 64, 171, 200, 200, 29},
                                           {1, 700, 700, 2, 2, 128, 256, 287, 287, 31}};
  for (const AttentionSizes& sizes : all) {
    Problem<__nv_bfloat16>(sizes).test();
    Problem<__half>(sizes).test();
  }
  if (passed) std::printf("%s: all checks passed\n", program);
  return passed ? 0 : 1;
}

}  // namespace
