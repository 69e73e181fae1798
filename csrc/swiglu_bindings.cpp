// The seam between torch and the kernels that ride on SwiGLU, as bindings.cpp.

#include "checks.h"
#include "swiglu_args.h"

namespace {

using namespace plora::binding;

void check_activation(const Tensor& tensor, const char* name, const Tensor& beside) {
  check(tensor, name, at::kBFloat16, 2, beside);
  require(tensor.sizes() == beside.sizes(), name, " must have shape ", beside.sizes(), ", got ", tensor.sizes());
}

const plora::Piece* check_pieces(const Tensor& pieces, const char* name, int64_t count, const Tensor& beside) {
  check(pieces, name, at::kInt, 2, beside);
  constexpr int64_t words = sizeof(plora::Piece) / 4;
  require(pieces.size(1) == words, name, " must have ", words, " columns, got shape ", pieces.sizes());
  // A launch has two blocks to a walk, and at most 65535.
  require(0 <= count && count <= pieces.size(0) && count < 20000, "the count of ", name, " must be from 0 to ",
          std::min<int64_t>(pieces.size(0), 19999), ", got ", count);
  return static_cast<const plora::Piece*>(pieces.const_data_ptr());
}

// Fills in what the kernels have in common: where the factors are, gate0, up0, H_g and H_u.
template <class Args>
void set_common(Args& args, const Tensor& gate, const Tensor& up, const Tensor& hidden, const Tensor& factors,
                const Tensor& offsets, const Tensor& down_offsets) {
  check_activation(up, "up", gate);
  check_hidden(hidden, "hidden", gate.size(0), gate);
  require(hidden.size(1) % 32 == 0, "hidden must have a multiple of 32 columns, got shape ", hidden.sizes());
  check(factors, "factors", at::kBFloat16, 1, gate);
  check(offsets, "offsets", at::kLong, 2, gate);
  check(down_offsets, "down_offsets", at::kLong, 2, gate);
  const int64_t each = offsets.size(1), slots = each / 2;
  require(offsets.size(0) == 2 && each % 2 == 1, "offsets must have shape [2, 2 K + 1], got ", offsets.sizes());
  require(down_offsets.size(0) == 1 && down_offsets.size(1) == each, "down_offsets must have shape [1, ", each,
          "], got ", down_offsets.sizes());
  const int64_t* begin = offsets.const_data_ptr<int64_t>();
  args.begin[0] = begin + slots;
  args.begin[1] = begin + each + slots;
  args.begin[2] = down_offsets.const_data_ptr<int64_t>();
  args.in[0] = gate.const_data_ptr();
  args.in[1] = up.const_data_ptr();
  args.hidden[0] = hidden.const_data_ptr();
  args.hidden[1] = static_cast<const at::BFloat16*>(hidden.const_data_ptr()) + hidden.size(1) / 2;
  args.factors = factors.const_data_ptr();
  args.width = gate.size(1);
}

void check_workspace(const Tensor& sums, const char* name, int64_t elements, const Tensor& counters, int64_t count,
                     const Tensor& beside) {
  check(sums, name, at::kFloat, 1, beside);
  require(sums.numel() >= elements, name, " must have ", elements, " elements, got ", sums.numel());
  check(counters, "counters", at::kInt, 1, beside);
  require(counters.numel() >= count, "counters must have ", count, " elements, got ", counters.numel());
}

void run_swiglu(const Tensor& gate, const Tensor& up, const Tensor& hidden, const Tensor& factors, Tensor act,
                const std::optional<Tensor>& hidden_down, const Tensor& tiles, int64_t count, const Tensor& offsets,
                const Tensor& down_offsets, Tensor partials, Tensor counters, int64_t blocks, int64_t steps) {
  check(gate, "gate", at::kBFloat16, 2, gate);
  const c10::cuda::CUDAGuard guard(gate.device());
  plora::SwigluArgs args{};
  set_common(args, gate, up, hidden, factors, offsets, down_offsets);
  args.pieces = check_pieces(tiles, "tiles", count, gate);
  args.count = static_cast<int>(count);
  check_activation(act, "act", gate);
  args.hidden_stride = hidden.stride(0);
  args.act = act.mutable_data_ptr();
  if (hidden_down) {
    check_hidden(*hidden_down, "hidden_down", gate.size(0), gate);
    args.hidden_down = hidden_down->mutable_data_ptr();
    args.hidden_down_stride = hidden_down->stride(0);
  }
  args.steps = static_cast<int>(steps > 0 ? steps : plora::swiglu_steps(args.width, args.count));
  const int64_t splits = ((args.width + 63) / 64 + args.steps - 1) / args.steps;
  check_workspace(partials, "partials", blocks * splits * plora::kScratchBlock, counters, count, gate);
  args.partials = partials.mutable_data_ptr<float>();
  args.counters = counters.mutable_data_ptr<int32_t>();
  launched(plora::swiglu(args, stream()), "swiglu", gate.size(0), args.width, hidden.size(1), count);
}

plora::SwigluGradArgs grad_args(const Tensor& dact, const std::optional<Tensor>& dhidden_down, const Tensor& gate,
                                const Tensor& up, const Tensor& hidden, const Tensor& factors, const Tensor& dgate,
                                const Tensor& dup, const std::optional<Tensor>& act, const Tensor& tiles,
                                int64_t tile_count, const Tensor& offsets, const Tensor& down_offsets, int64_t steps) {
  plora::SwigluGradArgs args{};
  set_common(args, gate, up, hidden, factors, offsets, down_offsets);
  check_activation(dact, "dact", gate);
  args.in[2] = dact.const_data_ptr();
  args.hidden_stride[0] = args.hidden_stride[1] = hidden.stride(0);
  if (dhidden_down) {
    check_hidden(*dhidden_down, "dhidden_down", gate.size(0), gate);
    args.hidden[2] = dhidden_down->const_data_ptr();
    args.hidden_stride[2] = dhidden_down->stride(0);
  }
  check_activation(dgate, "dgate", gate);
  check_activation(dup, "dup", gate);
  args.out[0] = dgate.mutable_data_ptr();
  args.out[1] = dup.mutable_data_ptr();
  if (act) {
    check_activation(*act, "act", gate);
    args.out[2] = act->mutable_data_ptr();
  }
  args.tiles = check_pieces(tiles, "tiles", tile_count, gate);
  args.tile_count = static_cast<int>(tile_count);
  args.steps = static_cast<int>(steps > 0 ? steps : plora::swiglu_grad_steps(args.width, gate.size(0)));
  return args;
}

void run_pointwise_grad(const Tensor& dact, const std::optional<Tensor>& dhidden_down, const Tensor& gate,
                        const Tensor& up, const Tensor& hidden, const Tensor& factors, Tensor dgate, Tensor dup,
                        Tensor act, const Tensor& tiles, int64_t tile_count, const Tensor& offsets,
                        const Tensor& down_offsets, int64_t steps) {
  check(gate, "gate", at::kBFloat16, 2, gate);
  const c10::cuda::CUDAGuard guard(gate.device());
  const plora::SwigluGradArgs args = grad_args(dact, dhidden_down, gate, up, hidden, factors, dgate, dup, act, tiles,
                                               tile_count, offsets, down_offsets, steps);
  launched(plora::swiglu_pointwise_grad(args, stream()), "swiglu_pointwise_grad", gate.size(0), args.width,
           hidden.size(1), tile_count);
}

void run_grad(const Tensor& dact, const Tensor& dhidden_down, const Tensor& gate, const Tensor& up,
              const Tensor& hidden, const Tensor& factors, Tensor grad, Tensor dgate, Tensor dup,
              const std::optional<Tensor>& act, Tensor dhidden, const Tensor& tiles, int64_t tile_count,
              const Tensor& walks, int64_t walk_count, const Tensor& offsets, const Tensor& down_offsets, Tensor sums,
              Tensor counters, int64_t blocks, int64_t steps) {
  check(gate, "gate", at::kBFloat16, 2, gate);
  const c10::cuda::CUDAGuard guard(gate.device());
  plora::SwigluGradArgs args = grad_args(dact, dhidden_down, gate, up, hidden, factors, dgate, dup, act, tiles,
                                         tile_count, offsets, down_offsets, steps);
  args.walks = check_pieces(walks, "walks", walk_count, gate);
  args.walk_count = static_cast<int>(walk_count);
  check(grad, "grad", at::kFloat, 1, gate);
  require(grad.numel() == factors.numel(), "grad must have ", factors.numel(), " elements, got ", grad.numel());
  check_hidden(dhidden, "dhidden", gate.size(0), gate);
  require(dhidden.sizes() == hidden.sizes() && dhidden.stride(0) == hidden.stride(0), "dhidden must have shape ",
          hidden.sizes(), " and hidden's strides, got ", dhidden.sizes());
  check_workspace(sums, "sums", 2 * blocks * plora::kScratchBlock, counters,
                  walk_count * (plora::kWalkRows / plora::kTileRows), gate);
  args.grad = grad.mutable_data_ptr<float>();
  args.grad_hidden[0] = dhidden.mutable_data_ptr();
  args.grad_hidden[1] = static_cast<at::BFloat16*>(dhidden.mutable_data_ptr()) + dhidden.size(1) / 2;
  args.sums = sums.mutable_data_ptr<float>();
  args.counters = counters.mutable_data_ptr<int32_t>();
  launched(plora::swiglu_grad(args, stream()), "swiglu_grad", gate.size(0), args.width, hidden.size(1),
           tile_count + walk_count);
}

}  // namespace

