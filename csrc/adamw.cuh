// AdamW over the ranges of many adapters. Every element is read once for the norm and once for the update, which
// also writes the bf16 shadow: 34 bytes an element, 22 with 8-bit moments.
//
// 8-bit moments are those of arXiv 2110.02861 as torchao and bitsandbytes have them: 256 elements share a scale, their
// largest magnitude, and a code stands for a value of the dynamic map. That has seven decades 10^(i-6), i = 0..6, of
// n_i = 2^i values (2^(i+1) unsigned) in the middle of equal parts of [0.1, 1] times the decade, and 0 and 1.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>

#include "adamw.h"

namespace plora {

constexpr int kAdamWThreads = 256;
constexpr int kAdamWWarps = kAdamWThreads / 32;

struct AdamWSpan {
  int record;
  int64_t begin, end;  // elements of the adapter
  int64_t block;       // of 256 elements, the first of the chunk
  bool is_b;
};

__host__ __device__ constexpr int64_t adamw_parts(int64_t numel, int64_t part) { return (numel + part - 1) / part; }

__device__ inline AdamWSpan adamw_span(const AdamWArgs& args, int chunk) {
  int low = 0, high = args.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (__ldg(&args.records[middle].first_chunk) <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const AdamWRecord& record = args.records[low];
  const int64_t a_numel = record.a_numel, a_chunks = adamw_parts(a_numel, kAdamWChunk);
  int64_t local = chunk - record.first_chunk;
  AdamWSpan span{low, 0, 0, 0, local >= a_chunks};
  if (span.is_b) local -= a_chunks;
  span.begin = local * kAdamWChunk + (span.is_b ? a_numel : 0);
  span.end = min(span.begin + kAdamWChunk, span.is_b ? record.numel : a_numel);
  span.block = local * (kAdamWChunk / kAdamWBlock) + (span.is_b ? adamw_parts(a_numel, kAdamWBlock) : 0);
  return span;
}

// The same sum for every thread of a block, added up in a fixed order.
template <class Sum, int kWarps>
__device__ Sum block_sum(Sum sum) {
  __shared__ Sum sums[kWarps];
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp];
  return sum;
}

__global__ void __launch_bounds__(kAdamWThreads) adamw_squares(const AdamWArgs args) {
  const AdamWSpan span = adamw_span(args, blockIdx.x);
  const float* grad = args.grad + args.records[span.record].start;
  constexpr int kLoads = kAdamWChunk / kAdamWThreads / 4;
  float4 g[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t at = span.begin + (i * kAdamWThreads + threadIdx.x) * 4;
    g[i] = at < span.end ? __ldcs(reinterpret_cast<const float4*>(grad + at)) : float4{};
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) sum += g[i].x * g[i].x + g[i].y * g[i].y + (g[i].z * g[i].z + g[i].w * g[i].w);
  sum = block_sum<float, kAdamWWarps>(sum);
  if (threadIdx.x == 0) args.partials[blockIdx.x] = sum;
}

// One block a record.
__global__ void __launch_bounds__(1024) adamw_scaling(const AdamWArgs args) {
  const AdamWRecord& record = args.records[blockIdx.x];
  const int end = blockIdx.x + 1 < args.count ? args.records[blockIdx.x + 1].first_chunk : args.chunks;
  double sum = 0;
  for (int chunk = record.first_chunk + threadIdx.x; chunk < end; chunk += 1024) sum += args.partials[chunk];
  sum = block_sum<double, 32>(sum);
  if (threadIdx.x != 0) return;
  const float norm = static_cast<float>(sqrt(sum));
  const bool is_skipped = !isfinite(norm) || !isfinite(args.losses[record.slot]);
  const float step = args.steps[record.slot] + (is_skipped ? 0.f : 1.f);
  AdamWScale scale{};
  scale.clip = fminf(1.f, record.max_norm / (norm + 1e-6f));
  scale.first = static_cast<float>(1 / (1 - pow(record.beta1, static_cast<double>(step))));
  scale.second = static_cast<float>(1 / sqrt(1 - pow(record.beta2, static_cast<double>(step))));
  scale.is_skipped = is_skipped;
  args.scaling[blockIdx.x] = scale;
  args.steps[record.slot] = step;
  args.norms[record.slot] = norm;
  args.skipped[record.slot] = is_skipped ? 1.f : 0.f;
}

// ---- The dynamic map's codes, found by arithmetic: a search of the map would keep shared memory busy for longer than
// the whole update takes.

struct Decade {
  float slope, offset, low, high;  // code = floor(clamp(slope x + offset, low, high))
};

template <bool kSigned>
struct DynamicMap {
  Decade decades[9];  // 0 is of 0, i + 1 of decade i, 8 of 1

