// act = silu(gate0 + s H_g B_g) (up0 + s H_u B_u) and H_d = act A_d^T: a tile of tokens walks over columns, the
// width split over blocks.
//
// Eight warps of 16 tokens and half of a stage's columns each: with so much to do for each element, four would leave
// the memory waiting. gate0, up0 and the factors stream through shared memory, 64 columns a stage; act is made in
// gate0's place, leaves for memory, and from the same registers enters H_d. Ranks beyond 64 take several steps on the
// same columns. H_d's sums meet in the workspace as `down`'s do, always in the same order.
#pragma once

#include "swiglu_args.h"
#include "tile.cuh"

namespace plora {

constexpr int kSwigluThreads = 256;
constexpr int kHalf = kPanel / 2;  // columns of a warp

// The approximate instructions as they are, without the care for subnormal numbers that doubles their cost.
__device__ inline float sigmoid(float x) {
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + power));
  return inverse;
}

__device__ inline int own_row() { return threadIdx.x / 32 % 4 * 16; }
__device__ inline int own_half() { return threadIdx.x / 128 * kHalf; }

// Where the factors of one adapter begin in the arena, for each of three linears; negative: absent.
struct Places {
  int64_t begin[3];

  __device__ Places(const int64_t* const (&tables)[3], int slot) {
#pragma unroll
    for (int m = 0; m < 3; ++m) begin[m] = slot < 0 ? -1 : __ldg(tables[m] + slot);
  }
  __device__ bool has(int m) const { return begin[m] >= 0; }
};

// 64 rows by kRank columns of hidden from `column` on, zeros where there is none of it: what lies in its place
// may be anything.
template <int kRank>
__device__ inline void load_ranks(bf16* tile, const void* hidden, int64_t stride, int64_t row, int rows, int column,
                                  int ranks) {
  const bf16* from = static_cast<const bf16*>(hidden) + row * stride + column;
  load_tile<kTileRows, kRank, kSwigluThreads, true>(tile, from, stride, rows, ranks - column);
}

// sums += hidden F for the warp's 16 tokens and kColumns columns from `column` on, for each of kMembers linears, whose
// tiles lie `hidden_step` elements apart.
template <int kMembers, int kRank, int kColumns>
__device__ inline void multiply_ranks(float (&sums)[kMembers][kColumns / 8][4], const bf16* hidden, int hidden_step,
                                      const bf16* factors, int column, int ranks) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kRank; k += 16) {
    if (k >= ranks) break;
#pragma unroll
    for (int m = 0; m < kMembers; ++m) {
      const Fragment a = left_fragment<kTileRows, kRank>(hidden + m * hidden_step, own_row(), k, lane);
#pragma unroll
      for (int n = 0; n < kColumns; n += 16) {
        const Fragment b = right_fragment_of_rows<kRank, kPanel>(factors + m * kRank * kPanel, k, column + n, lane);
        multiply_add(sums[m][n / 8], a, b.r[0], b.r[1]);
        multiply_add(sums[m][n / 8 + 1], a, b.r[2], b.r[3]);
      }
    }
  }
}

// Each warp writes its own rows and columns, so that no barrier of the block is needed.
template <bool kVector>
__device__ inline void store_own(void* to, int64_t width, int64_t first_row, int rows, const bf16* tile,
                                 int64_t column) {
  const int lane = threadIdx.x % 32;
  bf16* out = static_cast<bf16*>(to) + first_row * width + column;
  const int64_t columns = width - column;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = own_row() + i * 8 + lane / 4, chunk = own_half() + lane % 4 * 8;
    if (row >= rows || chunk >= columns) continue;
    const bf16* from = tile + swizzled<kPanel>(row, chunk);
    if constexpr (kVector) {
      *reinterpret_cast<uint4*>(out + row * width + chunk) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (chunk + e < columns) out[row * width + chunk + e] = from[e];
      }
    }
  }
}

// The place in a panel of a thread's two neighbouring elements: `half` counts eight rows.
__device__ inline uint32_t* element_pair(bf16* tile, int column, int half) {
  const int lane = threadIdx.x % 32;
  return reinterpret_cast<uint32_t*>(tile + swizzled<kPanel>(own_row() + lane / 4 + half * 8, column + lane % 4 * 2));
}

// The panels of 64 columns that a block walks: every gridDim.x-th, so that blocks that run at the same time read
// neighbouring columns. Neighbouring panels for each made `swiglu` slower by a twentieth.
__device__ inline int own_panels(int64_t width) {
  return ceil_div(ceil_div(width, kPanel) - static_cast<int>(blockIdx.x), gridDim.x);
}
__device__ inline int64_t column_of(int panel) { return static_cast<int64_t>(panel * gridDim.x + blockIdx.x) * kPanel; }

