// Whether what a manifest says of its model makes sense, before memory is laid out by it.
#pragma once

#include "bundle.hpp"

namespace nsm {

// Throws Error: Code::bundle for what cannot be, Code::missing for what this client does not do.
void check_spec(const Spec& spec);

}  // namespace nsm
