"""LLaMA-Factory's Ray on two CPU workers of this machine. The train stage refuses it: on a CPU it
waits for ever for ten CPUs for each CPU there is, so the reservation is made for the workers here.
What this shows is that our code gets into Ray's workers, and that they train as one process does.
"""

import json
import os
import subprocess
import sys

import pytest

from stages.tuning import config as tuning
from stages.tuning import process
from tests.contracts import ROOT

pytestmark = pytest.mark.slow
STEPS = 6

TRAIN = """
import sys
import llamafactory.train.tuner as tuner
from llamafactory.extras.misc import use_ray
if use_ray():
    import ray
    ray.init(num_cpus=20, include_dashboard=False, object_store_memory=10**8)
    sys.argv.append("master_addr=" + ray.nodes()[0]["NodeManagerAddress"])
    reserve = tuner.get_placement_group
    tuner.get_placement_group = lambda devices: reserve(2)
tuner.run_exp()
"""


def losses(folder, configuration, **more):
    """The loss at each step of a training, as our callback writes it."""
    folder.mkdir()
    (folder / "train.py").write_text(TRAIN)
    (folder / "made.yaml").write_text(json.dumps(configuration | {"output_dir": str(folder)}))
    base = tuning.environment(0, os.environ | {"OMP_NUM_THREADS": "1"} | more)
    base = process.with_shared_prefix(base, None, keep_vision_features=False)
    base |= process.inside(folder / "events.jsonl", base)
    done = subprocess.run(
        [sys.executable, str(folder / "train.py"), str(folder / "made.yaml")],
        env=base,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    entries = [json.loads(line) for line in (folder / "events.jsonl").open()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def test_two_workers_have_the_curve_of_one_process_at_the_same_batch(
    params_with, model_dir, formatted_dir, pairs_dir, tmp_path
):
    pytest.importorskip("ray", reason="ray is not among the requirements: pip install ray")
    p = params_with(**{"train.logging_steps": 1, "train.save_strategy": "no"})
    paths = {"model": model_dir, "formatted": formatted_dir, "images": pairs_dir / "images"}
    made = tuning.dpo_config(p, **paths, output=tmp_path, validated=False)
    made |= {"max_steps": STEPS, "gradient_accumulation_steps": 1, "preprocessing_num_workers": 1}
    one = losses(tmp_path / "one", made | {"per_device_train_batch_size": 4})
    made |= {"per_device_train_batch_size": 2, "ray_num_workers": 2}
    two = losses(tmp_path / "two", made, USE_RAY="1")
    assert len(one) == STEPS
    assert two == pytest.approx(one, abs=1e-4)
    assert max(one) - min(one) > 1e-3
