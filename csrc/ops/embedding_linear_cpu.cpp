// embedding_linear on the CPU. Folded, the table C @ W[:, t]^T is one GEMM, its rows are summed by the kernels, and two
// more GEMMs turn the table's gradient into those of C and W. Gathered, rows of C are multiplied by W in GEMMs of N
// rows. Both compute in float for the half types and round each result once.
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <unistd.h>

#include <algorithm>

#include "core/registration.h"
#include "cpu/gemm/gemm.h"
#include "ops/embedding_gradient.h"
#include "ops/embedding_linear_impl.h"

namespace charlm {
namespace {

// ----------------------------------------------------------------------------------------------------- choice of plan

double cache_size(int name, double otherwise) {
  const long bytes = name >= 0 ? sysconf(name) : 0;
  return bytes > 0 ? static_cast<double>(bytes) : otherwise;
}

#ifdef _SC_LEVEL3_CACHE_SIZE
constexpr int kSecondLevel = _SC_LEVEL2_CACHE_SIZE, kThirdLevel = _SC_LEVEL3_CACHE_SIZE;
#else
constexpr int kSecondLevel = -1, kThirdLevel = -1;
#endif

struct Work {
  explicit Work(const EmbeddingLinearSizes& s)
      : tokens(static_cast<double>(s.n_rows) * s.n_places * s.embedding_dim),
        outputs(static_cast<double>(s.n_rows) * s.hidden),
        sums(outputs * s.n_places),
        weight(static_cast<double>(s.hidden) * s.n_places * s.embedding_dim),
        table(static_cast<double>(s.vocabulary) * s.n_places * s.hidden),
        embedding(static_cast<double>(s.vocabulary) * s.embedding_dim),
        n_rows(static_cast<double>(s.n_rows)),
        inner(static_cast<double>(s.n_places) * s.embedding_dim),
        dim(static_cast<double>(s.embedding_dim)),
        bytes(table * s.element_size) {}

  bool table_fits_second_level() const {
    static const double size = cache_size(kSecondLevel, 512 << 10);
    return bytes <= size;
  }

  // Whether gather and GEMM is a product with a short side, which our own loops run (gemm.h).
  bool has_short_product() const { return n_rows >= 16 && (n_rows <= kMaxShortSide || inner <= kMaxShortSide); }

  // Of a number of a row, wherever the table lies.
  double per_sum(double second_level, double third_level, double memory) const {
    // Most of the last level belongs to others; and for an EPYC of eight parts of 32 MiB, sysconf says 256.
    static const double share = std::min(cache_size(kThirdLevel, 32 << 20) / 4, 8.0 * (1 << 20));
    return table_fits_second_level() ? second_level : bytes <= share ? third_level : memory;
  }

  double tokens;     // N T D
  double outputs;    // N H
  double sums;       // N T H
  double weight;     // T D H
  double table;      // V T H
  double embedding;  // V D
  double n_rows;     // N
  double inner;      // T D
  double dim;        // D
  double bytes;      // of the table
};

}  // namespace

// The times of the folded and the gathered layer, in nanoseconds on two threads of the machine of bench/NOTES.md,
// fitted to 419 measurements of each pass. The choice depends on their ratio only, which varies far less between
// machines.
Plan choose_forward_plan_on_cpu(const EmbeddingLinearSizes& sizes) {
  const Work w(sizes);
  const double written = w.table_fits_second_level() ? 0.25 : 0.14;
  const double folded = 9.3e3 + 0.54 * w.weight + (0.032 * w.dim + written) * w.table +
                        w.per_sum(0.022, 0.092, 0.12) * w.sums + 0.33 * w.outputs;
  const double product = w.has_short_product() ? 0.0091 : 0.013;
  const double gathered =
      13e3 + 0.39 * w.weight + product * w.sums * w.dim + 0.45 * w.tokens + 0.37 * w.outputs + 0.033 * w.embedding;
  return folded < gathered ? Plan::kFolded : Plan::kGathered;
}

Plan choose_backward_plan_on_cpu(const EmbeddingLinearSizes& sizes) {
  const Work w(sizes);
  const double written = w.table_fits_second_level() ? 1.1 : 1.3;
  const double folded = 66e3 + 0.23 * w.weight + (0.02 * w.dim + written) * w.table +
                        w.per_sum(0.018, 0.032, 0.68) * w.sums + 0.59 * w.outputs;
  const double gathered =
      55e3 + 0.57 * w.weight + 0.029 * w.sums * w.dim + 3.2 * w.tokens + 0.57 * w.outputs + 0.48 * w.embedding;
  return folded < gathered ? Plan::kFolded : Plan::kGathered;
}

namespace {

template <class T>
class EmbeddingLinear {
  using C = Compute<T>;

