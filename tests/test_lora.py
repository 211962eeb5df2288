"""PEFT adapters: every kind that PEFT writes is applied exactly or refused by name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import helpers
import pytest
import safetensors.torch
import torch

from steer_engine import Engine
from steer_engine.checkpoint import Checkpoint, ModuleKind
from steer_engine.errors import CheckpointError
from steer_engine.lora import LoraAdapter, is_adapter

PREFIX = "base_model.model."
QKV = "transformer.h.0.self_attention.query_key_value"
QKV_A, QKV_B = f"{PREFIX}{QKV}.lora_A.weight", f"{PREFIX}{QKV}.lora_B.weight"
LOGITS_TOLERANCE = 1e-4  # fp32, as in test_hf_parity.py


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return helpers.save(helpers.hf_model(), tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def config(base):
    return Checkpoint(base).config


@pytest.fixture(scope="module")
def peft_model(base):
    return helpers.lora_model(base)


@pytest.fixture(scope="module")
def plain(peft_model, tmp_path_factory) -> Path:
    """A plain adapter on all four modules of two layers, as PEFT writes it."""
    directory = tmp_path_factory.mktemp("plain")
    peft_model.save_pretrained(directory)
    return directory


@pytest.fixture
def adapter(plain, tmp_path) -> Path:
    """A copy of the plain adapter to be edited."""
    return helpers.copy_checkpoint(plain, tmp_path / "adapter")


def edit_tensors(directory: Path, change) -> None:
    """Load the adapter's tensors, tensors = change(tensors) or tensors, save."""
    path = directory / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors = {k: v.clone() for k, v in (change(tensors) or tensors).items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def edit_settings(directory: Path, **changes) -> None:
    helpers.edit_json(directory / "adapter_config.json", **changes)


def refusal(directory: Path, config) -> str:
    with pytest.raises(CheckpointError) as raised:
        LoraAdapter.open(directory, config)
    message = str(raised.value)
    assert message.startswith(str(directory / "adapter_"))
    return message


def logits(base: Path, domain: Path | None = None, which: str = "domain") -> torch.Tensor:
    engine = Engine.from_pretrained(
        base, domain, device="cpu", dtype="float32", backend="reference", max_num_seqs=4
    )
    return engine.logits(helpers.random_prompts(4, longest=20), which)


@pytest.fixture(scope="module")
def plain_logits(base, plain):
    return logits(base, plain)


# What is applied ----------------------------------------------------------------------------------


def test_a_loaded_adapter_changes_the_domains_logits_and_not_the_bases(base, plain, plain_logits):
    alone = logits(base)
    assert float((plain_logits - alone).abs().max()) > 0.1
    torch.testing.assert_close(logits(base, plain, "base"), alone, atol=LOGITS_TOLERANCE, rtol=0)


def test_an_adapter_that_was_never_trained_is_refused(adapter, base):
    """PEFT starts with B = 0: domain and base would be one model."""

    def clear_b(tensors):
        for name in tensors:
            if "lora_B" in name:
                tensors[name] = torch.zeros_like(tensors[name])

    edit_tensors(adapter, clear_b)
    with pytest.raises(CheckpointError, match="every LoRA update is 0"):
        Engine.from_pretrained(base, adapter)


def test_the_update_equals_pefts_own_delta(base, config, plain, peft_model):
    from peft.tuners.lora import LoraLayer

    adapter = LoraAdapter.open(plain, config)
    assert len(adapter.pairs) == 2 * len(ModuleKind)
    checkpoint = Checkpoint(base)
    for name, module in peft_model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer, kind = name.removeprefix(f"{PREFIX}transformer.h.").split(".", 1)
        kind = ModuleKind(kind)
        update = adapter.read(int(layer), kind)
        delta = module.get_delta_weight("default").detach()
        if kind is ModuleKind.QKV:  # one group of three q heads, k and v: already in order
            assert checkpoint.config.num_kv_heads == 1
        torch.testing.assert_close(update.b @ update.a, delta, atol=1e-6, rtol=0)


def test_modules_without_an_update_are_none(base, config, tmp_path):
    model = helpers.lora_model(base, target_modules=["query_key_value"], layers_to_transform=[1])
    model.save_pretrained(tmp_path)
    adapter = LoraAdapter.open(tmp_path, config)
    assert set(adapter.pairs) == {(1, ModuleKind.QKV)}
    assert adapter.read(1, ModuleKind.QKV) is not None
    assert adapter.read(0, ModuleKind.QKV) is None and adapter.read(1, ModuleKind.UP) is None


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 8, "r": 4}, 2.0),
        ({"lora_alpha": 16, "r": 4, "use_rslora": True}, 8.0),
        ({"lora_alpha": 1, "r": 4}, 0.25),
        ({"alpha_pattern": {"query_key_value": 40}}, 10.0),
        ({"alpha_pattern": {r"h\.0\.self_attention\.query_key_value": 40}}, 10.0),
        ({"alpha_pattern": {f"^{QKV}": 40}}, 10.0),
        ({"alpha_pattern": {"query_key_value": 40}, "use_rslora": True}, 20.0),
        ({"alpha_pattern": {"key_value": 40, r"h\.1\..*": 12}}, 2.0),
        ({"alpha_pattern": {"query_key_value": 4, QKV: 40}}, 1.0),
        ({"rank_pattern": {"query_key_value": 4}, "r": 32, "lora_alpha": 8}, 2.0),
    ],
)
def test_the_scale_is_alpha_over_r_with_pefts_exceptions(adapter, config, settings, scale):
    # QKV alone is kept, so that r may differ from the other modules' rank.
    edit_tensors(adapter, lambda t: {k: t[k] for k in (QKV_A, QKV_B)})
    edit_settings(adapter, **settings)
    stored = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    update = LoraAdapter.open(adapter, config).read(0, ModuleKind.QKV)
    assert torch.equal(update.a, stored[QKV_A])
    assert torch.equal(update.b, stored[QKV_B] * scale), "powers of two and 10: exact in fp32"


