"""A packed row is the same mathematics as its records one by one, through transformers' own LLaVA."""

import copy
import dataclasses
import sys
import types

import pytest
import torch
from conftest import encode_example, train_flags
from conversions import make_language_config
from peft.tuners.lora import LoraLayer
from torch._dynamo.utils import counters
from torch.nn import functional
from transformers import LlavaConfig, LlavaForConditionalGeneration

from meme_llava.dataset.collator import PackingCollator, read_pixels, to_pixel_values
from meme_llava.dataset.conversation import Turn
from meme_llava.dataset.images import open_image
from meme_llava.errors import UserError
from meme_llava.model import packed_attention
from meme_llava.model.llava import load_llava, load_processing
from meme_llava.model.packed_attention import (
    FLASH_ATTENTION_2,
    KERNELS,
    MATMUL,
    SDPA,
    VARLEN,
    choose_attention,
    find_optional,
    find_varlen_attention,
)
from meme_llava.model.packed_llava import (
    PackedLlava,
    answer_unpacked,
    compile_layers,
    load_packed_llava,
    prepare_packed_llava,
)
from meme_llava.model.trainable import prepare_trainable
from meme_llava.train.session import check_compiler
from meme_llava.train.settings import parse_train_arguments

ASK = "<image>\n图里写了什么？"
CHAT = {"input_ids": torch.tensor([[5, 3, 8, 11]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
# Per case: (images, question, answer, question, answer, …) of every record.
CASES = {
    "text_only": [((), "你好", "写着困。"), ((), "你好", "收到")],
    "one_image": [((0,), ASK, "写着“我太难了”。")],
    "several_captions_of_one_image": [
        ((0,), ASK, "写着“我太难了”。"),
        ((0,), ASK, "写着“好耶”。"),
        ((0,), ASK, "困"),
        ((0,), "<image>\n什么意思？", "很开心。"),
    ],
    "many_images": [
        ((0, 1), "<image>和<image>\n有什么不同？", "困"),
        ((0, 1), "<image>和<image>\n有什么不同？", "收到，好耶"),
        ((0, 2), "<image>和<image>\n有什么不同？", "困"),
        ((0, 0), "<image>和<image>\n有什么不同？", "没有"),
    ],
    "two_turns": [
        ((3,), ASK, "写着“收到”。", "什么意思？", "很开心。"),
        ((3,), ASK, "写着“收到”。", "什么意思？", "好耶"),
        ((3,), ASK, "写着“收到”。"),
    ],
    "the_question_before_the_image": [((1,), "图里写了什么？<image>", "困"), ((1,), "什么意思？<image>", "困")],
    "the_same_record_twice": [((4,), ASK, "摸鱼中"), ((4,), ASK, "摸鱼中")],
    "everything_together": [
        ((0,), ASK, "写着“我太难了”。"),
        ((), "你好", "写着困。"),
        ((1, 2), "<image>和<image>\n有什么不同？", "收到"),
        ((0,), ASK, "写着“好耶”。", "什么意思？", "很开心。"),
        ((1,), ASK, "爱了爱了"),
        ((0, 2), "<image>和<image>\n有什么不同？", "收到"),
    ],
}


@pytest.fixture(scope="module")
def processing(world):
    return load_processing(world.base)


@pytest.fixture(scope="module")
def collator(processing):
    return PackingCollator(processing.encoder.image_token_id, processing.tokens_per_image, processing.image_policy.size)


def make_examples(world, processing, records) -> list[dict]:
    examples = []
    for number, (images, *texts) in enumerate(records):
        turns = [Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)]
        encoded = encode_example(processing.encoder, turns)
        paths = tuple(world.image_folder / f"p{image}.png" for image in images)
        examples.append(
            {
                "record_id": f"r{number}",
                "input_ids": torch.tensor(encoded.input_ids),
                "labels": torch.tensor(encoded.labels),
                "image_paths": paths,
                "pixel_values": [read_pixels(path, processing.image_policy) for path in paths],
            }
        )
    return examples


def load_packed(world, processing, **changes):
    """A model with what learns, and dropout off; LoRA's second matrices are not zero, so that all gradients flow."""
    arguments = parse_train_arguments(train_flags(world, world.folder, lora_dropout=0, **changes), "")
    model = load_packed_llava(world.base, torch.float32, processing.image_policy, SDPA)
    model = prepare_trainable(model, arguments, arguments.seed)
    randomise_lora(model)
    return model


def load_plain(world, **changes):
    arguments = parse_train_arguments(train_flags(world, world.folder, lora_dropout=0, **changes), "")
    model = prepare_trainable(load_llava(world.base, torch.float32), arguments, arguments.seed)
    randomise_lora(model)
    return model


def randomise_lora(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def sum_losses_one_by_one(model, processing, examples, average):
    """The loss as a person would write it: every record alone, all logits, cross entropy of the next token."""
    total = 0.0
    for example in examples:
        pixels = [to_pixel_values(open_image(path), processing.image_policy) for path in example["image_paths"]]
        logits = model(
            input_ids=example["input_ids"][None],
            pixel_values=torch.stack(pixels) if pixels else None,
            use_cache=False,
        ).logits[0]
        losses = functional.cross_entropy(logits[:-1], example["labels"][1:], reduction="none", ignore_index=-100)
        count = int((example["labels"][1:] != -100).sum())
        total = total + losses.sum() / (count if average == "caption" else 1)
    return total


def collect_gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("average", ["token", "caption"])
@pytest.mark.parametrize("train_type", ["lora", "full"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_separate_records(world, processing, collator, case, train_type, average):
    examples = make_examples(world, processing, CASES[case])
    packed = load_packed(world, processing, train_type=train_type)
    plain = load_plain(world, train_type=train_type)
    collate = PackingCollator(
        collator.image_token_id, collator.tokens_per_image, collator.image_size, loss_average=average
    )
    ours = packed(**collate(examples))["loss"]
    expected = sum_losses_one_by_one(plain, processing, examples, average)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    ours.backward()
    expected.backward()
    ours, expected = collect_gradients(packed), collect_gradients(plain)
    assert set(ours) == set(expected)
    for name, gradient in expected.items():
        if gradient is None:
            # A text has no image to learn from; the parts that see images get zeros.
            assert case == "text_only" and not ours[name].any(), name
            continue
        if "vision_tower" in name and name.endswith("k_proj.bias"):
            # It adds the same to all scores of a query: the true gradient is zero, and what is there is rounding.
            assert ours[name].norm() < 1e-6 and gradient.norm() < 1e-6, name
            continue
        assert float((ours[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name


def test_a_record_sees_nothing_of_its_neighbours(world, processing, collator):
    """Another neighbour changes nothing, to the bit; the same holds for two captions of one image."""
    model = load_packed(world, processing).eval()
    own, one, other = (
        ((0,), ASK, "写着“我太难了”。"),
        ((0,), ASK, "很开心，好耶好耶"),
        ((5,), "<image>\n什么意思？", "困"),
    )

    def read_own_loss(*records):
        batch = collator(make_examples(world, processing, records))
        # The loss of one token, the last of the first record.
        target = processing.encoder.turn_end_id
        keep = (batch["loss_targets"] == target).nonzero()[:1, 0]
        batch.update({name: batch[name][keep] for name in ("loss_positions", "loss_targets", "loss_weights")})
        with torch.no_grad():
            return model(**batch)["loss"]

    # Sorted by tokens, one of both captions comes first; it is the same one in each call.
    assert torch.equal(read_own_loss(own), read_own_loss(own, other))
    assert torch.equal(read_own_loss(own, one), read_own_loss(own, one, other))


def make_language_model_pair(world, processing, model_type, **changes):
    """A packed LLaVA and transformers' own with the same random weights and another language model of the tiny size."""
    config = LlavaConfig.from_pretrained(world.base)
    config.text_config = make_language_config(model_type, **changes)
    torch.manual_seed(0)
    plain, packed = LlavaForConditionalGeneration(copy.deepcopy(config)), PackedLlava(copy.deepcopy(config))
    packed.load_state_dict(plain.state_dict())
    prepare_packed_llava(packed, processing.image_policy, SDPA, "test")
    return packed, plain


def check_equal_to_separate_records(packed, plain, processing, batch, examples):
    ours, expected = packed(**batch)["loss"], sum_losses_one_by_one(plain, processing, examples, "token")
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    ours.backward()
    expected.backward()
    ours = collect_gradients(packed)
    for name, gradient in collect_gradients(plain).items():
        if gradient is not None and "vision_tower" not in name:
            assert float((ours[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name


@pytest.mark.parametrize("model_type", ["mistral", "phi3", "qwen2", "gemma3_text"])
def test_sliding_windows_equal_separate_records(world, processing, collator, model_type):
    examples = make_examples(world, processing, CASES["everything_together"])
    batch = collator(examples)
    packed, plain = make_language_model_pair(world, processing, model_type)
    assert packed.config.text_config.sliding_window < batch["max_seqlen_q"]
    assert len(batch["kv_index"]) > batch["input_ids"].shape[1]  # something is shared
    check_equal_to_separate_records(packed, plain, processing, batch, examples)


@pytest.mark.parametrize(
    "model_type",
    [
        *("lfm2", "falcon_h1", "gemma2", "stablelm"),
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("qwen3_5_text", "bamba", "jamba", "granitemoehybrid", "llama4_text", "gpt_oss", "nemotron")
        ),
    ],
)
def test_records_that_cannot_share_a_row_train_one_by_one(world, processing, collator, model_type):
    examples = make_examples(world, processing, CASES["everything_together"])
    packed, plain = make_language_model_pair(world, processing, model_type)
    batch = dataclasses.replace(collator, shared_images=False)(examples)
    check_equal_to_separate_records(packed, plain, processing, batch, examples)
    # They answer as transformers has them answer, too.
    expected = plain.generate(**CHAT, max_new_tokens=4, do_sample=False)
    with answer_unpacked(packed):
        assert torch.equal(packed.generate(**CHAT, max_new_tokens=4, do_sample=False), expected)


def stand_in_for_varlen(calls):
    """What kernels for varying lengths compute, written plainly: causal, queries and keys aligned at their ends, with
    so many keys seen before a query's own."""

    def attend(query, key, value, query_starts, key_starts, longest_query, longest_key, *, scale, causal, left):
        calls.append((query.dtype, len(query), len(key), longest_query, longest_key))
        assert query_starts.dtype == key_starts.dtype == torch.int32
        group = query.shape[1] // key.shape[1]
        outputs = []
        for number in range(len(query_starts) - 1):
            own = query[query_starts[number] : query_starts[number + 1]].transpose(0, 1)  # (heads, length, head_dim)
            bounds = slice(int(key_starts[number]), int(key_starts[number + 1]))
            keys = key[bounds].transpose(0, 1).repeat_interleave(group, dim=0)
            values = value[bounds].transpose(0, 1).repeat_interleave(group, dim=0)
            scores = own @ keys.transpose(1, 2) * scale
            assert causal and scores.shape[1] <= longest_query and scores.shape[2] <= longest_key
            mask = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
            if left >= 0:
                mask = mask.triu(scores.shape[2] - scores.shape[1] - left)
            outputs.append((scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values).transpose(0, 1))
        return torch.cat(outputs)

    return attend


def make_varlen(attend):
    """With the signature of torch.nn.attention.varlen.varlen_attn."""

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa and window_size[1] == 0
        return attend(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, causal=True, left=window_size[0])

    return varlen_attn


def make_older_varlen(attend):
    """As torch 2.11 has it: keys and queries have the same number of heads."""

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert q.shape[1] == k.shape[1] == v.shape[1] and window_size[1] == 0
        return attend(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, causal=True, left=window_size[0])

    return varlen_attn


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins for the GPU's kernels: choose one by name; `calls` tells how it was called."""
    calls = []

    def choose(name):
        attend = stand_in_for_varlen(calls)
        if name == "flash_attention_2":
            package = types.ModuleType("flash_attn")
            package.flash_attn_varlen_func = lambda *tensors, dropout_p, softmax_scale, causal, window_size=(-1, -1): (
                attend(*tensors, scale=softmax_scale, causal=causal, left=window_size[0])
            )
            monkeypatch.setitem(sys.modules, "flash_attn", package)
            find_optional.cache_clear()
            return FLASH_ATTENTION_2
        if name in (SDPA, MATMUL):
            return name
        make = make_older_varlen if name == "older varlen" else make_varlen
        find_varlen_attention.cache_clear()
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", make(attend))
        return VARLEN

    yield choose, calls
    find_varlen_attention.cache_clear()
    find_optional.cache_clear()


@pytest.mark.parametrize("name", ["varlen", "older varlen", "flash_attention_2"])
def test_the_kernels_of_gpus_are_called_for_the_same_result(world, processing, collator, kernels, name):
    choose, calls = kernels
    batch = collator(make_examples(world, processing, CASES["everything_together"]))
    gradients, losses = [], []
    for attention in (SDPA, choose(name)):
        model = load_packed(world, processing)
        model.get_base_model().model.language_model.config._attn_implementation = f"packed_{attention}"
        loss = model(**batch)["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append(collect_gradients(model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][key], gradient, atol=1e-6, rtol=1e-4), key
    assert len(calls) == 2  # layers
    positions, keys = batch["input_ids"].shape[1], len(batch["kv_index"])
    assert calls[0] == (torch.float32, positions, keys, batch["max_seqlen_q"], batch["max_seqlen_k"])
    assert keys > positions  # something was shared


@pytest.mark.parametrize("name", [SDPA, MATMUL, "varlen", "older varlen", "flash_attention_2"])
@pytest.mark.parametrize(
    ("window", "expected"),
    # Means of the values seen: 0 2 4 6 8, and 0 2 4 10.
    [(1, [0, 2, 4, 6, 8, 10]), (2, [0, 1, 3, 5, 7, 7]), (4, [0, 1, 2, 3, 5, 4]), (None, [0, 1, 2, 3, 4, 4])],
)
def test_a_window_reaches_back_as_far_as_it_says(kernels, name, window, expected):
    """Two records: positions 0 to 4, and 5, which goes on after 2. All scores are alike."""
    attend = KERNELS[kernels[0](name)]
    starts, path_starts = torch.tensor([0, 5, 6], dtype=torch.int32), torch.tensor([0, 5, 9], dtype=torch.int32)
    packing = packed_attention.Packing(starts, torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 5]), path_starts, 5, 5)
    zeros, values = torch.zeros(1, 1, 6, 1), torch.tensor([0.0, 2.0, 4.0, 6.0, 8.0, 10.0]).view(1, 1, 6, 1)
    output, _ = attend(None, zeros, zeros, values, None, 1.0, packing=packing, sliding_window=window)
    assert output.shape == (1, 6, 1, 1) and output.is_contiguous()
    assert output.flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", [SDPA, MATMUL, "varlen", "flash_attention_2"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": None}, "OddAttention is not told how its row is packed, so its records cannot share a row; take"),
        ({"softcap": 50.0}, "OddAttention asks for softcap, so"),
        ({"s_aux": torch.zeros(1), "indices": torch.zeros(1)}, "OddAttention asks for s_aux, indices, so"),
        ({"attention_mask": torch.ones(1, 1, 1, 1)}, "OddAttention asks for a mask of its own, so"),
    ],
)
def test_attention_that_is_not_plain_is_refused(kernels, name, options, message):
    starts = torch.tensor([0, 1], dtype=torch.int32)
    packing = packed_attention.Packing(starts, torch.tensor([0]), starts, 1, 1)
    module = type("OddAttention", (), {})()
    one = torch.ones(1, 1, 1, 1)
    options = {"attention_mask": None, "scaling": 1.0, "packing": packing, "softcap": None} | options
    with pytest.raises(UserError, match=message):
        KERNELS[kernels[0](name)](module, one, one, one, **options)


def test_plain_matrix_products_give_the_same_result(world, processing, collator):
    batch = collator(make_examples(world, processing, CASES["everything_together"]))
    assert len(batch["kv_index"]) > batch["input_ids"].shape[1]  # something is shared, so there are masks
    gradients, losses = [], []
    for attention in (SDPA, MATMUL):
        model = load_packed(world, processing)
        prepare_packed_llava(model.get_base_model(), processing.image_policy, attention, "test")
        loss = model(**batch)["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append(collect_gradients(model))
    tower = model.get_base_model().model.vision_tower
    assert tower.config._attn_implementation == "eager"
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][key], gradient, atol=1e-6, rtol=1e-4), key


def test_half_precision_reaches_the_kernels(world, processing, collator, kernels):
    choose, calls = kernels
    model = load_packed(world, processing)
    model.get_base_model().model.language_model.config._attn_implementation = f"packed_{choose('varlen')}"
    with torch.autocast("cpu", torch.bfloat16):
        model(**collator(make_examples(world, processing, CASES["one_image"])))["loss"].backward()
    assert {call[0] for call in calls} == {torch.bfloat16}


def test_attention_is_chosen_by_what_can_run(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_attention("auto", cpu, uses_bf16=False) == SDPA
    assert choose_attention("auto", cpu, uses_bf16=True) == MATMUL
    assert choose_attention("auto", gpu, uses_bf16=True) == VARLEN
    assert choose_attention("auto", gpu, uses_bf16=False) == SDPA
    assert choose_attention("sdpa", gpu, uses_bf16=True) == SDPA
    with pytest.raises(UserError, match="varlen needs a GPU in bf16; what can run here: sdpa$"):
        choose_attention("varlen", cpu, uses_bf16=False)
    with pytest.raises(UserError, match="flash_attention_2 needs .* flash-attn; .* run here: varlen, sdpa$"):
        choose_attention("flash_attention_2", gpu, uses_bf16=True)
    monkeypatch.setattr(packed_attention, "find_flash_attention", lambda: (object(), ""))
    assert choose_attention("auto", gpu, uses_bf16=True) == FLASH_ATTENTION_2


def test_mapped_weights_are_the_same_and_leave_their_file_alone(world, processing):
    files = sorted(world.base.glob("*.safetensors"))
    before = [path.read_bytes() for path in files]
    copied = load_packed_llava(world.base, torch.float32, processing.image_policy, SDPA)
    mapped = load_packed_llava(world.base, torch.float32, processing.image_policy, SDPA, maps_weights=True)
    for (name, one), (_, other) in zip(copied.named_parameters(), mapped.named_parameters(), strict=True):
        assert torch.equal(one, other), name
        with torch.no_grad():
            other.fill_(7)
    assert [path.read_bytes() for path in files] == before


def test_only_the_vision_layers_that_are_used_run(world, processing, collator):
    """Three layers, features of the second: the third and the norm behind it are never called."""
    model = load_packed_llava(world.base, torch.float32, processing.image_policy, SDPA)
    called = []
    for name, module in model.model.vision_tower.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(**collator(make_examples(world, processing, CASES["one_image"])))
    assert "encoder.layers.1" in called
    assert not [name for name in called if name.startswith(("encoder.layers.2", "post_layernorm"))]


@pytest.mark.parametrize(("train_type", "keeps"), [("lora", True), ("projector", False), ("freeze_vision", False)])
def test_a_frozen_tower_keeps_nothing_for_the_backward_pass(world, processing, collator, train_type, keeps):
    model = load_packed(world, processing, train_type=train_type)
    llava = model.get_base_model() if train_type == "lora" else model
    pixels = collator(make_examples(world, processing, CASES["one_image"]))["pixel_values"]
    assert llava.encode_images(pixels).requires_grad is keeps


def test_each_image_is_encoded_once(world, processing, collator):
    model = load_packed_llava(world.base, torch.float32, processing.image_policy, SDPA)
    encoded = []
    model.model.vision_tower.embeddings.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
    model(**collator(make_examples(world, processing, CASES["everything_together"])))
    assert encoded == [3]


def test_no_logits_of_all_positions_exist(world, processing, collator):
    """Nothing as large as (supervised positions x vocabulary) is kept for the backward pass."""
    records = [((0,), ASK, "写着“我太难了”。" * 20), ((1,), ASK, "今天也要加油鸭" * 20)]
    model = load_packed(world, processing)
    batch = collator(make_examples(world, processing, records))
    vocabulary = model.get_base_model().config.text_config.vocab_size
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        model(**batch)["loss"].backward()
    assert len(batch["loss_positions"]) > 200
    assert max(sizes) < len(batch["loss_positions"]) * vocabulary


@pytest.mark.long
def test_compiled_layers_are_not_compiled_again_for_every_length(world, processing, collator):
    model = load_packed(world, processing)
    eager = load_packed(world, processing)
    compile_layers(model, backend="eager")
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for case in ("one_image", "several_captions_of_one_image", "many_images", "two_turns", "everything_together"):
        batch = collator(make_examples(world, processing, CASES[case]))
        assert model(**batch)["loss"].item() == pytest.approx(eager(**batch)["loss"].item(), rel=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] == graphs[2], graphs


def test_compiling_without_a_compiler_stops_with_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="--torch_compile needs a C.. compiler, and there is no no-such-compiler"):
        check_compiler(torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--torch_compile needs the package triton"):
        check_compiler(torch.device("cuda"))


def test_a_model_that_cannot_be_packed_is_refused(world, processing):
    model = load_packed_llava(world.base, torch.float32, processing.image_policy, SDPA)
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(UserError, match=r"somewhere: uses the vision layers \[-2, -1\], expected a single one"):
        prepare_packed_llava(model, processing.image_policy, SDPA, "somewhere")
    model.config.vision_feature_layer = -2
    model.config.text_config.attention_dropout = 0.1
    with pytest.raises(UserError, match="somewhere: its language model has attention_dropout 0.1, which --attention v"):
        prepare_packed_llava(model, processing.image_policy, VARLEN, "somewhere")


def test_a_base_in_bf16_hands_lora_its_input_without_a_conversion(world, processing, collator):
    arguments = parse_train_arguments(train_flags(world, world.folder, lora_dropout=0), "")
    model = load_packed_llava(world.base, torch.bfloat16, processing.image_policy, SDPA)
    model = prepare_trainable(model, arguments, 0)
    randomise_lora(model)
    lora = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    seen = set()
    for module in lora.values():
        module.lora_A["default"].register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype))
    batch = collator(make_examples(world, processing, CASES["everything_together"]))
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch)["loss"].backward()
    assert seen == {torch.bfloat16}


def test_layouts_for_kernels_are_views_in_the_backward_pass_too():
    query, key, value = (torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(3))
    starts = torch.tensor([0, 6], dtype=torch.int32)
    packing = packed_attention.Packing(starts, torch.arange(6), starts, 6, 6)
    laid_out = packed_attention._lay_out_for_kernel(query, key, value, packing)
    waiting, names = [tensor.grad_fn for tensor in laid_out], set()
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(node.name())
            waiting += [following for following, _ in node.next_functions]
    # A selection's backward fills a whole tensor with zeros and copies into it.
    assert names == {"TransposeBackward0", "SqueezeBackward1", "torch::autograd::AccumulateGrad"}
