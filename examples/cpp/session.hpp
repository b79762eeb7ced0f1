// Streams through a bundle on OpenVINO, whatever pieces they come in.
#pragma once

#include <memory>
#include <openvino/runtime/core.hpp>

#include "entry.hpp"

namespace nsm {

// It has no lock: use it from one thread at a time.
class Session {
public:
    // Without threads, one for a model whose step is small, and OpenVINO's choice for others.
    Session(const Bundle& bundle, int threads);
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    int threads() const { return threads_; }  // 0: OpenVINO's choice
    std::size_t batch() const { return spec_.batch; }
    const std::string& first_output() const { return spec_.find("step")->outputs.front().name; }
    void reset();
    // Tokens that the lanes take until a reset; nothing where there is no end.
    std::optional<std::size_t> tokens_left() const;
    Arrays read_state() const { return memory_.read(spec_); }
    // One call of the graph `step`, on lanes that stand at a chunk's beginning. tokens [B, K, ...].
    Arrays step(const Array& tokens);
    // One token on every lane, anywhere in a chunk; a chunk that is full then is committed. tokens [B, 1, ...].
    Arrays decode(const Array& tokens);
    // Any number of tokens of one stream, [T, ...], on lane 0; the other lanes rest. Whole chunks go through `step`, the
    // rest through `decode` and `commit`, as Python's session does. Returns the first output, [T, ...].
    Array run(const Array& tokens);
    void check_tokens(const Array& tokens) const;

private:
    CompiledEntry& entry(const std::string& name);
    std::size_t stepped(std::size_t left) const;
    // `count` of the tokens count on the first lane, and as many or none on the others.
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
    std::size_t offset_ = 0;  // of lane 0 in its chunk; the other lanes stand there too, or rest
    std::size_t used_ = 0;    // tokens of lane 0 since the reset; no other lane has had more
    bool chunked_ = false;
};

}  // namespace nsm
