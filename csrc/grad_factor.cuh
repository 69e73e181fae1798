// grad F += scale * hidden^T dropout(x), or = for pieces that replace it: a block owns some tokens and 128 columns and walks the tokens,
// the sums of all ranks, of whichever members, in registers. Serves grad_down (F = A, hidden = dh) and, where dh and dB
// are made apart, dB (F = B, x = dy).
//
// Eight warps of 16 columns each. x and hidden stream through shared memory, 64 tokens a stage.
#pragma once

#include "group.cuh"

namespace plora {

constexpr int kGradThreads = 256;
constexpr int kGradColumns = 128;

// grad += scale * sums, or = where the piece replaces it; fragments of 16 ranks by kN * 8 columns from `column` on.
template <int kN>
__device__ inline void add_to_factor_grad(float* grad, int64_t width, int ranks, int64_t column,
                                          const float (&sums)[kN][4], float scale, bool replaces) {
  const int lane = threadIdx.x % 32;
  const bool aligned = width % 2 == 0;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const int64_t at = column + n * 8 + lane % 4 * 2;
    if (at >= width) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int rank = lane / 4 + half * 8;
      if (rank >= ranks) continue;
      float* to = grad + rank * width + at;
      const float low = sums[n][half * 2] * scale, high = sums[n][half * 2 + 1] * scale;
      if (replaces) {
        write_to(to, low, high, at + 1 < width, aligned);
      } else {
        add_to(to, low, high, at + 1 < width, aligned);
      }
    }
  }
}

// The same for kM * 16 ranks of one factor.
template <int kM, int kN>
__device__ inline void add_to_factor_grad(float* grad, int64_t width, int ranks, int64_t column,
                                          const float (&sums)[kM][kN][4], float scale, bool replaces) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    add_to_factor_grad<kN>(grad + m * kChunk * width, width, ranks - m * kChunk, column, sums[m], scale, replaces);
  }
}

// Rounds one fragment of grad_hidden; `row` and `column` are those of its first element within the piece.
__device__ inline void store_hidden_grad(bf16* out, int64_t stride, const Piece& piece, int row, int column,
                                         float4 sum) {
  // Zeros up to the next multiple of 16, because the other kernels read whole chunks.
  if (column >= ceil_div(piece.ranks, 16) * 16) return;
  bf16* at = out + row * stride + column;
  if (row < piece.rows) *reinterpret_cast<uint32_t*>(at) = pack(sum.x * piece.scale, sum.y * piece.scale);
  if (row + 8 < piece.rows) {
    *reinterpret_cast<uint32_t*>(at + 8 * stride) = pack(sum.z * piece.scale, sum.w * piece.scale);
  }
}

// sums += hidden^T x over the tile's 64 tokens, for the warp's 16 columns; `edit` may change x's fragment.
template <int kRank, class Edit>
__device__ inline void accumulate_factor_grad(float (&sums)[kRank / 16][2][4], const bf16* hidden, const bf16* x,
                                              int column, Edit&& edit) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kTileRows; k += 16) {
    Fragment b = right_fragment_of_rows<kTileRows, kGradColumns>(x, k, column, lane);
    edit(b, k);
#pragma unroll
    for (int m = 0; m < kRank / 16; ++m) {
      const Fragment a = left_fragment_of_rows<kTileRows, kRank>(hidden, k, m * 16, lane);
      multiply_add(sums[m][0], a, b.r[0], b.r[1]);
      multiply_add(sums[m][1], a, b.r[2], b.r[3]);
    }
  }
}

template <int kRank>
struct GradFactorTile {
  static constexpr int kX = kTileRows * kGradColumns, kHidden = kTileRows * kRank;
  static constexpr int kTokens = kTileRows * 2;  // token indices, 4 bytes each
  static constexpr int kStageElems = kX + kHidden + kTokens;
  static constexpr int kStages = stages(tuned(kArch).grad_factor, 0, kStageElems * 2);
  static_assert(kStages >= 2);

