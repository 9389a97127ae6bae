"""DPO of one small random Qwen3-VL by LLaMA-Factory, TRL, ms-swift and this project, side by side.

    python -m benchmarks.peers
    python -m benchmarks.peers --size 4b --device-name cuda --dtype bfloat16 --image-tokens 576
    python -m benchmarks.peers --loss mpo          # without ms-swift

Each peer gets an environment of its own below ``benchmarks/.peers``, made by uv with the versions
below; what computes (``SAME``) has this project's version in all. Weights, pairs, LoRA and batch
are the same, and so are the first loss and gradient norm, or the benchmark fails. What is timed is
a whole step of each one's own training, ``benchmarks.peer``: images, forward, reference, backward,
optimizer. The trainers take turns, so that a busy machine slows all of them (processor time says
more there); memory is what a step needs on top of what the process held before. What a peer refuses
is printed in its own words.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.pipeline import stack
from benchmarks.throughput import SIZES, make_model, make_pairs, parameters_of
from benchmarks.train import QUESTION, side_of
from stages.core import command
from stages.model import formatted, reference_logps, scoring
from stages.tuning.inside.sitecustomize import REFERENCE

HERE = Path(__file__).parent
ENVIRONMENTS = HERE / ".peers"
PEERS = {
    "TRL": ("trl==1.16.0", "datasets==4.8.4"),
    "ms-swift": ("ms-swift==4.6.0", "qwen-vl-utils==0.0.14"),
}
SAME = ("torch", "torchvision", "transformers", "peft", "accelerate", "tokenizers", "numpy")
LLAMAFACTORY, CACHED = "LLaMA-Factory", "ours, reference cached"
TRAINERS = {
    LLAMAFACTORY: "llamafactory",
    "TRL": "trl",
    "ms-swift": "swift",
    "ours, reference computed": "ours",
    CACHED: "ours",
}
ASKED_FOR = ("precompute_ref_log_probs", "padding_free")
RANK, BETA = 8, 0.1
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}  # of loss and gradient norm


class Trainer:
    """A process that trains a step at each turn (``benchmarks.peer``)."""

    def __init__(self, way: str, folder: Path, given: dict[str, Any]) -> None:
        name = "-".join([TRAINERS[way], *given["options"]]) + "-cached" * (way == CACHED)
        self.log = folder / f"{name}.log"
        given = given | {"trainer": TRAINERS[way], "output": str(folder / name)}
        hidden = {} if given["device_name"] == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        cached = {REFERENCE: str(folder / "reference")} if way == CACHED else {}
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
        self.process = subprocess.Popen(
            [python_of(way), "-m", "benchmarks.peer", json.dumps(given)],
            cwd=HERE.parent,
            env=os.environ | offline | hidden | cached,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )

    def answer(self) -> dict[str, Any]:
        """What it tells next."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.log.name} ended:\n{self.log.read_text()[-3000:]}")
        return dict(json.loads(line))

    def step(self) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def main(
    size: str = "100m",
    device_name: str = "cpu",
    dtype: str = "float32",
    batch_size: int = 1,
    image_tokens: int = 256,
    answer_tokens: int = 120,
    repeats: int = 3,
    loss: str = "sigmoid",
) -> None:
    if loss == "mpo":
        del PEERS["ms-swift"], TRAINERS["ms-swift"]
    for peer, requirements in PEERS.items():
        install(peer, requirements)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = (batch_size * (repeats + 1), image_tokens, answer_tokens)
        prepare(folder, size, device_name, dtype, shape)
        given = {
            "model": str(folder / "model"),
            "data": str(folder),
            "device_name": device_name,
            "dtype": dtype,
            "batch_size": batch_size,
            "rank": RANK,
            "beta": BETA,
            "loss": loss,
            "options": {},
        }
        said = {
            f"{peer}, {option}": refusal(peer, folder, given | {"options": {option: True}})
            for peer in PEERS
            for option in ASKED_FOR
        }
        found = side_by_side(folder, given, repeats)
    print(
        f"\ncommand: python -m benchmarks.peers --size {size} --device-name {device_name} "
        f"--dtype {dtype} --batch-size {batch_size} --image-tokens {image_tokens} "
        f"--answer-tokens {answer_tokens} --repeats {repeats} --loss {loss}\n"
        f"{stack()}; in environments of their own: "
        f"{', '.join(' '.join(requirements) for requirements in PEERS.values())}\n\n"
        "| training | pairs/s | times LLaMA-Factory | the same, processor time | memory, GB "
        "| first loss | gradient norm |\n|---|---|---|---|---|---|---|"
    )
    seconds, processor = (
        {way: statistics.median(step[kind] for step in steps[1:]) for way, steps in found.items()}
        for kind in ("seconds", "processor")
    )
    for way, (first, *steps) in found.items():
        print(
            f"| {way} | {batch_size / seconds[way]:.3f} "
            f"| {seconds[LLAMAFACTORY] / seconds[way]:.2f} "
            f"| {processor[LLAMAFACTORY] / processor[way]:.2f} "
            f"| {max(step['memory'] for step in steps):.2f} "
            f"| {first['loss']:.6f} | {first['norm']:.5f} |"
        )
    print(*(f"\n{asked}: {words}" for asked, words in said.items()))
    if loss == "mpo":
        del found["TRL"]  # its BCO leaves out δ, the mean of rewards
    for value in ("loss", "norm"):
        firsts = [steps[0][value] for steps in found.values()]
        if max(firsts) - min(firsts) > TOLERANCE[dtype] * max(firsts):
            raise SystemExit(f"the trainers do not agree on the first {value}")


