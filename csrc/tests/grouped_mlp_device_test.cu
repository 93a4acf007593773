// On a device: the grouped GEMMs against fp64 on the host, outputs full of NaN before, guards around them.
// Exits 77 (skipped) where there is none of sm_90.
#include <memory>
#include <numeric>

#include "device_test.cuh"
#include "megatron_qwen/grouped_mlp.h"

namespace {

using megatron_qwen::ExpertGroups;

struct Sizes {
  std::vector<std::int64_t> rows;  // of each expert
  std::int64_t tokens, size, width, shared_width;
};

// fp64 of what the launches compute. Rows are those of the experts, and behind them one per token.
template <typename T>
class Problem {
 public:
  explicit Problem(const Sizes& sizes) : sizes_(sizes) {
    const auto experts = static_cast<std::int64_t>(sizes.rows.size());
    offsets_.assign(1, 0);
    for (const std::int64_t rows : sizes.rows) offsets_.push_back(offsets_.back() + rows);
    routed_ = offsets_.back();
    for (std::int64_t row = 0; row < routed_; ++row) token_of_.push_back((7 * row + 3) % sizes.tokens);
    for (std::int64_t token = 0; token < sizes.tokens; ++token) token_of_.push_back(token);
    x_ = random_values<T>(sizes.tokens * sizes.size, 1, 1.0);
    for (std::int64_t group = 0; group <= experts; ++group) {
      const double scale = 1.0 / std::sqrt(static_cast<double>(sizes.size));
      fc1_.push_back(random_values<T>(2 * width(group) * sizes.size, 10 + group, scale));
    }
  }

  std::int64_t rows() const { return routed_ + sizes_.tokens; }
  std::int64_t group_of(std::int64_t row) const {
    return std::upper_bound(offsets_.begin(), offsets_.end(), row) - offsets_.begin() - 1;
  }
  std::int64_t width(std::int64_t group) const {
    return group < static_cast<std::int64_t>(sizes_.rows.size()) ? sizes_.width : sizes_.shared_width;
  }
  // Where a row begins in a flat buffer.
  std::int64_t place(std::int64_t row, std::int64_t factor) const {
    return factor *
           (row < routed_ ? row * sizes_.width : routed_ * sizes_.width + (row - routed_) * sizes_.shared_width);
  }

  // Forward, and the gradient of W1 for a gradient of packed that equals it.
  void test() {
    Values packed(place(rows(), 2)), hidden(place(rows(), 1)), back(rows() * sizes_.size);
    std::vector<Values> grads;
    for (const Values& matrix : fc1_) grads.emplace_back(matrix.size());
    for (std::int64_t row = 0; row < rows(); ++row) multiply(row, packed, hidden);
    // What the next launches read is rounded.
    for (double& each : packed) each = static_cast<float>(T(static_cast<float>(each)));
    for (std::int64_t row = 0; row < rows(); ++row) use(row, packed, back, grads);
    run(packed, hidden, back, grads);
  }

 private:
  void multiply(std::int64_t row, Values& packed, Values& hidden) const {
    const std::int64_t group = group_of(row);
    for (std::int64_t column = 0; column < 2 * width(group); ++column) {
      packed[place(row, 2) + column] =
          std::inner_product(&x_[token_of_[row] * sizes_.size], &x_[token_of_[row] * sizes_.size] + sizes_.size,
                             &fc1_[group][column * sizes_.size], 0.0);
    }
    const double* first = &packed[place(row, 2)];
    for (std::int64_t column = 0; column < width(group); ++column) {
      const double gate = first[column];
      hidden[place(row, 1) + column] = gate / (1.0 + std::exp(-gate)) * first[width(group) + column];
    }
  }

