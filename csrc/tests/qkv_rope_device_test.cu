// On a device: qkv_rope and rope against fp64 on the host, outputs full of NaN before, guards around them.
// Exits 77 (skipped) where there is none.
#include "device_test.cuh"
#include "megatron_qwen/qkv_rope.h"

namespace {

using megatron_qwen::QkvLayout;
using megatron_qwen::RopeTables;
using megatron_qwen::StridedHeads;

struct Case {
  QkvLayout layout;
  std::int64_t half, sequence, batch;

  std::int64_t per_group() const { return layout.queries + 2; }
  std::int64_t heads() const { return layout.groups * per_group(); }
  std::int64_t tokens() const { return sequence * batch; }
};

constexpr std::int64_t kTableRows = 97;

// A position per token, so that rows of the tables are read out of order.
std::int64_t position_of(std::int64_t token) { return token * 31 % kTableRows; }

// Where a head of a packed row is in q (first), k (second) or v (third).
struct Place {
  int tensor;
  std::int64_t head;
};

Place place_of(const Case& shape, std::int64_t head) {
  const std::int64_t group = head / shape.per_group(), slot = head % shape.per_group();
  if (slot < shape.layout.queries) return {0, group * shape.layout.queries + slot};
  return {slot == shape.layout.queries ? 1 : 2, group};
}

// Rotates one head, in place, by the angle of `position`; sign -1 rotates back.
void rotate(double* head, const Values& cos, const Values& sin, std::int64_t position, std::int64_t half, double sign) {
  for (std::int64_t i = 0; i < half; ++i) {
    const double c = cos[position * half + i], s = sign * sin[position * half + i];
    const double first = head[i], second = head[i + half];
    head[i] = first * c - second * s;
    head[i + half] = second * c + first * s;
  }
}

StridedHeads heads_of(void* data, const Case& shape, std::int64_t count) {
  const std::int64_t row = count * shape.layout.head_dim;
  return {data, shape.batch * row, row, shape.layout.head_dim};
}

template <typename T>
void test_case(const Case& shape) {
  const std::int64_t dim = shape.layout.head_dim, tokens = shape.tokens(), width = shape.heads() * dim;
  const std::int64_t counts[] = {shape.layout.groups * shape.layout.queries, shape.layout.groups, shape.layout.groups};
  const Values packed = random_values<T>(tokens * width, 1, 2.0), bias = random_values<T>(width, 2, 1.0);
  const Values cos = random_values<float>(kTableRows * shape.half, 3, 1.0);
  const Values sin = random_values<float>(kTableRows * shape.half, 4, 1.0);
  Values grads[3], outputs[3];
  for (int i = 0; i < 3; ++i) {
    grads[i] = random_values<T>(tokens * counts[i] * dim, 5 + i, 1.0);
    outputs[i] = Values(tokens * counts[i] * dim);
  }
  Values grad_packed(tokens * width), grad_bias(width);
  std::vector<std::int32_t> positions(tokens);
  for (std::int64_t token = 0; token < tokens; ++token) {
    positions[token] = static_cast<std::int32_t>(position_of(token));
    for (std::int64_t head = 0; head < shape.heads(); ++head) {
      const Place place = place_of(shape, head);
      const std::int64_t at = token * width + head * dim;
      const std::int64_t there = (token * counts[place.tensor] + place.head) * dim;
      double* out = &outputs[place.tensor][there];
      for (std::int64_t i = 0; i < dim; ++i) {
        out[i] = packed[at + i] + bias[head * dim + i];
        grad_packed[at + i] = grads[place.tensor][there + i];
      }
      if (place.tensor < 2) {
        rotate(out, cos, sin, positions[token], shape.half, 1.0);
        rotate(&grad_packed[at], cos, sin, positions[token], shape.half, -1.0);
      }
      for (std::int64_t i = 0; i < dim; ++i) grad_bias[head * dim + i] += grad_packed[at + i];
    }
  }

  const Buffer<T> packed_in(packed), bias_in(bias), q(outputs[0].size()), k(outputs[1].size()), v(outputs[2].size());
  const Buffer<T> grad_q(grads[0]), grad_k(grads[1]), grad_v(grads[2]), our_grad(grad_packed.size());
  const Buffer<float> cos_in(cos), sin_in(sin);
  std::int32_t* positions_in = nullptr;
  require(cudaMalloc(&positions_in, tokens * sizeof(std::int32_t)));
  require(cudaMemcpy(positions_in, positions.data(), tokens * sizeof(std::int32_t), cudaMemcpyHostToDevice));
  const RopeTables tables{cos_in.data(), sin_in.data(), positions_in, 4, 1, kTableRows, shape.half};
  const DType dtype = kDType<T>;
  megatron_qwen::qkv_rope_forward({packed_in.data(), bias_in.data(), q.data(), k.data(), v.data(), tables, shape.layout,
                                   tokens, width, dtype, dtype, nullptr});
  const std::int64_t programs = megatron_qwen::qkv_rope_backward_programs(shape.layout, shape.half, tokens, dtype);
  // The bias's gradient in fp32: its sums are compared more closely.
  const Buffer<float> partial(programs * width), our_grad_bias(width);
  megatron_qwen::qkv_rope_backward(
      {heads_of(grad_q.data(), shape, counts[0]), heads_of(grad_k.data(), shape, counts[1]),
       heads_of(grad_v.data(), shape, counts[2]), our_grad.data(), our_grad_bias.data(), partial.data(), tables,
       shape.layout, tokens, shape.batch, programs, dtype, DType::kFloat32, nullptr});
  require(cudaDeviceSynchronize());
  const std::string name = "qkv_rope " + std::to_string(tokens) + " x " + std::to_string(width);
  expect_close(name + " q", q, outputs[0]);
  expect_close(name + " k", k, outputs[1]);
  expect_close(name + " v", v, outputs[2]);
  expect_close(name + " grad_packed", our_grad, grad_packed);
  expect_close(name + " grad_bias", our_grad_bias, grad_bias);
  partial.read(name + " partial");

  // The gradients of q and k once more, rotated back where they are.
  for (int i = 0; i < 2; ++i) {
    for (std::int64_t head = 0; head < tokens * counts[i]; ++head) {
      rotate(&grads[i][head * dim], cos, sin, positions[head / counts[i]], shape.half, -1.0);
    }
  }
  megatron_qwen::rope({heads_of(grad_q.data(), shape, counts[0]), heads_of(grad_k.data(), shape, counts[1]), tables,
                       counts[0], counts[1], dim, tokens, shape.batch, true, dtype, nullptr});
  require(cudaDeviceSynchronize());
  expect_close(name + " rope q", grad_q, grads[0]);
  expect_close(name + " rope k", grad_k, grads[1]);
  require(cudaFree(positions_in));
}

template <typename T>
void test_all() {
  for (const std::int64_t sequence : {1, 7, 1000}) {
    test_case<T>({{4, 7, 128}, 64, sequence, 1});  // 7B
    test_case<T>({{2, 7, 64}, 32, sequence, 2});   // 0.5B
    test_case<T>({{1, 8, 128}, 64, sequence, 1});  // 72B on 8 ranks
    test_case<T>({{2, 3, 128}, 32, sequence, 2});  // rotated in part
    test_case<T>({{3, 2, 50}, 15, sequence, 3});   // nothing is a multiple of 16 bytes
  }
}

}  // namespace

int main() {
  if (!has_device("qkv_rope_device_test")) return 77;
  test_all<float>();
  test_all<__nv_bfloat16>();
  test_all<__half>();
  if (passed) std::puts("qkv_rope_device_test: all checks passed");
  return passed ? 0 : 1;
}
