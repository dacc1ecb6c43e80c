// Compiled once for each instruction set: see cpu/simd.h for what such a file may not do.
//
// Text is read in blocks of 64 characters. ASCII is classified and lowercased with vectors; a block's first character
// that is not plain ASCII, and whatever follows it closely, goes through the table one by one. Sets of ASCII characters
// are looked up as simdjson does (Langdale and Lemire, "Parsing gigabytes of JSON per second", 2019): a shuffle by each
// half of the byte.
#include "scan.h"

#include "../cpu/simd.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // as in simd.h
#endif

namespace fastbert {
namespace {

constexpr int kBlock = 64;

// The classes of 64 ASCII characters, a bit each.
struct Masks {
    uint64_t other;  // not ASCII
    uint64_t word, alone, special;
};

FASTBERT_INLINE uint64_t below(int64_t count) {
    return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

#if defined(__AVX512BW__)

typedef __m512i Bytes;

FASTBERT_INLINE __mmask32 low_half(uint64_t mask) {
    return (__mmask32)mask;
}
FASTBERT_INLINE __mmask32 high_half(uint64_t mask) {
    return (__mmask32)(mask >> 32);
}

// 64 characters from p, of which `count` are there, as bytes; and which are not ASCII.
FASTBERT_INLINE Bytes load(const uint8_t* p, int64_t count, uint64_t* other) {
    const __m512i v = _mm512_maskz_loadu_epi8(below(count), p);
    *other = _mm512_movepi8_mask(v);
    return v;
}
FASTBERT_INLINE Bytes load(const uint16_t* p, int64_t count, uint64_t* other) {
    const uint64_t there = below(count);
    const __m512i a = _mm512_maskz_loadu_epi16(low_half(there), p);
    const __m512i b = _mm512_maskz_loadu_epi16(high_half(there), p + 32);
    const __m512i limit = _mm512_set1_epi16(0x7F);
    *other = _mm512_cmpgt_epu16_mask(a, limit) | (uint64_t)_mm512_cmpgt_epu16_mask(b, limit) << 32;
    return _mm512_inserti64x4(_mm512_zextsi256_si512(_mm512_cvtepi16_epi8(a)), _mm512_cvtepi16_epi8(b), 1);
}
FASTBERT_INLINE Bytes load(const uint32_t* p, int64_t count, uint64_t* other) {
    const uint64_t there = below(count);
    const __m512i limit = _mm512_set1_epi32(0x7F);
    __m128i part[4];
    *other = 0;
    for (int i = 0; i < 4; ++i) {
        const __m512i v = _mm512_maskz_loadu_epi32((__mmask16)(there >> (16 * i)), p + 16 * i);
        *other |= (uint64_t)_mm512_cmpgt_epu32_mask(v, limit) << (16 * i);
        part[i] = _mm512_cvtepi32_epi8(v);
    }
    const __m256i a = _mm256_inserti128_si256(_mm256_zextsi128_si256(part[0]), part[1], 1);
    const __m256i b = _mm256_inserti128_si256(_mm256_zextsi128_si256(part[2]), part[3], 1);
    return _mm512_inserti64x4(_mm512_zextsi256_si512(a), b, 1);
}

struct Classifier {
    __m512i high, word, alone, special, lower;

    FASTBERT_INLINE_MEMBER static __m512i repeat(const uint8_t* table) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table));
    }
    FASTBERT_INLINE_MEMBER explicit Classifier(const CharacterTable& table) {
        high = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 2, 4, 8, 16, 32, 64, -128, 0, 0, 0, 0, 0, 0, 0, 0));
        word = repeat(table.word);
        alone = repeat(table.alone);
        special = repeat(table.special);
        lower = _mm512_set1_epi8((char)table.lowercase);
    }
    // Writes the 64 bytes lowercased.
    FASTBERT_INLINE_MEMBER void classify(Bytes v, uint8_t* out, Masks* masks) const {
        const __m512i half = _mm512_set1_epi8(15);
        const __m512i bit = _mm512_shuffle_epi8(high, _mm512_and_si512(_mm512_srli_epi16(v, 4), half));
        const __m512i low = _mm512_and_si512(v, half);
        masks->word = _mm512_test_epi8_mask(_mm512_shuffle_epi8(word, low), bit);
        masks->alone = _mm512_test_epi8_mask(_mm512_shuffle_epi8(alone, low), bit);
        masks->special = _mm512_test_epi8_mask(_mm512_shuffle_epi8(special, low), bit);
        const uint64_t upper = _mm512_cmplt_epu8_mask(_mm512_sub_epi8(v, _mm512_set1_epi8('A')), _mm512_set1_epi8(26));
        _mm512_storeu_si512(out, _mm512_mask_add_epi8(v, upper, v, lower));
    }
};

