#include "vocabulary.h"

#include <algorithm>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastbert {

void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
    madvise(data, bytes, MADV_HUGEPAGE);  // a wish: nothing depends on it
#endif
}

void* allocate_pages(size_t bytes) {
    constexpr size_t kLine = 64;
    const size_t alignment = bytes > kLargePage / 2 ? kLargePage : kLine;
    const size_t size = (bytes + alignment - 1) / alignment * alignment;
    void* data = std::aligned_alloc(alignment, std::max(size, alignment));
    if (data == nullptr) throw std::bad_alloc();
    if (alignment == kLargePage) prefer_large_pages(data, size);
    return data;
}

int64_t count_characters(const uint8_t* word, int64_t bytes) {
    int64_t count = 0;
    for (int64_t i = 0; i < bytes; ++i) count += (word[i] & 0xC0) != 0x80;
    return count;
}

Vocabulary::Vocabulary(const std::vector<std::pair<std::string, int32_t>>& tokens, VocabularyOptions options)
    : options_(std::move(options)) {
    // Both roots in one trie: the first byte says which.
    std::vector<std::pair<std::string, int32_t>> keys;
    const std::string& prefix = options_.prefix;
    for (const auto& [token, id] : tokens) {
        if (token.empty()) continue;
        keys.emplace_back("\x01" + token, id);
        if (token.size() > prefix.size() && token.compare(0, prefix.size(), prefix) == 0) {
            keys.emplace_back("\x02" + token.substr(prefix.size()), id);
        }
    }
    build_trie(std::move(keys));
    build_steps();
    build_words(tokens);
}

void Vocabulary::build_trie(std::vector<std::pair<std::string, int32_t>> keys) {
    std::sort(keys.begin(), keys.end());
    // Slots are taken in groups of 256, so that base ^ byte stays inside one; 0 is the root.
    std::vector<Node> nodes;
    size_t first_free = 0;  // everything below is taken
    const auto grow = [&](size_t size) {
        while (nodes.size() < size) nodes.insert(nodes.end(), 256, Node{0, -1, -1});
    };
    grow(256);
    nodes[0].parent = 0x7FFFFFFF;  // taken, and nobody's child

    struct Work {
        int32_t node;
        size_t begin, end, depth;
    };
    std::vector<Work> stack{{0, 0, keys.size(), 0}};
    std::vector<std::pair<uint8_t, size_t>> bytes;  // of the children, and where their keys begin
    while (!stack.empty()) {
        Work work = stack.back();
        stack.pop_back();
        while (work.begin < work.end && keys[work.begin].first.size() == work.depth) {
            nodes[static_cast<size_t>(work.node)].id = keys[work.begin++].second;
        }
        bytes.clear();
        for (size_t i = work.begin; i < work.end; ++i) {
            const uint8_t byte = static_cast<uint8_t>(keys[i].first[work.depth]);
            if (bytes.empty() || bytes.back().first != byte) bytes.emplace_back(byte, i);
        }
        if (bytes.empty()) continue;
        while (first_free < nodes.size() && nodes[first_free].parent != -1) ++first_free;
        // the first base whose children are all free; many misses in crowded slots mean that they are full
        int32_t base = -1;
        int misses = 0;
        for (size_t slot = first_free; base < 0; ++slot) {
            grow(slot + 1);
            if (nodes[slot].parent != -1) continue;
            const uint32_t candidate = static_cast<uint32_t>(slot) ^ bytes[0].first;
            const bool fits = std::all_of(bytes.begin(), bytes.end(),
                                          [&](const auto& each) { return nodes[candidate ^ each.first].parent == -1; });
            if (fits) base = static_cast<int32_t>(candidate);
            if (!fits && ++misses == 512) first_free = slot + 1;
        }
        nodes[static_cast<size_t>(work.node)].base = base;
        for (size_t i = 0; i < bytes.size(); ++i) {
            const int32_t at = base ^ bytes[i].first;
            nodes[static_cast<size_t>(at)].parent = work.node;
            const size_t end = i + 1 < bytes.size() ? bytes[i + 1].second : work.end;
            stack.push_back({at, bytes[i].second, end, work.depth + 1});
        }
    }
    nodes_.assign(nodes);
    roots_[0] = child(0, 1);
    roots_[1] = child(0, 2);
}

