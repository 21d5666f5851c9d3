// What openvino::Core::add_extension finds in this library.
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>

#include "kernels.hpp"
#include "operations.hpp"

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
