// The backward of SwiGLU with its packed products: with s for an adapter's scale,
//
//   dact = dact0 + dH_d A_d, dgate = dact up silu'(gate), dup = dact silu(gate),
//   dH_g = s dgate B_g^T, dB_g += s H_g^T dgate, likewise of up, and dA_d += dH_d^T act,
//
// where gate, up and act are made again from gate0, up0, H_g and H_u.
//
// swiglu_pointwise_grad writes dgate, dup and act: a tile of 64 tokens walks over columns as in `swiglu`. swiglu_grad
// does so for adapters of many ranks and for base rows, and sees to everything for adapters of few: a block owns up to
// 256 tokens of one (128 where registers hold no more) and some columns, and walks these, 64 a step, in parts of 64
// tokens. Its part of dH stays in
// registers; dB and dA are complete for these tokens after each 64 columns and leave at once. At its end a block adds
// dH to sums in the workspace, which the last one rounds and clears.
//
// Eight warps: 16 tokens and half of a panel's columns each; for dH_g and dH_u, of which the first and the last four
// see to one each, 16 tokens; for the gradients of factors 16 columns by half of the ranks, or, at 16 ranks, 8 columns.
#pragma once

#include "grad_factor.cuh"
#include "swiglu.cuh"

namespace plora {

// Makes dgate, dup and act of the warp's 16 tokens in place of gate0, up0 and dact0, which follow one another, in
// kColumns columns from `column` on.
template <int kColumns>
__device__ inline void differentiate(bf16* tiles, int column, const float (&added)[3][kColumns / 8][4], float scale) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t* at = element_pair(tiles, column + n * 8, half);
      uint32_t* at_up = element_pair(tiles + kPanelElems, column + n * 8, half);
      uint32_t* at_dact = element_pair(tiles + 2 * kPanelElems, column + n * 8, half);
      const float2 gate0 = unpack(*at), up0 = unpack(*at_up), dact0 = unpack(*at_dact);
      const float gates[2] = {gate0.x, gate0.y}, ups[2] = {up0.x, up0.y}, dacts[2] = {dact0.x, dact0.y};
      float dgate[2], dup[2], act[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float gate = gates[e] + scale * added[0][n][half * 2 + e];
        const float up = ups[e] + scale * added[1][n][half * 2 + e], dact = dacts[e] + added[2][n][half * 2 + e];
        const float slope = sigmoid(gate), silu = gate * slope;
        dup[e] = dact * silu;
        act[e] = silu * up;
        dgate[e] = dact * up * (slope + silu * (1.f - slope));
      }
      *at = pack(dgate[0], dgate[1]);
      *at_up = pack(dup[0], dup[1]);
      *at_dact = pack(act[0], act[1]);
    }
  }
}

// 64 rows and columns of gate0, up0 and dact0.
template <bool kVector>
__device__ inline void load_activations(const SwigluGradArgs& args, bf16* tiles, int64_t row, int rows,
                                        int64_t column) {
#pragma unroll
  for (int m = 0; m < 3; ++m) {
    load_tile<kTileRows, kPanel, kSwigluThreads, kVector>(
        tiles + m * kPanelElems, static_cast<const bf16*>(args.in[m]) + row * args.width + column, args.width, rows,
        args.width - column);
  }
}

// 64 columns of up to kRank ranks, from `rank_begin` on, of the three factors.
template <int kRank, bool kVector>
__device__ inline void load_factors(const SwigluGradArgs& args, const Places& places, bf16* to, int rank_begin,
                                    int rank, int64_t column) {
  const bf16* factors = static_cast<const bf16*>(args.factors);
#pragma unroll
  for (int m = 0; m < 3; ++m) {
    const bf16* from = places.has(m) ? factors + places.begin[m] + rank_begin * args.width + column : factors;
    load_tile<kRank, kPanel, kSwigluThreads, kVector>(to + m * kRank * kPanel, from, args.width,
                                                      places.has(m) ? rank - rank_begin : 0, args.width - column);
  }
}

