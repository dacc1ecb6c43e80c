// The tokenizer on random and malformed texts, for AddressSanitizer and UBSan: make fuzz. No Python in it, so that
// every text lies in an allocation of just its size. Each storage, instruction set and mode has to give the same
// tokens.
//
// With clang's libFuzzer (make libfuzzer) the inputs come from it instead: -DFASTBERT_LIBFUZZER.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/tokenizer/wordpiece.h"

using namespace fastbert;

namespace {

std::unique_ptr<WordPiece> make_tokenizer(unsigned flags) {
    WordPieceOptions options;
    options.vocabulary = {{"[UNK]", 0}, {"[CLS]", 1}, {"[SEP]", 2}, {"[MASK]", 3}, {"aaaaaaaaaaaaaaaa", 4}};
    const char* pieces[] = {"a", "b", "ab", "e", "é", "\xC3\xA9t", "中", "가", "\xD0\xB6", "word", ",", "[", "]", "😀"};
    for (const char* piece : pieces) {
        for (const char* prefix : {"", "##"}) {
            options.vocabulary.emplace_back(std::string(prefix) + piece,
                                            static_cast<int32_t>(options.vocabulary.size()));
        }
    }
    options.unk_id = 0;
    options.prefix = "##";
    options.max_input_chars_per_word = flags & 16 ? 3 : 100;
    options.normalizer = {(flags & 1) == 0, (flags & 2) == 0, (flags & 4) == 0, (flags & 8) == 0};
    options.added_tokens = {
        {3, {'[', 'M', 'A', 'S', 'K', ']'}, false, (flags & 32) != 0, (flags & 64) != 0, false, true},
        {2, {'[', 'S', 'E', 'P', ']'}, (flags & 64) != 0, false, false, false, true},
        {4, {0x4E2D, 'a'}, false, false, false, false, false}};
    if (flags & 128) options.added_tokens.push_back({5, {'A', 'b', ' '}, (flags & 32) != 0, true, true, true, false});
    options.single = {{1, 0}, {kSequenceA, 0}, {2, 0}};
    options.pair = {{1, 0}, {kSequenceA, 0}, {2, 0}, {kSequenceB, 1}, {2, 1}};
    return std::make_unique<WordPiece>(std::move(options));
}

// The tokens of a text as they are written out, or why there are none.
std::vector<int64_t> tokens_of(const WordPiece& tokenizer, const Text& text, const EncodeOptions& options, bool pair) {
    EncodeInput input;
    input.texts = {text};
    if (pair) {
        input.texts.push_back(text);
        input.samples = {{0, 1, 1}};
    }
    try {
        const Encodings found = tokenizer.encode(input, options);
        std::vector<int64_t> out(static_cast<size_t>(found.total()));
        found.write_packed({{Field::input_ids, out.data()}});
        if (options.offsets) {
            std::vector<int64_t> spans(2 * out.size());
            found.write_packed({{Field::offset_mapping, spans.data()}});
            out.insert(out.end(), spans.begin(), spans.end());
        }
        return out;
    } catch (const EncodeError& error) {
        return {-1 - static_cast<int64_t>(error.kind)};
    }
}

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "not equal: %s\n", what);
    std::abort();
}

template <class Unit>
std::unique_ptr<Unit[]> copy_of(const std::vector<uint32_t>& characters) {
    std::unique_ptr<Unit[]> units(new Unit[characters.size()]);
    for (size_t i = 0; i < characters.size(); ++i) units[i] = static_cast<Unit>(characters[i]);
    return units;
}

