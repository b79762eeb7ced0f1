// nsm_client BUNDLE --check                 replay the golden streams, and compare answers and states with PyTorch's
// nsm_client BUNDLE INPUT OUTPUT.npy        stream a file: a .npy [T] or [T, dim], or any file as bytes
//            [--threads N] [--bench N]      N timed calls of a step
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <iostream>

#include "error.hpp"
#include "session.hpp"

namespace {

using namespace nsm;

constexpr double free_run_budget = 1e-4;  // fp32; see runtimes/budgets.py

struct Options {
    std::string bundle, input, output;
    bool check = false;
    int threads = 0, bench = 0;
};

// Root mean square over the first two axes of the norm of the rest.
double rms_norm(const Array& array) {
    double sum = 0;
    for (std::size_t i = 0; i < size_of(array.shape); ++i) sum += std::pow(array.as<float>()[i], 2);
    return std::sqrt(sum / static_cast<double>(std::max<std::size_t>(array.shape[0] * array.shape[1], 1)));
}

double relative_error(const Array& given, const Array& wanted, double floor) {
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < size_of(wanted.shape); ++i) {
        difference += std::pow(double(given.as<float>()[i]) - wanted.as<float>()[i], 2);
        norm += std::pow(wanted.as<float>()[i], 2);
    }
    if (difference == 0) return 0;
    return std::isfinite(difference) ? std::sqrt(difference) / std::max(std::sqrt(norm), floor) : INFINITY;
}

// Equal arrays on a new first axis.
Array stacked(const std::vector<Array>& parts) {
    Array whole{parts.front().dtype, {parts.size()}, {}};
    whole.shape.insert(whole.shape.end(), parts.front().shape.begin(), parts.front().shape.end());
    for (const auto& part : parts) whole.bytes.insert(whole.bytes.end(), part.bytes.begin(), part.bytes.end());
    return whole;
}

class Comparison {
public:
    explicit Comparison(const Arrays& golden) : golden_(golden) {}
    void note(const std::string& kind, const std::string& name, const Array& given, const Array& wanted) {
        if (wanted.dtype != "float32") {
            different_ += given.bytes != wanted.bytes;
            return;
        }
        const auto key = kind + "/" + name;
        if (floors_.find(key) == floors_.end()) floors_[key] = 0.01 * rms_norm(golden_.at(key));
        auto& worst = errors_[name];
        worst = std::max(worst, relative_error(given, wanted, floors_[key]));
        ++compared_;
    }
    bool report(std::size_t streams, std::size_t steps) const {
        auto worst = std::max_element(errors_.begin(), errors_.end(), [](auto& a, auto& b) { return a.second < b.second; });
        const double error = errors_.empty() ? INFINITY : worst->second;
        const bool passed = compared_ > 0 && different_ == 0 && error <= free_run_budget;
        std::printf("%s: %zu streams of %zu steps, %zu tensors compared; largest error %.2e (%s), allowed %.0e; %zu masks or "
                    "counters differ\n", passed ? "passed" : "FAILED", streams, steps, compared_, error,
                    errors_.empty() ? "none" : worst->first.c_str(), free_run_budget, different_);
        return passed;
    }

private:
    const Arrays& golden_;
    std::map<std::string, double> errors_, floors_;
    std::size_t compared_ = 0, different_ = 0;
};

bool check(const Bundle& bundle, Session& session) {
    const auto golden = read_npz(bundle.verified("golden.npz"));
    const Array& tokens = golden.at("inputs/tokens");
    const Array& positions = golden.at("positions");
    const Array& sampled = golden.at("sampled");
    const std::size_t streams = tokens.shape[0], steps = tokens.shape[1];
    Comparison found(golden);
    for (std::size_t first = 0; first < streams; first += session.batch()) {
        session.reset();
        for (std::size_t step = 0; step < steps; ++step) {
            std::vector<Array> lanes;
            for (std::size_t lane = 0; lane < session.batch(); ++lane) {
                lanes.push_back(tokens.at(std::min(first + lane, streams - 1)).at(step));
            }
            const auto outputs = session.step(stacked(lanes));
            const auto* end = sampled.as<std::int64_t>() + sampled.shape[0];
            const auto* index = std::find(sampled.as<std::int64_t>(), end, static_cast<std::int64_t>(step));
            const Arrays states = index == end ? Arrays{} : session.read_state();
            for (std::size_t lane = 0; lane < session.batch() && first + lane < streams; ++lane) {
                for (const auto& [name, value] : outputs) {
                    std::vector<Array> kept;
                    for (std::size_t i = 0; i < positions.shape[0]; ++i) {
                        kept.push_back(value.at(lane).at(static_cast<std::size_t>(positions.as<std::int64_t>()[i])));
                    }
                    found.note("outputs", name, stacked(kept), golden.at("outputs/" + name).at(first + lane).at(step));
                }
                for (const auto& [name, value] : states) {
                    const Array& wanted = golden.at("after/" + name);
                    if (first + lane >= wanted.shape[0]) continue;
                    const auto place = static_cast<std::size_t>(index - sampled.as<std::int64_t>());
                    found.note("after", name, value.at(lane), wanted.at(first + lane).at(place));
                }
            }
        }
    }
    return found.report(streams, steps);
}

