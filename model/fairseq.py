"""The original authors' files: fairseq's tensor names and training options → the published ones.

Source of the correspondence: the authors' model (github.com/microsoft/UniSpeech, UniSpeech-SAT) and
the published state dicts.
"""

import argparse
import ast
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

_PREFIX: Final = re.compile(r"^(?:w2v_encoder\.)?(?:w2v_model\.)?")

# The authors' names → the published ones, first match wins.
_NAMES: Final[tuple[tuple[re.Pattern[str], str], ...]] = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"feature_extractor\.conv_layers\.(\d+)\.0\.", r"feature_extractor.conv_layers.\1.conv."),
        (
            r"feature_extractor\.conv_layers\.(\d+)\.2\.(?:1\.)?(weight|bias)$",
            r"feature_extractor.conv_layers.\1.layer_norm.\2",
        ),
        (r"post_extract_proj\.", "feature_projection.projection."),
        (r"layer_norm\.", "feature_projection.layer_norm."),
        (r"mask_emb$", "masked_spec_embed"),
        (r"encoder\.pos_conv\.0\.", "encoder.pos_conv_embed.conv."),
        (r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"encoder.layers.\1.layer_norm."),
        (
            r"encoder\.layers\.(\d+)\.self_attn\.(q|k|v|out)_proj\.",
            r"encoder.layers.\1.attention.\2_proj.",
        ),
        (
            r"encoder\.layers\.(\d+)\.fc1\.",
            r"encoder.layers.\1.feed_forward.intermediate_dense.",
        ),
        (r"encoder\.layers\.(\d+)\.fc2\.", r"encoder.layers.\1.feed_forward.output_dense."),
        (r"encoder\.layer_norm_for_extract\.", "layer_norm_for_extract."),
        (r"quantizer\.vars$", "quantizer.codevectors"),
        (r"final_proj\.", "project_hid."),
        (r"proj\.", "lm_head."),
        (r"label_embs_concat$", "label_embeddings_concat"),
        (r"spk_proj\.", "speaker_proj."),
    )
)
_MARK: Final = re.compile(r"(^|\.)(post_extract_proj\.|mask_emb$|encoder\.pos_conv\.0\.)")


def is_fairseq(names: Iterable[str]) -> bool:
    """Whether tensor names are the authors'."""
    return any(_MARK.search(name) for name in names)


def published_name(name: str) -> str:
    """One of the authors' tensor names → the published one; an unknown one loses its prefix."""
    name = _PREFIX.sub("", name)
    for pattern, replacement in _NAMES:
        if pattern.match(name):
            return pattern.sub(replacement, name, count=1)
    return name


def training_options(loaded: Any) -> dict[str, Any] | None:
    """Model options of a fairseq file: ``cfg`` (nested or flat) or the older ``args``."""
    if not isinstance(loaded, dict):
        return None
    for key in ("cfg", "args"):
        options = loaded.get(key)
        if isinstance(options, argparse.Namespace):
            options = vars(options)
        if isinstance(options, dict):
            inner = options.get("model", options)
            inner = vars(inner) if isinstance(inner, argparse.Namespace) else inner
            if isinstance(inner, dict) and "encoder_layers" in inner:
                return inner
            # fine-tuned: the pre-trained model's options lie one level deeper
            nested = inner.get("w2v_args") if isinstance(inner, dict) else None
            found = training_options({"cfg": nested, "args": nested})
            if found is not None:
                return found
    return None


def config_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fairseq's option names → config keys, defaults where an option is absent."""
    names = {
        "encoder_layers": "num_hidden_layers",
        "encoder_embed_dim": "hidden_size",
        "encoder_ffn_embed_dim": "intermediate_size",
        "encoder_attention_heads": "num_attention_heads",
        "activation_fn": "hidden_act",
        "dropout": "hidden_dropout",
        "attention_dropout": "attention_dropout",
        "activation_dropout": "activation_dropout",
        "encoder_layerdrop": "layerdrop",
        "dropout_input": "feat_proj_dropout",
        "dropout_features": "feat_quantizer_dropout",
        "layer_norm_first": "do_stable_layer_norm",
        "conv_bias": "conv_bias",
        "conv_pos": "num_conv_pos_embeddings",
        "conv_pos_groups": "num_conv_pos_embedding_groups",
        "latent_vars": "num_codevectors_per_group",
        "latent_groups": "num_codevector_groups",
        "logit_temp": "contrastive_logits_temperature",
        "mask_prob": "mask_time_prob",
        "mask_length": "mask_time_length",
    }
    config = {ours: options[theirs] for theirs, ours in names.items() if theirs in options}
    mode = options.get("extractor_mode", "default")
    config["feat_extract_norm"] = "layer" if str(mode) == "layer_norm" else "group"
    width = options.get("final_dim") or options["encoder_embed_dim"]
    config["proj_codevector_dim"] = width
    config["codevector_dim"] = options.get("latent_dim") or width
    if layers := options.get("conv_feature_layers"):
        dims, kernels, strides = zip(*_conv_layers(layers), strict=True)
        config |= {"conv_dim": dims, "conv_kernel": kernels, "conv_stride": strides}
    return config


def _conv_layers(text: str) -> list[tuple[int, int, int]]:
    """Fairseq's "[(512,10,5)] + [(512,3,2)] * 4" → (width, kernel, stride) a layer.

    Fairseq evaluates this text as Python; here lists, tuples, integers, ``+`` and ``*`` count.
    """

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Tuple(elts=items):
                return tuple(value(item) for item in items)
            case ast.List(elts=items):
                return [value(item) for item in items]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                many, times = value(left), value(right)
                if isinstance(many, list) and isinstance(times, int) and times <= 64:
                    return many * times
            case _:
                pass
        raise ValueError(f"conv_feature_layers: expected lists of (width, kernel, stride): {text}")

    try:
        layers = value(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"conv_feature_layers: expected a list, got {text!r}") from error
    if not isinstance(layers, list) or not all(
        isinstance(layer, tuple) and len(layer) == 3 for layer in layers
    ):
        raise ValueError(f"conv_feature_layers: expected (width, kernel, stride) each: {text}")
    return layers
