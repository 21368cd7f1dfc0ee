// SPDX-License-Identifier: Apache-2.0
// Runs thread blocks: see cuda_runtime.h.
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cuda_runtime.h"

namespace emulator {

thread_local Index thread_index, block_index;
thread_local Index grid_size, block_size;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr unsigned char kPoison = 0xff;  // NaN, or -1
constexpr unsigned kMostHostThreads = 4;

enum class State { kReady, kAtBarrier, kAtWarpBarrier, kEnded };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Thread {
  std::vector<std::vector<Copy>> copies;  // groups, the last of which is not committed
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  bool started;
  int site;
  unsigned exchanges;  // counts, so that two buffers take turns
};

struct Warp {
  uint64_t words[2][32];
  bool rests;
};

// The thread block of a host thread.
class ThreadBlock {
 public:
  // Empty when all threads ended; otherwise what went wrong.
  std::string run(unsigned num_threads, const std::function<void()>& body, unsigned seed) {
    body_ = &body;
    num_threads_ = num_threads;
    for (auto& [line, memory] : shared_) std::fill(memory.begin(), memory.end(), kPoison);
    warps_.assign((num_threads + 31) / 32, Warp{});
    while (threads_.size() < num_threads) threads_.push_back(std::make_unique<Thread>());
    order_.resize(num_threads);
    for (unsigned i = 0; i < num_threads; ++i) {
      order_[i] = i;
      Thread& thread = *threads_[i];
      thread.state = State::kReady;
      thread.started = false;
      thread.exchanges = 0;
      thread.copies.assign(1, {});
      getcontext(&thread.start);
      thread.start.uc_stack.ss_sp = thread.stack.get();
      thread.start.uc_stack.ss_size = kStackBytes;
      thread.start.uc_link = nullptr;
      makecontext(&thread.start, &ThreadBlock::enter, 0);
    }
    random_.seed(seed);
    draw_rests();
    while (true) {
      // Between two barriers any order is right.
      std::shuffle(order_.begin(), order_.end(), random_);
      bool waits = false;
      for (unsigned i : order_) {
        if (threads_[i]->state != State::kReady) continue;
        if (warps_[i / 32].rests) {
          waits = true;
          continue;
        }
        resume(i);
      }
      if (ended() == num_threads_) break;
      if (const std::string error = release(waits); !error.empty()) return error;
    }
    for (const auto& [line, memory] : shared_) {
      if (std::any_of(memory.end() - kGuardBytes, memory.end(),
                      [](unsigned char byte) { return byte != kPoison; })) {
        return "wrote past the shared memory of line " + std::to_string(line);
      }
    }
    return {};
  }

  void wait(State state, int site) {
    Thread& thread = *threads_[current_];
    thread.state = state;
    thread.site = site;
    if (!_setjmp(thread.resume)) _longjmp(scheduler_, 1);
  }
  void publish(uint64_t value) {
    Thread& thread = *threads_[current_];
    warps_[current_ / 32].words[++thread.exchanges & 1][current_ % 32] = value;
    wait(State::kAtWarpBarrier, 0);
  }
  uint64_t published(unsigned lane) const {
    return warps_[current_ / 32].words[threads_[current_]->exchanges & 1][lane];
  }
  unsigned lane() const { return current_ % 32; }
  Thread& current() { return *threads_[current_]; }
  void* shared(int line, size_t bytes) {
    std::vector<unsigned char>& memory = shared_[line];
    if (memory.empty()) memory.assign(bytes + kGuardBytes, kPoison);
    return memory.data();
  }

  static thread_local ThreadBlock* running;

 private:
  // Warps that stay where they are until the others can go no farther.
  void draw_rests() {
    for (Warp& warp : warps_) warp.rests = random_() % 2 == 0;
  }

  static void enter() {
    ThreadBlock& block = *running;
    (*block.body_)();
    block.threads_[block.current_]->state = State::kEnded;
    _longjmp(block.scheduler_, 1);
  }

  void resume(unsigned index) {
    current_ = index;
    thread_index = {index, 0, 0};
    Thread& thread = *threads_[index];
    if (_setjmp(scheduler_)) return;
    if (thread.started) _longjmp(thread.resume, 1);
    thread.started = true;
    setcontext(&thread.start);
  }

  unsigned ended() const {
    unsigned count = 0;
    for (unsigned i = 0; i < num_threads_; ++i) count += threads_[i]->state == State::kEnded;
    return count;
  }