// The walk over columns of adapters whose ranks come kWideRanks at a time: these factors stream through a ring of
// their own, and hidden too where all of it has no room. The activations' tile has one buffer, two where its panel
// takes but two steps.
constexpr int kWideRanks = 32;

template <int kMembers, int kTileElems>
struct WideWalk {
  static constexpr int kFactors = kMembers * kWideRanks * kPanel, kHidden = kMembers * kTileRows * kWideRanks;
  static constexpr int kMostResident = kTileRanks / kWideRanks;
  using Added = float[kMembers][kHalf / 8][4];

  static constexpr int ring(int kib) {
    const int resident = stages(kib, (kTileElems + kMostResident * kHidden) * 2, kFactors * 2);
    const int two_tiles = stages(kib, (2 * kTileElems + 2 * kHidden) * 2, kFactors * 2);
    const int streamed = stages(kib, kTileElems * 2, (kFactors + kHidden) * 2);
    const int least = resident < streamed ? resident : streamed;
    const int n = least < two_tiles ? least : two_tiles;
    return n > 3 ? 3 : n;  // a tile asked for at its panel's first step must be there at the third
  }

  // load_factors(to, part, panel) and load_hidden(to, part) fetch some ranks, load_tile(to, panel) what the last step
  // of a panel needs; finish(tile, added, panel) takes the products.
  template <int kStages, class LoadFactors, class LoadHidden, class LoadTile, class Finish>
  __device__ static void run(bf16* shared, int rank, int panels, LoadFactors&& load_factors, LoadHidden&& load_hidden,
                             LoadTile&& load_tile, Finish&& finish) {
    const int parts = ceil_div(rank, kWideRanks), steps = panels * parts;
    const bool resident = parts <= kMostResident;
    const int tiles = parts == 2 ? 2 : 1, stage_elems = kFactors + (resident ? 0 : kHidden);
    bf16* ring = shared + tiles * kTileElems;
    bf16* hidden = ring + kStages * stage_elems;
    const auto load = [&](int step) {
      bf16* stage = ring + step % kStages * stage_elems;
      const int part = step % parts;
      load_factors(stage, part, step / parts);
      if (!resident) load_hidden(stage + kFactors, part);
    };
    for (int part = 0; resident && part < parts; ++part) load_hidden(hidden + part * kHidden, part);
    if (tiles == 2 && panels > 0) load_tile(shared, 0);
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) load(step);
      cute::cp_async_fence();
    }
    Added added = {};
    for (int step = 0; step < steps; ++step) {
      cute::cp_async_wait<kStages - 2>();
      __syncthreads();
      const int part = step % parts, panel = step / parts, ahead = panel + tiles - 1;
      if (part == 0 && ahead < panels) load_tile(shared + ahead % tiles * kTileElems, ahead);
      if (step + kStages - 1 < steps) load(step + kStages - 1);
      cute::cp_async_fence();
      const bf16* stage = ring + step % kStages * stage_elems;
      multiply_ranks<kMembers, kWideRanks, kHalf>(added, resident ? hidden + part * kHidden : stage + kFactors,
                                                  kTileRows * kWideRanks, stage, own_half(), rank - part * kWideRanks);
      if (part < parts - 1) continue;
      finish(shared + panel % tiles * kTileElems, added, panel);
#pragma unroll
      for (int m = 0; m < kMembers; ++m) {
#pragma unroll
        for (int n = 0; n < kHalf / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) added[m][n][i] = 0;
        }
      }
    }
  }
};

// Ranks up to kRank; kWide: all beyond.
template <int kRank, bool kWide>
struct SwigluTile {
  static constexpr int kFactor = kRank * kPanel, kHidden = kTileRows * kRank;
  static constexpr int kDownRanks = kWide ? kTileRanks : kRank;
  // gate0 and up0, A_d, B_g and B_u.
  static constexpr int kDownAt = 2 * kPanelElems, kFactorsAt = kDownAt + kDownRanks * kPanel;
  static constexpr int kStageElems = kFactorsAt + 2 * kFactor;
  using Walk = WideWalk<2, kFactorsAt>;
  static constexpr int kStages =
      kWide ? Walk::ring(tuned(kArch).swiglu) : stages(tuned(kArch).swiglu, 2 * kHidden * 2, kStageElems * 2);
  static_assert(kStages >= 2);
  using Sums = float[kDownRanks / 8][4];