  __host__ __device__ static constexpr double size(int i) { return (1 << i) * (kSigned ? 1 : 2); }
  __host__ __device__ static constexpr double power(int i) { return i == 0 ? 1e-6 : 10 * power(i - 1); }
  // Where values begin to be nearer to decade i (7: to 1) than to the one before it (i = 0: to 0).
  __host__ __device__ static constexpr float threshold(int i) {
    const double first = i == 7 ? 1.0 : power(i) * (0.1 + 0.45 / size(i));
    const double before = i == 0 ? 0.0 : power(i - 1) * (1 - 0.45 / size(i - 1));
    return static_cast<float>((first + before) / 2);
  }

  static DynamicMap make() {
    DynamicMap map{};
    for (int i = 0; i < 7; ++i) {
      const double n = size(i), begin = n - (kSigned ? 0 : 1);
      map.decades[i + 1] = {static_cast<float>(n / 0.9 / power(i)), static_cast<float>(begin - n / 9),
                            static_cast<float>(begin), static_cast<float>(begin + n - 0.5)};
    }
    const float top = kSigned ? 128 : 255;
    map.decades[8] = {0, 0, top, top};
    return map;
  }

  // The nearest code of a magnitude in [0, 1], counted from that of 0.
  __device__ int code(float x) const {
    constexpr float kThresholds[8] = {threshold(0), threshold(1), threshold(2), threshold(3),
                                      threshold(4), threshold(5), threshold(6), threshold(7)};
    int entry = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) entry += x >= kThresholds[i];
    const Decade decade = decades[entry];
    const float at = fminf(fmaxf(fmaf(decade.slope, x, decade.offset), decade.low), decade.high);
    // Rounded down by an addition: conversions run at an eighth of the rate.
    return static_cast<int>(__float_as_uint(__fadd_rd(at, 8388608.f)) - 0x4b000000u);
  }
};

struct DynamicMaps {
  DynamicMap<true> of_signed;
  DynamicMap<false> of_unsigned;
};

// -1 has no code of its own.
__device__ inline uint32_t signed_code(float x, const DynamicMap<true>& map) {
  const int code = map.code(fabsf(x));
  return static_cast<uint32_t>(max(x < 0 ? 127 - code : 127 + code, 0));
}

struct CodeTables {
  float values[2][kAdamWBlock];
  DynamicMaps maps;
};

// The largest of a warp's magnitudes: fp32 above zero are ordered as their bits.
__device__ inline float warp_largest(float x) {
  return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(x)));
}

struct AdamWSettings {
  float clip, step, second, eps, decay, beta1, rest1, beta2, rest2;

  __device__ AdamWSettings(const AdamWRecord& record, const AdamWScale& scale, float lr)
      : clip(scale.clip),
        step(lr * scale.first),
        second(scale.second),
        eps(record.eps),
        decay(lr * record.weight_decay),
        beta1(static_cast<float>(record.beta1)),
        rest1(static_cast<float>(1 - record.beta1)),
        beta2(static_cast<float>(record.beta2)),
        rest2(static_cast<float>(1 - record.beta2)) {}

  // This and the division are within two units in the last place; exact ones take registers for their rare cases.
  __device__ static float root(float x) {
    float y;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }

  __device__ void update(float& w, float g, float& m, float& v) const {
    g *= clip;
    m = fmaf(beta1, m, rest1 * g);
    v = fmaf(beta2, v, rest2 * g * g);
    w = fmaf(-decay, w, w);
    w -= __fdividef(step * m, fmaf(root(v), second, eps));
  }
};

