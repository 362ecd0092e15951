# Start one stage under the launcher that $LAUNCH names, for instance LAUNCH="torchrun --standalone --nproc_per_node=2 -m".
# The launcher is not part of a stage's identity, so this file is in nobody's deps.
PATH="$PWD/.venv/bin:$PATH"
stage=$1
shift
exec ${LAUNCH:-python -m} "stages.$stage" "$@"
