// multiply_site: all weight types, shapes, modes, instruction sets and thread counts against double precision.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#include "check.hpp"
#include "random_site.hpp"

using namespace actsparse;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Of float sums in different orders, relative to the sum of the terms' absolute values.
constexpr double kOrderError = 1e-6;

enum class Kept { half, few, all, none, zeros };

// Inputs and thresholds that keep so many channels.
std::vector<float> random_input(RandomSite& site, size_t tokens, Kept kept) {
    std::vector<float> x(tokens * site.shape.in);
    for (float& value : x) value = uniform(-3, 3);
    for (float& threshold : site.threshold)
        threshold = kept == Kept::half   ? uniform(1, 2)
                    : kept == Kept::few  ? uniform(2.8f, 3)
                    : kept == Kept::all  ? -1.0f
                    : kept == Kept::none ? kInfinity
                                         : 0.0f;
    if (kept == Kept::zeros)
        for (size_t i = 0; i < x.size(); ++i)
            if (integer(0, 1)) x[i] = i % 2 ? 0.0f : -0.0f;
    return x;
}

// Check outputs against double precision, with the room that rounding of activations to INT8 needs.
void check_result(const RandomSite& site, const Reference& reference, const std::vector<float>& y, bool is_exact,
                  const std::string& what) {
    const size_t out = site.shape.out();
    double squares = 0, expected_squares = 0;
    for (size_t i = 0; i < y.size(); ++i) {
        // Half a step of 1/127 of the largest activation, or of the largest rest after two rounds.
        const double largest = reference.largest[i / out];
        const double half_step = !site.shape.is_integer() ? 0 : is_exact ? largest / 254 / 254 / 254 : largest / 254;
        const double bound = half_step * reference.weight_sum[i] * 1.001 + 3 * kOrderError * reference.magnitude[i] + 1e-30;
        const double error = y[i] - reference.y[i];
        CHECK(std::fabs(error) <= bound, "%s: output %zu of token %zu is %.9g, not %.9g (+- %g)", what.c_str(), i % out,
              i / out, y[i], reference.y[i], bound);
        squares += error * error;
        // The variance of rounding is a third of half a step squared.
        expected_squares += half_step * half_step / 3 * reference.weight_norm[i] +
                            std::pow(kOrderError * reference.magnitude[i], 2);
    }
    // What a wrong weight or a lost channel adds is far more than rounding.
    CHECK(squares <= 9 * expected_squares, "%s: error %g, expected %g", what.c_str(), std::sqrt(squares),
          std::sqrt(expected_squares));
}

void check_equal(const RandomSite& site, const Reference& reference, const std::vector<float>& y,
                 const std::vector<float>& other, const std::string& what) {
    for (size_t i = 0; i < y.size(); ++i)
        CHECK(std::fabs(y[i] - other[i]) <= 1e-30 + kOrderError * 1.1 * reference.magnitude[i],
              "%s: output %zu is %.9g, but by the first way %.9g", what.c_str(), i % site.shape.out(), y[i], other[i]);
}

const char* name_of(Kept kept) {
    const char* const names[] = {"half", "few", "all", "none", "zeros"};
    return names[static_cast<int>(kept)];
}

void test_shape(RandomSite& site, size_t tokens, Kept kept, bool is_every_thread_count) {
    if (is_skipped(9)) return;
    const std::vector<float> x = random_input(site, tokens, kept);
    const Reference reference = compute_reference(site, x, tokens);
    const auto all_kernels = kernels_to_test();
    for (const bool is_exact : {false, true}) {
        const Site saved = site.site(is_exact), packed = site.packed_site(is_exact);
        const auto first = compute(saved, site.shape, x, tokens, portable_kernels, 1);
        for (const Kernels* kernels : all_kernels)
            for (size_t threads = 1; threads <= 3; ++threads) {
                if (!is_every_thread_count && threads != 1 + (tokens + site.shape.in) % 3) continue;
                const auto what = site.shape.name() + ", " + std::to_string(tokens) + " tokens, " + name_of(kept) +
                                  " kept, " + (is_exact ? "exact, " : "") + kernels->name + ", " +
                                  std::to_string(threads) + " threads";
                const auto y = compute(packed, site.shape, x, tokens, *kernels, threads);
                check_result(site, reference, y, is_exact, what);
                // Tiles share activation scales among other channels.
                const bool is_tiled = site.shape.is_integer() && !is_exact && tokens >= kernels->min_tile_tokens;
                if (!is_tiled) check_equal(site, reference, y, first, what);
                if (threads > 1) continue;
                CHECK(y == compute(saved, site.shape, x, tokens, *kernels, threads), "%s: packing changes it", what.c_str());
            }
        if (!site.shape.is_integer()) break;
    }
}

std::vector<Shape> small_shapes() {
    const auto u8 = WeightType::u8, u4 = WeightType::u4, f16 = WeightType::f16, bf16 = WeightType::bf16;
    std::vector<Shape> shapes{
        {u8, 1, {1}},       {u8, 3, {64}},        {u8, 13, {64}},        {u8, 40, {100, 37}}, {u8, 64, {128, 5, 1}},
        {f16, 1, {1}},      {f16, 13, {64}},      {f16, 40, {100, 37}},  {bf16, 7, {65}},     {bf16, 64, {30, 30, 4}},
        {u4, 12, {30}, 12}, {u4, 40, {130}, 8},   {u4, 48, {128}, 24},
    };
    for (const size_t group : {32, 64, 128})
        for (const bool is_f16 : {false, true}) shapes.push_back({u4, 128 + group, {70, 140}, group, is_f16});
    return shapes;
}

