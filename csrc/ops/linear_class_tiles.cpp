// linear_cross_entropy on a GPU, a tile of classes at a time, for all rows. The logits of a tile are computed twice:
//
//   1. Z = X W_t^T + b_t   [N, v]     its m and S for each row, which are joined over the tiles, and z of the targets
//   2. Z again, G = d loss / d Z in its memory     dX += G W_t   [N, D]     dW_t = G^T X   [v, D]     db_t = G^T 1
//
// So each row of dW is written once and rounded once. The first tiles are computed last in 1 and first in 2, and the
// logits of as many as fit are kept: the end of dW's memory holds some until their rows of dW are written.
#include "ops/linear_class_tiles.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "cpu/gemm/gemm.h"
#include "ops/cross_entropy_call.h"
#include "ops/linear_products.h"

namespace charlm {
namespace {

constexpr int64_t kReadBehindRow = 64;  // elements
constexpr int64_t kIgnored = -1;        // the target of a row without a gradient of the loss, in a tile

template <class T>
class ClassTiles {
  using C = Compute<T>;

 public:
  ClassTiles(const TiledCall& call, const LinearPlan& plan)
      : call_(call),
        plan_(plan),
        x_(with_a_unit_stride(call.x)),
        weight_(with_a_unit_stride(call.a.linear_weight)),
        n_(call.x.size(0)),
        n_features_(call.x.size(1)),
        n_classes_(weight_.size(0)),
        multiple_(class_multiple(weight_.element_size())),
        row_stride_(plan.tile_classes + multiple_),
        compute_(call.x.options().dtype(compute_dtype(call.x))),
        index_(call.target.to(at::kLong)),
        zero_(at::zeros({}, index_.options())),
        ignored_(at::full({}, kIgnored, index_.options())) {
    // A uint64 target of 2^63 or more is negative here, but is never ignore_index.
    const int64_t ignore_index = call.a.options.ignore_index;
    const bool may_ignore = call.target.scalar_type() != at::kUInt64 || ignore_index >= 0;
    const Tensor in_range = index_.ge(0).logical_and_(index_.lt(n_classes_));
    is_counted_ = may_ignore ? in_range.logical_and(index_.ne(ignore_index)) : in_range;
    is_bad_ = may_ignore ? in_range.logical_or(index_.eq(ignore_index)).logical_not_() : in_range.logical_not();
    tile_ = at::where(is_counted_, index_.div(plan.tile_classes, "floor"), ignored_);
    in_tile_ = index_.remainder(plan.tile_classes);
  }

  TiledResults run() {
    record_bad_targets();
    set_row_weight();
    scratch_ = at::empty({plan_.kept, n_ * row_stride_}, call_.x.options());
    if (call_.mask[1]) {
      all_grad_weight_ =
          at::empty({padded_classes(n_classes_, weight_.element_size()), n_features_}, weight_.options());
    }
    TiledResults results;
    results.losses = losses();
    if (call_.grad_of_rows) gradients(results);
    return results;
  }

 private:
  int64_t n_tiles() const { return (n_classes_ + plan_.tile_classes - 1) / plan_.tile_classes; }
  int64_t n_kept() const { return plan_.kept + plan_.kept_in_weight; }
  int64_t first_class(int64_t tile) const { return tile * plan_.tile_classes; }
  int64_t n_classes(int64_t tile) const { return std::min(plan_.tile_classes, n_classes_ - first_class(tile)); }

  static Tensor with_a_unit_stride(const Tensor& t) {
    return t.stride(0) == 1 || t.stride(1) == 1 ? t : t.contiguous();
  }

  // IndexError for the first target that is no class: a loss of one class with the bad targets and otherwise class 0.
  void record_bad_targets() const {
    const Tensor one_class = at::zeros({n_, 1}, call_.x.options()), unused = at::empty({3, n_}, compute_);
    CrossEntropyCall<T> call(options(), one_class, at::where(is_bad_, index_, zero_), {}, {}, call_.a.target, 0);
    call.set_target_limit(n_classes_);
    call.set_state(unused);
    call.forward_rows(unused[2]);
  }

