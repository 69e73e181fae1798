#include "adamw.cuh"

namespace plora {

int adamw(const AdamWArgs& args, void* stream) {
  if (args.chunks == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  adamw_squares<<<args.chunks, kAdamWThreads, 0, on>>>(args);
  adamw_scaling<<<args.count, 1024, 0, on>>>(args);
  const auto update = args.codebook == nullptr ? adamw_update<false> : adamw_update<true>;
  update<<<args.chunks, kAdamWThreads, 0, on>>>(args, DynamicMaps{DynamicMap<true>::make(), DynamicMap<false>::make()});
  return cudaGetLastError();
}

}  // namespace plora