  template <bool kVector>
  __device__ static void run(const SwigluArgs& args, const Piece& piece, const Places& places, bf16* shared) {
    const int panels = own_panels(args.width);
    const bool adds = places.has(0) || places.has(1), goes_down = args.hidden_down && places.has(2);
    const bf16* factors = static_cast<const bf16*>(args.factors);
    const auto load_hidden = [&](bf16* to, int part) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_ranks<kRank>(to + m * kHidden, args.hidden[m], args.hidden_stride, piece.row, piece.rows, part * kRank,
                          places.has(m) ? piece.rank : 0);
      }
    };
    const auto load_factors = [&](bf16* to, int part, int panel) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const bf16* from = places.has(m) ? factors + places.begin[m] + part * kRank * args.width : factors;
        load_tile<kRank, kPanel, kSwigluThreads, kVector>(to + m * kFactor, from + column_of(panel), args.width,
                                                          places.has(m) ? piece.rank - part * kRank : 0,
                                                          args.width - column_of(panel));
      }
    };
    const auto load_rest = [&](bf16* to, int panel) {
      const int64_t column = column_of(panel);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_tile<kTileRows, kPanel, kSwigluThreads, kVector>(
            to + m * kPanelElems, static_cast<const bf16*>(args.in[m]) + piece.row * args.width + column, args.width,
            piece.rows, args.width - column);
      }
      if (goes_down) {
        load_tile<kDownRanks, kPanel, kSwigluThreads, kVector>(
            to + kDownAt, factors + places.begin[2] + piece.rank_begin * args.width + column, args.width, piece.ranks,
            args.width - column);
      }
    };
    Sums sums = {};
    const auto finish = [&](bf16* tile, auto& added, int panel) {
      activate(tile, added, piece.scale, goes_down ? piece.ranks : 0, sums);
      __syncwarp();
      if (piece.rank_begin > 0) return;  // the tile of the first ranks writes act
      store_own<kVector>(args.act, args.width, piece.row, piece.rows, tile, column_of(panel));
    };

    if constexpr (kWide) {
      Walk::template run<kStages>(shared, piece.rank, panels, load_factors, load_hidden, load_rest, finish);
    } else {
      bf16* pipeline = shared + 2 * kHidden;
      const auto load = [&](int panel) {
        bf16* stage = pipeline + panel % kStages * kStageElems;
        load_rest(stage, panel);
        if (adds) load_factors(stage + kFactorsAt, 0, panel);
      };
      if (adds) load_hidden(shared, 0);
#pragma unroll
      for (int panel = 0; panel < kStages - 1; ++panel) {
        if (panel < panels) load(panel);
        cute::cp_async_fence();
      }
      for (int panel = 0; panel < panels; ++panel) {
        cute::cp_async_wait<kStages - 2>();
        __syncthreads();
        if (panel + kStages - 1 < panels) load(panel + kStages - 1);
        cute::cp_async_fence();
        bf16* stage = pipeline + panel % kStages * kStageElems;
        float added[2][kHalf / 8][4] = {};
        if (adds) multiply_ranks<2, kRank, kHalf>(added, shared, kHidden, stage + kFactorsAt, own_half(), piece.rank);
        finish(stage, added, panel);
      }
    }
    if (!goes_down) return;
    add_halves(reinterpret_cast<float4*>(shared), sums);
    const int columns = rank_class(piece.ranks);
    if (gridDim.x > 1 && !add_splits(args, piece, columns, sums)) return;
    if (threadIdx.x < 128) store_hidden(args, piece, sums);
  }

  // Makes act in gate's place and adds its product with the first `ranks` of A_d.
  __device__ static void activate(bf16* stage, const float (&added)[2][kHalf / 8][4], float scale, int ranks,
                                  Sums& sums) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kHalf; k += 16) {
      Fragment act;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = k + i / 2 * 8, half = i % 2;
        uint32_t* at = element_pair(stage, own_half() + column, half);
        float2 gate = unpack(*at), up = unpack(*element_pair(stage + kPanelElems, own_half() + column, half));
        const float* add_gate = &added[0][column / 8][half * 2];
        const float* add_up = &added[1][column / 8][half * 2];
        gate.x += scale * add_gate[0], gate.y += scale * add_gate[1];
        up.x += scale * add_up[0], up.y += scale * add_up[1];
        *at = act.r[i] = pack(gate.x * sigmoid(gate.x) * up.x, gate.y * sigmoid(gate.y) * up.y);
      }
