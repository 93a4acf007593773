// Parameters of qkv_rope and rope without a device: exits 0, or prints what differed and exits 1.
#include <cstdint>
#include <functional>
#include <iostream>
#include <stdexcept>
#include <string>

#include "megatron_qwen/qkv_rope.h"

namespace {

using megatron_qwen::DType;
using megatron_qwen::QkvRopeBackwardParams;
using megatron_qwen::QkvRopeForwardParams;
using megatron_qwen::RopeParams;
using megatron_qwen::RopeTables;
using megatron_qwen::StridedHeads;

constexpr std::int64_t kTwo31 = std::int64_t{1} << 31;
constexpr std::int64_t kTwo62 = std::int64_t{1} << 62;
int failures = 0;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::cerr << "FAILED: " << what << "\n";
  ++failures;
}

// Addresses are only looked at.
template <typename T>
T* address(std::uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

// Changes good parameters and looks for `words` in the error.
template <typename Params>
void expect_rejected(Params params, const std::function<void(Params&)>& change, const std::string& words) {
  change(params);
  try {
    megatron_qwen::check(params);
  } catch (const std::invalid_argument& error) {
    const std::string message = error.what();
    expect(message.find(words) != std::string::npos, "message \"" + message + "\" does not say \"" + words + "\"");
    return;
  }
  expect(false, "accepted, though it should say \"" + words + "\"");
}

RopeTables tables() { return {address<float>(0x1000), address<float>(0x2000), nullptr, 0, 2, 4096, 64}; }
StridedHeads heads(std::uintptr_t data, std::int64_t count) {
  return {address<void>(data), 2 * count * 128, count * 128, 128};
}

QkvRopeForwardParams forward() {
  QkvRopeForwardParams params{};
  params.packed = address<void>(0x10000);
  params.q = address<void>(0x20000);
  params.k = address<void>(0x30000);
  params.v = address<void>(0x40000);
  params.bias = address<void>(0x50000);
  params.tables = tables();
  params.layout = {4, 7, 128};
  params.tokens = 8192;
  params.packed_stride = 4608;
  params.dtype = params.bias_dtype = DType::kBFloat16;
  return params;
}

QkvRopeBackwardParams backward() {
  QkvRopeBackwardParams params{};
  params.grad_q = heads(0x10000, 28);
  params.grad_k = heads(0x20000, 4);
  params.grad_v = heads(0x30000, 4);
  params.grad_packed = address<void>(0x40000);
  params.grad_bias = address<void>(0x50000);
  params.partial = address<float>(0x60000);
  params.tables = tables();
  params.layout = {4, 7, 128};
  params.tokens = 8192;
  params.batch = 2;
  params.num_programs = 100;
  params.dtype = params.bias_dtype = DType::kBFloat16;
  return params;
}

RopeParams rope() {
  RopeParams params{};
  params.q = heads(0x10000, 28);
  params.k = heads(0x20000, 4);
  params.tables = tables();
  params.q_heads = 28;
  params.k_heads = 4;
  params.head_dim = 128;
  params.tokens = 8192;
  params.batch = 2;
  params.dtype = DType::kBFloat16;
  return params;
}

void test_forward() {
  using P = QkvRopeForwardParams;
  const P good = forward();
  check(good);
  check(P{});  // no tokens: nothing else is looked at
  expect_rejected<P>(good, [](P& p) { p.tokens = -1; }, "qkv_rope_forward: tokens = -1; expected 0 or more");
  expect_rejected<P>(good, [](P& p) { p.tokens = kTwo31; }, "tokens = 2147483648; expected at most 2147483647");
  expect_rejected<P>(good, [](P& p) { p.packed = nullptr; }, "packed is a null pointer");
  expect_rejected<P>(good, [](P& p) { p.packed = address<void>(0x10001); }, "packed = 0x10001 is not a multiple of 2");
  expect_rejected<P>(good, [](P& p) { p.k = nullptr; }, "k is a null pointer");
  expect_rejected<P>(good, [](P& p) { p.tables.cos = nullptr; }, "cos is a null pointer");
  expect_rejected<P>(good, [](P& p) { p.tables.sin = address<float>(0x2002); }, "sin = 0x2002 is not a multiple of 4");
  expect_rejected<P>(good, [](P& p) { p.tables.half = 65; }, "half = 65; expected at most 64");
  expect_rejected<P>(good, [](P& p) { p.tables.half = 0; }, "half = 0; expected 1 or more");
  expect_rejected<P>(good, [](P& p) { p.tables.rows = 0; }, "table_rows = 0");
  expect_rejected<P>(good, [](P& p) { p.tables.rows = kTwo62; }, "table_rows = 4611686018427387904");
  expect_rejected<P>(good, [](P& p) { p.tables.tokens_per_position = 0; }, "tokens_per_position = 0");
  expect_rejected<P>(good, [](P& p) { p.tables.position_bytes = 4; }, "positions is a null pointer");
  expect_rejected<P>(good, [](P& p) { p.tables.position_bytes = 2; }, "position_bytes = 2; expected 4 (int32), 8");
  expect_rejected<P>(good, [](P& p) { p.layout.groups = 0; }, "groups = 0");
  expect_rejected<P>(good, [](P& p) { p.layout.queries = 0; }, "queries = 0");
  // 2^31 columns: the product of the three is compared, whatever each of them is.
  expect_rejected<P>(good, [](P& p) { p.layout.groups = kTwo62; }, "groups = 4611686018427387904");
  expect_rejected<P>(good, [](P& p) { p.layout.groups = 1 << 22; }, "head_dim = 128; expected at most");
  expect_rejected<P>(good, [](P& p) { p.packed_stride = -1; }, "packed_stride = -1");
  expect_rejected<P>(good, [](P& p) { p.packed_stride = kTwo62; }, "packed_stride = 4611686018427387904");

  P far = good;  // rows 2^31 elements apart are fine
  far.packed_stride = kTwo31;
  check(far);
}

void test_backward_and_rope() {
  using P = QkvRopeBackwardParams;
  const P good = backward();
  check(good);
  check(P{});
  expect_rejected<P>(good, [](P& p) { p.batch = 0; }, "qkv_rope_backward: batch = 0");
  expect_rejected<P>(good, [](P& p) { p.grad_v.data = nullptr; }, "grad_v is a null pointer");
  expect_rejected<P>(good, [](P& p) { p.grad_k.head_stride = -128; }, "grad_k head stride = -128");
  expect_rejected<P>(good, [](P& p) { p.grad_q.sequence_stride = kTwo62; }, "grad_q sequence stride = 46116860184");
  expect_rejected<P>(good, [](P& p) { p.num_programs = 0; }, "num_programs = 0");
  expect_rejected<P>(good, [](P& p) { p.num_programs = kTwo31; }, "num_programs = 2147483648");
  expect_rejected<P>(good, [](P& p) { p.partial = nullptr; }, "partial is a null pointer");
  P without_bias = good;
  without_bias.grad_bias = without_bias.partial = nullptr;
  check(without_bias);

  using R = RopeParams;
  const R rotation = rope();
  check(rotation);
  check(R{});
  expect_rejected<R>(rotation, [](R& p) { p.q.data = nullptr; }, "rope: q is a null pointer");
  expect_rejected<R>(rotation, [](R& p) { p.k.data = nullptr; }, "rope: k is a null pointer");
  expect_rejected<R>(rotation, [](R& p) { p.q_heads = 0; }, "q_heads = 0");
  expect_rejected<R>(rotation, [](R& p) { p.head_dim = 126; }, "half = 64; expected at most 63");
  R only_q = rotation;
  only_q.k = {};
  only_q.k_heads = 0;
  check(only_q);
}

void test_vectors() {
  const auto forward_is_wide = [](const std::function<void(QkvRopeForwardParams&)>& change) {
    QkvRopeForwardParams params = forward();
    change(params);
    return moves_vectors(params);
  };
  using P = QkvRopeForwardParams;
  expect(forward_is_wide([](P&) {}), "7B moves 16 bytes");
  expect(forward_is_wide([](P& p) { p.bias = nullptr; }), "and without a bias");
  expect(!forward_is_wide([](P& p) { p.packed = address<void>(0x10008); }), "not from a misaligned address");
  expect(!forward_is_wide([](P& p) { p.packed_stride = 4612; }), "nor at a misaligned row");
  expect(!forward_is_wide([](P& p) { p.bias_dtype = DType::kFloat32; }), "nor with a bias of another dtype");
  expect(!forward_is_wide([](P& p) { p.tables.half = 20; }), "nor where a half is no multiple of 8");
  expect(forward_is_wide([](P& p) {
           p.tables.half = 20;
           p.dtype = p.bias_dtype = DType::kFloat32;
         }),
         "in fp32 a multiple of 4 will do");
  QkvRopeBackwardParams gradient = backward();
  expect(moves_vectors(gradient), "the gradient, too");
  gradient.grad_k.head_stride = 132;
  expect(!moves_vectors(gradient), "but not at misaligned heads");
  RopeParams rotation = rope();
  expect(moves_vectors(rotation), "and rotation alone");
  rotation.k.data = address<void>(0x20002);
  expect(!moves_vectors(rotation), "but not of misaligned keys");
  rotation.k_heads = 0;
  expect(moves_vectors(rotation), "unless there are none");
}

}  // namespace

int main() {
  test_forward();
  test_backward_and_rope();
  test_vectors();
  if (failures == 0) std::cout << "qkv_rope_host_test: all checks passed\n";
  return failures == 0 ? 0 : 1;
}
