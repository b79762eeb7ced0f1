// Validates the model spec in a manifest, before it decides any allocation.
#pragma once

#include "bundle.hpp"

namespace nsm {

// Throws Error: Code::bundle for an invalid spec, Code::missing for one that this client does not support.
void check_spec(const Spec& spec);

}  // namespace nsm