// Several panels, the last of them narrow.
std::vector<Shape> large_shapes() {
    const auto u8 = WeightType::u8, u4 = WeightType::u4, f16 = WeightType::f16, bf16 = WeightType::bf16;
    return {{u8, 77, {1000, 60}}, {u8, 250, {2049}},          {f16, 77, {500, 50}},      {bf16, 130, {1030}},
            {u4, 96, {2100}, 32}, {u4, 256, {2048, 1}, 128, true}, {u8, 65, {4000, 1200}}, {bf16, 30, {2100}},
            {u4, 64, {9000}, 32}};
}

}  // namespace

void test_sites() {
    for (const Shape& shape : small_shapes()) {
        RandomSite site(shape);
        for (const size_t tokens : {0, 1, 2, 7, 8, 9})
            for (const Kept kept : {Kept::half, Kept::all}) test_shape(site, tokens, kept, tokens == 1 || tokens == 9);
        for (const size_t tokens : {1, 2, 9})
            for (const Kept kept : {Kept::few, Kept::none, Kept::zeros}) test_shape(site, tokens, kept, false);
        test_shape(site, 37, Kept::half, false);
    }
    for (const Shape& shape : large_shapes()) {
        RandomSite site(shape);
        for (const Kept kept : {Kept::half, Kept::few, Kept::all}) test_shape(site, 1, kept, true);
        for (const size_t tokens : {2, 8, 9, 17}) test_shape(site, tokens, Kept::half, false);
    }
    // More tokens than one block.
    for (const Shape& shape : {Shape{WeightType::u8, 45, {128, 5}}, Shape{WeightType::u4, 64, {200}, 32, true},
                               Shape{WeightType::f16, 45, {64}}}) {
        RandomSite site(shape);
        test_shape(site, 250, Kept::half, true);
    }
}

void test_special_values() {
    for (const Shape& shape : small_shapes()) {
        RandomSite site(shape);
        const size_t in = shape.in, out = shape.out();
        for (const size_t tokens : {1, 3, 11, 19})
            for (const float special : {kNan, kInfinity, -kInfinity})
                for (const bool is_exact : {false, shape.is_integer()})
                    for (const Kernels* kernels : kernels_to_test()) {
                        if (is_skipped(7)) continue;
                        auto x = random_input(site, tokens, Kept::half);
                        const size_t spoilt = tokens / 2;
                        x[spoilt * in + static_cast<size_t>(integer(0, static_cast<int>(in) - 1))] = special;
                        const auto y = compute(site.packed_site(is_exact), shape, x, tokens, *kernels, 2);
                        const Reference reference = compute_reference(site, x, tokens);
                        for (size_t i = 0; i < y.size(); ++i) {
                            const auto what = shape.name() + ", " + kernels->name;
                            if (i / out == spoilt)
                                CHECK(std::isfinite(reference.y[i]) || !std::isfinite(y[i]), "%s: %g becomes %g",
                                      what.c_str(), special, y[i]);
                            else
                                CHECK(std::isfinite(y[i]), "%s: %g spoils another token", what.c_str(), special);
                        }
                    }
        // Denormal activations are as good as none.
        for (const size_t tokens : {1, 3, 11})
            for (const float tiny : {1e-45f, 1e-40f, 1e-31f, 3e-30f}) {
                if (is_skipped(7)) continue;
                auto x = random_input(site, tokens, Kept::all);
                for (float& value : x) value *= tiny;
                const Reference reference = compute_reference(site, x, tokens);
                for (const Kernels* kernels : kernels_to_test()) {
                    const auto y = compute(site.packed_site(true), shape, x, tokens, *kernels, 1);
                    for (size_t i = 0; i < y.size(); ++i)
                        CHECK(std::fabs(y[i] - reference.y[i]) <= 1e-5 * reference.magnitude[i] + 1e-28 * double(in),
                              "%s, %s: denormals become %g", shape.name().c_str(), kernels->name, y[i]);
                }
            }
    }
}

void test_two_callers() {
    for (const Shape& shape : {Shape{WeightType::u8, 130, {1000, 60}}, Shape{WeightType::u4, 128, {300}, 64},
                               Shape{WeightType::f16, 60, {600}}}) {
        RandomSite site(shape);
        for (const size_t tokens : {1, 5, 20}) {
            const auto x = random_input(site, tokens, Kept::half);
            const Site shared = site.site(false);
            std::vector<float> expected(tokens * shape.out()), found[2] = {expected, expected};
            const auto run = [&](std::vector<float>& y, size_t threads) {
                multiply_site(shared, x.data(), tokens, {{y.data(), 0, shape.out()}}, selected_kernels(),
                              std_threads(threads));
            };
            run(expected, 2);
            for (int repeat = 0; repeat < 10; ++repeat) {
                std::thread other([&] { run(found[0], 2); });
                run(found[1], 2);
                other.join();
                for (const auto& y : found) CHECK(y == expected, "%s: two callers disagree", shape.name().c_str());
            }
        }
    }
}
