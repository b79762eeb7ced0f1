#include "golden.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "error.hpp"

namespace nsm {
namespace {

using Arrays = std::map<std::string, Array>;

void expect(bool holds, const std::string& what) {
    if (!holds) throw Error(Code::bundle, "golden.npz is not a trace of this model: " + what + ". Export the bundle again.");
}

const Array& named(const Arrays& arrays, const std::string& name) {
    const auto found = arrays.find(name);
    expect(found != arrays.end(), "it lacks " + name);
    return found->second;
}

void check(const Array& array, const std::string& name, const std::string& dtype, const Shape& shape) {
    expect(array.dtype == dtype && array.shape == shape,
           name + " is " + array.dtype + shown(array.shape) + "; expected " + dtype + shown(shape));
}

// Integers below a limit.
std::vector<std::size_t> places(const Arrays& arrays, const std::string& name, std::size_t limit) {
    const Array& array = named(arrays, name);
    expect(array.shape.size() == 1 && array.shape[0] > 0, name + " is empty");
    check(array, name, "int64", array.shape);
    std::vector<std::size_t> found(array.as<std::int64_t>(), array.as<std::int64_t>() + array.shape[0]);
    expect(std::all_of(found.begin(), found.end(), [&](std::size_t place) { return place < limit; }),
           name + " are not all below " + std::to_string(limit));
    return found;
}

// Returns the arrays of a group and checks their names.
Arrays group(const Arrays& arrays, const std::string& prefix, std::size_t count) {
    Arrays found;
    for (const auto& [name, array] : arrays) {
        if (name.rfind(prefix, 0) == 0) found.emplace(name.substr(prefix.size()), array);
    }
    expect(found.size() == count, "it holds " + std::to_string(found.size()) + " of " + prefix + "; expected " + std::to_string(count));
    return found;
}

std::string fingerprint_of(const Arrays& arrays) {
    const Array& meta = named(arrays, "meta");
    const auto data = nlohmann::json::parse(meta.bytes.begin(), meta.bytes.end(), nullptr, false);
    expect(data.is_object() && data.contains("fingerprint") && data["fingerprint"].is_string(), "meta has no fingerprint");
    return data["fingerprint"];
}

}  // namespace

Golden::Golden(const Bundle& bundle) {
    const auto arrays = read_npz(bundle.verified("golden.npz"));
    const Spec& spec = bundle.spec();
    const Entry& step = *spec.find("step");
    expect(fingerprint_of(arrays) == bundle.fingerprint(), "it was recorded from another one");
    group(arrays, "inputs/", 1);  // all tokens of a recorded call are valid
    tokens = named(arrays, "inputs/" + step.inputs.front().name);
    expect(tokens.shape.size() >= 2 && size_of(tokens.shape) > 0, "it holds no streams");
    Shape wanted = step.inputs.front().shape;
    wanted[0] = steps();
    wanted.insert(wanted.begin(), streams());
    check(tokens, "inputs", step.inputs.front().dtype, wanted);
    expect(step.inputs.front().takes(tokens), "it holds ids that the model does not take");
    positions = places(arrays, "positions", step.inputs.front().shape[1]);
    sampled = places(arrays, "sampled", steps());
    outputs = group(arrays, "outputs/", step.outputs.size());
    for (const auto& output : step.outputs) {
        wanted = output.shape;
        wanted[0] = steps();
        wanted[1] = positions.size();
        wanted.insert(wanted.begin(), streams());
        check(named(outputs, output.name), output.name, output.dtype, wanted);
    }
    after = group(arrays, "after/", spec.states.size());
    expect(!after.empty(), "it holds no states");
    const std::size_t kept = after.begin()->second.shape.empty() ? 0 : after.begin()->second.shape[0];
    expect(kept > 0 && kept <= streams(), "it holds states of " + std::to_string(kept) + " streams");
    for (const auto& state : spec.states) {
        wanted = state.shape;
        wanted.erase(wanted.begin() + static_cast<std::ptrdiff_t>(state.batch_axis));
        wanted.insert(wanted.begin(), {kept, sampled.size()});
        check(named(after, state.name), state.name, state.dtype, wanted);
    }
}

std::optional<std::size_t> Golden::sample(std::size_t step) const {
    const auto found = std::find(sampled.begin(), sampled.end(), step);
    return found == sampled.end() ? std::nullopt : std::optional<std::size_t>(found - sampled.begin());
}

}  // namespace nsm
