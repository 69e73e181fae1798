// grad_hidden = scale * dy F^T and grad F += scale * hidden^T dy in one pass over dy, of each linear of a group by
// itself, for sm_90 and later.
//
// A cluster of eight blocks owns up to 256 tokens and some columns; each block takes every eighth 64 of these, one
// a step, in parts of 128 tokens. Its part of grad_hidden stays in registers throughout; grad F is complete
// for these tokens after each step and leaves at once. At the end the blocks add up grad_hidden in each
// other's shared memory. Where several clusters share the columns, so that there are enough of them to keep
// the device busy to the end, their few sums meet in the workspace.
//
// Eight warps: for grad_hidden 16 tokens of a part each; for grad F 16 columns by half of the ranks each,
// or, at 16 ranks, 8 columns.
#pragma once

#include <cooperative_groups.h>

#include "grad_factor.cuh"

namespace plora {

constexpr int kPartRows = 128, kMostParts = kWalkRows / kPartRows;

template <int kRank>
struct GradHiddenCluster {
  static constexpr int kHidden = kPartRows * kRank, kDy = kPartRows * kPanel, kFactor = kRank * kPanel;
  // Factor tiles in use while the pipeline runs `stages` - 1 parts ahead.
  __host__ __device__ static constexpr int kept(int stages, int parts) { return ceil_div(stages - 1, parts) + 1; }
  static constexpr bool fits(int stages) {
    for (int parts = 1; parts <= kMostParts; ++parts) {
      const int elems = stages * kDy + parts * kHidden + kept(stages, parts) * kFactor;
      if (elems * 2 > tuned(kArch).grad_hidden * 1024) return false;
    }
    return true;
  }
  static constexpr int kStages = fits(6) ? 6 : fits(5) ? 5 : fits(4) ? 4 : 3;
  static_assert(fits(kStages), "shared memory");
  static_assert(kMostParts * kPartRows * kRank * 4 <= tuned(kArch).grad_hidden * 1024, "room for the sums");
  static constexpr int kColumns = kRank == 16 ? 8 : 16;        // of grad F, a warp
  static constexpr int kRanks = kRank == 16 ? 16 : kRank / 2;  // likewise
  using HiddenSums = float[kMostParts][kRank / 8][4];
  using FactorSums = float[kRanks / 16][kColumns / 8][4];

  template <bool kVector>
  __device__ static void run(const GradHiddenArgs& args, const Piece& piece, int64_t begin, bf16* shared) {
    const int64_t offset = begin + piece.rank_begin * args.width;
    const int columns = ceil_div(args.width, kPanel), parts = piece.rows > kPartRows ? 2 : 1;
    const int blocks = args.clusters * kCluster;
    const int panels = max(ceil_div(columns - static_cast<int>(blockIdx.x), blocks), 0), steps = panels * parts;
    // Neighbouring columns go to different blocks, which then read whole pages of memory together.
    const auto column_of = [&](int panel) { return (static_cast<int>(blockIdx.x) + panel * blocks) * kPanel; };
    const bf16* dy = static_cast<const bf16*>(args.dy) + piece.row * args.width;
    const bf16* from = static_cast<const bf16*>(args.factors) + offset;
    const bf16* hidden_from = static_cast<const bf16*>(args.hidden) + piece.row * args.hidden_stride + piece.rank_begin;
    bf16* pipeline = shared;
    bf16* hidden = pipeline + kStages * kDy;
    bf16* factors = hidden + parts * kHidden;
    const int factor_tiles = kept(kStages, parts);
    const auto load = [&](int step) {
      bf16* stage = pipeline + step % kStages * kDy;
      const int part = step % parts;
      const int column = column_of(step / parts);
#pragma unroll
      for (int half = 0; half < kPartRows; half += kTileRows) {
        const int row = part * kPartRows + half;
        if (row >= piece.rows) break;
        load_tile<kTileRows, kPanel, kGradThreads, kVector>(stage + half * kPanel, dy + row * args.width + column,
                                                            args.width, piece.rows - row, args.width - column);
      }
      if (part == 0) {
        load_tile<kRank, kPanel, kGradThreads, kVector>(factors + step / parts % factor_tiles * kFactor, from + column,
                                                        args.width, piece.ranks, args.width - column);
      }
    };

    for (int row = 0; row < piece.rows; row += kTileRows) {
      load_tile<kTileRows, kRank, kGradThreads, true>(hidden + row * kRank, hidden_from + row * args.hidden_stride,
                                                      args.hidden_stride, piece.rows - row, piece.ranks);
    }
#pragma unroll 1
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) load(step);
      cute::cp_async_fence();
    }
    HiddenSums sums = {};
    FactorSums factor_sums = {};
    const auto compute = [&](int step, auto part) {
      cute::cp_async_wait<kStages - 2>();
      __syncthreads();
      if (step + kStages - 1 < steps) load(step + kStages - 1);
      cute::cp_async_fence();
      const bf16* stage = pipeline + step % kStages * kDy;
      const int rows = min(piece.rows - part * kPartRows, kPartRows);
      if (static_cast<int>(threadIdx.x / 32 * 16) < rows) {
        add_hidden_grad(sums[part], stage, factors + step / parts % factor_tiles * kFactor);
      }
      add_factor_grad(factor_sums, hidden + part * kHidden, stage, rows);
    };
    for (int step = 0; step < steps; step += parts) {
      compute(step, cute::Int<0>{});
      if (parts == 2) compute(step + 1, cute::Int<1>{});
      store_factor_grad(args, piece, offset, column_of(step / parts), factor_sums);
    }
    cute::cp_async_wait<0>();
    __syncthreads();
    add_up(args, piece, parts, sums, reinterpret_cast<float4*>(pipeline));
  }

  __device__ static void add_hidden_grad(float (&sums)[kRank / 8][4], const bf16* dy, const bf16* factor) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
