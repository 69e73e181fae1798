// What the kernels share: swizzled tiles in shared memory, matrix fragments, dropout, launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/mma_sm80.hpp>

#include "args.h"
#include "tuned.h"

namespace plora {

using bf16 = __nv_bfloat16;

#ifdef __CUDA_ARCH__
constexpr int kArch = __CUDA_ARCH__;
#else
constexpr int kArch = 0;
#endif

constexpr int kPanel = 64;  // columns of a panel: a row of it is 128 bytes, all banks once
constexpr int kPanelElems = kTileRows * kPanel;

__host__ __device__ constexpr int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Calls f with the rank class whose tile a piece of `ranks` ranks is computed at, as a compile-time constant.
template <int kMost, class F>
__device__ void with_rank_class(int ranks, F&& f) {
  if (ranks <= 16) return f(cute::Int<16>{});
  if (kMost == 32 || ranks <= 32) return f(cute::Int<32>{});
  if constexpr (kMost > 32) {
    if (kMost == 64 || ranks <= 64) return f(cute::Int<64>{});
    f(cute::Int<kMost>{});
  }
}

__device__ inline Piece read_piece(const Piece* pieces, int i) {
  Piece piece;
  const int4* from = reinterpret_cast<const int4*>(pieces + i);
  int4* to = reinterpret_cast<int4*>(&piece);
#pragma unroll
  for (int part = 0; part < 4; ++part) to[part] = __ldg(from + part);
  return piece;
}

// ---- Tiles. A tile of W columns is panels of min(W, 64) columns, each row-major and XOR-swizzled in
// chunks of 8 elements, so that ldmatrix and 16-byte accesses meet every bank once.

template <int kWidth>
__device__ inline int swizzled(int row, int column) {
  constexpr int kBits = kWidth == 64 ? 3 : kWidth == 32 ? 2 : 1;
  static_assert(kWidth == 64 || kWidth == 32 || kWidth == 16, "panel width");
  return row * kWidth + (column ^ (((row >> (3 - kBits)) & ((1 << kBits) - 1)) << 3));
}

// Element of a tile of kRows rows, wider than one panel where kWidth > 64.
template <int kRows, int kWidth>
__device__ inline int in_tile(int row, int column) {
  if constexpr (kWidth <= kPanel) {
    return swizzled<kWidth>(row, column);
  } else {
    return column / kPanel * kRows * kPanel + swizzled<kPanel>(row, column % kPanel);
  }
}

// The same at (row + lane_row, column + lane_column) where only the latter two depend on the lane, row is a multiple
// of 8, column one of 16 and lane_column below 16: only the lane's part is swizzled, once for all rows and columns.
template <int kRows, int kWidth>
__device__ inline int in_tile(int row, int column, int lane_row, int lane_column) {
  constexpr int kPanelWidth = kWidth < kPanel ? kWidth : kPanel;
  return column / kPanelWidth * kRows * kPanelWidth + row * kPanelWidth +
         (swizzled<kPanelWidth>(lane_row, lane_column) ^ column % kPanelWidth);
}

// Copies kRows x kWidth elements; what lies beyond `rows` or `columns` becomes zero and is not read.
// kVector: source rows are 16-byte aligned and `columns` a multiple of 8, or what follows is zero.
template <int kRows, int kWidth, int kThreads, bool kVector>
__device__ inline void load_tile(bf16* tile, const bf16* source, int64_t stride, int rows, int64_t columns) {
  constexpr int kChunks = kWidth / 8, kStep = kThreads / kChunks;  // rows at a time
  static_assert(kThreads % kChunks == 0 && kStep % 8 == 0, "rows of a step must be swizzled as those of the next");
  const int row = threadIdx.x / kChunks, column = threadIdx.x % kChunks * 8;
  bf16* to = tile + in_tile<kRows, kWidth>(row, column);
  const bf16* from = source + row * stride + column;
  rows = column < columns ? rows : 0;
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
    if (kRows % kStep != 0 && i + row >= kRows) break;
    const bool inside = i + row < rows;
    bf16* at = to + i * (kWidth < kPanel ? kWidth : kPanel);
    if constexpr (kVector) {
      cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
          *reinterpret_cast<const cute::uint128_t*>(from + i * stride), *reinterpret_cast<cute::uint128_t*>(at),
          inside);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        at[e] = inside && column + e < columns ? from[i * stride + e] : __float2bfloat16(0.f);
      }
    }
  }
}

