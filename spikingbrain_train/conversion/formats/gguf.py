"""GGUF, the files that llama.cpp runs: dense models, their ternary weights in blocks of few bits.

llama.cpp has no ternary type of one scale a matrix. Its types cut a row of inputs into blocks, each with a
float16 scale, so that codes of -1, 0 and 1 are held exactly and the scale is rounded once, to eleven bits;
recent releases also read a float32 scale beside a matrix, whose blocks then have 1. It rounds inputs itself,
to INT8 numbers with a scale for every 32 or 256 inputs, whatever they were in training: the linear transform
``q8_inputs`` trains with these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spikingbrain_train.architecture.layers import model_weights
from spikingbrain_train.architecture.linear_transforms import LinearTransformKind
from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.model import ActivationFunc, ModelConfig
from spikingbrain_train.config.rope_scaling import RopeType
from spikingbrain_train.conversion.formats.bitnet_masters import BITNET_MASTERS
from spikingbrain_train.conversion.formats.config_keys import ConfigKeys
from spikingbrain_train.conversion.formats.dense import LLAMA, QWEN2, QWEN3, DenseFormat
from spikingbrain_train.conversion.formats.hf_format import HfFormat
from spikingbrain_train.conversion.window_convention import WindowConvention
from spikingbrain_train.errors import CheckpointError


@dataclass(frozen=True)
class BlockType:
    """A type of llama.cpp that holds ternary numbers (ggml/src/ggml-common.h)."""

    name: str
    number: int
    """Its ``ggml_type``."""
    size: int
    """Inputs in a block."""
    nbytes: int
    """Of a block, its float16 scale included."""
    input_block: int
    """How many neighbouring inputs share a scale when llama.cpp multiplies."""

    @property
    def bits(self) -> float:
        """A weight's share of a block."""
        return 8 * self.nbytes / self.size


TQ2_0 = BlockType("TQ2_0", 35, 256, 66, 256)
Q2_0 = BlockType("Q2_0", 42, 64, 18, 32)
Q4_0 = BlockType("Q4_0", 2, 32, 18, 32)

_BLOCK = "blk.{layer}."
NAMES: Mapping[str, str] = {
    "embedding": "token_embd.weight",
    "input_norm": _BLOCK + "attn_norm.weight",
    "q_weight": _BLOCK + "attn_q.weight",
    "k_weight": _BLOCK + "attn_k.weight",
    "v_weight": _BLOCK + "attn_v.weight",
    "q_bias": _BLOCK + "attn_q.bias",
    "k_bias": _BLOCK + "attn_k.bias",
    "v_bias": _BLOCK + "attn_v.bias",
    "q_norm": _BLOCK + "attn_q_norm.weight",
    "k_norm": _BLOCK + "attn_k_norm.weight",
    "attn_sub_norm": _BLOCK + "attn_sub_norm.weight",
    "o_weight": _BLOCK + "attn_output.weight",
    "o_bias": _BLOCK + "attn_output.bias",
    "mlp_norm": _BLOCK + "ffn_norm.weight",
    "mlp_gate_weight": _BLOCK + "ffn_gate.weight",
    "mlp_up_weight": _BLOCK + "ffn_up.weight",
    "ffn_sub_norm": _BLOCK + "ffn_sub_norm.weight",
    "mlp_down_weight": _BLOCK + "ffn_down.weight",
    "mlp_gate_bias": _BLOCK + "ffn_gate.bias",
    "mlp_up_bias": _BLOCK + "ffn_up.bias",
    "mlp_down_bias": _BLOCK + "ffn_down.bias",
    "final_norm": "output_norm.weight",
    "output": "output.weight",
}
"""Role -> name, as llama.cpp looks for it."""

_FAMILIES: dict[str, DenseFormat] = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "bitnet": BITNET_MASTERS,
}
"""``general.architecture`` -> the same model in transformers."""
_ROPE_TYPES = (RopeType.default, RopeType.linear)


