// Launches the sampler: chooses how many blocks share a row.
#include "cuda/guided_sample.cuh"

namespace steer {

namespace {

constexpr int kMinClusterSize = 4, kMaxClusterSize = 16;
// Tokens per thread of one block, if it held a row by itself.
constexpr int kRowItems = kMaxVocabSizeInRegisters / kMaxThreads;

struct Config {
  cudaLaunchConfig_t launch{};
  cudaLaunchAttribute cluster{};

  Config(int64_t num_seqs, int cluster_size, int64_t stream) {
    const int blocks_per_row = cluster_size > 0 ? cluster_size : 1;
    launch.gridDim = dim3(static_cast<unsigned>(num_seqs * blocks_per_row));
    launch.blockDim = dim3(kMaxThreads);
    launch.stream = reinterpret_cast<cudaStream_t>(stream);
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(blocks_per_row), 1, 1};
    launch.attrs = &cluster;
    launch.numAttrs = cluster_size > 0 ? 1 : 0;
  }
};

using Kernel = void (*)(GuidedSampleLaunch);

// The wider the cluster, the fewer tokens per thread: 65536 a row in each. (With 2 blocks of 64
// tokens per thread, or of 1024 threads with 32, ptxas spills.)
Kernel kernel_for(int cluster_size) {
  switch (cluster_size) {
    case 16:
      return sample_in_cluster<kRowItems / 16>;
    case 8:
      return sample_in_cluster<kRowItems / 8>;
    case 4:
      return sample_in_cluster<kRowItems / 4>;
    default:
      return sample_in_block;
  }
}

// Above 8 blocks a cluster is not portable: a GPU may not offer it.
cudaError_t allow_wide_cluster(int cluster_size) {
  if (cluster_size <= 8) return cudaSuccess;
  return cudaFuncSetAttribute(kernel_for(cluster_size),
                              cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

bool fits_on_device(int64_t num_seqs, int cluster_size) {
  Config config(num_seqs, cluster_size, 0);
  int num_clusters = 0;
  const bool fits = allow_wide_cluster(cluster_size) == cudaSuccess &&
                    cudaOccupancyMaxActiveClusters(&num_clusters, kernel_for(cluster_size),
                                                   &config.launch) == cudaSuccess &&
                    num_clusters > 0;
  if (!fits) cudaGetLastError();  // it is an answer, not an error of the next launch
  return fits;
}

}  // namespace

int choose_cluster_size(int64_t num_seqs, int64_t vocab_size) {
  int device = 0, capability = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, device) !=
          cudaSuccess ||
      capability < 9 || vocab_size > kMaxVocabSizeInRegisters) {
    return 0;
  }
  // Compiled for older targets only, the cluster's kernel is empty.
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, kernel_for(kMinClusterSize)) != cudaSuccess ||
      attributes.binaryVersion < 90) {
    return 0;
  }
  // Of 132 processors: as many as a few rows can use, and 33 rows in one wave when there are more.
  int cluster_size = num_seqs <= 8 ? kMaxClusterSize : num_seqs <= 16 ? 8 : kMinClusterSize;
  while (cluster_size >= kMinClusterSize && !fits_on_device(num_seqs, cluster_size)) {
    cluster_size /= 2;
  }
  return cluster_size >= kMinClusterSize ? cluster_size : 0;
}

const char* launch_guided_sample(const GuidedSampleLaunch& launch, int cluster_size,
                                 int64_t stream) {
  if (launch.args.num_seqs == 0) return nullptr;
  Config config(launch.args.num_seqs, cluster_size, stream);
  cudaError_t error = allow_wide_cluster(cluster_size);
  if (error == cudaSuccess) {
    error = cudaLaunchKernelEx(&config.launch, kernel_for(cluster_size), launch);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace steer
