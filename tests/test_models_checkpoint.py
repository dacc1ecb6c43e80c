"""Hugging Face folders, read and written; everything that can be wrong with one."""

import copy
import json
import pickle
import shutil
import struct
import sys

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastbert.models import BertConfig, BertModel, checkpoint
from tests.bert_samples import batch, minilm_folder, random_bert, saved_bert, small_config

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path):
    return saved_bert(tmp_path / "bert")


@pytest.fixture
def expected(folder):
    return BertModel.from_pretrained(folder).state_dict()


def assert_same(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def rewrite(folder, change):
    """model.safetensors with its dictionary of tensors changed."""
    file = folder / checkpoint.SAFETENSORS
    tensors = change(load_file(file))
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder, **changes):
    file = folder / checkpoint.CONFIG
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


# There and back


def test_save_and_load_is_bit_equal(folder, expected, tmp_path):
    BertModel.from_pretrained(folder).save_pretrained(tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    assert_same(BertModel.from_pretrained(tmp_path / "new" / "folder"), expected)
    modes = {file.stat().st_mode for file in (tmp_path / "new" / "folder").iterdir()}
    assert len(modes) == 1, "the weights are as readable as the config"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@torch.no_grad()
def test_transformers_loads_what_we_save(folder, tmp_path, dtype):
    ours = BertModel.from_pretrained(folder, dtype=dtype)
    ours.save_pretrained(tmp_path / "saved")
    theirs, report = transformers.BertModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.dtype == dtype
    original = transformers.BertModel.from_pretrained(folder, dtype=dtype).eval()
    ids, mask, types = batch("right")
    # Copies, because weights mapped from a file lie anywhere, and a product's last bits depend on alignment.
    theirs, original = copy.deepcopy(theirs.eval()), copy.deepcopy(original)
    assert torch.equal(theirs(ids, mask, types)[0], original(ids, mask, types)[0])
    for name, value in original.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name


def test_saved_config_keeps_what_the_model_does_not_use(folder, tmp_path):
    edit_config(folder, id2label={"0": "yes"}, my_own_key=[1, 2], torch_dtype="float16")
    model = BertModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["my_own_key"] == [1, 2]
    assert config["id2label"] == {"0": "yes"}
    assert config["architectures"] == ["BertModel"]
    assert config["dtype"] == "float32"
    assert "torch_dtype" not in config
    assert BertConfig.from_dict(config).hidden_size == model.config.hidden_size


def test_saving_over_the_folder_just_read(folder, expected):
    model = BertModel.from_pretrained(folder)
    model.save_pretrained(folder)
    assert_same(model, expected)
    assert_same(BertModel.from_pretrained(folder), expected)


@pytest.mark.parametrize("failing", ["weights", "config"])
def test_a_failed_save_leaves_no_half_written_file(folder, expected, monkeypatch, failing):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = BertModel.from_pretrained(folder)

    def half(path, *_, **__):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    if failing == "weights":
        monkeypatch.setattr(checkpoint, "save_file", lambda tensors, path, metadata: half(path))
    else:
        monkeypatch.setattr(checkpoint.Path, "write_text", half)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(folder)
    monkeypatch.undo()
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert after.keys() == before.keys()
    assert after["config.json"] == before["config.json"]
    assert_same(BertModel.from_pretrained(folder), expected)


def test_saving_to_a_file_is_refused(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        BertModel.from_pretrained(folder).save_pretrained(tmp_path / "file")


def test_without_pooler(folder, expected, tmp_path):
    model = BertModel.from_pretrained(folder, add_pooling_layer=False)
    assert_same(model, {name: value for name, value in expected.items() if not name.startswith("pooler.")})
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="add_pooling_layer=False"):
        BertModel.from_pretrained(tmp_path / "saved")
    BertModel.from_pretrained(tmp_path / "saved", add_pooling_layer=False)


# Every form in which checkpoints are found


@pytest.mark.parametrize(
    "head", ["BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification", "BertForQuestionAnswering"]
)
def test_a_model_with_a_head(tmp_path, head):
    torch.manual_seed(0)
    model = getattr(transformers, head)(small_config())
    model.save_pretrained(tmp_path)
    pooler = model.bert.pooler is not None
    ours = BertModel.from_pretrained(tmp_path, add_pooling_layer=pooler)
    ids, mask, types = batch("right")
    with torch.no_grad():
        hidden = model.eval().bert(ids, mask, types).last_hidden_state
    real = mask.bool()
    torch.testing.assert_close(ours(ids, mask, types).last_hidden_state[real], hidden[real], rtol=0, atol=1e-5)


def test_names_of_the_oldest_checkpoints(folder, expected):
    def old(tensors):
        renamed = {}
        for name, value in tensors.items():
            if "LayerNorm" in name:
                name = name.replace("weight", "gamma").replace("bias", "beta")
            renamed[f"bert.{name}"] = value
        return renamed | {
            "bert.embeddings.position_ids": torch.arange(40).unsqueeze(0),
            "cls.predictions.transform.LayerNorm.gamma": torch.ones(36),
            "cls.seq_relationship.bias": torch.ones(2),
        }

    rewrite(folder, old)
    assert_same(BertModel.from_pretrained(folder), expected)


def shard(folder, files, save):
    tensors = load_file(folder / checkpoint.SAFETENSORS)
    (folder / checkpoint.SAFETENSORS).unlink()
    weight_map = {name: files[i % len(files)] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    return weight_map


def test_shards(folder, expected):
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = shard(folder, files, save_file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(BertModel.from_pretrained(folder), expected)

    (folder / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002.safetensors does not exist, but"):
        BertModel.from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../../somewhere.safetensors"}}))
    with pytest.raises(ValueError, match=r"'../../somewhere.safetensors'; expected a file beside it"):
        BertModel.from_pretrained(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match='has no "weight_map"'):
        BertModel.from_pretrained(folder)
    index.write_text('{"weight_map": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        BertModel.from_pretrained(folder)


def to_pickle(folder, **arguments):
    tensors = load_file(folder / checkpoint.SAFETENSORS)
    (folder / checkpoint.SAFETENSORS).unlink()
    torch.save(tensors, folder / checkpoint.PICKLED, **arguments)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_the_old_format(folder, expected, zipped):
    to_pickle(folder, _use_new_zipfile_serialization=zipped)
    assert_same(BertModel.from_pretrained(folder), expected)


def test_the_old_format_in_shards(folder, expected):
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    weight_map = shard(folder, files, torch.save)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(BertModel.from_pretrained(folder), expected)


def to_parameters(tensors):
    return {name: torch.nn.Parameter(value) for name, value in tensors.items()}


def test_the_old_format_with_parameters(folder, expected):
    torch.save(to_parameters(load_file(folder / checkpoint.SAFETENSORS)), folder / checkpoint.PICKLED)
    (folder / checkpoint.SAFETENSORS).unlink()
    model = BertModel.from_pretrained(folder)
    assert_same(model, expected)
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_safetensors_come_before_the_old_format(folder, expected):
    (folder / checkpoint.PICKLED).write_bytes(b"never opened")
    assert_same(BertModel.from_pretrained(folder), expected)


def test_dtypes_as_stored_and_as_asked(folder):
    rewrite(folder, lambda tensors: {name: value.bfloat16() for name, value in tensors.items()})
    assert {p.dtype for p in BertModel.from_pretrained(folder).parameters()} == {torch.bfloat16}
    model = BertModel.from_pretrained(folder, dtype=torch.float32, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_mixed_dtypes_become_the_widest_stored(folder, expected):
    def mixed(tensors):
        return {name: value.half() if "word_embeddings" in name else value for name, value in tensors.items()}

    rewrite(folder, mixed)
    model = BertModel.from_pretrained(folder)
    expected["embeddings.word.weight"] = expected["embeddings.word.weight"].half().float()
    assert_same(model, expected)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", torch.int8, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_other_dtypes_are_refused(dtype):
    error = TypeError if isinstance(dtype, str) else ValueError
    with pytest.raises(error, match=r"dtype is .*(float32|int8|e4m3fn|complex64)'?; expected None or one of"):
        BertModel.from_pretrained("no/such/folder", dtype=dtype)


def test_loading_draws_no_random_numbers(folder):
    before = torch.get_rng_state()
    BertModel.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_minilm_round_trip(tmp_path):
    model = BertModel.from_pretrained(minilm_folder())
    model.save_pretrained(tmp_path)
    theirs = transformers.BertModel.from_pretrained(tmp_path)
    for name, value in load_file(minilm_folder() / checkpoint.SAFETENSORS).items():
        if name in theirs.state_dict():
            assert torch.equal(theirs.state_dict()[name], value), name


# The hub


@pytest.fixture
def hub_cache(folder, tmp_path, monkeypatch):
    """huggingface_hub's cache with the checkpoint in it as some-one/small-bert, and no network."""
    hub = pytest.importorskip("huggingface_hub")
    repository = tmp_path / "cache" / "models--some-one--small-bert"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)


def test_a_hub_id_comes_from_the_cache(hub_cache, expected):
    assert_same(BertModel.from_pretrained("some-one/small-bert"), expected)
    assert_same(BertModel.from_pretrained("some-one/small-bert", revision="0" * 40), expected)


def test_a_hub_id_that_is_not_to_be_had(hub_cache):
    with pytest.raises(FileNotFoundError, match="'some-one/other' is not a folder here, and the Hugging Face hub"):
        BertModel.from_pretrained("some-one/other")
    with pytest.raises(FileNotFoundError, match="not a folder here"):
        BertModel.from_pretrained("some-one/small-bert", revision="no-such-branch")


def test_a_hub_id_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"fastbert-kernels\[transformers\]"):
        BertModel.from_pretrained("some-one/small-bert")


# What can be wrong


@pytest.mark.parametrize("path", ["/no/such/folder", "./no/such/folder", "no/such/folder", "../x", ""], ids=str)
def test_no_such_folder(path):
    with pytest.raises(FileNotFoundError, match=r"does not exist|has no config.json"):
        BertModel.from_pretrained(path)


def test_a_file_is_no_folder(folder):
    with pytest.raises(NotADirectoryError, match=r"config.json is a file; expected the folder"):
        BertModel.from_pretrained(folder / "config.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{folder} has no .*{name}|{folder} has no weights; expected {name}"):
        BertModel.from_pretrained(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_safetensors(folder, share):
    file = folder / checkpoint.SAFETENSORS
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or not a safetensors file"):
        BertModel.from_pretrained(folder)


def test_damaged_safetensors_header(folder):
    file = folder / checkpoint.SAFETENSORS
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        BertModel.from_pretrained(folder)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated_old_format(folder, zipped, share):
    to_pickle(folder, _use_new_zipfile_serialization=zipped)
    file = folder / checkpoint.PICKLED
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"pytorch_model.bin is"):
        BertModel.from_pretrained(folder)


class Code:
    ran = False

    def __reduce__(self):
        return setattr, (Code, "ran", True)


@pytest.mark.parametrize("way", ["torch.save", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(folder, way):
    (folder / checkpoint.SAFETENSORS).unlink()
    content = {"embeddings.word_embeddings.weight": Code()}
    if way == "pickle":
        (folder / checkpoint.PICKLED).write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, folder / checkpoint.PICKLED)
    with pytest.raises(ValueError, match=r"could run code; it is refused. Expected model.safetensors"):
        BertModel.from_pretrained(folder)
    assert not Code.ran


def test_an_old_file_without_tensors(folder):
    (folder / checkpoint.SAFETENSORS).unlink()
    torch.save([1, 2], folder / checkpoint.PICKLED)
    with pytest.raises(ValueError, match="holds a list; expected a state_dict"):
        BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "extra, message",
    [
        ({5: torch.ones(1)}, "holds a Tensor under 5; expected a state_dict"),
        ({"epoch": 3}, "holds a int under 'epoch'; expected a state_dict"),
        ({"pooler.dense.bias": torch.ones(36).to_sparse()}, "pooler.dense.bias is torch.sparse_coo; expected a dense"),
        ({"pooler.dense.bias": torch.ones(36, device="meta")}, "pooler.dense.bias is on the meta device; expected a"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*parse invariant checks:UserWarning")
def test_an_old_file_with_other_values(folder, extra, message):
    torch.save(load_file(folder / checkpoint.SAFETENSORS) | extra, folder / checkpoint.PICKLED)
    (folder / checkpoint.SAFETENSORS).unlink()
    with pytest.raises(ValueError, match=message):
        BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "content", [b"abc", b"\x80\x02.", b"\x80\x02}q\x00h\x07.", b"\x80\x02]q\x00X\x01\x00\x00\x00as.", b"(d"], ids=repr
)
def test_an_old_file_of_anything(folder, content):
    (folder / checkpoint.SAFETENSORS).unlink()
    (folder / checkpoint.PICKLED).write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model.bin is"):
        BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"model_type": "bert"', "\x00\xff", "[" * 100000],
    ids=["empty", "brace", "half", "bytes", "deep"],
)
def test_truncated_config(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        BertModel.from_pretrained(folder)


def test_config_that_is_no_object(folder):
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json holds a JSON list; expected an object"):
        BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model_type": "roberta", "architectures": ["RobertaModel"]},
            r"'roberta' \(RobertaModel\); expected \"bert\"",
        ),
        ({"model_type": "gpt2", "architectures": None}, "'gpt2'; expected"),
        ({"model_type": ..., "architectures": ["ElectraModel"]}, "describes ElectraModel"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'; only absolute"),
        ({"is_decoder": True}, "is_decoder is True; only the encoder"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'; expected one of gelu, "),
        ({"num_attention_heads": 5}, "hidden_size is 36; expected a multiple of num_attention_heads, 5"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected an integer, at least 1"),
        ({"vocab_size": -3}, "vocab_size is -3"),
        ({"hidden_size": "36"}, "hidden_size is '36'"),
        ({"intermediate_size": 55.0}, "intermediate_size is 55.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"hidden_act": ["gelu"]}, r"hidden_act is \['gelu'\]; expected one of gelu, "),
        ({"architectures": 5, "model_type": ...}, "architectures is 5; expected a list of names"),
        ({"architectures": 5, "model_type": "t5"}, "architectures is 5; expected a list of names"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .*; quantized checkpoints are not read"),
        ({"vocab_size": 2**62}, "vocab_size is 4611686018427387904; expected at most 268435456"),
        ({"layer_norm_eps": float("inf")}, "layer_norm_eps is inf; expected a positive, finite"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan; expected a positive, finite"),
        ({"layer_norm_eps": 10**400}, "layer_norm_eps is 1000*; expected a positive, finite"),
        ({"initializer_range": float("inf")}, "initializer_range is inf; expected a finite"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0; expected a positive"),
        ({"layer_norm_eps": None}, "layer_norm_eps is None"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob is 1.5"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob is -0.1"),
        ({"initializer_range": -1}, "initializer_range is -1"),
        ({"pad_token_id": 97}, "pad_token_id is 97; expected None or an id below vocab_size, 97"),
    ],
    ids=str,
)
def test_config_of_something_else(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        BertModel.from_pretrained(folder)
    assert str(folder / "config.json") in str(caught.value)


def test_config_without_model_type(folder, expected):
    edit_config(folder, model_type=..., architectures=...)
    assert_same(BertModel.from_pretrained(folder), expected)


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            without("encoder.layer.1.attention.self.key.weight"),
            r"lacks 1 of the 39 tensors its config asks for: encoder.layer.1.attention.self.key.weight",
        ),
        (without("embeddings.LayerNorm.bias"), "lacks 1 .*: embeddings.LayerNorm.bias"),
        (without("pooler.dense.bias"), r"lacks 1 .*: pooler.dense.bias. The checkpoint has no pooler"),
        (lambda tensors: {"embeddings.something": torch.ones(1)}, "has 1 tensors; its config asks for 2 layers"),
        (
            lambda tensors: dict(list(tensors.items())[:3]),
            r"lacks 36 of the 39 .* and 31 more",
        ),
        (
            lambda tensors: {f"module.{name}": value for name, value in tensors.items()},
            r"none of a BERT's tensors, such as .*; it has module.embeddings.LayerNorm.bias, .* and 34 more",
        ),
        (lambda tensors: {}, "none of a BERT's tensors, .*; it has no tensor"),
        (
            lambda tensors: tensors | {"embeddings.LayerNorm.gamma": torch.ones(36)},
            "has both embeddings.LayerNorm.(gamma|weight) and embeddings.LayerNorm.(gamma|weight); expected one",
        ),
        (
            lambda tensors: tensors | {"embeddings.word_embeddings.weight": torch.zeros(98, 36)},
            r"embeddings.word_embeddings.weight has shape \[98, 36\]; the config expects \[97, 36\]",
        ),
        (
            lambda tensors: tensors | {"encoder.layer.0.attention.self.query.weight": torch.zeros(72, 36)},
            r"query.weight has shape \[72, 36\]; the config expects \[36, 36\]",
        ),
        (
            lambda tensors: tensors | {"encoder.layer.0.attention.self.value.bias": torch.zeros(1)},
            r"value.bias has shape \[1\]; the config expects \[36\]",
        ),
        (
            lambda tensors: tensors | {"encoder.layer.2.output.dense.bias": torch.zeros(36)},
            "has 1 tensors that its config has no place for: encoder.layer.2.output.dense.bias",
        ),
        (
            lambda tensors: tensors | {"pooler.dense.bias": torch.zeros(36, dtype=torch.int8)},
            "pooler.dense.bias is torch.int8; expected floating point",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        BertModel.from_pretrained(folder)


@pytest.mark.parametrize("layers", [100_000, 2**28])
def test_more_layers_than_could_be_built(folder, layers, monkeypatch):
    edit_config(folder, num_hidden_layers=layers)
    monkeypatch.setattr(BertModel, "__init__", lambda *_: pytest.fail("a model was built before its names were known"))
    with pytest.raises(ValueError, match=f"has 39 tensors; its config asks for {layers} layers"):
        BertModel.from_pretrained(folder)


def test_config_takes_numpys_integers():
    config = BertConfig(hidden_size=numpy.int64(48), pad_token_id=numpy.int32(1))
    assert config == BertConfig(hidden_size=48, pad_token_id=1)
    assert type(config.hidden_size) is type(config.pad_token_id) is int


def test_config_hashes():
    assert hash(BertConfig()) == hash(BertConfig(extra={"id2label": {"0": "yes"}}))
    assert len({BertConfig(), BertConfig(), BertConfig(hidden_size=48)}) == 2


def test_config_round_trip():
    values = small_config().to_dict()
    config = BertConfig.from_dict(values)
    assert BertConfig.from_dict(config.to_dict()) == config
    assert config.to_dict().items() >= {k: v for k, v in values.items() if k != "architectures"}.items()
    assert BertConfig().to_dict()["model_type"] == "bert"


def test_random_models_differ():
    first, second = random_bert(small_config(), 0), random_bert(small_config(), 1)
    assert not torch.equal(first.pooler.dense.weight, second.pooler.dense.weight)
