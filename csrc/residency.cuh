// SPDX-License-Identifier: Apache-2.0
// The hot V cache's protocol (docs/design.md, "Residency and coherence"). The same in Triton,
// where every claim takes a slot of its own: vllm_kcache/kernels/residency.py. Constants of the
// state tensors: vllm_kcache/cache/hot_cache.py.
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

// Finds the slot that holds `owner` and stamps it with `epoch`, in steps: each waits for what the
// one before has loaded, so other work may lie between them.
class SlotSearch {
 public:
  // Nothing is found where it is not `wanted`.
  __device__ SlotSearch(const LayerView& view, int64_t owner, unsigned epoch, bool wanted)
      : view_(view),
        owner_(owner),
        mine_(word_of(owner, epoch)),
        slot_(wanted ? load_volatile(view.table + owner) : -1) {}

  __device__ void read_word() {
    if (slot_ >= 0) word_ = load_volatile(view_.slot_word + slot_);
  }
  __device__ void stamp() {
    // The table may send several owners to a slot: only one of them holds it.
    if (slot_ >= 0 && static_cast<int64_t>(word_ >> 32) != owner_) slot_ = -1;
    seen_ = word_;
    if (slot_ >= 0 && word_ != mine_) seen_ = atomicCAS(view_.slot_word + slot_, word_, mine_);
  }
  // -1 when it is not resident.
  __device__ int slot() const {
    // Stamped by us, or by someone else in this epoch. Otherwise it has just been evicted.
    return seen_ == word_ || seen_ == mine_ ? slot_ : -1;
  }

 private:
  const LayerView& view_;
  const int64_t owner_;
  const Word mine_;
  int slot_;
  Word word_ = 0, seen_ = 0;
};

// All steps at once.
__device__ inline int find_slot(const LayerView& view, int64_t owner, unsigned epoch) {
  SlotSearch search(view, owner, epoch, true);
  search.read_word();
  search.stamp();
  return search.slot();
}

// Slot that holds all of the row of `owner`, for reading beside kernels that may evict it; -1
// without. What was stamped in an epoch that has ended was copied then. After the last read
// `still_holds` says whether it was there all the time: who takes a slot says so before he writes.
// Owners are compared and not words, for a step that finds the slot stamps it anew. A slot taken in
// an epoch is not taken again in it, so none is lost and won back while a single row is read.
__device__ inline int find_copied(const LayerView& view, int64_t owner) {
  const unsigned ended = static_cast<unsigned>(load_volatile(view.state + kEpoch));
  const int slot = load_volatile(view.table + owner);
  if (slot < 0) return -1;
  const Word word = load_volatile(view.slot_word + slot);
  const bool copied = static_cast<int>(ended - static_cast<unsigned>(word)) >= 0;
  return copied && static_cast<int64_t>(word >> 32) == owner ? slot : -1;
}
__device__ inline bool still_holds(const LayerView& view, int slot, int64_t owner) {
  __threadfence();
  return static_cast<int64_t>(load_volatile(view.slot_word + slot) >> 32) == owner;
}

// Whether `slot` was taken or found for `owner` in this epoch.
__device__ inline bool is_stamped(const LayerView& view, int slot, int64_t owner, unsigned epoch) {
  return slot >= 0 && load_volatile(view.slot_word + slot) == word_of(owner, epoch);
}

// Take the oldest slot of a window for `owner` in each lane with `wanted`; -1 in a lane whose tries
// met only slots in use. Without `evicts` one that holds nothing, or none where a window has no
// such slot. Every lane of the warp must call it.
//
// With `shared`: where several want a slot for one owner in an epoch, the first that the table
// names fills it, and all others get the same; for those it becomes true. What they have taken
// meanwhile ages away. Nobody may find that by an old entry of the table, so a slot which the table
// names for an owner that does not hold it is not taken for him.
__device__ inline int claim_slot(const LayerView& view, bool wanted, int64_t owner, unsigned epoch,
                                 bool evicts = true, bool* shared = nullptr) {
  const int lane = threadIdx.x & 31;
  int found = -1;
  if (view.num_slots == 0) return found;
  bool full = false;
#pragma unroll 1
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    const bool wants = wanted && found < 0 && !full;
    const unsigned wanting = __ballot_sync(kAllLanes, wants);
    if (wanting == 0) break;
    // On its way while the hand is moved.
    int named = wants && shared != nullptr ? load_volatile(view.table + owner) : -1;
    unsigned hand = 0;
    if (lane == 0) {
      hand = atomicAdd(reinterpret_cast<unsigned*>(view.state + kHand),
                       static_cast<unsigned>(kWindow * __popc(wanting)));
    }
    hand = __shfl_sync(kAllLanes, hand, 0);
    if (!wants) continue;
    if (shared != nullptr && is_stamped(view, named, owner, epoch)) {
      *shared = true;
      found = named;
      continue;
    }
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
      if (age > oldest_age && (shared == nullptr || static_cast<int>(slot) != named)) {
        oldest_age = age;
        oldest_word = word;
        oldest_slot = slot;
      }
      slot = slot + 1 == view.num_slots ? 0 : slot + 1;
    }
    // A slot stamped with this epoch has age 0 and is never taken.
    full = !evicts && oldest_word != kEmptySlot;
    if (oldest_age == 0 || full) continue;
    if (atomicCAS(view.slot_word + oldest_slot, oldest_word, word_of(owner, epoch)) !=
        oldest_word) {
      continue;
    }
    found = static_cast<int>(oldest_slot);
    // Only if the table still sends the evicted block here.
    if (oldest_word != kEmptySlot) atomicCAS(view.table + (oldest_word >> 32), found, -1);
    if (shared == nullptr) {
      atomicExch(view.table + owner, found);
      continue;
    }
    for (;;) {
      const int seen = atomicCAS(view.table + owner, named, found);
      if (seen == named) break;
      named = seen;
      if (is_stamped(view, named, owner, epoch)) {
        *shared = true;
        found = named;
        break;
      }
    }
  }
  return found;
}

}  // namespace kcache
