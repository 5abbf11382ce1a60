"""Stage 3: a run's averaged weights → three checkpoints of the published format in one folder.

The three share one file of encoder tensors through their sharded indexes, so each folder is an
ordinary checkpoint and the wheel carries the encoder once.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.settings import Settings, from_arguments
from recipes.student import VOCABULARY, Shape, Student

ENCODER = "encoder.safetensors"
PREFIX = "unispeech_sat."

FEATURES = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "sampling_rate": 16_000,
    "padding_side": "right",
    "padding_value": 0.0,
    # the front end's layer norm takes the level away, so nothing has to be known of the whole file
    "do_normalize": False,
    "return_attention_mask": True,
}

TOKENIZER = {
    "tokenizer_class": "Wav2Vec2CTCTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "word_delimiter_token": "|",
    "replace_word_delimiter_char": " ",
    "do_lower_case": False,
}


class Export(Settings):
    """Which run goes where.

    Attributes:
        checkpoint: the run's checkpoint.
        target: folder of the three checkpoints.
    """

    checkpoint: Path
    target: Path


def load_student(path: Path) -> Student:
    """A student from a run's checkpoint (its averaged weights) or from an exported folder.

    Raises:
        KeyError: a tensor is missing.
    """
    if path.is_dir():
        config = json.loads((path / "speaker" / "config.json").read_text())
        shape = Shape(
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            heads=config["num_attention_heads"],
            feed_forward=config["intermediate_size"],
            positions=config["num_conv_pos_embeddings"],
            position_groups=config["num_conv_pos_embedding_groups"],
            conv_dim=config["conv_dim"],
            conv_kernel=config["conv_kernel"],
            conv_stride=config["conv_stride"],
            tdnn=config["tdnn_dim"],
        )
        tensors = {
            "encoder." + name.removeprefix(PREFIX): tensor
            for name, tensor in load_file(path / ENCODER).items()
        }
        for head in shape.heads_configs():
            found = load_file(path / head / "head.safetensors")
            tensors |= {f"{head}.{name}": tensor for name, tensor in found.items()}
    else:
        state = torch.load(path, weights_only=True)
        shape = Shape(**state["shape"])
        tensors = state["average"]
    student = Student(shape)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(tensors[name])
    student.encoder.config.attn_implementation = "sdpa"  # no gradients here, and long recordings
    return student.eval()


def save_student(student: Student, checkpoint: Path, target: Path) -> None:
    """Writes a run's checkpoint again, with the weights of this student."""
    state = torch.load(checkpoint, weights_only=True)
    state["average"] = {name: p.detach().clone() for name, p in student.named_parameters()}
    torch.save(state, target)


def write_checkpoints(student: Student, shape: Shape, target: Path) -> int:
    """Writes the three folders; gives the bytes of all weights."""
    tensors = {name: p.detach().half().contiguous() for name, p in student.named_parameters()}
    encoder = _part(tensors, "encoder.", PREFIX)
    target.mkdir(parents=True, exist_ok=True)
    save_file(encoder, target / ENCODER, {"format": "pt"})
    for name, config in shape.heads_configs().items():
        folder = target / name
        config.save_pretrained(folder)
        head = _part(tensors, f"{name}.", "")
        save_file(head, folder / "head.safetensors", {"format": "pt"})
        places = dict.fromkeys(head, "head.safetensors") | dict.fromkeys(encoder, f"../{ENCODER}")
        size = sum(t.numel() * 2 for t in (*head.values(), *encoder.values()))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        _write(folder / "model.safetensors.index.json", index)
        _write(folder / "preprocessor_config.json", FEATURES)
    _write(target / "ctc" / "vocab.json", {c: i for i, c in enumerate(VOCABULARY)})
    _write(target / "ctc" / "tokenizer_config.json", TOKENIZER)
    files = list(target.rglob("*.safetensors"))
    for file in files:
        file.chmod(0o644)  # safetensors makes them readable by their owner alone
    return sum(file.stat().st_size for file in files)


def _part(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {new + n.removeprefix(old): t for n, t in tensors.items() if n.startswith(old)}


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """Command line of the stage."""
    settings = from_arguments(Export, "export", "write a run's weights as checkpoints")
    state = torch.load(settings.checkpoint, weights_only=True)
    size = write_checkpoints(
        load_student(settings.checkpoint), Shape(**state["shape"]), settings.target
    )
    print(f"step {state['step']}: {size / 1e6:.2f} MB in {settings.target}")


if __name__ == "__main__":
    main()