#pragma unroll
      for (int n = 0; n < kDownRanks; n += 16) {
        if (n >= ranks) break;
        const Fragment b = right_fragment<kDownRanks, kPanel>(stage + kDownAt, n, own_half() + k, lane);
        multiply_add(sums[n / 8], act, b.r[0], b.r[1]);
        multiply_add(sums[n / 8 + 1], act, b.r[2], b.r[3]);
      }
    }
  }

  // The sums of the two halves of the columns, in the first four warps.
  __device__ static void add_halves(float4* shared, Sums& sums) {
    cute::cp_async_wait<0>();
    __syncthreads();
    float4* own = shared + threadIdx.x % 128;
    if (threadIdx.x >= 128) {
#pragma unroll
      for (int n = 0; n < kDownRanks / 8; ++n)
        own[n * 128] = make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
    }
    __syncthreads();
    if (threadIdx.x >= 128) return;
#pragma unroll
    for (int n = 0; n < kDownRanks / 8; ++n) {
      const float4 other = own[n * 128];
      sums[n][0] += other.x, sums[n][1] += other.y, sums[n][2] += other.z, sums[n][3] += other.w;
    }
  }

  __device__ static int rank_class(int ranks) {
    return !kWide ? kRank : ranks <= 16 ? 16 : ranks <= 32 ? 32 : ranks <= 64 ? 64 : kTileRanks;
  }

  // Leaves this split's sums in the workspace; in the last block, `sums` become those of all splits.
  __device__ static bool add_splits(const SwigluArgs& args, const Piece& piece, int columns, Sums& sums) {
    const int vectors = kTileRows * columns / 4;
    float4* partials =
        reinterpret_cast<float4*>(args.partials + static_cast<int64_t>(piece.scratch) * kScratchBlock * gridDim.x);
#pragma unroll
    for (int n = 0; n < kDownRanks / 8; ++n) {
      if (n * 8 >= columns || threadIdx.x >= 128) break;
      __stcg(partials + blockIdx.x * vectors + n * 128 + threadIdx.x,
             make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]));
    }
    if (!arrives_last(args.counters + blockIdx.y, gridDim.x)) return false;
    if (threadIdx.x >= 128) return true;
#pragma unroll
    for (int n = 0; n < kDownRanks / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] = 0;
    }
#pragma unroll(kDownRanks <= 32 ? 4 : 1)
    for (int split = 0; split < gridDim.x; ++split) {
#pragma unroll
      for (int n = 0; n < kDownRanks / 8; ++n) {
        if (n * 8 >= columns) break;
        const float4 part = __ldcg(partials + split * vectors + n * 128 + threadIdx.x);
        sums[n][0] += part.x, sums[n][1] += part.y, sums[n][2] += part.z, sums[n][3] += part.w;
      }
    }
    return true;
  }

  __device__ static void store_hidden(const SwigluArgs& args, const Piece& piece, const Sums& sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    bf16* hidden = static_cast<bf16*>(args.hidden_down) + piece.row * args.hidden_down_stride + piece.rank_begin;
#pragma unroll
    for (int n = 0; n < kDownRanks / 8; ++n) {
      // Zeros up to the next multiple of 16, because the other kernels read whole chunks.
      const int column = n * 8 + lane % 4 * 2;
      if (column >= ceil_div(piece.ranks, 16) * 16) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp * 16 + lane / 4 + half * 8;
        if (row >= piece.rows) continue;
        *reinterpret_cast<uint32_t*>(hidden + row * args.hidden_down_stride + column) =
            pack(sums[n][half * 2], sums[n][half * 2 + 1]);
      }
    }
  }
};

template <bool kVector>
__global__ void __launch_bounds__(kSwigluThreads, 2) swiglu_kernel(const SwigluArgs args) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Piece piece = read_piece(args.pieces, blockIdx.y);
  const Places places(args.begin, piece.slot);
  wait_for_previous_kernel();
  if (piece.rows == 0) return;
  if (piece.rank_begin > 0 && !(args.hidden_down && places.has(2))) return;
  const auto run = [&](auto tile) { tile.template run<kVector>(args, piece, places, reinterpret_cast<bf16*>(shared)); };
  if (piece.rank <= 16) return run(SwigluTile<16, false>{});
  if (piece.rank <= 32) return run(SwigluTile<32, false>{});
  if (piece.rank <= 64) return run(SwigluTile<64, false>{});
  run(SwigluTile<kWideRanks, true>{});
}

}  // namespace plora
