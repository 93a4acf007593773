// On a device: the gradient of Dual Chunk Attention against fp64 on the host, outputs full of NaN before, guards around
// them, and the same bits twice.
#include "attention_problem.cuh"
#include "megatron_qwen/attention_backward.h"

namespace {

template <typename T>
class Backward : AttentionOnHost<T> {
 public:
  explicit Backward(const AttentionSizes& sizes)
      : AttentionOnHost<T>(sizes),
        grad_(random_values<T>(sizes.numbers_q(), 4, 1.0)),
        dq_(sizes.numbers_q()),
        dk_(sizes.numbers_k()),
        dv_(sizes.numbers_k()) {}

  void test() {
    this->for_each_row(
        [&](std::int64_t batch, std::int64_t row, std::int64_t head) { differentiate(batch, row, head); });
    run();
  }

 private:
  // What a row adds to the gradients.
  void differentiate(std::int64_t batch, std::int64_t row, std::int64_t head) {
    const AttentionSizes& sizes = this->sizes_;
    const std::int64_t size = sizes.head_dim, at = sizes.query_at(batch, row, head);
    const Values weights = this->attend(batch, row, head);
    const double delta = dot(&grad_[at], &this->out_[at], size);
    for (std::int64_t column = 0; column < static_cast<std::int64_t>(weights.size()); ++column) {
      const std::int64_t key_at = sizes.key_at(batch, column, head);
      const double dp = dot(&grad_[at], &this->v_[key_at], size);
      const double ds = weights[column] * (dp - delta) * this->scale_of(row);
      const Values query = this->rotated_query(batch, row, head, column), key = this->rotated_key(key_at, column);
      const std::int64_t towards = this->position_towards(row + sizes.query_start(), column);
      const Values to_query = this->turned(key.data(), towards, -1.0);
      const Values to_key = this->turned(query.data(), column % sizes.stride, -1.0);
      for (std::int64_t i = 0; i < size; ++i) {
        dq_[at + i] += ds * to_query[i];
        dk_[key_at + i] += ds * to_key[i];
        dv_[key_at + i] += weights[column] * grad_[at + i];
      }
    }
  }

  void run() const {
    const AttentionSizes& sizes = this->sizes_;
    const std::int64_t batch = sizes.batch, rows_q = sizes.rows_q, rows_k = sizes.rows_k, size = sizes.head_dim;
    const std::int64_t heads_q = sizes.heads_q, heads_k = sizes.heads_k;
    const Buffer<T> q(this->q_), k(this->k_), v(this->v_), grad(grad_), out(this->out_), queries(3 * this->q_.size());
    const Buffer<T> keys(this->k_.size());
    const Buffer<float> scales(this->scales_), cos(this->cos_), sin(this->sin_), lse(this->lse_);
    const Buffer<float> exponents(this->lse_.size()), deltas(this->lse_.size());
    megatron_qwen::AttentionProblem problem = this->problem(cos, sin, scales);
    const AttentionHeads of_grad = this->heads(grad, rows_q, heads_q);
    megatron_qwen::attention_rotate({this->heads(q, rows_q, heads_q), batch, rows_q, heads_q, size, nullptr,
                                     sizes.query_start(), problem.tables, problem.chunks, 3, queries.data(), kDType<T>,
                                     nullptr});
    megatron_qwen::attention_rotate({this->heads(k, rows_k, heads_k), batch, rows_k, heads_k, size, nullptr, 0,
                                     problem.tables, problem.chunks, 1, keys.data(), kDType<T>, nullptr});
    megatron_qwen::attention_row_terms({of_grad, this->heads(out, rows_q, heads_q), batch, rows_q, heads_q, size,
                                        lse.data(), exponents.data(), deltas.data(), kDType<T>, nullptr});
    megatron_qwen::AttentionBackwardInputs of_queries{problem,
                                                      this->heads(queries, rows_q, heads_q),
                                                      this->heads(keys, rows_k, heads_k),
                                                      this->heads(v, rows_k, heads_k),
                                                      of_grad,
                                                      exponents.data(),
                                                      deltas.data()};
    megatron_qwen::AttentionBackwardInputs of_keys = of_queries;
    of_keys.problem.tiles.slots = batch * (sizes.tile_of(rows_k - 1) + 1);
    of_keys.problem.tiles.first = 0;
    Values before;
    for (int turn = 0; turn < 2; ++turn) {
      const Buffer<T> dq(dq_.size()), dk(dk_.size()), dv(dv_.size());
      megatron_qwen::attention_keys_backward({of_keys, true, dk.data(), dv.data()});
      megatron_qwen::attention_queries_backward({of_queries, dq.data()});
      require(cudaDeviceSynchronize());
      // Output, probabilities and their gradients are rounded as well.
      expect_close(this->name() + "dq", dq, dq_, 4 * kTolerance<T>);
      expect_close(this->name() + "dk", dk, dk_, 4 * kTolerance<T>);
      expect_close(this->name() + "dv", dv, dv_, 4 * kTolerance<T>);
      Values all = dq.read("dq");
      for (const Values& each : {dk.read("dk"), dv.read("dv")}) all.insert(all.end(), each.begin(), each.end());
      if (turn == 1 && all != before) {
        std::fprintf(stderr, "FAILED: %sother bits the second time\n", this->name().c_str());
        passed = false;
      }
      before = all;
    }
  }

  Values grad_, dq_, dk_, dv_;
};

}  // namespace

int main() { return test_attention<Backward>("attention_backward_device_test"); }
