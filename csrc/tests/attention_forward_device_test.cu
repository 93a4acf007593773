// On a device: the forward pass of Dual Chunk Attention against fp64 on the host, outputs full of NaN before, guards
// around them. Exits 77 (skipped) where there is none of sm_90.
#include "device_test.cuh"
#include "megatron_qwen/attention.h"

namespace {

using megatron_qwen::kAttentionTileRows;

struct Sizes {
  std::int64_t batch, rows_q, rows_k, heads_q, heads_k, head_dim;
  std::int64_t stride, cap, inter, alike_from;  // of chunks

  std::int64_t query_start() const { return rows_k - rows_q; }
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

template <typename T>
class Problem {
 public:
  explicit Problem(const Sizes& sizes)
      : sizes_(sizes),
        q_(random_values<T>(sizes.batch * sizes.rows_q * sizes.heads_q * sizes.head_dim, 1, 2.0)),
        k_(random_values<T>(sizes.batch * sizes.rows_k * sizes.heads_k * sizes.head_dim, 2, 2.0)),
        v_(random_values<T>(k_.size(), 3, 1.0)),
        scales_(random_values<float>(sizes.rows_q, 4, 0.2)) {
    for (double& each : scales_) each += 1.0;
    const std::int64_t half = sizes.head_dim / 2;
    for (std::int64_t i = 0; i < (sizes.inter + 1) * half; ++i) {
      const double angle = static_cast<double>(i / half) * std::pow(1e4, -static_cast<double>(i % half) / half);
      cos_.push_back(static_cast<float>(std::cos(angle)));
      sin_.push_back(static_cast<float>(std::sin(angle)));
    }
  }

  void test() {
    Values keys(k_.size()), out(q_.size()), lse(sizes_.batch * sizes_.heads_q * sizes_.rows_q);
    const std::int64_t head = sizes_.head_dim;
    for (std::int64_t at = 0; at < static_cast<std::int64_t>(keys.size()); at += head) {
      const std::int64_t row = at / head / sizes_.heads_k % sizes_.rows_k;
      const Values turned = rotated(&k_[at], row % sizes_.stride);
      std::copy(turned.begin(), turned.end(), keys.begin() + at);
    }
    for (std::int64_t at = 0; at < static_cast<std::int64_t>(out.size()); at += head) attend(at, keys, out, lse);
    run(keys, out, lse);
  }

 private:
  Values rotated(const double* head, std::int64_t position) const {
    const std::int64_t half = sizes_.head_dim / 2;
    Values result(sizes_.head_dim);
    for (std::int64_t i = 0; i < half; ++i) {
      const double cos = cos_[position * half + i], sin = sin_[position * half + i];
      result[i] = rounded<T>(head[i] * cos - head[i + half] * sin);
      result[i + half] = rounded<T>(head[i + half] * cos + head[i] * sin);
    }
    return result;
  }

  std::int64_t position_towards(std::int64_t row, std::int64_t column) const {
    const std::int64_t behind = row / sizes_.stride - column / sizes_.stride, within = row % sizes_.stride;
    if (behind == 0) return within;
    return behind == 1 ? std::min(within + sizes_.stride, sizes_.cap) : sizes_.inter;
  }

  // Of the head that begins at `at`.
  void attend(std::int64_t at, const Values& keys, Values& out, Values& lse) const {
    const std::int64_t size = sizes_.head_dim, head = at / size % sizes_.heads_q;
    const std::int64_t row = at / size / sizes_.heads_q % sizes_.rows_q;
    const std::int64_t batch = at / size / sizes_.heads_q / sizes_.rows_q;
    const std::int64_t position = row + sizes_.query_start();
    const std::int64_t head_k = head / (sizes_.heads_q / sizes_.heads_k);
    const auto key_at = [&](std::int64_t column) {
      return ((batch * sizes_.rows_k + column) * sizes_.heads_k + head_k) * size;
    };
    Values weights;
    double total = 0.0;
    for (std::int64_t column = 0; column <= position; ++column) {
      const Values query = rotated(&q_[at], position_towards(position, column));
      double logit = 0.0;
      for (std::int64_t i = 0; i < size; ++i) logit += query[i] * keys[key_at(column) + i];
      weights.push_back(std::exp(logit * scales_[row] / std::sqrt(static_cast<double>(size))));
      total += weights.back();
    }
    lse[(batch * sizes_.heads_q + head) * sizes_.rows_q + row] = std::log(total);
    for (std::int64_t column = 0; column <= position; ++column) {
      for (std::int64_t i = 0; i < size; ++i) out[at + i] += weights[column] / total * v_[key_at(column) + i];
    }
  }

  void run(const Values& keys, const Values& out, const Values& lse) const {
    const Buffer<T> q(q_), k(keys), v(v_), our_out(out.size());
    const Buffer<float> scales(scales_), cos(cos_), sin(sin_), our_lse(lse.size());
    const auto heads = [&](const Buffer<T>& buffer, std::int64_t rows, std::int64_t count) {
      const std::int64_t row = count * sizes_.head_dim;
      return megatron_qwen::AttentionHeads{buffer.data(), rows * row, row, sizes_.head_dim};
    };
    const std::int64_t last = tile_of(sizes_, sizes_.rows_k - 1), first = tile_of(sizes_, sizes_.query_start());
    const megatron_qwen::AttentionProblem problem{
        {sizes_.batch, sizes_.rows_q, sizes_.rows_k, sizes_.heads_q, sizes_.heads_k, sizes_.head_dim},
        {sizes_.stride, sizes_.cap, sizes_.inter, sizes_.alike_from, false},
        {nullptr, nullptr, 0, sizes_.query_start(), 0},
        {nullptr, sizes_.batch * (last - first + 1), last, tile_of(sizes_, sizes_.stride)},
        {cos.data(), sin.data(), sizes_.inter + 1},
        static_cast<float>(1.0 / std::sqrt(static_cast<double>(sizes_.head_dim))),
        scales.data(),
        kDType<T>,
        nullptr};
    megatron_qwen::attention_forward({problem, heads(q, sizes_.rows_q, sizes_.heads_q),
                                      heads(k, sizes_.rows_k, sizes_.heads_k), heads(v, sizes_.rows_k, sizes_.heads_k),
                                      our_out.data(), our_lse.data()});
    require(cudaDeviceSynchronize());
    const std::string name = "attention of " + std::to_string(sizes_.rows_k) + " keys: ";
    expect_close(name + "output", our_out, out);
    // A sum in fp32 may round a rotated head to its other neighbour.
    expect_close(name + "lse", our_lse, lse, kTolerance<T>);
  }

  Sizes sizes_;
  Values q_, k_, v_, scales_, cos_, sin_;
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
  if (!has_device("attention_forward_device_test")) return 77;
  cudaDeviceProp device{};
  require(cudaGetDeviceProperties(&device, 0));
  if (device.major != 9) {
    std::puts("attention_forward_device_test: no device of sm_90, skipped");
    return 77;
  }
  test_all<__nv_bfloat16>();
  test_all<__half>();
  if (passed) std::puts("attention_forward_device_test: all checks passed");
  return passed ? 0 : 1;
}