// 64 rows of up to kRank ranks, from `rank_begin` on, of H_g, H_u and dH_d.
template <int kRank>
__device__ inline void load_hiddens(const SwigluGradArgs& args, const Places& places, bf16* to, int64_t row, int rows,
                                    int rank_begin, int rank) {
#pragma unroll
  for (int m = 0; m < 3; ++m) {
    load_ranks<kRank>(to + m * kTileRows * kRank, args.hidden[m], args.hidden_stride[m], row, rows, rank_begin,
                      places.has(m) ? rank : 0);
  }
}

// Ranks up to kRank; kWide: all beyond.
template <int kRank, bool kWide>
struct SwigluPointwiseGradTile {
  static constexpr int kHidden = 3 * kTileRows * kRank, kTiles = 3 * kPanelElems;
  static constexpr int kStageElems = kTiles + 3 * kRank * kPanel;
  using Walk = WideWalk<3, kTiles>;
  static constexpr int kStages =
      kWide ? Walk::ring(tuned(kArch).swiglu_grad) : stages(tuned(kArch).swiglu_grad, kHidden * 2, kStageElems * 2);
  static_assert(kStages >= 2);

  template <bool kVector>
  __device__ static void run(const SwigluGradArgs& args, const Piece& piece, const Places& places, bf16* shared) {
    const int panels = own_panels(args.width);
    const bool adds = places.has(0) || places.has(1) || places.has(2);
    const auto load_hidden = [&](bf16* to, int part) {
      load_hiddens<kRank>(args, places, to, piece.row, piece.rows, part * kRank, piece.rank);
    };
    const auto load_factor = [&](bf16* to, int part, int panel) {
      load_factors<kRank, kVector>(args, places, to, part * kRank, piece.rank, column_of(panel));
    };
    const auto load_rest = [&](bf16* to, int panel) {
      load_activations<kVector>(args, to, piece.row, piece.rows, column_of(panel));
    };
    const auto finish = [&](bf16* tiles, auto& added, int panel) {
      differentiate<kHalf>(tiles, own_half(), added, piece.scale);
      __syncwarp();
#pragma unroll
      for (int m = 0; m < 3; ++m) {
        if (!args.out[m]) continue;
        store_own<kVector>(args.out[m], args.width, piece.row, piece.rows, tiles + m * kPanelElems, column_of(panel));
      }
    };

    if constexpr (kWide) {
      Walk::template run<kStages>(shared, piece.rank, panels, load_factor, load_hidden, load_rest, finish);
    } else {
      bf16* pipeline = shared + kHidden;
      const auto load = [&](int panel) {
        bf16* stage = pipeline + panel % kStages * kStageElems;
        load_rest(stage, panel);
        if (adds) load_factor(stage + kTiles, 0, panel);
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
        float added[3][kHalf / 8][4] = {};
        if (adds) {
          multiply_ranks<3, kRank, kHalf>(added, shared, kTileRows * kRank, stage + kTiles, own_half(), piece.rank);
        }
        finish(stage, added, panel);
      }
    }
  }
};

template <bool kVector>
__device__ inline void run_pointwise_grad(const SwigluGradArgs& args, const Piece& piece, bf16* shared) {
  if (piece.rows == 0 || piece.rank_begin > 0) return;
  Places places(args.begin, piece.slot);
  if (!args.hidden[2]) places.begin[2] = -1;
  const auto run = [&](auto tile) { tile.template run<kVector>(args, piece, places, shared); };
  if (piece.rank <= 16) return run(SwigluPointwiseGradTile<16, false>{});
  if (piece.rank <= 32) return run(SwigluPointwiseGradTile<32, false>{});
  run(SwigluPointwiseGradTile<kWideRanks, true>{});
}

template <bool kVector>
__global__ void __launch_bounds__(kSwigluThreads, 2) swiglu_pointwise_grad_kernel(const SwigluGradArgs args) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Piece piece = read_piece(args.tiles, blockIdx.y);
  wait_for_previous_kernel();
  run_pointwise_grad<kVector>(args, piece, reinterpret_cast<bf16*>(shared));
}

