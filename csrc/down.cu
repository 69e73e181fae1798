#include <algorithm>

#include "down.cuh"

namespace plora {

int down(const DownArgs& args, void* stream) {
  const dim3 grid(args.splits, args.schedule.count);
  const bool vector = args.width % 8 == 0 && on_16_bytes(args.x) && on_16_bytes(args.factors);
  return launch(vector ? down_kernel<true> : down_kernel<false>, args, grid, kDownThreads, &Tuned::down, stream);
}

int down_slots(int64_t width, int count, int members) {
  const Tuned row = tuned(device_arch());
  const int64_t steps = static_cast<int64_t>(ceil_div(width, kPanel)) * count;
  const int blocks = (members > 2 ? row.blocks_of_three : row.blocks) * multiprocessors();
  // In short walks it costs more to add up sums than more blocks gain.
  return std::max(std::min(blocks, ceil_div(steps, row.down_least_steps)), ceil_div(steps, row.down_steps));
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace plora
