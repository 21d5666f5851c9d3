// How work is spread over threads: by OpenVINO's TBB in the extension, by std::thread or not at all in tests.
#pragma once

#include <cstddef>
#include <functional>

namespace actsparse {

struct Threads {
    size_t count;
    // Call body(0) … body(n - 1), in any order, at the same time where possible.
    std::function<void(size_t n, const std::function<void(size_t)>& body)> run;
};

}  // namespace actsparse
