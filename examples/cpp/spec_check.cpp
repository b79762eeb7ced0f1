#include "spec_check.hpp"

#include <algorithm>

#include "error.hpp"

namespace nsm {
namespace {

constexpr std::size_t most_numbers = std::size_t{1} << 40;  // limit for one tensor; it also keeps products of sizes from overflowing

void expect(bool holds, const std::string& what) {
    if (!holds) throw Error(Code::bundle, "The manifest is invalid: " + what + ". Export the bundle again.");
}

void check_sizes(const std::string& name, const Shape& shape) {
    std::size_t numbers = 1;
    for (const auto size : shape) {
        expect(size > 0 && size <= most_numbers / numbers, name + " has the shape " + shown(shape));
        numbers *= size;
    }
}

const State* find(const Spec& spec, const std::string& name) {
    const auto found = std::find_if(spec.states.begin(), spec.states.end(), [&](const State& s) { return s.name == name; });
    return found == spec.states.end() ? nullptr : &*found;
}

void check_state(const State& state, std::size_t batch) {
    check_sizes(state.name, state.shape);
    expect(state.batch_axis < state.shape.size() && state.shape[state.batch_axis] == batch,
           state.name + " of shape " + shown(state.shape) + " has no axis of " + std::to_string(batch) + " lanes");
    if (!state.append_axis) return;
    expect(*state.append_axis < state.shape.size() && *state.append_axis != state.batch_axis,
           state.name + " of shape " + shown(state.shape) + " has no such axis to append on");
    if (*state.append_axis < state.batch_axis) {
        throw Error(Code::missing, state.name + " is appended to on an axis before that of the lanes; this client needs it after.");
    }
}

void check_entry(const Entry& entry, const Spec& spec) {
    for (const auto* names : {&entry.reads, &entry.writes}) {
        for (const auto& name : *names) expect(find(spec, name) != nullptr, entry.name + " refers to the undefined state " + name);
    }
    const bool rings = std::any_of(entry.writes.begin(), entry.writes.end(),
                                   [&](const std::string& name) { return find(spec, name)->append_axis.has_value(); });
    expect(!rings || find(spec, "lane.count") != nullptr, "a state is appended to, but no state counts the tokens");
    if (entry.name == "commit") {
        expect(entry.inputs.empty() && !rings, "commit has inputs, or appends");
        return;
    }
    expect(!entry.inputs.empty() && !entry.outputs.empty(), entry.name + " has no inputs or no outputs");
    const Shape& tokens = entry.inputs.front().shape;
    for (std::size_t i = 0; i < entry.inputs.size(); ++i) {
        const Tensor& input = entry.inputs[i];
        check_sizes(input.name, input.shape);
        if (i > 0 && input.name != "valid") throw Error(Code::missing, entry.name + " has the input " + input.name + "; this client supports tokens and valid.");
        if (i > 0) expect(input.shape == Shape{spec.batch} && input.dtype == "int64", "valid is not int64[" + std::to_string(spec.batch) + "]");
    }
    expect(tokens.size() >= 2 && tokens[0] == spec.batch, entry.name + " takes tokens of shape " + shown(tokens));
    expect(entry.name != "decode" || tokens[1] == 1, "decode takes " + std::to_string(tokens.size() < 2 ? 0 : tokens[1]) + " tokens");
    for (const auto& output : entry.outputs) {
        check_sizes(output.name, output.shape);
        expect(output.shape.size() >= 2 && output.shape[0] == tokens[0] && output.shape[1] == tokens[1],
               entry.name + " gives " + output.name + " of shape " + shown(output.shape));
    }
}

}  // namespace

void check_spec(const Spec& spec) {
    expect(spec.batch > 0 && spec.chunk_size > 0, "it has no lanes, or chunks of no tokens");
    for (const auto& state : spec.states) check_state(state, spec.batch);
    for (const auto* name : {"lane.offset", "lane.count"}) {
        const State* state = find(spec, name);
        expect(state == nullptr || (state->dtype == "int64" && state->shape == Shape{spec.batch} && !state->append_axis),
               std::string(name) + " is not int64[" + std::to_string(spec.batch) + "]");
    }
    for (const auto& entry : spec.entries) check_entry(entry, spec);
    const Entry *step = spec.find("step"), *decode = spec.find("decode");
    expect(step != nullptr, "it has no step");
    expect(!spec.capacity || *spec.capacity >= step->inputs.front().shape[1], "its capacity is less than a call");
    if (decode == nullptr) return;
    const auto per_token = [](const Tensor& tensor) {  // its shape without the tokens of a call
        Shape shape = tensor.shape;
        shape.erase(shape.begin() + 1);
        return shape;
    };
    expect(per_token(decode->inputs.front()) == per_token(step->inputs.front()) &&
               decode->inputs.front().dtype == step->inputs.front().dtype &&
               per_token(decode->outputs.front()) == per_token(step->outputs.front()) &&
               decode->outputs.front().name == step->outputs.front().name &&
               decode->outputs.front().dtype == step->outputs.front().dtype,
           "decode and step are of different tokens");
    if (find(spec, "lane.offset") == nullptr) return;
    expect(spec.find("commit") != nullptr, "it has decode, but no commit");
    for (const auto* name : {"decode", "commit"}) {
        expect(spec.find(name)->writes_state("lane.offset"), std::string(name) + " does not write lane.offset");
    }
}

}  // namespace nsm
