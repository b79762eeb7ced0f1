// Streams through a bundle on OpenVINO, whatever pieces they come in.
#pragma once

#include <memory>

#include "entry.hpp"

namespace nsm {

class Session {
public:
    Session(const Bundle& bundle, int threads);
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    std::size_t batch() const { return spec_.batch; }
    void reset();
    Arrays read_state() const { return memory_.read(spec_); }
    // One call of the graph `step`, on lanes that stand at a chunk's beginning. tokens [B, K, ...].
    Arrays step(const Array& tokens);
    // Any number of tokens of one stream, [T, ...], on lane 0; the other lanes rest. Whole chunks go through `step`, the
    // rest through `decode` and `commit`. Returns the first output, [T, ...].
    Array run(const Array& tokens);
    void check_tokens(const Array& tokens) const;

private:
    CompiledEntry& entry(const std::string& name);
    Arrays call(const std::string& name, const Array& tokens, std::size_t counted);
    void commit_full();

    const Bundle& bundle_;
    const Spec& spec_;
    ov::Core core_;
    ov::AnyMap options_;
    Memory memory_;
    Arrays initial_;
    std::map<std::string, std::unique_ptr<CompiledEntry>> entries_;
    std::size_t offset_ = 0;  // of lane 0 in its chunk
    bool chunked_ = false;
};

}  // namespace nsm
