#include "megatron_qwen/check.h"
#include "megatron_qwen/column_sum.h"

namespace megatron_qwen {

void check(const ColumnSumParams& params) {
  constexpr const char* kOp = "column_sum";
  require_at_least(kOp, "rows", params.rows, 1);
  require_at_least(kOp, "columns", params.columns, 0);
  // A block has 32 columns.
  require_at_most(kOp, "columns", params.columns, kMaxBlocks * 32);
  if (params.columns == 0) return;
  require_aligned(kOp, "partial", params.partial, 4);
  require_aligned(kOp, "out", params.out, size_of(params.dtype));
}

}  // namespace megatron_qwen
