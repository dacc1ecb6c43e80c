#include "added_tokens.h"

#include <algorithm>

#include "normalizer.h"
#include "unicode_tables.h"

namespace fastbert {

bool is_word_character(uint32_t c) {
    return c <= 0x10FFFF && (character_property(c) & unicode::kWordCharacter);
}

bool is_regex_space(uint32_t c) {
    return c <= 0x10FFFF && (character_property(c) & unicode::kRegexSpace);
}

void AddedTokens::add(const AddedToken& token) {
    int32_t node = 0;
    for (uint32_t c : token.content) {
        const auto [edge, added] =
            edges_.emplace(static_cast<uint64_t>(node) << 32 | c, static_cast<int32_t>(ends_.size()));
        if (added) ends_.push_back(-1);
        node = edge->second;
    }
    ends_[static_cast<size_t>(node)] = static_cast<int32_t>(tokens_.size());
    tokens_.push_back(token);
    if (std::find(first_.begin(), first_.end(), token.content[0]) == first_.end()) first_.push_back(token.content[0]);
}

size_t AddedTokens::memory() const {
    size_t bytes = ends_.capacity() * sizeof(int32_t) + edges_.size() * 48;  // of a node of the map, about
    for (const AddedToken& token : tokens_) bytes += sizeof token + token.content.capacity() * sizeof(uint32_t);
    return bytes;
}

}  // namespace fastbert