  // Let threads go on whose barrier all have reached. An error when there are none, and nobody
  // waits for a turn.
  std::string release(bool waits) {
    bool some = false;
    for (unsigned warp = 0; warp < warps_.size(); ++warp) {
      const unsigned first = warp * 32, last = std::min(first + 32, num_threads_);
      unsigned there = 0;
      for (unsigned i = first; i < last; ++i) {
        there += threads_[i]->state == State::kAtWarpBarrier;
      }
      if (there < 32) continue;  // a mask of all lanes names those that ended, too
      for (unsigned i = first; i < last; ++i) threads_[i]->state = State::kReady;
      some = true;
    }
    if (some) return {};
    if (waits) {
      for (Warp& warp : warps_) warp.rests = false;
      return {};
    }
    int site = -1;
    for (unsigned i = 0; i < num_threads_; ++i) {
      const Thread& thread = *threads_[i];
      if (thread.state == State::kEnded) continue;
      if (thread.state != State::kAtBarrier) {
        return "thread " + std::to_string(i) + " waits for lanes that do not come";
      }
      if (site >= 0 && thread.site != site) {
        return "barriers of lines " + std::to_string(site) + " and " + std::to_string(thread.site) +
               " at the same time";
      }
      site = thread.site;
    }
    for (unsigned i = 0; i < num_threads_; ++i) {
      if (threads_[i]->state == State::kAtBarrier) threads_[i]->state = State::kReady;
    }
    draw_rests();
    return {};
  }

  const std::function<void()>* body_ = nullptr;
  unsigned num_threads_ = 0, current_ = 0;
  std::map<int, std::vector<unsigned char>> shared_;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<unsigned> order_;
  std::minstd_rand random_;
  jmp_buf scheduler_;
};

thread_local ThreadBlock* ThreadBlock::running = nullptr;

std::atomic<unsigned> launches{0};
std::atomic<long long> clock_ns{0}, clock_step_ns{1000};
thread_local cudaError_t error_of_launch = cudaSuccess;

}  // namespace

void sync_threads(int site) {
  ThreadBlock::running->wait(State::kAtBarrier, site);
}
void sync_warp() {
  ThreadBlock::running->wait(State::kAtWarpBarrier, 0);
}
void publish(uint64_t value) {
  ThreadBlock::running->publish(value);
}
uint64_t published(unsigned lane) {
  return ThreadBlock::running->published(lane);
}
unsigned lane() {
  return ThreadBlock::running->lane();
}
void copy_async(void* to, const void* from, size_t bytes) {
  std::memset(to, kPoison, bytes);
  ThreadBlock::running->current().copies.back().push_back({to, from, bytes});
}
void commit_copies() {
  ThreadBlock::running->current().copies.emplace_back();
}
void wait_for_copies(unsigned pending) {
  std::vector<std::vector<Copy>>& groups = ThreadBlock::running->current().copies;
  for (; groups.size() > pending + 1; groups.erase(groups.begin())) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
  }
}
void* shared_memory(int line, size_t bytes) {
  return ThreadBlock::running->shared(line, bytes);
}

long long now_ns() {
  return clock_ns += clock_step_ns;
}

cudaError_t last_error() {
  const cudaError_t error = error_of_launch;
  error_of_launch = cudaSuccess;
  return error;
}

cudaError_t run(dim3 grid, unsigned threads, const std::function<void()>& thread) {
  constexpr unsigned kMost = 65535;
  if (threads == 0 || threads > 1024 || threads % 32 != 0 || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || grid.y > kMost || grid.z > kMost) {
    return error_of_launch = cudaErrorInvalidValue;
  }
  const unsigned blocks = grid.x * grid.y * grid.z, seed = launches.fetch_add(1);
  std::minstd_rand random(seed + 1);
  const unsigned host_threads = 1 + random() % kMostHostThreads;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  std::atomic<unsigned> next{0};
  std::atomic<bool> failed{false};
  const auto work = [&] {
    ThreadBlock block;
    ThreadBlock::running = &block;
    grid_size = {grid.x, grid.y, grid.z};
    block_size = {threads, 1, 1};
    for (unsigned i; !failed && (i = next.fetch_add(1)) < blocks;) {
      block_index = {order[i] % grid.x, order[i] / grid.x % grid.y, order[i] / (grid.x * grid.y)};
      const std::string error = block.run(threads, thread, seed * 65537u + i + 1);
      if (!error.empty()) {
        std::fprintf(stderr, "thread block %u: %s\n", order[i], error.c_str());
        failed = true;
      }
    }
  };
  std::vector<std::thread> workers;
  for (unsigned i = 0; i < host_threads; ++i) workers.emplace_back(work);
  for (std::thread& worker : workers) worker.join();
  return error_of_launch = failed ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace emulator

// For tests: how far the clock goes each time that a kernel reads it; 0 stops it.
extern "C" void emulator_set_clock_step(long long ns) {
  emulator::clock_step_ns = ns;
}
