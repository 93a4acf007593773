// From a dtype known at run time to the type a kernel is compiled for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "megatron_qwen/dtype.h"

namespace megatron_qwen {

template <typename T>
struct TypeTag {
  using type = T;
};

template <typename T>
constexpr DType dtype_of = DType::kFloat32;
template <>
constexpr DType dtype_of<__nv_bfloat16> = DType::kBFloat16;
template <>
constexpr DType dtype_of<__half> = DType::kFloat16;

// Calls launch(TypeTag<T>{}) with the T of `dtype`.
template <typename Launch>
void dispatch(DType dtype, Launch&& launch) {
  switch (dtype) {
    case DType::kFloat32:
      return launch(TypeTag<float>{});
    case DType::kBFloat16:
      return launch(TypeTag<__nv_bfloat16>{});
    case DType::kFloat16:
      return launch(TypeTag<__half>{});
  }
  throw std::invalid_argument("dispatch: not a dtype: " + std::to_string(static_cast<int>(dtype)));
}

// The same where there are kernels for the 16-bit types only; check() refuses the others.
template <typename Launch>
void dispatch_16_bits(DType dtype, Launch&& launch) {
  if (dtype == DType::kFloat16) return launch(TypeTag<__half>{});
  launch(TypeTag<__nv_bfloat16>{});
}

}  // namespace megatron_qwen