 public:
  EmbeddingLinear(const Tensor& input, const Tensor& embedding_weight, const Tensor& linear_weight,
                  Activation activation)
      : index_(checked_indices(input, embedding_weight.size(0))),
        embedding_(embedding_weight.to(kComputeDtype).contiguous()),
        linear_(linear_weight.contiguous()),
        options_(embedding_weight.options()),
        kernels_(cpu_kernels().of<T>().embedding_linear),
        sizes_(embedding_linear_sizes(input, embedding_weight, linear_weight)) {
    rows_.activation = activation;
    FoldedLayout& layout = rows_.layout;
    layout.n_places = sizes_.n_places;
    layout.hidden = sizes_.hidden;
    layout.embedding_dim = sizes_.embedding_dim;
    layout.slab = kernels_.slab(sizes_.hidden);
    layout.n_slabs = (sizes_.hidden + layout.slab - 1) / layout.slab;
  }

  // Writes `output` and, for an activation that needs it, its input `before`: [N, H].
  void forward(const OptionalTensor& bias, Plan plan, const Tensor& output, const Tensor& before) {
    rows_.output = mutable_data<T>(output);
    if (before.numel() > 0) rows_.before = mutable_data<T>(before);
    if (is_folded(plan, &choose_forward_plan_on_cpu)) {
      folded_forward(bias);
    } else {
      gathered_forward(bias, output, before);
    }
  }

  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& kept, int64_t padding_idx,
                                              Plan plan, std::array<bool, 3> needs) {
    const Tensor grad = grad_output.contiguous(), contiguous_kept = kept.contiguous();
    rows_.grad_output = const_data<T>(grad);
    rows_.kept = const_data<T>(contiguous_kept);
    auto [embedding, linear, bias] =
        is_folded(plan, &choose_backward_plan_on_cpu) ? folded_backward(needs) : gathered_backward(needs);
    if (embedding.defined()) {
      if (padding_idx >= 0) embedding.select(0, padding_idx).zero_();
      embedding = embedding.to(options_.dtype());
    }
    return {embedding, linear, bias};
  }

 private:
  static constexpr at::ScalarType kComputeDtype = std::is_same_v<C, double> ? at::kDouble : at::kFloat;

  bool is_folded(Plan plan, Plan (*choose)(const EmbeddingLinearSizes&)) const {
    const bool fits = sizes_.vocabulary * rows_.layout.token_stride() <= std::numeric_limits<int32_t>::max();
    TORCH_CHECK(plan != Plan::kFolded || fits, "plan \"folded\" needs a table of fewer than 2^31 numbers, but ",
                sizes_.vocabulary, " tokens at ", sizes_.n_places, " places of ", sizes_.hidden, " numbers are more");
    return fits && (plan == Plan::kAuto ? choose(sizes_) : plan) == Plan::kFolded;
  }

  Tensor empty(at::IntArrayRef shape) const { return new_output(shape, options_.dtype(kComputeDtype)); }
  Tensor new_gradient(at::IntArrayRef shape) const { return new_output(shape, options_); }

  Tensor product(const Tensor& a, const Tensor& b) const {
    Tensor result = empty({a.size(0), b.size(1)});
    multiply(result, a, b);
    return result;
  }

  // Rows that are worth a thread.
  int64_t grain(int64_t numbers_per_row) const {
    return std::max<int64_t>(1, kThreadNumbers / std::max<int64_t>(1, numbers_per_row));
  }

  // ------------------------------------------------------------------------------------------------------ folded

  // W as [n_slabs * T * slab, D].
  Tensor packed() const {
    const FoldedLayout& layout = rows_.layout;
    const Tensor packed = empty({layout.token_stride(), layout.embedding_dim});
    if (layout.hidden % layout.slab != 0) {
      packed.narrow(0, layout.token_stride() - layout.n_places * layout.slab, layout.n_places * layout.slab).zero_();
    }
    at::parallel_for(0, layout.hidden, grain(linear_.size(1)), [&](int64_t begin, int64_t end) {
      kernels_.pack(layout, const_data<T>(linear_), mutable_data<C>(packed), begin, end);
    });
    return packed;
  }

