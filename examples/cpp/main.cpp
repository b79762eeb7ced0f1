// nsm_client BUNDLE --check                 replay the golden streams, and compare outputs and states with PyTorch's
// nsm_client BUNDLE INPUT OUTPUT.npy        run a file as a stream: a .npy [T] or [T, dim], or any file as bytes
//            [--threads N] [--bench N]      N timed calls of a step
//            [--precision P]                precision of the artifact: fp32, int8, ... (default: fp32, or the only one)
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <iostream>

#include "error.hpp"
#include "parity.hpp"
#include "session.hpp"

namespace {

using namespace nsm;

struct Options {
    std::string bundle, input, output, precision;
    bool check = false, allow_failed = false;
    int threads = 0, bench = 0;
};

Array read_tokens(const std::string& path, const std::string& dtype) {
    const bool numpy = path.size() > 4 && path.substr(path.size() - 4) == ".npy";
    Array tokens = numpy ? read_npy(path) : Array{"uint8", {}, read_bytes(path)};
    if (!numpy) tokens.shape = {tokens.bytes.size()};
    if (dtype != "int64" || tokens.dtype == dtype) return tokens;
    Array wide = zeros("int64", tokens.shape);
    for (std::size_t i = 0; i < size_of(tokens.shape); ++i) {
        if (tokens.dtype == "uint8") wide.as<std::int64_t>()[i] = tokens.bytes[i];
        else if (tokens.dtype == "int32") wide.as<std::int64_t>()[i] = tokens.as<std::int32_t>()[i];
        else throw Error(Code::input, path + " contains " + tokens.dtype + "; expected integer ids.");
    }
    return wide;
}

void bench(const Bundle& bundle, Session& session, int calls) {
    const Tensor& input = bundle.spec().find("step")->inputs.front();
    const Array tokens = zeros(input.dtype, input.shape);
    std::vector<double> times;
    session.reset();
    for (int i = 0; i < calls + 10; ++i) {
        if (session.tokens_left().value_or(input.shape[1]) < input.shape[1]) session.reset();
        const auto start = std::chrono::steady_clock::now();
        session.step(tokens);
        const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
        if (i >= 10) times.push_back(took.count());
    }
    std::nth_element(times.begin(), times.begin() + calls / 2, times.end());
    const std::string threads = session.threads() == 0 ? "" : ", threads: " + std::to_string(session.threads());
    std::printf("%.1f us a step (median of %d%s)\n", times[static_cast<std::size_t>(calls / 2)], calls, threads.c_str());
}

int number(const std::string& name, const std::string& text) {
    try {
        const int value = std::stoi(text);
        if (value > 0) return value;
    } catch (const std::exception&) {  // the message below
    }
    throw Error(Code::input, name + " takes an integer above 0; given " + text + ".");
}

Options parse(const std::vector<std::string>& arguments) {
    Options options;
    std::vector<std::string> places;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        const auto& argument = arguments[i];
        const bool more = i + 1 < arguments.size();
        if (argument == "--check") options.check = true;
        else if (argument == "--allow-failed") options.allow_failed = true;
        else if (argument == "--threads" && more) options.threads = number(argument, arguments[++i]);
        else if (argument == "--precision" && more) options.precision = arguments[++i];
        else if (argument == "--bench" && more) options.bench = number(argument, arguments[++i]);
        else if (argument.rfind("--", 0) == 0) throw Error(Code::input, "Unknown option, or option without a value: " + argument + ".");
        else places.push_back(argument);
    }
    const bool streams = places.size() == 3;
    if (!streams && (places.size() != 1 || (!options.check && options.bench == 0))) {
        throw Error(Code::input, "Usage: nsm_client BUNDLE [INPUT OUTPUT.npy] [--check] [--bench N] [--threads N] [--precision P] [--allow-failed]");
    }
    options.bundle = places[0];
    if (streams) options.input = places[1], options.output = places[2];
    return options;
}

int run(const std::vector<std::string>& arguments) {
    const Options options = parse(arguments);
    if (std::filesystem::is_regular_file(options.output)) {  // it may be the input
        throw Error(Code::input, options.output + " exists, and is not replaced. Take another name.");
    }
    const Bundle bundle(options.bundle, options.precision, options.allow_failed);
    Session session(bundle, options.threads);
    if (!options.input.empty()) {
        const Array tokens = read_tokens(options.input, bundle.spec().find("step")->inputs.front().dtype);
        write_npy(options.output, session.run(tokens));
        std::printf("%zu tokens from %s to %s\n", tokens.shape[0], options.input.c_str(), options.output.c_str());
    }
    if (options.bench > 0) bench(bundle, session, options.bench);
    if (options.check && !check_parity(bundle, session)) {
        throw Error(Code::parity, "The artifact does not match the recorded model.");
    }
    return 0;
}

}  // namespace

int main(int count, char** values) {
    try {
        return run({values + 1, values + count});
    } catch (const nsm::Error& error) {
        std::cerr << "Error: " << error.what() << '\n';
        return error.exit_code();
    } catch (const std::exception& error) {  // from OpenVINO or the standard library
        std::cerr << "Error: " << error.what() << '\n';
        return static_cast<int>(nsm::Code::run);
    }
}
