// A group: the one to three linears that share an input, which therefore is read once for all of them.
//
// Their hidden matrices lie side by side, hidden_step columns each, and their factors in places of their own. Where x
// or dx is shared, kernels see the ranks of an adapter in all members as one row of *virtual* ranks: each member's
// rounded up to whole chunks of 16, one member's after the other's. A piece's ranks are of these; a chunk is of one
// member.
#pragma once

#include "tile.cuh"

namespace plora {

constexpr int kChunk = 16;
constexpr int kMostChunks = kMostMembers * kMostRank / kChunk;

struct alignas(16) Chunk {
  int64_t begin;  // its first row in the arena
  int ranks;      // that exist: 0 where the member lacks the adapter, or there is no such member
  int column;     // its first one of hidden
};

__device__ inline int virtual_ranks(const Schedule& schedule, const Piece& piece) {
  return schedule.members * ceil_div(piece.rank, kChunk) * kChunk;
}

// Where the i-th chunk of the adapter's virtual ranks lies in hidden.
__device__ inline int hidden_column(const Schedule& schedule, const Piece& piece, int i) {
  const int each = ceil_div(piece.rank, kChunk);
  return i / each * static_cast<int>(schedule.hidden_step) + i % each * kChunk;
}

// Looks up `count` chunks from the `first` on, for all threads of the block, which it synchronises. Returns whether
// any of them exists.
__device__ inline bool find_chunks(Chunk* chunks, int count, const Schedule& schedule, const Piece& piece, int first,
                                   int64_t width) {
  bool found = false;
  if (static_cast<int>(threadIdx.x) < count) {
    const int i = first + threadIdx.x, each = ceil_div(piece.rank, kChunk), member = i / each, rank = i % each * kChunk;
    const int64_t begin =
        member < schedule.members ? __ldg(schedule.begin + member * schedule.begin_step + piece.slot) : -1;
    found = begin >= 0;
    chunks[threadIdx.x] = found ? Chunk{begin + rank * width, min(piece.rank - rank, kChunk),
                                        member * static_cast<int>(schedule.hidden_step) + rank}
                                : Chunk{0, 0, 0};
  }
  return __syncthreads_or(found);
}

// A block's part of the columns of a piece, which `of` blocks share.
struct Split {
  int index, of;

  __device__ int first(int panels) const { return static_cast<int>(static_cast<int64_t>(panels) * index / of); }
  __device__ int last(int panels) const { return static_cast<int>(static_cast<int64_t>(panels) * (index + 1) / of); }
};

// As many blocks as let all pieces together take `slots` of them, each as its share of the work, but at most `most`.
__device__ inline Split split_of(const Piece& piece, int slots, int most) {
  const int wanted = static_cast<int>(static_cast<int64_t>(piece.share) * slots >> 16);
  return {static_cast<int>(blockIdx.x), max(1, min(wanted, most))};
}

// 64 columns of kRank virtual ranks' rows; what does not exist becomes zero.
template <int kRank, int kThreads, bool kVector>
__device__ inline void load_factor(bf16* tile, const bf16* factors, const Chunk* chunks, int64_t width,
                                   int64_t columns) {
#pragma unroll
  for (int i = 0; i < kRank / kChunk; ++i) {
    const Chunk chunk = chunks[i];
    load_tile<kChunk, kPanel, kThreads, kVector>(tile + i * kChunk * kPanel, factors + chunk.begin, width, chunk.ranks,
                                                 columns);
  }
}

// The column of a kRank wide tile of hidden that is the thread's to load.
template <int kRank>
__device__ inline int own_hidden_column() {
  return threadIdx.x % (kRank / 8) * 8;
}

// 64 rows of kRank virtual ranks of hidden. `from`: where the thread's own column begins.
template <int kRank, int kThreads>
__device__ inline void load_hidden(bf16* tile, const bf16* from, int64_t stride, int rows) {
  constexpr int kVectors = kRank / 8;
  static_assert(kThreads % kVectors == 0);
#pragma unroll
  for (int i = 0; i < ceil_div(kTileRows * kVectors, kThreads); ++i) {
    const int row = (i * kThreads + threadIdx.x) / kVectors;
    if (row >= kTileRows) break;
    bf16* to = tile + in_tile<kTileRows, kRank>(row, own_hidden_column<kRank>());
    const bool inside = row < rows;
    cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
        *reinterpret_cast<const cute::uint128_t*>(inside ? from + row * stride : from),
        *reinterpret_cast<cute::uint128_t*>(to), inside);
  }
}

}  // namespace plora
