"Loading: what a name means, and one clear line where it means nothing."
import json
import shutil
import time
from importlib import import_module
from unittest.mock import patch

import pytest
import torch

from sftlab.errors import ModelError
from sftlab.models import find, load, pick_dtype, tiny_path


def test_the_environment_chooses_the_preset(monkeypatch):
    monkeypatch.setenv("SFTLAB_PRESET", "no-such")
    with pytest.raises(ModelError, match="no preset 'no-such'.*tiny, small, t4, gpu"):
        load()
    assert load("tiny")[0].config.model_type == "llama"  # an argument counts for more


@pytest.mark.parametrize("capability, dtype", [
    ((7, 0), torch.float16), ((7, 5), torch.float16),
    ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)])
def test_bfloat16_only_where_the_card_has_it(capability, dtype):
    with (patch("torch.cuda.get_device_capability", return_value=capability),
          patch("torch.cuda.is_bf16_supported", return_value=True)):
        assert pick_dtype("cuda") == dtype


def test_the_tiny_model_stays_on_the_cpu_where_there_is_a_gpu():
    with patch("torch.cuda.is_available", return_value=True):
        model, _ = load("tiny")
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)


@pytest.mark.parametrize("name, message", [
    ("someone/no-such-model", "not on this machine.*cannot be reached.*tiny, small, t4, gpu"),
    ("/no/such/folder", "no folder /no/such/folder"),
    ("./nothing", "no folder nothing"),
    ("two words", "neither a folder here nor a possible hub id"),
])
def test_a_wrong_name_fails_at_once_in_one_line(name, message):
    import_module("huggingface_hub.hf_api")  # which is not what is timed
    start = time.time()
    with pytest.raises(ModelError, match=message) as error:
        load(name)
    assert "\n" not in str(error.value) and time.time() - start < 5


def test_a_folder_without_a_model_and_one_with_a_broken_one(tmp_path):
    with pytest.raises(ModelError, match="holds no model"):
        load(str(tmp_path))
    shutil.copytree(tiny_path(), tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").unlink()
    with pytest.raises(ModelError, match="broken cannot be loaded"):
        load(str(tmp_path / "broken"))


def test_an_adapter_made_where_the_course_was_elsewhere_finds_the_tiny_model(tmp_path):
    from peft import LoraConfig, get_peft_model
    model, tokenizer = load("tiny")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | dict(base_model_name_or_path="/x/sftlab/assets/tiny")))
    base = load(str(tmp_path))[0].get_base_model()
    assert base.config.hidden_size == model.config.hidden_size
    file.write_text(json.dumps(config | dict(base_model_name_or_path="/x/another-model")))
    with pytest.raises(ModelError, match="no folder /x/another-model"):
        load(str(tmp_path))


def test_four_bits_without_bitsandbytes_get_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    says = "need bitsandbytes, which is not installed: pip install bitsandbytes"
    with pytest.raises(ModelError, match=says):
        load("tiny", four_bit=True)


def test_find_leaves_a_folder_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert find(str(tmp_path)) == str(tmp_path)
