// Mattes a clip with a model that vmq compiled: raw RGB frames of the model's size in, raw 8-bit alpha out.
//
//     g++ -std=c++17 -O2 matte.cc -I include -L lib -lonnxruntime -o matte
//     ./matte rvm_w4a4.onnx < talk.rgb > alpha.gray

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

// The pairs of a flat JSON object of strings, as vmq writes it: {"r1i": "r1o", "r2i": "r2o"}.
std::map<std::string, std::string> pairs_of(const std::string& json) {
    std::vector<std::string> words;
    for (size_t end, at = json.find('"'); at != std::string::npos; at = json.find('"', end + 1)) {
        end = json.find('"', at + 1);
        words.push_back(json.substr(at + 1, end - at - 1));
    }
    std::map<std::string, std::string> pairs;
    for (size_t i = 0; i + 1 < words.size(); i += 2) pairs[words[i]] = words[i + 1];
    return pairs;
}

// What a state that is uint8 begins with, from {"r1i": {"scale": 0.02, "zero_point": 117}, ...}.
int zero_point_of(const std::string& json, const std::string& state) {
    const size_t at = json.find("\"zero_point\":", json.find('"' + state + '"'));
    return at == std::string::npos ? 0 : std::stoi(json.substr(at + 13));
}

// Three numbers of {"mean": [0.5], "std": [0.25, 0.2, 0.3]}: where there is one, it stands for all of them.
std::array<float, 3> numbers_of(const std::string& json, const std::string& name) {
    std::array<float, 3> numbers{};
    const char* at = json.c_str() + json.find('[', json.find('"' + name + '"')) + 1;
    for (size_t i = 0; i < 3; ++i) {
        char* end;
        const double number = std::strtod(at, &end);
        numbers[i] = end != at ? static_cast<float>(number) : numbers[0];
        at = *end == ',' ? end + 1 : end;
    }
    return numbers;
}

int run(const char* path) {
    Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "matte");
    Ort::Session session(env, path, Ort::SessionOptions{});
    Ort::AllocatorWithDefaultOptions allocator;
    const auto metadata = session.GetModelMetadata();
    const auto text = metadata.LookupCustomMetadataMapAllocated("vmq.states", allocator);
    if (!text) throw std::runtime_error("the file has no vmq.states: it was not compiled by vmq");
    const auto pairs = pairs_of(text.get());
    const auto grids = metadata.LookupCustomMetadataMapAllocated("vmq.quantized_states", allocator);
    const auto norm = metadata.LookupCustomMetadataMapAllocated("vmq.normalization", allocator);
    const std::string numbers = norm ? norm.get() : R"({"mean": [0], "std": [1]})";
    const auto mean = numbers_of(numbers, "mean"), deviation = numbers_of(numbers, "std");
    std::map<std::string, std::string> state_of;                                  // output -> the input it feeds
    for (const auto& [input, output] : pairs) state_of[output] = input;

    // The frame is the input [1,3,H,W] that is no state, alpha the output [1,1,H,W] that is none.
    // Before the first frame every state is zero; other inputs (a bound downsample ratio) are ignored.
    std::vector<std::string> input_names, output_names;
    std::vector<Ort::Value> feeds;
    size_t frame = 0, alpha = 0;
    for (size_t i = 0; i < session.GetInputCount(); ++i) {
        input_names.emplace_back(session.GetInputNameAllocated(i, allocator).get());
        const auto type = session.GetInputTypeInfo(i);
        const auto shape = type.GetTensorTypeAndShapeInfo().GetShape();
        const auto element = type.GetTensorTypeAndShapeInfo().GetElementType();
        if (!pairs.count(input_names[i]) && shape.size() == 4 && shape[1] == 3) frame = i;
        feeds.push_back(Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), element));
        const size_t count = feeds[i].GetTensorTypeAndShapeInfo().GetElementCount();
        if (element == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8)
            std::fill_n(feeds[i].GetTensorMutableData<uint8_t>(), count, zero_point_of(grids.get(), input_names[i]));
        else
            std::fill_n(feeds[i].GetTensorMutableData<float>(), count, 0.0f);
    }
    const auto size = feeds[frame].GetTensorTypeAndShapeInfo().GetShape();
    for (size_t i = 0; i < session.GetOutputCount(); ++i) {
        output_names.emplace_back(session.GetOutputNameAllocated(i, allocator).get());
        const auto shape = session.GetOutputTypeInfo(i).GetTensorTypeAndShapeInfo().GetShape();
        if (!state_of.count(output_names[i]) && shape == std::vector<int64_t>{1, 1, size[2], size[3]}) alpha = i;
    }
    std::vector<const char*> inputs, outputs;
    for (const auto& name : input_names) inputs.push_back(name.c_str());
    for (const auto& name : output_names) outputs.push_back(name.c_str());

    const size_t area = size[2] * size[3];
    std::vector<uint8_t> rgb(3 * area), matte(area);
    while (std::fread(rgb.data(), 1, rgb.size(), stdin) == rgb.size()) {
        float* planes = feeds[frame].GetTensorMutableData<float>();               // HWC -> CHW
        for (size_t pixel = 0; pixel < area; ++pixel)
            for (size_t c = 0; c < 3; ++c)
                planes[c * area + pixel] = (rgb[3 * pixel + c] / 255.0f - mean[c]) / deviation[c];
        auto results = session.Run({}, inputs.data(), feeds.data(), inputs.size(), outputs.data(), outputs.size());
        const float* values = results[alpha].GetTensorData<float>();
        for (size_t pixel = 0; pixel < area; ++pixel)
            matte[pixel] = static_cast<uint8_t>(std::floor(values[pixel] * 255.0 + 0.5));
        std::fwrite(matte.data(), 1, matte.size(), stdout);
        for (size_t o = 0; o < results.size(); ++o)
            for (size_t i = 0; i < feeds.size(); ++i)
                if (auto found = state_of.find(output_names[o]); found != state_of.end() &&
                                                                  found->second == input_names[i])
                    feeds[i] = std::move(results[o]);
    }
    return 0;
}

int main(int count, char** arguments) {
    if (count != 2) return std::fprintf(stderr, "matte MODEL.onnx < frames.rgb > alpha.gray\n"), 2;
    try {
        return run(arguments[1]);
    } catch (const std::exception& error) {
        return std::fprintf(stderr, "matte: %s\n", error.what()), 2;
    }
}
