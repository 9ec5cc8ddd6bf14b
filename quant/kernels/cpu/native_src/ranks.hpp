// Values and their columns as one number, to be compared and sorted.
#pragma once

#include <cstdint>
#include <cstring>

namespace loci {

// Floats in the order of their values: both zeros are one, and NaN, whatever its sign, is above all.
inline uint32_t in_order(float value) {
    if (value != value) return 0xffffffffu;
    value += 0.0f;  // of a zero without its sign
    uint32_t bits;
    if (value != value) return 0xffffffffu;  // whatever its sign
    std::memcpy(&bits, &value, 4);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// A value and, below it, its column: the larger number is the larger value or, of equal ones, the earlier column.
inline uint64_t ranked(float value, int64_t column) {
    return static_cast<uint64_t>(in_order(value)) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(column));
}
inline int64_t column_of(uint64_t rank) { return static_cast<int64_t>(~static_cast<uint32_t>(rank)); }
inline double value_of(uint64_t rank) {
    const auto ordered = static_cast<uint32_t>(rank >> 32);
    const uint32_t bits = ordered >> 31 ? ordered & 0x7fffffffu : ~ordered;
    float value;
    std::memcpy(&value, &bits, 4);
    return static_cast<double>(value);
}

}  // namespace loci
