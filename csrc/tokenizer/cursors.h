// Walks over the characters of texts, for what the inner loops leave to others.
#pragma once

#include <cstdint>
#include <vector>

#include "normalizer.h"
#include "scan.h"

namespace fastbert {

// Walks the characters of a text. Stops at what is invalid.
template <Storage kStorage>
class TextCursor {
  public:
    static constexpr uint32_t kEnd = 0xFFFFFFFF;

    TextCursor(const Text& text, int64_t position) : text_(text), position_(position) { read(); }
    int64_t position() const { return position_; }
    uint32_t current() const { return current_; }
    void next() {
        position_ += units_;
        read();
    }
    bool previous() {
        if (position_ == 0) return false;
        --position_;
        if (kStorage == Storage::utf8) {
            const auto* p = static_cast<const uint8_t*>(text_.data);
            for (int i = 0; i < 3 && position_ > 0 && (p[position_] & 0xC0) == 0x80; ++i) --position_;
        }
        read();
        return true;
    }

  private:
    void read() {
        units_ = 1;
        if (position_ >= text_.size) {
            current_ = kEnd;
        } else if (kStorage == Storage::ucs1) {
            current_ = static_cast<const uint8_t*>(text_.data)[position_];
        } else if (kStorage == Storage::ucs2) {
            current_ = static_cast<const uint16_t*>(text_.data)[position_];
        } else if (kStorage == Storage::ucs4) {
            current_ = static_cast<const uint32_t*>(text_.data)[position_];
            if (current_ > 0x10FFFF) current_ = kEnd;
        } else {
            read_utf8();
        }
    }
    void read_utf8() {
        const auto* p = static_cast<const uint8_t*>(text_.data) + position_;
        const int64_t left = text_.size - position_;
        const uint32_t first = p[0];
        current_ = kEnd;
        const int units = first < 0x80   ? 1
                          : first < 0xC2 ? 0
                          : first < 0xE0 ? 2
                          : first < 0xF0 ? 3
                          : first < 0xF5 ? 4
                                         : 0;
        if (units == 0 || units > left) return;
        uint32_t c = units == 1 ? first : first & (0x7Fu >> units);
        for (int i = 1; i < units; ++i) {
            if ((p[i] & 0xC0) != 0x80) return;
            c = c << 6 | (p[i] & 0x3F);
        }
        constexpr uint32_t kLeast[] = {0, 0, 0x80, 0x800, 0x10000};
        if (c < kLeast[units] || c > 0x10FFFF || (c >= 0xD800 && c < 0xE000)) return;
        current_ = c;
        units_ = units;
    }

    const Text& text_;
    int64_t position_;
    uint32_t current_ = kEnd;
    int units_ = 1;

  public:
    TextCursor(const TextCursor&) = default;
    TextCursor& operator=(const TextCursor& other) {
        position_ = other.position_;
        current_ = other.current_;
        units_ = other.units_;
        return *this;
    }
};

class NormalizedCursor {
  public:
    static constexpr uint32_t kEnd = 0xFFFFFFFF;

    NormalizedCursor(const std::vector<NormalizedCharacter>& text, size_t position)
        : text_(&text), position_(position) {}
    int64_t position() const { return static_cast<int64_t>(position_); }
    uint32_t current() const { return position_ < text_->size() ? (*text_)[position_].c : kEnd; }
    void next() { ++position_; }
    bool previous() {
        if (position_ == 0) return false;
        --position_;
        return true;
    }

  private:
    const std::vector<NormalizedCharacter>* text_;
    size_t position_;
};

}  // namespace fastbert
