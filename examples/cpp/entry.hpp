// One graph of a bundle, compiled, and bound to the memory of the states.
#pragma once

#include <map>
#include <memory>
#include <openvino/runtime/compiled_model.hpp>
#include <openvino/runtime/infer_request.hpp>

#include "bundle.hpp"

namespace nsm {

using Arrays = std::map<std::string, Array>;

// Throws unless there is a value for every state, of its shape and dtype.
void check_values(const Spec& spec, const Arrays& arrays);

// Every state has two buffers that are written in turn: a graph that reads and writes the same memory may overwrite what
// it has not yet read. A state that is appended to has one; its new rows are put into it as a ring.
struct Memory {
    explicit Memory(const Spec& spec);
    void load(const Spec& spec, const Arrays& arrays);
    Arrays read(const Spec& spec) const;

    std::map<std::string, std::pair<ov::Tensor, ov::Tensor>> buffers;
    std::map<std::string, bool> second;  // whether the state lies in its second buffer
    ov::Tensor& live(const std::string& name);
    ov::Tensor& other(const std::string& name);
};

class CompiledEntry {
public:
    CompiledEntry(ov::CompiledModel model, const Entry& entry, const Spec& spec, Memory& memory);
    // Inputs by name; the state goes on. Returns the outputs, which the caller keeps.
    Arrays run(const Arrays& inputs);

private:
    ov::InferRequest& bound();
    void append(const State& state, const ov::Tensor& rows, const Array* valid, const std::vector<std::int64_t>& count);

    ov::CompiledModel model_;
    const Entry& entry_;
    const Spec& spec_;
    Memory& memory_;
    std::map<std::string, ov::Tensor> inputs_, outputs_, rows_;
    std::map<std::vector<bool>, ov::InferRequest> requests_;  // one for each way in which the states can lie
};

}  // namespace nsm