// A block's tokens: as many as a walk has, up to the ranks at which registers hold their sums.
__host__ __device__ constexpr int fused_rows(int rank_class) { return rank_class == 16 ? kWalkRows : kWalkRows / 2; }

template <int kRank>
struct SwigluGradTile {
  static constexpr int kParts = fused_rows(kRank) / kTileRows;
  static constexpr int kStrip = 16;                               // columns whose products are in registers at a time
  static constexpr int kColumns = kRank == 16 ? 8 : 16;           // of the gradients of factors, a warp
  static constexpr int kOwnRanks = kRank == 16 ? 16 : kRank / 2;  // likewise
  static constexpr int kTiles = 3 * kPanelElems, kHidden = 3 * kTileRows * kRank, kFactors = 3 * kRank * kPanel;
  // Panels of factors in use while the pipeline runs `stages` - 1 parts ahead.
  __host__ __device__ static constexpr int kept(int stages, int parts) { return ceil_div(stages - 1, parts) + 1; }
  static constexpr bool fits(int stages) {
    for (int parts = 1; parts <= kParts; ++parts) {
      const int elems = stages * kTiles + parts * kHidden + kept(stages, parts) * kFactors;
      if (elems * 2 > tuned(kArch).swiglu_grad * 1024) return false;
    }
    return true;
  }
  static constexpr int kStages = fits(4) ? 4 : fits(3) ? 3 : 2;
  static_assert(fits(kStages), "shared memory");
  // Of a part of 64 tokens in the order of the walk, and of what it needs in the two rings.
  struct Position {
    int panel = 0, part = 0, stage = 0, kept = 0;

    __device__ void advance(int parts, int panels_kept) {
      stage = stage == kStages - 1 ? 0 : stage + 1;
      if (++part < parts) return;
      part = 0, ++panel;
      kept = kept == panels_kept - 1 ? 0 : kept + 1;
    }
  };
  using HiddenSums = float[kRank / 8][4];
  using FactorSums = float[3][kOwnRanks / 16][kColumns / 8][4];

