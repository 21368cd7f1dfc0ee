// SPDX-License-Identifier: Apache-2.0
// Rank of a V block among those of its list, as one integer: no two blocks are equal.
#pragma once

namespace kcache {

constexpr unsigned kForcedKey = 0x7f000000u;  // above the bits of any mass

// Rank of a block: the mass's bits, then the lower block.
__device__ inline unsigned long long composite(float mass, bool forced, int block) {
  const unsigned key = forced ? kForcedKey : __float_as_uint(mass);
  return (static_cast<unsigned long long>(key) << 16) | static_cast<unsigned>(0xffff - block);
}

// Shift of each digit of a composite (47 bits), from the top; all have 8 bits but one with 7.
__device__ inline int digit_shift(int pass) {
  return pass < 3 ? 39 - 8 * pass : 16 - 8 * (pass - 3);
}

}  // namespace kcache