def test_target_modules_is_not_read_the_tensors_decide(adapter, base, plain_logits):
    for targets in (["none_of_them"], ".*", None, ["dense", "query_key_value"]):
        edit_settings(adapter, target_modules=targets)
        assert torch.equal(logits(base, adapter), plain_logits)


def test_settings_of_training_do_not_matter(adapter, base, plain_logits):
    edit_settings(
        adapter,
        inference_mode=False,
        lora_dropout=0.5,
        base_model_name_or_path="elsewhere",
        peft_version="0.4.0",
        bias="lora_only",
        task_type="CAUSAL_LM",
        layers_pattern="h",
        loftq_config={},
    )
    assert torch.equal(logits(base, adapter), plain_logits)


def test_bias_lora_only_writes_nothing_for_falcon_7b_and_is_accepted(base, tmp_path):
    model = helpers.lora_model(base, bias="lora_only")
    model.save_pretrained(tmp_path)
    prompts = helpers.random_prompts(4, longest=20)
    expected = torch.stack([helpers.hf_logits(model, p) for p in prompts])
    torch.testing.assert_close(logits(base, tmp_path), expected, atol=LOGITS_TOLERANCE, rtol=0)


def test_bias_all_writes_the_norms_biases_and_is_refused(base, config, tmp_path):
    helpers.lora_model(base, bias="all").save_pretrained(tmp_path)
    message = refusal(tmp_path, config)
    assert "a trained bias, which is not applied" in message
    assert "transformer.h.0.input_layernorm.bias" in message


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_alone_are_accepted(adapter, config, init):
    edit_settings(adapter, init_lora_weights=init)
    assert LoraAdapter.open(adapter, config).pairs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adapters_load_as_their_own_numbers(adapter, config, dtype):
    edit_tensors(adapter, lambda t: {k: v.to(dtype) for k, v in t.items()})
    stored = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    assert torch.equal(
        LoraAdapter.open(adapter, config).read(0, ModuleKind.QKV).a, stored[QKV_A].float()
    )


def test_a_fp32_adapter_fits_a_bf16_base(base, plain, tmp_path):
    half = helpers.copy_checkpoint(base, tmp_path / "half")
    path = half / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({k: v.bfloat16() for k, v in tensors.items()}, path)
    assert not torch.equal(logits(half, plain), logits(half))