  template <bool kVector>
  __device__ static void run(const SwigluGradArgs& args, const Piece& piece, const Places& places, int32_t* counter,
                             bf16* shared) {
    const int parts = ceil_div(piece.rows, kTileRows), panels_kept = kept(kStages, parts);
    const int panels = own_panels(args.width);
    const bool adds = places.has(0) || places.has(1) || places.has(2);
    bf16* pipeline = shared;
    bf16* hidden = pipeline + kStages * kTiles;
    bf16* factors = hidden + parts * kHidden;
    Position next;  // to fetch
    const auto load = [&]() {
      if (next.panel < panels) {
        load_activations<kVector>(args, pipeline + next.stage * kTiles, piece.row + next.part * kTileRows,
                                  piece.rows - next.part * kTileRows, column_of(next.panel));
        if (next.part == 0 && adds) {
          load_factors<kRank, kVector>(args, places, factors + next.kept * kFactors, 0, piece.rank,
                                       column_of(next.panel));
        }
        next.advance(parts, panels_kept);
      }
      cute::cp_async_fence();
    };

    if (adds) {
      for (int part = 0; part < parts; ++part) {
        load_hiddens<kRank>(args, places, hidden + part * kHidden, piece.row + part * kTileRows,
                            piece.rows - part * kTileRows, 0, piece.rank);
      }
    }
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) load();
    HiddenSums sums[kParts] = {};
    FactorSums factor_sums = {};
    Position at;
    while (at.panel < panels) {
      const int64_t column = column_of(at.panel);
      const bf16* factor = factors + at.kept * kFactors;
#pragma unroll 1
      for (int part = 0; part < parts; ++part) {
        cute::cp_async_wait<kStages - 2>();
        __syncthreads();
        load();
        bf16* tiles = pipeline + at.stage * kTiles;
        at.advance(parts, panels_kept);
        const bf16* own_hidden = hidden + part * kHidden;
        const int rows = min(piece.rows - part * kTileRows, kTileRows);
        if (own_row() < rows) {
          multiply_and_differentiate(tiles, own_hidden, factor, piece, adds);
          __syncwarp();
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            store_own<kVector>(args.out[m], args.width, piece.row + part * kTileRows, rows, tiles + m * kPanelElems,
                               column);
          }
        }
        if (!adds) continue;
        __syncthreads();
        if (own_row() < rows) {
#pragma unroll
          for (int p = 0; p < kParts; ++p) {
            if (p == part) add_hidden_grad(sums[p], tiles, factor);
          }
        }
        add_factor_grad(factor_sums, own_hidden, tiles, rows);
      }
#pragma unroll
      for (int m = 0; m < 3; ++m) {
        if (places.has(m)) {
          add_to_factor_grad<kOwnRanks / 16, kColumns / 8>(args.grad + places.begin[m] + own_rank() * args.width,
                                                           args.width, piece.rank - own_rank(), column + own_column(),
                                                           factor_sums[m], m < 2 ? piece.scale : 1.f, piece.replaces);
        }
#pragma unroll
        for (int r = 0; r < kOwnRanks / 16; ++r) {
#pragma unroll
          for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) factor_sums[m][r][n][i] = 0;
          }
        }
      }
    }
    if (places.has(0) || places.has(1)) add_up(args, piece, places, parts, counter, sums);
  }

  __device__ static void multiply_and_differentiate(bf16* tiles, const bf16* hidden, const bf16* factors,
                                                    const Piece& piece, bool adds) {
#pragma unroll
    for (int strip = 0; strip < kHalf; strip += kStrip) {
      const int column = own_half() + strip;
      float added[3][kStrip / 8][4] = {};
      if (adds) multiply_ranks<3, kRank, kStrip>(added, hidden, kTileRows * kRank, factors, column, piece.rank);
      differentiate<kStrip>(tiles, column, added, piece.scale);
    }
  }

  // Whose dH is the warp's, gate's or up's.
  __device__ static int own_member() { return threadIdx.x / 128; }
  __device__ static int own_column() { return threadIdx.x / 32 * kColumns % kPanel; }
  __device__ static int own_rank() { return kRank == 16 ? 0 : threadIdx.x / 128 * kOwnRanks; }

  // sums += dgate B_g^T or dup B_u^T for the warp's 16 tokens.
  __device__ static void add_hidden_grad(HiddenSums& sums, const bf16* tiles, const bf16* factors) {
    const int lane = threadIdx.x % 32;
    const bf16* dy = tiles + own_member() * kPanelElems;
    const bf16* factor = factors + own_member() * kRank * kPanel;
#pragma unroll
    for (int k = 0; k < kPanel; k += 16) {
      const Fragment a = left_fragment<kTileRows, kPanel>(dy, own_row(), k, lane);
#pragma unroll
      for (int n = 0; n < kRank; n += 16) {
        const Fragment b = right_fragment<kRank, kPanel>(factor, n, k, lane);
        multiply_add(sums[n / 8], a, b.r[0], b.r[1]);
        multiply_add(sums[n / 8 + 1], a, b.r[2], b.r[3]);
      }
    }
  }

  // sums += H_g^T dgate, H_u^T dup and dH_d^T act for the warp's columns and ranks.
  __device__ static void add_factor_grad(FactorSums& sums, const bf16* hidden, const bf16* tiles, int rows) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kTileRows; k += 32) {
      if (k >= rows) break;
#pragma unroll
      for (int m = 0; m < 3; ++m) {
        const bf16* tile = tiles + m * kPanelElems;
        // The right operands of 32 tokens; eight columns of them are one load.
        Fragment b[2];
        if constexpr (kColumns == 8) {
          b[0] = load_fragment_transposed(tile + swizzled<kPanel>(k + lane, own_column()));
        } else {
          b[0] = right_fragment_of_rows<kTileRows, kPanel>(tile, k, own_column(), lane);
          b[1] = right_fragment_of_rows<kTileRows, kPanel>(tile, k + 16, own_column(), lane);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int r = 0; r < kOwnRanks / 16; ++r) {
            const Fragment a = left_fragment_of_rows<kTileRows, kRank>(hidden + m * kTileRows * kRank, k + half * 16,
                                                                       own_rank() + r * 16, lane);
            if constexpr (kColumns == 8) {
              multiply_add(sums[m][r][0], a, b[0].r[half * 2], b[0].r[half * 2 + 1]);
            } else {
              multiply_add(sums[m][r][0], a, b[half].r[0], b[half].r[1]);
              multiply_add(sums[m][r][1], a, b[half].r[2], b[half].r[3]);
            }
          }
        }
      }
    }
  }

  // dH's sums over the blocks that share the columns.
  __device__ static void add_up(const SwigluGradArgs& args, const Piece& piece, const Places& places, int parts,
                                int32_t* counter, const HiddenSums (&sums)[kParts]) {
    const int lane = threadIdx.x % 32;
    float* all = args.sums + 2 * static_cast<int64_t>(piece.scratch) * kScratchBlock;
    const auto place = [&](int part, int n) {
      return all + ((part * (kRank / 8) + n) * kSwigluThreads + threadIdx.x) * 4;
    };
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (part >= parts) break;
#pragma unroll
      for (int n = 0; n < kRank / 8; ++n) {
        const auto& sum = sums[part][n];
        add_to(place(part, n), make_float4(sum[0], sum[1], sum[2], sum[3]));
      }
    }
    if (!arrives_last(counter, gridDim.x)) return;
    const bool has = own_member() == 0 ? places.has(0) : places.has(1);
    const int64_t stride = args.hidden_stride[0];
    bf16* out = static_cast<bf16*>(args.grad_hidden[own_member()]) + piece.row * stride;
    for (int part = 0; part < parts; ++part) {
#pragma unroll
      for (int n = 0; n < kRank / 8; ++n) {
        float4* at = reinterpret_cast<float4*>(place(part, n));
        const float4 sum = __ldcg(at);
        __stcg(at, make_float4(0, 0, 0, 0));
        if (!has) continue;
        store_hidden_grad(out, stride, piece, part * kTileRows + own_row() + lane / 4, n * 8 + lane % 4 * 2, sum);
      }
    }
  }
};

