"""A soup is the weighted sum, to the bit where one policy has all the weight; what cannot be mixed is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from rlhf_lab.engine.models import load_frozen
from rlhf_lab.engine.soups import check_soup, merge
from rlhf_lab.engine.tokenizer import load_tokenizer

Folder = Callable[[str], str]
TOKENS = torch.tensor([[5, 9, 40, 7]])


def perturbed(source: str, folder: Path, seed: int) -> str:
    """A copy of a model folder, its weights moved by noise."""
    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    moved = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in sorted(tensors.items())}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture
def trio(hf_folder: Folder, tmp_path: Path) -> list[str]:
    return [perturbed(hf_folder("llama"), tmp_path / f"policy_{i}", i) for i in range(3)]


def soup(policies: list[str], weights: list[float], space, folder: Path) -> Path:
    folder.mkdir()
    merge(policies, weights, space, folder)
    return folder


def logits(folder: str | Path) -> Tensor:
    model = load_frozen(str(folder), device=torch.device("cpu"), dtype="float32", seed=0)
    return model(input_ids=TOKENS).logits


def test_soup_is_the_weighted_sum_of_every_tensor_and_loads_as_a_model(trio, tmp_path):
    made = soup(trio, [0.2, 0.3, 0.5], "weights", tmp_path / "soup")
    a, b, c = (load_file(Path(policy) / "model.safetensors") for policy in trio)
    mixed = load_file(made / "model.safetensors")
    assert mixed.keys() == a.keys()
    for name, tensor in mixed.items():
        assert_close(tensor, 0.2 * a[name] + 0.3 * b[name] + 0.5 * c[name])
    expected = transformers.AutoModelForCausalLM.from_pretrained(trio[0])
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(mixed[name])
    assert_close(logits(made), expected(input_ids=TOKENS).logits)
    assert load_tokenizer(str(made)).get_vocab() == load_tokenizer(trio[0]).get_vocab()


def test_tied_weights_stay_tied(trio, tmp_path):
    made = soup(trio[:2], [0.5, 0.5], "weights", tmp_path / "soup")
    model = load_frozen(str(made), device=torch.device("cpu"), dtype="float32", seed=0)
    assert getattr(model.get_output_embeddings(), "weight", None) is model.get_input_embeddings().weight
    assert "lm_head.weight" not in load_file(made / "model.safetensors")


@pytest.mark.parametrize("chosen", [0, 2])
def test_one_weight_of_one_is_that_policy_to_the_bit(trio, tmp_path, chosen):
    tensors = load_file(Path(trio[chosen]) / "model.safetensors")
    name = next(iter(sorted(tensors)))
    tensors[name].view(-1)[:2] = torch.tensor([-0.0, 1e-42])  # what a sum from 0 or in less precision would lose
    save_file(tensors, Path(trio[chosen]) / "model.safetensors", metadata={"format": "pt"})
    weights = [float(i == chosen) for i in range(3)]
    made = load_file(soup(trio, weights, "weights", tmp_path / "soup") / "model.safetensors")
    for name, tensor in tensors.items():
        assert tensor.numpy().tobytes() == made[name].numpy().tobytes()


def test_sharded_models_mix_as_whole_ones_do(trio, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(trio[1])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    load_tokenizer(trio[1]).save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    whole = soup(trio[:2], [0.25, 0.75], "weights", tmp_path / "whole")
    parts = soup([trio[0], str(tmp_path / "sharded")], [0.25, 0.75], "weights", tmp_path / "parts")
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()


def test_half_precision_is_mixed_in_double(trio, tmp_path):
    for policy in trio[:2]:
        tensors = {n: t.bfloat16() for n, t in load_file(Path(policy) / "model.safetensors").items()}
        save_file(tensors, Path(policy) / "model.safetensors", metadata={"format": "pt"})
    made = load_file(soup(trio[:2], [0.3, 0.7], "weights", tmp_path / "soup") / "model.safetensors")
    a, b = (load_file(Path(policy) / "model.safetensors") for policy in trio[:2])
    for name, tensor in made.items():
        assert torch.equal(tensor, (0.3 * a[name].double() + 0.7 * b[name].double()).bfloat16())


def change_config(folder: str, file: str, **changes: object) -> None:
    path = Path(folder) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([0.5, 0.6], "add up to 1.1"),
        ([1.2, -0.2], "0 or more"),
        ([1.0], "stage.weights has 1 entries for 2 stage.policies"),
    ],
)
def test_weights_that_are_no_shares_are_refused(trio, tmp_path, weights, said):
    with pytest.raises(ValueError, match=said):
        merge(trio[:2], weights, "weights", tmp_path)


def test_policies_that_do_not_fit_are_refused(trio, hf_folder, tmp_path):
    with pytest.raises(ValueError, match=r"not one architecture.*only policies that started from one model"):
        check_soup([trio[0], hf_folder("gpt2")], [0.5, 0.5], "weights")
    with pytest.raises(ValueError, match="no such folder: /nope"):
        check_soup([trio[0], "/nope"], [0.5, 0.5], "weights")
    check_soup([trio[0], "/nope"], [0.5, 0.5], "weights", promised={"/nope"})
    with pytest.raises(ValueError, match=r"is not a LoRA adapter.*models use stage.space=weights"):
        check_soup(trio[:2], [0.5, 0.5], "delta")
    change_config(trio[1], "config.json", num_attention_heads=2)  # the shapes stay as they are
    with pytest.raises(ValueError, match="num_attention_heads is 4 and 2"):
        check_soup(trio[:2], [0.5, 0.5], "weights")


def test_other_shapes_and_names_are_refused(trio):
    path = Path(trio[1]) / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "model.norm.weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(32,\) in .*, \(3,\) in "):
        check_soup(trio[:2], [0.5, 0.5], "weights")
    save_file({**tensors, "lm_head.weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"other tensors; differing: \['lm_head.weight'\]"):
        check_soup(trio[:2], [0.5, 0.5], "weights")


def test_other_tokenizers_are_refused(trio, write_tokenizer):
    write_tokenizer("llama", 20).save_pretrained(trio[1])
    with pytest.raises(ValueError, match="differ in their vocabulary"):
        check_soup(trio[:2], [0.5, 0.5], "weights")
    tokenizer = load_tokenizer(trio[0])
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(trio[1])
    with pytest.raises(ValueError, match="differ in their chat template"):
        check_soup(trio[:2], [0.5, 0.5], "weights")


def adapter(base: str, folder: Path, seed: int, rank: int = 4, alpha: int = 8, **settings) -> str:
    """A LoRA adapter with random factors."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings
    )
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return str(folder)


