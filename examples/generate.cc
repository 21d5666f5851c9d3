// Decode with an accelerated model in a C++ program that knows nothing of actsparse but the path of its library.
//
// Build and run, with the openvino package of the Python environment:
//
//     OV=$(python -c "import openvino, pathlib; print(pathlib.Path(openvino.__file__).parent)")
//     c++ -std=c++17 -I "$OV/include" generate.cc -o generate "$OV"/libs/libopenvino.so.* -Wl,-rpath,"$OV/libs"
//     ./generate accelerated/openvino_model.xml \
//         "$(python -c 'from actsparse.openvino import extension_path; print(extension_path())')" 32 504 1463
//
// Arguments: the model, the library, how many tokens to generate, and the prompt's tokens. The new tokens are printed.
#include <algorithm>
#include <cstdint>
#include <iostream>
#include <openvino/openvino.hpp>
#include <string>
#include <vector>

// Append tokens to the sequence that the request holds, and return the likeliest next one.
int64_t feed(ov::InferRequest& request, std::vector<int64_t> tokens, size_t past) {
    const size_t count = tokens.size();
    std::vector<int64_t> mask(past + count, 1), positions(count);
    for (size_t i = 0; i < count; ++i) positions[i] = static_cast<int64_t>(past + i);
    std::vector<int32_t> beam(1, 0);
    request.set_tensor("input_ids", ov::Tensor(ov::element::i64, {1, count}, tokens.data()));
    request.set_tensor("attention_mask", ov::Tensor(ov::element::i64, {1, past + count}, mask.data()));
    request.set_tensor("position_ids", ov::Tensor(ov::element::i64, {1, count}, positions.data()));
    request.set_tensor("beam_idx", ov::Tensor(ov::element::i32, {1}, beam.data()));
    request.infer();
    const ov::Tensor logits = request.get_tensor("logits");
    const size_t vocabulary = logits.get_shape()[2];
    const float* last = logits.data<float>() + (logits.get_shape()[1] - 1) * vocabulary;
    return std::max_element(last, last + vocabulary) - last;
}

int main(int argc, char** argv) {
    if (argc < 5) {
        std::cerr << "usage: generate MODEL.xml LIBRARY COUNT TOKEN...\n";
        return 2;
    }
    try {
        ov::Core core;
        core.add_extension(std::string(argv[2]));
        ov::CompiledModel model = core.compile_model(argv[1], "CPU", ov::hint::performance_mode("LATENCY"));
        ov::InferRequest request = model.create_infer_request();
        std::vector<int64_t> prompt;
        for (int i = 4; i < argc; ++i) prompt.push_back(std::stoll(argv[i]));
        const size_t count = std::stoul(argv[3]);
        int64_t token = feed(request, prompt, 0);
        for (size_t i = 0; i < count; ++i) {
            std::cout << token << (i + 1 < count ? " " : "\n");
            if (i + 1 < count) token = feed(request, {token}, prompt.size() + i);
        }
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << "\n";
        return 1;
    }
}
