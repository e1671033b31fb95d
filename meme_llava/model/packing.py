"""Which language models train in packed rows and which in a row for each record, as their configuration tells."""

from collections.abc import Mapping

# Types of layers, in transformers' words, whose attention packed_attention.py computes.
PACKED_LAYERS = {"full_attention", "sliding_attention"}
# Attention of other kinds, of models whose layer types do not tell: sinks beside the keys, or layers that do not hand
# on how a row is packed.
SINKS, OWN = "attention sinks", "attention layers that are not told how a row is packed"
OTHER_ATTENTION = {
    **dict.fromkeys(("deepseek_v4", "flint", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"), SINKS),
    **dict.fromkeys(("nemotron", "stablelm"), OWN),
    "doge": "a mask of its own",
}


def find_obstacle(text_config) -> str:
    """What keeps records of this language model from sharing a row; empty where nothing does. What configurations do
    not tell, build_base_model.py finds by its proof."""
    others = sorted(set(getattr(text_config, "layer_types", None) or ()) - PACKED_LAYERS)
    if others:
        return f"layers of type {', '.join(others)}"
    if getattr(text_config, "attn_logit_softcapping", None):
        return "capped attention scores"
    return OTHER_ATTENTION.get(text_config.model_type, "")


def count_computed(batch: Mapping, text_config) -> int:
    """Positions that a batch of `PackingCollator` is computed on: those of its row, or of a row for each record, filled
    up to the longest."""
    if not find_obstacle(text_config):
        return batch["input_ids"].numel()
    return (len(batch["cu_seqlens_q"]) - 1) * batch["max_seqlen_q"]


def describe_rows(text_config) -> str:
    """What a person is told where every record trains in a row of its own; empty where they share rows."""
    obstacle = find_obstacle(text_config)
    return f"records train one by one, without shared images: the language model has {obstacle}" if obstacle else ""
