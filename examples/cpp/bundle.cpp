#include "bundle.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "error.hpp"
#include "sha256.hpp"
#include "spec_check.hpp"

namespace nsm {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int format_version = 2;
constexpr std::uintmax_t largest_manifest = 64 << 20;
// Below this work per step, a second thread costs more than it saves: docs/benchmark.md, "Threads".
constexpr double small_flops = 50e6, small_bytes = 7e6;
const std::map<std::string, std::string> known_options{{"SNIPPETS_MODE", "DISABLE"}};

template <typename T>
std::optional<T> maybe(const json& value) {
    return value.is_null() ? std::nullopt : std::optional<T>(value.get<T>());
}

std::optional<std::size_t> maybe_tokens(const json& value) {
    if (value.is_null()) return std::nullopt;
    // A cast would accept -1 and 0.5.
    if (!value.is_number_unsigned() || value.get<std::size_t>() == 0) {
        throw Error(Code::bundle, "The manifest limits a stream to " + value.dump() + " tokens; expected a number above 0, or null. Export the bundle again.");
    }
    return value.get<std::size_t>();
}

Tensor tensor_of(const json& data) {
    return {data.at("name"), data.at("shape").get<Shape>(), data.at("dtype"), maybe<std::int64_t>(data.at("minimum")),
            maybe<std::int64_t>(data.at("maximum"))};
}

Spec spec_of(const json& data) {
    Spec spec{{}, {}, data.at("chunk_size"), data.at("batch"), maybe_tokens(data.at("capacity"))};
    for (const auto& item : data.at("entries")) {
        Entry entry{item.at("name"), {}, {}, item.at("reads"), item.at("writes")};
        for (const auto& input : item.at("inputs")) entry.inputs.push_back(tensor_of(input));
        for (const auto& output : item.at("outputs")) entry.outputs.push_back(tensor_of(output));
        spec.entries.push_back(std::move(entry));
    }
    for (const auto& item : data.at("states")) {
        spec.states.push_back({item.at("name"), item.at("shape").get<Shape>(), item.at("dtype"), item.at("batch_axis"),
                               item.at("past"), item.at("present"), maybe<std::size_t>(item.at("append_axis"))});
    }
    return spec;
}

// Returns the OpenVINO artifact in a precision (default: fp32, or the only one), or null if there is none.
const json* openvino_of(const json& artifacts, const std::string& precision) {
    std::map<std::string, const json*> found;
    for (const auto& artifact : artifacts) {
        if (artifact.at("target") != "openvino") continue;
        if (!found.emplace(artifact.at("precision"), &artifact).second) {
            throw Error(Code::bundle, "The manifest has two artifacts of openvino in one precision. Export the bundle again.");
        }
    }
    std::string held;
    for (const auto& [name, unused] : found) held += (held.empty() ? "" : ", ") + name;
    const auto chosen = found.size() == 1 && precision.empty() ? found.begin() : found.find(precision.empty() ? "fp32" : precision);
    if (chosen != found.end()) return chosen->second;
    if (found.empty()) return nullptr;
    throw Error(Code::input, "The bundle has openvino in " + held + ". Select one with --precision.");
}

// Refuses a path that leaves the bundle, directly or through a link.
fs::path inside(const fs::path& bundle, const std::string& name) {
    const fs::path relative(name);
    const bool climbs = std::any_of(relative.begin(), relative.end(), [](const fs::path& part) { return part == ".."; });
    std::error_code problem;  // such as a link to itself
    const fs::path whole = fs::weakly_canonical(bundle / relative, problem), root = fs::canonical(bundle);
    const auto [end, unused] = std::mismatch(root.begin(), root.end(), whole.begin(), whole.end());
    static_cast<void>(unused);
    if (problem || name.empty() || relative.is_absolute() || climbs || end != root.end()) {
        throw Error(Code::bundle, "The bundle names " + name + ", which is outside the bundle.");
    }
    return whole;
}

}  // namespace

bool Tensor::takes(const Array& ids) const {
    if (dtype != "int64" || !minimum || !maximum) return true;
    const auto* first = ids.as<std::int64_t>();
    return std::all_of(first, first + size_of(ids.shape), [&](std::int64_t id) { return id >= *minimum && id <= *maximum; });
}

bool Entry::reads_state(const std::string& state) const { return std::count(reads.begin(), reads.end(), state) > 0; }
bool Entry::writes_state(const std::string& state) const { return std::count(writes.begin(), writes.end(), state) > 0; }
bool Entry::counted() const {
    return std::any_of(inputs.begin(), inputs.end(), [](const Tensor& input) { return input.name == "valid"; });
}

