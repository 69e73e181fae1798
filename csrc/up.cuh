// out = y + mask * scale * hidden F: a tile of tokens walks over columns, the adapter's ranks being the
// inner dimension. Serves up_add (F = B) and, with dropout's mask, down_add (F = A).
//
// Four warps of 16 tokens each. F and y stream through shared memory, 64 columns a stage; the sum is made
// in y's place and leaves in whole lines. Ranks beyond 128 take a second step on the same columns.
#pragma once

#include "tile.cuh"

namespace plora {

constexpr int kUpThreads = 128;
constexpr int kHiddenElems = kTileRows * kTileRanks;

// Copies y to out, or zeroes out, where there is no adapter.
template <bool kVector>
__device__ void copy_columns(const UpArgs& args, const Piece& piece, int64_t first, int64_t last) {
  const bf16* y = static_cast<const bf16*>(args.y);
  bf16* out = static_cast<bf16*>(args.out);
  if (y == out) return;
  constexpr int kStep = kVector ? 8 : 1;
  const int64_t end = last < args.width ? last : args.width;
  const int wide = static_cast<int>((end - first + kStep - 1) / kStep);
#pragma unroll 4
  for (int i = threadIdx.x; i < piece.rows * wide; i += kUpThreads) {
    const int64_t at = (piece.row + i / wide) * args.width + first + i % wide * kStep;
    if constexpr (kVector) {
      *reinterpret_cast<uint4*>(out + at) = y ? __ldg(reinterpret_cast<const uint4*>(y + at)) : uint4{};
    } else {
      out[at] = y ? y[at] : __float2bfloat16(0.f);
    }
  }
}

template <int kRank>
struct UpTile {
  static constexpr int kHidden = kTileRows * kRank;  // of one step's ranks
  static constexpr int kStageElems = kRank * kPanel + kPanelElems;
  static constexpr int kStages = stages(tuned(kArch).up, kHidden * 2, kStageElems * 2);
  static_assert(kStages >= 2);

  template <bool kVector>
  __device__ static void run(const UpArgs& args, const Piece& piece, int64_t begin, bf16* shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int parts = kRank < kTileRanks ? 1 : ceil_div(piece.rank, kTileRanks);
    const int first = blockIdx.x * args.steps;
    const int steps = min(args.steps, ceil_div(args.width, kPanel) - first) * parts;
    const bf16* factor = static_cast<const bf16*>(args.factors) + begin;
    const bf16* hidden = static_cast<const bf16*>(args.hidden) + piece.row * args.hidden_stride;
    const bf16* y = args.y ? static_cast<const bf16*>(args.y) + piece.row * args.width : nullptr;
    bf16* pipeline = shared + parts * kHidden;
    const auto load = [&](int step) {
      bf16* stage = pipeline + step % kStages * kStageElems;
      const int part = step % parts;
      const int64_t column = static_cast<int64_t>(first + step / parts) * kPanel;
      load_tile<kRank, kPanel, kUpThreads, kVector>(stage, factor + part * kTileRanks * args.width + column, args.width,
                                                    piece.rank - part * kTileRanks, args.width - column);
      if (y && part == parts - 1) {
        load_tile<kTileRows, kPanel, kUpThreads, kVector>(stage + kRank * kPanel, y + column, args.width, piece.rows,
                                                          args.width - column);
      }
    };

    for (int part = 0; part < parts; ++part) {
      load_tile<kTileRows, kRank, kUpThreads, true>(shared + part * kHidden, hidden + part * kTileRanks,
                                                    args.hidden_stride, piece.rows, piece.rank - part * kTileRanks);
    }
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
    const float scale = (args.use_scale ? piece.scale : 1.f) * (dropping ? dropout.keep_scale : 1.f);

    float sums[kPanel / 8][4] = {};
    for (int step = 0; step < steps; ++step) {
      cute::cp_async_wait<kStages - 2>();
      __syncthreads();
      if (step + kStages - 1 < steps) load(step + kStages - 1);
      cute::cp_async_fence();
      bf16* stage = pipeline + step % kStages * kStageElems;
      const int part = step % parts;
      const int ranks = piece.rank - part * kTileRanks;
#pragma unroll
      for (int k = 0; k < kRank; k += 16) {
        if (k >= ranks) break;
        const Fragment a = left_fragment<kTileRows, kRank>(shared + part * kHidden, warp * 16, k, lane);
#pragma unroll
        for (int n = 0; n < kPanel; n += 16) {
          const Fragment b = right_fragment_of_rows<kRank, kPanel>(stage, k, n, lane);
          multiply_add(sums[n / 8], a, b.r[0], b.r[1]);
          multiply_add(sums[n / 8 + 1], a, b.r[2], b.r[3]);
        }
      }
      if (part < parts - 1) continue;

      bf16* tile = stage + kRank * kPanel;
      const int64_t column = static_cast<int64_t>(first + step / parts) * kPanel;
#pragma unroll
      for (int n = 0; n < kPanel / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp * 16 + lane / 4 + half * 8;
          uint32_t* at = reinterpret_cast<uint32_t*>(tile + swizzled<kPanel>(row, n * 8 + lane % 4 * 2));
          float low = sums[n][half * 2] * scale, high = sums[n][half * 2 + 1] * scale;
          if (dropping) {
            const uint32_t drawn = dropout.draw(draws[half], static_cast<uint32_t>(column / 2) + n * 4 + lane % 4);
            low = dropout.keeps_low(drawn) ? low : 0.f;
            high = dropout.keeps_high(drawn) ? high : 0.f;
          }
          if (y) {
            const float2 before = unpack(*at);
            low += before.x, high += before.y;
          }
          *at = pack(low, high);
          sums[n][half * 2] = sums[n][half * 2 + 1] = 0.f;
        }
      }
      __syncwarp();
      store<kVector>(args, piece, tile, column);
    }
  }

  // Each warp writes its own 16 rows, so that no barrier of the block is needed.
  template <bool kVector>
  __device__ static void store(const UpArgs& args, const Piece& piece, const bf16* tile, int64_t column) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    bf16* out = static_cast<bf16*>(args.out) + piece.row * args.width + column;
    const int64_t columns = args.width - column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + i * 4 + lane / 8, chunk = lane % 8 * 8;
      if (row >= piece.rows || chunk >= columns) continue;
      const bf16* from = tile + swizzled<kPanel>(row, chunk);
      bf16* to = out + row * args.width + chunk;
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

template <bool kVector>
__global__ void __launch_bounds__(kUpThreads, 3) up_kernel(const UpArgs args) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Piece piece = read_piece(args.schedule.pieces, blockIdx.y);
  if (piece.rows == 0 || piece.rank_begin > 0) return;
  const int64_t begin = piece.slot < 0 ? -1 : __ldg(args.schedule.begin + piece.slot);
  if (begin < 0) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * args.steps * kPanel;
    return copy_columns<kVector>(args, piece, first, first + args.steps * kPanel);
  }
  with_rank_class<kTileRanks>(piece.rank, [&](auto rank) {
    UpTile<rank>::template run<kVector>(args, piece, begin, reinterpret_cast<bf16*>(shared));
  });
}

}  // namespace plora
