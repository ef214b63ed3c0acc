"""Claim: a 7B converts both ways within twice the time of copying its bytes, in 2 GB of memory a process.

And a conversion that is killed goes on to the same bytes. A folder with the shapes of Qwen2.5-7B and random
bfloat16 weights (28 layers: 15.2 GB) is made a hybrid, exported again and laid out for TP 2. Before each, the
same bytes are copied with ``cp``. The page cache is dropped before either, where the system lets us (root on
Linux). Times include the start of the command and the sync of what was written; memory is the peak of the
largest process, without the files that it maps. What ``--dry-run`` announces is asked right before.

  python benchmarks/conversion.py --output /scratch/conversion --layers 28 --rows import export reshard

A row at a time, so that a machine is not held for long, and each several times:

  python benchmarks/conversion.py --output /scratch/conversion --layers 28 --rows export --repeat 3

With --kills, what is asked for is killed so many times at random moments (the command alone or its workers
with it) and started again, and what comes out is held to the undisturbed conversion. The row there_and_back
lays a model with experts out for TP 2 x PP 2, for EP 2 and for one rank again, and compares the files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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
_POOL = 1 << 26
"""Random numbers that all weights are taken from: who moves bytes takes as long for them as for others."""
ROWS = ("import", "export", "reshard", "there_and_back")


@dataclass(frozen=True)
class Announced:
    """What a dry run says that it will take."""

    seconds: float
    written_bytes: float
    peak_bytes: float


@dataclass(frozen=True)
class Measured:
    """One conversion, and the copy before it."""

    name: str
    copied_bytes: int
    copy_seconds: float
    seconds: float
    peak_bytes: int
    """Of the largest process."""
    written_bytes: int
    announced: Announced | None = None

    @property
    def ratio(self) -> float:
        """Time against copying as many bytes as it writes."""
        return self.seconds / (self.copy_seconds * self.written_bytes / self.copied_bytes)


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


def write_source(folder: Path, num_layers: int, embedding_dtype: torch.dtype) -> None:
    """A folder as Hugging Face has Qwen2.5-7B, of so many layers."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    index: dict[str, str] = {}
    total = 0
    starts = list(range(0, num_layers, _LAYERS_OF_A_FILE))
    for number, first in enumerate(starts, 1):
        tensors: dict[str, torch.Tensor] = {}
        if number == 1:
            tensors["model.embed_tokens.weight"] = _random((_VOCAB, _HIDDEN)).to(embedding_dtype)
            tensors["model.norm.weight"] = _random((_HIDDEN,))
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


_numbers: list[torch.Tensor] = []