  void use(std::int64_t row, const Values& packed, Values& back, std::vector<Values>& grads) const {
    const std::int64_t group = group_of(row), own = width(group);
    const double* first = &packed[place(row, 2)];
    for (std::int64_t column = 0; column < 2 * own; ++column) {
      for (std::int64_t i = 0; i < sizes_.size; ++i) {
        const std::int64_t at = column * sizes_.size + i;
        back[row * sizes_.size + i] += first[column] * fc1_[group][at];
        grads[group][at] += first[column] * x_[token_of_[row] * sizes_.size + i];
      }
    }
  }

  void run(const Values& packed, const Values& hidden, const Values& back, const std::vector<Values>& grads) const {
    const Buffer<T> x(x_), packed_in(packed), our_packed(packed.size()), our_hidden(hidden.size()), out(back.size());
    std::vector<std::unique_ptr<Buffer<T>>> fc1, our_grads;
    std::vector<const void*> matrices;
    std::vector<void*> gradients;
    for (const Values& matrix : fc1_) {
      fc1.push_back(std::make_unique<Buffer<T>>(matrix));
      our_grads.push_back(std::make_unique<Buffer<T>>(matrix.size()));
      matrices.push_back(fc1.back()->data());
      gradients.push_back(our_grads.back()->data());
    }
    const Integers<std::int64_t> offsets(offsets_);
    const Integers<std::int32_t> tokens(token_of_);
    const ExpertGroups groups{offsets.data(), tokens.data(), static_cast<std::int64_t>(sizes_.rows.size()),
                              routed_,        sizes_.tokens, sizes_.tokens,
                              sizes_.size,    sizes_.width,  sizes_.shared_width,
                              kDType<T>,      nullptr};
    megatron_qwen::grouped_up({groups, x.data(), matrices.data(), our_packed.data(), our_hidden.data()});
    megatron_qwen::grouped_down({groups, packed_in.data(), matrices.data(), nullptr, out.data(), 2, false});
    megatron_qwen::grouped_weight_gradient(
        {groups, packed_in.data(), x.data(), gradients.data(), 2, false, false, kDType<T>});
    require(cudaDeviceSynchronize());
    const std::string name = "grouped GEMM, H " + std::to_string(sizes_.size) + ": ";
    expect_close(name + "packed", our_packed, packed);
    expect_close(name + "hidden", our_hidden, hidden);
    expect_close(name + "input gradient", out, back);
    for (std::size_t group = 0; group < grads.size(); ++group) {
      expect_close(name + "gradient of W1 of group " + std::to_string(group), *our_grads[group], grads[group]);
    }
  }

  template <typename I>
  class Integers {
   public:
    explicit Integers(const std::vector<std::int64_t>& values) {
      const std::vector<I> narrow(values.begin(), values.end());
      require(cudaMalloc(&memory_, narrow.size() * sizeof(I)));
      require(cudaMemcpy(memory_, narrow.data(), narrow.size() * sizeof(I), cudaMemcpyHostToDevice));
    }
    ~Integers() { cudaFree(memory_); }
    Integers(const Integers&) = delete;
    Integers& operator=(const Integers&) = delete;
    const I* data() const { return static_cast<const I*>(memory_); }

   private:
    void* memory_ = nullptr;
  };

  Sizes sizes_;
  std::int64_t routed_ = 0;
  std::vector<std::int64_t> offsets_, token_of_;
  Values x_;
  std::vector<Values> fc1_;
};

template <typename T>
void test_all() {
  Problem<T>({{5}, 3, 64, 64, 64}).test();
  Problem<T>({{0, 1, 131, 0, 64, 63, 0}, 67, 136, 40, 264}).test();
  Problem<T>({{300, 200, 0, 129}, 257, 520, 264, 8}).test();
}

}  // namespace

int main() {
  if (!has_device("grouped_mlp_device_test")) return 77;
  cudaDeviceProp device{};
  require(cudaGetDeviceProperties(&device, 0));
  if (device.major != 9) {
    std::puts("grouped_mlp_device_test: no device of sm_90, skipped");
    return 77;
  }
  test_all<__nv_bfloat16>();
  test_all<__half>();
  if (passed) std::puts("grouped_mlp_device_test: all checks passed");
  return passed ? 0 : 1;
}
