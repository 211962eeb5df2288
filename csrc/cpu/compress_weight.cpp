#include "cpu/compressed_weight.h"

#include <array>
#include <bit>
#include <cstring>

namespace steer {

namespace {

int exponent(bf16 value) { return value.bits >> kMantissaBits & 0xff; }

bool is_among(int exponent, int lowest) {
  return static_cast<unsigned>(exponent - lowest) < kNumExponents;
}

// The first of the 16 exponents that hold most of the values.
int lowest_exponent(const bf16* values, int64_t num_values) {
  std::array<int64_t, 256> counts{};
  for (int64_t k = 0; k < num_values; ++k) ++counts[exponent(values[k])];
  int64_t held = 0;
  for (int e = 0; e < kNumExponents; ++e) held += counts[e];
  int best = 0;
  int64_t most = held;
  for (int lowest = 1; lowest + kNumExponents <= 256; ++lowest) {
    held += counts[lowest + kNumExponents - 1] - counts[lowest - 1];
    if (held > most) {
      best = lowest;
      most = held;
    }
  }
  return best;
}

// The parts of a panel that is being written.
struct Panel {
  int64_t first_column, num_columns;
  uint16_t* lowest_exponents;
  RawMarks* marks;
  uint8_t* units;

  Panel(const CompressArgs& a, const CompressedLayout& layout, int64_t index)
      : first_column(index * kPanelWidth),
        num_columns(std::min(kPanelWidth, a.out_features - first_column)) {
    uint8_t* panel = a.packed + index * layout.panel_bytes();
    lowest_exponents = reinterpret_cast<uint16_t*>(panel);
    marks = reinterpret_cast<RawMarks*>(panel + CompressedLayout::kMarksOffset);
    units = panel + layout.units_offset();
  }
};

bool fits(const bf16* inputs, int lowest) {
  bool fits = true;
  for (int64_t k = 0; k < kUnitInputs; ++k) fits &= is_among(exponent(inputs[k]), lowest);
  return fits;
}

// columns: those of the group that are there; in_features apart.
void copy_unit(const bf16* columns, int64_t in_features, int64_t num_columns, bf16* to) {
  std::memset(to, 0, kUnitValues * sizeof(bf16));
  for (int64_t column = 0; column < num_columns; ++column) {
    for (int64_t k = 0; k < kUnitInputs; ++k) {
      to[k / 2 * 2 * kLanes + 2 * column + k % 2] = columns[column * in_features + k];
    }
  }
}

void compress_unit(const bf16* columns, int64_t in_features, int64_t num_columns,
                   const uint16_t* lowest_exponents, uint8_t* to) {
  uint16_t codes[2 * kLanes] = {}, rest[kUnitPairs / 2][2 * kLanes] = {};
  for (int64_t column = 0; column < num_columns; ++column) {
    const int lowest = lowest_exponents[2 * column] >> kMantissaBits;
    for (int64_t k = 0; k < kUnitInputs; ++k) {
      const bf16 value = columns[column * in_features + k];
      const int64_t pair = k / 2, word = 2 * column + k % 2;
      codes[word] |= (exponent(value) - lowest) << (4 * pair);
      const uint16_t kept = value.bits & kSignAndMantissa;
      rest[pair / 2][word] |= pair % 2 ? std::rotl(kept, 8) : kept;
    }
  }
  std::memcpy(to, codes, sizeof codes);
  std::memcpy(to + sizeof codes, rest, sizeof rest);
}

}  // namespace

void choose_exponents(const CompressArgs& a, int64_t begin, int64_t end) {
  const CompressedLayout layout(a.out_features, a.in_features);
  for (int64_t index = begin; index < end; ++index) {
    const Panel panel(a, layout, index);
    std::memset(panel.lowest_exponents, 0, layout.units_offset());
    for (int64_t column = 0; column < panel.num_columns; ++column) {
      const bf16* values = a.weight + (panel.first_column + column) * a.in_features;
      const int lowest = lowest_exponent(values, a.in_features);
      for (int i = 0; i < 2; ++i) {
        panel.lowest_exponents[2 * column + i] = static_cast<uint16_t>(lowest << kMantissaBits);
      }
      const int64_t group = column / kLanes;
      for (int64_t unit = 0; unit < layout.num_units; ++unit) {
        const uint64_t is_raw = !fits(values + unit * kUnitInputs, lowest);
        panel.marks[unit / RawMarks::kUnits].bits |=
            is_raw << (unit % RawMarks::kUnits * kPanelGroups + group);
      }
    }
    int64_t num_raw = 0;
    for (int64_t i = 0; i < layout.num_marks; ++i) {
      panel.marks[i].first_raw = num_raw;
      num_raw += std::popcount(panel.marks[i].bits);
    }
    a.raw_begins[index + 1] = num_raw;
  }
}

void compress_units(const CompressArgs& a, int64_t begin, int64_t end) {
  const CompressedLayout layout(a.out_features, a.in_features);
  for (int64_t index = begin; index < end; ++index) {
    const Panel panel(a, layout, index);
    const int64_t first_raw = a.raw_begins[index];
    for (int64_t i = 0; i < layout.num_marks; ++i) panel.marks[i].first_raw += first_raw;
    bf16* raw = a.raw + first_raw * kUnitValues;
    for (int64_t unit = 0; unit < layout.num_units; ++unit) {
      const uint64_t marks =
          panel.marks[unit / RawMarks::kUnits].bits >> (unit % RawMarks::kUnits * kPanelGroups);
      for (int64_t group = 0; group < kPanelGroups; ++group) {
        const int64_t column = group * kLanes;
        const int64_t num_columns = std::clamp<int64_t>(panel.num_columns - column, 0, kLanes);
        const bf16* columns =
            a.weight + (panel.first_column + column) * a.in_features + unit * kUnitInputs;
        uint8_t* to = panel.units + (unit * kPanelGroups + group) * kUnitBytes;
        if (marks >> group & 1) {
          std::memset(to, 0, kUnitBytes);
          copy_unit(columns, a.in_features, num_columns, raw);
          raw += kUnitValues;
        } else {
          compress_unit(columns, a.in_features, num_columns, panel.lowest_exponents + 2 * column,
                        to);
        }
      }
    }
  }
}

void decompress_column(const void* packed, const bf16* raw, int64_t out_features,
                       int64_t in_features, int64_t column, float* out) {
  const CompressedLayout layout(out_features, in_features);
  const int64_t group = column % kPanelWidth / kLanes, lane = column % kLanes;
  const CompressedColumns columns =
      CompressedColumns::of_panel(packed, raw, layout, column / kPanelWidth).from_group(group);
  const uint16_t lowest = columns.lowest_exponents(0)[2 * lane];
  for (int64_t unit = 0; unit < layout.num_units; ++unit, out += kUnitInputs) {
    const bf16* values = columns.raw_groups(unit) & 1 ? columns.raw_unit(unit, 0) : nullptr;
    const uint16_t* words = reinterpret_cast<const uint16_t*>(columns.unit(unit, 0));
    for (int64_t k = 0; k < kUnitInputs; ++k) {
      const int64_t pair = k / 2, word = 2 * lane + k % 2;
      if (values) {
        out[k] = to_float(values[pair * 2 * kLanes + word]);
        continue;
      }
      const int code = words[word] >> (4 * pair) & 0xf;
      uint16_t rest = words[2 * kLanes * (1 + pair / 2) + word];
      if (pair % 2) rest = std::rotl(rest, 8);
      const auto bits = (rest & kSignAndMantissa) | (lowest + (code << kMantissaBits));
      out[k] = to_float(bf16{static_cast<uint16_t>(bits)});
    }
  }
}

}  // namespace steer