void Vocabulary::build_steps() {
    for (int root = 0; root < 2; ++root) {
        for (int letters = 0; letters < 32 * 32; ++letters) {
            Step step = {roots_[root], -1, 0};
            for (int i = 1; i <= 2 && step.node >= 0; ++i) {
                step.node = child(step.node, static_cast<uint8_t>(0x60 | (i == 1 ? letters >> 5 : letters & 31)));
                if (step.node < 0 || nodes_[static_cast<size_t>(step.node)].id < 0) continue;
                step.id = nodes_[static_cast<size_t>(step.node)].id;
                step.length = i;
            }
            steps_[root][letters] = step;
        }
    }
}

void Vocabulary::build_words(const std::vector<std::pair<std::string, int32_t>>& tokens) {
    std::vector<std::pair<std::string, int32_t>> whole;
    for (const auto& [token, id] : tokens) {
        const auto* bytes = reinterpret_cast<const uint8_t*>(token.data());
        const int64_t size = static_cast<int64_t>(token.size());
        const bool punctuated = std::any_of(token.begin(), token.end(), [](char c) {
            return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') || (c >= '{' && c <= '~');
        });
        if (size == 0 || size > kShortWord || (punctuated && size > 1)) continue;  // no word, or not a short one
        if (count_characters(bytes, size) <= options_.max_input_chars_per_word) whole.emplace_back(token, id);
    }
    // Vocabularies list frequent words first: those get their own slots.
    std::stable_sort(whole.begin(), whole.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
    int bits = 8;
    while ((size_t{1} << bits) < whole.size() * 9 / 5) ++bits;
    shift_ = 64 - bits;
    words_.assign(size_t{1} << bits, VocabularyWord{kNoWord, -1});
    for (const auto& [token, id] : whole) {
        WordKey key = {};
        std::memcpy(&key, token.data(), token.size());
        uint64_t slot = hash_word(key) >> shift_;
        while (!(words_[slot].key == kNoWord)) slot = (slot + 1) & (words_.size() - 1);
        words_[slot] = {key, id};
    }
}

size_t Vocabulary::memory() const {
    return sizeof *this + nodes_.size() * sizeof(Node) + words_.size() * sizeof(VocabularyWord);
}

int64_t Vocabulary::split(const uint8_t* word, int64_t bytes, int32_t* ids, uint32_t* ends) const {
    int64_t count = 0, begin = 0;
    if (bytes <= options_.max_input_chars_per_word ||
        count_characters(word, bytes) <= options_.max_input_chars_per_word) {
        while (begin < bytes) {
            int32_t node = roots_[begin != 0], id = -1;
            int64_t end = begin, i = begin;
            if (bytes - begin >= 2) {
                const unsigned a = word[begin] ^ 0x60u, b = word[begin + 1] ^ 0x60u;
                if ((a | b) < 32) {
                    const Step& step = steps_[begin != 0][a << 5 | b];
                    node = step.node;
                    id = step.id;
                    end = begin + step.length;
                    i = begin + 2;
                }
            }
            while (i < bytes && node >= 0) {
                node = child(node, word[i++]);
                if (node >= 0 && nodes_[static_cast<size_t>(node)].id >= 0) {
                    id = nodes_[static_cast<size_t>(node)].id;
                    end = i;
                }
            }
            if (id < 0) break;
            ids[count] = id;
            if (ends) ends[count] = static_cast<uint32_t>(end);
            ++count;
            begin = end;
        }
        if (begin == bytes) return count;
    }
    ids[0] = options_.unk_id;
    if (ends) ends[0] = static_cast<uint32_t>(bytes);
    return 1;
}

}  // namespace fastbert