  // The factor of a row's loss: its token weight, times the weight of its class.
  void set_row_weight() {
    if (call_.token_weight) row_weight_ = call_.token_weight->to(compute_.dtype());
    if (!call_.a.weight) return;
    const Tensor of_class = call_.a.weight->to(compute_.dtype()).index_select(0, index_.clamp(0, n_classes_ - 1));
    row_weight_ = row_weight_ ? *row_weight_ * of_class : of_class;
  }

  CrossEntropyOptions options() const {
    CrossEntropyOptions options = call_.a.options;
    options.reduction = static_cast<int64_t>(Reduction::kSum);
    return options;
  }

  // [v or more, D]: the rows of W of a tile, and zeros up to a multiple.
  Tensor weight_of(int64_t tile) {
    const int64_t n = n_classes(tile), padded = padded_classes(n, weight_.element_size());
    const Tensor rows = weight_.narrow(0, first_class(tile), n);
    if (n == padded) return rows;
    if (!last_weight_.defined()) last_weight_ = padded_rows(rows, padded);
    return last_weight_;
  }

  OptionalTensor bias_of(int64_t tile) const {
    if (!call_.a.linear_bias) return std::nullopt;
    const int64_t n = n_classes(tile);
    return padded_rows(call_.a.linear_bias->narrow(0, first_class(tile), n), padded_classes(n, weight_.element_size()));
  }

  // [N, tile_classes + multiple]: the memory of the tile's logits.
  Tensor memory(int64_t tile) const {
    if (tile < plan_.kept) return scratch_[tile].view({n_, row_stride_});
    if (tile >= n_kept()) return scratch_[0].view({n_, row_stride_});
    const int64_t n = n_ * row_stride_;
    return all_grad_weight_.view({-1})
        .narrow(0, all_grad_weight_.numel() - (n_kept() - tile) * n, n)
        .view({n_, row_stride_});
  }

  // [N, v or more]
  Tensor compute_logits(int64_t tile) {
    const Tensor weight = weight_of(tile), logits = memory(tile).narrow(1, 0, weight.size(0));
    multiply(logits, x_, weight.t(), bias_of(tile));
    return logits;
  }

  // The loss of each row; `state_` holds its maximum and its sum.
  Tensor losses() {
    CrossEntropyOptions plain = options();  // only the maximum and the sum are used
    plain.lse_square_scale = 0;
    plain.label_smoothing = 0;
    const Tensor states = at::empty({n_tiles(), 2, n_}, compute_), unused = at::empty({n_}, compute_);
    Tensor z = at::zeros({n_}, call_.x.options());  // of the targets
    for (int64_t tile = n_tiles() - 1; tile >= 0; tile--) {
      const Tensor logits = compute_logits(tile).narrow(1, 0, n_classes(tile));
      const Tensor is_inside = tile_.eq(tile), target = at::where(is_inside, in_tile_, zero_);
      z = at::where(is_inside, logits.gather(1, target.unsqueeze(1)).squeeze(1), z);
      CrossEntropyCall<T> call(plain, logits, target, {}, {});  // no row is ignored
      call.ignore_only(kIgnored);
      call.set_state(states[tile]);
      call.forward_rows(unused);
    }
    const Tensor maxima = states.select(1, 0), max = maxima.amax(0);
    const Tensor sum = (states.select(1, 1) * (maxima - max).exp_()).sum(0);
    state_ = at::stack({max, sum});
    const Tensor log_sum = sum.log(), lse = max + log_sum;
    const CrossEntropyOptions& o = call_.a.options;
    Tensor loss = (max - transformed(z.to(compute_.dtype()))).add_(log_sum);
    if (o.lse_square_scale != 0) loss += static_cast<C>(o.lse_square_scale) * lse * lse;
    if (row_weight_) loss *= *row_weight_;
    return at::where(is_counted_, loss, at::zeros({}, compute_));
  }

  // z from x, as ops/cross_entropy.h has it.
  Tensor transformed(Tensor x) const {
    const C softcap = softcap_as<C>(call_.a.options.softcap);
    x = x * static_cast<C>(call_.a.options.logit_scale);
    return softcap > 0 ? (x / softcap).tanh_().mul_(softcap) : x;
  }

