// On a device: rms_norm and swiglu against fp64 on the host, outputs full of NaN before, guards around them.
// Exits 77 (skipped) where there is none.
#include "device_test.cuh"
#include "megatron_qwen/rms_norm.h"
#include "megatron_qwen/swiglu.h"

namespace {

template <typename T>
void test_swiglu(std::int64_t rows, std::int64_t width) {
  const Values packed = random_values<T>(rows * 2 * width, 1, 6.0), grad = random_values<T>(rows * width, 2, 1.0);
  Values out(rows * width), grad_packed(rows * 2 * width);
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t column = 0; column < width; ++column) {
      const std::int64_t gate_at = row * 2 * width + column, here = row * width + column;
      const double gate = packed[gate_at], up = packed[gate_at + width], s = 1.0 / (1.0 + std::exp(-gate));
      out[here] = gate * s * up;
      grad_packed[gate_at] = grad[here] * up * s * (1.0 + gate * (1.0 - s));
      grad_packed[gate_at + width] = grad[here] * gate * s;
    }
  }
  const Buffer<T> packed_in(packed), grad_in(grad), ours(out.size()), our_grad(grad_packed.size());
  megatron_qwen::swiglu_forward({packed_in.data(), ours.data(), rows, width, 2 * width, kDType<T>, nullptr});
  megatron_qwen::swiglu_backward(
      {grad_in.data(), packed_in.data(), our_grad.data(), rows, width, width, 2 * width, kDType<T>, nullptr});
  require(cudaDeviceSynchronize());
  const std::string name = "swiglu " + std::to_string(rows) + " x " + std::to_string(width);
  expect_close(name + " forward", ours, out);
  expect_close(name + " backward", our_grad, grad_packed);
}

struct Norm {
  Values y, sum, inverse_rms, grad_x, grad_weight;
};

// grad is of y and of the sum. The sum is rounded to T before it is normalised.
template <typename T>
Norm exact_norm(const Values& x, const Values& residual, const Values& weight, const Values& grad, double eps) {
  const std::size_t hidden = weight.size(), rows = x.size() / hidden;
  Norm norm{x, x, Values(rows), x, Values(hidden)};
  for (std::size_t row = 0; row < rows; ++row) {
    double squares = 0.0, projection = 0.0;
    for (std::size_t i = row * hidden; i < (row + 1) * hidden; ++i) {
      norm.sum[i] = static_cast<float>(T(static_cast<float>(x[i] + residual[i])));
      squares += norm.sum[i] * norm.sum[i];
    }
    const double r = norm.inverse_rms[row] = 1.0 / std::sqrt(squares / hidden + eps);
    for (std::size_t i = row * hidden; i < (row + 1) * hidden; ++i) {
      norm.y[i] = norm.sum[i] * r * weight[i % hidden];
      norm.grad_weight[i % hidden] += grad[i] * norm.sum[i] * r;
      projection += grad[i] * weight[i % hidden] * norm.sum[i] * r / hidden;
    }
    for (std::size_t i = row * hidden; i < (row + 1) * hidden; ++i) {
      norm.grad_x[i] = (grad[i] * weight[i % hidden] - norm.sum[i] * r * projection) * r + grad[i];
    }
  }
  return norm;
}

template <typename T>
void test_rms_norm(std::int64_t rows, std::int64_t hidden) {
  const std::size_t count = rows * hidden;
  const Values x = random_values<T>(count, 3, 3.0), residual = random_values<T>(count, 4, 3.0);
  const Values weight = random_values<T>(hidden, 5, 2.0), grad = random_values<T>(count, 6, 1.0);
  const double eps = 1e-6;
  const Norm exact = exact_norm<T>(x, residual, weight, grad, eps);
  const std::int64_t programs = megatron_qwen::rms_norm_backward_programs(rows, hidden, kDType<T>, true);
  const Buffer<T> x_in(x), residual_in(residual), weight_in(weight), grad_in(grad);
  const Buffer<T> y(count), sum(count), grad_x(count), grad_weight(hidden);
  const Buffer<float> inverse_rms(rows), partial(programs * hidden);
  megatron_qwen::rms_norm_forward({x_in.data(), residual_in.data(), weight_in.data(), y.data(), sum.data(),
                                   inverse_rms.data(), rows, hidden, hidden, hidden, static_cast<float>(eps), kDType<T>,
                                   kDType<T>, nullptr});
  megatron_qwen::rms_norm_backward({grad_in.data(), grad_in.data(), sum.data(), weight_in.data(), inverse_rms.data(),
                                    grad_x.data(), grad_weight.data(), partial.data(), rows, hidden, hidden, programs,
                                    kDType<T>, kDType<T>, nullptr});
  require(cudaDeviceSynchronize());
  const std::string name = "rms_norm " + std::to_string(rows) + " x " + std::to_string(hidden);
  expect_close(name + " y", y, exact.y);
  expect_close(name + " sum", sum, exact.sum);
  expect_close(name + " inverse_rms", inverse_rms, exact.inverse_rms);
  expect_close(name + " grad_x", grad_x, exact.grad_x);
  expect_close(name + " grad_weight", grad_weight, exact.grad_weight);
  partial.read(name + " partial");
}

template <typename T>
void test_all() {
  for (const std::int64_t width : {1, 7, 8, 9, 127, 4864, 18944}) test_swiglu<T>(33, width);
  test_swiglu<T>(5000, 296);
  for (const std::int64_t hidden : {1, 7, 8, 9, 127, 896, 3584, 8192, 8200, 16383, 16384}) test_rms_norm<T>(3, hidden);
  test_rms_norm<T>(5000, 896);
  test_rms_norm<T>(1000, 1001);
}

}  // namespace

int main() {
  if (!has_device("norm_device_test")) return 77;
  test_all<float>();
  test_all<__nv_bfloat16>();
  test_all<__half>();
  if (passed) std::puts("norm_device_test: all checks passed");
  return passed ? 0 : 1;
}