  // W as [D, n_slabs * T * slab].
  Tensor packed_columns() const {
    const FoldedLayout& layout = rows_.layout;
    const Tensor packed = empty({layout.embedding_dim, layout.token_stride()});
    at::parallel_for(0, layout.n_slabs * layout.n_places, grain(layout.slab * layout.embedding_dim),
                     [&](int64_t begin, int64_t end) {
                       kernels_.pack_columns(layout, const_data<T>(linear_), mutable_data<C>(packed), begin, end);
                     });
    return packed;
  }

  Tensor offsets() const {
    const int64_t places = sizes_.n_places, stride = rows_.layout.token_stride();
    const Tensor offsets = at::empty({index_.numel()}, index_.options().dtype(at::kInt));
    const int64_t* const index = const_data<int64_t>(index_);
    int32_t* const out = mutable_data<int32_t>(offsets);
    at::parallel_for(0, sizes_.n_rows, grain(places), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        for (int64_t t = 0; t < places; t++) {
          out[n * places + t] = static_cast<int32_t>(index[n * places + t] * stride + t * rows_.layout.slab);
        }
      }
    });
    return offsets;
  }

  void folded_forward(const OptionalTensor& bias) {
    const FoldedLayout& layout = rows_.layout;
    const Tensor table = product(embedding_, packed_columns()), offset = offsets();  // [V, n_slabs * T * slab]
    std::vector<C> padded_bias(layout.n_slabs * layout.slab);
    if (bias) {
      const Tensor wide = bias->to(kComputeDtype).contiguous();
      std::copy_n(const_data<C>(wide), layout.hidden, padded_bias.data());
    }
    rows_.table = const_data<C>(table);
    rows_.offsets = const_data<int32_t>(offset);
    rows_.bias = padded_bias.data();
    const int64_t n_blocks = (sizes_.n_rows + kFoldedRows - 1) / kFoldedRows;
    at::parallel_for(0, n_blocks, grain(kFoldedRows * (layout.n_places + kActivationCost) * layout.hidden),
                     [&](int64_t begin, int64_t end) {
                       std::vector<C> scratch(kFoldedRows * layout.slab);
                       kernels_.forward(rows_, scratch.data(), begin * kFoldedRows,
                                        std::min(end * kFoldedRows, sizes_.n_rows));
                     });
  }

  // Slabs of columns, times fixed blocks of rows where these are many: each has a table of its own, and they are added
  // up in their order, so that the sums do not depend on the threads.
  int64_t backward_blocks() const {
    const int64_t by_rows = sizes_.n_rows / 2048,
                  by_table = sizes_.n_rows / std::max<int64_t>(1, 16 * sizes_.vocabulary);
    return std::clamp<int64_t>(std::min(by_rows, by_table), 1, 8);
  }

  std::tuple<Tensor, Tensor, Tensor> folded_backward(std::array<bool, 3> needs) {
    const FoldedLayout& layout = rows_.layout;
    const int64_t n_blocks = backward_blocks(), stride = layout.token_stride(), table_size = sizes_.vocabulary * stride;
    const int64_t slab_row = layout.n_places * layout.slab, padded = layout.n_slabs * layout.slab;
    const Tensor offset = offsets(), tables = empty({n_blocks, sizes_.vocabulary, stride});
    rows_.offsets = const_data<int32_t>(offset);
    std::vector<C> bias_sums(n_blocks * padded);
    const auto sum_slab = [&](int64_t block, int64_t slab, C* scratch) {
      C* const table = mutable_data<C>(tables) + block * table_size;
      for (int64_t v = 0; v < sizes_.vocabulary; v++) {
        std::fill_n(table + v * stride + slab * slab_row, slab_row, C(0));
      }
      kernels_.backward(rows_, table, bias_sums.data() + block * padded + slab * layout.slab, scratch, slab,
                        sizes_.n_rows * block / n_blocks, sizes_.n_rows * (block + 1) / n_blocks);
    };
    const int64_t numbers = sizes_.n_rows / n_blocks * (layout.n_places + kActivationCost) * layout.slab;
    at::parallel_for(0, n_blocks * layout.n_slabs, grain(numbers), [&](int64_t begin, int64_t end) {
      std::vector<C> scratch(kFoldedRows * layout.slab);
      for (; begin < end; begin++) sum_slab(begin / layout.n_slabs, begin % layout.n_slabs, scratch.data());
    });
    const Tensor grad_table = sum_of_tables(tables);  // [V, n_slabs * T * slab]

    Tensor grad_embedding, grad_linear, grad_bias;
    if (needs[0]) grad_embedding = product(grad_table, packed());
    if (needs[1]) {
      const Tensor grad_packed = product(grad_table.t(), embedding_);
      grad_linear = new_gradient(linear_.sizes());
      at::parallel_for(0, layout.hidden, grain(linear_.size(1)), [&](int64_t begin, int64_t end) {
        kernels_.unpack(layout, const_data<C>(grad_packed), mutable_data<T>(grad_linear), begin, end);
      });
    }
    if (needs[2]) {
      const Tensor sums = empty({layout.hidden});
      for (int64_t h = 0; h < layout.hidden; h++) {
        C sum = 0;
        for (int64_t block = 0; block < n_blocks; block++) sum += bias_sums[block * padded + h];
        mutable_data<C>(sums)[h] = sum;
      }
      grad_bias = sums.to(options_.dtype());
    }
    return {grad_embedding, grad_linear, grad_bias};
  }

  Tensor sum_of_tables(const Tensor& tables) const {
    if (tables.size(0) == 1) return tables.squeeze(0);
    const int64_t stride = tables.size(2);
    const Tensor sum = empty({tables.size(1), stride});
    at::parallel_for(0, tables.size(1), grain(stride), [&](int64_t begin, int64_t end) {
      cpu_kernels().of<C>().embedding.sum_tables(mutable_data<C>(sum), const_data<C>(tables), tables.size(0),
                                                 tables.stride(0), stride, stride, begin, end);
    });
    return sum;
  }

  // ---------------------------------------------------------------------------------------------------- gathered

  Tensor gathered() const {  // [N, T * D]
    Tensor rows = empty({sizes_.n_rows, sizes_.n_places * sizes_.embedding_dim});
    EmbeddingParams table;
    table.weight = const_data<char>(embedding_);
    table.element_size = sizeof(C);
    table.column_stride = sizeof(C);
    table.row_stride = sizes_.embedding_dim * static_cast<int64_t>(sizeof(C));
    table.embedding_dim = sizes_.embedding_dim;
    table.num_embeddings = sizes_.vocabulary;
    table.indices.data = index_.const_data_ptr();  // int64
    table.output = mutable_data<char>(rows);
    at::parallel_for(0, index_.numel(), grain(sizes_.embedding_dim), [&](int64_t begin, int64_t end) {
      Launch launch{begin, end};
      cpu_kernels().embedding_forward(table, launch);
    });
    return rows;
  }

  void gathered_forward(const OptionalTensor& bias, const Tensor& output, const Tensor& before) {
    const bool in_place = std::is_same_v<T, C> && !rows_.before;
    const Tensor sums = in_place ? output.view({sizes_.n_rows, sizes_.hidden}) : empty({sizes_.n_rows, sizes_.hidden});
    multiply(sums, gathered(), linear_.to(kComputeDtype).t(),
             bias ? OptionalTensor(bias->to(kComputeDtype)) : std::nullopt);
    if (rows_.before) before.view(sums.sizes()).copy_(sums);
    if (in_place && rows_.activation == Activation::kNone) return;
    at::parallel_for(0, sums.numel(), grain(kActivationCost), [&](int64_t begin, int64_t end) {
      kernels_.activate(rows_.activation, const_data<C>(sums) + begin, rows_.output + begin, end - begin);
    });
  }

  std::tuple<Tensor, Tensor, Tensor> gathered_backward(std::array<bool, 3> needs) {
    const int64_t hidden = sizes_.hidden, rows_per_block = std::max<int64_t>(kFoldedRows, sizes_.n_rows / kMaxSums);
    const int64_t n_blocks = (sizes_.n_rows + rows_per_block - 1) / rows_per_block;
    const Tensor grad = empty({sizes_.n_rows, hidden}), sums = empty({n_blocks, hidden});
    at::parallel_for(0, n_blocks, grain(rows_per_block * hidden * kActivationCost), [&](int64_t first, int64_t last) {
      for (; first < last; first++) {
        const int64_t begin = first * rows_per_block * hidden;
        const int64_t n_rows = std::min(rows_per_block, sizes_.n_rows - first * rows_per_block);
        kernels_.activation_backward(rows_.activation, rows_.grad_output + begin, rows_.kept + begin,
                                     mutable_data<C>(grad) + begin, mutable_data<C>(sums) + first * hidden, n_rows,
                                     hidden);
      }
    });
    Tensor grad_embedding, grad_linear, grad_bias;
    if (needs[0]) grad_embedding = embedding_gradient(grad);
    if (needs[1]) {
      grad_linear = std::is_same_v<T, C> ? new_gradient(linear_.sizes()) : empty(linear_.sizes());
      multiply(grad_linear, grad.t(), gathered());
      grad_linear = grad_linear.to(options_.dtype());
    }
    if (needs[2]) grad_bias = (n_blocks == 1 ? sums.squeeze(0) : sums.sum(0)).to(options_.dtype());
    return {grad_embedding, grad_linear, grad_bias};
  }

  // From the gradient of the activation's input, [N, H].
  Tensor embedding_gradient(const Tensor& grad) const {
    const int64_t n = index_.numel(), dim = sizes_.embedding_dim;
    const Tensor grad_rows = empty({sizes_.n_rows, sizes_.n_places * dim});
    multiply(grad_rows, grad, linear_.to(kComputeDtype));
    if (n * dim <= kFewGradients) {  // a call of embedding's op takes longer
      const Tensor sum = empty({sizes_.vocabulary, dim});
      std::fill_n(mutable_data<C>(sum), sum.numel(), C(0));
      cpu_kernels().of<C>().embedding.accumulate(mutable_data<C>(sum), dim, const_data<int64_t>(index_),
                                                 const_data<C>(grad_rows), dim, -1, 0, n, n);
      return sum;
    }
    static const Op<Tensor(const Tensor&, const Tensor&, c10::SymInt, int64_t, bool)> op("charlm::_embedding_backward");
    return op(grad_rows.view({n, dim}), index_.view({n}), sizes_.vocabulary, -1, false);
  }

  static constexpr int64_t kFewGradients = 1 << 12;
  static constexpr int64_t kMaxSums = 1024;         // partial sums of the bias's gradient
  static constexpr int64_t kThreadNumbers = 32768;  // additions that take as long as to start a thread
  static constexpr int64_t kActivationCost = 4;     // of a number, in additions of numbers

  const Tensor index_, embedding_, linear_;  // [..., T] int64; [V, D] of C; [H, T * D] of T
  const at::TensorOptions options_;
  const EmbeddingLinearKernels<T>& kernels_;
  const EmbeddingLinearSizes sizes_;
  FoldedParams<T> rows_;
};

}  // namespace

