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
  int32_t rank;        // of the whole adapter
  int32_t scratch;     // where its sums lie in the workspace, in blocks of kScratchBlock floats
  float scale;
  int32_t limit;  // dropout threshold; 0: none
  uint32_t key_low, key_high;
  int32_t unused[5];
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
  int steps;  // of 64 columns, that a split walks
  bool use_dropout, use_scale;
};

// out = y + mask * scale * hidden F.
struct UpArgs {
  Schedule schedule;
  const void* y;  // null: zero
  const void* hidden;
  const void* factors;
  void* out;  // may be y
  int64_t width, hidden_stride;
  int steps;  // of 64 columns, that a block walks
  int max_rank;
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
  int clusters_per_run;  // that share the columns; 0: as suits the device
};

constexpr int kCluster = 8;
constexpr int kMaxSplits = 16;

// Steps by default, for the current device.
int down_steps(int64_t width);
int up_steps(int64_t width);

// Each returns a cudaError_t; `stream` is a cudaStream_t.
int down(const DownArgs& args, void* stream);
int up(const UpArgs& args, void* stream);
int grad_factor(const GradFactorArgs& args, void* stream);
// `clusters`: the form for sm_90 and later, which `has_clusters` says the current device is.
int grad_hidden(const GradHiddenArgs& args, bool clusters, void* stream);
bool has_clusters();
const char* error_string(int error);

}  // namespace plora
