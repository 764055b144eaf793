"""What every policy adapter must satisfy: families x checks, on tiny random models, on CPU.

A new family is one entry in tests/policies/tiny_families.py. Every test here takes `case`, so that none can leave a family out.
"""

import json
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from muffin import attention
from muffin.attention import check_prefix_sharing, decoder_config, packed_attention
from muffin.feedback import encode_questions
from muffin.logps import response_logps
from muffin.packing import PackedBatch, PromptSpan, pack
from muffin.pairs import PreferencePair
from muffin.policies import (
    ADAPTERS,
    EncodedResponses,
    PolicyAdapter,
    PolicyOptions,
    encode_pair,
    generation_inputs,
    load_adapter,
    load_policy,
    resolve_checkpoint,
    save_adapter,
)
from tests.policies.tiny_families import FAMILIES, GOLDEN_QUESTION, Family
from tests.tiny import AWKWARD, draw_image

# Log-probs of a response by two ways through a float32 model may differ by this (nats); different inputs differ by far more.
TOLERANCE = 2e-4
CONTROL = 1e-2


@dataclass(frozen=True)
class Case:
    family: Family
    folder: Path
    adapter: PolicyAdapter
    model: nn.Module  # shared by all tests of the family: eval mode, never changed

    def fresh_model(self) -> nn.Module:
        return load_policy(resolve_checkpoint(self.folder), self.adapter, dtype=torch.float32)

    def adapter_with(self, **options) -> PolicyAdapter:
        return load_adapter(resolve_checkpoint(self.folder), PolicyOptions(**options))

    def text(self, ids: Tensor) -> str:
        return self.adapter.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def image_tokens(self, encoded: EncodedResponses) -> int:
        return encoded.prompt_ids.tolist().count(self.adapter.tokenizer.convert_tokens_to_ids(self.family.placeholder))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family = FAMILIES[request.param]
    folder = family.build(tmp_path_factory.mktemp(request.param))
    checkpoint = resolve_checkpoint(folder)
    adapter = load_adapter(checkpoint, PolicyOptions())
    return Case(family, folder, adapter, load_policy(checkpoint, adapter, dtype=torch.float32).eval())


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# The first is large enough that families that cut images cut it, the second is not.
PICTURES = (noise(150, 90), noise(40, 70, seed=1))


def some_prompts(adapter: PolicyAdapter) -> list[EncodedResponses]:
    """A pair with a common beginning, a pair on another image, one-word answers to a second question on the first image."""
    return [
        adapter.encode(PICTURES[0], "What is there?", ("There is a red ring.", "There is a blue ring, and a bar.")),
        adapter.encode(PICTURES[1], "Describe the picture.\nAll of it", ("12 红色", "A long text\n\nwith two parts 🙂")),
        adapter.encode(PICTURES[0], "Is it red?", ("Yes", "No")),
    ]


def sums(model: nn.Module, batch: PackedBatch) -> Tensor:
    with torch.no_grad():
        return response_logps(model, batch).sums


def one_at_a_time(encoded: Sequence[EncodedResponses]) -> list[EncodedResponses]:
    return [replace(item, response_ids=(response,)) for item in encoded for response in item.response_ids]


# --- tokens


def test_prompt_is_golden(case):
    encoded = case.adapter.encode(noise(70, 40), GOLDEN_QUESTION, ())
    assert case.text(encoded.prompt_ids) == case.family.golden


def test_prompt_does_not_depend_on_the_answer(case):
    answers = [*AWKWARD, "Yes", "\n\nYes", "  ", "\tx", "'s"]
    prompt = case.adapter.encode(PICTURES[0], "What?\n", ())
    encoded = case.adapter.encode(PICTURES[0], "What?\n", answers)
    assert torch.equal(prompt.prompt_ids, encoded.prompt_ids) and torch.equal(prompt.position_ids, encoded.position_ids)
    assert len(encoded.response_ids) == len(answers)