namespace plora {

void bind_swiglu(pybind11::module_& m) {
  using pybind11::arg;
  m.attr("FUSED_RANKS") = kFusedRanks;
  m.def("swiglu", &run_swiglu, "act = silu(gate + scale H B) (up + scale H B), hidden_down = act A^T", arg("gate"),
        arg("up"), arg("hidden"), arg("factors"), arg("act"), arg("hidden_down"), arg("tiles"), arg("count"),
        arg("offsets"), arg("down_offsets"), arg("partials"), arg("counters"), arg("blocks"), arg("steps") = 0);
  m.def("swiglu_pointwise_grad", &run_pointwise_grad, "dgate, dup and act of dact + dhidden_down A", arg("dact"),
        arg("dhidden_down"), arg("gate"), arg("up"), arg("hidden"), arg("factors"), arg("dgate"), arg("dup"),
        arg("act"), arg("tiles"), arg("tile_count"), arg("offsets"), arg("down_offsets"), arg("steps") = 0);
  m.def("swiglu_grad", &run_grad, "likewise, and all the rest of the backward of adapters of few ranks", arg("dact"),
        arg("dhidden_down"), arg("gate"), arg("up"), arg("hidden"), arg("factors"), arg("grad"), arg("dgate"),
        arg("dup"), arg("act"), arg("dhidden"), arg("tiles"), arg("tile_count"), arg("walks"), arg("walk_count"),
        arg("offsets"), arg("down_offsets"), arg("sums"), arg("counters"), arg("blocks"), arg("steps") = 0);
}

}  // namespace plora