  template <bool kVector>
  __device__ static void run(const GradFactorArgs& args, const Piece& piece, const Chunk* chunks, bf16* shared) {
    const int warp = threadIdx.x / 32;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kGradColumns;
    const int steps = ceil_div(piece.rows, kTileRows);
    const bf16* x = static_cast<const bf16*>(args.x) + piece.row * args.width + column;
    const int own = own_hidden_column<kRank>();
    const bf16* hidden = static_cast<const bf16*>(args.hidden) + piece.row * args.hidden_stride;
    // What is read for ranks that do not exist, or that a member lacks, enters their sums alone.
    if (own < piece.ranks) {
      hidden += hidden_column(args.schedule, piece, (piece.rank_begin + own) / kChunk) + own % kChunk;
    }
    const Dropout dropout(piece, args.schedule.input_key, args.width);
    const bool dropping = args.use_dropout && dropout.limit != 0;
    int left = piece.rows;  // to load
    const int32_t* token_index = args.schedule.token_index + piece.row;
    int filled = 0;
    const auto load = [&] {
      bf16* stage = shared + filled;
      load_tile<kTileRows, kGradColumns, kGradThreads, kVector>(stage, x, args.width, left, args.width - column);
      load_hidden<kRank, kGradThreads>(stage + kX, hidden, args.hidden_stride, left);
      if (dropping && threadIdx.x < kTileRows) {
        reinterpret_cast<uint32_t*>(stage + kX + kHidden)[threadIdx.x] =
            token_index[min(static_cast<int>(threadIdx.x), left - 1)] * dropout.pairs;
      }
      left -= kTileRows, token_index += kTileRows;
      x += kTileRows * args.width, hidden += kTileRows * args.hidden_stride;
      filled = filled + kStageElems == kStages * kStageElems ? 0 : filled + kStageElems;
    };

    float sums[kRank / 16][2][4] = {};
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
      const uint32_t* draws = reinterpret_cast<const uint32_t*>(stage + kX + kHidden);
      // Apart, because a branch within would keep loads from overlapping products.
      if (dropping) {
        accumulate_factor_grad<kRank>(sums, stage + kX, stage, warp * 16,
                                      [&](Fragment& b, int k) { mask(b, dropout, draws + k, column + warp * 16); });
      } else {
        accumulate_factor_grad<kRank>(sums, stage + kX, stage, warp * 16, [](Fragment&, int) {});
      }
    }
    const float scale = (args.use_scale ? piece.scale : 1.f) * (dropping ? dropout.keep_scale : 1.f);
#pragma unroll
    for (int m = 0; m < kRank / kChunk; ++m) {
      const Chunk chunk = chunks[m];
      add_to_factor_grad<2>(args.grad + chunk.begin, args.width, chunk.ranks, column + warp * 16, sums[m], scale,
                            piece.replaces);
    }
  }

  // The fragment's two elements are of one column and two tokens, whereas a draw serves two columns of one
  // token: the lanes of neighbouring columns make one draw each and exchange them.
  __device__ static void mask(Fragment& b, const Dropout& dropout, const uint32_t* draws, int64_t column) {
    const int lane = threadIdx.x % 32, odd = lane / 4 % 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = i % 2 * 8 + lane % 4 * 2 + odd;
      const uint32_t pair = static_cast<uint32_t>((column + i / 2 * 8 + lane / 4) / 2);
      const uint32_t mine = dropout.draw(draws[token], pair);
      const uint32_t other = __shfl_xor_sync(0xffffffffu, mine, 4);
      const bool low = odd ? dropout.keeps_high(other) : dropout.keeps_low(mine);
      const bool high = odd ? dropout.keeps_high(mine) : dropout.keeps_low(other);
      b.r[i] &= (low ? 0xffffu : 0u) | (high ? 0xffff0000u : 0u);
    }
  }
};

template <bool kVector>
__global__ void __launch_bounds__(kGradThreads, 3) grad_factor_kernel(const GradFactorArgs args) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Piece piece = read_piece(args.schedule.pieces, blockIdx.y);
  constexpr int kChunks = kRunRanks / kChunk;
  __shared__ Chunk chunks[kChunks];
  const bool works = piece.rows > 0 && piece.slot >= 0 &&
                     find_chunks(chunks, kChunks, args.schedule, piece, piece.rank_begin / kChunk, args.width);
  wait_for_previous_kernel();
  if (!works) return;
  with_rank_class<kRunRanks>(piece.ranks, [&](auto rank) {
    GradFactorTile<rank>::template run<kVector>(args, piece, chunks, reinterpret_cast<bf16*>(shared));
  });
}

}  // namespace plora
