// A pool of persistent threads: a team of fixed size runs one function together, with barriers inside it.
//
// A waiting thread spins briefly and then sleeps: a forward pass crosses a barrier every few microseconds, and between
// two tokens there is only the sampling, but an idle engine must not hold a core. With more threads than cores no thread
// spins. Work is cut into static ranges by thread number, so that which thread computes what depends on the number of
// threads alone.

#pragma once

#include <stdint.h>

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace bitnet {

class Pool;

constexpr int kMaxThreads = 1024;  // more than any machine has cores; each costs a stack and scratch memory

// One thread's view of a running team.
class Team {
  public:
    Team(Pool& pool, int thread, int threads) : thread(thread), threads(threads), pool_(pool) {}

    // Returns once every thread of the team has called it.
    void barrier();

    // This thread's range [begin, end) of n items.
    int64_t begin(int64_t n) const { return n * thread / threads; }
    int64_t end(int64_t n) const { return n * (thread + 1) / threads; }

    const int thread, threads;

  private:
    Pool& pool_;
};

class Pool {
  public:
    // `threads`: 1 to kMaxThreads, the caller of `run` included. Throws std::invalid_argument for other numbers, and if
    // the system starts fewer threads; those that did start have then ended.
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    // Run `work` on every thread; returns when all are done. One caller at a time, and `work` must not throw.
    void run(const std::function<void(Team&)>& work);

    int threads() const { return threads_; }

  private:
    friend class Team;
    void start();
    void stop();
    void abandon_workers();
    void serve(int thread, uint32_t seen);
    void arrive(std::atomic<uint32_t>& phase, std::atomic<uint32_t>& count);

    int threads_;
    int job_spins_ = 0, barrier_spins_ = 0;  // tries before a thread sleeps
    int process_;  // workers do not survive a fork: the child starts its own
    std::vector<std::thread> workers_;
    const std::function<void(Team&)>* work_ = nullptr;
    alignas(64) std::atomic<uint32_t> job_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<uint32_t> count_{0};
    std::atomic<bool> stopping_{false};
};

}  // namespace bitnet