def _random(shape: Sequence[int]) -> torch.Tensor:
    if not _numbers:
        _numbers.append(torch.empty(_POOL).normal_(std=0.02).bfloat16())
    number = torch.Size(shape).numel()
    first = int(torch.randint(_POOL, (1,)))
    repeated = _numbers[0].roll(-first)[:number] if number <= _POOL else _numbers[0].roll(-first)
    return repeated.repeat(-(-number // len(repeated)))[:number].reshape(*shape)


def drop_page_cache() -> bool:
    """Write out what is dirty, then forget what files hold; False where only the first was possible."""
    os.sync()
    try:
        _DROP.write_text("3")
    except OSError:
        return False
    return True


def copy(source: Path, target: Path) -> float:
    """Seconds to copy a folder by ``cp``, down to the disk."""
    drop_page_cache()
    began = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    _sync(target)
    seconds = time.monotonic() - began
    shutil.rmtree(target)
    return seconds


def announced(words: Sequence[object]) -> Announced:
    """What ``--dry-run`` says."""
    drop_page_cache()
    process = _start([*words, "--dry-run"], stdout=subprocess.PIPE)
    said = process.communicate()[0].decode()

    def number(pattern: str) -> float:
        found = re.search(pattern, said)
        if found is None:
            sys.exit(f"the dry run does not say {pattern}:\n{said}")
        return float(found[1])

    took = re.search(r"^time: about (?:(\d+)m )?(\d+)s", said, re.MULTILINE)
    if took is None:
        sys.exit(f"the dry run does not say its time:\n{said}")
    return Announced(
        60.0 * int(took[1] or 0) + int(took[2]),
        number(r"writes ([\d.]+) GB") * 1e9,
        number(r"memory: about ([\d.]+) GB") * 1e9,
    )


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def convert(name: str, words: Sequence[object]) -> tuple[float, int]:
    """Seconds of a conversion from its start to its end, and the peak of its largest process."""
    drop_page_cache()
    began, process, peak = time.monotonic(), _start(words), 0
    while process.poll() is None:
        peak = max(peak, *(_resident(each) for each in _family(process.pid)), 0)
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{name} ended with exit code {process.returncode}")
    _sync(Path(str(words[-1])))
    return time.monotonic() - began, peak


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


def _start(words: Sequence[object], stdout: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "spikingbrain_train", "convert", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=stdout)


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


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Benchmark:
    """The folders of one size, and what is done with them.

    Args:
        folder: on the disk that is measured.
        layers: of the model.
        embedding_dtype: of its embedding.
    """

    def __init__(self, folder: Path, layers: int, embedding_dtype: torch.dtype) -> None:
        self.folder = folder
        self.source, self.hybrid, self.back, self.split = (
            folder / name for name in ("source", "hybrid", "export", "split")
        )
        if not self.source.is_dir():
            write_source(self.source, layers, embedding_dtype)

    def words(self, row: str) -> tuple[list[object], Path, Path]:
        """The command of a row, without its output; what it reads; and what it writes."""
        checkpoint = ["--checkpoint", self.hybrid, "--overwrite", "--output"]
        if row == "import":
            recipe = ["--conversion", "spikingbrain_7b", "--overwrite", "--output"]
            return ["import", "--hf", self.source, *recipe], self.source, self.hybrid
        if not self.hybrid.is_dir():
            words, _, output = self.words("import")
            convert("import", [*words, output])
        if row == "export":
            return ["export", *checkpoint], self.hybrid, self.back
        return ["reshard", "--tp", 2, "--pp", 1, *checkpoint], self.hybrid, self.split

    def measure(self, row: str) -> Measured:
        """One conversion, after a copy of what it reads."""
        words, source, output = self.words(row)
        shutil.rmtree(output, ignore_errors=True)
        copy_seconds = copy(source, self.folder / "copy")
        said = announced([*words, output])
        seconds, peak = convert(row, [*words, output])
        return Measured(row, _size(source), copy_seconds, seconds, peak, _size(output), said)

    def kill(self, row: str, kills: int, seed: int) -> str:
        """What becomes of a conversion that is killed."""
        words, _, output = self.words(row)
        shutil.rmtree(output, ignore_errors=True)
        seconds, _ = convert(row, [*words, output])
        undisturbed = digests(output)
        shutil.rmtree(output)
        met = convert_with_kills([*words, output], seconds, kills, random.Random(seed))
        verdict = "the same bytes" if digests(output) == undisturbed else "OTHER BYTES"
        known = (self.source, self.hybrid, self.back, self.split)
        litter = [path.name for path in self.folder.iterdir() if path not in known and path.is_dir()]
        left = ", ".join(litter) or "nothing"
        return f"{row}, {kills} kills, {met} before the end: {verdict}, left behind: {left}"

    def there_and_back(self) -> Iterator[Measured | str]:
        """A model with experts laid out for other ranks, step by step, and for one again."""
        recipe = ["--conversion", "spikingbrain_76b", "moe.num_experts=4"]
        here = self.folder / "experts"
        shutil.rmtree(here, ignore_errors=True)
        convert("import", ["import", "--hf", self.source, *recipe, "--overwrite", "--output", here])
        roads = {"one": "TP 1 x PP 1", "tp2_pp2": "TP 2 x PP 2", "ep2": "EP 2", "again": "TP 1 x PP 1 again"}
        degrees = {"tp2_pp2": ["--tp", 2, "--pp", 2, "--etp", 1], "ep2": ["--ep", 2]}
        first: dict[str, str] = {}
        for name, said in roads.items():
            output = self.folder / name
            shutil.rmtree(output, ignore_errors=True)
            copy_seconds = copy(here, self.folder / "copy")
            words = ["reshard", *degrees.get(name, []), "--checkpoint", here, "--output", output]
            before = announced(words)
            seconds, peak = convert(name, words)
            yield Measured(
                f"reshard to {said}", _size(here), copy_seconds, seconds, peak, _size(output), before
            )
            shutil.rmtree(here)
            here = output
            if name == "one":
                first = digests(output)
        last = digests(here)
        differ = [name for name in first.keys() | last.keys() if first.get(name) != last.get(name)]
        # derivation.json tells the way; the manifest has its checksum, and those of files that are compared.
        weights = [name for name in differ if not name.endswith(("derivation.json", "manifest.json"))]
        yield f"there and back: {', '.join(weights) or 'all files'} {'differ' if weights else 'the same'}"
        shutil.rmtree(here)


def summary(measured: Sequence[Measured]) -> list[str]:
    """A table, rows of one name together."""
    rows = [
        ["what", "times", "copy, s", "seconds", "x copy", "peak of a process", "announced: s", "GB", "memory"]
    ]
    for name in dict.fromkeys(each.name for each in measured):
        of_name = [each for each in measured if each.name == name]
        said = [each.announced for each in of_name if each.announced is not None]
        rows.append(
            [
                name,
                str(len(of_name)),
                _spread([each.copy_seconds for each in of_name]),
                _spread([each.seconds for each in of_name]),
                _spread([each.ratio for each in of_name], 2),
                f"{max(each.peak_bytes for each in of_name) / 1e9:.2f} GB",
                _spread([each.seconds for each in said], 0),
                f"{said[-1].written_bytes / 1e9:.2f} ({of_name[-1].written_bytes / 1e9:.2f} written)",
                f"{max(each.peak_bytes for each in said) / 1e9:.1f} GB",
            ]
        )
    return table(rows, left=1)


def _spread(numbers: Sequence[float], digits: int = 1) -> str:
    middle = f"{statistics.median(numbers):.{digits}f}"
    if len(numbers) == 1:
        return middle
    return f"{middle} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"


def main() -> None:
    """Measure, and print the table of all that was measured in the folder so far."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", type=Path, required=True, help="folder on the disk that is measured")
    flags.add_argument("--layers", type=int, default=28, help="of Qwen2.5-7B's 28 (default: all)")
    flags.add_argument("--fp32-embedding", action="store_true", help="2.2 GB in one tensor")
    flags.add_argument("--rows", nargs="*", choices=ROWS, default=ROWS[:3], help="what is done")
    flags.add_argument("--repeat", type=int, default=1, help="times each row is measured")
    flags.add_argument("--kills", type=int, default=0, help="kill the rows instead of measuring them")
    flags.add_argument("--seed", type=int, default=0, help="of the moments of kills")
    parsed = flags.parse_args()
    if "there_and_back" in parsed.rows and parsed.layers % 2:
        flags.error(f"--rows there_and_back lays out for PP 2, so --layers must be even, not {parsed.layers}")
    embedding_dtype = torch.float32 if parsed.fp32_embedding else torch.bfloat16
    benchmark = Benchmark(parsed.output, parsed.layers, embedding_dtype)
    print(f"source: {_size(benchmark.source) / 1e9:.2f} GB")
    print(f"page cache {'dropped before each' if drop_page_cache() else 'not dropped: not root'}")
    notes: Path = parsed.output / "measured.jsonl"
    for row in parsed.rows:
        if parsed.kills:
            print(benchmark.kill(row, parsed.kills, parsed.seed), flush=True)
            continue
        for _ in range(parsed.repeat):
            found = benchmark.there_and_back() if row == "there_and_back" else [benchmark.measure(row)]
            for each in found:
                if isinstance(each, str):
                    print(each, flush=True)
                    continue
                with notes.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(each)) + "\n")
    if notes.is_file():
        lines = [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]
        measured = [Measured(**line | {"announced": Announced(**line["announced"])}) for line in lines]
        print("\n".join(summary(measured)))


if __name__ == "__main__":
    main()
