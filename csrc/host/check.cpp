#include "megatron_qwen/check.h"

#include <sstream>
#include <stdexcept>

namespace megatron_qwen {
namespace {

[[noreturn]] void reject(const std::ostringstream& message) { throw std::invalid_argument(message.str()); }

}  // namespace

void require_pointer(const char* op, const char* name, const void* pointer) {
  if (pointer != nullptr) return;
  std::ostringstream message;
  message << op << ": " << name << " is a null pointer; expected device memory";
  reject(message);
}

void require_aligned(const char* op, const char* name, const void* pointer, std::int64_t bytes) {
  require_pointer(op, name, pointer);
  if (is_multiple(pointer, bytes)) return;
  std::ostringstream message;
  message << op << ": " << name << " = 0x" << std::hex << reinterpret_cast<std::uintptr_t>(pointer) << std::dec
          << " is not a multiple of " << bytes << " bytes; pass the start of an allocation or an aligned slice";
  reject(message);
}

void require_at_least(const char* op, const char* name, std::int64_t value, std::int64_t least) {
  if (value >= least) return;
  std::ostringstream message;
  message << op << ": " << name << " = " << value << "; expected " << least << " or more";
  reject(message);
}

void require_at_most(const char* op, const char* name, std::int64_t value, std::int64_t most) {
  if (value <= most) return;
  std::ostringstream message;
  message << op << ": " << name << " = " << value << "; expected at most " << most;
  reject(message);
}

}  // namespace megatron_qwen