#elif defined(__AVX2__)

struct Bytes {
    __m256i part[2];
};

FASTBERT_INLINE uint64_t sign_bits(__m256i a, __m256i b) {
    return (uint32_t)_mm256_movemask_epi8(a) | (uint64_t)(uint32_t)_mm256_movemask_epi8(b) << 32;
}

template <class Unit>
FASTBERT_INLINE const Unit* whole_block(const Unit* p, int64_t count, Unit* copy) {
    if (count >= kBlock) return p;
    for (int i = 0; i < kBlock; ++i) copy[i] = i < count ? p[i] : 0;
    return copy;
}

FASTBERT_INLINE __m256i at(const void* p, int i) {
    return _mm256_loadu_si256((const __m256i*)p + i);
}

FASTBERT_INLINE Bytes load(const uint8_t* p, int64_t count, uint64_t* other) {
    uint8_t copy[kBlock];
    p = whole_block(p, count, copy);
    const Bytes v = {{at(p, 0), at(p, 1)}};
    *other = sign_bits(v.part[0], v.part[1]);
    return v;
}
// 32 characters. Saturated to more than 0x7F where they are not ASCII.
FASTBERT_INLINE __m256i narrow(const uint16_t* p) {
    // packus reads int16: what is negative there would become 0
    const __m256i limit = _mm256_set1_epi16(0xFF);
    const __m256i a = _mm256_min_epu16(at(p, 0), limit), b = _mm256_min_epu16(at(p, 1), limit);
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xD8);
}
FASTBERT_INLINE Bytes load(const uint16_t* p, int64_t count, uint64_t* other) {
    uint16_t copy[kBlock];
    p = whole_block(p, count, copy);
    const Bytes v = {{narrow(p), narrow(p + 32)}};
    *other = sign_bits(v.part[0], v.part[1]);
    return v;
}
FASTBERT_INLINE __m256i narrow(const uint32_t* p) {
    const __m256i limit = _mm256_set1_epi32(0xFF);
    const __m256i a = _mm256_packus_epi32(_mm256_min_epu32(at(p, 0), limit), _mm256_min_epu32(at(p, 1), limit));
    const __m256i b = _mm256_packus_epi32(_mm256_min_epu32(at(p, 2), limit), _mm256_min_epu32(at(p, 3), limit));
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
FASTBERT_INLINE Bytes load(const uint32_t* p, int64_t count, uint64_t* other) {
    uint32_t copy[kBlock];
    p = whole_block(p, count, copy);
    const Bytes v = {{narrow(p), narrow(p + 32)}};
    *other = sign_bits(v.part[0], v.part[1]);
    return v;
}

struct Classifier {
    __m256i high, word, alone, special, lower;

    FASTBERT_INLINE_MEMBER static __m256i repeat(const uint8_t* table) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
    }
    FASTBERT_INLINE_MEMBER explicit Classifier(const CharacterTable& table) {
        high = _mm256_broadcastsi128_si256(_mm_setr_epi8(1, 2, 4, 8, 16, 32, 64, -128, 0, 0, 0, 0, 0, 0, 0, 0));
        word = repeat(table.word);
        alone = repeat(table.alone);
        special = repeat(table.special);
        lower = _mm256_set1_epi8((char)table.lowercase);
    }
    FASTBERT_INLINE_MEMBER void classify(const Bytes& v, uint8_t* out, Masks* masks) const {
        const __m256i half = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
        __m256i bit[2], low[2];
        for (int i = 0; i < 2; ++i) {
            bit[i] = _mm256_shuffle_epi8(high, _mm256_and_si256(_mm256_srli_epi16(v.part[i], 4), half));
            low[i] = _mm256_and_si256(v.part[i], half);
        }
        const __m256i* tables[3] = {&word, &alone, &special};
        uint64_t* results[3] = {&masks->word, &masks->alone, &masks->special};
        for (int t = 0; t < 3; ++t) {
            __m256i absent[2];
            for (int i = 0; i < 2; ++i) {
                absent[i] = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(*tables[t], low[i]), bit[i]), zero);
            }
            *results[t] = ~sign_bits(absent[0], absent[1]);
        }
        for (int i = 0; i < 2; ++i) {
            const __m256i from_a = _mm256_sub_epi8(v.part[i], _mm256_set1_epi8('A'));
            const __m256i upper = _mm256_cmpeq_epi8(_mm256_min_epu8(from_a, _mm256_set1_epi8(25)), from_a);
            _mm256_storeu_si256((__m256i*)out + i, _mm256_add_epi8(v.part[i], _mm256_and_si256(upper, lower)));
        }
    }
};

