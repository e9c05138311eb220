// Threads that are started for one call and joined at its end: tens of microseconds against milliseconds of work, and
// no pool that would have to get along with PyTorch's OpenMP or survive a fork. Whoever waits sleeps: a busy
// neighbour on the machine costs its share of the time and no more.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace repirl {

// Runs `function(worker, n)` for workers 0 to n - 1 at the same time, the first one on this thread; n is num_workers, or
// fewer where the system gives no more threads. `function` must not throw.
template <class Function>
void run_workers(int num_workers, const Function &function) {
  std::mutex mutex;
  std::condition_variable counted;
  int num_running = 0;  // unknown as yet
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(num_workers));
  try {
    for (int worker = 1; worker < num_workers; ++worker)
      threads.emplace_back([&, worker] {
        std::unique_lock<std::mutex> lock(mutex);
        counted.wait(lock, [&] { return num_running > 0; });
        const int num_all = num_running;
        lock.unlock();
        function(worker, num_all);
      });
  } catch (const std::system_error &) {  // those that run do the work of all
  }
  {
    const std::lock_guard<std::mutex> lock(mutex);
    num_running = static_cast<int>(threads.size()) + 1;
  }
  counted.notify_all();
  function(0, static_cast<int>(threads.size()) + 1);
  for (std::thread &thread : threads) thread.join();
}

// Phases of tasks, one after the other; workers take a phase's tasks as they become free.
class Phases {
 public:
  // To be called by every one of `num_workers` with the same number of tasks. Returns when all of them are done.
  template <class Function>
  void run(int num_workers, int64_t num_tasks, const Function &task) {
    for (int64_t index = next_++; index < num_tasks; index = next_++) task(index);
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t phase = phase_;
    if (++num_arrived_ == num_workers) {
      num_arrived_ = 0;
      next_ = 0;
      ++phase_;
      all_arrived_.notify_all();
    } else {
      all_arrived_.wait(lock, [&] { return phase_ != phase; });
    }
  }

 private:
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::condition_variable all_arrived_;
  int num_arrived_ = 0;
  int64_t phase_ = 0;
};

}  // namespace repirl
