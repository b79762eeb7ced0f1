#include "session.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "error.hpp"
#include "processor.hpp"

namespace nsm {
namespace {

// A call of `step` takes about as long as `decode` takes for this share of a chunk: 1 / 4.
constexpr std::size_t decodes_per_step = 4;

// Returns the first `count` tokens of the first lane.
void check_finite(const Arrays& outputs, std::size_t count) {
    for (const auto& [name, value] : outputs) {
        if (value.dtype != "float32") continue;
        const auto* first = value.as<float>();
        const std::size_t numbers = size_of(value.shape) / (value.shape[0] * value.shape[1]) * count;
        if (!std::all_of(first, first + numbers, [](float number) { return std::isfinite(number); })) {
            throw Error(Code::run, "The output " + name + " contains NaN or infinite numbers. Check the weights and the inputs.");
        }
    }
}

// Checked before allocating memory by the manifest's shapes: the file size bounds the allocation.
Arrays initial_of(const Bundle& bundle) {
    Arrays arrays = read_npz(bundle.verified("state_init.npz"));
    check_values(bundle.spec(), arrays);
    return arrays;
}

}  // namespace

Session::Session(const Bundle& bundle, int threads)
    : bundle_(bundle),
      spec_(bundle.spec()),
      threads_(threads == 0 && bundle.small_step() ? 1 : threads),
      initial_(initial_of(bundle)),
      memory_(spec_) {
    bundle_.openvino_file("step.xml");  // throws if the bundle has no OpenVINO artifact
    if (bundle_.needs_dot_products() && !int8_dot_products().value_or(true)) {
        throw Error(Code::missing,
                    "This int8 artifact was built with --device cpu-dot, for processors with VNNI (or dotprod on Arm). The "
                    "processor of this machine has neither, so its sums would saturate. Build it for any processor: nsm build BUNDLE "
                    "--target openvino --precision int8 --force");
    }
    // By default OpenVINO computes fp32 models in bf16 on processors with bf16.
    options_ = {ov::hint::inference_precision(ov::element::f32), ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY)};
    for (const auto& [name, value] : bundle_.compile_options()) options_.emplace(name, value);
    if (threads_ > 0) options_.emplace(ov::inference_num_threads(threads_));
    chunked_ = std::any_of(spec_.states.begin(), spec_.states.end(), [](const State& s) { return s.name == "lane.offset"; });
    reset();
    entry("step");  // opened here, before its spec decides the memory for tokens
}

void Session::reset() {
    memory_.load(spec_, initial_);
    offset_ = used_ = 0;
}

std::optional<std::size_t> Session::tokens_left() const {
    return spec_.capacity ? std::optional(*spec_.capacity - std::min(used_, *spec_.capacity)) : std::nullopt;
}

// Throws if a lane would exceed the capacity.
void Session::check_room(std::size_t count) const {
    const auto left = tokens_left();
    if (!left || count <= *left) return;
    throw Error(Code::input, "A lane takes at most " + std::to_string(*spec_.capacity) + " tokens between two resets (the model's "
                             "capacity, or the artifact's limit). Lane 0 has had " + std::to_string(used_) + " and is given " +
                             std::to_string(count) + " more. Restart it with reset(), or give it fewer. The state is unchanged.");
}

void Session::check_tokens(const Array& tokens) const {
    const Tensor& input = spec_.find("step")->inputs.front();
    const Shape wanted(input.shape.begin() + 2, input.shape.end());
    if (tokens.shape.empty() || Shape(tokens.shape.begin() + 1, tokens.shape.end()) != wanted || tokens.dtype != input.dtype) {
        throw Error(Code::input, "The model takes a stream of " + input.dtype + ", each token of shape " + shown(wanted) +
                                     "; given " + tokens.dtype + shown(tokens.shape) + ".");
    }
    if (size_of(tokens.shape) == 0) throw Error(Code::input, "A stream has at least one token; given none.");
    if (!input.takes(tokens)) {
        throw Error(Code::input, "Token ids must lie in " + std::to_string(*input.minimum) + " .. " +
                                     std::to_string(*input.maximum) + "; the stream has others.");
    }
}

Arrays Session::step(const Array& tokens) {
    return call("step", tokens, spec_.find("step")->inputs.front().shape[1], true);
}

Arrays Session::decode(const Array& tokens) { return call("decode", tokens, 1, true); }

Array Session::run(const Array& tokens) {
    check_tokens(tokens);
    check_room(tokens.shape[0]);
    const std::size_t length = tokens.shape[0], width = tokens.bytes.size() / length;
    Array results;
    for (std::size_t done = 0; done < length;) {
        const std::size_t whole = stepped(length - done), count = std::max<std::size_t>(whole, 1);
        const Entry& used = *spec_.find(whole == 0 ? "decode" : "step");
        // Without `valid`, lanes cannot rest: they get the same tokens.
        Array given = zeros(used.inputs.front().dtype, used.inputs.front().shape);
        const std::size_t lane_width = given.bytes.size() / spec_.batch;
        for (std::size_t lane = 0; lane < spec_.batch; ++lane) {
            std::memcpy(given.bytes.data() + lane * lane_width, tokens.bytes.data() + done * width, count * width);
        }
        const Arrays outputs = call(used.name, given, count, false);
        check_finite(outputs, count);
        const Array answer = outputs.at(used.outputs.front().name).at(0);
        if (done == 0) {
            results = {answer.dtype, answer.shape, {}};
            results.shape[0] = length;
        }
        const std::size_t row = answer.bytes.size() / answer.shape[0];
        results.bytes.insert(results.bytes.end(), answer.bytes.begin(),
                             answer.bytes.begin() + static_cast<std::ptrdiff_t>(row * count));
        done += count;
    }
    return results;
}

// Returns how many remaining tokens the next call of `step` takes; 0 if `decode` takes one.
std::size_t Session::stepped(std::size_t left) const {
    const Entry& step = *spec_.find("step");
    const bool decodes = spec_.find("decode") != nullptr;
    const std::size_t length = step.inputs.front().shape[1], ready = offset_ == 0 ? std::min(length, left) : 0;
    if (!step.counted()) {
        if (ready < length && !decodes) {
            throw Error(Code::input, "This model takes only whole calls of " + std::to_string(length) + " tokens; " +
                                         std::to_string(left) + " are left. Give a multiple.");
        }
        return ready == length ? ready : 0;
    }
    // A partial chunk is exact in `step` too; for a few tokens `decode` is cheaper.
    return !decodes || ready * decodes_per_step >= spec_.chunk_size ? ready : 0;
}

Arrays Session::call(const std::string& name, const Array& tokens, std::size_t count, bool others) {
    const Entry& used = *spec_.find(name);
    check_room(count);
    Arrays inputs{{used.inputs.front().name, tokens}};
    if (used.counted()) {
        Array valid = zeros("int64", {spec_.batch});
        for (std::size_t lane = 0; lane < spec_.batch; ++lane) {
            valid.as<std::int64_t>()[lane] = lane == 0 || others ? static_cast<std::int64_t>(count) : 0;
        }
        inputs.emplace("valid", std::move(valid));
    }
    Arrays outputs = entry(name).run(inputs);
    used_ += count;
    stand(name == "decode" ? offset_ + 1 : count % spec_.chunk_size);
    return outputs;
}

// Sets the offset of lane 0 within its chunk; commits a full chunk.
void Session::stand(std::size_t offset) {
    offset_ = chunked_ ? offset : 0;
    if (offset_ != spec_.chunk_size) return;
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
