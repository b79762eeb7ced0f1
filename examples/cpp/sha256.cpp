#include "sha256.hpp"

#include <array>
#include <cmath>

namespace nsm {
namespace {

using Words = std::array<std::uint32_t, 64>;

std::uint32_t rotated(std::uint32_t x, int by) { return x >> by | x << (32 - by); }

// The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
Words round_constants() {
    Words k{};
    std::size_t found = 0;
    for (std::uint32_t n = 2; found < k.size(); ++n) {
        bool prime = true;
        for (std::uint32_t d = 2; d * d <= n; ++d) prime = prime && n % d != 0;
        if (prime) {
            const long double root = std::cbrt(static_cast<long double>(n));
            k[found++] = static_cast<std::uint32_t>((root - std::floor(root)) * 4294967296.0L);
        }
    }
    return k;
}

void add_block(std::array<std::uint32_t, 8>& h, const std::uint8_t* block) {
    static const Words k = round_constants();
    Words w{};
    for (std::size_t i = 0; i < 16; ++i) {
        for (std::size_t b = 0; b < 4; ++b) w[i] = w[i] << 8 | block[4 * i + b];
    }
    for (std::size_t i = 16; i < 64; ++i) {
        const auto s0 = rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ w[i - 15] >> 3;
        const auto s1 = rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    auto v = h;
    for (std::size_t i = 0; i < 64; ++i) {
        const auto s1 = rotated(v[4], 6) ^ rotated(v[4], 11) ^ rotated(v[4], 25);
        const auto chosen = (v[4] & v[5]) ^ (~v[4] & v[6]);
        const auto first = v[7] + s1 + chosen + k[i] + w[i];
        const auto s0 = rotated(v[0], 2) ^ rotated(v[0], 13) ^ rotated(v[0], 22);
        const auto majority = (v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]);
        v = {first + s0 + majority, v[0], v[1], v[2], v[3] + first, v[4], v[5], v[6]};
    }
    for (std::size_t i = 0; i < 8; ++i) h[i] += v[i];
}

}  // namespace

std::string sha256(const std::vector<std::uint8_t>& data) {
    std::array<std::uint32_t, 8> h{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                   0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    const std::size_t whole = data.size() / 64 * 64;
    for (std::size_t at = 0; at < whole; at += 64) add_block(h, data.data() + at);
    std::vector<std::uint8_t> rest(data.begin() + static_cast<std::ptrdiff_t>(whole), data.end());
    rest.push_back(0x80);
    while (rest.size() % 64 != 56) rest.push_back(0);
    const std::uint64_t bits = static_cast<std::uint64_t>(data.size()) * 8;
    for (int shift = 56; shift >= 0; shift -= 8) rest.push_back(static_cast<std::uint8_t>(bits >> shift));
    for (std::size_t at = 0; at < rest.size(); at += 64) add_block(h, rest.data() + at);
    static const char digits[] = "0123456789abcdef";
    std::string text;
    for (const auto word : h) {
        for (int shift = 28; shift >= 0; shift -= 4) text += digits[word >> shift & 15];
    }
    return text;
}

}  // namespace nsm
