// The optimizer's seam, as bindings.cpp.

#include <limits>
#include <optional>

#include "adamw.h"
#include "checks.h"

namespace plora {

namespace {

using namespace plora::binding;

// The moments are found through the records, whose addresses nobody can check here.
void step(Tensor weight, Tensor grad, std::optional<Tensor> shadow, const Tensor& records, int64_t chunks,
          const Tensor& losses, Tensor steps, Tensor outcome, Tensor partials, Tensor scaling,
          const std::optional<Tensor>& codebook) {
  check(weight, "weight", at::kFloat, 1, weight);
  const c10::cuda::CUDAGuard guard(weight.device());
  check(grad, "grad", at::kFloat, 1, weight);
  require(grad.sizes() == weight.sizes(), "grad must have shape ", weight.sizes(), ", got ", grad.sizes());
  if (shadow) {
    check(*shadow, "shadow", at::kBFloat16, 1, weight);
    require(shadow->sizes() == weight.sizes(), "shadow must have shape ", weight.sizes(), ", got ", shadow->sizes());
  }
  check(records, "records", at::kByte, 2, weight);
  constexpr int64_t bytes = sizeof(AdamWRecord);
  require(records.size(1) == bytes, "records must have ", bytes, " columns, got shape ", records.sizes());
  check(losses, "losses", at::kFloat, 1, weight);
  const int64_t slots = losses.size(0);
  check(steps, "steps", at::kFloat, 1, weight);
  check(outcome, "outcome", at::kFloat, 2, weight);
  require(steps.size(0) >= slots, "steps must have ", slots, " elements, got ", steps.size(0));
  require(outcome.size(0) == 2 && outcome.size(1) == slots, "outcome must have shape [2, ", slots, "], got ",
          outcome.sizes());
  check(partials, "partials", at::kFloat, 1, weight);
  require(0 <= chunks && chunks <= std::numeric_limits<int32_t>::max(), "chunks must be below 2^31, got ", chunks);
  require(partials.size(0) >= chunks, "partials must have ", chunks, " elements, got ", partials.size(0));
  check(scaling, "scaling", at::kFloat, 2, weight);
  require(scaling.size(0) == records.size(0) && scaling.size(1) == 4, "scaling must have shape [", records.size(0),
          ", 4], got ", scaling.sizes());
  if (codebook) {
    check(*codebook, "codebook", at::kFloat, 2, weight);
    require(codebook->size(0) == 2 && codebook->size(1) == kAdamWBlock, "codebook must have shape [2, 256], got ",
            codebook->sizes());
  }
  AdamWArgs args{};
  args.weight = weight.mutable_data_ptr<float>();
  args.grad = grad.const_data_ptr<float>();
  args.shadow = shadow ? shadow->mutable_data_ptr() : nullptr;
  args.records = static_cast<const AdamWRecord*>(records.const_data_ptr());
  args.count = static_cast<int>(records.size(0));
  args.chunks = static_cast<int>(chunks);
  args.losses = losses.const_data_ptr<float>();
  args.steps = steps.mutable_data_ptr<float>();
  args.norms = outcome.mutable_data_ptr<float>();
  args.skipped = args.norms + slots;
  args.partials = partials.mutable_data_ptr<float>();
  args.scaling = static_cast<AdamWScale*>(scaling.mutable_data_ptr());
  args.codebook = codebook ? codebook->const_data_ptr<float>() : nullptr;
  const int error = adamw(args, stream());
  require(error == 0, "the CUDA kernel adamw failed to launch: ", error_string(error), " (adapters ", records.size(0),
          ", chunks ", chunks, ")");
}

}  // namespace

void bind_adamw(pybind11::module_& m) {
  using pybind11::arg;
  m.attr("ADAMW_CHUNK") = kAdamWChunk;
  m.attr("ADAMW_RECORD_BYTES") = static_cast<int>(sizeof(AdamWRecord));
  m.def("adamw", &step, "clip, AdamW and shadow of the adapters in records", arg("weight"),
        arg("grad"), arg("shadow"), arg("records"), arg("chunks"), arg("losses"), arg("steps"), arg("outcome"),
        arg("partials"), arg("scaling"), arg("codebook"));
}

}  // namespace plora