std::tuple<Tensor, Tensor> embedding_linear_on_cpu(const Tensor& input, const Tensor& embedding_weight,
                                                   const Tensor& linear_weight, const OptionalTensor& linear_bias,
                                                   Activation activation, Plan plan) {
  return with_float_type(embedding_weight.scalar_type(), "embedding_linear", [&]<class T>() {
    EmbeddingLinear<T> call(input, embedding_weight, linear_weight, activation);
    at::DimVector shape(input.sizes().begin(), input.sizes().end());
    shape.back() = linear_weight.size(0);
    const Tensor output = new_output(shape, embedding_weight.options());
    const Tensor before =
        keeps_input(activation) ? new_output(shape, output.options()) : at::empty({0}, output.options());
    call.forward(linear_bias, plan, output, before);
    return std::make_tuple(output, before);
  });
}

EmbeddingLinearGradients embedding_linear_backward_on_cpu(const Tensor& grad_output, const Tensor& input,
                                                          const Tensor& embedding_weight, const Tensor& linear_weight,
                                                          const Tensor& kept, int64_t padding_idx,
                                                          Activation activation, Plan plan, std::array<bool, 3> needs) {
  return with_float_type(embedding_weight.scalar_type(), "embedding_linear_backward", [&]<class T>() {
    EmbeddingLinear<T> call(input, embedding_weight, linear_weight, activation);
    return call.backward(grad_output, kept, padding_idx, plan, needs);
  });
}

}  // namespace charlm