void check(const uint8_t* data, size_t size) {
    static const auto tokenizers = [] {
        std::vector<std::unique_ptr<WordPiece>> all;
        for (unsigned flags = 0; flags < 256; ++flags) all.push_back(nullptr);
        return all;
    }();
    if (size < 4) return;
    auto& tokenizer = const_cast<std::unique_ptr<WordPiece>&>(tokenizers[data[0]]);
    if (!tokenizer) tokenizer = make_tokenizer(data[0]);

    EncodeOptions options;
    options.max_length = data[1] & 1 ? -1 : data[1] >> 1;
    options.strategy = static_cast<Strategy>(data[2] % 3);
    options.truncate_left = data[2] & 4;
    options.overflow = data[2] & 8;
    options.offsets = data[2] & 16;
    options.split_special_tokens = data[2] & 32;
    options.stride = data[3] & 3;
    const bool pair = data[2] & 64;
    data += 4;
    size -= 4;

    // the bytes as UTF-8, valid or not, and as characters of every storage that has room for them
    std::unique_ptr<uint8_t[]> bytes(new uint8_t[size]);
    std::copy_n(data, size, bytes.get());
    const std::vector<uint32_t> latin(data, data + size);
    std::vector<uint32_t> wide;
    for (size_t i = 0; i + 1 < size; i += 2) wide.push_back(static_cast<uint32_t>(data[i] << 8 | data[i + 1]));
    std::string utf8;
    for (uint32_t c : latin) {
        uint8_t out[4];
        if (c == 0) {
            utf8.push_back('\0');
        } else {
            utf8.append(reinterpret_cast<const char*>(out), static_cast<size_t>(write_utf8(c, out)));
        }
    }
    std::unique_ptr<uint8_t[]> encoded(new uint8_t[utf8.size()]);
    std::copy(utf8.begin(), utf8.end(), encoded.get());

    const auto latin1 = copy_of<uint8_t>(latin);
    const auto latin2 = copy_of<uint16_t>(latin);
    const auto latin4 = copy_of<uint32_t>(latin);
    const auto wide2 = copy_of<uint16_t>(wide);
    const auto wide4 = copy_of<uint32_t>(wide);
    const int64_t count = static_cast<int64_t>(latin.size()), half = static_cast<int64_t>(wide.size());
    const Text same[] = {{latin1.get(), count, Storage::ucs1},
                         {latin2.get(), count, Storage::ucs2},
                         {latin4.get(), count, Storage::ucs4},
                         {encoded.get(), static_cast<int64_t>(utf8.size()), Storage::utf8}};
    const Text same_wide[] = {{wide2.get(), half, Storage::ucs2}, {wide4.get(), half, Storage::ucs4}};

    std::vector<int64_t> wanted, wanted_wide, wanted_bytes;
    for (const std::string& isa : supported_isas()) {
        set_isa(isa);
        for (const Text& text : same) {
            const std::vector<int64_t> found = tokens_of(*tokenizer, text, options, pair);
            if (wanted.empty()) wanted = found;
            require(found == wanted, "storages and instruction sets, Latin-1");
        }
        for (const Text& text : same_wide) {
            const std::vector<int64_t> found = tokens_of(*tokenizer, text, options, pair);
            if (wanted_wide.empty()) wanted_wide = found;
            require(found == wanted_wide, "storages and instruction sets, two bytes");
        }
        const Text raw = {bytes.get(), static_cast<int64_t>(size), Storage::utf8};
        const std::vector<int64_t> found = tokens_of(*tokenizer, raw, options, pair);
        if (wanted_bytes.empty()) wanted_bytes = found;
        require(found == wanted_bytes, "instruction sets, UTF-8");
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    check(data, size);
    return 0;
}

#ifndef FASTBERT_LIBFUZZER
int main(int argc, char** argv) {
    const long runs = argc > 1 ? std::atol(argv[1]) : 20000;
    const unsigned seed = argc > 2 ? static_cast<unsigned>(std::atol(argv[2])) : std::random_device{}();
    std::printf("seed %u\n", seed);
    std::mt19937 random(seed);
    const std::string parts[] = {"a",
                                 "b ",
                                 "[MASK]",
                                 "[SEP]",
                                 " ",
                                 "word",
                                 "\xC3\xA9",
                                 "e\xCC\x81",
                                 "\xE4\xB8\xAD"
                                 "a",
                                 "中",
                                 "가",
                                 "\xF0\x9F\x98\x80",
                                 "\xE3\x80\xAE\xCC\x81",
                                 "Ab ",
                                 ",",
                                 "\x0b"};
    const int lengths[] = {0, 1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 130, 500, 6000};
    for (long run = 0; run < runs; ++run) {
        std::string text;
        for (int i = 0; i < 4; ++i) text.push_back(static_cast<char>(random()));
        text[0] = static_cast<char>(random() % 16 * 17);  // so many tokenizers
        const size_t length = static_cast<size_t>(lengths[random() % std::size(lengths)]) + 4;
        const unsigned noise = random() % 4;
        while (text.size() < length) {
            if (random() % 16 < noise) {
                text.push_back(static_cast<char>(random()));
            } else if (random() % 8 == 0) {
                text.append(random() % 40, 'a');
            } else {
                text += parts[random() % std::size(parts)];
            }
        }
        check(reinterpret_cast<const uint8_t*>(text.data()), text.size());
    }
    std::printf("%ld texts\n", runs);
}
#endif
