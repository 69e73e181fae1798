#include "swiglu.cuh"

namespace plora {

int swiglu(const SwigluArgs& args, void* stream) {
  const dim3 grid(ceil_div(ceil_div(args.width, kPanel), args.steps), args.count);
  const bool vector = args.width % 8 == 0 && on_16_bytes(args.in[0]) && on_16_bytes(args.in[1]) &&
                      on_16_bytes(args.factors) && on_16_bytes(args.act);
  return launch(vector ? swiglu_kernel<true> : swiglu_kernel<false>, args, grid, kSwigluThreads, &Tuned::swiglu, 0,
                stream);
}

int swiglu_steps(int64_t width) {
  // Not more than kMaxSplits, for which the workspace was made.
  const int least = ceil_div(ceil_div(width, kPanel), kMaxSplits), wanted = tuned(device_arch()).swiglu_steps;
  return wanted > least ? wanted : least;
}

}  // namespace plora