  void gradients(TiledResults& results) {
    const Tensor g = call_.grad_of_rows->contiguous();
    Tensor input_sum, elsewhere;
    if (call_.mask[2]) results.grad_bias = at::empty({n_classes_}, weight_.options());
    for (int64_t tile = 0; tile < n_tiles(); tile++) {
      const Tensor logits = tile < n_kept() ? memory(tile).narrow(1, 0, weight_of(tile).size(0)) : compute_logits(tile);
      if (tile == 0 || tile == n_tiles() - 1) {
        elsewhere = at::where(is_counted_, at::full_like(index_, class_after(tile)), ignored_);
      }
      write_gradient(tile, g, elsewhere);
      const int64_t n = n_classes(tile), padded = logits.size(1);
      // Behind the tile too, which oneDNN's products of bfloat16 by AMX read, times 0: a NaN there would be one in
      // them.
      const int64_t end = x_.is_cuda() ? padded : std::min(padded + kReadBehindRow, row_stride_), behind = end - n;
      if (behind > 0) memory(tile).narrow(1, n, behind).zero_();
      if (call_.mask[0]) add_input_gradient(input_sum, logits, weight_of(tile));
      if (call_.mask[1]) multiply(all_grad_weight_.narrow(0, first_class(tile), padded), logits.t(), x_);
      if (call_.mask[2]) {
        results.grad_bias.narrow(0, first_class(tile), n)
            .copy_(at::sum(logits.narrow(1, 0, n), /*dim=*/0, /*keepdim=*/false, compute_dtype(weight_)));
      }
    }
    if (call_.mask[0]) results.grad_input = input_sum.to(call_.x.scalar_type());
    if (call_.mask[1]) results.grad_weight = all_grad_weight_.narrow(0, 0, n_classes_);
  }

  int64_t class_after(int64_t tile) const { return padded_classes(n_classes(tile), weight_.element_size()); }

  // The logits of a tile become their gradient. A row whose target is in another tile gets a class of the padding as
  // its target here: the gradient of the padding is not used, and all classes of the tile get p times a factor.
  void write_gradient(int64_t tile, const Tensor& g, const Tensor& elsewhere) {
    const Tensor rows = memory(tile).narrow(1, 0, class_after(tile) + multiple_);
    const Tensor target = at::where(tile_.eq(tile), in_tile_, elsewhere);
    CrossEntropyCall<T> call(options(), rows, target, {}, row_weight_);
    call.ignore_only(kIgnored);
    call.set_state(state_);
    call.set_gradient(rows, const_data<C>(g), /*one_for_each_row=*/g.dim() == 1);
    if (call_.metric_grads.is_any()) call.add_metric_gradients(call_.metric_grads, 0);
    call.backward();
  }

  void add_input_gradient(Tensor& sum, const Tensor& g, const Tensor& weight) const {
    const bool is_first = !sum.defined();
    if (is_first) sum = at::empty({n_, n_features_}, compute_);
    if (weight.scalar_type() == sum.scalar_type()) {
      is_first ? multiply(sum, g, weight) : add_product(sum, g, weight);
    } else if (!sum.is_cuda()) {
      const Tensor product = at::mm(g, weight);
      is_first ? sum.copy_(product) : sum.add_(product);
    } else if (is_first) {
      at::mm_out(sum, g, weight, sum.scalar_type());
    } else {
      at::addmm_out(sum, sum, g, weight, sum.scalar_type());
    }
  }

  const TiledCall& call_;
  const LinearPlan& plan_;
  const Tensor x_, weight_;  // [N, D] and [V, D], with a stride of 1
  const int64_t n_, n_features_, n_classes_, multiple_, row_stride_;
  const at::TensorOptions compute_;
  const Tensor index_;           // [N] int64
  const Tensor zero_, ignored_;  // [] int64: scalars would be copied to the device
  Tensor is_counted_, is_bad_;   // [N] bool: a class; neither a class nor ignored
  OptionalTensor row_weight_;    // [N]
  Tensor tile_, in_tile_;        // [N] the tile of a counted target, and its place there
  Tensor scratch_;               // [kept, N * row_stride]
  Tensor all_grad_weight_;       // [V or more, D]
  Tensor last_weight_;           // see weight_of()
  Tensor state_;                 // [2, N]
};

}  // namespace

TiledResults run_tiles_of_classes(const TiledCall& call, const LinearPlan& plan) {
  return with_float_type(call.x.scalar_type(), "linear_cross_entropy",
                         [&]<class T>() { return ClassTiles<T>(call, plan).run(); });
}

}  // namespace charlm
