// SPDX-License-Identifier: Apache-2.0
// Runs CUDA C++ on the CPU, for tests: every CUDA thread is a fiber, a block is a ring of fibers on
// one OS thread, and barriers, warp collectives, atomics and asynchronous copies do what the
// programming guide promises and no more. Works under AddressSanitizer, ThreadSanitizer and
// UndefinedBehaviorSanitizer, and finds by itself: divergent barriers, deadlocks, collectives whose
// mask is wrong, reads of shared memory that nobody wrote (it starts as NaN) and of copies that
// nobody waited for, and early launches that do not wait for the one before. Needs no CUDA header.
// To add an intrinsic: its twin below, under its own name.
//
// Environment: SIMT_SEED shuffles the order of blocks, SIMT_WORKERS runs blocks on that many
// threads, SIMT_SHARED is how much shared memory a block may ask for.
#pragma once
#if defined(__CUDACC__)
#error "simt.h is for host compilers"
#endif
#if !defined(__x86_64__)
#error "simt_switch knows x86-64 only"
#endif

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#define SIMT_TSAN 1
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = struct SimtStream*;

namespace simt {

// --- what ThreadSanitizer may see ---
// The emulator's own bookkeeping is hidden; only barriers and fences order memory.

#ifdef SIMT_TSAN
struct Quiet {
  Quiet() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
};
inline void order_after(void* point) { __tsan_acquire(point); }
inline void order_before(void* point) { __tsan_release(point); }
#define SIMT_UNSEEN __attribute__((no_sanitize("thread")))
#else
struct Quiet {
  Quiet() {}
  ~Quiet() {}
};
inline void order_after(void*) {}
inline void order_before(void*) {}
#define SIMT_UNSEEN
#endif

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where in the kernel a collective stands.
struct Place {
  const char* file = "?";
  int line = 0;
  bool operator==(const Place& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};
#define SIMT_PLACE ::simt::Place place = {__builtin_FILE(), __builtin_LINE()}

// --- traffic ---

struct Traffic {
  std::atomic<int64_t> launches{0}, loaded{0}, stored{0};
  std::atomic<int64_t> copied{0};     // bytes that were loaded asynchronously
  std::atomic<int64_t> conflicts{0};  // turns that loads of matrices lost
  int threads = 0;                    // of a block of the last launch
  size_t shared = 0;                  // bytes of its shared memory
};

inline std::map<std::string, Traffic>& traffic() {
  static std::map<std::string, Traffic> table;
  return table;
}
// Of the kernel that runs; launches are one after another.
inline Traffic* current_traffic = nullptr;

inline void count_loaded(size_t bytes) {
  if (current_traffic != nullptr) {
    current_traffic->loaded.fetch_add(static_cast<int64_t>(bytes), std::memory_order_relaxed);
  }
}
inline void count_stored(size_t bytes) {
  if (current_traffic != nullptr) {
    current_traffic->stored.fetch_add(static_cast<int64_t>(bytes), std::memory_order_relaxed);
  }
}

// --- threads, warps, blocks ---

constexpr int kWarp = 32;
constexpr size_t kSlot = 32;  // bytes that a lane gives to a collective

struct Collective {
  uint32_t mask = 0, arrived = 0;
  int left = 0;
  bool busy = false, done = false;
  Place place;
  char sync = 0;
  alignas(16) unsigned char value[kWarp][kSlot];
};

struct Barrier {
  int arrived = 0, generation = 0;
  Place place;
  std::unique_ptr<char[]> sync{new char[2]};  // freeing it drops what ThreadSanitizer knows of it
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  size_t zeros;  // the last of them, which are not read
};

struct Block;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  size_t size = 0;
  uint3 index{};
  int lane = 0, warp = 0;
  Block* block = nullptr;
  bool live = false;
  bool awaited = true;  // the launch before this one has ended, as far as this thread may know
  Place place;
  const void* waits_for = nullptr;
  const char* waits_in = "";
  void *asan_stack = nullptr, *tsan = nullptr;
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  uint32_t alive = 0;
  std::deque<Collective> collectives;
};

struct Block {
  uint3 index{};
  dim3 size, grid;
  int threads = 0, alive = 0;
  bool early = false;
  Barrier barrier;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
};

// The block that one OS thread runs, and its fibers.
struct Machine {
  Block block;
  std::vector<Fiber*> fibers, ring;
  size_t head = 0, tail = 0;
  Fiber** ring_data = nullptr;  // raw, for it is also used where ThreadSanitizer looks
  size_t ring_size = 1;
  std::function<void()> body;
  std::string error;
};

inline thread_local Fiber *current = nullptr, *host = nullptr;
inline thread_local Machine* machine = nullptr;
inline char end_point, fence_point;

inline Block& block() { return *current->block; }

// --- switching ---

// Saves the callee-saved registers, stores the stack pointer to *save, goes on at `to`.
__attribute__((naked, noinline)) inline void simt_switch(void** /*save*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
      "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
      "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
}

#if defined(SIMT_ASAN) || defined(SIMT_TSAN)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif

SIMT_UNSEEN inline void jump(Fiber* to) {
  Fiber* from = current;
  current = to;
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(&from->asan_stack, to->stack, to->size);
#endif
#ifdef SIMT_TSAN
  __tsan_switch_to_fiber(to->tsan, __tsan_switch_to_fiber_no_sync);
#endif
  simt_switch(&from->stack_pointer, to->stack_pointer);
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(from->asan_stack, nullptr, nullptr);
#endif
}

SIMT_UNSEEN inline void wake(Fiber* fiber) {
  fiber->waits_for = nullptr;
  machine->ring_data[machine->tail++ % machine->ring_size] = fiber;
}

// Goes on with somebody else; with the host if nobody can.
SIMT_UNSEEN inline void next() {
  Machine& m = *machine;
  Fiber* to = m.head == m.tail ? host : m.ring_data[m.head++ % m.ring_size];
  if (to != current) jump(to);
}

[[noreturn]] inline void fail(const std::string& message) {
  const uint3 &b = block().index, &t = current->index;
  char where[120];
  std::snprintf(where, sizeof where, " [block (%u,%u,%u) thread (%u,%u,%u)]", b.x, b.y, b.z, t.x,
                t.y, t.z);
  if (machine->error.empty()) machine->error = message + where;
  machine->head = machine->tail;
  jump(host);
  std::abort();
}

// --- launches that start early ---

SIMT_UNSEEN inline void await_previous() { current->awaited = true; }
SIMT_UNSEEN inline void expect_awaited() {
  if (!current->awaited) fail("early launch: goes on before await_previous");
}

// --- collectives ---

inline void release(Barrier& barrier) {
  barrier.arrived = 0;
  barrier.generation++;
  for (Fiber* fiber : machine->fibers) {
    if (fiber->live && fiber->waits_for == &barrier) wake(fiber);
  }
}

inline void wait_at(Barrier& barrier, int needed, Place place) {
  Quiet quiet;
  char* point = &barrier.sync[barrier.generation & 1];
  order_before(point);
  if (barrier.arrived == 0) {
    barrier.place = place;
  } else if (!(barrier.place == place)) {
    fail("divergent barrier: " + place.text() + " while others wait at " + barrier.place.text());
  }
  current->place = place;
  current->waits_in = "barrier";
  if (++barrier.arrived == needed) {
    release(barrier);
  } else {
    current->waits_for = &barrier;
    next();
  }
  order_after(point);
}

// Gives `bytes` to the collective at `place`, and returns when every lane of `mask` has.
inline Collective& meet(uint32_t mask, const void* value, size_t bytes, Place place,
                        bool orders = false) {
  Warp& warp = block().warps[current->warp];
  const uint32_t bit = 1u << current->lane;
  const auto wrong = [&](const char* why) { fail("warp collective " + place.text() + ": " + why); };
  if ((mask & bit) == 0) wrong("the calling lane is not in its mask");
  if ((mask & ~warp.alive) != 0) wrong("the mask names exited or missing lanes");
  Collective *joined = nullptr, *unused = nullptr;
  for (Collective& one : warp.collectives) {
    if (!one.busy) {
      unused = &one;
    } else if (!one.done && one.mask == mask && one.place == place && (one.arrived & bit) == 0) {
      joined = &one;
      break;
    }
  }
  if (joined == nullptr) {
    if (unused == nullptr) unused = &warp.collectives.emplace_back();
    joined = unused;
    joined->mask = mask;
    joined->arrived = 0;
    joined->left = 0;
    joined->done = false;
    joined->busy = true;
    joined->place = place;
  }
  if (bytes > 0) std::memcpy(joined->value[current->lane], value, bytes);
  joined->arrived |= bit;
  joined->left++;
  if (orders) order_before(&joined->sync);
  current->place = place;
  current->waits_in = "warp collective";
  if (joined->arrived == mask) {
    joined->done = true;
    for (int lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1) != 0 && lane != current->lane) {
        wake(machine->fibers[static_cast<size_t>(current->warp * kWarp + lane)]);
      }
    }
  } else {
    current->waits_for = joined;
    next();
  }
  if (orders) order_after(&joined->sync);
  return *joined;
}

// function(get) of what the lanes gave: get(lane).
template <typename T, typename Function>
auto collective(uint32_t mask, const T& value, Place place, const Function& function) {
  static_assert(sizeof(T) <= kSlot, "a collective passes up to 32 bytes");
  Quiet quiet;
  Collective& one = meet(mask, &value, sizeof value, place);
  const auto result = function([&](int lane) {
    if ((mask >> lane & 1) == 0) {
      fail("warp collective " + place.text() + ": reads a lane outside its mask");
    }
    T given;
    std::memcpy(&given, one.value[lane], sizeof given);
    return given;
  });
  if (--one.left == 0) one.busy = false;
  return result;
}

// --- running a grid ---

// A CUDA thread has returned from the kernel.
inline void finish() {
  {
    Quiet quiet;
    expect_awaited();
    current->live = false;
    order_before(&end_point);
    Block& here = block();
    here.warps[current->warp].alive &= ~(1u << current->lane);
    here.alive--;
    if (here.barrier.arrived > 0 && here.barrier.arrived == here.alive) release(here.barrier);
  }
  next();  // comes back when the fiber becomes another CUDA thread
}

inline void fiber_main() {
#ifdef SIMT_ASAN
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (host->stack == nullptr) {  // the first fiber is entered from the host
    host->stack = static_cast<char*>(const_cast<void*>(bottom));
    host->size = size;
  }
#endif
  for (;;) {
    machine->body();
    finish();
  }
}

// Maps the stack, or maps it anew, and puts the entry's frame on it.
inline void prepare(Fiber& fiber, bool again) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (again ? MAP_FIXED : 0);
  void* map = mmap(again ? fiber.stack : nullptr, kStack, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (map == MAP_FAILED) throw Error("simt: no memory for stacks");
  fiber.stack = static_cast<char*>(map);
  fiber.size = kStack;
  if (!again) mprotect(map, 4096, PROT_NONE);
  void** frame = reinterpret_cast<void**>(fiber.stack + kStack) - 2;
  frame[0] = reinterpret_cast<void*>(fiber_main);
  frame[1] = nullptr;
  fiber.stack_pointer = frame - 6;
}

class Pool {
 public:
  Fiber& at(size_t i) {
    if (i == fibers_.size()) {
      fibers_.push_back(std::make_unique<Fiber>());
      prepare(*fibers_[i], false);
    }
    return *fibers_[i];
  }
  // After a fault: stacks are not unwound, so what they hold stays.
  void abandon() {
    static auto* abandoned = new std::vector<std::unique_ptr<Fiber>>;
    static std::mutex guard;
    const std::lock_guard<std::mutex> lock(guard);
    for (auto& fiber : fibers_) abandoned->push_back(std::move(fiber));
    fibers_.clear();
  }

 private:
  std::vector<std::unique_ptr<Fiber>> fibers_;
};

#ifdef SIMT_TSAN
// A fresh clock for each CUDA thread, so that nothing orders two blocks. A destroyed context takes
// its history with it, and a report would be dropped: the last 4,000 stay.
inline void renew_clock(Fiber& fiber, const Block& block, int thread) {
  static thread_local std::deque<void*> retired;
  if (fiber.tsan != nullptr) {
    retired.push_back(fiber.tsan);
    prepare(fiber, true);
  }
  if (retired.size() > 4000) {
    __tsan_destroy_fiber(retired.front());
    retired.pop_front();
  }
  fiber.tsan = __tsan_create_fiber(0);
  char name[48];
  std::snprintf(name, sizeof name, "block %u thread %d", block.index.x, thread);
  __tsan_set_fiber_name(fiber.tsan, name);
}
#endif

inline std::string deadlock(const Machine& m) {
  std::string message = "deadlock: " + std::to_string(m.block.alive) + " threads wait;";
  int shown = 0;
  for (const Fiber* fiber : m.fibers) {
    if (!fiber->live || shown++ == 4) continue;
    message += " thread " + std::to_string(fiber->index.x) + " in " + fiber->waits_in + " " +
               fiber->place.text() + ";";
  }
  return message;
}

inline void run_block(Pool& pool, Machine& m) {
  static thread_local Fiber own;
  {
    Quiet quiet;
    host = current = &own;
    machine = &m;
    m.error.clear();
    Block& b = m.block;
    m.fibers.clear();
    m.ring.resize(static_cast<size_t>(b.threads) + 1);
    m.ring_data = m.ring.data();
    m.ring_size = m.ring.size();
    m.head = m.tail = 0;
    b.alive = b.threads;
    b.barrier = Barrier();
    b.warps.clear();
    b.warps.resize(static_cast<size_t>(b.threads + kWarp - 1) / kWarp);
    for (int t = 0; t < b.threads; ++t) {
      Fiber& fiber = pool.at(static_cast<size_t>(t));
      const auto u = static_cast<unsigned>(t);
      fiber.block = &b;
      fiber.index = {u % b.size.x, u / b.size.x % b.size.y, u / (b.size.x * b.size.y)};
      fiber.lane = t % kWarp;
      fiber.warp = t / kWarp;
      fiber.live = true;
      fiber.awaited = !b.early;
      fiber.copies.clear();
      fiber.groups.clear();
      b.warps[fiber.warp].alive |= 1u << fiber.lane;
#ifdef SIMT_TSAN
      renew_clock(fiber, b, t);
#endif
      m.fibers.push_back(&fiber);
    }
    for (Fiber* fiber : m.fibers) wake(fiber);
#ifdef SIMT_TSAN
    own.tsan = __tsan_get_current_fiber();
#endif
    next();
  }
  Quiet quiet;
  if (m.error.empty() && m.block.alive > 0) m.error = deadlock(m);
  machine = nullptr;
  if (m.error.empty()) return;
  pool.abandon();
  throw Error(m.error);
}

inline uint64_t environment(const char* name, uint64_t fallback) {
  const char* value = std::getenv(name);
  return value == nullptr ? fallback : std::strtoull(value, nullptr, 0);
}

// Of a block on the device that is emulated, with and without asking: an A100's.
inline size_t most_shared() { return environment("SIMT_SHARED", 166912); }
constexpr size_t kSharedUnasked = 49152;

inline std::map<std::string, size_t>& asked_shared() {
  static std::map<std::string, size_t> table;
  return table;
}
inline void allow_shared(const char* name, size_t bytes) {
  if (bytes > most_shared()) throw Error(std::string("simt: too much shared memory for ") + name);
  asked_shared()[name] = bytes;
}
inline size_t allowed_shared(const char* name) {
  const auto asked = asked_shared().find(name);
  return asked == asked_shared().end() ? kSharedUnasked : std::max(kSharedUnasked, asked->second);
}

struct Grid {
  dim3 blocks, threads;
  size_t shared = 0;
  bool early = false;  // may start before the launch before it has ended
};

template <typename Body>
void launch(const char* name, const Grid& grid, const Body& body) {
  const size_t count = size_t{grid.blocks.x} * grid.blocks.y * grid.blocks.z;
  const auto threads = static_cast<int>(grid.threads.x * grid.threads.y * grid.threads.z);
  if (threads < 1 || threads > 1024 || count == 0 || grid.shared > allowed_shared(name) ||
      grid.blocks.y > 65535 || grid.blocks.z > 65535) {
    throw Error(std::string("simt: bad launch of ") + name);
  }
  // Without template arguments, and the parentheses that keep them together.
  const char* bare = name + (name[0] == '(' ? 1 : 0);
  current_traffic = &traffic()[std::string(bare, std::strcspn(bare, "<"))];
  current_traffic->launches.fetch_add(1, std::memory_order_relaxed);
  current_traffic->threads = threads;
  current_traffic->shared = grid.shared;
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  if (const uint64_t seed = environment("SIMT_SEED", 0)) {
    std::mt19937_64 random(seed);
    std::shuffle(order.begin(), order.end(), random);
  }
  std::atomic<size_t> taken{0};
  std::mutex guard;
  std::string error;
  const auto work = [&] {
    static thread_local Pool pool;
    Machine m;
    m.body = body;
    try {
      for (size_t i; (i = taken++) < count;) {
        {
          Quiet quiet;
          const size_t id = order[i];
          const size_t layer = size_t{grid.blocks.x} * grid.blocks.y;
          m.block.index = {static_cast<unsigned>(id % grid.blocks.x),
                           static_cast<unsigned>(id / grid.blocks.x % grid.blocks.y),
                           static_cast<unsigned>(id / layer)};
          m.block.size = grid.threads;
          m.block.grid = grid.blocks;
          m.block.threads = threads;
          m.block.early = grid.early;
          void* shared = nullptr;
          if (grid.shared > 0 && posix_memalign(&shared, 128, grid.shared) != 0) {
            throw Error("simt: out of memory");
          }
          if (shared != nullptr) std::memset(shared, 0xFF, grid.shared);  // NaN
          m.block.shared = static_cast<unsigned char*>(shared);
        }
        run_block(pool, m);
        Quiet quiet;
        std::free(std::exchange(m.block.shared, nullptr));
      }
    } catch (const Error& thrown) {
      std::free(std::exchange(m.block.shared, nullptr));
      const std::lock_guard<std::mutex> lock(guard);
      error = thrown.what();
      taken = count;
    }
    order_after(&end_point);
  };
  const auto workers = static_cast<int>(environment("SIMT_WORKERS", 1));
  if (workers <= 1 || count == 1) {
    work();
  } else {
    std::vector<std::thread> team;
    for (int i = 0; i < workers; ++i) team.emplace_back(work);
    for (std::thread& one : team) one.join();
  }
  order_after(&end_point);
  if (!error.empty()) throw Error(std::string(name) + ": " + error);
}

}  // namespace simt

#define threadIdx (::simt::current->index)
#define blockIdx (::simt::block().index)
#define blockDim (::simt::block().size)
#define gridDim (::simt::block().grid)

// --- synchronisation and warp collectives ---

inline void __syncthreads(SIMT_PLACE) {
  simt::wait_at(simt::block().barrier, simt::block().alive, place);
}
inline void __syncwarp(uint32_t mask = ~0u, SIMT_PLACE) {
  simt::Quiet quiet;
  simt::Collective& one = simt::meet(mask, nullptr, 0, place, true);
  if (--one.left == 0) one.busy = false;
}
inline void __threadfence() {
  simt::order_after(&simt::fence_point);
  simt::order_before(&simt::fence_point);
}
template <typename T>
T __shfl_sync(uint32_t mask, T value, int from, SIMT_PLACE) {
  return simt::collective(mask, value, place, [&](auto get) { return get(from & 31); });
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, SIMT_PLACE) {
  const int lane = simt::current->lane;
  return simt::collective(mask, value, place, [&](auto get) { return get(lane ^ bits); });
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned by, SIMT_PLACE) {
  const int lane = simt::current->lane;
  const int from = lane - static_cast<int>(by) < 0 ? lane : lane - static_cast<int>(by);
  return simt::collective(mask, value, place, [&](auto get) { return get(from); });
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, SIMT_PLACE) {
  return simt::collective(mask, predicate, place, [&](auto get) {
    uint32_t votes = 0;
    for (int lane = 0; lane < simt::kWarp; ++lane) {
      if ((mask >> lane & 1) != 0 && get(lane) != 0) votes |= 1u << lane;
    }
    return votes;
  });
}

// --- atomics: relaxed, as on the device ---

inline unsigned atomicAdd(unsigned* at, unsigned value) {
  simt::expect_awaited();
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
inline unsigned atomicExch(unsigned* at, unsigned value) {
  return __atomic_exchange_n(at, value, __ATOMIC_RELAXED);
}

// --- numbers ---

using std::isfinite;
using std::isinf;
using std::isnan;

inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
