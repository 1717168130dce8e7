#!/usr/bin/env bash
# Written by `tritune submit`, for sbatch. It may be submitted again as it is: the run goes on from its newest checkpoint.
#SBATCH --job-name=tritune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=64
#SBATCH --mem=400G
#SBATCH --time=24:00:00
#SBATCH --account=p123
#SBATCH --constraint=gpu
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=/runs/mine/slurm-%j.out
#SBATCH --chdir=/home/u/work
#SBATCH --signal=B:USR1@120
# shellcheck disable=SC2016  # what the user gave is quoted, so that it is not expanded

set -u

run_dir=/runs/mine
job=$SLURM_JOB_ID
set +u
module load cuda
set -u
export NCCL_SOCKET_IFNAME=hsn
export PYTHONSAFEPATH=1

# A stop is asked for twice, by a file in the run directory and by a signal through srun: either may come late, or not at all.
# Should the save take too long for the scheduler, the job is requeued all the same, before it would be ended for good.
asked=""
step=""
guard=""
# shellcheck disable=SC2317  # the traps below call it
ask_to_stop() {
  asked=${asked:-$1}
  echo "tritune: the job got $1: the run is to save and stop"
  touch "$run_dir/STOP"
  if [ -n "$step" ]; then kill -USR1 "$step" 2>/dev/null; fi
  if [ "$1" = USR1 ] && [ -z "$guard" ]; then
    (sleep 110 && scontrol requeue "$job") &
    guard=$!
  fi
}
trap 'ask_to_stop USR1' USR1
trap 'ask_to_stop TERM' TERM

mkdir -p "$run_dir"
rm -f "$run_dir/again-after"
# Another port for each attempt: whoever holds one does not hold the next.
port=$((20000 + (SLURM_JOB_ID + 97 * ${SLURM_RESTART_COUNT:-0}) % 10000))
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=0 --wait=120 --cpus-per-task=64 \
  '/home/u/my venv/bin/python' -m tritune.launch.node --rendezvous "$first:$port" \
  model=tiny \
  data.train=/data/rows.jsonl \
  train.max_steps=9 \
  launch=slurm_a100_modules \
  launch.nodes=2 \
  launch.account=p123 \
  'launch.venv=/home/u/my venv' \
  'report.question='"'"'Is it "better"; or $HOME?'"'"'' \
  "run.dir=\"$run_dir\"" &
step=$!
# A trap interrupts `wait`, which then returns before srun has ended.
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$?
if [ -n "$guard" ]; then kill "$guard" 2>/dev/null; fi

# 75: stopped on request. 77: stopped, or crashed, and to go on by itself. Anything else is the end.
state=$(scontrol show job "$job" | grep -o 'JobState=[A-Z_]*' | head -n 1)
echo "tritune: attempt ${SLURM_RESTART_COUNT:-0} ended with $code, $state${asked:+, asked by $asked}"
again=""
if [ "$code" = 77 ] || { [ "$code" = 75 ] && [ -n "$asked" ]; }; then again=yes; fi
if [ "$code" -le 128 ]; then
  rm -f "$run_dir/launcher-deaths"
elif [ -n "$asked" ]; then
  again=yes
else
  # The launcher itself was killed, and could not count its attempts.
  echo "$code" >> "$run_dir/launcher-deaths"
  if [ "$(wc -l < "$run_dir/launcher-deaths")" -le 3 ]; then again=yes; fi
fi
# A job that Slurm has ended already, by scancel or a requeue of its own, is left to it, unless it announced the end before.
# SIGNALING stands for a moment in the place of RUNNING.
if [ -n "$again" ] && { [[ "$state" =~ =(RUNNING|SIGNALING)$ ]] || [ "$asked" = USR1 ]; }; then
  # A job that ends by itself is not requeued, and one that waits here is ended by the requeue.
  trap '' USR1
  trap 'exit 75' TERM
  if [ -s "$run_dir/again-after" ]; then sleep "$(cat "$run_dir/again-after")"; fi
  if scontrol requeue "$job"; then sleep 3600; fi
fi
if [ "$code" = 77 ]; then code=75; fi
exit "$code"
