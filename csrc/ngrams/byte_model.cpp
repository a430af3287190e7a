// An adaptive n-gram model of bytes in integer arithmetic: the probabilities behind `charlm compress`.
//
// A byte is two nibbles of four bits, the most significant first. Each bit has a node: the bits of its byte that came
// before. For each order k, the k bytes before and the node select a slot with the probability of a 1 and a count. The
// probability moves towards each bit that occurs, by 1 / (count + 1.5), and the count ends at kMaxCount, so that old
// bits are forgotten. The predictions of all orders are mixed as logits (Mahoney, "Adaptive Weighing of Context Models
// for Lossless Data Compression", 2005): the probability of a 1 is squash(sum of weight · stretch(probability)), with
// squash(x) = 1 / (1 + e^-x) and stretch its inverse, and the weights follow the gradient of the coding cost. This
// replaces the fixed escape probabilities of PPM (Cleary and Witten 1984). Each order gives two inputs: its own
// probability, and what bits followed such a probability and count before, for this order.
//
// Everything is an integer: logits are in 1/256, probabilities in 1/65536 or 1/4096. The results are equal on all
// machines; charlm/reference/byte_model.py computes the same numbers. The hash table has a fixed size; a context that
// is rarely seen makes room for another one.
#include <pybind11/numpy.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace charlm {
namespace byte_model {
namespace {

namespace py = pybind11;

constexpr std::array<int, 8> kOrders = {0, 1, 2, 3, 4, 5, 6, 8};
constexpr int kContexts = kOrders.size();
constexpr int kInputs = 2 * kContexts + 1;  // two for each order, and a constant
constexpr int kSlots = 16;                  // of a bucket: its check, then the nodes 1 to 15 of a nibble
constexpr int kMaxTableBits = 23;           // 256 MiB
constexpr int kMaxCount = 8;                // of a slot, which holds probability << 4 | count
constexpr int kMapShift = 6;                // a mapped probability moves by 1/64
constexpr int kUnit = 256;                  // of a logit
constexpr int kLimit = 16 * kUnit - 1;      // the largest logit that squash takes
constexpr int kMaxInput = 2047;             // the largest logit of an input
constexpr int kWeight = 15000;              // of an input at the beginning, in 1/65536
constexpr int kMaxWeight = 1 << 20;         // 16
constexpr int kLearningShift = 17;          // of input (1/256) · error (1/65536), added to a weight (1/65536)
constexpr int kTotal = (1 << 24) - kSlots;  // the sum of the weights of 16 nibbles; the coder adds 1 to each
constexpr uint64_t kDecay = 4278222805;     // e^(-1/256) in 2^-32
constexpr uint64_t kMix1 = 0x9E3779B97F4A7C15, kMix2 = 0xD6E8FEB86659FD93;

// squash in 1/65536, by repeated multiplication, and stretch of each probability in 1/4096.
struct Tables {
  std::array<int32_t, 2 * kLimit + 1> squash;
  std::array<int32_t, 4096> stretch;

  Tables() {
    uint64_t power = uint64_t{1} << 32;  // e^(-x / 256)
    for (int x = 0; x <= kLimit; ++x) {
      const auto p = static_cast<int32_t>((uint64_t{1} << 48) / ((uint64_t{1} << 32) + power));
      squash[kLimit + x] = std::min(p, 65535);
      squash[kLimit - x] = 65536 - squash[kLimit + x];
      power = power * kDecay >> 32;
    }
    int x = -kLimit;
    for (int p = 0; p < 4096; ++p) {
      while (x < kLimit && squash[kLimit + x] < 16 * p + 8) ++x;
      stretch[p] = std::clamp(x, -kMaxInput, kMaxInput);
    }
  }
};

const Tables& tables() {
  static const Tables tables;
  return tables;
}

class ByteModel {
 public:
  // The table has 2^table_bits buckets.
  explicit ByteModel(int table_bits) {
    if (table_bits < 1 || table_bits > kMaxTableBits) throw std::invalid_argument("table_bits must be from 1 to 23");
    table_.resize(size_t{kSlots} << table_bits);
    mask_ = (uint64_t{1} << table_bits) - 1;
    for (int context = 0; context < kContexts; ++context) {
      for (int count = 0; count < 16; ++count) {
        for (int step = 0; step < 64; ++step) maps_[context][count][step] = 1024 * step + 512;
      }
    }
    for (auto& set : by_match_) set.fill(kWeight);
    find_buckets();
  }

