// The error class of the client, with the exit codes of the Python tools.
#pragma once

#include <stdexcept>
#include <string>

namespace nsm {

enum class Code { input = 2, missing = 3, run = 4, parity = 5, bundle = 6 };

class Error : public std::runtime_error {
public:
    Error(Code code, const std::string& message) : std::runtime_error(message), code_(code) {}
    int exit_code() const { return static_cast<int>(code_); }

private:
    Code code_;
};

}  // namespace nsm