#else

struct Bytes {
    uint8_t at[kBlock];
};

template <class Unit>
FASTBERT_INLINE Bytes load(const Unit* p, int64_t count, uint64_t* other) {
    Bytes v;
    *other = 0;
    for (int i = 0; i < kBlock; ++i) {
        const uint32_t c = i < count ? p[i] : 0;
        *other |= (uint64_t)(c > 0x7F) << i;
        v.at[i] = (uint8_t)c;
    }
    return v;
}

struct Classifier {
    const CharacterTable& table;

    FASTBERT_INLINE_MEMBER explicit Classifier(const CharacterTable& table) : table(table) {}
    FASTBERT_INLINE_MEMBER void classify(const Bytes& v, uint8_t* out, Masks* masks) const {
        masks->word = masks->alone = masks->special = 0;
        for (int i = 0; i < kBlock; ++i) {
            const int low = v.at[i] & 15, high = v.at[i] >> 4 & 7;
            masks->word |= (uint64_t)(table.word[low] >> high & 1) << i;
            masks->alone |= (uint64_t)(table.alone[low] >> high & 1) << i;
            masks->special |= (uint64_t)(table.special[low] >> high & 1) << i;
            out[i] = (uint8_t)(v.at[i] + ((uint8_t)(v.at[i] - 'A') < 26 ? table.lowercase : 0));
        }
    }
};

#endif

// The state of a scan, and the last 64 bits of both streams: in memory, every character would wait for the one before.
struct Scan : ScanState {
    uint64_t last_starts, last_members;
};

// Appends the lowest `count` (1 … 64) bits to both streams.
FASTBERT_INLINE void append_bits(Scan& state, uint64_t starts, uint64_t members, int count) {
    const int shift = (int)(state.size & 63);
    state.last_starts |= starts << shift;
    state.last_members |= members << shift;
    if (shift + count >= 64) {
        const int64_t i = state.size >> 6;
        state.starts[i] = state.last_starts;
        state.members[i] = state.last_members;
        state.last_starts = shift ? starts >> (64 - shift) : 0;
        state.last_members = shift ? members >> (64 - shift) : 0;
    }
    state.size += count;
}

template <bool kSources>
FASTBERT_INLINE void append(Scan& state, uint32_t c, bool alone) {
    uint8_t* out = state.bytes + state.size;
    int count;
    if (c < 0x80 && c != 0) {
        out[0] = (uint8_t)c;
        count = 1;
    } else if (c < 0x800) {
        out[0] = (uint8_t)(0xC0 | c >> 6);
        out[1] = (uint8_t)(0x80 | (c & 63));
        count = 2;
    } else if (c < 0x10000) {
        out[0] = (uint8_t)(0xE0 | c >> 12);
        out[1] = (uint8_t)(0x80 | (c >> 6 & 63));
        out[2] = (uint8_t)(0x80 | (c & 63));
        count = 3;
    } else {
        out[0] = (uint8_t)(0xF0 | c >> 18);
        out[1] = (uint8_t)(0x80 | (c >> 12 & 63));
        out[2] = (uint8_t)(0x80 | (c >> 6 & 63));
        out[3] = (uint8_t)(0x80 | (c & 63));
        count = 4;
    }
    if (kSources) {
        for (int i = 0; i < count; ++i) state.sources[state.size + i] = (int32_t)state.character;
    }
    append_bits(state, alone || !state.in_word, below(count), count);
    state.in_word = !alone;
}

template <bool kSources>
FASTBERT_INLINE void append_space(Scan& state) {
    state.bytes[state.size] = ' ';
    if (kSources) state.sources[state.size] = (int32_t)state.character;
    append_bits(state, 0, 0, 1);
    state.in_word = 0;
}

constexpr uint32_t kNoCharacter = 0xFFFFFFFF;

