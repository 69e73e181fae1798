#include "swiglu.cuh"

namespace plora {

int swiglu(const SwigluArgs& args, void* stream) {
  const dim3 grid(ceil_div(ceil_div(args.width, kPanel), args.steps), args.count);
  const bool vector = args.width % 8 == 0 && on_16_bytes(args.in[0]) && on_16_bytes(args.in[1]) &&
                      on_16_bytes(args.factors) && on_16_bytes(args.act);
  return launch(vector ? swiglu_kernel<true> : swiglu_kernel<false>, args, grid, kSwigluThreads, &Tuned::swiglu,
                stream);
}

int swiglu_steps(int64_t width, int count) {
  // Not more blocks to a tile than kMaxSplits, for which the workspace was made; and not so few in all that some
  // multiprocessors have one more to do than others.
  const int panels = ceil_div(width, kPanel), least = ceil_div(panels, kMaxSplits);
  const int most = tuned(device_arch()).swiglu_steps, even = panels * count / (8 * multiprocessors());
  const int wanted = even < most ? even : most;
  return wanted > least ? wanted : least;
}

}  // namespace plora
