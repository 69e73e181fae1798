#include "down.cuh"

namespace plora {

int down(const DownArgs& args, void* stream) {
  const dim3 grid(ceil_div(ceil_div(args.width, kPanel), args.steps), args.schedule.count);
  const bool vector = args.width % 8 == 0 && on_16_bytes(args.x) && on_16_bytes(args.factors);
  return launch(vector ? down_kernel<true> : down_kernel<false>, args, grid, kDownThreads, &Tuned::down, 0, stream);
}

int down_steps(int64_t width) {
  // Not more than kMaxSplits, for which the workspace was made.
  const int least = ceil_div(ceil_div(width, kPanel), kMaxSplits), wanted = tuned(device_arch()).down_steps;
  return wanted > least ? wanted : least;
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace plora
