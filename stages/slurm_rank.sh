# Start one process of a Slurm step: LAUNCH="srun --kill-on-bad-exit=1 sh stages/slurm_rank.sh".
# It tells the stage its place in the words of torchrun. Like stages/launch.sh it is in nobody's deps.
: "${SLURM_PROCID:?is not set: this is to be started by srun}"
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID"
export WORLD_SIZE="${SLURM_STEP_NUM_TASKS:-$SLURM_NTASKS}"
# Tasks of each node, such as 8(x2),4: the entry of this node.
LOCAL_WORLD_SIZE=$(echo "$SLURM_STEP_TASKS_PER_NODE" | tr , '\n' | awk -F '[(x)]+' -v node="$SLURM_NODEID" \
  '{ before += $2 ? $2 : 1; if (before > node) { print $1; exit } }')
export LOCAL_WORLD_SIZE
if [ -z "$MASTER_ADDR" ]; then
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
fi
# Below the ports that systems hand out by themselves; two steps at a time on one node get two ports.
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((15000 + (SLURM_JOB_ID * 16 + SLURM_STEP_ID) % 15000))}"
exec python -m "$@"