// The character at p, or kNoCharacter where it is not valid UTF-8 (Unicode 16, table 3-7), and its units.
FASTBERT_INLINE uint32_t decode(const uint8_t* p, int64_t left, int* units) {
    const uint32_t a = p[0];
    if (a < 0x80) {
        *units = 1;
        return a;
    }
    if (a < 0xE0) {
        if (a < 0xC2 || left < 2 || (p[1] & 0xC0) != 0x80) return kNoCharacter;
        *units = 2;
        return (a & 31) << 6 | (p[1] & 63);
    }
    if (a < 0xF0) {
        if (left < 3 || (p[1] & 0xC0) != 0x80 || (p[2] & 0xC0) != 0x80) return kNoCharacter;
        const uint32_t c = (a & 15) << 12 | (uint32_t)(p[1] & 63) << 6 | (p[2] & 63);
        *units = 3;
        return c < 0x800 || (c >= 0xD800 && c < 0xE000) ? kNoCharacter : c;
    }
    if (a >= 0xF5 || left < 4 || (p[1] & 0xC0) != 0x80 || (p[2] & 0xC0) != 0x80 || (p[3] & 0xC0) != 0x80) {
        return kNoCharacter;
    }
    const uint32_t c = (a & 7) << 18 | (uint32_t)(p[1] & 63) << 12 | (uint32_t)(p[2] & 63) << 6 | (p[3] & 63);
    *units = 4;
    return c < 0x10000 || c > 0x10FFFF ? kNoCharacter : c;
}

template <Storage kStorage>
struct Units;
template <>
struct Units<Storage::ucs1> {
    typedef uint8_t Unit;
};
template <>
struct Units<Storage::ucs2> {
    typedef uint16_t Unit;
};
template <>
struct Units<Storage::ucs4> {
    typedef uint32_t Unit;
};
template <>
struct Units<Storage::utf8> {
    typedef uint8_t Unit;
};

// A surrogate comes back as it is, for the table to refuse.
template <Storage kStorage>
FASTBERT_INLINE uint32_t character_at(const typename Units<kStorage>::Unit* p, int64_t left, int* units) {
    if (kStorage == Storage::utf8) return decode((const uint8_t*)p, left, units);
    *units = 1;
    return kStorage == Storage::ucs4 && *p > 0x10FFFF ? kNoCharacter : *p;
}

// A block is worth it where fewer characters than this are not ASCII.
constexpr int kDense = 12;

template <Storage kStorage, bool kSources>
ScanStop scan(const CharacterTable& table, ScanState& shared) {
    typedef typename Units<kStorage>::Unit Unit;
    Scan state;  // in registers
    (ScanState&)state = shared;
    state.last_starts = state.starts[state.size >> 6];
    state.last_members = state.members[state.size >> 6];
    const Unit* const data = (const Unit*)state.data;
    const Classifier classifier(table);
    ScanStop stop = ScanStop::end;
    while (state.position < state.end) {
        const int64_t left = state.end - state.position;
        const int64_t count = left < kBlock ? left : kBlock;
        uint64_t other;
        const Bytes v = load(data + state.position, count, &other);
        Masks masks;
        classifier.classify(v, state.bytes + state.size, &masks);
        const uint64_t halt = (other | masks.special) & below(count);
        const int64_t plain = halt ? __builtin_ctzll(halt) : count;
        if (plain) {
            const uint64_t there = below(plain);
            const uint64_t word = masks.word & there, alone = masks.alone & there;
            if (kSources) {
                for (int i = 0; i < plain; ++i) state.sources[state.size + i] = (int32_t)(state.character + i);
            }
            append_bits(state, alone | (word & ~(word << 1 | state.in_word)), word | alone, (int)plain);
            state.in_word = (uint32_t)(word >> (plain - 1)) & 1;
            state.position += plain;
            state.character += plain;
            if (plain == count) continue;
        }
        const int64_t dense_end =
            __builtin_popcountll(other) >= kDense ? state.position - plain + count : state.position;
        do {
            int units = 1;
            const uint32_t c = character_at<kStorage>(data + state.position, state.end - state.position, &units);
            if (c == kNoCharacter) {
                stop = ScanStop::invalid;
                goto done;
            }
            const uint32_t entry = table.entries[(uint32_t)table.blocks[c >> 8] << 8 | (c & 255)];
            if ((entry & kTrigger) && state.position >= state.ignore) {
                stop = ScanStop::trigger;
                goto done;
            }
            switch (entry & kKindMask) {
                case kSelfWord:
                    append<kSources>(state, c, false);
                    break;
                case kSelfAlone:
                    append<kSources>(state, c, true);
                    break;
                case kSpace:
                    append_space<kSources>(state);
                    break;
                case kNothing:
                    break;
                case kWord:
                    append<kSources>(state, entry >> 5, false);
                    break;
                case kAlone:
                    append<kSources>(state, entry >> 5, true);
                    break;
                case kSequence: {
                    const uint32_t* sequence = table.sequences + (entry >> 5);
                    for (uint32_t i = 1; i <= sequence[0]; ++i) {
                        if ((sequence[i] & 3) == kSeparator) {
                            append_space<kSources>(state);
                        } else {
                            append<kSources>(state, sequence[i] >> 2, (sequence[i] & 3) == kOnItsOwn);
                        }
                    }
                    break;
                }
                case kReorder:
                    stop = ScanStop::reorder;
                    goto done;
                default:
                    stop = ScanStop::invalid;
                    goto done;
            }
            state.position += units;
            ++state.character;
        } while (state.position < state.end && (state.position < dense_end || data[state.position] > 0x7F));
    }
done:
    state.starts[state.size >> 6] = state.last_starts;
    state.members[state.size >> 6] = state.last_members;
    shared = state;
    return stop;
}

