// Runs streams on the OpenVINO artifact of a bundle, split into calls of any length.
#pragma once

#include <memory>
#include <openvino/runtime/core.hpp>

#include "entry.hpp"

namespace nsm {

// It has no lock: use it from one thread at a time.
class Session {
public:
    // Default threads: one for a model with a small step, OpenVINO's choice for others.
    Session(const Bundle& bundle, int threads);
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    int threads() const { return threads_; }  // 0: OpenVINO's choice
    std::size_t batch() const { return spec_.batch; }
    const std::string& first_output() const { return spec_.find("step")->outputs.front().name; }
    void reset();
    // Tokens left until the lanes need a reset; empty if unlimited.
    std::optional<std::size_t> tokens_left() const;
    Arrays read_state() const { return memory_.read(spec_); }
    // Runs the graph `step` once, on lanes at the start of a chunk. tokens [B, K, ...].
    Arrays step(const Array& tokens);
    // Runs one token on every lane, anywhere in a chunk, and commits a chunk that becomes full. tokens [B, 1, ...].
    Arrays decode(const Array& tokens);
    // Runs any number of tokens of one stream, [T, ...], on lane 0; the other lanes rest. Whole chunks run through `step`,
    // the rest through `decode` and `commit`, as in Python's session. Returns the first output, [T, ...].
    Array run(const Array& tokens);
    void check_tokens(const Array& tokens) const;

private:
    CompiledEntry& entry(const std::string& name);
    std::size_t stepped(std::size_t left) const;
    // `count` tokens are valid on the first lane, and the same number or none on the others.
    Arrays call(const std::string& name, const Array& tokens, std::size_t count, bool others);
    void stand(std::size_t offset);
    void check_room(std::size_t count) const;

    const Bundle& bundle_;
    const Spec& spec_;
    const int threads_;
    ov::Core core_;
    ov::AnyMap options_;
    Arrays initial_;
    Memory memory_;
    std::map<std::string, std::unique_ptr<CompiledEntry>> entries_;
    std::size_t offset_ = 0;  // offset of lane 0 within its chunk; the other lanes have the same, or rest
    std::size_t used_ = 0;    // tokens of lane 0 since the reset, the most of all lanes
    bool chunked_ = false;
};

}  // namespace nsm