def test_response_is_answer_and_one_terminator(case):
    answers = [*AWKWARD, "Yes", "USER: ASSISTANT: user assistant", ""]
    for answer, ids in zip(answers, case.adapter.encode(PICTURES[0], "What?", answers).response_ids, strict=True):
        assert case.text(ids) == answer + case.family.terminator
        assert ids.tolist().count(case.adapter.terminator_id) == 1 and ids[-1] == case.adapter.terminator_id
    assert case.adapter.tokenizer.convert_ids_to_tokens(case.adapter.terminator_id) == case.family.terminator


def test_beginning_of_sequence_stands_once_in_front(case):
    encoded = case.adapter.encode(PICTURES[0], "What?", ("Yes",))
    tokens = case.adapter.tokenizer.convert_ids_to_tokens([*encoded.prompt_ids.tolist(), *encoded.response_ids[0].tolist()])
    if case.family.bos:
        assert tokens[0] == case.family.bos and tokens.count(case.family.bos) == 1
    else:
        assert case.adapter.tokenizer.bos_token not in tokens


def test_control_tokens_in_texts_are_refused(case):
    tokenizer = case.adapter.tokenizer
    controls = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert {case.family.placeholder, case.family.terminator} <= controls
    for control in controls:
        with pytest.raises(ValueError, match="the question holds .* control token"):
            case.adapter.encode(PICTURES[0], f"What is {control} here?", ("Yes",))
        with pytest.raises(ValueError, match="the answer holds .* control token"):
            case.adapter.encode(PICTURES[0], "What is here?", ("Yes", f"A{control}B"))


def test_placeholders_are_as_many_as_image_features(case):
    """Landscape, portrait, square, tiny, long and large images."""
    for size in ((70, 40), (40, 70), (64, 64), (9, 14), (300, 20), (640, 480)):
        encoded = case.adapter.encode(noise(*size), "What?", ())
        with torch.no_grad():
            assert case.image_tokens(encoded) == case.family.image_features(case.model, encoded.vision) > 0, size


def test_truncation_cuts_only_the_response(case):
    question, answers = "What is there?", ("There is a red ring and a bar.", "a")
    whole = case.adapter.encode(PICTURES[0], question, answers)
    prompt = len(whole.prompt_ids)
    cut = case.adapter_with(model_max_length=prompt + 3).encode(PICTURES[0], question, answers)
    assert torch.equal(cut.prompt_ids, whole.prompt_ids)
    assert torch.equal(cut.response_ids[0], whole.response_ids[0][:3]) and case.adapter.terminator_id not in cut.response_ids[0]
    assert torch.equal(cut.response_ids[1], whole.response_ids[1][:3])
    with pytest.raises(ValueError, match=f"the prompt has {prompt} tokens.*--model_max_length {prompt}"):
        case.adapter_with(model_max_length=prompt).encode(PICTURES[0], question, answers)


def test_pair_that_truncation_makes_equal_is_refused(case):
    png, _ = draw_image(random.Random(0))
    answers = {"chosen": "There is a red ring.", "rejected": "There is a red bar."}
    pair = PreferencePair(question="What?", **answers, idx="7", image_bytes=png, metainfo={})
    prompt = len(encode_pair(case.adapter, pair).prompt_ids)
    with pytest.raises(ValueError, match="chosen and rejected are the same 2 tokens once encoded"):
        encode_pair(case.adapter_with(model_max_length=prompt + 2), pair)


def test_equal_images_have_equal_keys(case):
    keys = [case.adapter.encode(noise(70, 40, seed), "What?", ()).vision_key for seed in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2]


