// hidden = dropout(x) F^T: a tile of tokens against all ranks of the piece, the width split over blocks.
//
// Four warps of 16 tokens each. x and F stream through shared memory, 64 columns a stage. Each split
// leaves its sums in the workspace and the last one adds them, always in the same order.
#pragma once

#include "tile.cuh"

namespace plora {

constexpr int kDownThreads = 128;

template <int kRank>
struct DownTile {
  static constexpr int kStageElems = kPanelElems + kRank * kPanel;
  static constexpr int kStages = stages(tuned(kArch).down, 0, kStageElems * 2);
  static_assert(kStages >= 2);
  using Sums = float[kRank / 8][4];

  template <bool kVector>
  __device__ static void run(const DownArgs& args, const Piece& piece, int64_t begin, bf16* shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = blockIdx.x * args.steps;
    const int steps = min(args.steps, ceil_div(args.width, kPanel) - first);
    const bf16* x = static_cast<const bf16*>(args.x) + piece.row * args.width;
    const bf16* factor = static_cast<const bf16*>(args.factors) + begin + piece.rank_begin * args.width;
    const auto load = [&](int step) {
      bf16* stage = shared + step % kStages * kStageElems;
      const int64_t column = static_cast<int64_t>(first + step) * kPanel;
      load_tile<kTileRows, kPanel, kDownThreads, kVector>(stage, x + column, args.width, piece.rows,
                                                          args.width - column);
      load_tile<kRank, kPanel, kDownThreads, kVector>(stage + kPanelElems, factor + column, args.width, piece.ranks,
                                                      args.width - column);
    };

#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) load(step);
      cute::cp_async_fence();
    }
    const Dropout dropout(piece, args.schedule.input_key, args.width);
    const bool dropping = args.use_dropout && dropout.limit != 0;
    uint32_t draws[2] = {0, 0};
    if (dropping) {
      for (int half = 0; half < 2; ++half) {
        const int row = min(warp * 16 + lane / 4 + half * 8, piece.rows - 1);
        draws[half] = args.schedule.token_index[piece.row + row] * dropout.pairs;
      }
    }

    Sums sums = {};
    for (int step = 0; step < steps; ++step) {
      cute::cp_async_wait<kStages - 2>();
      __syncthreads();
      if (step + kStages - 1 < steps) load(step + kStages - 1);
      cute::cp_async_fence();
      const bf16* stage = shared + step % kStages * kStageElems;
#pragma unroll
      for (int k = 0; k < kPanel; k += 16) {
        Fragment a = left_fragment<kTileRows, kPanel>(stage, warp * 16, k, lane);
        if (dropping) {
          const uint32_t pair = ((first + step) * kPanel + k) / 2 + lane % 4;
#pragma unroll
          for (int i = 0; i < 4; ++i) a.r[i] = dropout.apply(a.r[i], dropout.draw(draws[i % 2], pair + i / 2 * 4));
        }
#pragma unroll
        for (int n = 0; n < kRank; n += 16) {
          const Fragment b = right_fragment<kRank, kPanel>(stage + kPanelElems, n, k, lane);
          multiply_add(sums[n / 8], a, b.r[0], b.r[1]);
          multiply_add(sums[n / 8 + 1], a, b.r[2], b.r[3]);
        }
      }
    }
    if (gridDim.x > 1 && !add_splits(args, piece, sums)) return;
    const float scale = (args.use_scale ? piece.scale : 1.f) * (dropping ? dropout.keep_scale : 1.f);
    store(args, piece, sums, scale);
  }

  // Leaves this split's sums in the workspace; in the last block, `sums` become those of all splits.
  __device__ static bool add_splits(const DownArgs& args, const Piece& piece, Sums& sums) {
    constexpr int kVectors = kTileRows * kRank / 4;
    float4* partials =
        reinterpret_cast<float4*>(args.partials + static_cast<int64_t>(piece.scratch) * kScratchBlock * gridDim.x);
#pragma unroll
    for (int n = 0; n < kRank / 8; ++n) {
      __stcg(partials + blockIdx.x * kVectors + n * kDownThreads + threadIdx.x,
             make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]));
    }
    if (!arrives_last(args.counters + blockIdx.y, gridDim.x)) return false;
#pragma unroll
    for (int n = 0; n < kRank / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] = 0;
    }
#pragma unroll(kRank <= 32 ? 4 : 1)
    for (int split = 0; split < gridDim.x; ++split) {
#pragma unroll
      for (int n = 0; n < kRank / 8; ++n) {
        const float4 part = __ldcg(partials + split * kVectors + n * kDownThreads + threadIdx.x);
        sums[n][0] += part.x, sums[n][1] += part.y, sums[n][2] += part.z, sums[n][3] += part.w;
      }
    }
    return true;
  }

  __device__ static void store(const DownArgs& args, const Piece& piece, const Sums& sums, float scale) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    bf16* hidden = static_cast<bf16*>(args.hidden) + piece.row * args.hidden_stride + piece.rank_begin;
#pragma unroll
    for (int n = 0; n < kRank / 8; ++n) {
      // Zeros up to the next multiple of 16, because the other kernels read whole chunks.
      const int column = n * 8 + lane % 4 * 2;
      if (column >= ceil_div(piece.ranks, 16) * 16) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp * 16 + lane / 4 + half * 8;
        if (row >= piece.rows) continue;
        *reinterpret_cast<uint32_t*>(hidden + row * args.hidden_stride + column) =
            pack(sums[n][half * 2] * scale, sums[n][half * 2 + 1] * scale);
      }
    }
  }
};

template <bool kVector>
__global__ void __launch_bounds__(kDownThreads, 3) down_kernel(const DownArgs args) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Piece piece = read_piece(args.schedule.pieces, blockIdx.y);
  if (piece.rows == 0 || piece.slot < 0) return;
  const int64_t begin = __ldg(args.schedule.begin + piece.slot);
  if (begin < 0) return;
  with_rank_class<kTileRanks>(piece.ranks, [&](auto rank) {
    DownTile<rank>::template run<kVector>(args, piece, begin, reinterpret_cast<bf16*>(shared));
  });
}

}  // namespace plora