// ---- Fragments of m16n8k16. `lane` is the thread's index in its warp; rows, columns and k are multiples of 16.

struct Fragment {
  uint32_t r[4];
};

__device__ inline Fragment load_fragment(const bf16* at) {
  Fragment f;
  cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(at), f.r[0], f.r[1], f.r[2], f.r[3]);
  return f;
}

__device__ inline Fragment load_fragment_transposed(const bf16* at) {
  Fragment f;
  cute::SM75_U16x8_LDSM_T::copy(*reinterpret_cast<const cute::uint128_t*>(at), f.r[0], f.r[1], f.r[2], f.r[3]);
  return f;
}

__device__ inline void multiply_add(float (&c)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
  cute::SM80_16x8x16_F32BF16BF16F32_TN::fma(c[0], c[1], c[2], c[3], a.r[0], a.r[1], a.r[2], a.r[3], b0, b1, c[0], c[1],
                                            c[2], c[3]);
}

// Left operand [16 rows, 16 k] of a tile whose columns are k.
template <int kRows, int kWidth>
__device__ inline Fragment left_fragment(const bf16* tile, int row, int k, int lane) {
  return load_fragment(tile + in_tile<kRows, kWidth>(row, k, lane % 16, lane / 16 * 8));
}

// Right operand [16 k, 16 columns] of a tile whose rows are the columns and whose columns are k:
// r[0], r[1] for columns 0 to 7, r[2], r[3] for 8 to 15.
template <int kRows, int kWidth>
__device__ inline Fragment right_fragment(const bf16* tile, int column, int k, int lane) {
  return load_fragment(tile + in_tile<kRows, kWidth>(column, k, lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8));
}

// The same where the tile's rows are k.
template <int kRows, int kWidth>
__device__ inline Fragment right_fragment_of_rows(const bf16* tile, int k, int column, int lane) {
  return load_fragment_transposed(tile + in_tile<kRows, kWidth>(k, column, lane % 16, lane / 16 * 8));
}

// Left operand [16 rows, 16 k] where the tile's rows are k and its columns the operand's rows.
template <int kRows, int kWidth>
__device__ inline Fragment left_fragment_of_rows(const bf16* tile, int k, int row, int lane) {
  return load_fragment_transposed(tile + in_tile<kRows, kWidth>(k, row, lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8));
}

// Writes back what left_fragment reads: the sums of 16 rows and 16 columns, two neighbours in each word.
template <int kRows, int kWidth>
__device__ inline void store_fragment(bf16* tile, int row, int column, int lane, const Fragment& f) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cute::SM90_U32x4_STSM_N::copy(
      f.r[0], f.r[1], f.r[2], f.r[3],
      *reinterpret_cast<cute::uint128_t*>(tile + in_tile<kRows, kWidth>(row, column, lane % 16, lane / 16 * 8)));
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = in_tile<kRows, kWidth>(row + i % 2 * 8, column, lane / 4, i / 2 * 8 + lane % 4 * 2);
    *reinterpret_cast<uint32_t*>(tile + at) = f.r[i];
  }
#endif
}