#pragma unroll
    for (int k = 0; k < kPanel; k += 16) {
      const Fragment a = left_fragment<kPartRows, kPanel>(dy, row, k, lane);
#pragma unroll
      for (int n = 0; n < kRank; n += 16) {
        const Fragment b = right_fragment<kRank, kPanel>(factor, n, k, lane);
        multiply_add(sums[n / 8], a, b.r[0], b.r[1]);
        multiply_add(sums[n / 8 + 1], a, b.r[2], b.r[3]);
      }
    }
  }

  __device__ static int own_column() { return threadIdx.x / 32 * kColumns % kPanel; }
  __device__ static int own_rank() { return kRank == 16 ? 0 : threadIdx.x / 128 * kRanks; }

  __device__ static void add_factor_grad(FactorSums& sums, const bf16* hidden, const bf16* dy, int rows) {
    const int lane = threadIdx.x % 32, column = own_column(), rank = own_rank();
#pragma unroll
    for (int k = 0; k < kPartRows; k += 32) {
      if (k >= rows) break;
      // The right operands of 32 tokens; eight columns of them are one load.
      Fragment b[2];
      if constexpr (kColumns == 8) {
        b[0] = load_fragment_transposed(dy + swizzled<kPanel>(k + lane, column));
      } else {
        b[0] = right_fragment_of_rows<kPartRows, kPanel>(dy, k, column, lane);
        b[1] = right_fragment_of_rows<kPartRows, kPanel>(dy, k + 16, column, lane);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int m = 0; m < kRanks / 16; ++m) {
          const Fragment a = left_fragment_of_rows<kPartRows, kRank>(hidden, k + half * 16, rank + m * 16, lane);
          if constexpr (kColumns == 8) {
            multiply_add(sums[m][0], a, b[0].r[half * 2], b[0].r[half * 2 + 1]);
          } else {
            multiply_add(sums[m][0], a, b[half].r[0], b[half].r[1]);
            multiply_add(sums[m][1], a, b[half].r[2], b[half].r[3]);
          }
        }
      }
    }
  }

  __device__ static void store_factor_grad(const GradHiddenArgs& args, const Piece& piece, int64_t offset,
                                           int64_t column, FactorSums& sums) {
    add_to_factor_grad<kRanks / 16, kColumns / 8>(args.grad + offset + own_rank() * args.width, args.width,
                                                  piece.ranks - own_rank(), column + own_column(), sums, piece.scale,
                                                  piece.replaces);
#pragma unroll
    for (int m = 0; m < kRanks / 16; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] = 0;
      }
    }
  }

  // The sum over the cluster, each block seeing to an eighth of it.
  __device__ static void add_up(const GradHiddenArgs& args, const Piece& piece, int parts, const HiddenSums& sums,
                                float4* shared) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const auto cluster = cooperative_groups::this_cluster();
