#include "parity.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "error.hpp"
#include "golden.hpp"

namespace nsm {
namespace {

constexpr double free_run_budget = 1e-4;  // fp32; see runtimes/parity/budgets.py
constexpr std::size_t split_steps = 4;    // steps of the split run; see runtimes/parity/replay.py

double norm_of(const float* numbers, std::size_t count) {
    double sum = 0;
    for (std::size_t i = 0; i < count; ++i) sum += double(numbers[i]) * numbers[i];
    return std::sqrt(sum);
}

// Root mean square, over the first two axes, of the norm over the other axes.
double rms_norm(const Array& array) {
    return norm_of(array.as<float>(), size_of(array.shape)) / std::sqrt(double(array.shape[0] * array.shape[1]));
}

double relative_error(const Array& given, const Array& wanted, double usual) {
    const std::size_t count = size_of(wanted.shape);
    std::vector<float> difference(count);
    std::transform(given.as<float>(), given.as<float>() + count, wanted.as<float>(), difference.begin(), std::minus<>());
    const double error = norm_of(difference.data(), count);
    if (error == 0) return 0;
    return std::isfinite(error) ? error / std::max(norm_of(wanted.as<float>(), count), usual) : INFINITY;
}

// Stacks arrays of one shape on a new first or second axis.
Array stacked(const std::vector<Array>& parts) {
    Array whole{parts.front().dtype, parts.front().shape, {}};
    whole.shape.insert(whole.shape.begin(), parts.size());
    for (const auto& part : parts) whole.bytes.insert(whole.bytes.end(), part.bytes.begin(), part.bytes.end());
    return whole;
}

// The worst errors, by the name of the output or state.
class Findings {
public:
    void note(const std::string& name, const Array& given, const Array& wanted, const Array& recorded) {
        auto& line = lines_[name];
        ++line.compared;
        if (given.dtype != "float32") {
            line.different += given.bytes != wanted.bytes;
        } else {
            if (line.compared == 1) line.usual = rms_norm(recorded);
            line.error = std::max(line.error, relative_error(given, wanted, line.usual));
        }
    }
    // Prints a line for each; returns whether all are within the budget and at least one was compared.
    bool report(const char* run) const {
        bool passed = !lines_.empty();
        std::printf("%-8s %-24s %8s %10s %10s\n", run, "tensor", "compared", "error", "different");
        for (const auto& [name, line] : lines_) {
            const bool fine = line.error <= free_run_budget && line.different == 0;
            std::printf("%-8s %-24s %8zu %10.2e %10zu\n", fine ? "ok" : "FAILED", name.c_str(), line.compared, line.error, line.different);
            passed = passed && fine;
        }
        return passed;
    }

private:
    struct Line {
        std::size_t compared = 0, different = 0;
        double error = 0, usual = 0;
    };
    std::map<std::string, Line> lines_;
};

// Returns the outputs for all tokens of a call, [B, K, ...] by name; a split call gives only the first output.
Arrays answers(Session& session, const Array& tokens, bool split) {
    if (!split) return session.step(tokens);
    std::vector<Array> parts;
    std::string name;
    for (std::size_t token = 0; token < tokens.shape[1]; ++token) {
        Array one = tokens.at(token, 1);
        one.shape.insert(one.shape.begin() + 1, 1);
        const Arrays outputs = session.decode(one);
        name = session.first_output();
        parts.push_back(outputs.at(name).at(0, 1));
    }
    const Array by_token = stacked(parts);  // [K, B, ...]
    std::vector<Array> lanes;
    for (std::size_t lane = 0; lane < session.batch(); ++lane) lanes.push_back(by_token.at(lane, 1));
    return {{name, stacked(lanes)}};
}

// Runs streams side by side on the lanes. Unused lanes repeat the last stream; their results are ignored.
void replay(const Golden& golden, const Spec& spec, Session& session, std::size_t first, bool split, Findings& found) {
    const std::size_t used = std::min(session.batch(), golden.streams() - first);
    session.reset();
    for (std::size_t step = 0; step < (split ? std::min(split_steps, golden.steps()) : golden.steps()); ++step) {
        std::vector<Array> lanes;
        for (std::size_t lane = 0; lane < session.batch(); ++lane) {
            lanes.push_back(golden.tokens.at(first + std::min(lane, used - 1)).at(step));
        }
        const Arrays outputs = answers(session, stacked(lanes), split && step % 2 == 0);
        const auto sample = golden.sample(step);
        const Arrays states = sample ? session.read_state() : Arrays{};
        for (std::size_t lane = 0; lane < used; ++lane) {
            for (const auto& [name, value] : outputs) {
                std::vector<Array> kept;
                for (const auto position : golden.positions) kept.push_back(value.at(lane).at(position));
                const Array& recorded = golden.outputs.at(name);
                found.note(name, stacked(kept), recorded.at(first + lane).at(step), recorded);
            }
            for (const auto& state : spec.states) {
                const Array& recorded = golden.after.at(state.name);
                if (!sample || first + lane >= recorded.shape[0]) continue;
                found.note(state.name, states.at(state.name).at(lane, state.batch_axis), recorded.at(first + lane).at(*sample), recorded);
            }
        }
    }
}

}  // namespace

bool check_parity(const Bundle& bundle, Session& session) {
    if (bundle.precision() != "fp32") {
        throw Error(Code::missing, "--check supports only fp32; this artifact is in " + bundle.precision() +
                                       ". Check it with: nsm parity BUNDLE --target openvino");
    }
    const Golden golden(bundle);
    Findings whole, split;
    for (std::size_t first = 0; first < golden.streams(); first += session.batch()) {
        replay(golden, bundle.spec(), session, first, false, whole);
    }
    bool passed = whole.report("whole");
    if (bundle.spec().find("decode") != nullptr) {
        replay(golden, bundle.spec(), session, 0, true, split);
        passed = split.report("split") && passed;
    }
    std::printf("%s: %zu streams of %zu steps; allowed is an error of %.0e, and no mask or counter that differs\n",
                passed ? "passed" : "FAILED", golden.streams(), golden.steps(), free_run_budget);
    return passed;
}

}  // namespace nsm
