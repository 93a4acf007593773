// The dtypes kernels take. Addresses come without a type, so every parameter struct says which one they have.
#pragma once

#include <cstdint>
#include <string>

namespace megatron_qwen {

enum class DType : std::int32_t { kFloat32, kBFloat16, kFloat16 };

// Bytes of one element.
std::int64_t size_of(DType dtype);

// "float32", "bfloat16" or "float16", as torch names them.
const char* name_of(DType dtype);

// The inverse of name_of. Throws std::invalid_argument naming `op`, the argument and what is accepted.
DType parse_dtype(const char* op, const char* argument, const std::string& name);

}  // namespace megatron_qwen
