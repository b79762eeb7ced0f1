// What the processor can do that artifacts in int8 depend on.
#pragma once

#include <optional>

namespace nsm {

// Whether it adds up products of int8 in 32 bits, by VNNI on x86 or dotprod on Arm; nothing where that is not known.
std::optional<bool> int8_dot_products();

}  // namespace nsm
