// What this build of the extension is; answered without touching a device.
#pragma once

#include <string>
#include <vector>

namespace megatron_qwen {

struct BuildInfo {
  std::string version;                          // of the package the extension was built from
  std::string cxx_compiler;                     // "GNU 12.2.0"
  std::string cuda_compiler;                    // "13.0.88", empty without CUDA
  std::vector<std::string> cuda_architectures;  // as CMake names them: "80", "90a-real"; empty without CUDA
  bool cuda_compiled;
};

BuildInfo build_info();

// Splits "a,b,c"; an empty text gives no element.
std::vector<std::string> split_list(const std::string& text);

}  // namespace megatron_qwen
