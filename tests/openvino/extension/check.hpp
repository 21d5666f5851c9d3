// What the tests share: a check that ends the program, random numbers, and threads without TBB.
#pragma once

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels.hpp"
#include "threads.hpp"

// Print a formatted message and end the program where `condition` does not hold.
#define CHECK(condition, ...)                                                  \
    do {                                                                       \
        if (!(condition)) {                                                    \
            std::fprintf(stderr, "%s:%d: not %s: ", __FILE__, __LINE__, #condition); \
            std::fprintf(stderr, __VA_ARGS__);                                 \
            std::fputc('\n', stderr);                                          \
            std::exit(1);                                                      \
        }                                                                      \
    } while (false)

inline std::mt19937& generator() {
    static std::mt19937 g(1);
    return g;
}

inline float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(generator()); }

inline int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator()); }

// Whether only some of many cases run: an emulator is slow.
inline bool is_hurried = false;

// What is tested: all that runs here; in a hurry the best alone, as each is the best of some processor.
inline std::vector<const actsparse::Kernels*> kernels_to_test() {
    auto kernels = actsparse::available_kernels();
    if (is_hurried) kernels.resize(1);
    return kernels;
}

// Whether a case is to be left out then: all but one in `stride`, which shares no divisor with the lengths of the loops
// over cases, so that all that they go through comes up.
inline bool is_skipped(size_t stride) {
    static size_t cases = 0;
    return is_hurried && cases++ % stride != 0;
}

inline actsparse::Threads std_threads(size_t count) {
    return {count, [count](size_t n, const std::function<void(size_t)>& body) {
                std::atomic<size_t> next{0};
                const auto work = [&] {
                    for (size_t i; (i = next++) < n;) body(i);
                };
                std::vector<std::thread> others;
                for (size_t t = 1; t < count; ++t) others.emplace_back(work);
                work();
                for (std::thread& other : others) other.join();
            }};
}

void test_elementwise();
void test_float16();
void test_lists();
void test_packing();
void test_reading();
void test_rows();
void test_sites();
void test_special_values();
void test_two_callers();
