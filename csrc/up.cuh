// out = y + residual + mask * scale * hidden F: a tile of tokens walks over columns, the adapter's ranks being the
// inner dimension. Serves up_add (F = B) of the linears of a group, each by itself, with what the layer adds next if
// that is given, and, with dropout's mask, down_add (F = A), where the ranks are those of all members.
//
// Four warps of 16 tokens each. F, y and the residual stream through shared memory, 64 columns a stage; the sum is made
// in y's place and leaves in whole lines. More than 128 ranks (64 with a residual, for want of shared memory) take
// several steps on the same columns, hidden streaming too, and the pieces of the same tokens share the columns.
#pragma once

#include "group.cuh"

namespace plora {

constexpr int kUpThreads = 128;

__device__ inline uint32_t add_pairs(uint32_t one, uint32_t other) {
  const float2 a = unpack(one), b = unpack(other);
  return pack(a.x + b.x, a.y + b.y);
}

// out = y + residual, or zeroes, where there is no adapter.
template <bool kVector, bool kResidual>
__device__ void copy_columns(const UpArgs& args, const Piece& piece, int64_t first, int64_t last) {
  const bf16* y = static_cast<const bf16*>(args.y);
  const bf16* residual = static_cast<const bf16*>(args.residual);
  bf16* out = static_cast<bf16*>(args.out);
  if (y == out && !kResidual) return;
  constexpr int kStep = kVector ? 8 : 1;
  const int64_t end = last < args.width ? last : args.width;
  const int wide = static_cast<int>((end - first + kStep - 1) / kStep);
#pragma unroll 4
  for (int i = threadIdx.x; i < piece.rows * wide; i += kUpThreads) {
    const int64_t at = (piece.row + i / wide) * args.width + first + i % wide * kStep;
    if constexpr (kVector) {
      uint4 sum = y ? *reinterpret_cast<const uint4*>(y + at) : uint4{};
      if constexpr (kResidual) {
        const uint4 more = *reinterpret_cast<const uint4*>(residual + at);
        sum = {add_pairs(sum.x, more.x), add_pairs(sum.y, more.y), add_pairs(sum.z, more.z), add_pairs(sum.w, more.w)};
      }
      *reinterpret_cast<uint4*>(out + at) = sum;
    } else {
      const float sum = y ? __bfloat162float(y[at]) : 0.f;
      out[at] = __float2bfloat16(kResidual ? sum + __bfloat162float(residual[at]) : sum);
    }
  }
}

// kMany: in parts of kRank ranks.
template <int kRank, bool kMany, bool kResidual>
struct UpTile {
  static constexpr int kHidden = kTileRows * kRank, kFactor = kRank * kPanel;
  static constexpr int kHeld = kMany ? 0 : kHidden, kAdded = kResidual ? 2 * kPanelElems : kPanelElems;
  static constexpr int kStageElems = kFactor + kAdded + (kMany ? kHidden : 0);
  static constexpr int kStages = stages(tuned(kArch).up, kHeld * 2, kStageElems * 2);
  static_assert(kStages >= 2);
  using Sums = float[kPanel / 8][4];

