// SPDX-License-Identifier: Apache-2.0
// The hot V cache's protocol (docs/design.md, "Residency and coherence"). The same in Triton:
// vllm_kcache/kernels/residency.py. Constants of the state tensors: vllm_kcache/cache/hot_cache.py.
#pragma once

#include "layer_view.h"
#include "warp.cuh"

namespace kcache {

// Slots looked at by one try to claim, and tries before a claim gives up.
constexpr int kWindow = 8, kAttempts = 8;

// Epoch of the step that runs: the last kernel of a step advances the one in the state.
__device__ inline unsigned epoch_of(const LayerView& view) {
  return static_cast<unsigned>(view.state[kEpoch]) + 1;
}

__device__ inline Word word_of(int64_t owner, unsigned epoch) {
  return (static_cast<Word>(owner) << 32) | epoch;
}

template <typename T>
__device__ inline T load_volatile(const T* pointer) {
  return *static_cast<const volatile T*>(pointer);
}

// Slot that holds `owner`, stamped with `epoch`; -1 when it is not resident.
__device__ inline int find_slot(const LayerView& view, int64_t owner, unsigned epoch) {
  const int slot = load_volatile(view.table + owner);
  if (slot < 0) return -1;
  const Word word = load_volatile(view.slot_word + slot);
  const Word mine = word_of(owner, epoch);
  if (word == mine) return slot;
  if (static_cast<int64_t>(word >> 32) != owner) return -1;
  const Word seen = atomicCAS(view.slot_word + slot, word, mine);
  // Stamped by us, or by someone else in this epoch. Otherwise it has just been evicted.
  return seen == word || seen == mine ? slot : -1;
}

// Take the oldest slot of a window for `owner` in each lane with `wanted`; -1 in a lane whose tries
// met only slots in use. Every lane of the warp must call it.
__device__ inline int claim_slot(const LayerView& view, bool wanted, int64_t owner,
                                 unsigned epoch) {
  const int lane = threadIdx.x & 31;
  int found = -1;
  if (view.num_slots == 0) return found;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    const bool wants = wanted && found < 0;
    const unsigned wanting = __ballot_sync(kAllLanes, wants);
    if (wanting == 0) break;
    unsigned hand = 0;
    if (lane == 0) {
      hand = atomicAdd(reinterpret_cast<unsigned*>(view.state + kHand),
                       static_cast<unsigned>(kWindow * __popc(wanting)));
    }
    hand = __shfl_sync(kAllLanes, hand, 0);
    if (!wants) continue;
    hand += kWindow * __popc(wanting & ((1u << lane) - 1));
    unsigned slot = hand % view.num_slots;
    unsigned oldest_slot = 0;
    Word oldest_word = 0, oldest_age = 0;
#pragma unroll
    for (int i = 0; i < kWindow; ++i) {
      const Word word = load_volatile(view.slot_word + slot);
      // Epochs wrap around, their differences stay right. Empty is older than everything.
      const Word age = word == kEmptySlot
                           ? 1ull << 32
                           : static_cast<unsigned>(epoch - static_cast<unsigned>(word));
      if (age > oldest_age) {
        oldest_age = age;
        oldest_word = word;
        oldest_slot = slot;
      }
      slot = slot + 1 == view.num_slots ? 0 : slot + 1;
    }
    // A slot stamped with this epoch has age 0 and is never taken.
    if (oldest_age == 0) continue;
    if (atomicCAS(view.slot_word + oldest_slot, oldest_word, word_of(owner, epoch)) !=
        oldest_word) {
      continue;
    }
    found = static_cast<int>(oldest_slot);
    // Only if the table still sends the evicted block here.
    if (oldest_word != kEmptySlot) atomicCAS(view.table + (oldest_word >> 32), found, -1);
    atomicExch(view.table + owner, found);
  }
  return found;
}

}  // namespace kcache