def test_an_image_is_seen_once_for_many_prompts(case, monkeypatch):
    """Its tensors are shared, not copied, and each prompt is what `encode` makes of image and question."""
    asked = {"What is there?": ("A red ring.", "红色"), "Is it red?": (), "Describe the picture.\nAll of it": ("12",)}
    alone = [case.adapter.encode(PICTURES[0], question, responses) for question, responses in asked.items()]
    seen = case.adapter.see(PICTURES[0])
    together = [case.adapter.encode_seen(seen, question, responses) for question, responses in asked.items()]
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.prompt_ids, other.prompt_ids) and torch.equal(one.position_ids, other.position_ids)
        assert [ids.tolist() for ids in one.response_ids] == [ids.tolist() for ids in other.response_ids]
        assert one.vision_key == other.vision_key and other.vision is seen.vision
        assert one.vision.keys() == other.vision.keys() and all(torch.equal(one.vision[name], other.vision[name]) for name in one.vision)

    images = []
    see = type(case.adapter).see
    monkeypatch.setattr(type(case.adapter), "see", lambda self, image: images.append(image) or see(self, image))
    questions = encode_questions(case.adapter, PICTURES[0], list(asked))
    assert questions.questions == tuple(asked) and images == [PICTURES[0]]


# --- log-probs


def test_sum_equals_a_loop_over_tokens(case):
    encoded = case.adapter.encode(PICTURES[1], "What is there?", ("A red ring, 12.", "红色\nNo"))
    expected = []
    for response in encoded.response_ids:
        inputs = generation_inputs(case.adapter, [encoded])
        total = 0.0
        for token in response:
            with torch.no_grad():
                total += case.model(**inputs, use_cache=False).logits[0, -1].log_softmax(-1)[token].item()
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token[None, None]], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        expected.append(total)
    torch.testing.assert_close(sums(case.model, pack([encoded], case.adapter)), torch.tensor(expected), rtol=0, atol=TOLERANCE)


def test_batch_equals_singles(case):
    """Packed or padded together, with images of different sizes and one image shared, as each response on its own."""
    encoded = some_prompts(case.adapter)
    together = sums(case.model, pack(encoded, case.adapter))
    alone = torch.cat([sums(case.model, pack([item], case.adapter)) for item in one_at_a_time(encoded)])
    torch.testing.assert_close(together, alone, rtol=0, atol=TOLERANCE)
    backwards = sums(case.model, pack(encoded[::-1], case.adapter)).reshape(3, 2).flip(0).flatten()
    torch.testing.assert_close(together, backwards, rtol=0, atol=TOLERANCE)


def test_gradients_of_a_batch_equal_those_of_singles(case):
    encoded = some_prompts(case.adapter)
    weights = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0])  # distinct, so that responses cannot be taken for each other
    model = case.fresh_model()

    def gradients(batches: list[list[EncodedResponses]]) -> dict[str, Tensor]:
        model.zero_grad()
        logps = torch.cat([response_logps(model, pack(batch, case.adapter)).averages for batch in batches])
        (logps * weights).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    together, alone = gradients([encoded]), gradients([[item] for item in one_at_a_time(encoded)])
    assert together.keys() == alone.keys()
    for name in together:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-3, atol=1e-3 * alone[name].abs().max().item() + 1e-6, msg=name)


def test_sharing_goes_wrong_when_it_should(case, monkeypatch):
    """Negative control: responses that see each other (shared prefix), or a family that cannot share being made to."""
    batch = pack(some_prompts(case.adapter)[:1], case.adapter)
    if case.adapter.spec.prefix_sharing:
        monkeypatch.setattr(attention, "SHORT_SEQUENCE", 0)  # the form that reads spans
        seeing_all = replace(batch.layout, spans=tuple(PromptSpan(span.start, span.end - span.start, (0,)) for span in batch.layout.spans))
        difference = sums(case.model, replace(batch, layout=seeing_all)) - sums(case.model, batch)
        assert abs(difference[0]) < TOLERANCE and abs(difference[1]) > CONTROL
    else:
        assert batch.layout is None and len(batch.input_ids) == 2
        with pytest.raises(ValueError, match="cannot share a prefix"):
            check_prefix_sharing(decoder_config(case.model))


