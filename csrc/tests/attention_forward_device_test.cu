// On a device: the forward pass of Dual Chunk Attention against fp64 on the host, outputs full of NaN before, guards
// around them.
#include "attention_problem.cuh"

namespace {

template <typename T>
class Forward : AttentionOnHost<T> {
 public:
  using AttentionOnHost<T>::AttentionOnHost;

  void test() {
    this->for_each_row(
        [&](std::int64_t batch, std::int64_t row, std::int64_t head) { this->attend(batch, row, head); });
    const AttentionSizes& sizes = this->sizes_;
    Values rotated;
    for (std::int64_t at = 0; at < sizes.numbers_k(); at += sizes.head_dim) {
      const Values key = this->rotated_key(at, at / sizes.head_dim / sizes.heads_k % sizes.rows_k);
      rotated.insert(rotated.end(), key.begin(), key.end());
    }
    const Buffer<T> q(this->q_), k(rotated), v(this->v_), out(this->out_.size());
    const Buffer<float> scales(this->scales_), cos(this->cos_), sin(this->sin_), lse(this->lse_.size());
    megatron_qwen::attention_forward({this->problem(cos, sin, scales), this->heads(q, sizes.rows_q, sizes.heads_q),
                                      this->heads(k, sizes.rows_k, sizes.heads_k),
                                      this->heads(v, sizes.rows_k, sizes.heads_k), out.data(), lse.data()});
    require(cudaDeviceSynchronize());
    expect_close(this->name() + "output", out, this->out_);
    // A sum in fp32 may round a rotated head to its other neighbour.
    expect_close(this->name() + "lse", lse, this->lse_, kTolerance<T>);
  }
};

}  // namespace

int main() { return test_attention<Forward>("attention_forward_device_test"); }
