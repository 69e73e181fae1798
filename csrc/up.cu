#include <algorithm>

#include "up.cuh"

namespace plora {

int up(const Each<UpArgs>& linears, void* stream) {
  dim3 grid(0, linears.of[0].schedule.count, linears.count);
  bool vector = true;
  for (int i = 0; i < linears.count; ++i) {
    const UpArgs& args = linears.of[i];
    grid.x = std::max<unsigned>(grid.x, args.splits);
    vector &= args.width % 8 == 0 && on_16_bytes(args.y) && on_16_bytes(args.residual) && on_16_bytes(args.factors) &&
              on_16_bytes(args.out);
  }
  const auto kernel = linears.of[0].residual ? (vector ? up_kernel<true, true> : up_kernel<false, true>)
                                             : (vector ? up_kernel<true, false> : up_kernel<false, false>);
  return launch(kernel, linears, grid, kUpThreads, &Tuned::up, stream);
}

int up_slots(int64_t width, int64_t widths, int count) {
  const Tuned row = tuned(device_arch());
  const int64_t fitting = row.blocks * multiprocessors() * width / std::max<int64_t>(widths, 1);
  const int64_t walks = ceil_div(static_cast<int64_t>(ceil_div(width, kPanel)) * count, row.up_steps);
  return static_cast<int>(std::max(fitting, walks));
}

}  // namespace plora
