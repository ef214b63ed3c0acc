"""Claim: a 7B converts both ways within twice the time of copying its bytes, in 2 GB of memory a process.

And a conversion that is killed goes on to the same bytes. A folder with the shapes of Qwen2.5-7B and random
bfloat16 weights (28 layers: 15.2 GB) is written, copied, made a hybrid, laid out for TP 2 and exported again;
all three are killed at random moments (--kills times each, the command alone or its workers with it) and
started again, and what comes out is held to the undisturbed conversion. The page cache is dropped before
each, where the system lets us (root on Linux). Times include the start of the command and the sync of what
was written; memory is the peak of the largest process, without the files that it maps.

  python benchmarks/conversion.py --output /scratch/conversion --layers 28 --kills 5
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spikingbrain_train.reporting.tables import table  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
_DROP = Path("/proc/sys/vm/drop_caches")
_HIDDEN, _FFN, _KEY_VALUE, _VOCAB = 3584, 18944, 512, 152064
_LAYERS_OF_A_FILE = 7


@dataclass(frozen=True)
class Measured:
    """One thing that was done."""

    name: str
    seconds: float
    peak_bytes: int = 0
    """Of the largest process; 0 is unknown."""


def tensors_of_layer(layer: int) -> dict[str, torch.Tensor]:
    """A layer of Qwen2.5-7B with random bfloat16 weights."""
    prefix = f"model.layers.{layer}."
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (_HIDDEN,),
        "post_attention_layernorm.weight": (_HIDDEN,),
        "self_attn.q_proj.weight": (_HIDDEN, _HIDDEN),
        "self_attn.q_proj.bias": (_HIDDEN,),
        "self_attn.k_proj.weight": (_KEY_VALUE, _HIDDEN),
        "self_attn.k_proj.bias": (_KEY_VALUE,),
        "self_attn.v_proj.weight": (_KEY_VALUE, _HIDDEN),
        "self_attn.v_proj.bias": (_KEY_VALUE,),
        "self_attn.o_proj.weight": (_HIDDEN, _HIDDEN),
        "mlp.gate_proj.weight": (_FFN, _HIDDEN),
        "mlp.up_proj.weight": (_FFN, _HIDDEN),
        "mlp.down_proj.weight": (_HIDDEN, _FFN),
    }
    return {prefix + name: _random(shape) for name, shape in shapes.items()}


def write_source(folder: Path, num_layers: int) -> None:
    """A folder as Hugging Face has Qwen2.5-7B, of so many layers."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    index: dict[str, str] = {}
    total = 0
    ends = {"model.embed_tokens.weight": (_VOCAB, _HIDDEN), "model.norm.weight": (_HIDDEN,)}
    starts = list(range(0, num_layers, _LAYERS_OF_A_FILE))
    for number, first in enumerate(starts, 1):
        tensors: dict[str, torch.Tensor] = {}
        if number == 1:
            tensors |= {name: _random(shape) for name, shape in ends.items()}
        if number == len(starts):
            tensors["lm_head.weight"] = _random((_VOCAB, _HIDDEN))
        for layer in range(first, min(first + _LAYERS_OF_A_FILE, num_layers)):
            tensors |= tensors_of_layer(layer)
        file = f"model-{number:05d}-of-{len(starts):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    written = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(written))
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": _HIDDEN,
        "intermediate_size": _FFN,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": _VOCAB,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _random(shape: Sequence[int]) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16).normal_(std=0.02)


def drop_page_cache() -> bool:
    """Write out what is dirty, then forget what files hold; False where only the first was possible."""
    os.sync()
    try:
        _DROP.write_text("3")
    except OSError:
        return False
    return True


def copy(source: Path, target: Path) -> Measured:
    """The same bytes by ``cp``, down to the disk."""
    drop_page_cache()
    began = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    _sync(target)
    return Measured("copy", time.monotonic() - began)


