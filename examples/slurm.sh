#!/usr/bin/env bash
# Runs a preset on a SLURM cluster, from a clean machine: code from Git, data and cache from the DVC
# remote, results pushed back to both.
#
#   REPOSITORY=git@host:us/pipeline.git NAME=first sbatch examples/slurm.sh
#   REPOSITORY=… NAME=first sbatch --nodes=2 examples/slurm.sh      # one training over both
#   REPOSITORY=… NAME=warm SET='train.beta=0.1,0.2 train.seed=1,2' sbatch examples/slurm.sh
#
# DRY_RUN=1 bash examples/slurm.sh prints what would run. Change the lines with #SBATCH to what your
# cluster calls its partitions and GPUs. MLFLOW_TRACKING_URI, HF_TOKEN and the credentials of the
# remote come from the environment that sbatch hands on.
#SBATCH --job-name=preference-tuning
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=256G
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:TERM@300   # five minutes before the end
#SBATCH --requeue
set -euo pipefail

: "${REPOSITORY:?the address of the Git repository}"
: "${NAME:?a name for the experiment}"
PRESET=${PRESET:-qwen3-vl-4b-8gpu}
WORK=${WORK:-${SCRATCH:-$PWD}/preference-tuning}   # kept between jobs, seen by all nodes: checkpoints are in it
GPUS=${GPUS:-0,1,2,3,4,5,6,7}
SET=${SET:-}
NODES=${SLURM_NNODES:-1}
if [ -n "$SET" ] && [ "$NODES" -gt 1 ]; then
  echo "SET runs an experiment on each GPU of one node; this job has $NODES nodes" >&2
  exit 2
fi

run() {
  echo "+ $*"
  [ -n "${DRY_RUN:-}" ] || "$@"
}

# A job near its end: the stage is interrupted as by Ctrl-C, keeps what it finished, and the next job
# resumes. Bash runs a trap only once the command before it has ended, so the command is waited for.
long() {
  echo "+ $*"
  if [ -n "${DRY_RUN:-}" ]; then return; fi
  set -m
  "$@" &
  child=$!
  set +m
  trap 'kill -INT -- "-$child"' TERM
  wait "$child" || wait "$child"
}

# DVC stores an experiment as a commit, and refuses one without an author.
if ! git config user.email >/dev/null; then
  export GIT_AUTHOR_NAME="${GIT_AUTHOR_NAME:-slurm}" GIT_AUTHOR_EMAIL="${GIT_AUTHOR_EMAIL:-slurm@localhost}"
  export GIT_COMMITTER_NAME="$GIT_AUTHOR_NAME" GIT_COMMITTER_EMAIL="$GIT_AUTHOR_EMAIL"
fi

if [ ! -d "$WORK/.git" ]; then
  run git clone "$REPOSITORY" "$WORK"
fi
[ -n "${DRY_RUN:-}" ] || cd "$WORK"
run make setup
run make use "PRESET=$PRESET"
export PATH="$PWD/.venv/bin:$PATH"
run dvc pull --allow-missing --run-cache   # base, data, reference, and whatever else was pushed
if [ -n "$SET" ]; then
  run git commit --allow-empty --all --message "Preset $PRESET"
  long make sweep "SET=$SET" "GPUS=$GPUS" "NAME=$NAME"
elif [ "$NODES" -gt 1 ]; then
  # This script runs on node 0. Ray runs on every node for as long as the experiment does.
  run make extras                          # Ray is one of them
  export USE_RAY=1 RAY_AUTH_MODE=token RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
  RAY_ADDRESS="$(hostname):$((20000 + ${SLURM_JOB_ID:-0} % 10000))"
  export RAY_ADDRESS
  cluster=(srun "--nodes=$NODES" --ntasks-per-node=1 --overlap --wait=0 bash -c '
    if [ "$SLURM_NODEID" = 0 ]; then exec ray start --head "--port=${RAY_ADDRESS#*:}" --block; fi
    until ray health-check "--address=$RAY_ADDRESS" >/dev/null 2>&1; do sleep 2; done
    exec ray start "--address=$RAY_ADDRESS" --block')
  echo "+ ${cluster[*]}"
  if [ -z "${DRY_RUN:-}" ]; then
    RAY_AUTH_TOKEN=$(ray get-auth-token --generate)   # else whoever reaches the port can run code
    export RAY_AUTH_TOKEN
    "${cluster[@]}" &
    ray=$!
    trap 'kill "$ray" 2>/dev/null && wait "$ray" || true' EXIT
    until ray health-check "--address=$RAY_ADDRESS" >/dev/null 2>&1; do kill -0 "$ray"; sleep 2; done
  fi
  long dvc exp run --name "$NAME" --set-param "train.gpus=$((NODES * ${SLURM_GPUS_ON_NODE:-8}))"
else
  long dvc exp run --name "$NAME"
fi
run dvc exp push origin --rev HEAD         # experiments to Git, their outputs to the DVC remote