#pragma unroll
    for (int part = 0; part < kMostParts; ++part) {
#pragma unroll
      for (int n = 0; n < kRank / 8; ++n) {
        const auto& sum = sums[part][n];
        shared[(part * (kRank / 8) + n) * kGradThreads + threadIdx.x] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      }
    }
    cluster.sync();
    const int share = parts * (kRank / 8) * kGradThreads / kCluster, rank = blockIdx.x % kCluster;
    const int clusters = args.clusters;
    bf16* out = static_cast<bf16*>(args.grad_hidden) + piece.row * args.hidden_stride + piece.rank_begin;
    float* all = args.sums + static_cast<int64_t>(piece.scratch) * kScratchBlock;
    // Undoes the order of the fragments: the row and column of the first of the four sums at `at`.
    const auto place = [](int at) {
      const int fragment = at / kGradThreads, owner = at % kGradThreads, lane = owner % 32;
      return int2{fragment / (kRank / 8) * kPartRows + owner / 32 * 16 + lane / 4,
                  fragment % (kRank / 8) * 8 + lane % 4 * 2};
    };
    for (int i = threadIdx.x; i < share; i += kGradThreads) {
      const int at = rank * share + i;
      float4 others[kCluster];
#pragma unroll
      for (int peer = 0; peer < kCluster; ++peer) others[peer] = cluster.map_shared_rank(shared, peer)[at];
      float4 sum = others[0];
#pragma unroll
      for (int peer = 1; peer < kCluster; ++peer) {
        sum.x += others[peer].x, sum.y += others[peer].y, sum.z += others[peer].z, sum.w += others[peer].w;
      }
      const int2 first = place(at);
      const int row = first.x, column = first.y;
      if (clusters == 1) {
        store_hidden_grad(out, args.hidden_stride, piece, row, column, sum);
        continue;
      }
      if (row < piece.rows) add_to(all + row * kRank + column, sum.x, sum.y, true, true);
      if (row + 8 < piece.rows) add_to(all + (row + 8) * kRank + column, sum.z, sum.w, true, true);
    }
    cluster.sync();
    if (clusters == 1 || !arrives_last(args.counters + blockIdx.y * kCluster + rank, clusters)) return;
    for (int i = threadIdx.x; i < share; i += kGradThreads) {
      const int2 first = place(rank * share + i);
      const int row = first.x, column = first.y;
      float4 sum{};
      const auto take = [&](int at_row, float& low, float& high) {
        if (at_row >= piece.rows) return;
        float2* from = reinterpret_cast<float2*>(all + at_row * kRank + column);
        const float2 both = __ldcg(from);
        low = both.x, high = both.y;
        __stcg(from, float2{});
      };
      take(row, sum.x, sum.y);
      take(row + 8, sum.z, sum.w);
      store_hidden_grad(out, args.hidden_stride, piece, row, column, sum);
    }
#endif
  }
};

template <bool kVector>
__global__ void __launch_bounds__(kGradThreads, 2)
    grad_hidden_cluster_kernel(const __grid_constant__ Each<GradHiddenArgs> linears) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const GradHiddenArgs& args = linears.of[blockIdx.z];
  extern __shared__ __align__(128) unsigned char shared[];
  const Piece piece = read_piece(args.schedule.pieces, blockIdx.y);
  const int64_t begin = piece.rows > 0 && piece.slot >= 0 ? __ldg(args.schedule.begin + piece.slot) : -1;
  wait_for_previous_kernel();
  // The same for the whole cluster.
  if (begin < 0 || static_cast<int>(blockIdx.x) >= args.clusters * kCluster) return;
  with_rank_class<kWalkRanks>(piece.ranks, [&](auto rank) {
    GradHiddenCluster<rank>::template run<kVector>(args, piece, begin, reinterpret_cast<bf16*>(shared));
  });
#endif
}

}  // namespace plora