def install(peer: str, requirements: tuple[str, ...]) -> None:
    """Make a peer's environment, unless it was made with these requirements."""
    wanted = "\n".join([*requirements, *(f"{name}=={version(name)}" for name in SAME)])
    stamp = ENVIRONMENTS / peer / "installed.txt"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    uv = Path(sys.executable).parent / "uv"
    folder = stamp.parent
    subprocess.run(
        [uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], check=True
    )
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", python_of(peer), *wanted.split()], check=True
    )
    stamp.write_text(wanted)


def python_of(way: str) -> Path:
    return ENVIRONMENTS / way / "bin" / "python" if way in PEERS else Path(sys.executable)


def prepare(
    folder: Path, size: str, device_name: str, dtype: str, shape: tuple[int, int, int]
) -> None:
    """Write the model, the pairs, and the reference's log-probs of them."""
    pairs, image_tokens, answer_tokens = shape
    make_model(folder / "model", SIZES[size], device_name, dtype)
    side = side_of(image_tokens)
    policy = scoring.load(folder / "model", parameters_of(device_name, dtype, side**2))
    rows = make_pairs(folder, policy.tokenizer, pairs, answer_tokens, side)
    for row in rows:
        row["messages"][0]["content"] = QUESTION
    info = formatted.dataset_info(system_prompts=False)
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    logps = scoring.log_probs(policy, rows, folder, batch_tokens=1, label="reference")
    reference_logps.write(folder / "reference", logps, {})


def refusal(way: str, folder: Path, given: dict[str, Any]) -> str:
    """What a peer says to an option: its error, or the last lines of its log that name it."""
    (option,) = given["options"]
    trainer = Trainer(way, folder, given)
    answer = trainer.answer()
    trainer.end()
    log = trainer.log.read_text(encoding="utf-8").splitlines()
    named = [line for line in log if f"{option}=True" in line]
    return str(answer.get("refused") or (named or ["taken"])[-1])


def side_by_side(
    folder: Path, given: dict[str, Any], repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """The steps of each trainer, in turns; the first warms up."""
    trainers = {way: Trainer(way, folder, given) for way in TRAINERS}
    try:
        for trainer in trainers.values():
            trainer.answer()
        steps: dict[str, list[dict[str, Any]]] = {way: [] for way in trainers}
        for _ in range(repeats + 1):
            for way, trainer in trainers.items():
                steps[way].append(trainer.step())
    finally:
        for trainer in trainers.values():
            trainer.end()
    return steps


if __name__ == "__main__":
    command.run(main)
