#include "tests/kernels/emulator/emulator.h"

#include <ucontext.h>

#include <cstdlib>
#include <deque>
#include <memory>
#include <stdexcept>

#undef threadIdx
#undef blockIdx
#undef gridDim
#undef blockDim

namespace emulator {

struct Fiber {
  ucontext_t context;
  Index thread;
  Block* block;
  Warp* warp;
  unsigned lane;
  int parity = 0;
  uint64_t cluster_generation = 0;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open_group;
};

namespace {

constexpr size_t kStackBytes = 48 * 1024;

struct Machine {
  Index grid, block_dim;
  unsigned cluster = 1;
  const std::function<void()>* kernel = nullptr;
  std::vector<std::unique_ptr<Block>> blocks;  // of the running cluster
  Barrier cluster_barrier;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<uint8_t> stacks;
  std::deque<Fiber*> ready;
  Fiber* current = nullptr;
  unsigned finished = 0;
  ucontext_t scheduler;
} machine;

void yield() {
  swapcontext(&machine.current->context, &machine.scheduler);
}

void fiber_main() {
  (*machine.kernel)();
  ++machine.finished;
  yield();
}

void make_ready(Fiber& fiber, uint8_t* stack) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  machine.ready.push_back(&fiber);
}

// Returns the generation that completes with the last arrival.
uint64_t arrive(Barrier& barrier) {
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    for (Fiber* fiber : barrier.waiting) machine.ready.push_back(fiber);
    barrier.waiting.clear();
  }
  return generation;
}
void wait(Barrier& barrier, uint64_t generation) {
  while (barrier.generation == generation) {
    barrier.waiting.push_back(machine.current);
    yield();
  }
}

}  // namespace

Index thread_index() {
  return machine.current->thread;
}
Index block_index() {
  return machine.current->block->index;
}
Index grid_size() {
  return machine.grid;
}
Index block_size() {
  return machine.block_dim;
}
unsigned block_rank() {
  return machine.current->block->rank;
}
int architecture() {
  static const char* const asked = std::getenv("SPOT_EMULATED_ARCHITECTURE");
  return asked == nullptr ? 90 : std::atoi(asked);
}
unsigned cluster_size() {
  return machine.cluster;
}
unsigned lane() {
  return machine.current->lane;
}
uint8_t* shared_base() {
  return machine.current->block->shared.data();
}
uint8_t* shared_base_of(unsigned rank) {
  return machine.blocks[rank]->shared.data();
}

void block_barrier() {
  Barrier& barrier = machine.current->block->barrier;
  wait(barrier, arrive(barrier));
}
void named_barrier(int id, unsigned threads) {
  Barrier& barrier = machine.current->block->named[id];
  barrier.expected = threads;
  wait(barrier, arrive(barrier));
}
void warp_barrier() {
  Barrier& barrier = machine.current->warp->barrier;
  wait(barrier, arrive(barrier));
}
uint64_t cluster_arrive_barrier() {
  return machine.current->cluster_generation = arrive(machine.cluster_barrier);
}
void cluster_wait_barrier() {
  wait(machine.cluster_barrier, machine.current->cluster_generation);
}

const Slot* exchange(const Slot& mine) {
  Fiber& fiber = *machine.current;
  Slot* slots = fiber.warp->slots[fiber.parity];
  fiber.parity ^= 1;
  slots[fiber.lane] = mine;
  warp_barrier();
  return slots;
}
const Slot* exchange(uint32_t word) {
  return exchange(Slot{{word, 0, 0, 0, 0, 0, 0, 0}});
}

void copy_async(uint8_t* to, const void* from, size_t bytes) {
  machine.current->open_group.push_back({to, from, bytes});
}
void commit_copies() {
  machine.current->groups.push_back(std::move(machine.current->open_group));
  machine.current->open_group.clear();
}
void wait_copies(int pending) {
  auto& groups = machine.current->groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.pop_front();
  }
}

void run(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, const std::function<void()>& kernel) {
  const unsigned threads = block.x, total = threads * cluster;
  machine.grid = {grid.x, grid.y, grid.z};
  machine.block_dim = {block.x, 1, 1};
  machine.cluster = cluster;
  machine.kernel = &kernel;
  machine.stacks.resize(static_cast<size_t>(total) * kStackBytes);
  while (machine.fibers.size() < total) machine.fibers.push_back(std::make_unique<Fiber>());
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned first = 0; first < grid.x; first += cluster) {
        machine.blocks.clear();
        machine.cluster_barrier = Barrier{total, 0, 0, {}};
        machine.finished = 0;
        for (unsigned rank = 0; rank < cluster; ++rank) {
          auto owned = std::make_unique<Block>();
          owned->index = {first + rank, y, z};
          owned->rank = rank;
          owned->shared.assign(shared_bytes + 128, 0xcd);  // poison
          owned->barrier.expected = threads;
          owned->warps.resize((threads + 31) / 32);
          for (Warp& warp : owned->warps) warp.barrier.expected = 32;
          for (unsigned i = 0; i < threads; ++i) {
            Fiber& fiber = *machine.fibers[rank * threads + i];
            fiber.thread = {i, 0, 0};
            fiber.block = owned.get();
            fiber.warp = &owned->warps[i / 32];
            fiber.lane = i % 32;
            fiber.parity = 0;
            fiber.groups.clear();
            fiber.open_group.clear();
            make_ready(fiber, machine.stacks.data() + (rank * threads + i) * kStackBytes);
          }
          machine.blocks.push_back(std::move(owned));
        }
        while (!machine.ready.empty()) {
          machine.current = machine.ready.front();
          machine.ready.pop_front();
          swapcontext(&machine.scheduler, &machine.current->context);
        }
        if (machine.finished != total)
          throw std::runtime_error("emulated kernel stopped at a barrier not all reach");
      }
}

}  // namespace emulator
