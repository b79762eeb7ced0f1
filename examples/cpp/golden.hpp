// The streams that were recorded from the PyTorch model, with what it answered.
#pragma once

#include "bundle.hpp"

namespace nsm {

// tokens [N, T, K, ...]; outputs by name, [N, T, P, ...], kept for the P token positions of a call; after: the states
// [M, n, ...], without the axis of lanes, of the first M streams after the n sampled steps.
struct Golden {
    // Throws Error(Code::bundle) where the file is of another model, or holds less than all of this.
    explicit Golden(const Bundle& bundle);

    std::size_t streams() const { return tokens.shape[0]; }
    std::size_t steps() const { return tokens.shape[1]; }
    // Where a step stands among the sampled ones.
    std::optional<std::size_t> sample(std::size_t step) const;

    Array tokens;
    std::map<std::string, Array> outputs, after;
    std::vector<std::size_t> positions, sampled;
};

}  // namespace nsm
