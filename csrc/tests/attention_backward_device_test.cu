// On a device: the gradient of Dual Chunk Attention against fp64 on the host, outputs full of NaN before, guards around
// them, and the same bits twice. Exits 77 (skipped) where there is none of sm_90.
#include "device_test.cuh"
#include "megatron_qwen/attention_backward.h"

namespace {

using megatron_qwen::AttentionHeads;
using megatron_qwen::kAttentionTileRows;

struct Sizes {
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
};

// The number of the tile of a position.
std::int64_t tile_of(const Sizes& sizes, std::int64_t position) {
  const std::int64_t per_chunk = (sizes.stride + kAttentionTileRows - 1) / kAttentionTileRows;
  return position / sizes.stride * per_chunk + position % sizes.stride / kAttentionTileRows;
}

template <typename T>
double rounded(double value) {
  return static_cast<float>(T(static_cast<float>(value)));
}

double dot(const double* a, const double* b, std::int64_t size) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

template <typename T>
class Problem {
 public:
  explicit Problem(const Sizes& sizes)
      : sizes_(sizes),
        q_(random_values<T>(sizes.numbers_q(), 1, 2.0)),
        k_(random_values<T>(sizes.numbers_k(), 2, 2.0)),
        v_(random_values<T>(sizes.numbers_k(), 3, 1.0)),
        grad_(random_values<T>(sizes.numbers_q(), 4, 1.0)),
        scales_(random_values<float>(sizes.rows_q, 5, 0.2)),
        out_(sizes.numbers_q()),
        lse_(sizes.batch * sizes.heads_q * sizes.rows_q),
        dq_(sizes.numbers_q()),
        dk_(sizes.numbers_k()),
        dv_(sizes.numbers_k()) {
    for (double& each : scales_) each += 1.0;
    const std::int64_t half = sizes.head_dim / 2;
    for (std::int64_t i = 0; i < (sizes.inter + 1) * half; ++i) {
      const double angle = static_cast<double>(i / half) * std::pow(1e4, -static_cast<double>(i % half) / half);
      cos_.push_back(static_cast<float>(std::cos(angle)));
      sin_.push_back(static_cast<float>(std::sin(angle)));
    }
  }

  void test() {
    for (std::int64_t batch = 0; batch < sizes_.batch; ++batch) {
      for (std::int64_t row = 0; row < sizes_.rows_q; ++row) {
        for (std::int64_t head = 0; head < sizes_.heads_q; ++head) differentiate(batch, row, head);
      }
    }
    run();
  }

 private:
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

  Values rotated(const double* head, std::int64_t position) const {
    Values result = turned(head, position, 1.0);
    for (double& each : result) each = rounded<T>(each);
    return result;
  }

  std::int64_t position_towards(std::int64_t row, std::int64_t column) const {
    const std::int64_t behind = row / sizes_.stride - column / sizes_.stride, within = row % sizes_.stride;
    if (behind == 0) return within;
    return behind == 1 ? std::min(within + sizes_.stride, sizes_.cap) : sizes_.inter;
  }

  // One row's output and lse, and what it adds to the gradients.
  void differentiate(std::int64_t batch, std::int64_t row, std::int64_t head) {
    const std::int64_t size = sizes_.head_dim, at = sizes_.query_at(batch, row, head);
    const std::int64_t position = row + sizes_.query_start();
    const double scale = scales_[row] / std::sqrt(static_cast<double>(size));
    Values weights;
    double total = 0.0;
    for (std::int64_t column = 0; column <= position; ++column) {
      const Values query = rotated(&q_[at], position_towards(position, column));
      const Values key = rotated(&k_[sizes_.key_at(batch, column, head)], column % sizes_.stride);
      weights.push_back(std::exp(dot(query.data(), key.data(), size) * scale));
      total += weights.back();
    }
    lse_[(batch * sizes_.heads_q + head) * sizes_.rows_q + row] = std::log(total);
    for (std::int64_t column = 0; column <= position; ++column) {
      const double* value = &v_[sizes_.key_at(batch, column, head)];
      weights[column] /= total;
      for (std::int64_t i = 0; i < size; ++i) out_[at + i] += weights[column] * value[i];
    }
    const double delta = dot(&grad_[at], &out_[at], size);
    for (std::int64_t column = 0; column <= position; ++column) {
      const std::int64_t key_at = sizes_.key_at(batch, column, head), towards = position_towards(position, column);
      const double ds = weights[column] * (dot(&grad_[at], &v_[key_at], size) - delta) * scale;
      const Values query = rotated(&q_[at], towards), key = rotated(&k_[key_at], column % sizes_.stride);
      const Values to_query = turned(key.data(), towards, -1.0);
      const Values to_key = turned(query.data(), column % sizes_.stride, -1.0);
      for (std::int64_t i = 0; i < size; ++i) {
        dq_[at + i] += ds * to_query[i];
        dk_[key_at + i] += ds * to_key[i];
        dv_[key_at + i] += weights[column] * grad_[at + i];
      }
    }
  }