const Entry* Spec::find(const std::string& name) const {
    const auto found = std::find_if(entries.begin(), entries.end(), [&](const Entry& item) { return item.name == name; });
    return found == entries.end() ? nullptr : &*found;
}

Bundle::Bundle(const fs::path& path, const std::string& precision, bool allow_failed) : path_(path) {
    if (!fs::is_directory(path)) {
        throw Error(Code::input, "There is no bundle " + path.string() + ": expected a directory written by nsm-export.");
    }
    const auto place = inside(path, "manifest.json");
    if (!fs::is_regular_file(place)) {
        throw Error(Code::bundle, path.string() + " is not a bundle: it has no manifest.json. Export it again.");
    }
    if (fs::file_size(place) > largest_manifest) {
        throw Error(Code::bundle, place.string() + " has " + std::to_string(fs::file_size(place)) + " bytes, too many for a manifest. Export the bundle again.");
    }
    try {
        const auto text = read_bytes(place);
        const json manifest = json::parse(text.begin(), text.end());
        const auto& version = manifest.at("format_version");
        if (version != format_version) {
            throw Error(Code::bundle, "The bundle has format version " + version.dump() + "; this client reads version " + std::to_string(format_version) + ".");
        }
        spec_ = spec_of(manifest.at("spec"));
        fingerprint_ = manifest.at("fingerprint");
        const json work = manifest.value("work", json::object());
        if (work.contains("step")) {
            const double flops = work["step"].at("flops"), bytes = work["step"].at("nbytes");
            small_step_ = flops < small_flops && bytes < small_bytes;
        }
        const auto keep = [&](const json& record) {
            records_[record.at("path")] = {record.at("size"), record.at("sha256")};
            return record.at("path").get<std::string>();
        };
        for (const auto& record : manifest.at("files")) keep(record);
        const auto& artifacts = manifest.at("artifacts");
        for (const auto& artifact : artifacts) {
            for (const auto& record : artifact.at("files")) keep(record);
        }
        if (const json* chosen = openvino_of(artifacts, precision)) {
            precision_ = chosen->at("precision");
            if (chosen->at("parity").at("status") == "failed" && !allow_failed) {
                throw Error(Code::parity, "The artifact openvino " + precision_ + " failed its parity check: its outputs are not those of the model. Export the model again. To open it anyway: --allow-failed");
            }
            device_ = chosen->at("device");
            compile_options_ = chosen->at("options").get<std::map<std::string, std::string>>();
            if (const auto limit = maybe_tokens(chosen->at("limit"))) spec_.capacity = std::min(*limit, spec_.capacity.value_or(*limit));
            for (const auto& record : chosen->at("files")) openvino_.push_back(record.at("path"));
        }
    } catch (const json::exception& error) {
        throw Error(Code::bundle, path.string() + "/manifest.json is damaged: " + error.what() + ". Export the bundle again.");
    }
    // A bundle may come from an untrusted source, and some OpenVINO options name files.
    if (!compile_options_.empty() && compile_options_ != known_options) {
        throw Error(Code::bundle, "The manifest gives the artifact of openvino compile options other than SNIPPETS_MODE=DISABLE. Was it edited by hand? Export the bundle again.");
    }
    check_spec(spec_);
    for (const auto& [name, record] : records_) inside(path_, name);
}

fs::path Bundle::verified(const std::string& name) const {
    const auto found = records_.find(name);
    if (found == records_.end()) throw Error(Code::bundle, "The manifest does not list " + name + ". Export the bundle again.");
    const auto path = inside(path_, name);
    std::error_code problem;
    if (fs::file_size(path, problem) != found->second.size || problem) {
        throw Error(Code::bundle, name + " is missing or has another size than recorded. Copy or export the bundle again.");
    }
    if (sha256(read_bytes(path)) != found->second.sha256) {
        throw Error(Code::bundle, "The content of " + name + " does not have the recorded SHA-256. Copy or export it again.");
    }
    return path;
}

std::string Bundle::openvino_file(const std::string& ending) const {
    for (const auto& name : openvino_) {
        if (fs::path(name).filename() == ending) return name;
    }
    throw Error(Code::input, "The bundle has no " + ending + " for OpenVINO. Build it with: nsm build BUNDLE --target openvino");
}

}  // namespace nsm