def products(folder: str | Path) -> dict[str, Tensor]:
    """module -> scale B A, the change that an adapter makes."""
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    return {
        name: scale * tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
        for name in tensors
        if "lora_A" in name
    }


def test_delta_adds_up_the_products_of_adapters_of_any_rank_and_scale(hf_folder, tmp_path):
    base = hf_folder("llama")
    one = adapter(base, tmp_path / "one", 1, rank=4, alpha=8)
    two = adapter(base, tmp_path / "two", 2, rank=2, alpha=6, use_rslora=True)
    made = soup([one, two], [0.3, 0.7], "delta", tmp_path / "soup")
    expected, a, b = products(made), products(one), products(two)
    assert json.loads((made / "adapter_config.json").read_text())["r"] == 6
    for name, product in expected.items():
        assert_close(product, 0.3 * a[name] + 0.7 * b[name], atol=1e-6, rtol=1e-5)
    reversed_ = soup([two, one], [0.7, 0.3], "delta", tmp_path / "reversed")
    for name, product in products(reversed_).items():
        assert_close(product, expected[name], atol=1e-6, rtol=1e-5)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, product in expected.items():
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_parameter(f"{layer}.weight").add_(product.float())
    assert_close(logits(made), model(input_ids=TOKENS).logits, atol=1e-4, rtol=1e-4)


def test_adapter_averages_the_factors_which_is_another_change(hf_folder, tmp_path):
    base = hf_folder("llama")
    both = [adapter(base, tmp_path / str(i), i) for i in (1, 2)]
    made = soup(both, [0.5, 0.5], "adapter", tmp_path / "soup")
    a, b = (load_file(Path(policy) / "adapter_model.safetensors") for policy in both)
    for name, tensor in load_file(made / "adapter_model.safetensors").items():
        assert_close(tensor, (a[name] + b[name]) / 2)
    exact = products(soup(both, [0.5, 0.5], "delta", tmp_path / "exact"))
    for name, product in products(made).items():
        assert (product - exact[name]).norm() / exact[name].norm() > 0.3
    assert not torch.allclose(logits(made), logits(tmp_path / "exact"), atol=1e-3)


@pytest.mark.parametrize("space", ["adapter", "delta"])
@pytest.mark.parametrize("chosen", [0, 1])
def test_one_weight_of_one_is_that_adapter_to_the_bit(hf_folder, tmp_path, space, chosen):
    base = hf_folder("llama")
    both = [adapter(base, tmp_path / str(i), i, rank=3, alpha=7, use_rslora=True) for i in (0, 1)]
    made = soup(both, [1.0 - chosen, float(chosen)], space, tmp_path / "soup")
    ours, theirs = (Path(folder) / "adapter_model.safetensors" for folder in (made, both[chosen]))
    assert {n: t.numpy().tobytes() for n, t in load_file(ours).items()} == {
        n: t.numpy().tobytes() for n, t in load_file(theirs).items()
    }
    assert torch.equal(logits(made), logits(both[chosen]))


def test_adapters_that_do_not_fit_are_refused(hf_folder, tmp_path):
    base = hf_folder("llama")
    one = adapter(base, tmp_path / "one", 1)
    wide = adapter(base, tmp_path / "wide", 2, rank=6)
    with pytest.raises(ValueError, match=r"differ in r: 4 and 6; stage.space=delta mixes"):
        check_soup([one, wide], [0.5, 0.5], "adapter")
    check_soup([one, wide], [0.5, 0.5], "delta")
    with pytest.raises(ValueError, match=r"is not a model: .*LoRA adapters use stage.space=delta"):
        check_soup([one, wide], [0.5, 0.5], "weights")
    change_config(wide, "adapter_config.json", use_dora=True)
    with pytest.raises(ValueError, match=r"use_dora=True; only plain LoRA factors"):
        check_soup([one, wide], [0.5, 0.5], "delta")
    change_config(wide, "adapter_config.json", use_dora=False, base_model_name_or_path="elsewhere")
    with pytest.raises(ValueError, match=r"differ in base_model_name_or_path: .* and 'elsewhere'"):
        check_soup([one, wide], [0.5, 0.5], "delta")
