#include "megatron_qwen/dtype.h"

#include <sstream>
#include <stdexcept>

namespace megatron_qwen {

std::int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
  }
  throw std::invalid_argument("name_of: not a dtype: " + std::to_string(static_cast<int>(dtype)));
}

DType parse_dtype(const char* op, const char* argument, const std::string& name) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    if (name == name_of(dtype)) return dtype;
  }
  std::ostringstream message;
  message << op << ": " << argument << " is \"" << name << "\"; expected float32, bfloat16 or float16";
  throw std::invalid_argument(message.str());
}

}  // namespace megatron_qwen