// Blocks an SM: of the 8-bit form, which computes more between its loads, four take 2% longer.
template <bool kCodes>
__global__ void __launch_bounds__(kAdamWThreads, kCodes ? 5 : 3)
    adamw_update(const AdamWArgs args, const __grid_constant__ DynamicMaps maps) {
  __shared__ CodeTables tables;
  const AdamWSpan span = adamw_span(args, blockIdx.x);
  const AdamWRecord& record = args.records[span.record];
  const AdamWScale scale = args.scaling[span.record];
  if (scale.is_skipped) return;
  if constexpr (kCodes) {
    for (int i = threadIdx.x; i < 2 * kAdamWBlock; i += kAdamWThreads) tables.values[0][i] = args.codebook[i];
    constexpr int kWords = sizeof(DynamicMaps) / 4;
    static_assert(kWords <= kAdamWThreads, "a word a thread");
    if (threadIdx.x < kWords) {
      reinterpret_cast<uint32_t*>(&tables.maps)[threadIdx.x] = reinterpret_cast<const uint32_t*>(&maps)[threadIdx.x];
    }
    __syncthreads();
  }
  const AdamWSettings settings(record, scale, span.is_b ? record.lr_b : record.lr_a);
  const float* grad = args.grad + record.start;
  float* weight = args.weight + record.start;
  __nv_bfloat16* shadow = args.shadow ? static_cast<__nv_bfloat16*>(args.shadow) + record.start : nullptr;
  const int64_t blocks =
      adamw_parts(record.a_numel, kAdamWBlock) + adamw_parts(record.numel - record.a_numel, kAdamWBlock);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // A warp takes the 256 elements of a scale at a time, a thread four and, 128 further, four.
  for (int block = warp; span.begin + block * kAdamWBlock < span.end; block += kAdamWWarps) {
    const int64_t first = span.begin + block * kAdamWBlock + lane * 4;
    alignas(16) float w[8], g[8], m[8], v[8];
    uint32_t m_codes[2], v_codes[2];
    bool inside[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = first + half * 128;
      inside[half] = at < span.end;
      const auto load = [&](float* to, const float* from) {
        *reinterpret_cast<float4*>(to + 4 * half) =
            inside[half] ? __ldcs(reinterpret_cast<const float4*>(from + at)) : float4{};
      };
      load(w, weight);
      load(g, grad);
      if constexpr (kCodes) {
        const auto codes = [&](const void* from) {
          return inside[half] ? __ldcs(reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(from) + at)) : 0u;
        };
        m_codes[half] = codes(record.exp_avg);
        v_codes[half] = codes(record.exp_avg_sq);
      } else {
        load(m, static_cast<const float*>(record.exp_avg));
        load(v, static_cast<const float*>(record.exp_avg_sq));
      }
    }
    float* scales = nullptr;
    if constexpr (kCodes) {
      scales = record.scales + span.block + block;
      const float m_scale = scales[0], v_scale = scales[blocks];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        m[i] = m_scale * tables.values[0][m_codes[i / 4] >> i % 4 * 8 & 0xffu];
        v[i] = v_scale * tables.values[1][v_codes[i / 4] >> i % 4 * 8 & 0xffu];
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) settings.update(w[i], g[i], m[i], v[i]);
    if constexpr (kCodes) {
      float m_most = 0, v_most = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (!inside[i / 4]) continue;
        m_most = fmaxf(m_most, fabsf(m[i]));
        v_most = fmaxf(v_most, v[i]);
      }
      m_most = fmaxf(warp_largest(m_most), 1e-12f);
      v_most = fmaxf(warp_largest(v_most), 1e-12f);
      if (lane == 0) {
        scales[0] = m_most;
        scales[blocks] = v_most;
      }
      const float m_inverse = 1 / m_most, v_inverse = 1 / v_most;
      m_codes[0] = m_codes[1] = v_codes[0] = v_codes[1] = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        m_codes[i / 4] |= signed_code(m[i] * m_inverse, tables.maps.of_signed) << i % 4 * 8;
        v_codes[i / 4] |= static_cast<uint32_t>(tables.maps.of_unsigned.code(v[i] * v_inverse)) << i % 4 * 8;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!inside[half]) continue;
      const int64_t at = first + half * 128;
      const auto store = [&](float* to, const float* from) {
        __stcs(reinterpret_cast<float4*>(to + at), *reinterpret_cast<const float4*>(from + 4 * half));
      };
      store(weight, w);
      if (shadow != nullptr) {
        const __nv_bfloat162 low = __floats2bfloat162_rn(w[4 * half], w[4 * half + 1]);
        const __nv_bfloat162 high = __floats2bfloat162_rn(w[4 * half + 2], w[4 * half + 3]);
        const uint2 both{*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high)};
        __stcs(reinterpret_cast<uint2*>(shadow + at), both);
      }
      if constexpr (kCodes) {
        __stcs(reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(record.exp_avg) + at), m_codes[half]);
        __stcs(reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(record.exp_avg_sq) + at), v_codes[half]);
      } else {
        store(static_cast<float*>(record.exp_avg), m);
        store(static_cast<float*>(record.exp_avg_sq), v);
      }
    }
  }
}

}  // namespace plora
