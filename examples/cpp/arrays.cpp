#include "arrays.hpp"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <numeric>
#include <regex>

#include "error.hpp"

namespace nsm {
namespace {

struct Kind {
    const char* dtype;
    const char* descr;
    std::size_t width;
};

constexpr Kind kinds[] = {{"float32", "<f4", 4}, {"float64", "<f8", 8}, {"int64", "<i8", 8}, {"int32", "<i4", 4},
                          {"uint8", "|u1", 1},   {"int8", "|i1", 1},    {"bool", "|b1", 1}};

template <typename Matches>
const Kind* find(Matches matches) {
    const auto found = std::find_if(std::begin(kinds), std::end(kinds), matches);
    return found == std::end(kinds) ? nullptr : found;
}

// Bytes with a bounds check on every access.
class View {
public:
    View(const std::vector<std::uint8_t>& bytes, std::string what) : bytes_(bytes), what_(std::move(what)) {}
    std::uint32_t number(std::size_t at, std::size_t width) const {
        check(at, width);
        std::uint32_t value = 0;
        for (std::size_t i = 0; i < width; ++i) value |= static_cast<std::uint32_t>(bytes_[at + i]) << 8 * i;
        return value;
    }
    std::string text(std::size_t at, std::size_t length) const {
        check(at, length);
        return {bytes_.begin() + static_cast<std::ptrdiff_t>(at), bytes_.begin() + static_cast<std::ptrdiff_t>(at + length)};
    }
    std::vector<std::uint8_t> part(std::size_t at, std::size_t length) const {
        check(at, length);
        return {bytes_.begin() + static_cast<std::ptrdiff_t>(at), bytes_.begin() + static_cast<std::ptrdiff_t>(at + length)};
    }
    [[noreturn]] void refuse(const std::string& why) const {
        throw Error(Code::bundle, what_ + " cannot be read as an array: " + why);
    }

private:
    void check(std::size_t at, std::size_t length) const {
        if (at > bytes_.size() || length > bytes_.size() - at) refuse("it is cut off");
    }
    const std::vector<std::uint8_t>& bytes_;
    std::string what_;
};

Array in_rows(const Array& columns) {
    Array rows = columns;
    const std::size_t width = width_of(columns.dtype), count = size_of(columns.shape);
    Shape index(columns.shape.size(), 0);
    for (std::size_t i = 0; i < count; ++i) {
        std::size_t place = 0, step = 1;
        for (std::size_t axis = 0; axis < index.size(); ++axis) {
            place += index[axis] * step;
            step *= columns.shape[axis];
        }
        std::memcpy(rows.bytes.data() + i * width, columns.bytes.data() + place * width, width);
        for (std::size_t axis = index.size(); axis-- > 0 && ++index[axis] == columns.shape[axis];) index[axis] = 0;
    }
    return rows;
}

// A numpy text scalar, with four bytes per character.
Array text_of(const std::vector<std::uint8_t>& letters, const View& view) {
    Array text{"text", {letters.size() / 4}, {}};
    for (std::size_t i = 0; i + 4 <= letters.size(); i += 4) {
        if (letters[i] > 127 || letters[i + 1] != 0 || letters[i + 2] != 0 || letters[i + 3] != 0) view.refuse("it is no ASCII");
        text.bytes.push_back(letters[i]);
    }
    return text;
}

Array parse_npy(const std::vector<std::uint8_t>& bytes, const std::string& what) {
    const View view(bytes, what);
    if (view.text(0, 6) != "\x93NUMPY") view.refuse("it is no .npy");
    const bool small = view.number(6, 1) == 1;
    const std::size_t start = small ? 10 : 12;
    const std::size_t length = view.number(8, small ? 2 : 4);
    const std::string header = view.text(start, length);
    static const std::regex form(R"(^\{'descr': '([^']+)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \}\s*$)");
    std::smatch match;
    if (!std::regex_match(header, match, form)) view.refuse("its header is " + header);
    const std::string descr = match[1], order = match[2], sizes = match[3];
    if (descr.rfind("<U", 0) == 0) return text_of(view.part(start + length, bytes.size() - start - length), view);
    const Kind* kind = find([&](const Kind& item) { return item.descr == descr; });
    if (kind == nullptr) view.refuse("its numbers are " + descr);
    Array array{kind->dtype, {}, {}};
    static const std::regex number(R"(\d+)");
    for (std::sregex_iterator it(sizes.begin(), sizes.end(), number), end; it != end; ++it) {
        if (it->length() > 18) view.refuse("its shape is " + sizes);
        array.shape.push_back(std::stoull(it->str()));
    }
    const std::size_t held = bytes.size() - start - length;
    std::size_t wanted = kind->width;
    for (const auto size : array.shape) {
        if (size != 0 && wanted > held / size) view.refuse("it holds fewer numbers than " + shown(array.shape));
        wanted *= size;
    }
    if (wanted != held) view.refuse("it holds other numbers than " + shown(array.shape));
    array.bytes = view.part(start + length, held);
    return order == "True" ? in_rows(array) : array;
}

}  // namespace

std::size_t size_of(const Shape& shape) {
    return std::accumulate(shape.begin(), shape.end(), std::size_t{1}, std::multiplies<>());
}

std::string shown(const Shape& shape) {
    std::string text = "[";
    for (const auto size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + "]";
}

Array Array::at(std::size_t index, std::size_t axis) const {
    const auto middle = shape.begin() + static_cast<std::ptrdiff_t>(axis);
    const std::size_t outer = size_of({shape.begin(), middle}), inner = size_of({middle + 1, shape.end()}) * width_of(dtype);
    Array part{dtype, shape, {}};
    part.shape.erase(part.shape.begin() + static_cast<std::ptrdiff_t>(axis));
    for (std::size_t i = 0; i < outer; ++i) {
        const auto first = bytes.begin() + static_cast<std::ptrdiff_t>((i * *middle + index) * inner);
        part.bytes.insert(part.bytes.end(), first, first + static_cast<std::ptrdiff_t>(inner));
    }
    return part;
}

std::size_t width_of(const std::string& dtype) {
    const Kind* kind = find([&](const Kind& item) { return item.dtype == dtype; });
    if (kind == nullptr) throw Error(Code::bundle, "Unknown dtype " + dtype + ".");
    return kind->width;
}

Array zeros(const std::string& dtype, const Shape& shape) {
    return {dtype, shape, std::vector<std::uint8_t>(size_of(shape) * width_of(dtype))};
}

std::vector<std::uint8_t> read_bytes(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file || !std::filesystem::is_regular_file(path)) {
        throw Error(Code::input, path.string() + " cannot be opened as a file. Is the name right?");
    }
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

Array read_npy(const std::filesystem::path& path) {
    const auto bytes = read_bytes(path);
    try {
        return parse_npy(bytes, path.string());
    } catch (const Error& error) {  // a file of the user, not one of a bundle
        throw Error(Code::input, error.what());
    }
}

void write_npy(const std::filesystem::path& path, const Array& array) {
    const Kind* kind = find([&](const Kind& item) { return item.dtype == array.dtype; });
    std::string header = "{'descr': '" + std::string(kind->descr) + "', 'fortran_order': False, 'shape': (";
    for (const auto size : array.shape) header += std::to_string(size) + ", ";
    header += "), }";
    header += std::string(63 - (10 + header.size()) % 64, ' ') + "\n";
    auto unfinished = path;
    unfinished += ".partial";
    {
        std::ofstream file(unfinished, std::ios::binary);
        file << "\x93NUMPY" << '\1' << '\0' << static_cast<char>(header.size() & 255) << static_cast<char>(header.size() >> 8);
        file << header;
        file.write(reinterpret_cast<const char*>(array.bytes.data()), static_cast<std::streamsize>(array.bytes.size()));
        if (!file.flush()) throw Error(Code::input, path.string() + " cannot be written.");
    }
    std::filesystem::rename(unfinished, path);
}

std::map<std::string, Array> read_npz(const std::filesystem::path& path) {
    const auto bytes = read_bytes(path);
    const View view(bytes, path.string());
    const std::size_t end = bytes.size() - std::min<std::size_t>(bytes.size(), 22);
    if (view.number(end, 4) != 0x06054b50) view.refuse("it does not end like a .zip");
    std::map<std::string, Array> arrays;
    std::size_t at = view.number(end + 16, 4);
    for (auto left = view.number(end + 10, 2); left > 0; --left) {
        const auto size = view.number(at + 24, 4), length = view.number(at + 28, 2), local = view.number(at + 42, 4);
        if (view.number(at, 4) != 0x02014b50 || view.number(at + 10, 2) != 0) view.refuse("it is compressed or damaged");
        std::string name = view.text(at + 46, length);
        const auto start = std::size_t{local} + 30 + view.number(local + 26, 2) + view.number(local + 28, 2);
        if (name.size() > 4) name.resize(name.size() - 4);  // .npy
        arrays.emplace(name, parse_npy(view.part(start, size), path.string() + ": " + name));
        at += 46 + length + view.number(at + 30, 2) + view.number(at + 32, 2);
    }
    return arrays;
}

}  // namespace nsm
