"""The pipeline. Each module here is a DVC stage, which ``dvc.yaml`` runs as
``python -m stages.<stage>``. What stages share lies in folders by concern; each imports only those
before it:

    core        errors, the command line, where the project is: plumbing only
    families    what differs between families of models, an entry for each
    pairs       tables, images and the processes that decode them
    sources     where data sets and base models come from, a file for each kind
    params      ``params.yaml`` as checked models, and what LLaMA-Factory accepts
    model       tokens, log-probs and answers of a policy
    tuning      a training: its configuration, its process, its history
    answers     what a model answers, and how it does when the image is changed
    evaluation  metrics, and the statistics behind them
    reporting   the page, the model card and the words on them
    tracking    MLflow, and what a result came from; nothing there changes an output
    commands    what people run beside the pipeline, as ``python -m stages <command>``
"""

import sys
from importlib.util import find_spec

if find_spec("llamafactory") is None:
    raise SystemExit(
        f"error: {sys.executable} lacks the project's packages: use make, or first activate "
        "the environment (`. .venv/bin/activate`) that `make setup` creates"
    )
