// What a manifest says, and files that have the size and hash that it records.
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
    // Whether ids lie within these bounds; of others there is nothing to say.
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
    bool counted() const;  // whether it has the input `valid`
};

struct Spec {
    std::vector<Entry> entries;
    std::vector<State> states;
    std::size_t chunk_size, batch;
    // Tokens that a lane takes from one reset to the next: of the model, or the less that OpenVINO is right for.
    std::optional<std::size_t> capacity;
    const Entry* find(const std::string& name) const;
};

class Bundle {
public:
    // `precision`: of the OpenVINO artifact that is opened; without one, that in fp32, or the only one.
    explicit Bundle(const std::filesystem::path& path, const std::string& precision = "", bool allow_failed = false);
    const Spec& spec() const { return spec_; }
    const std::string& fingerprint() const { return fingerprint_; }
    // Of the OpenVINO artifact: fp32, int8, ...; empty where there is none.
    const std::string& precision() const { return precision_; }
    // Compile options without which OpenVINO's compiler crashes on its graphs; most artifacts have none.
    const std::map<std::string, std::string>& compile_options() const { return compile_options_; }
    // Whether it is in int8 for processors with VNNI (or dotprod on Arm) alone.
    bool needs_dot_products() const { return precision_ == "int8" && device_ == "cpu-dot"; }
    // Whether a step is over before a second thread pays; not where the manifest does not say what it does.
    bool small_step() const { return small_step_; }
    // Where a file of the manifest lies, after its size and hash were checked.
    std::filesystem::path verified(const std::string& name) const;
    // The file of the OpenVINO artifact with this ending.
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
