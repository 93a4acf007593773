#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "dtype.cuh"
#include "launch.cuh"
#include "megatron_qwen/check.h"
#include "megatron_qwen/grouped_mlp.h"
#include "row_epilogue.cuh"
#include "weight_gradient.cuh"

namespace megatron_qwen {
namespace {

// One block per multiprocessor, as the stages fill its shared memory; fewer where there are fewer tiles.
std::int64_t blocks_for(const char* op, std::int64_t most_tiles) {
  return std::min(most_tiles, std::int64_t{num_multiprocessors(op)});
}

bool has_shared(const ExpertGroups& groups) { return groups.shared_tokens != 0; }

// Descriptors of the routed and the shared part of a flat buffer.
void describe_flat(const char* op, const ExpertGroups& groups, const void* flat, std::int64_t width,
                   std::int64_t shared_width, int box_rows, CUtensorMap (&maps)[2]) {
  maps[0] = tensor_map(op, flat, groups.routed, width, box_rows, groups.dtype);
  if (!has_shared(groups)) return;
  const void* beyond = static_cast<const char*>(flat) + groups.routed * width * size_of(groups.dtype);
  maps[1] = tensor_map(op, beyond, groups.shared_tokens, shared_width, box_rows, groups.dtype);
}

// Matrices [rows, columns] of the experts, and [shared rows, shared columns].
struct MatrixShapes {
  std::int64_t rows, columns, shared_rows, shared_columns;
};

template <RowPass kPass>
void describe_matrices(const char* op, const ExpertGroups& groups, const void* const* matrices,
                       const MatrixShapes& shapes, RowGemmParams& gemm) {
  const auto describe = [&](const void* matrix, std::int64_t rows, std::int64_t columns) {
    return tensor_map(op, matrix, rows, columns, kMatrixBoxRows<kPass>, groups.dtype);
  };
  for (std::int64_t i = 0; i < groups.experts; ++i) {
    gemm.matrices[i] = describe(matrices[i], shapes.rows, shapes.columns);
  }
  if (!has_shared(groups)) return;
  gemm.matrices[groups.experts] = describe(matrices[groups.experts], shapes.shared_rows, shapes.shared_columns);
}

// Blocks of rows of a launch: whole ones, and one more per expert at most.
std::int64_t most_row_blocks(const ExpertGroups& groups) {
  return groups.routed / kTileRows + std::min(groups.experts, groups.routed);
}

template <RowPass kPass>
void start_rows(const char* op, const RowGemmParams& gemm) {
  const ExpertGroups& groups = gemm.groups;
  require_sm90(op);
  const std::int64_t tiles =
      most_row_blocks(groups) * ceil_divide(gemm.columns, kColumnsPerTile<kPass>) +
      ceil_divide(groups.shared_tokens, kTileRows) * ceil_divide(gemm.shared_columns, kColumnsPerTile<kPass>);
  dispatch_16_bits(groups.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_with_shared(op, grouped_rows_kernel<kPass, T>, blocks_for(op, tiles), kGemmThreads, kStagesSharedBytes,
                       groups.stream, gemm);
  });
}

// 25 KB, of which a launch fills as much as it has groups.
std::unique_ptr<RowGemmParams> empty_gemm(const ExpertGroups& groups) {
  auto gemm = std::make_unique<RowGemmParams>();
  gemm->groups = groups;
  return gemm;
}

// For the passes from rows of tokens [., H] to rows of a flat buffer.
std::unique_ptr<RowGemmParams> gemm_from_tokens(const ExpertGroups& groups, const void* source) {
  auto gemm = empty_gemm(groups);
  gemm->depth = gemm->shared_depth = groups.size;
  gemm->columns = groups.width;
  gemm->shared_columns = groups.shared_width;
  gemm->source = source;
  return gemm;
}

}  // namespace

