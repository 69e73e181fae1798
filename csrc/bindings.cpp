// The seam between torch and the kernels: checks every argument, names the bad one, launches.

#include "checks.h"

namespace plora {
void bind_adamw(pybind11::module_& m);
void bind_swiglu(pybind11::module_& m);
}

namespace {

using namespace plora::binding;

// How the blocks share the columns, at most `most` those of a piece; `most_share` is the largest of the pieces'.
template <class Args>
void split(Args& args, int64_t slots, int64_t most_share, int64_t most) {
  const int64_t wanted = most_share * slots >> 16;
  most = std::min(most, (args.width + 63) / 64);
  args.slots = static_cast<int>(slots);
  args.splits = static_cast<int>(std::max<int64_t>(1, std::min(wanted, most)));
}

void down(const Tensor& x, const Tensor& factors, Tensor hidden, const Tensor& pieces, int64_t first, int64_t count,
          int64_t most_share, const Tensor& offsets, bool second, const Tensor& token_index, Tensor partials,
          Tensor counters, int64_t blocks, bool use_dropout, bool use_scale, int64_t slots) {
  check(x, "x", at::kBFloat16, 2, x);
  const c10::cuda::CUDAGuard guard(x.device());
  check(factors, "factors", at::kBFloat16, 1, x);
  check_hidden(hidden, "hidden", x.size(0), x);
  check(partials, "partials", at::kFloat, 1, x);
  check(counters, "counters", at::kInt, 1, x);
  plora::DownArgs args{};
  args.schedule = schedule(pieces, count, offsets, second, token_index, x.size(0), x, hidden.size(1), first);
  args.x = x.const_data_ptr();
  args.factors = factors.const_data_ptr();
  args.hidden = hidden.mutable_data_ptr();
  args.partials = partials.mutable_data_ptr<float>();
  args.counters = counters.mutable_data_ptr<int32_t>();
  args.width = x.size(1);
  args.hidden_stride = hidden.stride(0);
  const plora::Schedule& list = args.schedule;
  split(args, slots > 0 ? slots : plora::down_slots(args.width, list.count, list.members), most_share,
        plora::max_splits(list.members));
  args.use_dropout = use_dropout;
  args.use_scale = use_scale;
  require(partials.numel() >= blocks * args.splits * plora::kScratchBlock, "partials must have ",
          blocks * args.splits * plora::kScratchBlock, " elements, got ", partials.numel());
  require(counters.numel() >= count, "counters must have ", count, " elements, got ", counters.numel());
  launched(plora::down(args, stream()), "down", x.size(0), args.width, args.hidden_stride, count);
}

void up(const std::optional<Tensor>& y, const Tensor& hidden, const Tensor& factors, Tensor out, const Tensor& pieces,
        int64_t first, int64_t count, int64_t most_share, const Tensor& offsets, bool second, const Tensor& token_index,
        bool use_dropout, bool use_scale, int64_t slots, const std::optional<Tensor>& residual) {
  check(out, "out", at::kBFloat16, 2, out);
  const c10::cuda::CUDAGuard guard(out.device());
  if (y) {
    check(*y, "y", at::kBFloat16, 2, out);
    require(y->sizes() == out.sizes(), "y must have shape ", out.sizes(), ", got ", y->sizes());
  }
  if (residual) {
    check(*residual, "residual", at::kBFloat16, 2, out);
    require(residual->sizes() == out.sizes(), "residual must have shape ", out.sizes(), ", got ", residual->sizes());
  }
  check_hidden(hidden, "hidden", out.size(0), out);
  check(factors, "factors", at::kBFloat16, 1, out);
  plora::UpArgs args{};
  args.schedule = schedule(pieces, count, offsets, second, token_index, out.size(0), out, hidden.size(1), first);
  args.y = y ? y->const_data_ptr() : nullptr;
  args.residual = residual ? residual->const_data_ptr() : nullptr;
  args.hidden = hidden.const_data_ptr();
  args.factors = factors.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.width = out.size(1);
  args.hidden_stride = hidden.stride(0);
  split(args, slots > 0 ? slots : plora::up_slots(args.width, args.schedule.count), most_share, 65535);
  args.use_dropout = use_dropout;
  args.use_scale = use_scale;
  launched(plora::up(args, stream()), "up", out.size(0), args.width, args.hidden_stride, count);
}

void grad_factor(const Tensor& x, const Tensor& hidden, Tensor grad, const Tensor& pieces, int64_t first, int64_t count,
                 const Tensor& offsets, bool second, const Tensor& token_index, bool use_dropout, bool use_scale) {
  check(x, "x", at::kBFloat16, 2, x);
  const c10::cuda::CUDAGuard guard(x.device());
  check_hidden(hidden, "hidden", x.size(0), x);
  check(grad, "grad", at::kFloat, 1, x);
  plora::GradFactorArgs args{};
  args.schedule = schedule(pieces, count, offsets, second, token_index, x.size(0), x, hidden.size(1), first);
  args.x = x.const_data_ptr();
  args.hidden = hidden.const_data_ptr();
  args.grad = grad.mutable_data_ptr<float>();
  args.width = x.size(1);
  args.hidden_stride = hidden.stride(0);
  args.use_dropout = use_dropout;
  args.use_scale = use_scale;
  launched(plora::grad_factor(args, stream()), "grad_factor", x.size(0), args.width, args.hidden_stride, count);
}

void grad_hidden(const Tensor& dy, const Tensor& hidden, const Tensor& factors, Tensor grad_hidden, Tensor grad,
                 const Tensor& pieces, int64_t count, const Tensor& offsets, bool second, const Tensor& token_index,
                 Tensor sums, Tensor counters, int64_t blocks, bool clusters, int64_t clusters_per_run) {
  check(dy, "dy", at::kBFloat16, 2, dy);
  const c10::cuda::CUDAGuard guard(dy.device());
  check_hidden(hidden, "hidden", dy.size(0), dy);
  check_hidden(grad_hidden, "grad_hidden", dy.size(0), dy);
  require(grad_hidden.sizes() == hidden.sizes(), "grad_hidden must have shape ", hidden.sizes(), ", got ",
          grad_hidden.sizes());
  require(grad_hidden.size(0) < 2 || grad_hidden.stride(0) == hidden.stride(0), "grad_hidden must have strides ",
          hidden.strides(), ", got ", grad_hidden.strides());
  check(factors, "factors", at::kBFloat16, 1, dy);
  check(grad, "grad", at::kFloat, 1, dy);
  check(sums, "sums", at::kFloat, 1, dy);
  check(counters, "counters", at::kInt, 1, dy);
  require(grad.numel() == factors.numel(), "grad must have ", factors.numel(), " elements, got ", grad.numel());
  require(sums.numel() >= blocks * plora::kScratchBlock, "sums must have ", blocks * plora::kScratchBlock,
          " elements, got ", sums.numel());
  const int64_t most = clusters ? plora::kCluster * count : count;
  require(counters.numel() >= most, "counters must have ", most, " elements, got ", counters.numel());
  plora::GradHiddenArgs args{};
  args.schedule = schedule(pieces, count, offsets, second, token_index, dy.size(0), dy, hidden.size(1));
  require(args.schedule.members == 1, "offsets must be of one linear, got shape ", offsets.sizes());
  args.dy = dy.const_data_ptr();
  args.hidden = hidden.const_data_ptr();
  args.factors = factors.const_data_ptr();
  args.grad_hidden = grad_hidden.mutable_data_ptr();
  args.grad = grad.mutable_data_ptr<float>();
  args.sums = sums.mutable_data_ptr<float>();
  args.counters = counters.mutable_data_ptr<int32_t>();
  args.width = dy.size(1);
  args.hidden_stride = hidden.stride(0);
  args.clusters_per_run = static_cast<int>(clusters_per_run);
  launched(plora::grad_hidden(args, clusters, stream()), "grad_hidden", dy.size(0), args.width, args.hidden_stride,
           count);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using pybind11::arg;
  m.attr("TILE_ROWS") = plora::kTileRows;
  m.attr("TILE_RANKS") = plora::kTileRanks;
  m.attr("RUN_RANKS") = plora::kRunRanks;
  m.attr("WALK_RANKS") = plora::kWalkRanks;
  m.attr("WALK_ROWS") = plora::kWalkRows;
  m.attr("CLUSTER") = plora::kCluster;
  m.attr("SCRATCH_BLOCK") = plora::kScratchBlock;
  m.attr("MAX_SPLITS") = plora::kMaxSplits;
  m.attr("MAX_GROUP_SPLITS") = plora::kMaxGroupSplits;
  m.attr("MOST_MEMBERS") = plora::kMostMembers;
  m.attr("PIECE_WORDS") = static_cast<int>(sizeof(plora::Piece) / 4);
  m.def("down", &down, "hidden = scale? * dropout(x) F^T", arg("x"), arg("factors"), arg("hidden"), arg("pieces"),
        arg("first"), arg("count"), arg("most_share"), arg("offsets"), arg("second"), arg("token_index"),
        arg("partials"), arg("counters"), arg("blocks"), arg("use_dropout"), arg("use_scale"), arg("slots") = 0);
  m.def("up", &up, "out = y + residual + mask * scale? * hidden F", arg("y"), arg("hidden"), arg("factors"), arg("out"),
        arg("pieces"), arg("first"), arg("count"), arg("most_share"), arg("offsets"), arg("second"), arg("token_index"),
        arg("use_dropout"), arg("use_scale"), arg("slots") = 0, arg("residual") = pybind11::none());
  m.def("grad_factor", &grad_factor, "grad += scale? * hidden^T dropout(x)", arg("x"), arg("hidden"), arg("grad"),
        arg("pieces"), arg("first"), arg("count"), arg("offsets"), arg("second"), arg("token_index"),
        arg("use_dropout"), arg("use_scale"));
  m.def("grad_hidden", &grad_hidden, "grad_hidden = scale * dy F^T, grad += scale * hidden^T dy", arg("dy"),
        arg("hidden"), arg("factors"), arg("grad_hidden"), arg("grad"), arg("pieces"), arg("count"), arg("offsets"),
        arg("second"), arg("token_index"), arg("sums"), arg("counters"), arg("blocks"), arg("clusters"),
        arg("clusters_per_run") = 0);
  m.def("has_clusters", &plora::has_clusters, "whether the current device is of sm_90 or later");
  plora::bind_adamw(m);
  plora::bind_swiglu(m);
}
