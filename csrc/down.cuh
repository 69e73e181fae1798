// hidden = dropout(x) F^T: a tile of tokens against all ranks of the piece, of whichever members, the width split
// over blocks.
//
// Four warps of 16 tokens each. x and F stream through shared memory, 64 columns a stage. Each split
// leaves its sums in the workspace and the last one adds them, always in the same order.
#pragma once

#include "group.cuh"

namespace plora {

constexpr int kDownThreads = 128;

template <int kRank>
struct DownTile {
  static constexpr int kStageElems = kPanelElems + kRank * kPanel;
  static constexpr int kStages = stages(tuned(kArch).down, 0, kStageElems * 2);
  static_assert(kStages >= 2);
  using Sums = float[kRank / 8][4];

  template <bool kVector>
  __device__ static void run(const DownArgs& args, const Piece& piece, const Split& split, const Chunk* chunks,
                             bf16* shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int panels = ceil_div(args.width, kPanel);
    const int first = split.first(panels), steps = split.last(panels) - first;
    const bf16* x = static_cast<const bf16*>(args.x) + piece.row * args.width + first * kPanel;
    const bf16* factors = static_cast<const bf16*>(args.factors) + first * kPanel;
    int64_t columns = args.width - first * kPanel;
    int filled = 0;
    const auto load = [&] {
      load_tile<kTileRows, kPanel, kDownThreads, kVector>(shared + filled, x, args.width, piece.rows, columns);
      load_factor<kRank, kDownThreads, kVector>(shared + filled + kPanelElems, factors, chunks, args.width, columns);
      x += kPanel, factors += kPanel, columns -= kPanel;
      filled = filled + kStageElems == kStages * kStageElems ? 0 : filled + kStageElems;
    };
    const Dropout dropout(piece, args.schedule.input_key, args.width);
    const bool dropping = args.use_dropout && dropout.limit != 0;
    uint32_t draws[2] = {0, 0};
    if (dropping) {
      for (int half = 0; half < 2; ++half) {
        const int row = min(warp * 16 + lane / 4 + half * 8, piece.rows - 1);
        draws[half] = args.schedule.token_index[piece.row + row] * dropout.pairs + first * kPanel / 2 + lane % 4;
      }
    }

    Sums sums = {};
    int used = 0;
    // The first turns only fill the pipeline: its code is long, and fetching it takes time.
#pragma unroll 1
    for (int turn = 0; turn < steps + kStages - 1; ++turn) {
      if (turn >= kStages - 1) {
        cute::cp_async_wait<kStages - 2>();
        __syncthreads();
      }
      if (turn < steps) load();
      cute::cp_async_fence();
      if (turn < kStages - 1) continue;
      const bf16* stage = shared + used;
      used = used + kStageElems == kStages * kStageElems ? 0 : used + kStageElems;
      // Apart, because a branch within would keep loads from overlapping products.
      if (dropping) {
        accumulate(sums, stage, [&](Fragment& a, int k) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a.r[i] = dropout.apply(a.r[i], dropout.draw(draws[i % 2], k / 2 + i / 2 * 4));
        });
      } else {
        accumulate(sums, stage, [](Fragment&, int) {});
      }
      draws[0] += kPanel / 2, draws[1] += kPanel / 2;
    }
    if (split.of > 1 && !add_splits(args, piece, split, sums)) return;
    const float scale = (args.use_scale ? piece.scale : 1.f) * (dropping ? dropout.keep_scale : 1.f);
    store(args, piece, chunks, sums, scale);
  }

  // sums += x F^T over 64 columns; `edit` may change x's fragments.
  template <class Edit>
  __device__ static void accumulate(Sums& sums, const bf16* stage, Edit&& edit) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int k = 0; k < kPanel; k += 16) {
      Fragment a = left_fragment<kTileRows, kPanel>(stage, warp * 16, k, lane);
      edit(a, k);
#pragma unroll
      for (int n = 0; n < kRank; n += 16) {
        const Fragment b = right_fragment<kRank, kPanel>(stage + kPanelElems, n, k, lane);
        multiply_add(sums[n / 8], a, b.r[0], b.r[1]);
        multiply_add(sums[n / 8 + 1], a, b.r[2], b.r[3]);
      }
    }
  }

  // Leaves this split's sums in the workspace; in the last block, `sums` become those of all splits.
  __device__ static bool add_splits(const DownArgs& args, const Piece& piece, const Split& split, Sums& sums) {
    constexpr int kVectors = kTileRows * kRank / 4;
    float4* partials =
        reinterpret_cast<float4*>(args.partials + static_cast<int64_t>(piece.scratch) * kScratchBlock * gridDim.x);
#pragma unroll
    for (int n = 0; n < kRank / 8; ++n) {
      __stcg(partials + split.index * kVectors + n * kDownThreads + threadIdx.x,
             make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]));
    }
    if (!arrives_last(args.counters + blockIdx.y, split.of)) return false;
#pragma unroll
    for (int n = 0; n < kRank / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] = 0;
    }
#pragma unroll(kRank <= 32 ? 4 : 1)
    for (int from = 0; from < split.of; ++from) {
#pragma unroll
      for (int n = 0; n < kRank / 8; ++n) {
        const float4 part = __ldcg(partials + from * kVectors + n * kDownThreads + threadIdx.x);
        sums[n][0] += part.x, sums[n][1] += part.y, sums[n][2] += part.z, sums[n][3] += part.w;
      }
    }
    return true;
  }

  // Zeros up to the next multiple of 16, because the other kernels read whole chunks.
  __device__ static void store(const DownArgs& args, const Piece& piece, const Chunk* chunks, const Sums& sums,
                               float scale) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    bf16* hidden = static_cast<bf16*>(args.hidden) + piece.row * args.hidden_stride;
#pragma unroll
    for (int n = 0; n < kRank / 8; ++n) {
      const Chunk chunk = chunks[n * 8 / kChunk];
      if (chunk.ranks == 0) continue;
      const int column = chunk.column + n * 8 % kChunk + lane % 4 * 2;
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
  const Split split = split_of(piece, args.slots, gridDim.x);
  constexpr int kChunks = kTileRanks / kChunk;
  __shared__ Chunk chunks[kChunks];
  const bool works = piece.rows > 0 && piece.slot >= 0 && split.index < split.of &&
                     find_chunks(chunks, kChunks, args.schedule, piece, piece.rank_begin / kChunk, args.width);
  wait_for_previous_kernel();
  if (!works) return;
  with_rank_class<kTileRanks>(piece.ranks, [&](auto rank) {
    DownTile<rank>::template run<kVector>(args, piece, split, chunks, reinterpret_cast<bf16*>(shared));
  });
}

}  // namespace plora