def test_image_is_encoded_once_and_matters(case):
    """Two questions on one image, one on another: the images of a batch are the distinct ones, and each prompt sees its own."""
    first, second, third = some_prompts(case.adapter)
    batch = pack([first, second, third], case.adapter)
    single = pack([first], case.adapter)
    images = case.adapter.cat_vision([first.vision, second.vision])
    assert all(torch.equal(batch.vision[name], images[name]) for name in images)
    assert all(torch.equal(single.vision[name], first.vision[name]) for name in first.vision)
    swapped = [replace(first, vision=third_image(case), vision_key="other"), second, third]
    difference = (sums(case.model, pack(swapped, case.adapter)) - sums(case.model, batch)).abs()
    assert difference[:2].min() > CONTROL and difference[2:].max() < TOLERANCE


def third_image(case: Case) -> dict[str, Tensor]:
    return case.adapter.encode(noise(150, 90, seed=9), "What?", ()).vision


def test_shared_images_need_no_packing(case):
    """`image_index` in a plain forward: rows that show one image give what rows with an image each give."""
    prompts = some_prompts(case.adapter)
    inputs = generation_inputs(case.adapter, prompts)
    shared = inputs | case.adapter.cat_vision([prompts[0].vision, prompts[1].vision]) | {"image_index": torch.tensor([0, 1, 0])}
    with torch.no_grad():
        expected, logits = (case.model(**each, use_cache=False).logits[:, -1] for each in (inputs, shared))
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


# --- generation


def greedy(case: Case, inputs: dict[str, Tensor], **kwargs):
    tokens = {
        "pad_token_id": case.adapter.terminator_id,
        "eos_token_id": case.adapter.terminator_id,
        "max_new_tokens": 4,
        "min_new_tokens": 4,
    }
    with torch.no_grad():
        return case.model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **{**tokens, **kwargs})


def test_generation_agrees_with_log_probs(case):
    """Greedy generation of a left-padded batch scores its tokens as response_logps does, prompt by prompt."""
    prompts = some_prompts(case.adapter)
    inputs = generation_inputs(case.adapter, prompts)
    assert (inputs["attention_mask"].sum(1) == torch.tensor([len(item.prompt_ids) for item in prompts])).all()
    output = greedy(case, inputs)
    generated = output.sequences[:, -4:]
    scores = torch.stack(output.logits, dim=1).float().log_softmax(-1).gather(2, generated[..., None])[..., 0]
    again = [replace(item, response_ids=(ids,)) for item, ids in zip(prompts, generated, strict=True)]
    with torch.no_grad():
        logps = response_logps(case.model, pack(again, case.adapter))
    torch.testing.assert_close(torch.stack(logps.split()), scores, rtol=0, atol=TOLERANCE)


def test_samples_of_a_prompt_see_its_image(case):
    """num_return_sequences repeats prompts and images together: every sample of a prompt starts from that prompt's logits."""
    prompts = some_prompts(case.adapter)[:2]
    inputs = generation_inputs(case.adapter, prompts)
    single, several = greedy(case, inputs), greedy(case, inputs, num_return_sequences=3, do_sample=True)
    torch.testing.assert_close(several.logits[0], single.logits[0].repeat_interleave(3, dim=0), rtol=0, atol=TOLERANCE)


def test_generation_stops_at_the_terminator(case):
    inputs = generation_inputs(case.adapter, some_prompts(case.adapter)[:1])
    output = greedy(case, inputs, min_new_tokens=0, prefix_allowed_tokens_fn=lambda row, ids: [case.adapter.terminator_id])
    assert output.sequences.shape[1] == inputs["input_ids"].shape[1] + 1
    assert output.sequences[0, -1] == case.adapter.terminator_id


def test_yes_and_no_are_next_token_probabilities(case):
    prompt = case.adapter.encode(PICTURES[0], "Is it red?", ("Yes", "No"))
    yes, no = (int(ids[0]) for ids in prompt.response_ids)
    probabilities = greedy(case, generation_inputs(case.adapter, [prompt])).logits[0][0].float().softmax(-1)
    with torch.no_grad():
        logps = response_logps(case.model, pack([prompt], case.adapter)).split()
    assert yes != no
    torch.testing.assert_close(torch.stack([logps[0][0], logps[1][0]]).exp(), probabilities[[yes, no]], rtol=1e-4, atol=1e-7)
    assert probabilities[yes] + probabilities[no] < 1