__device__ inline uint32_t pack(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ inline float2 unpack(uint32_t both) {
  return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
}

// ---- Dropout: plora/kernels/dropout.py, bit for bit.

struct Dropout {
  uint32_t first, second, limit, pairs;
  float keep_scale;

  __device__ Dropout(const Piece& piece, const int64_t* input_key, int64_t width)
      : limit(piece.limit), pairs(static_cast<uint32_t>((width + 1) / 2)), keep_scale(1.f) {
    if (limit == 0) return;
    const uint64_t slot_key = static_cast<uint64_t>(piece.key_high) << 32 | piece.key_low;
    const uint64_t key = mix(mix(0, slot_key), static_cast<uint64_t>(__ldg(input_key)));
    first = static_cast<uint32_t>(key);
    second = static_cast<uint32_t>(key >> 32);
    keep_scale = 65536.f / (65536.f - static_cast<float>(limit));
  }

  // Two draws, for features 2 * pair (low half) and 2 * pair + 1, of the token whose first draw is `base`.
  __device__ uint32_t draw(uint32_t base, uint32_t pair) const {
    uint32_t bits = ((base + pair) ^ first) * 0x9E3779B1u;
    bits = (bits ^ bits >> 16) * 0x85EBCA6Bu + second;
    bits = (bits ^ bits >> 13) * 0xC2B2AE35u;
    return bits ^ bits >> 16;
  }

  __device__ bool keeps_low(uint32_t drawn) const { return (drawn & 0xffffu) >= limit; }
  __device__ bool keeps_high(uint32_t drawn) const { return (drawn >> 16) >= limit; }

  // Zeroes the dropped ones of two bf16.
  __device__ uint32_t apply(uint32_t both, uint32_t drawn) const {
    return both & ((keeps_low(drawn) ? 0xffffu : 0u) | (keeps_high(drawn) ? 0xffff0000u : 0u));
  }

 private:
  __device__ static uint64_t mix(uint64_t state, uint64_t part) {
    state += 0x9E3779B97F4A7C15ull + part;
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9ull;
    state = (state ^ state >> 27) * 0x94D049BB133111EBull;
    return state ^ state >> 31;
  }
};

// ---- Sums in global memory.

__device__ inline void add_to(float* to, float4 v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
#else
  atomicAdd(to, v.x), atomicAdd(to + 1, v.y), atomicAdd(to + 2, v.z), atomicAdd(to + 3, v.w);
#endif
}

// Adds two neighbours, the second only if it exists. `aligned`: `to` is on 8 bytes.
__device__ inline void add_to(float* to, float low, float high, bool second, bool aligned) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (aligned && second) {
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(low), "f"(high) : "memory");
    return;
  }
#endif
  atomicAdd(to, low);
  if (second) atomicAdd(to + 1, high);
}

// Writes two neighbours, likewise.
__device__ inline void write_to(float* to, float low, float high, bool second, bool aligned) {
  if (aligned && second) {
    __stcs(reinterpret_cast<float2*>(to), make_float2(low, high));
    return;
  }
  *to = low;
  if (second) to[1] = high;
}

// Whether this block is the last of `blocks` to come here; what the others wrote before is then
// visible. Resets the counter.
__device__ inline bool arrives_last(int32_t* counter, int blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1) == blocks - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// ---- Launching.

// Every kernel calls this in all of its blocks, once it has looked up its work and before it touches anything that an
// earlier kernel may write or read. From sm_90 on a kernel starts while the last blocks of the one before it still run,
// which hides what a launch and those look-ups take; the tables that say what to do are older than both kernels. A
// block without work calls it too, or the kernel could be over before the one that it follows.
__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// What a kernel's code was compiled for, times 100 as __CUDA_ARCH__ is: its tiles and stages were chosen by that, and
// the device may be newer.
template <class Args>
cudaError_t compiled_for(void (*kernel)(Args), int* arch) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  *arch = error == cudaSuccess ? attributes.ptxVersion * 10 : 0;
  return error;
}

// `cluster`: blocks of one, along x.
template <class Args>
int launch(void (*kernel)(Args), const Args& args, dim3 grid, int threads, int Tuned::* kib, void* stream,
           int cluster = 1) {
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;
  int arch;
  cudaError_t error = compiled_for(kernel, &arch);
  if (error != cudaSuccess) return error;
  const int bytes = tuned(arch).*kib * 1024;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  if (cluster > 1) {
    // Not ahead of time too: clusters that start one by one as room appears are spread unevenly, which made grad_hidden
    // 239 us instead of 206 at width 18944.
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = arch < 900 ? 0 : 1;
  error = cudaLaunchKernelEx(&config, kernel, args);
  if (error != cudaSuccess) cudaGetLastError();  // or whoever asks next would be told of it again
  return error;
}

// Compute capability of the current device * 100.
inline int device_arch() {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major * 100 + minor * 10;
}

inline int multiprocessors() {
  int device = 0, n = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device);
  return n;
}

inline bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace plora
