#include "megatron_qwen/build_info.h"

#include <sstream>

namespace megatron_qwen {

std::vector<std::string> split_list(const std::string& text) {
  std::vector<std::string> items;
  std::istringstream stream(text);
  for (std::string item; std::getline(stream, item, ',');) {
    if (!item.empty()) items.push_back(item);
  }
  return items;
}

BuildInfo build_info() {
  BuildInfo info;
  info.version = MEGATRON_QWEN_VERSION;
  info.cxx_compiler = MEGATRON_QWEN_CXX_COMPILER;
  info.cuda_compiler = MEGATRON_QWEN_CUDA_COMPILER;
  info.cuda_compiled = !info.cuda_compiler.empty();
  if (info.cuda_compiled) info.cuda_architectures = split_list(MEGATRON_QWEN_CUDA_ARCHITECTURES);
  return info;
}

}  // namespace megatron_qwen
