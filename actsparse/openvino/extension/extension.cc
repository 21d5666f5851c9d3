// What openvino::Core::add_extension finds in this library, and what actsparse calls itself.
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <tbb/task_arena.h>

#include "kernels.hpp"
#include "operations.hpp"
#include "reading.hpp"
#include "site_bytes.hpp"

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({
    std::make_shared<ov::OpExtension<actsparse::SparseLinear>>(),
    std::make_shared<ov::OpExtension<actsparse::SparseHead>>(),
    std::make_shared<ov::OpExtension<actsparse::SparseFeedForward>>(),
    std::make_shared<ov::OpExtension<actsparse::GatedFeedForward>>(),
}));

// The name of the kernels that run on this processor, for `actsparse doctor`.
extern "C" __attribute__((visibility("default"))) const char* actsparse_kernels() {
    return actsparse::selected_kernels().name;
}

// How many bytes so many threads read per second, of all rows and of half the rows of so many bytes, for
// `actsparse bench`. False where there is no memory.
extern "C" __attribute__((visibility("default"))) bool actsparse_measure_reading(size_t bytes, size_t threads,
                                                                                 double* speeds) {
    constexpr size_t kRounds = 8;
    tbb::task_arena arena(static_cast<int>(threads));
    const actsparse::ReadingSpeeds best = arena.execute(
        [&] { return actsparse::measure_reading(bytes, kRounds, actsparse::openvino_threads()); });
    speeds[0] = best.all;
    speeds[1] = best.half;
    return best.all > 0;
}
