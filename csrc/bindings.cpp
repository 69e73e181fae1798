// The seam between torch and the kernels: checks every argument, names the bad one, launches.

#include "checks.h"

namespace plora {
void bind_adamw(pybind11::module_& m);
void bind_swiglu(pybind11::module_& m);
}  // namespace plora

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

// With B's, the `second` factors, each linear of `offsets` has an output and its columns of `hidden`; with A's there is
// one output, of all of them.
void up(const std::vector<std::optional<Tensor>>& ys, const Tensor& hidden, const Tensor& factors,
        std::vector<Tensor> outs, const Tensor& pieces, int64_t first, int64_t count, int64_t most_share,
        const Tensor& offsets, bool second, const Tensor& token_index, bool use_dropout, bool use_scale, int64_t slots,
        const std::optional<Tensor>& residual) {
  check_linears(outs, "outs", offsets, !second);
  check_linears(ys, "ys", offsets, !second);
  const int64_t linears = outs.size();
  const Tensor& beside = outs[0];
  require(!residual || linears == 1, "residual is added to the output of one linear, got ", linears);
  check_kind(beside, "out", at::kBFloat16, 2, beside);
  const c10::cuda::CUDAGuard guard(beside.device());
  check_hidden(hidden, "hidden", beside.size(0), beside);
  check(factors, "factors", at::kBFloat16, 1, beside);
  int64_t widths = 0;
  for (const Tensor& out : outs) {
    check(out, "out", at::kBFloat16, 2, beside);
    check_rows(out, "out", beside.size(0));
    widths += out.size(1);
  }
  plora::Each<plora::UpArgs> each{};
  each.count = static_cast<int>(linears);
  for (int64_t i = 0; i < linears; ++i) {
    Tensor& out = outs[i];
    const std::optional<Tensor>& y = ys[i];
    if (y) {
      check(*y, "y", at::kBFloat16, 2, out);
      require(y->sizes() == out.sizes(), "y must have shape ", out.sizes(), ", got ", y->sizes());
    }
    if (residual) {
      check(*residual, "residual", at::kBFloat16, 2, out);
      require(residual->sizes() == out.sizes(), "residual must have shape ", out.sizes(), ", got ", residual->sizes());
    }
    plora::UpArgs& args = each.of[i];
    args.schedule = schedule(pieces, count, offsets, second, token_index, out.size(0), out, hidden.size(1), first);
    if (linears > 1) pick(args.schedule, i);
    args.y = y ? y->const_data_ptr() : nullptr;
    args.residual = residual ? residual->const_data_ptr() : nullptr;
    args.hidden = own_columns(hidden, i, linears);
    args.factors = factors.const_data_ptr();
    args.out = out.mutable_data_ptr();
    args.width = out.size(1);
    args.hidden_stride = hidden.stride(0);
    split(args, slots > 0 ? slots : plora::up_slots(args.width, widths, args.schedule.count), most_share, 65535);
    args.use_dropout = use_dropout;
    args.use_scale = use_scale;
  }
  launched(plora::up(each, stream()), "up", beside.size(0), beside.size(1), hidden.stride(0), count);
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

void grad_hidden(const std::vector<Tensor>& dys, const Tensor& hidden, const Tensor& factors, Tensor grad_hidden,
                 Tensor grad, const Tensor& pieces, int64_t count, const Tensor& offsets, const Tensor& token_index,
                 Tensor sums, Tensor counters, int64_t blocks, bool clusters, int64_t clusters_per_run) {
  check_linears(dys, "dys", offsets);
  const int64_t linears = dys.size();
  const Tensor& beside = dys[0];
  check_kind(beside, "dy", at::kBFloat16, 2, beside);
  const c10::cuda::CUDAGuard guard(beside.device());
  check_hidden(hidden, "hidden", beside.size(0), beside);
  check_hidden(grad_hidden, "grad_hidden", beside.size(0), beside);
  require(grad_hidden.sizes() == hidden.sizes(), "grad_hidden must have shape ", hidden.sizes(), ", got ",
          grad_hidden.sizes());
  require(grad_hidden.size(0) < 2 || grad_hidden.stride(0) == hidden.stride(0), "grad_hidden must have strides ",
          hidden.strides(), ", got ", grad_hidden.strides());
  check(factors, "factors", at::kBFloat16, 1, beside);
  check(grad, "grad", at::kFloat, 1, beside);
  check(sums, "sums", at::kFloat, 1, beside);
  check(counters, "counters", at::kInt, 1, beside);
  require(grad.numel() == factors.numel(), "grad must have ", factors.numel(), " elements, got ", grad.numel());
  const int64_t own_sums = blocks * plora::kScratchBlock, own_counters = clusters ? plora::kCluster * count : count;
  require(sums.numel() >= linears * own_sums, "sums must have ", linears * own_sums, " elements, got ", sums.numel());
  require(counters.numel() >= linears * own_counters, "counters must have ", linears * own_counters, " elements, got ",
          counters.numel());
  plora::Each<plora::GradHiddenArgs> each{};
  each.count = static_cast<int>(linears);
  for (int64_t i = 0; i < linears; ++i) {
    const Tensor& dy = dys[i];
    check(dy, "dy", at::kBFloat16, 2, beside);
    check_rows(dy, "dy", beside.size(0));
    plora::GradHiddenArgs& args = each.of[i];
    args.schedule = schedule(pieces, count, offsets, true, token_index, dy.size(0), dy, hidden.size(1));
    pick(args.schedule, i);
    args.dy = dy.const_data_ptr();
    args.hidden = own_columns(hidden, i, linears);
    args.factors = factors.const_data_ptr();
    args.grad_hidden = own_columns(grad_hidden, i, linears);
    args.grad = grad.mutable_data_ptr<float>();
    args.sums = sums.mutable_data_ptr<float>() + i * own_sums;
    args.counters = counters.mutable_data_ptr<int32_t>() + i * own_counters;
    args.width = dy.size(1);
    args.hidden_stride = hidden.stride(0);
    args.clusters = static_cast<int>(clusters_per_run);
  }
  launched(plora::grad_hidden(each, clusters, stream()), "grad_hidden", beside.size(0), beside.size(1),
           hidden.stride(0), count);
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
  m.def("up", &up, "out = y + residual + mask * scale? * hidden F", arg("ys"), arg("hidden"), arg("factors"),
        arg("outs"), arg("pieces"), arg("first"), arg("count"), arg("most_share"), arg("offsets"), arg("second"),
        arg("token_index"), arg("use_dropout"), arg("use_scale"), arg("slots") = 0, arg("residual") = pybind11::none());
  m.def("grad_factor", &grad_factor, "grad += scale? * hidden^T dropout(x)", arg("x"), arg("hidden"), arg("grad"),
        arg("pieces"), arg("first"), arg("count"), arg("offsets"), arg("second"), arg("token_index"),
        arg("use_dropout"), arg("use_scale"));
  m.def("grad_hidden", &grad_hidden, "grad_hidden = scale * dy F^T, grad += scale * hidden^T dy", arg("dys"),
        arg("hidden"), arg("factors"), arg("grad_hidden"), arg("grad"), arg("pieces"), arg("count"), arg("offsets"),
        arg("token_index"), arg("sums"), arg("counters"), arg("blocks"), arg("clusters"), arg("clusters_per_run") = 0);
  m.def("has_clusters", &plora::has_clusters, "whether the current device is of sm_90 or later");
  plora::bind_adamw(m);
  plora::bind_swiglu(m);
}
