// Processor features that int8 artifacts depend on.
#pragma once

#include <optional>

namespace nsm {

// Whether the processor accumulates int8 products in 32 bits (VNNI on x86, dotprod on Arm); empty if unknown.
std::optional<bool> int8_dot_products();

}  // namespace nsm
