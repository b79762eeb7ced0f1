#include "session.hpp"

#include <algorithm>
#include <cstring>

#include "error.hpp"

namespace nsm {

Session::Session(const Bundle& bundle, int threads)
    : bundle_(bundle), spec_(bundle.spec()), memory_(spec_), initial_(read_npz(bundle.verified("state_init.npz"))) {
    // OpenVINO computes fp32 models in bf16 on processors that can, unless told otherwise.
    options_ = {ov::hint::inference_precision(ov::element::f32), ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY)};
    if (threads > 0) options_.emplace(ov::inference_num_threads(threads));
    chunked_ = std::any_of(spec_.states.begin(), spec_.states.end(), [](const State& s) { return s.name == "lane.offset"; });
    reset();
}

void Session::reset() {
    memory_.load(spec_, initial_);
    offset_ = 0;
}

void Session::check_tokens(const Array& tokens) const {
    const Tensor& input = spec_.find("step")->inputs.front();
    const Shape wanted(input.shape.begin() + 2, input.shape.end());
    if (tokens.shape.empty() || Shape(tokens.shape.begin() + 1, tokens.shape.end()) != wanted || tokens.dtype != input.dtype) {
        throw Error(Code::input, "The model takes a stream of " + input.dtype + ", each token of shape " + shown(wanted) +
                                     "; given is " + tokens.dtype + shown(tokens.shape) + ".");
    }
    if (!input.minimum || !input.maximum) return;
    for (std::size_t i = 0; i < size_of(tokens.shape); ++i) {
        const auto id = tokens.as<std::int64_t>()[i];
        if (id < *input.minimum || id > *input.maximum) {
            throw Error(Code::input, "Token ids must lie in " + std::to_string(*input.minimum) + " .. " +
                                         std::to_string(*input.maximum) + "; given " + std::to_string(id) + ".");
        }
    }
}

Arrays Session::step(const Array& tokens) {
    return call("step", tokens, spec_.find("step")->inputs.front().shape[1]);
}

Array Session::run(const Array& tokens) {
    check_tokens(tokens);
    const Entry& step = *spec_.find("step");
    const bool decodes = spec_.find("decode") != nullptr;
    const std::size_t length = tokens.shape[0], chunk = step.inputs.front().shape[1];
    const std::size_t width = tokens.bytes.size() / std::max<std::size_t>(length, 1);
    Array results;
    for (std::size_t done = 0; done < length;) {
        std::size_t count = offset_ == 0 ? std::min(chunk, length - done) : 0;
        // A partial call of `step` needs `valid`; so do other lanes that rest.
        if (!step.counted() && (count < chunk || spec_.batch > 1)) count = 0;
        const bool single = count == 0;
        if (single && !decodes) {
            throw Error(Code::input, "This model takes whole calls of " + std::to_string(chunk) + " tokens only.");
        }
        const Entry& used = *spec_.find(single ? "decode" : "step");
        count = single ? 1 : count;
        Array given = zeros(used.inputs.front().dtype, used.inputs.front().shape);
        std::memcpy(given.bytes.data(), tokens.bytes.data() + done * width, count * width);
        commit_full();
        const Array answer = call(used.name, given, count).at(used.outputs.front().name).at(0);
        if (results.dtype.empty()) {
            results = zeros(answer.dtype, answer.shape);
            results.bytes.clear();
            results.shape[0] = length;
        }
        const std::size_t row = answer.bytes.size() / answer.shape[0];
        results.bytes.insert(results.bytes.end(), answer.bytes.begin(),
                             answer.bytes.begin() + static_cast<std::ptrdiff_t>(row * count));
        if (chunked_) offset_ += single ? 1 : count % spec_.chunk_size;
        commit_full();
        done += count;
    }
    return results;
}

Arrays Session::call(const std::string& name, const Array& tokens, std::size_t counted) {
    const Entry& used = *spec_.find(name);
    Arrays inputs{{used.inputs.front().name, tokens}};
    if (used.counted()) {
        Array valid = zeros("int64", {spec_.batch});
        const bool all = counted == used.inputs.front().shape[1] && name == "step" && tokens.shape == used.inputs.front().shape;
        for (std::size_t lane = 0; lane < spec_.batch; ++lane) {
            valid.as<std::int64_t>()[lane] = lane == 0 || all ? static_cast<std::int64_t>(counted) : 0;
        }
        inputs.emplace("valid", std::move(valid));
    }
    return entry(name).run(inputs);
}

void Session::commit_full() {
    if (!chunked_ || offset_ != spec_.chunk_size) return;
    entry("commit").run({});
    offset_ = 0;
}

CompiledEntry& Session::entry(const std::string& name) {
    auto& found = entries_[name];
    if (!found) {
        const auto xml = bundle_.verified(bundle_.openvino_file(name + ".xml"));
        const auto bin = bundle_.verified(bundle_.openvino_file("weights.bin"));
        try {
            auto model = core_.compile_model(core_.read_model(xml.string(), bin.string()), "CPU", options_);
            found = std::make_unique<CompiledEntry>(std::move(model), *spec_.find(name), spec_, memory_);
        } catch (const ov::Exception& error) {
            throw Error(Code::run, "OpenVINO cannot compile " + xml.string() + ": " + error.what());
        }
    }
    return *found;
}

}  // namespace nsm
