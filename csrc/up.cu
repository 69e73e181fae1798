#include "up.cuh"

namespace plora {

int up(const UpArgs& args, void* stream) {
  const dim3 grid(ceil_div(ceil_div(args.width, kPanel), args.steps), args.schedule.count);
  const bool vector = args.width % 8 == 0 && on_16_bytes(args.y) && on_16_bytes(args.factors) && on_16_bytes(args.out);
  const int second_hidden = args.max_rank > kTileRanks ? kHiddenElems * 2 : 0;
  return launch(vector ? up_kernel<true> : up_kernel<false>, args, grid, kUpThreads, &Tuned::up, second_hidden, stream);
}

int up_steps(int64_t) { return tuned(device_arch()).up_steps; }

}  // namespace plora
