// What the bindings check of their arguments; every error names the bad one.
#pragma once

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>

#include <stdexcept>
#include <string>

#include "args.h"

namespace plora::binding {

using at::Tensor;

inline std::string text(const char* s) { return s; }
inline std::string text(const std::string& s) { return s; }
inline std::string text(int64_t n) { return std::to_string(n); }
inline std::string text(at::ScalarType dtype) { return c10::toString(dtype); }
inline std::string text(const at::Device& device) { return device.str(); }
inline std::string text(at::IntArrayRef sizes) {
  std::string s = "[";
  for (size_t i = 0; i < sizes.size(); ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}

// Not TORCH_CHECK, whose message ends in a C++ stack trace, and not through streams, which fail in a
// process that holds two copies of the C++ library.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw std::runtime_error((text(parts) + ...));
}

inline void check_kind(const Tensor& tensor, const char* name, at::ScalarType dtype, int64_t dimensions,
                       const Tensor& beside) {
  require(tensor.is_cuda(), name, " must be on a CUDA device, got ", tensor.device());
  require(tensor.device() == beside.device(), name, " is on ", tensor.device(), " but other arguments are on ",
          beside.device());
  require(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
  require(tensor.dim() == dimensions, name, " must have ", dimensions, " dimensions, got shape ", tensor.sizes());
}

inline void check(const Tensor& tensor, const char* name, at::ScalarType dtype, int64_t dimensions,
                  const Tensor& beside) {
  check_kind(tensor, name, dtype, dimensions, beside);
  require(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
}

inline void check_rows(const Tensor& tensor, const char* name, int64_t rows) {
  require(tensor.size(0) == rows, name, " must have ", rows, " rows, got shape ", tensor.sizes());
}

// Hidden matrices may be some columns of wider ones.
inline void check_hidden(const Tensor& hidden, const char* name, int64_t rows, const Tensor& beside) {
  check_kind(hidden, name, at::kBFloat16, 2, beside);
  check_rows(hidden, name, rows);
  require(hidden.size(1) % 16 == 0, name, " must have a multiple of 16 columns, got shape ", hidden.sizes());
  require(hidden.stride(1) == 1 && hidden.stride(0) % 8 == 0, name,
          " must have neighbouring columns and rows a multiple of 8 elements apart, got strides ", hidden.strides());
  require(reinterpret_cast<uintptr_t>(hidden.const_data_ptr()) % 16 == 0, name, " must begin on 16 bytes");
}

// `offsets` [2 K + 1] of one linear, or [n, 2 K + 1] of a group whose hidden matrices lie side by side in the
// `columns` of one. `second`: the factor is B, whose beginnings are the second half of the offsets. The records
// are those from `first` on.
inline plora::Schedule schedule(const Tensor& pieces, int64_t count, const Tensor& offsets, bool second,
                                const Tensor& token_index, int64_t rows, const Tensor& beside, int64_t columns = 0,
                                int64_t first = 0) {
  check(pieces, "pieces", at::kInt, 2, beside);
  constexpr int64_t words = sizeof(plora::Piece) / 4;
  require(pieces.size(1) == words, "pieces must have ", words, " columns, got shape ", pieces.sizes());
  require(first >= 0 && count >= 0 && first + count <= pieces.size(0) && count < 65536, "first and count must be of ",
          pieces.size(0), " records, and count at most 65535, got ", first, " and ", count);
  check(offsets, "offsets", at::kLong, offsets.dim() == 2 ? 2 : 1, beside);
  const int64_t members = offsets.dim() == 2 ? offsets.size(0) : 1, each = offsets.size(-1);
  require(each % 2 == 1, "offsets must have 2 K + 1 columns, got shape ", offsets.sizes());
  require(1 <= members && members <= plora::kMostMembers, "offsets must have 1 to ", plora::kMostMembers,
          " rows, got shape ", offsets.sizes());
  require(columns % (16 * members) == 0 && columns / members <= plora::kMostRank, "hidden must have at most ",
          plora::kMostRank, " columns a member, a multiple of 16, got ", columns, " for ", members, " members");
  check(token_index, "token_index", at::kInt, 1, beside);
  check_rows(token_index, "token_index", rows);
  const int64_t slots = each / 2;
  const int64_t* begin = offsets.const_data_ptr<int64_t>();
  plora::Schedule made{};
  made.pieces = static_cast<const plora::Piece*>(pieces.const_data_ptr()) + first;
  made.count = static_cast<int>(count);
  made.begin = begin + (second ? slots : 0);
  made.input_key = begin + 2 * slots;
  made.token_index = token_index.const_data_ptr<int32_t>();
  made.members = static_cast<int>(members);
  made.begin_step = each;
  made.hidden_step = columns / members;
  return made;
}

// That there is one of `tensors` for each member of `offsets`, or for the sum of them.
template <class Tensors>
void check_linears(const Tensors& tensors, const char* name, const Tensor& offsets, bool summed = false) {
  const int64_t members = summed || offsets.dim() < 2 ? 1 : offsets.size(0), count = tensors.size();
  require(count > 0 && count == members, name, " must be ", members, " tensors by offsets of shape ", offsets.sizes(),
          ", got ", count);
}

// Makes a group's schedule one of its i-th member alone.
inline void pick(plora::Schedule& schedule, int64_t i) {
  schedule.begin += i * schedule.begin_step;
  schedule.members = 1;
}

// Where the i-th of `linears` equal parts of the columns of hidden begins.
inline void* own_columns(const Tensor& hidden, int64_t i, int64_t linears) {
  return static_cast<at::BFloat16*>(hidden.data_ptr()) + i * hidden.size(1) / linears;
}

inline void launched(int error, const char* kernel, int64_t rows, int64_t width, int64_t hidden, int64_t count) {
  require(error == 0, "the CUDA kernel ", kernel, " failed to launch: ", plora::error_string(error), " (rows ", rows,
          ", width ", width, ", hidden columns ", hidden, ", pieces ", count, ")");
}

inline void* stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

}  // namespace plora::binding
