// What the kernels that ride on SwiGLU are called with. Plain C++, see args.h.
//
// gate = gate0 + s H_g B_g, up = up0 + s H_u B_u, act = silu(gate) up, H_d = act A_d^T. Wherever something is
// given for three linears, they are gate, up and down.
#pragma once

#include "args.h"

namespace plora {

// Ranks up to which swiglu_grad sees to all of an adapter.
constexpr int kFusedRanks = 32;

// act and, if asked for, H_d.
struct SwigluArgs {
  const Piece* pieces;  // tiles, base rows too
  int count;
  const int64_t* begin[3];  // [K] where each slot's B_g, B_u and A_d begin in the arena; negative: absent
  const void* in[2];        // gate0, up0
  const void* hidden[2];    // H_g, H_u
  int64_t hidden_stride;
  const void* factors;
  void* act;
  void* hidden_down;  // H_d, or null
  int64_t hidden_down_stride;
  float* partials;    // count * splits blocks
  int32_t* counters;  // zero, and left so
  int64_t width;
  int steps;  // of 64 columns, that a block walks
};

// dgate, dup and act; of adapters of few ranks also dH_g, dH_u, dB_g, dB_u and dA_d, and then not act.
struct SwigluGradArgs {
  const Piece* tiles;  // base rows too
  int tile_count;
  const int64_t* begin[3];
  const void* in[3];      // gate0, up0 and the frozen linear's part of dact
  const void* hidden[3];  // H_g, H_u and dH_d, or null for the last
  int64_t hidden_stride[3];
  const void* factors;
  void* out[3];  // dgate, dup, act; null: not asked for
  int64_t width;
  int steps;  // of 64 columns, that a block walks
  // Of swiglu_grad alone:
  const Piece* walks;
  int walk_count;
  float* grad;
  void* grad_hidden[2];  // dH_g, dH_u, of hidden's stride
  float* sums;           // zero, and left so
  int32_t* counters;     // kWalkRows / kTileRows * walk_count, zero, and left so
};

// Steps by default, for the current device; `count` of pieces, `rows` of tokens.
int swiglu_steps(int64_t width, int count);
int swiglu_grad_steps(int64_t width, int64_t rows);

int swiglu(const SwigluArgs& args, void* stream);
int swiglu_pointwise_grad(const SwigluGradArgs& args, void* stream);
int swiglu_grad(const SwigluGradArgs& args, void* stream);

}  // namespace plora