void grouped_up(const GroupedUpParams& params) {
  constexpr const char* kOp = "grouped_up";
  check(params);
  const ExpertGroups& groups = params.groups;
  const auto gemm = gemm_from_tokens(groups, params.x);
  gemm->packed = params.packed;
  gemm->hidden = params.hidden;
  describe_matrices<RowPass::kUp>(kOp, groups, params.fc1,
                                  {2 * groups.width, groups.size, 2 * groups.shared_width, groups.size}, *gemm);
  start_rows<RowPass::kUp>(kOp, *gemm);
}

void grouped_down(const GroupedDownParams& params) {
  constexpr const char* kOp = "grouped_down";
  check(params);
  const ExpertGroups& groups = params.groups;
  const auto gemm = empty_gemm(groups);
  gemm->depth = params.factor * groups.width;
  gemm->shared_depth = params.factor * groups.shared_width;
  gemm->columns = gemm->shared_columns = groups.size;
  gemm->row_weights = params.row_weights;
  gemm->out = params.out;
  describe_flat(kOp, groups, params.a, gemm->depth, gemm->shared_depth, kTileRows, gemm->flat);
  if (params.transposed) {
    describe_matrices<RowPass::kDown>(kOp, groups, params.matrices,
                                      {groups.size, gemm->depth, groups.size, gemm->shared_depth}, *gemm);
    return start_rows<RowPass::kDown>(kOp, *gemm);
  }
  describe_matrices<RowPass::kInputGradient>(kOp, groups, params.matrices,
                                             {gemm->depth, groups.size, gemm->shared_depth, groups.size}, *gemm);
  start_rows<RowPass::kInputGradient>(kOp, *gemm);
}

std::int64_t activation_backward_columns(std::int64_t width) {
  return ceil_divide(width, kColumnsPerTile<RowPass::kActivationBackward>);
}

void grouped_activation_backward(const GroupedActivationBackwardParams& params) {
  constexpr const char* kOp = "grouped_activation_backward";
  check(params);
  const ExpertGroups& groups = params.groups;
  const auto gemm = gemm_from_tokens(groups, params.grad);
  gemm->row_weights = params.row_weights;
  gemm->slots = params.slots;
  gemm->packed = const_cast<void*>(params.packed);
  gemm->grad_packed = params.grad_packed;
  gemm->hidden = params.hidden;
  gemm->partial = params.partial;
  describe_matrices<RowPass::kActivationBackward>(kOp, groups, params.fc2,
                                                  {groups.size, groups.width, groups.size, groups.shared_width}, *gemm);
  start_rows<RowPass::kActivationBackward>(kOp, *gemm);
}

void grouped_weight_gradient(const GroupedWeightGradientParams& params) {
  constexpr const char* kOp = "grouped_weight_gradient";
  check(params);
  require_sm90(kOp);
  const ExpertGroups& groups = params.groups;
  WeightGradientParams gradient{};
  gradient.groups = groups;
  gradient.width = params.factor * groups.width;
  gradient.shared_width = params.factor * groups.shared_width;
  gradient.flat = params.flat;
  gradient.x = params.x;
  gradient.x_is_left = params.transposed;
  gradient.adds = params.adds;
  gradient.out_is_float = params.out_dtype == DType::kFloat32;
  describe_flat(kOp, groups, params.flat, gradient.width, gradient.shared_width, kTileDepth, gradient.maps);
  std::copy_n(params.out, groups.experts + (has_shared(groups) ? 1 : 0), gradient.out);
  const auto tiles_of = [&](std::int64_t width) {
    const std::int64_t rows = params.transposed ? groups.size : width;
    const std::int64_t columns = params.transposed ? width : groups.size;
    return ceil_divide(rows, kTileRows) * ceil_divide(columns, kTileColumns);
  };
  const std::int64_t tiles =
      groups.experts * tiles_of(gradient.width) + (has_shared(groups) ? tiles_of(gradient.shared_width) : 0);
  dispatch_16_bits(groups.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_with_shared(kOp, grouped_weight_gradient_kernel<T>, blocks_for(kOp, tiles), kGemmThreads, kStagesSharedBytes,
                       groups.stream, gradient);
  });
}

}  // namespace megatron_qwen
