// Tuned parameters: one table by architecture, first match wins.
#pragma once

namespace plora {

struct Tuned {
  int lowest, highest;                     // compute capability * 100
  int down, up, grad_factor, grad_hidden;  // KiB of shared memory a block may take, hence its pipeline depth
  // Blocks of a multiprocessor that the columns are shared among; the second in `down` for groups of three, whose
  // pieces are wide.
  int blocks, blocks_of_three;
  int down_least_steps, down_steps, up_steps;  // columns a block walks on average, at least and at most, in steps of 64
  int swiglu, swiglu_grad;                     // KiB of shared memory
  int swiglu_steps, swiglu_grad_steps;         // columns a block walks, in steps of 64
};

constexpr Tuned kTuned[] = {
    // 227 KiB an SM: three blocks each, two of grad_hidden and of swiglu's, which hold more sums. Measured on an H100:
    // four blocks of down took 5% longer, three of grad_hidden (at 32 ranks a piece) 5%. Walks: see README.md.
    {900, 1099, 72, 72, 73, 112, 3, 5, 4, 54, 6, 112, 112, 37, 6},
    // 163 KiB an SM: two blocks each, one of swiglu's. Untested.
    {800, 800, 80, 80, 80, 80, 2, 4, 4, 54, 8, 160, 160, 37, 6},
    // 99 KiB an SM and a block: the least that two stages of the widest rank class take. Untested.
    {810, 899, 48, 64, 49, 64, 2, 4, 4, 54, 8, 96, 96, 37, 6},
    // Unknown: what fits everywhere.
    {0, 1 << 30, 48, 64, 49, 64, 2, 4, 4, 54, 8, 96, 96, 37, 6},
};

constexpr Tuned tuned(int arch) {
  for (const Tuned& row : kTuned) {
    if (row.lowest <= arch && arch <= row.highest) return row;
  }
  return kTuned[sizeof(kTuned) / sizeof(kTuned[0]) - 1];
}

// As many stages as fit into `kib` beside `fixed` bytes. More than 8 never paid.
constexpr int stages(int kib, int fixed, int stage) {
  const int n = (kib * 1024 - fixed) / stage;
  return n > 8 ? 8 : n;
}

}  // namespace plora
