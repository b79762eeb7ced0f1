// Whether what runs here is the model that was recorded, over whole streams.
#pragma once

#include "session.hpp"

namespace nsm {

// Replays the golden streams, each on the session's own state from the initial one, and the first steps once more token
// by token where there is `decode`. Prints a table; returns whether every output and state is within the budget.
bool check_parity(const Bundle& bundle, Session& session);

}  // namespace nsm
