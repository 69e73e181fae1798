#include "up.cuh"

namespace plora {

int up(const UpArgs& args, void* stream) {
  const dim3 grid(args.splits, args.schedule.count);
  const bool vector = args.width % 8 == 0 && on_16_bytes(args.y) && on_16_bytes(args.residual) &&
                      on_16_bytes(args.factors) && on_16_bytes(args.out);
  const auto kernel = args.residual ? (vector ? up_kernel<true, true> : up_kernel<false, true>)
                                    : (vector ? up_kernel<true, false> : up_kernel<false, false>);
  return launch(kernel, args, grid, kUpThreads, &Tuned::up, stream);
}

int up_slots(int64_t width, int count) {
  return ceil_div(static_cast<int64_t>(ceil_div(width, kPanel)) * count, tuned(device_arch()).up_steps);
}

}  // namespace plora
