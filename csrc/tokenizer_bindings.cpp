// fastbert._C.WordPiece and Encodings: Python's strings and buffers in, NumPy arrays and lists out. The tokenizer
// itself, in tokenizer/, knows nothing of Python.
#include "tokenizer_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "text_columns.h"
#include "text_lists.h"
#include "tokenizer/encodings.h"
#include "tokenizer/wordpiece.h"
#include "tokenizer_calls.h"

namespace py = pybind11;

namespace fastbert {
namespace {

constexpr int64_t kUnitsToUnlock = 2048;  // letting go of the lock takes about as long as so many characters

std::string shown(int64_t value) {
    return std::to_string(value);
}

// ---- options ----

EncodeOptions options_of(bool add_special_tokens, int64_t max_length, const std::string& strategy, int64_t stride,
                         const std::string& truncation_side, bool overflow, bool offsets, bool split_special_tokens,
                         int threads) {
    EncodeOptions options;
    options.add_special_tokens = add_special_tokens;
    options.max_length = max_length;
    if (strategy == "only_first") {
        options.strategy = Strategy::only_first;
    } else if (strategy == "only_second") {
        options.strategy = Strategy::only_second;
    } else if (strategy != "longest_first") {
        throw py::value_error("strategy is \"" + strategy + "\"; expected longest_first, only_first or only_second");
    }
    if (stride < 0) throw py::value_error("stride is " + shown(stride) + "; expected 0 or more");
    options.stride = stride;
    if (truncation_side != "right" && truncation_side != "left") {
        throw py::value_error("truncation_side is \"" + truncation_side + "\"; expected right or left");
    }
    options.truncate_left = truncation_side == "left";
    options.overflow = overflow;
    options.offsets = offsets;
    options.split_special_tokens = split_special_tokens;
    options.threads = threads < 1 ? 1 : threads;
    return options;
}

PyObject* truncation_error = nullptr;  // the exception class

// Encodes with the lock let go, and says in Python's exceptions what is wrong with a text.
Encodings encode(const WordPiece& tokenizer, const EncodeInput& input, int64_t units, const EncodeOptions& options) {
    try {
        std::optional<py::gil_scoped_release> unlocked;
        if (units >= kUnitsToUnlock) unlocked.emplace();
        return tokenizer.encode(input, options);
    } catch (const EncodeError& error) {
        const std::string row = shown(error.sample);
        switch (error.kind) {
            case EncodeError::Kind::invalid:
                if (input.texts[0].storage == Storage::utf8) {
                    throw py::value_error("row " + row + " is not valid UTF-8 at byte " + shown(error.position));
                }
                throw py::type_error("texts[" + row + "] has half of a surrogate pair as character " +
                                     shown(error.position) + ", which is no valid Unicode");
            case EncodeError::Kind::too_long:
                throw py::value_error("texts[" + row + "] " + error.what());
            case EncodeError::Kind::stride:
                throw py::value_error(error.what());
            default:
                PyErr_SetString(truncation_error, error.what());
                throw py::error_already_set();
        }
    }
}

// ---- construction ----

std::vector<uint32_t> code_points(const py::str& text) {
    const Py_ssize_t size = PyUnicode_GetLength(text.ptr());
    std::vector<uint32_t> result(static_cast<size_t>(size));
    if (size && PyUnicode_AsUCS4(text.ptr(), result.data(), size, 0) == nullptr) throw py::error_already_set();
    for (uint32_t c : result) {
        if (c >= 0xD800 && c < 0xE000) {
            throw py::value_error(py::repr(text).cast<std::string>() + " has half of a surrogate pair");
        }
    }
    return result;
}

std::string utf8(const py::str& text) {
    std::string result;
    for (uint32_t c : code_points(text)) {
        uint8_t bytes[4];
        result.append(reinterpret_cast<const char*>(bytes), static_cast<size_t>(write_utf8(c, bytes)));
    }
    return result;
}

int32_t checked_id(int64_t id, const std::string& what) {
    if (id < 0 || id > INT32_MAX) {
        throw py::value_error("the id of " + what + " is " + shown(id) + "; expected 0 to 2147483647");
    }
    return static_cast<int32_t>(id);
}

Template template_of(const std::vector<std::pair<int64_t, int64_t>>& pieces, const char* name, int sequences) {
    Template result;
    int seen[2] = {0, 0};
    for (const auto& [id, type] : pieces) {
        if (id == kSequenceA || id == kSequenceB) {
            ++seen[id == kSequenceB];
        } else {
            checked_id(id, std::string("a token of ") + name);
        }
        checked_id(type, std::string("a token type of ") + name);
        result.push_back({static_cast<int32_t>(id), static_cast<int32_t>(type)});
    }
    if (seen[0] != 1 || seen[1] != sequences - 1) {
        throw py::value_error(std::string(name) + " has $A " + shown(seen[0]) + " times and $B " + shown(seen[1]) +
                              " times; expected 1 and " + shown(sequences - 1));
    }
    return result;
}

typedef std::tuple<int64_t, py::str, bool, bool, bool, bool, bool> AddedTokenTuple;
typedef std::vector<std::pair<int64_t, int64_t>> TemplatePairs;

std::unique_ptr<WordPiece> make_wordpiece(const py::dict& vocab, const py::str& unk_token, const py::str& prefix,
                                          int64_t max_input_chars_per_word, bool clean_text, bool handle_chinese_chars,
                                          bool strip_accents, bool lowercase,
                                          const std::vector<AddedTokenTuple>& added_tokens, const TemplatePairs& single,
                                          const TemplatePairs& pair) {
    WordPieceOptions options;
    options.vocabulary.reserve(vocab.size());
    for (const auto& [key, value] : vocab) {
        if (!PyUnicode_Check(key.ptr()) || !PyLong_Check(value.ptr())) {
            throw py::type_error("vocab has an entry " + py::repr(key).cast<std::string>() + ": " +
                                 py::repr(value).cast<std::string>() + "; expected str: int");
        }
        int overflow = 0;
        const int64_t id = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
        const py::str token = py::reinterpret_borrow<py::str>(key);
        options.vocabulary.emplace_back(
            utf8(token), checked_id(overflow ? -1 : id, "the token " + py::repr(key).cast<std::string>()));
    }
    if (!vocab.contains(unk_token)) {
        throw py::value_error("vocab lacks the unknown token " + py::repr(unk_token).cast<std::string>());
    }
    options.unk_id = vocab[unk_token].cast<int32_t>();
    options.prefix = utf8(prefix);
    if (max_input_chars_per_word < 0) {
        throw py::value_error("max_input_chars_per_word is " + shown(max_input_chars_per_word) +
                              "; expected 0 or more");
    }
    options.max_input_chars_per_word = max_input_chars_per_word;
    options.normalizer = {clean_text, handle_chinese_chars, strip_accents, lowercase};
    for (const auto& [id, content, single_word, lstrip, rstrip, normalized, special] : added_tokens) {
        const int32_t checked = checked_id(id, "the added token " + py::repr(content).cast<std::string>());
        options.added_tokens.push_back(
            {checked, code_points(content), single_word, lstrip, rstrip, normalized, special});
    }
    options.single = template_of(single, "single", 1);
    options.pair = template_of(pair, "pair", 2);
    return std::make_unique<WordPiece>(std::move(options));
}

std::string normalize(const WordPiece& tokenizer, const py::str& text) {
    std::string result;
    for (const NormalizedCharacter& each : tokenizer.normalize(code_points(text))) {
        uint8_t bytes[4];
        const int size = each.c == 0 ? 1 : write_utf8(each.c, bytes);
        if (each.c == 0) bytes[0] = 0;
        result.append(reinterpret_cast<const char*>(bytes), static_cast<size_t>(size));
    }
    return result;
}

// ---- results ----

typedef py::array_t<int64_t> Array;
// Lets go of the lock around work that is worth it.
template <class Work>
void unlocked_for(int64_t tokens, const Work& work) {
    std::optional<py::gil_scoped_release> unlocked;
    if (tokens >= kUnitsToUnlock) unlocked.emplace();
    work();
}

Array packed(const Encodings& encodings, const std::string& name) {
    const Field field = field_named(name);
    encodings.check(field);
    std::vector<py::ssize_t> shape{static_cast<py::ssize_t>(encodings.total())};
    if (width(field) == 2) shape.push_back(2);
    Array result = new_array(shape);
    int64_t* out = result.mutable_data();
    unlocked_for(encodings.total(), [&] { encodings.write_packed({{field, out}}); });
    return result;
}

// (input_ids, cu_seqlens, position_ids, token_type_ids or None, lengths as a list). Positions and types share their
// memory, which nobody keeps without the other: two allocations stay in the heap of glibc where a third would be
// returned to the system, and be cleared anew for the next batch.
py::tuple packed_batch(const Encodings& encodings, bool with_types) {
    const py::ssize_t total = static_cast<py::ssize_t>(encodings.total());
    py::array_t<int32_t> bounds(static_cast<py::ssize_t>(encodings.rows.size() + 1));
    encodings.write_bounds(bounds.mutable_data());
    Array ids = new_array({total}), others = new_array({with_types ? 2 : 1, total});
    std::vector<Encodings::Output> outputs{{Field::input_ids, ids.mutable_data()},
                                           {Field::position_ids, others.mutable_data()}};
    if (with_types) outputs.push_back({Field::token_type_ids, others.mutable_data() + total});
    unlocked_for(encodings.total(), [&] { encodings.write_packed(outputs); });
    const auto part = [&](py::ssize_t i) { return Array(total, others.data() + i * total, others); };
    const py::object types = with_types ? py::object(part(1)) : py::none();
    py::list lengths(encodings.rows.size());
    for (size_t i = 0; i < encodings.rows.size(); ++i) {
        PyList_SET_ITEM(lengths.ptr(), static_cast<Py_ssize_t>(i),
                        py::int_(encodings.length(encodings.rows[i])).release().ptr());
    }
    return py::make_tuple(ids, bounds, part(0), types, lengths);
}

Array padded(const Encodings& encodings, const std::string& name, int64_t length, int64_t value, bool left) {
    const Field field = field_named(name);
    encodings.check(field);
    if (length < 0) throw py::value_error("length is " + shown(length) + "; expected 0 or more");
    const int64_t rows = static_cast<int64_t>(encodings.rows.size());
    std::vector<py::ssize_t> shape{static_cast<py::ssize_t>(rows), static_cast<py::ssize_t>(length)};
    if (width(field) == 2) shape.push_back(2);
    Array result = new_array(shape);
    int64_t* out = result.mutable_data();
    unlocked_for(rows * length, [&] { encodings.write_padded(field, length, value, left, out); });
    return result;
}

py::list lists(const Encodings& encodings, const std::string& name) {
    const Field field = field_named(name);
    encodings.check(field);
    py::list result(encodings.rows.size());
    for (size_t i = 0; i < encodings.rows.size(); ++i) {
        PyList_SET_ITEM(result.ptr(), static_cast<Py_ssize_t>(i),
                        row_list(encodings, field, encodings.rows[i]).release().ptr());
    }
    return result;
}

template <class Value>
Array per_row(const Encodings& encodings, const Value& value) {
    Array result(static_cast<py::ssize_t>(encodings.rows.size()));
    int64_t* out = result.mutable_data();
    for (const Row& row : encodings.rows) *out++ = value(row);
    return result;
}

}  // namespace

Encodings encode_unlocked(const WordPiece& tokenizer, const EncodeInput& input, int64_t units,
                          const EncodeOptions& options) {
    return encode(tokenizer, input, units, options);
}

void bind_tokenizer(py::module_& m) {
    truncation_error = py::exception<EncodeError>(m, "TruncationError", PyExc_ValueError).release().ptr();

    py::class_<WordPiece> wordpiece(m, "WordPiece");
    wordpiece.def(py::init(&make_wordpiece), py::arg("vocab"), py::kw_only(), py::arg("unk_token") = "[UNK]",
                  py::arg("prefix") = "##", py::arg("max_input_chars_per_word") = 100, py::arg("clean_text") = true,
                  py::arg("handle_chinese_chars") = true, py::arg("strip_accents") = true, py::arg("lowercase") = true,
                  py::arg("added_tokens") = std::vector<AddedTokenTuple>{},
                  py::arg("single") = TemplatePairs{{kSequenceA, 0}},
                  py::arg("pair") = TemplatePairs{{kSequenceA, 0}, {kSequenceB, 1}});
    wordpiece.def(
        "encode",
        [](const WordPiece& self, const py::object& texts, const py::object& pairs, bool is_split_into_words,
           bool add_special_tokens, int64_t max_length, const std::string& strategy, int64_t stride,
           const std::string& truncation_side, bool overflow, bool offsets, bool split_special_tokens, int threads) {
            const EncodeOptions options = options_of(add_special_tokens, max_length, strategy, stride, truncation_side,
                                                     overflow, offsets, split_special_tokens, threads);
            Texts parsed;
            parsed.input.words = is_split_into_words;
            add_texts(parsed, texts.ptr(), pairs.is_none() ? nullptr : pairs.ptr());
            return encode(self, parsed.input, parsed.units(), options);
        },
        py::arg("texts"), py::arg("pairs") = py::none(), py::kw_only(), py::arg("is_split_into_words") = false,
        py::arg("add_special_tokens") = true, py::arg("max_length") = -1, py::arg("strategy") = "longest_first",
        py::arg("stride") = 0, py::arg("truncation_side") = "right", py::arg("overflow") = false,
        py::arg("offsets") = false, py::arg("split_special_tokens") = false, py::arg("threads") = 1);
    wordpiece.def(
        "encode_utf8",
        [](const WordPiece& self, const py::object& data, const py::object& bounds, bool add_special_tokens,
           int64_t max_length, const std::string& strategy, int64_t stride, const std::string& truncation_side,
           bool overflow, bool offsets, bool split_special_tokens, int threads) {
            const EncodeOptions options = options_of(add_special_tokens, max_length, strategy, stride, truncation_side,
                                                     overflow, offsets, split_special_tokens, threads);
            const TextColumn column(data, bounds);
            EncodeInput input;
            input.texts = column.texts();
            int64_t units = 0;
            for (const Text& text : input.texts) units += text.size;
            return encode(self, input, units, options);
        },
        py::arg("data"), py::arg("bounds") = py::none(), py::kw_only(), py::arg("add_special_tokens") = true,
        py::arg("max_length") = -1, py::arg("strategy") = "longest_first", py::arg("stride") = 0,
        py::arg("truncation_side") = "right", py::arg("overflow") = false, py::arg("offsets") = false,
        py::arg("split_special_tokens") = false, py::arg("threads") = 1);
    wordpiece.def_property_readonly("unk_id", &WordPiece::unk_id);
    wordpiece.def("num_special_tokens", &WordPiece::special_tokens, py::arg("pair"));
    wordpiece.def("memory", &WordPiece::memory);
    wordpiece.def("normalize", &normalize, py::arg("text"));

    py::class_<Encodings>(m, "Encodings")
        .def("__len__", [](const Encodings& self) { return self.rows.size(); })
        .def_property_readonly("total", &Encodings::total)
        .def_property_readonly("longest", &Encodings::longest)
        .def("lengths",
             [](const Encodings& self) { return per_row(self, [&](const Row& row) { return self.length(row); }); })
        .def("samples",
             [](const Encodings& self) { return per_row(self, [](const Row& row) { return int64_t{row.sample}; }); })
        .def("cu_seqlens",
             [](const Encodings& self) {
                 py::array_t<int32_t> result(static_cast<py::ssize_t>(self.rows.size() + 1));
                 self.write_bounds(result.mutable_data());
                 return result;
             })
        .def("packed", &packed, py::arg("field"))
        .def("packed_batch", &packed_batch, py::arg("with_types"))
        .def("padded", &padded, py::arg("field"), py::arg("length"), py::arg("value") = 0, py::arg("left") = false)
        .def("lists", &lists, py::arg("field"));
    bind_tokenizer_calls(wordpiece, m.attr("Encodings"));
}

}  // namespace fastbert
