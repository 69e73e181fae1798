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

int in_clusters(const GradHiddenArgs& args, bool vector, void* stream) {
  const auto kernel = vector ? grad_hidden_cluster_kernel<true> : grad_hidden_cluster_kernel<false>;
  int arch;
  cudaError_t error = compiled_for(kernel, &arch);
  if (error != cudaSuccess) return error;
  const int bytes = tuned(arch).grad_hidden * 1024;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kCluster * clusters_per_run(args), args.schedule.count);
  config.blockDim = dim3(kGradThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace

int grad_hidden(const GradHiddenArgs& args, bool clusters, void* stream) {
  if (args.schedule.count == 0) return cudaSuccess;
  const bool vector = args.width % 8 == 0 && on_16_bytes(args.dy) && on_16_bytes(args.factors);
  if (clusters) return in_clusters(args, vector, stream);
  const dim3 grid(ceil_div(args.width, kGradColumns), args.schedule.count);
  return launch(vector ? grad_hidden_kernel<true> : grad_hidden_kernel<false>, args, grid, kGradThreads,
                &Tuned::grad_hidden, 0, stream);
}

// Code for older architectures runs on newer devices too, but has none.
bool has_clusters() {
  int arch;
  return device_arch() >= 900 && compiled_for(grad_hidden_cluster_kernel<true>, &arch) == cudaSuccess && arch >= 900;
}

}  // namespace plora
