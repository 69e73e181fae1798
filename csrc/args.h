// What the kernels are called with. Plain C++: bindings.cpp sees this and nothing else of CUDA's.
//
// Shapes: T packed tokens, R columns of the hidden matrices, K slots; `width` is that of the module's
// input or output, whichever the factor spans. bf16 arrays are passed as void*.
#pragma once

#include <cstdint>

namespace plora {

// Some rows and ranks of one adapter: the unit of work along the tokens. `down` and `up` work on tiles of
// kTileRows rows and kTileRanks ranks, the gradients of factors on longer runs of rows and fewer ranks.
// Mirrored by plora/kernels/schedule.py; an all-zero record is unused.
struct alignas(16) Piece {
  int32_t slot;        // negative: rows that see the base alone
  int32_t row;         // first row
  int32_t rows;        // 0: unused
  int32_t rank_begin;  // first rank row
  int32_t ranks;       // rank rows of this piece
  int32_t rank;        // of the whole adapter, in one member
  int32_t scratch;     // where its sums lie in the workspace, in blocks of kScratchBlock floats
  float scale;
  int32_t limit;  // dropout threshold; 0: none
  uint32_t key_low, key_high;
  int32_t share;     // of the work of all pieces of the list, in 1/65536
  int32_t replaces;  // whether gradients of factors are written rather than added to: no other piece adds to them
  int32_t unused[3];
};
static_assert(sizeof(Piece) == 64, "four 16-byte loads");

constexpr int kTileRows = 64;
constexpr int kTileRanks = 128;
constexpr int kRunRanks = 64;  // more would take the registers of a third block
// Of grad_hidden in clusters, whose blocks hold sums of all their tokens.
constexpr int kWalkRows = 256, kWalkRanks = 64;
constexpr int kScratchBlock = kTileRows * 16;

struct Schedule {
  const Piece* pieces;
  int count;                   // records to look at; the rest of them are unused
  const int64_t* begin;        // [K] where each slot's factor begins in the arena; negative: absent
  const int64_t* input_key;    // [1] dropout key of the module's input
  const int32_t* token_index;  // [T]
  // Of a group, the linears that share the input; see group.cuh. The last two lead from one member to the next.
  int members;
  int64_t begin_step;   // in `begin`
  int64_t hidden_step;  // in columns of hidden
};

// hidden = scale? * dropout(x) F^T for the factor F [r, width].
struct DownArgs {
  Schedule schedule;
  const void* x;
  const void* factors;
  void* hidden;
  float* partials;    // count * splits blocks
  int32_t* counters;  // zero, and left so
  int64_t width, hidden_stride;
  // Blocks that the columns of all pieces are shared among, by the pieces' shares, and of one piece at most.
  int slots, splits;
  bool use_dropout, use_scale;
};

// out = y + residual + mask * scale * hidden F, summed over the schedule's members.
struct UpArgs {
  Schedule schedule;
  const void* y;         // null: zero
  const void* residual;  // likewise
  const void* hidden;
  const void* factors;
  void* out;  // may be y
  int64_t width, hidden_stride;
  int slots, splits;  // as of DownArgs
  bool use_dropout, use_scale;
};

// grad F += scale * hidden^T dropout(x).
struct GradFactorArgs {
  Schedule schedule;
  const void* x;
  const void* hidden;
  float* grad;
  int64_t width, hidden_stride;
  bool use_dropout, use_scale;
};

// grad_hidden = scale * dy F^T and grad F += scale * hidden^T dy.
struct GradHiddenArgs {
  Schedule schedule;
  const void* dy;
  const void* hidden;
  const void* factors;
  void* grad_hidden;
  float* grad;
  float* sums;        // zero, and left so
  int32_t* counters;  // kCluster * count, zero, and left so
  int64_t width, hidden_stride;
  int clusters;  // that share the columns; 0: as suits the device
};

constexpr int kCluster = 8;
constexpr int kMostMembers = 3, kMostRank = 256;

// Linears that one launch makes the outputs, or takes the gradients of the outputs, of: blockIdx.z is which.
template <class Args>
struct Each {
  Args of[kMostMembers];
  int count;
};

// Blocks that share the width of `down`, at most: what the workspace is made for.
constexpr int kMaxSplits = 16, kMaxGroupSplits = 8;
constexpr int max_splits(int members) { return members > 1 ? kMaxGroupSplits : kMaxSplits; }

// Slots by default, for the current device; `widths`: of all linears of the launch.
int down_slots(int64_t width, int count, int members);
int up_slots(int64_t width, int64_t widths, int count);

// Each returns a cudaError_t; `stream` is a cudaStream_t.
int down(const DownArgs& args, void* stream);
int up(const Each<UpArgs>& linears, void* stream);
int grad_factor(const GradFactorArgs& args, void* stream);
// `clusters`: the form for sm_90 and later, which `has_clusters` says the current device is.
int grad_hidden(Each<GradHiddenArgs> linears, bool clusters, void* stream);
bool has_clusters();
const char* error_string(int error);

}  // namespace plora
