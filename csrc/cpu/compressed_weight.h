// A weight in bf16 in 12 bits per value, without loss.
//
// Of the 8 bits of exponent hardly 3 carry information in a trained weight (2.6 bits of entropy:
// DFloat11, Zhang et al. 2025, arXiv:2504.11651): in one output column nearly all exponents are
// among 16 that follow each other. So a value is its sign, its 7 bits of mantissa and 4 bits that
// count its exponent from the column's lowest. All values have the same length, so vectors are
// decoded in a handful of instructions, and where memory sets the pace a product takes 3/4 of the
// time.
//
// A unit is 8 inputs by 16 columns, four of the pairs that bf16 products take. A unit that holds a
// value outside of its column's 16 exponents stands elsewhere, as it is: a raw unit.
//
// A panel of kPanelWidth columns is
//
//   lowest exponents  [4 groups][16 columns][2] uint16, in the place of a bf16's exponent
//   raw marks         [num_units / 16, rounded up] RawMarks, padded to 64 bytes
//   units             [num_units][4 groups][kUnitBytes]
//
// and a unit is
//
//   codes             [16 columns][2] uint16; pair p's exponent in bits 4 p to 4 p + 3
//   signs, mantissas  [2][16 columns][2] uint16; pair 2 h in the bits of a bf16's sign and mantissa
//                     (0x807f) of word [h], pair 2 h + 1 in the other eight, bytes exchanged
#pragma once

#include "cpu/bf16.h"
#include "cpu/ops.h"

namespace steer {

constexpr int64_t kUnitInputs = 8;
constexpr int64_t kUnitPairs = kUnitInputs / 2;
constexpr int64_t kUnitValues = kUnitInputs * kLanes;
constexpr int64_t kUnitBytes = kUnitValues * 12 / 8;
constexpr int64_t kPanelGroups = kPanelWidth / kLanes;
constexpr int kNumExponents = 16;
constexpr int kMantissaBits = 7;
constexpr uint16_t kSignAndMantissa = 0x807f;

// 16 units of all groups.
struct RawMarks {
  static constexpr uint64_t kUnits = 64 / kPanelGroups;
  uint64_t bits;      // bit 4 * unit + group: raw
  int64_t first_raw;  // index of the first raw unit among those of the whole weight
};

struct CompressedLayout {
  int64_t num_panels, num_units, num_marks;

  constexpr CompressedLayout(int64_t out_features, int64_t in_features)
      : num_panels(steer::num_panels(out_features)),
        num_units(in_features / kUnitInputs),
        num_marks(round_up(num_units, RawMarks::kUnits) / RawMarks::kUnits) {}

  static constexpr int64_t kMarksOffset = kPanelWidth * 2 * sizeof(uint16_t);
  constexpr int64_t units_offset() const {
    return kMarksOffset + round_up(num_marks * sizeof(RawMarks), 64);
  }
  constexpr int64_t panel_bytes() const {
    return units_offset() + num_units * kPanelGroups * kUnitBytes;
  }
  constexpr int64_t bytes() const { return num_panels * panel_bytes(); }
};

// The columns of a panel, from some group on, and their inputs, from some unit on.
struct CompressedColumns {
  const uint16_t* lowest;  // exponents
  const RawMarks* marks;
  const uint8_t* units;
  const bf16* raw;  // [num_raw][kUnitValues], as pack_weight lays 8 inputs of 16 columns
  uint64_t first_unit = 0, first_group = 0;

  static CompressedColumns of_panel(const void* packed, const bf16* raw,
                                    const CompressedLayout& layout, int64_t index) {
    const uint8_t* panel = static_cast<const uint8_t*>(packed) + index * layout.panel_bytes();
    return {reinterpret_cast<const uint16_t*>(panel),
            reinterpret_cast<const RawMarks*>(panel + CompressedLayout::kMarksOffset),
            panel + layout.units_offset(), raw};
  }
  CompressedColumns from_group(int64_t group) const {
    return {lowest, marks, units, raw, first_unit, first_group + group};
  }
  // input: a multiple of kUnitInputs.
  CompressedColumns from_input(int64_t input) const {
    return {lowest, marks, units, raw, first_unit + input / kUnitInputs, first_group};
  }

  const uint16_t* lowest_exponents(int64_t group) const {
    return lowest + (first_group + group) * 2 * kLanes;
  }
  const uint8_t* unit(uint64_t index, int64_t group) const {
    return units + ((first_unit + index) * kPanelGroups + first_group + group) * kUnitBytes;
  }
  // Bit g: group g's unit is raw.
  uint64_t raw_groups(uint64_t index) const { return marks_of(index).bits >> first_bit(index); }
  const bf16* raw_unit(uint64_t index, int64_t group) const {
    const RawMarks& word = marks_of(index);
    const uint64_t before = word.bits & ((uint64_t{1} << (first_bit(index) + group)) - 1);
    return raw + (word.first_raw + __builtin_popcountll(before)) * kUnitValues;
  }

 private:
  const RawMarks& marks_of(uint64_t index) const {
    return marks[(first_unit + index) / RawMarks::kUnits];
  }
  uint64_t first_bit(uint64_t index) const {
    return (first_unit + index) % RawMarks::kUnits * kPanelGroups + first_group;
  }
};

struct CompressArgs {
  const bf16* weight;                 // [out_features, in_features]
  uint8_t* packed;                    // CompressedLayout
  bf16* raw;                          // [raw_begins[num_panels]][kUnitValues]
  int64_t* raw_begins;                // [num_panels + 1], where each panel's raw units begin
  int64_t out_features, in_features;  // in_features: a multiple of kUnitInputs
};

// Tasks of both: panels. The first writes exponents, marks that count from 0 in every panel, and
// each panel's number of raw units to raw_begins[panel + 1]. The second needs the sums of those
// numbers there, and writes the units.
void choose_exponents(const CompressArgs& args, int64_t begin, int64_t end);
void compress_units(const CompressArgs& args, int64_t begin, int64_t end);

// One output column in fp32.
void decompress_column(const void* packed, const bf16* raw, int64_t out_features,
                       int64_t in_features, int64_t column, float* out);

}  // namespace steer