  template <bool kVector>
  __device__ static void run(const UpArgs& args, const Piece& piece, const Split& split, const Chunk* chunks,
                             int all_ranks, bf16* shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int parts = kMany ? ceil_div(all_ranks, kRank) : 1;
    const int panels = ceil_div(args.width, kPanel);
    const int first = split.first(panels), steps = (split.last(panels) - first) * parts;
    int64_t columns = args.width - first * kPanel;  // from the next to load on
    const bf16* factors = static_cast<const bf16*>(args.factors) + first * kPanel;
    const bf16* hidden = static_cast<const bf16*>(args.hidden) + piece.row * args.hidden_stride;
    const int64_t at = piece.row * args.width + first * kPanel;
    const bf16* y = args.y ? static_cast<const bf16*>(args.y) + at : nullptr;
    const bf16* residual = static_cast<const bf16*>(args.residual) + (kResidual ? at : 0);
    bf16* out = static_cast<bf16*>(args.out) + at;
    bf16* pipeline = shared + kHeld;
    const auto load_hidden_part = [&](bf16* tile, int part) {
      const int own = own_hidden_column<kRank>();
      const Chunk chunk = chunks[(part * kRank + own) / kChunk];
      load_hidden<kRank, kUpThreads>(tile, hidden + chunk.column + own % kChunk, args.hidden_stride,
                                     chunk.ranks > 0 ? piece.rows : 0);
    };
    int filled = 0, filled_part = 0;
    const auto load = [&] {
      bf16* stage = pipeline + filled;
      load_factor<kRank, kUpThreads, kVector>(stage, factors, chunks + filled_part * (kRank / kChunk), args.width,
                                              columns);
      if constexpr (kMany) load_hidden_part(stage + kFactor + kAdded, filled_part);
      filled = filled + kStageElems == kStages * kStageElems ? 0 : filled + kStageElems;
      if (++filled_part < parts) return;
      filled_part = 0;
      if (y) {
        load_tile<kTileRows, kPanel, kUpThreads, kVector>(stage + kFactor, y, args.width, piece.rows, columns);
        y += kPanel;
      }
      if constexpr (kResidual) {
        load_tile<kTileRows, kPanel, kUpThreads, kVector>(stage + kFactor + kPanelElems, residual, args.width,
                                                          piece.rows, columns);
        residual += kPanel;
      }
      factors += kPanel, columns -= kPanel;
    };

    if constexpr (!kMany) load_hidden_part(shared, 0);
    const Dropout dropout(piece, args.schedule.input_key, args.width);
    const bool dropping = args.use_dropout && dropout.limit != 0;
    uint32_t draws[2] = {0, 0};
    if (dropping) {
      for (int half = 0; half < 2; ++half) {
        const int row = min(warp * 16 + lane / 4 + half * 8, piece.rows - 1);
        draws[half] = args.schedule.token_index[piece.row + row] * dropout.pairs + first * kPanel / 2 + lane % 4;
      }
    }
    const float scale = (args.use_scale ? piece.scale : 1.f) * (dropping ? dropout.keep_scale : 1.f);

    Sums sums = {};
    int64_t left = columns;  // from the one at hand on
    int used = 0, part = 0;
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
      bf16* stage = pipeline + used;
      used = used + kStageElems == kStages * kStageElems ? 0 : used + kStageElems;
      const int ranks = all_ranks - part * kRank;
      const bf16* inner = kMany ? stage + kFactor + kAdded : shared;
#pragma unroll
      for (int k = 0; k < kRank; k += 16) {
        // Beyond them are zeros: a branch for each would keep loads from overlapping products.
        if (k >= kRank / 4 * 3 && k >= ranks) break;
        const Fragment a = left_fragment<kTileRows, kRank>(inner, warp * 16, k, lane);
#pragma unroll
        for (int n = 0; n < kPanel; n += 16) {
          const Fragment b = right_fragment_of_rows<kRank, kPanel>(stage, k, n, lane);
          multiply_add(sums[n / 8], a, b.r[0], b.r[1]);
          multiply_add(sums[n / 8 + 1], a, b.r[2], b.r[3]);
        }
      }
      if (++part < parts) continue;

      part = 0;
      if (dropping) drop(sums, dropout, draws);
      finish(sums, scale, args.y != nullptr, stage + kFactor);
      __syncwarp();
      store<kVector>(out, args.width, piece.rows, left, stage + kFactor);
      out += kPanel, left -= kPanel;
      draws[0] += kPanel / 2, draws[1] += kPanel / 2;
    }
  }

