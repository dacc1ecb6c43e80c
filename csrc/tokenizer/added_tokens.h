// Added tokens: matched before, or after, normalization, the leftmost first and of these the longest.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace fastbert {

struct AddedToken {
    int32_t id;
    std::vector<uint32_t> content;
    bool single_word, lstrip, rstrip, normalized, special;
};

struct AddedMatch {
    int32_t id;
    int64_t begin, end;  // with what lstrip and rstrip take
    int64_t token_end;   // without
};

// \w and \s of the regular expressions in `tokenizers`.
bool is_word_character(uint32_t c);
bool is_regex_space(uint32_t c);

class AddedTokens {
  public:
    void add(const AddedToken& token);
    bool empty() const { return tokens_.empty(); }
    const std::vector<uint32_t>& first_characters() const { return first_; }
    size_t memory() const;

    enum class Found { nothing, discarded, match };

    // The token at `position`, if one starts there. Cursor walks the text: current() is the character there or kEnd,
    // next() and previous() step, position() tells where it is. `left_end`: where the match before ended. A token that
    // single_word discards is still skipped: match->end says to where.
    template <class Cursor>
    Found match(Cursor at, int64_t left_end, bool split_special_tokens, AddedMatch* match) const {
        int32_t node = 0, token = -1;
        Cursor after = at, walk = at;
        while (walk.current() != Cursor::kEnd) {
            const auto next = edges_.find(static_cast<uint64_t>(node) << 32 | walk.current());
            if (next == edges_.end()) break;
            node = next->second;
            walk.next();
            if (ends_[static_cast<size_t>(node)] >= 0) {
                token = ends_[static_cast<size_t>(node)];
                after = walk;
            }
        }
        if (token < 0) return Found::nothing;
        const AddedToken& found = tokens_[static_cast<size_t>(token)];
        *match = {found.id, at.position(), after.position(), after.position()};
        if (split_special_tokens && found.special) return Found::discarded;
        if (found.single_word) {
            Cursor before = at;
            if ((before.previous() && is_word_character(before.current())) ||
                (after.current() != Cursor::kEnd && is_word_character(after.current()))) {
                return Found::discarded;
            }
        }
        if (found.lstrip) {
            Cursor before = at;
            while (before.position() > left_end && before.previous() && is_regex_space(before.current())) {
                match->begin = before.position();
            }
        }
        if (found.rstrip) {
            while (after.current() != Cursor::kEnd && is_regex_space(after.current())) after.next();
            match->end = after.position();
        }
        return Found::match;
    }

  private:
    std::vector<AddedToken> tokens_;
    std::unordered_map<uint64_t, int32_t> edges_;  // node << 32 | character → node
    std::vector<int32_t> ends_{-1};                // node → token or -1
    std::vector<uint32_t> first_;
};

}  // namespace fastbert
