// A bundle: its manifest, and its files, checked against the recorded sizes and hashes.
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "arrays.hpp"

namespace nsm {

struct Tensor {
    std::string name;
    Shape shape;
    std::string dtype;
    std::optional<std::int64_t> minimum, maximum;
    // Whether ids are within the bounds; true for other dtypes.
    bool takes(const Array& ids) const;
};

struct State {
    std::string name;
    Shape shape;
    std::string dtype;
    std::size_t batch_axis;
    std::string past, present;
    std::optional<std::size_t> append_axis;
};

struct Entry {
    std::string name;
    std::vector<Tensor> inputs, outputs;
    std::vector<std::string> reads, writes;
    bool reads_state(const std::string& name) const;
    bool writes_state(const std::string& name) const;
    bool counted() const;  // whether the entry has the input `valid`
};

struct Spec {
    std::vector<Entry> entries;
    std::vector<State> states;
    std::size_t chunk_size, batch;
    // Maximum tokens of a lane between two resets: the smaller of the model's capacity and the OpenVINO artifact's limit.
    std::optional<std::size_t> capacity;
    const Entry* find(const std::string& name) const;
};

class Bundle {
public:
    // `precision`: precision of the OpenVINO artifact to open (default: fp32, or the only one).
    explicit Bundle(const std::filesystem::path& path, const std::string& precision = "", bool allow_failed = false);
    const Spec& spec() const { return spec_; }
    const std::string& fingerprint() const { return fingerprint_; }
    // Precision of the OpenVINO artifact: fp32, int8, ...; empty if there is none.
    const std::string& precision() const { return precision_; }
    // Compile options that keep OpenVINO's compiler from crashing on these graphs; most artifacts have none.
    const std::map<std::string, std::string>& compile_options() const { return compile_options_; }
    // Whether the artifact is int8 and only for processors with VNNI (or dotprod on Arm).
    bool needs_dot_products() const { return precision_ == "int8" && device_ == "cpu-dot"; }
    // Whether a step is too small for a second thread; false if the manifest does not record its work.
    bool small_step() const { return small_step_; }
    // Checks size and hash of a file in the manifest, and returns its path.
    std::filesystem::path verified(const std::string& name) const;
    // Returns the file of the OpenVINO artifact with this ending.
    std::string openvino_file(const std::string& ending) const;

private:
    struct Record {
        std::size_t size;
        std::string sha256;
    };
    std::filesystem::path path_;
    Spec spec_;
    std::string fingerprint_, precision_, device_;
    std::map<std::string, std::string> compile_options_;
    bool small_step_ = false;
    std::map<std::string, Record> records_;
    std::vector<std::string> openvino_;
};

}  // namespace nsm