RENAMINGS = {
    "default": lambda n: n.replace("lora_A.", "lora_A.default.").replace("_B.", "_B.default."),
    "orig_mod": lambda n: n.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "orig_mod_in_front": lambda n: f"_orig_mod.{n}",
    "doubled_prefix": lambda n: PREFIX + n,
    "no_prefix": lambda n: n.removeprefix(PREFIX),
    "all_at_once": lambda n: f"_orig_mod.{PREFIX}{n}".replace("lora_A.", "lora_A.default."),
}


@pytest.mark.parametrize("renaming", RENAMINGS)
def test_names_of_raw_state_dicts_are_normalised(adapter, base, plain_logits, renaming):
    rename = RENAMINGS[renaming]
    edit_tensors(adapter, lambda t: {rename(k): v for k, v in t.items()})
    names = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    assert QKV_A not in names
    assert torch.equal(logits(base, adapter), plain_logits)


def test_two_names_that_become_one_are_refused(adapter, config):
    edit_tensors(adapter, lambda t: t | {QKV_A.replace(".weight", ".default.weight"): t[QKV_A]})
    assert f"two tensors are named {QKV}.lora_A.weight" in refusal(adapter, config)


def test_an_adapter_in_a_subfolder_is_taken_by_its_path(base, plain, plain_logits, tmp_path):
    helpers.copy_checkpoint(plain, tmp_path / "run" / "french")
    helpers.copy_checkpoint(plain, tmp_path / "run" / "astro")
    assert torch.equal(logits(base, tmp_path / "run" / "astro"), plain_logits)
    with pytest.raises(CheckpointError, match=r"adapters in subfolders \(astro, french\)"):
        logits(base, tmp_path / "run")