  __device__ static void drop(Sums& sums, const Dropout& dropout, const uint32_t (&draws)[2]) {
#pragma unroll
    for (int n = 0; n < kPanel / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t drawn = dropout.draw(draws[half], n * 4);
        sums[n][half * 2] = dropout.keeps_low(drawn) ? sums[n][half * 2] : 0.f;
        sums[n][half * 2 + 1] = dropout.keeps_high(drawn) ? sums[n][half * 2 + 1] : 0.f;
      }
    }
  }

  // tile (+)= scale * sums, and the residual beside it, and zeroes the sums. Each warp sees to its own 16 rows, so that
  // no barrier is needed.
  __device__ static void finish(Sums& sums, float scale, bool add, bf16* tile) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Fragment before[kPanel / 16] = {}, more[kResidual ? kPanel / 16 : 1];
    if (add) {
#pragma unroll
      for (int n = 0; n < kPanel / 16; ++n) before[n] = left_fragment<kTileRows, kPanel>(tile, warp * 16, n * 16, lane);
    }
    if constexpr (kResidual) {
#pragma unroll
      for (int n = 0; n < kPanel / 16; ++n) {
        more[n] = left_fragment<kTileRows, kPanel>(tile + kPanelElems, warp * 16, n * 16, lane);
      }
    }
#pragma unroll
    for (int n = 0; n < kPanel / 16; ++n) {
      Fragment after;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float* pair = sums[n * 2 + i / 2] + i % 2 * 2;
        float2 y = unpack(before[n].r[i]);
        if constexpr (kResidual) {
          const float2 residual = unpack(more[n].r[i]);
          y.x += residual.x, y.y += residual.y;
        }
        after.r[i] = pack(fmaf(pair[0], scale, y.x), fmaf(pair[1], scale, y.y));
        pair[0] = pair[1] = 0.f;
      }
      store_fragment<kTileRows, kPanel>(tile, warp * 16, n * 16, lane, after);
    }
  }

  template <bool kVector>
  __device__ static void store(bf16* out, int64_t width, int rows, int64_t columns, const bf16* tile) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp * 16 + lane / 8, chunk = lane % 8 * 8;
    if (chunk >= columns) return;
    out += row * width + chunk;
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
      if (row + i >= rows) break;
      const bf16* from = tile + swizzled<kPanel>(row + i, chunk);
      bf16* to = out + i * width;
      if constexpr (kVector) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (chunk + e < columns) to[e] = from[e];
        }
      }
    }
  }
};

template <bool kVector, bool kResidual>
__global__ void __launch_bounds__(kUpThreads, 3) up_kernel(const __grid_constant__ Each<UpArgs> linears) {
  const UpArgs& args = linears.of[blockIdx.z];
  extern __shared__ __align__(128) unsigned char shared[];
  const Piece piece = read_piece(args.schedule.pieces, blockIdx.y);
  Split split = split_of(piece, args.slots, args.splits);
  const bool works = piece.rows > 0 && split.index < split.of;
  __shared__ Chunk chunks[kMostChunks];
  const bool adds = works && piece.slot >= 0 && find_chunks(chunks, kMostChunks, args.schedule, piece, 0, args.width);
  wait_for_previous_kernel();
  if (!works) return;
  if (!adds) {
    if (piece.rank_begin > 0) return;
    const int panels = ceil_div(args.width, kPanel);
    return copy_columns<kVector, kResidual>(args, piece, split.first(panels) * kPanel, split.last(panels) * kPanel);
  }
  const int ranks = virtual_ranks(args.schedule, piece);
  bf16* tiles = reinterpret_cast<bf16*>(shared);
  constexpr int kMost = kResidual ? 64 : kTileRanks;
  if (ranks > kMost) {
    // The pieces of the same rows have the same share.
    split.index += piece.rank_begin / kTileRanks * split.of;
    split.of *= ceil_div(ranks, kTileRanks);
    return UpTile<64, true, kResidual>::template run<kVector>(args, piece, split, chunks, ranks, tiles);
  }
  with_rank_class<kMost>(ranks, [&](auto rank) {
    UpTile<rank, false, kResidual>::template run<kVector>(args, piece, split, chunks, ranks, tiles);
  });
}

}  // namespace plora
