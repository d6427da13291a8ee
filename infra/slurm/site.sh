# shellcheck shell=bash
# What the scripts beside this one share; change it to fit your cluster. They are submitted from the root of
# the repository, which, like the store and the weights, lies where every node sees it.
root=${SLURM_SUBMIT_DIR:-$PWD}
export PATH=$root/.venv/bin:$PATH
# how workers and builds find the scheduler
export SCHEDULER_FILE=${SCHEDULER_FILE:-$root/.dask-scheduler.json}
# a unit is one thread: more of them would fight for the cores
export OMP_NUM_THREADS=1
# A store on S3: every job needs its credentials, from a file that only you can read.
# source "$HOME/.s3-credentials.sh"