def convert(name: str, words: Sequence[object]) -> Measured:
    """A conversion from its start to its end."""
    drop_page_cache()
    began, process, peak = time.monotonic(), _start(words), 0
    while process.poll() is None:
        peak = max(peak, *(_resident(each) for each in _family(process.pid)), 0)
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{name} ended with exit code {process.returncode}")
    os.sync()
    return Measured(name, time.monotonic() - began, peak)


def convert_with_kills(words: Sequence[object], seconds: float, kills: int, drawn: random.Random) -> int:
    """Kill a conversion so many times at random moments, then let it end.

    Returns:
        How often it had not ended before.
    """
    met = 0
    for _ in range(kills):
        process = _start(words)
        try:
            process.wait(drawn.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            met += 1
        family = list(_family(process.pid))
        for each in family if drawn.random() < 0.5 else family[:1]:
            each.send_signal(signal.SIGKILL)
        process.wait()
    if _start(words).wait():
        sys.exit("the conversion did not end after it was killed")
    return met


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while piece := file.read(1 << 24):
                    digest.update(piece)
            found[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return found


def _start(words: Sequence[object]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "spikingbrain_train", "convert", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def _family(pid: int) -> Iterator[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        yield from (parent, *parent.children(recursive=True))
    except psutil.NoSuchProcess:
        return


def _resident(process: psutil.Process) -> int:
    """Bytes that are the process's own: pages of files that it maps belong to the page cache."""
    try:
        memory = process.memory_info()
    except psutil.NoSuchProcess:
        return 0
    return memory.rss - memory.shared


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def main() -> None:
    """Measure, and print the table."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument(
        "--output", type=Path, required=True, help="folder on the disk that is measured; emptied"
    )
    flags.add_argument("--layers", type=int, default=28, help="of Qwen2.5-7B's 28 (default: all)")
    flags.add_argument("--kills", type=int, default=0, help="of each way, at random moments")
    flags.add_argument("--seed", type=int, default=0, help="of those moments")
    parsed = flags.parse_args()
    folder: Path = parsed.output
    source, hybrid, back, split = (folder / name for name in ("source", "hybrid", "export", "split"))
    if not source.is_dir():
        write_source(source, parsed.layers)
    size = sum(path.stat().st_size for path in source.iterdir())
    print(f"{size / 1e9:.1f} GB; page cache {'dropped' if drop_page_cache() else 'not dropped: not root'}")
    ways = {
        "import": (
            ["import", "--hf", source, "--conversion", "spikingbrain_7b", "--overwrite", "--output"],
            hybrid,
        ),
        "reshard": (
            ["reshard", "--checkpoint", hybrid, "--tp", 2, "--pp", 1, "--overwrite", "--output"],
            split,
        ),
        "export": (["export", "--checkpoint", hybrid, "--overwrite", "--output"], back),
    }
    copied = copy(source, folder / "copy")
    shutil.rmtree(folder / "copy")
    rows = [["what", "seconds", "x copy", "peak of a process"], ["copy", f"{copied.seconds:.1f}", "1.00", ""]]
    for name, (words, output) in ways.items():
        shutil.rmtree(output, ignore_errors=True)
        done = convert(name, [*words, output])
        ratio = f"{done.seconds / copied.seconds:.2f}"
        rows.append([name, f"{done.seconds:.1f}", ratio, f"{done.peak_bytes / 1e9:.2f} GB"])
        if parsed.kills:
            undisturbed = digests(output)
            shutil.rmtree(output)
            drawn = random.Random(parsed.seed)
            met = convert_with_kills([*words, output], done.seconds, parsed.kills, drawn)
            same = digests(output) == undisturbed
            litter = [path.name for path in folder.iterdir() if path not in (source, hybrid, back, split)]
            verdict = "the same bytes" if same else "OTHER BYTES"
            rows.append(
                [f"{name}, killed {met} x", verdict, "", f"left behind: {', '.join(litter) or 'nothing'}"]
            )
        shutil.rmtree(split, ignore_errors=True)
    print("\n".join(table(rows, left=1)))


if __name__ == "__main__":
    main()