def test_a_saved_head_unties_the_domain(base, config, tmp_path):
    model = helpers.lora_model(base, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    names = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert f"{PREFIX}lm_head.weight" in names
    adapter = LoraAdapter.open(tmp_path, config)
    assert adapter.head is not None
    assert torch.equal(adapter.read_head(), names[f"{PREFIX}lm_head.weight"])


def test_a_head_under_its_name_in_a_raw_state_dict_is_the_same(adapter, config):
    head = torch.ones(config.vocab_size, config.hidden_size)
    name = f"{PREFIX}lm_head.modules_to_save.default.weight"
    edit_tensors(adapter, lambda t: t | {name: head})
    edit_settings(adapter, modules_to_save=["lm_head"])
    assert torch.equal(LoraAdapter.open(adapter, config).read_head(), head)


def test_the_tokenizer_that_trl_saves_beside_an_adapter_is_compared(base, adapter, plain_logits):
    helpers.write_tokenizer(adapter)
    assert torch.equal(logits(base, adapter), plain_logits)
    content = json.loads((adapter / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (adapter / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="0 vocabulary entries and 1 merges"):
        logits(base, adapter)


def test_digests_are_those_of_the_adapters_two_files(plain, config):
    assert set(LoraAdapter.open(plain, config).sha256()) == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_a_directory_with_adapter_config_is_an_adapter(base, plain):
    assert is_adapter(plain) and not is_adapter(base)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"peft_type": None}, "peft_type must be LORA, got None"),
        ({"use_dora": True}, "use_dora is set"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is set"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is set"),
        ({"trainable_token_indices": {"word_embeddings": [1]}}, "trainable_token_indices is set"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is set"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is set"),
        ({"target_parameters": ["x"]}, "target_parameters is set"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is set"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config is set"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config is set"),
        ({"monteclora_config": {"num_samples": 8}}, "monteclora_config is set"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa changes the base"),
        ({"init_lora_weights": "pissa_niter_16"}, "merge the adapter into its base first"),
        ({"init_lora_weights": "olora"}, "init_lora_weights=olora changes the base"),
        ({"init_lora_weights": "corda"}, "init_lora_weights=corda changes the base"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights=loftq changes the base"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights=lora_ga changes the base"),
        ({"modules_to_save": ["word_embeddings", "lm_head"]}, "only lm_head can be replaced"),
        ({"modules_to_save": "lm_head"}, "only lm_head can be replaced"),
        ({"r": 8}, "lora_A has shape [4, 288], base and r imply [8, 288]"),
        ({"r": None}, "r must hold a positive number, got None"),
        ({"r": 0}, "r must hold a positive number, got 0"),
        ({"r": "4"}, "r must hold a positive number, got '4'"),
        ({"r": True}, "r must hold a positive number, got True"),
        ({"lora_alpha": None}, "lora_alpha must hold a positive number"),
        ({"lora_alpha": 0}, "lora_alpha must hold a positive number"),
        ({"lora_alpha": float("nan")}, "lora_alpha must hold a positive number"),
        ({"lora_alpha": float("inf")}, "lora_alpha must hold a positive number"),
        ({"rank_pattern": {"dense": 0}}, "rank_pattern must hold a positive number, got 0"),
        ({"rank_pattern": {"dense": 5}}, "self_attention.dense.lora_A has shape [4, 72]"),
        ({"rank_pattern": ["dense"]}, "rank_pattern must be an object"),
        ({"alpha_pattern": {"dense": "16"}}, "alpha_pattern must hold a positive number"),
        ({"alpha_pattern": {"(dense": 16}}, "no regular expression"),
    ],
)
def test_a_setting_that_cannot_be_applied_is_refused_by_name(adapter, config, settings, message):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert message in refusal(adapter, config)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (f"{PREFIX}{QKV}.lora_magnitude_vector", [120], "a DoRA magnitude"),
        (f"{PREFIX}{QKV}.lora_magnitude_vector.default.weight", [120], "a DoRA magnitude"),
        (f"{PREFIX}{QKV}.lora_B.bias", [120], "a LoRA bias"),
        (f"{PREFIX}transformer.word_embeddings.lora_embedding_A", [4, 320], "embedding"),
        (f"{PREFIX}transformer.word_embeddings.weight", [320, 72], "embedding"),
        (
            f"{PREFIX}transformer.word_embeddings.token_adapter.trainable_tokens_delta",
            [2, 72],
            "embedding",
        ),
        (f"{PREFIX}{QKV}.weight", [120, 72], "not LoRA's A or B"),
        (f"{PREFIX}{QKV}.bias", [120], "a trained bias"),
        (f"{PREFIX}transformer.h.2.mlp.dense_h_to_4h.lora_A.weight", [4, 72], "not LoRA's A or B"),
        (f"{PREFIX}transformer.h.00.mlp.dense_h_to_4h.lora_A.weight", [4, 72], "not LoRA's"),
        (f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight", [4, 72], "not LoRA's A or B"),
        (QKV_A.replace(".weight", ".french.weight"), [4, 72], "not LoRA's A or B"),
    ],
)
def test_a_tensor_that_cannot_be_applied_is_refused_by_name(adapter, config, name, shape, message):
    edit_tensors(adapter, lambda t: t | {name: torch.zeros(shape)})
    got = refusal(adapter, config)
    assert message in got
    short = name.removeprefix(PREFIX).replace(".default.", ".")
    assert short in got


def test_of_many_unknown_tensors_three_are_named(adapter, config):
    """A whole raw state dict, as torch.save(model.state_dict()) would hold it."""
    edit_tensors(
        adapter,
        lambda t: t | {f"{PREFIX}transformer.h.{i}.x.base_layer.weight": t[QKV_A] for i in "01234"},
    )
    message = refusal(adapter, config)
    assert message.count("base_layer.weight") == 3 and ", ..." in message


@pytest.mark.parametrize("part", ["A", "B"])
def test_half_a_pair_is_refused(adapter, config, part):
    def drop(tensors):
        del tensors[QKV_A if part == "B" else QKV_B]

    edit_tensors(adapter, drop)
    assert f"{QKV} has lora_{part} without its partner" in refusal(adapter, config)


def test_an_adapter_without_any_update_is_refused(adapter, config):
    edit_tensors(adapter, lambda t: {f"{PREFIX}x": torch.zeros(1)})
    assert "not LoRA's A or B" in refusal(adapter, config)
    safetensors.torch.save_file({}, adapter / "adapter_model.safetensors")
    assert "holds no LoRA tensor" in refusal(adapter, config)