class GgufFormat(HfFormat):
    """One file ``model.gguf``, beside the small files of the source.

    Args:
        name: what ``--format`` calls it.
        types: of ternary weights; each matrix gets the first whose blocks divide its inputs.
        readers: what runs it, for the report.
        scales_beside: whether these multiply by a float32 scale beside each matrix, so that none is rounded.
    """

    architecture = "GGUF"
    model_type = "gguf"
    kinds = "llama"
    holds = "dense models, for llama.cpp"
    names = NAMES
    is_for_inference = True
    file_writer = "spikingbrain_train.conversion.gguf_file"

    def __init__(
        self, name: str, types: tuple[BlockType, ...], readers: str, scales_beside: bool = False
    ) -> None:
        self.name = name
        self.types = types
        self.readers = readers
        self.scales_beside = scales_beside

    def read(self, keys: ConfigKeys, window_convention: WindowConvention | None = None) -> ModelConfig:
        raise CheckpointError(f"{keys.path} describes a GGUF file; import the checkpoint it was made of")

    def gguf_architecture(self, model: ModelConfig) -> str:
        """``general.architecture`` of a model that it holds."""
        return next(name for name, family in _FAMILIES.items() if not family.unsupported(model))

    def config(self, model: ModelConfig, source: dict[str, Any] | None, dtype: str) -> dict[str, Any]:
        """That of the same model in transformers."""
        return _FAMILIES[self.gguf_architecture(model)].config(model, source, dtype)

    def unsupported(self, model: ModelConfig) -> list[str]:
        """What llama.cpp's four dense architectures do not compute, or no type of a file holds.

        Its ``bitnet``, the one with sub-norms, is that of the first BitNet b1.58 models: it computes SiLU
        whatever a file says, reads no biases, and takes the embedding for the output layer
        (src/models/bitnet.cpp).
        """
        parts = min((family.unsupported(model) for family in _FAMILIES.values()), key=len)
        if parts:
            return parts
        smallest = self.types[-1]
        narrow = dict.fromkeys(
            shape[-1]
            for _, weight in model_weights(model)
            if self.is_ternary(weight, model)
            for shape in weight.shapes
            if shape[-1] % smallest.size
        )
        has_norms = self.gguf_architecture(model) == "bitnet"
        other = ", where llama.cpp's architecture of sub-norms computes SiLU" if has_norms else ""
        rope = model.rope_scaling.rope_type
        widths = " and ".join(map(str, narrow))
        found = [
            ("sliding-window layers", any("sliding" in kind for kind in LLAMA.layer_types(model))),
            (
                f"feed-forwards with model.activation_func={model.activation_func.value}{other}",
                model.activation_func is not ActivationFunc.silu,
            ),
            (
                "an output layer of its own beside sub-norms, where llama.cpp takes the embedding",
                has_norms and not model.share_embeddings_and_output_weights,
            ),
            (
                "biases of attention beside sub-norms, which llama.cpp does not read",
                has_norms and (model.add_qkv_bias or model.add_output_bias),
            ),
            (f"rotary scaling of type {rope.value}", rope not in _ROPE_TYPES),
            ("spikes", bool(model.spiking.projections or model.spiking.queries)),
            ("INT8 weights", bool(model.quantization.projections)),
            ("INT8 keys and values", model.quantization.keys_and_values),
            (f"ternary weights of {widths} inputs, which {smallest.size} does not divide", bool(narrow)),
        ]
        return [words for words, is_so in found if is_so]

    def leaves_out(self, model: ModelConfig) -> list[LinearTransformKind]:
        return []  # ternary weights are held; how it rounds inputs is said in notes_on_export

    def is_ternary(self, weight: Weight, model: ModelConfig) -> bool:
        """Whether training multiplied by ternary numbers in the place of a parameter."""
        return weight.projection is not None and weight.projection[0] in model.ternary.projections

    def block_type(self, weight: Weight, model: ModelConfig) -> BlockType | None:
        """How a parameter's matrices are stored; None keeps them as floats."""
        if not self.is_ternary(weight, model):
            return None
        return next(each for each in self.types if weight.shapes[0][-1] % each.size == 0)

    def has_scale_beside(self, weight: Weight, model: ModelConfig) -> bool:
        """Whether the blocks of a ternary parameter have scale 1, and its matrices a float32 one beside them.

        llama.cpp's architecture ``qwen2`` does not read those of feed-forwards.
        """
        if not (self.scales_beside and self.is_ternary(weight, model)):
            return False
        return self.gguf_architecture(model) != "qwen2" or not weight.roles[0].startswith("mlp_")

    def scale_names(self, names: list[str]) -> list[str]:
        return [f"{name.removesuffix('.weight')}.scale" for name in names]

    def turned_heads(self, role: str, model: ModelConfig) -> int | None:
        """How many heads a tensor has whose rows are reordered for llama.cpp; None leaves them.

        In its architecture ``llama`` rotary positions turn neighbouring channels, in the others, as in
        transformers, channels of the two halves of a head.
        """
        if self.gguf_architecture(model) != "llama":
            return None
        heads = {"q": model.num_attention_heads, "k": model.num_query_groups}
        name, _, kind = role.partition("_")
        return heads.get(name) if kind in ("weight", "bias") else None

    def notes_on_export(self, model: ModelConfig) -> list[str]:
        """Which type each ternary matrix has, and why; what llama.cpp does to inputs."""
        used: dict[BlockType, dict[str, int]] = {}
        for layer, weight in model_weights(model):
            if (kind := self.block_type(weight, model)) is not None:
                names = used.setdefault(kind, {})
                for name, shape in zip(self.tensor_names(weight, layer, model), weight.shapes, strict=True):
                    names[name.split(".")[-2]] = shape[-1]
        notes = []
        for kind, names in used.items():
            inputs = ", ".join(map(str, dict.fromkeys(names.values())))
            larger = [each for each in self.types[: self.types.index(kind)]]
            why = "".join(f"; {each.size}, as {each.name} has, does not divide that" for each in larger)
            notes.append(
                f"{', '.join(names)}: ternary numbers as {kind.name}, {kind.bits:g} bits a weight, as its "
                f"blocks of {kind.size} divide {inputs} inputs{why}"
            )
        ternary, blocks = set(model.ternary.projections), set(model.q8_inputs.projections)
        tokens = set(model.int8_inputs.projections)
        if used:
            per = " or ".join(str(size) for size in dict.fromkeys(kind.input_block for kind in used))
            multiplies = f"llama.cpp multiplies ternary weights by INT8 inputs with a scale for every {per}"
            if ternary <= blocks:
                notes.append(f"{multiplies} of them, as training did")
            else:
                trained = "a scale a token" if ternary <= tokens else "others, of some projections or all"
                notes.append(
                    f"{multiplies} of them, where training had {trained}, and logits differ by that; a model "
                    "for llama.cpp is trained with model.q8_inputs"
                )
            ternary_weights = [weight for _, weight in model_weights(model) if self.is_ternary(weight, model)]
            if not all(self.has_scale_beside(weight, model) for weight in ternary_weights):
                notes.append("scales of ternary weights are rounded to float16, and logits differ by that")
        if (blocks | tokens) - ternary:
            notes.append("llama.cpp multiplies float weights by float inputs, where training had INT8 ones")
        notes.append(
            f"model.gguf is for {self.readers}; parameters cannot be read back from it: keep the "
            "checkpoint to train on"
        )
        return notes


GGUF = GgufFormat("gguf", (TQ2_0, Q4_0), "llama.cpp")
GGUF_Q2_0 = GgufFormat(
    "gguf_q2_0",
    (TQ2_0, Q2_0, Q4_0),
    "releases of llama.cpp that have the type Q2_0 and read scales beside matrices",
    scales_beside=True,
)
