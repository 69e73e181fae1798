#include "grad_hidden.cuh"
#include "grad_hidden_cluster.cuh"

namespace plora {

namespace {

// As many as give each multiprocessor two blocks. On an H100 twice that made the whole half as slow again:
// each cluster must wait for its additions to grad F before its blocks may add up grad_hidden.
int clusters_per_run(const GradHiddenArgs& args) {
  const int most = ceil_div(ceil_div(args.width, kPanel), kCluster);
  const int wanted =
      args.clusters_per_run > 0 ? args.clusters_per_run : 2 * multiprocessors() / (kCluster * args.schedule.count);
  return wanted < 1 ? 1 : wanted > most ? most : wanted;
}

}  // namespace

int grad_hidden(const GradHiddenArgs& args, bool clusters, void* stream) {
  if (args.schedule.count == 0) return cudaSuccess;
  const bool vector = args.width % 8 == 0 && on_16_bytes(args.dy) && on_16_bytes(args.factors);
  if (clusters) {
    return launch(vector ? grad_hidden_cluster_kernel<true> : grad_hidden_cluster_kernel<false>, args,
                  dim3(kCluster * clusters_per_run(args), args.schedule.count), kGradThreads, &Tuned::grad_hidden,
                  stream, kCluster);
  }
  const dim3 grid(ceil_div(args.width, kGradColumns), args.schedule.count);
  return launch(vector ? grad_hidden_kernel<true> : grad_hidden_kernel<false>, args, grid, kGradThreads,
                &Tuned::grad_hidden, stream);
}

// Code for older architectures runs on newer devices too, but has none.
bool has_clusters() {
  int arch;
  return device_arch() >= 900 && compiled_for(grad_hidden_cluster_kernel<true>, &arch) == cudaSuccess && arch >= 900;
}

}  // namespace plora