Array read_tokens(const std::string& path, const std::string& dtype) {
    const bool numpy = path.size() > 4 && path.substr(path.size() - 4) == ".npy";
    Array tokens = numpy ? read_npy(path) : Array{"uint8", {}, read_bytes(path)};
    if (!numpy) tokens.shape = {tokens.bytes.size()};
    if (dtype != "int64" || tokens.dtype == dtype) return tokens;
    Array wide = zeros("int64", tokens.shape);
    for (std::size_t i = 0; i < size_of(tokens.shape); ++i) {
        if (tokens.dtype == "uint8") wide.as<std::int64_t>()[i] = tokens.bytes[i];
        else if (tokens.dtype == "int32") wide.as<std::int64_t>()[i] = tokens.as<std::int32_t>()[i];
        else throw Error(Code::input, path + " holds " + tokens.dtype + "; expected are ids.");
    }
    return wide;
}

void bench(const Bundle& bundle, Session& session, int calls) {
    const Tensor& input = bundle.spec().find("step")->inputs.front();
    const Array tokens = zeros(input.dtype, input.shape);
    std::vector<double> times;
    session.reset();
    for (int i = 0; i < calls + 10; ++i) {
        const auto start = std::chrono::steady_clock::now();
        session.step(tokens);
        const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
        if (i >= 10) times.push_back(took.count());
    }
    std::nth_element(times.begin(), times.begin() + calls / 2, times.end());
    std::printf("%.1f us a step (median of %d)\n", times[static_cast<std::size_t>(calls / 2)], calls);
}

int number(const std::string& name, const std::string& text) {
    try {
        const int value = std::stoi(text);
        if (value > 0) return value;
    } catch (const std::exception&) {  // the message below
    }
    throw Error(Code::input, name + " takes a whole number above 0; given " + text + ".");
}

Options parse(const std::vector<std::string>& arguments) {
    Options options;
    std::vector<std::string> places;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        const auto& argument = arguments[i];
        const bool more = i + 1 < arguments.size();
        if (argument == "--check") options.check = true;
        else if (argument == "--threads" && more) options.threads = number(argument, arguments[++i]);
        else if (argument == "--bench" && more) options.bench = number(argument, arguments[++i]);
        else if (argument.rfind("--", 0) == 0) throw Error(Code::input, "There is no option " + argument + ", or it lacks a value.");
        else places.push_back(argument);
    }
    const bool streams = places.size() == 3;
    if (!streams && (places.size() != 1 || (!options.check && options.bench == 0))) {
        throw Error(Code::input, "Usage: nsm_client BUNDLE [INPUT OUTPUT.npy] [--check] [--bench N] [--threads N]");
    }
    options.bundle = places[0];
    if (streams) options.input = places[1], options.output = places[2];
    return options;
}

int run(const std::vector<std::string>& arguments) {
    const Options options = parse(arguments);
    const Bundle bundle(options.bundle);
    Session session(bundle, options.threads);
    if (!options.input.empty()) {
        const Array tokens = read_tokens(options.input, bundle.spec().find("step")->inputs.front().dtype);
        write_npy(options.output, session.run(tokens));
        std::printf("%zu tokens from %s to %s\n", tokens.shape[0], options.input.c_str(), options.output.c_str());
    }
    if (options.bench > 0) bench(bundle, session, options.bench);
    if (options.check && !check(bundle, session)) throw Error(Code::parity, "What runs here is not the model that was recorded.");
    return 0;
}

}  // namespace

int main(int count, char** values) {
    try {
        return run({values + 1, values + count});
    } catch (const nsm::Error& error) {
        std::cerr << "Error: " << error.what() << '\n';
        return error.exit_code();
    } catch (const std::exception& error) {  // OpenVINO's, and the library's
        std::cerr << "Error: " << error.what() << '\n';
        return static_cast<int>(nsm::Code::run);
    }
}
