#include <algorithm>

#include "swiglu_grad.cuh"

namespace plora {

namespace {

bool on_vectors(const SwigluGradArgs& args) {
  bool vector = args.width % 8 == 0 && on_16_bytes(args.factors);
  for (int m = 0; m < 3; ++m) vector = vector && on_16_bytes(args.in[m]) && on_16_bytes(args.out[m]);
  return vector;
}

dim3 grid_of(const SwigluGradArgs& args, int pieces) {
  return dim3(ceil_div(ceil_div(args.width, kPanel), args.steps), pieces);
}

}  // namespace

int swiglu_pointwise_grad(const SwigluGradArgs& args, void* stream) {
  return launch(on_vectors(args) ? swiglu_pointwise_grad_kernel<true> : swiglu_pointwise_grad_kernel<false>, args,
                grid_of(args, args.tile_count), kSwigluThreads, &Tuned::swiglu_grad, stream);
}

int swiglu_grad(const SwigluGradArgs& args, void* stream) {
  return launch(on_vectors(args) ? swiglu_grad_kernel<true> : swiglu_grad_kernel<false>, args,
                grid_of(args, args.tile_count + args.walk_count * kBlocksOfWalk), kSwigluThreads, &Tuned::swiglu_grad,
                stream);
}

int swiglu_grad_steps(int64_t width, int64_t rows) {
  // Fewer where there would not be two blocks for each multiprocessor.
  const int even = ceil_div(ceil_div(width, kPanel) * ceil_div(rows, fused_rows(kFusedRanks)), 2 * multiprocessors());
  return std::max(1, std::min(even, tuned(device_arch()).swiglu_grad_steps));
}

}  // namespace plora