  // The weight of each value of the next nibble; their sum is kTotal, and a weight may be 0.
  void weigh(float* weights) {
    std::array<int32_t, 2 * kSlots> range;
    range[1] = kTotal;
    for (int node = 1; node < kSlots; ++node) {
      const int64_t ones = static_cast<int64_t>(range[node]) * predict(node) >> 16;
      range[2 * node] = range[node] - static_cast<int32_t>(ones);
      range[2 * node + 1] = static_cast<int32_t>(ones);
    }
    std::copy(range.begin() + kSlots, range.end(), weights);  // at most 2^24, so that a float is exact
  }

  // Learns the next nibble; weigh() has been called before.
  void learn(int nibble) {
    for (int node = 1, shift = 3; shift >= 0; --shift) {
      const int bit = nibble >> shift & 1;
      learn(node, bit);
      node = 2 * node + bit;
    }
    if (byte_ == 0) {
      byte_ = kSlots + nibble;
    } else {
      history_ = history_ << 8 | (byte_ << 4 & 0xff) | static_cast<uint64_t>(nibble);
      byte_ = 0;
    }
    find_buckets();
  }

 private:
  struct Node {  // what predict() leaves for learn()
    std::array<int32_t, kInputs> inputs;
    std::array<uint16_t*, kContexts> mapped;
    std::array<int32_t, kInputs>*by_node, *by_match;
    int32_t p;
  };

  // The probability of a 1 at this node of the nibble, in 1/65536.
  int32_t predict(int node) {
    Node& found = nodes_[node];
    int match = 0;
    for (int context = 0; context < kContexts; ++context) {
      const int slot = buckets_[context][node], count = slot & 15, p = slot >> 4;
      if (count != 0) match = context + 1;
      found.mapped[context] = &maps_[context][count][p >> 6];
      found.inputs[2 * context] = count == 0 ? 0 : tables().stretch[p];
      found.inputs[2 * context + 1] = count == 0 && context > 0 ? 0 : tables().stretch[*found.mapped[context] >> 4];
    }
    found.inputs[kInputs - 1] = kUnit;
    const int depth = (byte_ == 0 ? 0 : 4) + (node >= 2) + (node >= 4) + (node >= 8);
    found.by_node = &by_node_[byte_ == 0 ? node : byte_ * kSlots + node];
    found.by_match = &by_match_[8 * match + depth];
    int64_t sum = 0;
    for (int i = 0; i < kInputs; ++i) {
      sum += static_cast<int64_t>(found.inputs[i]) * ((*found.by_node)[i] + (*found.by_match)[i]);
    }
    const int64_t logit = std::clamp<int64_t>(sum >> 16, -kLimit, kLimit);
    return found.p = tables().squash[kLimit + logit];
  }

  void learn(int node, int bit) {
    const Node& found = nodes_[node];
    const int32_t error = (bit << 16) - found.p;
    for (int i = 0; i < kInputs; ++i) {
      const int32_t step = (found.inputs[i] * error + (1 << (kLearningShift - 1))) >> kLearningShift;
      for (auto* set : {found.by_node, found.by_match}) {
        (*set)[i] = std::clamp((*set)[i] + step, -kMaxWeight, kMaxWeight);
      }
    }
    for (int context = 0; context < kContexts; ++context) {
      uint16_t& slot = buckets_[context][node];
      const int count = slot & 15, p = slot >> 4;
      const int moved = p + ((bit * 4095 - p) * (131072 / (2 * count + 3)) >> 16);
      slot = static_cast<uint16_t>(moved << 4 | std::min(count + 1, kMaxCount));
      uint16_t& mapped = *found.mapped[context];
      mapped = static_cast<uint16_t>(mapped + ((bit * 65535 - mapped) >> kMapShift));
    }
  }