  AttentionHeads heads(const Buffer<T>& buffer, std::int64_t rows, std::int64_t count) const {
    const std::int64_t row = count * sizes_.head_dim;
    return {buffer.data(), rows * row, row, sizes_.head_dim};
  }

  void run() const {
    const Buffer<T> q(q_), k(k_), v(v_), grad(grad_), out(out_), queries(3 * q_.size()), keys(k_.size());
    const Buffer<float> scales(scales_), cos(cos_), sin(sin_), lse(lse_), exponents(lse_.size()), deltas(lse_.size());
    const std::int64_t batch = sizes_.batch, rows_q = sizes_.rows_q, rows_k = sizes_.rows_k, size = sizes_.head_dim;
    const std::int64_t heads_q = sizes_.heads_q, heads_k = sizes_.heads_k;
    const megatron_qwen::AttentionTables tables{cos.data(), sin.data(), sizes_.inter + 1};
    const megatron_qwen::AttentionChunks chunks{sizes_.stride, sizes_.cap, sizes_.inter, sizes_.alike_from, false};
    const AttentionHeads of_q = heads(q, rows_q, heads_q), of_grad = heads(grad, rows_q, heads_q);
    megatron_qwen::attention_rotate({of_q, batch, rows_q, heads_q, size, nullptr, sizes_.query_start(), tables, chunks,
                                     3, queries.data(), kDType<T>, nullptr});
    megatron_qwen::attention_rotate({heads(k, rows_k, heads_k), batch, rows_k, heads_k, size, nullptr, 0, tables,
                                     chunks, 1, keys.data(), kDType<T>, nullptr});
    megatron_qwen::attention_row_terms({of_grad, heads(out, rows_q, heads_q), batch, rows_q, heads_q, size, lse.data(),
                                        exponents.data(), deltas.data(), kDType<T>, nullptr});
    megatron_qwen::AttentionBackwardInputs inputs{{{batch, rows_q, rows_k, heads_q, heads_k, size},
                                                   chunks,
                                                   {nullptr, nullptr, 0, sizes_.query_start(), 0},
                                                   {nullptr, 0, 0, tile_of(sizes_, sizes_.stride)},
                                                   tables,
                                                   static_cast<float>(1.0 / std::sqrt(static_cast<double>(size))),
                                                   scales.data(),
                                                   kDType<T>,
                                                   nullptr},
                                                  heads(queries, rows_q, heads_q),
                                                  heads(keys, rows_k, heads_k),
                                                  heads(v, rows_k, heads_k),
                                                  of_grad,
                                                  exponents.data(),
                                                  deltas.data()};
    const std::int64_t last = tile_of(sizes_, rows_k - 1), first = tile_of(sizes_, sizes_.query_start());
    Values before;
    for (int turn = 0; turn < 2; ++turn) {
      const Buffer<T> dq(dq_.size()), dk(dk_.size()), dv(dv_.size());
      inputs.problem.tiles.slots = batch * (last + 1);
      inputs.problem.tiles.first = 0;
      megatron_qwen::attention_keys_backward({inputs, true, dk.data(), dv.data()});
      inputs.problem.tiles.slots = batch * (last - first + 1);
      inputs.problem.tiles.first = last;
      megatron_qwen::attention_queries_backward({inputs, dq.data()});
      require(cudaDeviceSynchronize());
      const std::string name = "attention of " + std::to_string(rows_k) + " keys: ";
      // Output, probabilities and their gradients are rounded as well.
      expect_close(name + "dq", dq, dq_, 4 * kTolerance<T>);
      expect_close(name + "dk", dk, dk_, 4 * kTolerance<T>);
      expect_close(name + "dv", dv, dv_, 4 * kTolerance<T>);
      Values all = dq.read("dq");
      for (const Values& each : {dk.read("dk"), dv.read("dv")}) all.insert(all.end(), each.begin(), each.end());
      if (turn == 1 && all != before) {
        std::fprintf(stderr, "FAILED: %sother bits the second time\n", name.c_str());
        passed = false;
      }
      before = all;
    }
  }

  Sizes sizes_;
  Values q_, k_, v_, grad_, scales_, out_, lse_, dq_, dk_, dv_, cos_, sin_;
};

template <typename T>
void test_all() {
  Problem<T>({1, 70, 70, 1, 1, 64, 100, 130, 130, 30}).test();
  Problem<T>({2, 301, 301, 2, 1, 128, 128, 160, 160, 32}).test();
  Problem<T>({1, 200, 700, 3, 1, 64, 171, 200, 200, 29}).test();
  Problem<T>({1, 700, 700, 2, 2, 128, 256, 287, 287, 31}).test();
}

}  // namespace

int main() {
  if (!has_device("attention_backward_device_test")) return 77;
  cudaDeviceProp device{};
  require(cudaGetDeviceProperties(&device, 0));
  if (device.major != 9) {
    std::puts("attention_backward_device_test: no device of sm_90, skipped");
    return 77;
  }
  test_all<__nv_bfloat16>();
  test_all<__half>();
  if (passed) std::puts("attention_backward_device_test: all checks passed");
  return passed ? 0 : 1;
}
