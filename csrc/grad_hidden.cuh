// grad_hidden = scale * dy F^T and grad F += scale * hidden^T dy in one pass over dy, of each linear of a group by
// itself, for architectures without clusters: a block owns some tokens and 128 columns, keeps its columns of F in
// shared memory and its part of grad F in registers, and walks the tokens. What it knows of grad_hidden it adds, tile
// by tile, to sums in the workspace; the last block of those tokens rounds the sums and leaves zeros behind.
//
// Eight warps: for grad F 16 columns each, for grad_hidden 16 tokens by half of the ranks each.
#pragma once

#include "grad_factor.cuh"

namespace plora {

template <int kRank>
struct GradHiddenTile {
  static constexpr int kDy = kTileRows * kGradColumns, kHidden = kTileRows * kRank;
  static constexpr int kFactor = kRank * kGradColumns;
  static constexpr int kStageElems = kDy + kHidden;
  static constexpr int kStages = stages(tuned(kArch).grad_hidden, kFactor * 2, kStageElems * 2);
  static_assert(kStages >= 2);
  static constexpr int kParts = kRank / 16;  // of 8 ranks, a warp

  template <bool kVector>
  __device__ static void run(const GradHiddenArgs& args, const Piece& piece, bf16* shared) {
    const int warp = threadIdx.x / 32;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kGradColumns;
    const int steps = ceil_div(piece.rows, kTileRows);
    const bf16* dy = static_cast<const bf16*>(args.dy) + piece.row * args.width + column;
    const bf16* hidden = static_cast<const bf16*>(args.hidden) + piece.row * args.hidden_stride + piece.rank_begin;
    bf16* pipeline = shared + kFactor;
    const auto load = [&](int step) {
      bf16* stage = pipeline + step % kStages * kStageElems;
      const int row = step * kTileRows, rows = piece.rows - row;
      load_tile<kTileRows, kGradColumns, kGradThreads, kVector>(stage, dy + row * args.width, args.width, rows,
                                                                args.width - column);
      load_tile<kTileRows, kRank, kGradThreads, true>(stage + kDy, hidden + row * args.hidden_stride,
                                                      args.hidden_stride, rows, piece.ranks);
    };

    // The tokens' tiles do not wait for the table that says where the factor is.
    load(0);
    const int64_t begin = __ldg(args.schedule.begin + piece.slot);
    if (begin < 0) return cute::cp_async_wait<0>();
    const int64_t offset = begin + piece.rank_begin * args.width;
    load_tile<kRank, kGradColumns, kGradThreads, kVector>(
        shared, static_cast<const bf16*>(args.factors) + offset + column, args.width, piece.ranks, args.width - column);
    cute::cp_async_fence();
#pragma unroll 1
    for (int step = 1; step < kStages - 1; ++step) {
      if (step < steps) load(step);
      cute::cp_async_fence();
    }

    float sums[kRank / 16][2][4] = {};
    for (int step = 0; step < steps; ++step) {
      cute::cp_async_wait<kStages - 2>();
      __syncthreads();
      if (step + kStages - 1 < steps) load(step + kStages - 1);
      cute::cp_async_fence();
      const bf16* stage = pipeline + step % kStages * kStageElems;
      add_hidden_grad(hidden_sums(args, piece, step), stage, shared);
      accumulate_factor_grad<kRank>(sums, stage + kDy, stage, warp * 16, [](Fragment&, int) {});
    }
    // First, because to arrive is to wait for one's additions to be seen, and those to grad F come from afar.
    const bool last = arrives_last(args.counters + blockIdx.y, ceil_div(args.width, kGradColumns));
    add_to_factor_grad<kRank / 16, 2>(args.grad + offset, args.width, piece.ranks, column + warp * 16, sums,
                                      piece.scale, piece.replaces);
    if (!last) return;
    for (int step = 0; step < steps; ++step) finish_hidden_grad(args, piece, step);
  }

  __device__ static float* hidden_sums(const GradHiddenArgs& args, const Piece& piece, int step) {
    return args.sums + static_cast<int64_t>(piece.scratch + step * (kRank / 16)) * kScratchBlock;
  }

  // This block's columns' part of dy F^T, for one tile of tokens.
  __device__ static void add_hidden_grad(float* into, const bf16* dy, const bf16* factor) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp % 4 * 16, rank = warp / 4 * (kRank / 2);
    float sums[kParts][4] = {};
#pragma unroll
    for (int k = 0; k < kGradColumns; k += 32) {
      const Fragment a0 = left_fragment<kTileRows, kGradColumns>(dy, row, k, lane);
      const Fragment a1 = left_fragment<kTileRows, kGradColumns>(dy, row, k + 16, lane);
#pragma unroll
      for (int n = 0; n < kParts; ++n) {
        // Eight ranks by 32 columns: the right operands of two products.
        const Fragment b =
            load_fragment(factor + in_tile<kRank, kGradColumns>(rank + n * 8 + lane % 8, k + lane / 8 * 8));
        multiply_add(sums[n], a0, b.r[0], b.r[1]);
        multiply_add(sums[n], a1, b.r[2], b.r[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < kParts; ++n) {
      add_to(into + (n * kGradThreads + threadIdx.x) * 4, make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]));
    }
  }

  __device__ static void finish_hidden_grad(const GradHiddenArgs& args, const Piece& piece, int step) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float4* sums = reinterpret_cast<float4*>(hidden_sums(args, piece, step));
    bf16* out = static_cast<bf16*>(args.grad_hidden) + piece.row * args.hidden_stride + piece.rank_begin;
#pragma unroll
    for (int n = 0; n < kParts; ++n) {
      const float4 sum = __ldcg(sums + n * kGradThreads + threadIdx.x);
      __stcg(sums + n * kGradThreads + threadIdx.x, make_float4(0, 0, 0, 0));
      const int column = warp / 4 * (kRank / 2) + n * 8 + lane % 4 * 2;
      const int row = step * kTileRows + warp % 4 * 16 + lane / 4;
      store_hidden_grad(out, args.hidden_stride, piece, row, column, sum);
    }
  }
};

template <bool kVector>
__global__ void __launch_bounds__(kGradThreads, 2)
    grad_hidden_kernel(const __grid_constant__ Each<GradHiddenArgs> linears) {
  const GradHiddenArgs& args = linears.of[blockIdx.z];
  if (static_cast<int64_t>(blockIdx.x) * kGradColumns >= args.width) return wait_for_previous_kernel();
  extern __shared__ __align__(128) unsigned char shared[];
  const Piece piece = read_piece(args.schedule.pieces, blockIdx.y);
  wait_for_previous_kernel();
  if (piece.rows == 0 || piece.slot < 0) return;
  with_rank_class<kRunRanks>(piece.ranks, [&](auto rank) {
    GradHiddenTile<rank>::template run<kVector>(args, piece, reinterpret_cast<bf16*>(shared));
  });
}

}  // namespace plora