  // The buckets of the next nibble, one for each order. Of the two places of a bucket, a new one takes that where the
  // first bit has been seen less often.
  void find_buckets() {
    for (int context = 0; context < kContexts; ++context) {
      const int order = kOrders[context];
      const uint64_t bytes = order == 0 ? 0 : history_ << (64 - 8 * order);
      uint64_t hash = bytes * kMix1 + static_cast<uint64_t>(order << 8 | byte_) * kMix2;
      hash = (hash ^ hash >> 32) * kMix2;
      hash ^= hash >> 32;
      const auto check = static_cast<uint16_t>(hash >> 48 | 1);  // not 0, which is that of an empty bucket
      uint16_t* const first = &table_[kSlots * (hash & mask_)];
      uint16_t* const second = &table_[kSlots * ((hash & mask_) ^ 1)];
      uint16_t* bucket = first[0] == check ? first : second;
      if (bucket[0] != check) {
        bucket = (first[1] & 15) <= (second[1] & 15) ? first : second;
        std::fill(bucket, bucket + kSlots, uint16_t{2048 << 4});
        bucket[0] = check;
      }
      buckets_[context] = bucket;
    }
  }

  std::vector<uint16_t> table_;
  uint64_t mask_;
  uint64_t history_ = 0;  // the last 8 bytes, the last one lowest
  int byte_ = 0;          // 0, or 16 + the first nibble of the byte
  std::array<uint16_t*, kContexts> buckets_;
  std::array<Node, kSlots> nodes_;
  std::array<std::array<std::array<uint16_t, 64>, 16>, kContexts> maps_;
  std::array<std::array<int32_t, kInputs>, 32 * kSlots> by_node_ = {};
  std::array<std::array<int32_t, kInputs>, 8 * (kContexts + 1)> by_match_;
};

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// Writes the nibbles of `data`, (n,), into `nibbles`, (2n,), and the weights before each into `weights`, (2n, 16).
void encode(ByteModel& model, const Array<uint8_t>& data, Array<int32_t>& nibbles, Array<float>& weights) {
  if (nibbles.size() != 2 * data.size() || weights.size() != kSlots * nibbles.size()) {
    throw std::invalid_argument("the sizes of data, nibbles and weights differ");
  }
  const uint8_t* const bytes = data.data();
  int32_t* const found = nibbles.mutable_data();
  float* const row = weights.mutable_data();
  const py::ssize_t size = nibbles.size();
  const py::gil_scoped_release release;
  for (py::ssize_t i = 0; i < size; ++i) {
    found[i] = i % 2 == 0 ? bytes[i / 2] >> 4 : bytes[i / 2] & 15;
    model.weigh(row + kSlots * i);
    model.learn(found[i]);
  }
}

// The next `size` bytes. Before each call of next_nibble(), which returns an array of one, `weights` is filled: (1,
// 16).
py::bytes decode(ByteModel& model, py::ssize_t size, Array<float>& weights, const py::function& next_nibble) {
  if (weights.size() != kSlots) throw std::invalid_argument("weights must have 16 elements");
  std::string bytes(size, '\0');
  for (py::ssize_t i = 0; i < 2 * size; ++i) {
    model.weigh(weights.mutable_data());
    const auto nibble = next_nibble().cast<Array<int32_t>>().at(0);
    if (nibble < 0 || nibble >= kSlots) throw std::invalid_argument("a nibble is from 0 to 15");
    model.learn(nibble);
    bytes[i / 2] = static_cast<char>(bytes[i / 2] << 4 | nibble);
  }
  return bytes;
}

}  // namespace
}  // namespace byte_model

void bind_byte_model(pybind11::module_& m) {
  using namespace byte_model;
  using py::arg;
  py::class_<ByteModel>(m, "ByteModel")
      .def(py::init<int>(), arg("table_bits"))
      .def("encode", &encode, arg("data"), arg("nibbles").noconvert(), arg("weights").noconvert())
      .def("decode", &decode, arg("size"), arg("weights").noconvert(), arg("next_nibble"));
}

}  // namespace charlm