# --- training


def freeze(case: Case, model: nn.Module) -> list[str]:
    """Freeze what the family freezes; returns the names of those weights."""
    names = [name for name, _ in model.named_parameters() if name.startswith(case.adapter.spec.frozen_modules)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
    return names


def backward(model: nn.Module, batch: PackedBatch) -> float:
    """Loss and gradients of the mean negative log-prob, inside the context that checkpointed layers need."""
    if batch.layout is None:
        loss = -response_logps(model, batch).averages.mean()
        loss.backward()
    else:
        with packed_attention(model):
            loss = -response_logps(model, batch).averages.mean()
            loss.backward()
    return loss.item()


def test_every_trainable_weight_gets_a_gradient(case):
    model = case.fresh_model().train()
    batch = pack(some_prompts(case.adapter), case.adapter)
    names = freeze(case, model)
    assert names
    backward(model, batch)
    without = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert without == []
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name in names)


def test_gradient_checkpointing_changes_nothing(case):
    losses, gradients = [], []
    batch = pack(some_prompts(case.adapter)[:2], case.adapter)
    for checkpointing in (False, True):
        model = case.fresh_model().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        freeze(case, model)
        losses.append(backward(model, batch))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_lora_trains_the_language_model_alone(case):
    base = case.fresh_model()
    batch = pack(some_prompts(case.adapter), case.adapter)
    reference = sums(base.eval(), batch)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=case.adapter.spec.lora_targets, init_lora_weights=False))
    hit = {name.removeprefix("base_model.model.").partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(hit) == case.family.lora_modules
    assert not [name for name in hit if name.startswith(case.family.vision_modules)]
    assert (sums(model.eval(), batch) - reference).abs().max() > CONTROL
    with model.disable_adapter():
        torch.testing.assert_close(sums(model, batch), reference, rtol=0, atol=TOLERANCE)
    backward(model.train(), batch)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".lora_" in name and parameter.grad.abs().max() > 0 for name, parameter in trainable.items())


def test_quantization_and_lora_change_the_same_linears(case):
    """Under --bits 4 the decoder's linears are quantised, nothing else, and the log-probs stay near those of the exact weights."""
    skipped = list(case.adapter.spec.quantization_skip)
    kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(**kind, llm_int8_skip_modules=skipped)
    checkpoint = resolve_checkpoint(case.folder)
    model = load_policy(checkpoint, case.adapter, dtype=torch.float32, quantization_config=config).eval()
    quantised = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert quantised == {name for name, _ in case.model.named_modules() if re.fullmatch(case.adapter.spec.lora_targets, name)}
    batch = pack(some_prompts(case.adapter), case.adapter)
    exact, rounded = sums(case.model, batch), sums(model, batch)
    assert (exact - rounded).abs().max() > 0 and torch.corrcoef(torch.stack([exact, rounded]))[0, 1] > 0.95


# --- checkpoints and options


def test_saved_policy_is_the_same_policy(case, tmp_path):
    adapter = case.adapter_with(**case.family.options)
    policy = load_policy(resolve_checkpoint(case.folder), adapter, dtype=torch.float32).eval()
    policy.save_pretrained(tmp_path)
    save_adapter(adapter, tmp_path)
    loaded = load_adapter(resolve_checkpoint(tmp_path), PolicyOptions())
    assert type(loaded) is type(adapter) and loaded.settings() == adapter.settings()
    assert {name: adapter.settings()[name] for name in case.family.options} == case.family.options
    first, second = some_prompts(adapter), some_prompts(loaded)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.prompt_ids, other.prompt_ids) and torch.equal(one.position_ids, other.position_ids)
        assert all(map(torch.equal, one.response_ids, other.response_ids)) and one.vision_key == other.vision_key
    model = load_policy(resolve_checkpoint(tmp_path), loaded, dtype=torch.float32).eval()
    assert torch.equal(sums(model, pack(second, loaded)), sums(policy, pack(first, adapter)))


