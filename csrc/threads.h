// Threads that are started for one call and joined at its end: tens of microseconds against milliseconds of work, and
// no pool that would have to get along with PyTorch's OpenMP or survive a fork. Whoever waits sleeps: a busy
// neighbour on the machine costs its share of the time and no more.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace repirl {

// Runs `function(worker)` for workers 0 to num_workers - 1 at the same time, the first one on this thread. It must not
// throw.
template <class Function>
void run_workers(int num_workers, const Function &function) {
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(num_workers));
  for (int worker = 1; worker < num_workers; ++worker) threads.emplace_back([&function, worker] { function(worker); });
  function(0);
  for (std::thread &thread : threads) thread.join();
}

// Phases of tasks, one after the other; workers take a phase's tasks as they become free.
class Phases {
 public:
  explicit Phases(int num_workers) : num_workers_(num_workers) {}

  // To be called by every worker with the same number of tasks. Returns when all of them are done.
  template <class Function>
  void run(int64_t num_tasks, const Function &task) {
    for (int64_t index = next_++; index < num_tasks; index = next_++) task(index);
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t phase = phase_;
    if (++num_arrived_ == num_workers_) {
      num_arrived_ = 0;
      next_ = 0;
      ++phase_;
      all_arrived_.notify_all();
    } else {
      all_arrived_.wait(lock, [&] { return phase_ != phase; });
    }
  }

 private:
  const int num_workers_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::condition_variable all_arrived_;
  int num_arrived_ = 0;
  int64_t phase_ = 0;
};

}  // namespace repirl
