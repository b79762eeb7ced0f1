// One graph of a bundle, compiled, and bound to the memory of the states.
#pragma once

#include <map>
#include <memory>
#include <openvino/runtime/compiled_model.hpp>
#include <openvino/runtime/infer_request.hpp>

#include "bundle.hpp"

namespace nsm {

using Arrays = std::map<std::string, Array>;

// Throws unless every state has a value of its shape and dtype.
void check_values(const Spec& spec, const Arrays& arrays);

// Every state has two buffers, written in turn: a graph that reads and writes the same memory may overwrite values
// before it reads them. An appended state has one buffer, a ring that takes the new rows.
struct Memory {
    explicit Memory(const Spec& spec);
    void load(const Spec& spec, const Arrays& arrays);
    Arrays read(const Spec& spec) const;

    std::map<std::string, std::pair<ov::Tensor, ov::Tensor>> buffers;
    std::map<std::string, bool> second;  // whether the state is in its second buffer
    ov::Tensor& live(const std::string& name);
    ov::Tensor& other(const std::string& name);
};

class CompiledEntry {
public:
    CompiledEntry(ov::CompiledModel model, const Entry& entry, const Spec& spec, Memory& memory);
    // Runs the graph on inputs by name and advances the state. Returns the outputs, which the caller owns.
    Arrays run(const Arrays& inputs);

private:
    ov::InferRequest& bound();
    void append(const State& state, const ov::Tensor& rows, const Array* valid, const std::vector<std::int64_t>& count);

    ov::CompiledModel model_;
    const Entry& entry_;
    const Spec& spec_;
    Memory& memory_;
    std::map<std::string, ov::Tensor> inputs_, outputs_, rows_;
    std::map<std::vector<bool>, ov::InferRequest> requests_;  // one per assignment of states to buffers
};

}  // namespace nsm