def test_lora_folder_is_a_policy(case, tmp_path):
    """A saved LoRA adapter leads to its base model and is merged into it."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=case.adapter.spec.lora_targets, init_lora_weights=False)
    model = get_peft_model(case.fresh_model().eval(), lora)
    model.save_pretrained(tmp_path)
    save_adapter(case.adapter, tmp_path)
    checkpoint = resolve_checkpoint(tmp_path)
    assert checkpoint.base == case.folder and checkpoint.lora == tmp_path
    merged = load_policy(checkpoint, load_adapter(checkpoint, PolicyOptions()), dtype=torch.float32).eval()
    assert not any("lora" in name for name, _ in merged.named_modules())
    batch = pack(some_prompts(case.adapter), case.adapter)
    torch.testing.assert_close(sums(merged, batch), sums(model, batch), rtol=1e-5, atol=TOLERANCE)
    assert (sums(merged, batch) - sums(case.model, batch)).abs().max() > CONTROL


def test_weights_must_be_whole(case, tmp_path):
    case.model.save_pretrained(tmp_path)
    save_adapter(case.adapter, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    for changed, kind in (
        ({key: value for key, value in weights.items() if key != name}, "missing"),
        ({**weights, name.replace("q_proj", "r_proj"): weights[name].clone()}, "unexpected"),
    ):
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"1 {kind} keys"):
            load_policy(resolve_checkpoint(tmp_path), case.adapter, dtype=torch.float32)


def test_options_change_the_encoding_or_are_refused(case):
    """Every option either changes the settings (and with them the reference id) or is refused with its flag."""
    values = {"prompt_name": "x", "image_aspect_ratio": "x", "max_pixels": 0, "max_slice_nums": 0, "downsample_mode": "x"}
    assert values.keys() == {field.name for field in fields(PolicyOptions)} - {"policy", "model_max_length"}
    for name, bad in values.items():
        with pytest.raises(ValueError, match=f"--{name} {bad}"):
            case.adapter_with(**{name: bad})
        if name in case.family.options:
            changed = case.adapter_with(**{name: case.family.options[name]})
            assert changed.settings() != case.adapter.settings() and changed.settings()[name] == case.family.options[name]


def test_adapter_is_chosen_by_the_checkpoints_config(case, tmp_path):
    """An unknown model type is refused with a list of the known ones, unless `policy` names the family."""
    config = json.loads((case.folder / "config.json").read_text())
    shutil.copytree(case.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "own_vlm"}))
    checkpoint = resolve_checkpoint(tmp_path)
    assert type(case.adapter) is case.family.adapter is ADAPTERS[config["model_type"]]
    assert {family.adapter for family in FAMILIES.values()} == set(ADAPTERS.values())  # no adapter is left out of this suite
    with pytest.raises(ValueError, match=f"has model_type 'own_vlm'; supported: {', '.join(sorted(ADAPTERS))}"):
        load_adapter(checkpoint, PolicyOptions())
    brought = config | {"model_type": "own_vlm", "auto_map": {"AutoModel": "modeling_own.OwnVLM"}}
    (tmp_path / "config.json").write_text(json.dumps(brought))
    with pytest.raises(ValueError, match=r"auto_map\) is never run \(trust_remote_code is off\)"):
        load_adapter(checkpoint, PolicyOptions())
    with pytest.raises(ValueError, match=f"--policy own is unknown; choose from {', '.join(sorted(ADAPTERS))}"):
        load_adapter(checkpoint, PolicyOptions(policy="own"))
    adapter = load_adapter(checkpoint, PolicyOptions(policy=config["model_type"]))
    assert type(adapter) is type(case.adapter) and adapter.settings() == case.adapter.settings()
    model = load_policy(checkpoint, adapter, dtype=torch.float32).eval()
    batch = pack(some_prompts(adapter), adapter)
    assert torch.equal(sums(model, batch), sums(case.model, batch))
