// SPDX-License-Identifier: Apache-2.0
// Takes the place of csrc/ptx.cuh.
#pragma once

#include "cuda_runtime.h"

namespace kcache {

inline float fast_exp2(float value) {
  return value < -126.0f ? 0.0f : exp2f(value);
}

inline float fast_log2(float value) {
  return log2f(value);
}

inline int load_acquire(const int* pointer) {
  return __atomic_load_n(pointer, __ATOMIC_ACQUIRE);
}

inline long long now_ns() {
  return emulator::now_ns();
}

inline float2 halves_to_floats(unsigned bits) {
  return {static_cast<float>(emulator::from_word<_Float16>(bits & 0xffff)),
          static_cast<float>(emulator::from_word<_Float16>(bits >> 16))};
}

inline unsigned float_to_half(float value) {
  return static_cast<unsigned>(emulator::to_word(static_cast<_Float16>(value)));
}

inline unsigned float_to_bfloat16(float value) {
  const unsigned bits = __float_as_uint(value);
  return value != value ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// What each lane has of the operands and gets of the sums: PTX ISA, "Matrix Fragments for
// mma.m16n8k32".
inline void multiply_add(int (&sums)[4], const unsigned (&rows)[4], const unsigned (&columns)[2]) {
  struct Pair {
    unsigned words[2];
  };
  const unsigned lane = emulator::lane(), group = lane / 4, quarter = lane % 4;
  const auto byte = [](unsigned word, unsigned i) {
    return static_cast<int>(static_cast<int8_t>(word >> (8 * i)));
  };
  Pair left[2][4], right[2][4];  // of the lane's two rows and columns, by quarters
  for (unsigned half = 0; half < 2; ++half) {
    emulator::publish(emulator::to_word(Pair{{rows[half], rows[2 + half]}}));
    for (unsigned i = 0; i < 4; ++i) {
      left[half][i] = emulator::from_word<Pair>(emulator::published(group * 4 + i));
    }
  }
  emulator::publish(emulator::to_word(Pair{{columns[0], columns[1]}}));
  for (unsigned column = 0; column < 2; ++column) {
    for (unsigned i = 0; i < 4; ++i) {
      right[column][i] =
          emulator::from_word<Pair>(emulator::published((2 * quarter + column) * 4 + i));
    }
  }
  for (unsigned half = 0; half < 2; ++half) {
    for (unsigned column = 0; column < 2; ++column) {
      for (unsigned channels = 0; channels < 2; ++channels) {
        for (unsigned i = 0; i < 16; ++i) {
          sums[2 * half + column] += byte(left[half][i / 4].words[channels], i % 4) *
                                     byte(right[column][i / 4].words[channels], i % 4);
        }
      }
    }
  }
}

}  // namespace kcache
