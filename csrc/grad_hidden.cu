#include <algorithm>

#include "grad_hidden.cuh"
#include "grad_hidden_cluster.cuh"

namespace plora {

namespace {

// As many as give each multiprocessor two blocks, of linears that share it by their widths, if a block then walks three
// panels or more. On an H100 twice as many made the whole half as slow again: each cluster must wait for its additions
// to grad F before its blocks may add up grad_hidden.
int clusters_of(const GradHiddenArgs& args, int64_t widths) {
  constexpr int kLeastSteps = 3;
  const int panels = ceil_div(args.width, kPanel);
  const int most = args.clusters > 0 ? ceil_div(panels, kCluster) : panels / (kLeastSteps * kCluster);
  const int64_t fitting =
      2 * multiprocessors() * args.width / (std::max<int64_t>(widths, 1) * kCluster * args.schedule.count);
  const int64_t wanted = args.clusters > 0 ? args.clusters : fitting;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, most)));
}

}  // namespace

int grad_hidden(Each<GradHiddenArgs> linears, bool clusters, void* stream) {
  dim3 grid(0, linears.of[0].schedule.count, linears.count);
  if (grid.y == 0) return cudaSuccess;
  int64_t widths = 0;
  for (int i = 0; i < linears.count; ++i) widths += linears.of[i].width;
  bool vector = true;
  for (int i = 0; i < linears.count; ++i) {
    GradHiddenArgs& args = linears.of[i];
    args.clusters = clusters_of(args, widths);
    const int blocks = clusters ? kCluster * args.clusters : ceil_div(args.width, kGradColumns);
    grid.x = std::max<unsigned>(grid.x, blocks);
    vector &= args.width % 8 == 0 && on_16_bytes(args.dy) && on_16_bytes(args.factors);
  }
  if (clusters) {
    return launch(vector ? grad_hidden_cluster_kernel<true> : grad_hidden_cluster_kernel<false>, linears, grid,
                  kGradThreads, &Tuned::grad_hidden, stream, kCluster);
  }
  return launch(vector ? grad_hidden_kernel<true> : grad_hidden_kernel<false>, linears, grid, kGradThreads,
                &Tuned::grad_hidden, stream);
}

// Code for older architectures runs on newer devices too, but has none.
bool has_clusters() {
  int arch;
  return device_arch() >= 900 && compiled_for(grad_hidden_cluster_kernel<true>, &arch) == cudaSuccess && arch >= 900;
}

}  // namespace plora
