// What the optimizer's kernels are called with. Plain C++, as args.h.
#pragma once

#include <cstdint>

namespace plora {

// One adapter that steps. Its A, then its B lie in the arena from `start`; both lengths are multiples of 64.
// Mirrored by plora/kernels/adamw.py.
struct alignas(16) AdamWRecord {
  int64_t start;
  int64_t a_numel, numel;  // of A; of both
  void* exp_avg;           // [numel] fp32, or 8-bit codes
  void* exp_avg_sq;
  float* scales;  // of the codes, one for every 256 elements of A, then of B; exp_avg_sq's follow exp_avg's
  double beta1, beta2;
  float lr_a, lr_b, eps, weight_decay;
  float max_norm;  // infinite: no clipping
  int32_t slot;
  int32_t first_chunk;  // chunks of the records before it
  int32_t unused;
};
static_assert(sizeof(AdamWRecord) == 96, "as in adamw.py");

constexpr int kAdamWChunk = 8192;  // elements of a thread block's work; A and B are cut up each by itself
constexpr int kAdamWBlock = 256;   // elements that share a scale

// What a step of an adapter multiplies by, made on the device from its norm and count.
struct alignas(16) AdamWScale {
  float clip;          // of the gradient
  float first;         // 1 / (1 - beta1^t)
  float second;        // 1 / sqrt(1 - beta2^t)
  int32_t is_skipped;  // loss or norm is not finite
};

struct AdamWArgs {
  float* weight;
  const float* grad;
  void* shadow;  // bf16; null: there is none
  const AdamWRecord* records;
  int count;              // of records
  int chunks;             // of all records
  const float* losses;    // [K]
  float* steps;           // [K], counted up where the step is not skipped
  float* norms;           // [K] out
  float* skipped;         // [K] out
  float* partials;        // [chunks]
  AdamWScale* scaling;    // [count]
  const float* codebook;  // [2, 256] values of exp_avg's codes and of exp_avg_sq's; null: the moments are fp32
};

// Norms, clip and skip of every record, then the update: three launches. Returns a cudaError_t.
int adamw(const AdamWArgs& args, void* stream);

}  // namespace plora
