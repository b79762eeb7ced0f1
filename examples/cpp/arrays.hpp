// Reads and writes numpy arrays: .npy, and uncompressed .npz as np.savez writes it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace nsm {

using Shape = std::vector<std::size_t>;

std::size_t size_of(const Shape& shape);
std::string shown(const Shape& shape);

// Numbers in row-major order. dtype is numpy's name: float32, int64, int32, bool, ...; "text" is one text in ASCII.
struct Array {
    std::string dtype;
    Shape shape;
    std::vector<std::uint8_t> bytes;

    template <typename T>
    const T* as() const { return reinterpret_cast<const T*>(bytes.data()); }
    template <typename T>
    T* as() { return reinterpret_cast<T*>(bytes.data()); }
    // Returns the part at `index` of an axis, without that axis.
    Array at(std::size_t index, std::size_t axis = 0) const;
};

std::size_t width_of(const std::string& dtype);
Array zeros(const std::string& dtype, const Shape& shape);
std::vector<std::uint8_t> read_bytes(const std::filesystem::path& path);
Array read_npy(const std::filesystem::path& path);
void write_npy(const std::filesystem::path& path, const Array& array);
std::map<std::string, Array> read_npz(const std::filesystem::path& path);

}  // namespace nsm