template <Storage kStorage>
bool valid(const void* data, int64_t begin, int64_t end, int64_t* position) {
    typedef typename Units<kStorage>::Unit Unit;
    const Unit* p = (const Unit*)data;
    if (kStorage == Storage::ucs1) return true;
    for (int64_t i = begin; i < end;) {
        if (end - i >= kBlock) {
            uint32_t suspect = 0;  // without a branch for each: vectorized
            for (int k = 0; k < kBlock; ++k) {
                const uint32_t c = p[i + k];
                suspect |= kStorage == Storage::utf8 ? c & 0x80 : (c & 0xFFFFF800) == 0xD800 || c > 0x10FFFF;
            }
            if (suspect == 0) {
                i += kBlock;
                continue;
            }
        }
        const int64_t block_end = end - i < kBlock ? end : i + kBlock;
        while (i < block_end) {
            int units = 1;
            const uint32_t c = character_at<kStorage>(p + i, end - i, &units);
            if (c == kNoCharacter || (c >= 0xD800 && c < 0xE000)) {
                *position = i;
                return false;
            }
            i += units;
        }
    }
    return true;
}

int64_t bounds(const uint64_t* starts, const uint64_t* members, int64_t size, uint32_t* first, uint32_t* last) {
    const int64_t words = (size + 63) >> 6;
    uint32_t *next_first = first, *next_last = last;
    for (int64_t i = 0; i < words; ++i) {
        const bool more = i + 1 < words;
        const uint64_t start = starts[i], member = members[i];
        const uint64_t next_start = start >> 1 | (more ? starts[i + 1] << 63 : 0);
        const uint64_t next_member = member >> 1 | (more ? members[i + 1] << 63 : 0);
        const uint64_t end = member & (next_start | ~next_member);
#if defined(__AVX512F__)
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int part = 0; part < 4; ++part) {
            const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)(i * 64 + part * 16)));
            const __mmask16 s = (__mmask16)(start >> (16 * part)), e = (__mmask16)(end >> (16 * part));
            _mm512_storeu_si512(next_first, _mm512_maskz_compress_epi32(s, index));
            _mm512_storeu_si512(next_last, _mm512_maskz_compress_epi32(e, index));
            next_first += __builtin_popcount(s);
            next_last += __builtin_popcount(e);
        }
#else
        const uint32_t base = (uint32_t)(i * 64);
        for (uint64_t bits = start; bits; bits &= bits - 1) *next_first++ = base + (uint32_t)__builtin_ctzll(bits);
        for (uint64_t bits = end; bits; bits &= bits - 1) *next_last++ = base + (uint32_t)__builtin_ctzll(bits);
#endif
    }
    return next_first - first;
}

}  // namespace

namespace FASTBERT_ISA {

extern const ScanKernels scan_kernels;
const ScanKernels scan_kernels = {
    {scan<Storage::ucs1, false>, scan<Storage::ucs2, false>, scan<Storage::ucs4, false>, scan<Storage::utf8, false>},
    {scan<Storage::ucs1, true>, scan<Storage::ucs2, true>, scan<Storage::ucs4, true>, scan<Storage::utf8, true>},
    bounds,
    {valid<Storage::ucs1>, valid<Storage::ucs2>, valid<Storage::ucs4>, valid<Storage::utf8>},
};

}  // namespace FASTBERT_ISA
}  // namespace fastbert
