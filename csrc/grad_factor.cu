#include "grad_factor.cuh"

namespace plora {

int grad_factor(const GradFactorArgs& args, void* stream) {
  const dim3 grid(ceil_div(args.width, kGradColumns), args.schedule.count);
  const bool vector = args.width % 8 == 0 && on_16_bytes(args.x);
  return launch(vector ? grad_factor_kernel<true> : grad_factor_kernel<false>, args, grid, kGradThreads,
                &Tuned::grad_factor, stream);
}

}  // namespace plora
