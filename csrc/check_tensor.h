// The one helper that checks the ops' tensors. Messages name the argument, what is expected and
// what came.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace steer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A named size; -1: any.
struct Dim {
  const char* name;
  int64_t size = -1;
};

enum class Layout {
  kContiguous,
  kUnitStride,  // in the last dimension; any stride in the others
};

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "fp32";
    case ScalarType::BFloat16:
      return "bf16";
    case ScalarType::Half:
      return "fp16";
    case ScalarType::Double:
      return "fp64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "dtype " + std::to_string(static_cast<int>(dtype));
  }
}

inline std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << "] " << dtype_name(tensor.scalar_type()) << ", strides (";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.stride(d);
  text << ")";
  return text.str();
}

inline std::string describe(std::initializer_list<Dim> dims,
                            std::initializer_list<ScalarType> dtypes, Layout layout) {
  std::ostringstream text;
  text << "[";
  const char* separator = "";
  for (const Dim& dim : dims) {
    text << separator << dim.name;
    if (dim.size >= 0 && dim.name != std::to_string(dim.size)) text << "=" << dim.size;
    separator = ", ";
  }
  text << "] ";
  separator = "";
  for (ScalarType dtype : dtypes) {
    text << separator << dtype_name(dtype);
    separator = " or ";
  }
  text << (layout == Layout::kContiguous ? ", contiguous"
                                         : ", with unit stride in the last dimension");
  return text.str();
}

// A dimension of size 1 may have any stride.
inline bool has_layout(const Tensor& tensor, Layout layout) {
  if (layout == Layout::kContiguous) return tensor.is_contiguous();
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1;
}

// Throws std::invalid_argument, which Python sees as ValueError.
inline void check_tensor(const Tensor& tensor, const char* name, std::initializer_list<Dim> dims,
                         std::initializer_list<ScalarType> dtypes,
                         Layout layout = Layout::kContiguous) {
  bool fits = tensor.dim() == static_cast<int64_t>(dims.size()) &&
              std::find(dtypes.begin(), dtypes.end(), tensor.scalar_type()) != dtypes.end();
  int64_t d = 0;
  for (const Dim& dim : dims) {
    fits = fits && (dim.size < 0 || tensor.size(d) == dim.size);
    ++d;
  }
  if (fits && has_layout(tensor, layout)) return;
  throw std::invalid_argument(std::string(name) + " must be " + describe(dims, dtypes, layout) +
                              ", got " + describe(tensor));
}

// Indices that address memory: low <= value < high for all of them.
template <class Integer>
inline void check_range(const Integer* values, int64_t count, int64_t low, int64_t high,
                        const char* name) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] >= low && values[i] < high) continue;
    throw std::invalid_argument(std::string(name) + " must lie in [" + std::to_string(low) + ", " +
                                std::to_string(high) + "), got " + std::to_string(values[i]) +
                                " at position " + std::to_string(i));
  }
}

inline void check_that(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace steer