constexpr int kBlocksOfWalk = kWalkRows / fused_rows(kFusedRanks);  // that share its rows, at most

template <bool kVector>
__global__ void __launch_bounds__(kSwigluThreads, 2) swiglu_grad_kernel(const SwigluGradArgs args) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  bf16* shared = reinterpret_cast<bf16*>(shared_bytes);
  const int walk = static_cast<int>(blockIdx.y) - args.tile_count;
  Piece piece = read_piece(walk < 0 ? args.tiles : args.walks, walk < 0 ? blockIdx.y : walk / kBlocksOfWalk);
  wait_for_previous_kernel();
  if (walk < 0) {
    if (piece.slot < 0 || piece.rank > kFusedRanks) run_pointwise_grad<kVector>(args, piece, shared);
    return;
  }
  if (piece.rows == 0 || piece.rank > kFusedRanks) return;
  const Places places(args.begin, piece.slot);
  const auto run = [&](auto rank) {
    const int skipped = walk % kBlocksOfWalk * fused_rows(rank);
    if (skipped >= piece.rows) return;
    piece.row += skipped;
    piece.rows = min(piece.rows - skipped, fused_rows(rank));
    piece.scratch += skipped / kTileRows * (rank / 16);
    SwigluGradTile<rank>::template run<kVector>(args, piece, places, args.counters + walk, shared);
  };
  with_rank_class<kFusedRanks>(piece.rank, run);
}

}  // namespace plora