def test_an_adapter_of_another_base_is_refused_with_both_shapes(base, plain, tmp_path):
    other = helpers.hf_model(hidden_size=96, num_attention_heads=4, num_hidden_layers=2)
    helpers.save(other, tmp_path / "other")
    message = refusal(plain, Checkpoint(tmp_path / "other").config)
    assert "has shape [4, 288], base and r imply [4, 384]" in message
    assert "another base model" in message
    with pytest.raises(CheckpointError, match="another base model"):
        logits(tmp_path / "other", plain)


def test_an_adapter_of_a_deeper_base_is_refused_by_its_first_layer_too_many(plain, tmp_path):
    shallow = helpers.save(helpers.hf_model(num_hidden_layers=1), tmp_path / "shallow")
    assert "transformer.h.1." in refusal(plain, Checkpoint(shallow).config)


def test_a_resized_vocabulary_is_refused_with_both_sizes(base, config, tmp_path):
    """A [PAD] token added by the training script: PEFT saves embedding and head in full."""
    from peft import LoraConfig, get_peft_model
    from transformers import FalconForCausalLM

    model = FalconForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(328)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["query_key_value"]))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    names = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert any("word_embeddings" in n for n in names), "PEFT saved the resized embedding"
    message = refusal(tmp_path, config)
    assert "lm_head has shape [328, 72], the base has [320, 72]" in message
    assert "resized vocabulary" in message


@pytest.mark.parametrize("kind", ["dora", "lora_bias", "embeddings", "trained_tokens", "pissa"])
def test_what_peft_itself_writes_of_other_kinds_is_refused(base, config, tmp_path, kind):
    settings = {
        "dora": {"use_dora": True},
        "lora_bias": {"lora_bias": True},
        "embeddings": {"target_modules": ["word_embeddings", "query_key_value"]},
        "trained_tokens": {"trainable_token_indices": {"word_embeddings": [1, 2]}},
        "pissa": {"init_lora_weights": "pissa"},
    }[kind]
    helpers.lora_model(base, **settings).save_pretrained(tmp_path)
    assert "merge" in refusal(tmp_path, config)


def test_an_adapter_of_pickles_alone_is_refused_unopened(adapter, config, tmp_path):
    (adapter / "adapter_model.safetensors").unlink()
    assert "save the adapter with PEFT's save_pretrained" in refusal(adapter, config)
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "marker")))
    message = refusal(adapter, config)
    assert "adapter_model.bin is a pickle, which is never opened" in message
    assert "safe_serialization=True" in message
    assert not (tmp_path / "marker").exists()


class Trap:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.write_text, (self.marker, "loaded"))


def test_a_pickle_beside_a_good_adapter_is_never_loaded(adapter, base, plain_logits, tmp_path):
    for name in ("adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pth"):
        (adapter / name).write_bytes(pickle.dumps(Trap(tmp_path / "marker")))
    assert torch.equal(logits(base, adapter), plain_logits)
    assert not (tmp_path / "marker").exists()


def test_a_link_out_of_the_adapters_directory_is_refused(adapter, config, tmp_path):
    path = adapter / "adapter_model.safetensors"
    path.rename(tmp_path / "outside.safetensors")
    path.symlink_to("../outside.safetensors")
    assert "outside the checkpoint" in refusal(adapter, config)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64])
def test_a_dtype_that_is_not_read_is_refused(adapter, config, dtype):
    edit_tensors(adapter, lambda t: t | {QKV_A: t[QKV_A].to(dtype)})
    assert "F32, F16 and BF16 are read" in refusal(adapter, config)


@pytest.mark.parametrize("name", [QKV_A, QKV_B])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_poisoned_adapter_is_refused_when_it_is_read(adapter, base, name, value):
    def poison(tensors):
        tensors[name].view(-1)[-1] = value

    edit_tensors(adapter, poison)
    with pytest.raises(CheckpointError, match=r"query_key_value.lora_[AB] holds NaN or infinity"):
        logits(base, adapter)


def test_a_truncated_adapter_is_refused(adapter, config):
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert "damaged or not safetensors" in refusal(adapter, config)


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_a_damaged_adapter_config_is_refused(adapter, config, content):
    (adapter / "adapter_config.json").write_text(content)
    assert "JSON" in refusal(adapter, config)
