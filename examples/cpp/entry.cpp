#include "entry.hpp"

#include <algorithm>
#include <cstring>

#include "error.hpp"

namespace nsm {
namespace {

ov::Tensor tensor_of(const std::string& dtype, const Shape& shape) {
    static const std::map<std::string, ov::element::Type> types{{"float32", ov::element::f32},
                                                                {"int64", ov::element::i64},
                                                                {"int32", ov::element::i32},
                                                                {"bool", ov::element::boolean}};
    const auto found = types.find(dtype);
    if (found == types.end()) throw Error(Code::missing, "This client does not support tensors of " + dtype + ".");
    ov::Tensor tensor(found->second, ov::Shape(shape.begin(), shape.end()));
    std::memset(tensor.data(), 0, tensor.get_byte_size());
    return tensor;
}

Array array_of(const ov::Tensor& tensor, const std::string& dtype) {
    const auto& shape = tensor.get_shape();
    Array array = zeros(dtype, Shape(shape.begin(), shape.end()));
    std::memcpy(array.bytes.data(), tensor.data(), array.bytes.size());
    return array;
}

// Checks the graph against the manifest, because OpenVINO runs on uninitialized memory if an input is not set, and the
// client allocates memory by these shapes next.
void check_ports(const ov::CompiledModel& model, const Entry& entry, const Spec& spec) {
    const auto shape_of = [](const ov::Output<const ov::Node>& port) { return Shape(port.get_shape().begin(), port.get_shape().end()); };
    std::map<std::string, Shape> filled;
    for (const auto& input : entry.inputs) filled[input.name] = input.shape;
    for (const auto& state : spec.states) {
        if (entry.reads_state(state.name)) filled[state.past] = state.shape;
    }
    for (const auto& port : model.inputs()) {
        const auto& names = port.get_names();
        const bool known = std::any_of(filled.begin(), filled.end(),
                                       [&](const auto& item) { return names.count(item.first) > 0 && item.second == shape_of(port); });
        if (!known) {
            throw Error(Code::bundle, "The graph of " + entry.name + " has the input " + port.get_any_name() + shown(shape_of(port)) +
                                          ", which the manifest lacks. Was it edited by hand? Export the bundle again.");
        }
    }
    for (const auto& output : entry.outputs) {
        const Shape found = shape_of(model.output(output.name));
        if (output.shape != found) {
            throw Error(Code::bundle, "The graph of " + entry.name + " gives " + output.name + shown(found) + ", and the manifest says " +
                                          shown(output.shape) + ". Export the bundle again.");
        }
    }
}

}  // namespace

void check_values(const Spec& spec, const Arrays& arrays) {
    for (const auto& state : spec.states) {
        const auto found = arrays.find(state.name);
        if (found == arrays.end() || found->second.shape != state.shape || found->second.dtype != state.dtype) {
            throw Error(Code::bundle, "No initial value of " + state.dtype + shown(state.shape) + " for the state " + state.name + ".");
        }
    }
}

Memory::Memory(const Spec& spec) {
    for (const auto& state : spec.states) {
        auto first = tensor_of(state.dtype, state.shape);
        buffers.emplace(state.name, std::make_pair(first, state.append_axis ? first : tensor_of(state.dtype, state.shape)));
        second[state.name] = false;
    }
}

void Memory::load(const Spec& spec, const Arrays& arrays) {
    check_values(spec, arrays);
    for (const auto& state : spec.states) {
        const auto& value = arrays.at(state.name);
        second[state.name] = false;
        std::memcpy(live(state.name).data(), value.bytes.data(), value.bytes.size());
    }
}

Arrays Memory::read(const Spec& spec) const {
    Arrays arrays;
    for (const auto& state : spec.states) {
        const auto& both = buffers.at(state.name);
        arrays.emplace(state.name, array_of(second.at(state.name) ? both.second : both.first, state.dtype));
    }
    return arrays;
}

ov::Tensor& Memory::live(const std::string& name) {
    auto& both = buffers.at(name);
    return second.at(name) ? both.second : both.first;
}

ov::Tensor& Memory::other(const std::string& name) {
    auto& both = buffers.at(name);
    return second.at(name) ? both.first : both.second;
}

CompiledEntry::CompiledEntry(ov::CompiledModel model, const Entry& entry, const Spec& spec, Memory& memory)
    : model_(std::move(model)), entry_(entry), spec_(spec), memory_(memory) {
    check_ports(model_, entry, spec);
    for (const auto& input : entry.inputs) inputs_.emplace(input.name, tensor_of(input.dtype, input.shape));
    for (const auto& output : entry.outputs) outputs_.emplace(output.name, tensor_of(output.dtype, output.shape));
    const std::size_t tokens = entry.inputs.empty() ? 0 : entry.inputs.front().shape[1];
    for (const auto& state : spec.states) {
        if (state.append_axis && entry.writes_state(state.name)) {
            Shape shape = state.shape;
            shape[*state.append_axis] = tokens;
            rows_.emplace(state.name, tensor_of(state.dtype, shape));
        }
    }
}

Arrays CompiledEntry::run(const Arrays& inputs) {
    for (auto& [name, tensor] : inputs_) std::memcpy(tensor.data(), inputs.at(name).bytes.data(), tensor.get_byte_size());
    bound().infer();
    if (!rows_.empty()) {
        const auto& counter = memory_.live("lane.count");  // the count before the call
        const std::vector<std::int64_t> count(counter.data<std::int64_t>(), counter.data<std::int64_t>() + spec_.batch);
        const auto valid = inputs.find("valid");
        for (const auto& state : spec_.states) {
            const auto found = rows_.find(state.name);
            if (found != rows_.end()) append(state, found->second, valid == inputs.end() ? nullptr : &valid->second, count);
        }
    }
    for (const auto& name : entry_.writes) {
        if (rows_.find(name) == rows_.end()) memory_.second[name] = !memory_.second[name];
    }
    Arrays outputs;
    for (const auto& output : entry_.outputs) outputs.emplace(output.name, array_of(outputs_.at(output.name), output.dtype));
    return outputs;
}

ov::InferRequest& CompiledEntry::bound() {
    std::vector<bool> sides;
    for (const auto& state : spec_.states) {
        if (entry_.reads_state(state.name) || entry_.writes_state(state.name)) sides.push_back(memory_.second[state.name]);
    }
    const auto found = requests_.find(sides);
    if (found != requests_.end()) return found->second;
    auto request = model_.create_infer_request();
    for (auto& [name, tensor] : inputs_) request.set_tensor(name, tensor);
    for (auto& [name, tensor] : outputs_) request.set_tensor(name, tensor);
    for (const auto& state : spec_.states) {
        if (entry_.reads_state(state.name)) request.set_tensor(state.past, memory_.live(state.name));
        if (!entry_.writes_state(state.name)) continue;
        const auto rows = rows_.find(state.name);
        request.set_tensor(state.present, rows == rows_.end() ? memory_.other(state.name) : rows->second);
    }
    return requests_.emplace(std::move(sides), std::move(request)).first->second;
}

// Writes row t of a call to (tokens before the call + t) modulo the size of the ring.
void CompiledEntry::append(const State& state, const ov::Tensor& rows, const Array* valid, const std::vector<std::int64_t>& count) {
    const Shape& shape = state.shape;
    const auto lanes = shape.begin() + static_cast<std::ptrdiff_t>(state.batch_axis);
    const auto axis = shape.begin() + static_cast<std::ptrdiff_t>(*state.append_axis);
    const std::size_t size = *axis, length = rows.get_shape()[*state.append_axis];
    const std::size_t outer = size_of({shape.begin(), axis}), between = size_of({lanes + 1, axis});
    const std::size_t width = size_of({axis + 1, shape.end()}) * width_of(state.dtype);
    auto* ring = static_cast<std::uint8_t*>(memory_.live(state.name).data());
    const auto* given = static_cast<const std::uint8_t*>(rows.data());
    for (std::size_t i = 0; i < outer; ++i) {
        const std::size_t lane = i / between % *lanes;
        const auto used = valid == nullptr ? length : static_cast<std::size_t>(valid->as<std::int64_t>()[lane]);
        for (std::size_t t = 0; t < used; ++t) {
            const std::size_t place = (static_cast<std::size_t>(count[lane]) + t) % size;
            std::memcpy(ring + (i * size + place) * width, given + (i * length + t) * width, width);
        }
    }
}

}  // namespace nsm
